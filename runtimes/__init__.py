"""What the device needs: the edit, its file formats, sessions, generation, parity. Imports neither torch nor transformers nor onnx."""
