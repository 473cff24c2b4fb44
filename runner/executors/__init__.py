"""Who computes a plan: this process, or replicas run by Ray. Does not know texts or files."""
