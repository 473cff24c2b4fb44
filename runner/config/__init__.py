"""Flags, a TOML file or Python arguments -> one checked RunConfig. Reads no model and no rows."""
