"""The run: read, tokenize, plan, predict and write, within a time limit."""
