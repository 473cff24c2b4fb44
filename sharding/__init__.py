"""Decides what goes where, by arithmetic on lengths, shapes and devices.

Knows nothing of Ray, JAX, Keras, files or tables, and never imports `runner`.
"""
