"""Bundles in onnxruntime."""
