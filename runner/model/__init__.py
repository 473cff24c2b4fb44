"""The code of workers: preset, LoRA and head -> compiled programs. Only this room imports JAX."""
