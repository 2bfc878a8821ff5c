"""Engines in TensorRT, built and run."""
