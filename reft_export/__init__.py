"""The host's room: training, adapter import, export, quantization, parity and the CLI. Importing the package alone stays cheap."""
