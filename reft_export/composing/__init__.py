"""Several adapters of one base into one."""
