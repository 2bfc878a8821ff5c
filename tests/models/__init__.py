"""Tiny bases of every family and adapters with random parameters."""
