"""What is said while a run goes on: progress, logs, metrics and a timeline."""
