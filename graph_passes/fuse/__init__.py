"""Operators of onnxruntime's own in place of the small ones that a traced decoder writes them out with."""
