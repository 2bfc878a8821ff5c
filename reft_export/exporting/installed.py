"""Whether an exporter is installed; told without importing it, or torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from runtimes.errors import BackendUnavailable


def check_exporter(exporter: str) -> None:
    """Raises BackendUnavailable for an exporter that is not installed."""
    if exporter in CHECKS:
        CHECKS[exporter]()


def check_builder() -> None:
    """Raises BackendUnavailable where onnxruntime-genai's builder is not installed."""
    if importlib.util.find_spec("onnxruntime_genai") is None:
        raise BackendUnavailable("--exporter builder needs onnxruntime-genai, which is not installed; pip install 'reft-export[genai]'")


def check_optimum() -> None:
    """Raises BackendUnavailable where optimum-onnx is not installed, or refuses the transformers that is."""
    remedy = "pip install 'reft-export[cpu,host,optimum]' in an environment of its own"
    version = importlib.metadata.version("transformers")
    if tuple(map(int, version.split(".")[:2])) >= (4, 58):
        raise BackendUnavailable(f"--exporter optimum needs transformers 4.57, here is {version}; {remedy}")
    if importlib.util.find_spec("optimum") is None or importlib.util.find_spec("optimum.exporters.onnx") is None:
        raise BackendUnavailable(f"--exporter optimum needs optimum-onnx, which is not installed; {remedy}")


def check_transformers() -> None:
    """Raises BackendUnavailable where the installed transformers has no exporters."""
    version = importlib.metadata.version("transformers")
    if int(version.partition(".")[0]) < 5 or importlib.util.find_spec("transformers.exporters") is None:
        raise BackendUnavailable(f"--exporter transformers needs transformers 5.23, here is {version}; pip install 'transformers>=5.23,<6'")


CHECKS = {"builder": check_builder, "optimum": check_optimum, "transformers": check_transformers}
