"""Adapters without training: a direction measured between two sides of a contrast, which is added or taken out."""
