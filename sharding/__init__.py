"""Decides what goes where: pure arithmetic on lengths, shapes and devices.

Knows nothing of Ray, JAX, Keras, files or tables, and never imports `runner`.
"""
