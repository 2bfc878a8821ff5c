"""pyreft's adapters, read and written."""
