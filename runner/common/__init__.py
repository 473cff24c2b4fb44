"""What every room may use: errors, records, files, units, versions, this machine."""
