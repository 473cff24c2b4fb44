"""What a run reports while it works: progress, logs, metrics and a timeline."""
