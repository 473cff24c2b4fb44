"""What runs inside a worker: preset, LoRA and head -> compiled programs. JAX lives here."""
