"""The run: read, tokenize, plan, predict, write. Its passes, steering, deadline and guard."""
