"""Edits into what TensorRT-Edge-LLM exports."""
