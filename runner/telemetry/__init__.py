"""What a run reports while it goes on: progress, logs, metrics and a timeline."""
