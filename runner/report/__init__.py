"""Facts of a run -> JSON, a page with charts and a trace. Computes nothing of the run itself."""
