"""Bundles in onnxruntime."""

from runtimes.errors import BackendUnavailable

try:
    import onnxruntime  # noqa: F401
except ImportError:
    raise BackendUnavailable("onnxruntime is not installed; pip install onnxruntime (or onnxruntime-gpu, never both)") from None
