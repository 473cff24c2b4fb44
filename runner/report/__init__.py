"""What is known of a run -> JSON, a page, charts and a trace. Computes nothing of the run."""
