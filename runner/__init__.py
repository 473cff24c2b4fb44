"""Reads a test set, predicts every row on many devices and writes a checked submission."""

__version__ = "0.1.0"
