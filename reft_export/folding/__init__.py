"""Adapters into a graph that another tool exported."""
