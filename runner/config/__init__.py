"""Flags, a TOML file or Python arguments -> one checked RunConfig. Reads neither model nor rows."""
