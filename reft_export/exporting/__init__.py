"""Routes from a Hugging Face decoder to an ONNX decoder graph with a KV cache; one module per route."""
