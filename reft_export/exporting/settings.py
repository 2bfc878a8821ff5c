"""How a base is exported, and what of it is refused by the settings alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from calibration.settings import QuantizationSettings, settings_for
from runtimes.edits.edit import Site
from runtimes.errors import InputError
from runtimes.precision import TORCH_DTYPES

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
EXPORTERS = ("dynamo", "builder", "optimum", "transformers")
TARGETS = ("onnxruntime", "tensorrt")
DEFAULT_OPSET = 20


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """``precision`` int4 and int8 are weight-only over a float32 graph; ``block_size``, ``accuracy_level``, ``method``, ``symmetric``,
    ``keep_high``, ``embeddings`` and ``cache`` are theirs, as of ``settings_for``.

    ``target``: onnxruntime takes attention as GroupQueryAttention, whose KV cache can be written in place, wherever the family allows it;
    tensorrt takes ONNX's own operators, which ``build`` reads and onnxruntime runs too, slower as the context grows.
    """

    precision: str = "fp32"
    exporter: str = "dynamo"
    logits: str = "all"
    opset: int = DEFAULT_OPSET
    sites: tuple[Site, ...] = ()
    block_size: int | None = None
    accuracy_level: int | None = None
    method: str | None = None
    """None: imatrix for int4 blocks without zero points, else rtn."""
    symmetric: bool | None = None
    keep_high: tuple[str, ...] = ()
    embeddings: int | None = None
    cache: str = "float"
    mixed: bool = False
    """int4 with the most sensitive weights in int8; ``budget_mb``: for the whole bundle, in MB (10^6 bytes), about."""
    budget_mb: float | None = None
    target: Literal["onnxruntime", "tensorrt"] = "onnxruntime"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("precision", self.precision, PRECISIONS),
            ("exporter", self.exporter, EXPORTERS),
            ("logits", self.logits, ("all", "last")),
            ("target", self.target, TARGETS),
        ):
            if value not in known:
                raise InputError(f"{name} {value!r} is unknown; known: {', '.join(known)}")
        if not 18 <= self.opset <= 23:
            raise InputError(f"opset {self.opset} is not supported; 20 is the default, 18 to 23 can be asked for")
        if self.exporter == "builder" and self.opset != DEFAULT_OPSET:
            raise InputError("onnxruntime-genai's builder chooses the opset itself; leave out --opset, or use --exporter dynamo")
        if self.exporter == "builder" and self.precision == "bf16":
            raise InputError(
                "bf16 is exported by dynamo only: no CPU runs the builder's bfloat16 graph, so nothing here could show it right"
            )
        if self.exporter == "builder" and self.target == "tensorrt":
            raise InputError("TensorRT does not know the builder's GroupQueryAttention; use --exporter dynamo for --target tensorrt")
        if self.exporter == "optimum" and (self.float_type != "fp32" or self.logits != "all"):
            raise InputError(
                "optimum's exporter makes float32 graphs with all logits here; use -p fp32, int8 or int4, or --exporter dynamo"
            )

        if self.cache != "float" and self.target != "onnxruntime":
            raise InputError(f"--cache {self.cache} is onnxruntime's GroupQueryAttention's; leave it out with --target {self.target}")
        if (self.mixed or self.budget_mb is not None) and self.precision != "int4":
            raise InputError(
                f"--keep-high auto and --budget-mb choose int8 weights among int4 ones, and -p is {self.precision}; use -p int4"
            )

    @property
    def weight_only(self) -> QuantizationSettings | None:
        if self.precision not in ("int8", "int4"):
            return None
        bits = int(self.precision[3:])
        return settings_for(
            "weight-only",
            bits=bits,
            method=self.method,
            block_size=self.block_size,
            symmetric=self.symmetric,
            accuracy_level=self.accuracy_level,
            keep_high=self.keep_high,
            embeddings=self.embeddings,
            cache=self.cache,
        )

    @property
    def float_type(self) -> str:
        return self.precision if self.precision in TORCH_DTYPES else "fp32"
