"""A bundle to a TensorRT engine."""
