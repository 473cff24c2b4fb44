"""Who computes a plan: this process, or replicas that Ray keeps. Knows no rows and no files."""
