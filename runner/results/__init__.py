"""Answers as they arrive -> a table in the input's order, and a journal that survives a crash."""
