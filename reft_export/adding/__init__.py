"""Adapters into a bundle that stays as it is, and out of it."""
