"""Facts of a run -> JSON, a page with charts, and a trace. Computes no results of its own."""
