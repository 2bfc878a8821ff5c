"""The base: a checkpoint as it is found, loaded and identified."""
