"""Checkpoints that others quantized to 4 bits (GPTQ, AWQ, compressed-tensors): read as a base, and their integers taken over."""
