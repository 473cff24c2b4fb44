"""What every room may use: errors, records, poolings, files, units, versions, this machine."""
