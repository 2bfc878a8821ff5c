"""Quantizers for a folded graph, and what they did to it. Imports onnxruntime's quantization tools, never torch."""
