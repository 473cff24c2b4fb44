"""--plan: rows, a model and devices -> each way to run, whether it fits, and how long it takes."""
