"""What can be asked of the quantizer, scheme by scheme; whatever a scheme or its runtime cannot do is refused here, before any work."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from runtimes.artifacts.values import CacheType
from runtimes.errors import CalibrationError

Precision = Literal["fp32", "fp16", "bf16"]
SchemeName = Literal["weight-only", "dynamic", "static", "qdq-int4", "qdq-int8", "fp8"]
Method = Literal["imatrix", "rtn", "hqq", "k_quant"]
_Name = TypeVar("_Name", bound=str)


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to store weights and multiply by them."""

    bits: tuple[int, ...]
    """The first is the default."""
    runtime: Literal["onnxruntime", "tensorrt"]
    """Whose operators the graph is written in."""
    activations: Literal["", "dynamic", "static"] = ""
    """"" (float), "dynamic" (one scale per token, taken as it runs) or "static" (one scale per tensor, calibrated before)."""
    blockwise: bool = False
    """One scale per block of input values; else one per output column."""
    precisions: tuple[Precision, ...] = ("fp32",)
    """Float types of the bundles it starts from."""
    opset: int = 13
    """What its operators need."""
    lm_head: bool = True
    """Whether the head is quantized unless asked otherwise. Fixed activation ranges cost it most, so ModelOpt leaves it out too."""


SCHEMES: Mapping[SchemeName, Scheme] = {
    "weight-only": Scheme(bits=(4, 8), runtime="onnxruntime", blockwise=True),
    "dynamic": Scheme(bits=(8,), runtime="onnxruntime", activations="dynamic", opset=18),
    "static": Scheme(bits=(8,), runtime="onnxruntime", activations="static", lm_head=False),
    "qdq-int4": Scheme(bits=(4,), runtime="tensorrt", blockwise=True, precisions=("fp32", "fp16", "bf16"), opset=21),
    "qdq-int8": Scheme(bits=(8,), runtime="tensorrt", activations="static", opset=19, lm_head=False),
    "fp8": Scheme(bits=(8,), runtime="tensorrt", activations="static", opset=19, lm_head=False),
}
"""Activations are quantized in float32 graphs only: float16's own rounding moves values across the levels of the grid, and no reference
could tell that from a fault (measured: 3 to 10 % of the largest logit, where 2 % is the budget)."""

METHODS: tuple[Method, ...] = ("imatrix", "rtn", "hqq", "k_quant")
ASYMMETRIC: tuple[Method, ...] = ("hqq", "k_quant")
"""Methods whose blocks always have a zero point."""
ELSEWHERE = {
    "gptq": "onnxruntime's GPTQ returns weights without their scales and feeds a graph that it loads whole; quantize the checkpoint with "
    "GPTQModel, whose integers int4 keeps, or use --method hqq, or --refit, which trains the adapter on the quantized weights",
    "awq": "onnxruntime hands AWQ to nvidia-modelopt, which pins onnxruntime-gpu and an older onnx; quantize the checkpoint with "
    "AutoAWQ or GPTQModel, whose integers int4 keeps, or use --method hqq",
}
"""Methods that are asked for and are not served: why, and what to use."""

CACHES: tuple[CacheType, ...] = ("float", "int8")
NO_FP16_CACHE = (
    "--cache fp16 is not served: onnxruntime rounds what it stores and not what a step has just computed, so a prompt says another thing "
    "when it comes in pieces, and decoding takes longer than with float32; use --cache int8"
)
EMBEDDINGS = (None, 0, 4, 8)
DEFAULT_BLOCK = {4: 32, 8: 64}
"""By bits. A float32 scale for 32 weights of 8 bits is a ninth of the file, and what it buys is not to be seen."""


@dataclass(frozen=True, kw_only=True)
class BlockFormat:
    """How one weight [K, N] is stored: ``block_size`` values along K share a scale, and a zero point unless ``symmetric``."""

    bits: int
    block_size: int
    symmetric: bool = True
    method: Method = "rtn"


@dataclass(frozen=True, kw_only=True)
class QuantizationSettings:
    """``settings_for`` fills in what depends on the scheme.

    ``accuracy_level`` 4 multiplies in int8 (activations quantized per block, the fast path of weight-only); 1 multiplies in float32.
    """

    scheme: SchemeName = "weight-only"
    bits: int = 4
    method: Method = "rtn"
    """``settings_for`` gives int4 blocks without zero points imatrix."""
    block_size: int = 32
    """0: one scale per output column."""
    symmetric: bool = True
    accuracy_level: int = 4
    keep_high: tuple[str, ...] = ()
    """Layers ("0", "0-3") and name patterns ("*.mlp.down_proj") that stay in float."""
    int8: tuple[str, ...] = ()
    """As ``keep_high``, weights that are stored in 8 bits where the others have 4."""
    lm_head: bool | None = None
    """Whether the head is quantized; None is the scheme's default. One that is tied to a quantized embedding always is, unless False."""
    embeddings: int | None = None
    """Bits of the token embedding, and of a head that is tied to it; 0 is float. None: 8 where onnxruntime looks it up, else float."""
    cache: CacheType = "float"
    """How the KV cache is stored: in the graph's float type, or rounded to int8."""
    keep_given: bool = False
    """Whether weights that the base's checkpoint holds in 4-bit blocks keep them."""

    def __post_init__(self) -> None:
        scheme = SCHEMES[check_scheme(self.scheme)]
        if self.bits not in scheme.bits:
            other = ", ".join(name for name, s in SCHEMES.items() if self.bits in s.bits)
            raise CalibrationError(
                f"--scheme {self.scheme} takes {' or '.join(map(str, scheme.bits))} bits, not {self.bits}"
                + (f"; {self.bits} bits: --scheme {other}" if other else "")
            )
        if scheme.blockwise and (self.block_size < 16 or self.block_size & (self.block_size - 1)):
            raise CalibrationError(f"block size {self.block_size} is not a power of two from 16 on")
        if not scheme.blockwise and self.block_size:
            raise CalibrationError(f"--scheme {self.scheme} has one scale per output column and takes no block size")
        if self.int8 and (self.scheme != "weight-only" or self.bits != 4):
            raise CalibrationError("int8 weights stand among int4 ones: use --scheme weight-only -p int4, or leave them out")
        if check_cache(self.cache) != "float" and self.scheme != "weight-only":
            raise CalibrationError(f"--cache {self.cache} goes with --scheme weight-only, not {self.scheme}; leave out one of them")
        self._check_products()
        self._check_embeddings(scheme)

    def _check_products(self) -> None:
        """What MatMulNBits alone can do, and hqq alone."""
        if self.accuracy_level not in (0, 1, 4):
            raise CalibrationError(f"accuracy level {self.accuracy_level} is unknown; 1 is exact, 4 is fast")
        if self.accuracy_level == 4 and (self.scheme != "weight-only" or self.method == "hqq"):
            what = "--method hqq, whose zero points are not whole numbers," if self.method == "hqq" else f"--scheme {self.scheme}"
            raise CalibrationError(f"{what} has no accuracy level 4; leave it out, or use --scheme weight-only --method rtn")
        searched = self.method == "imatrix" and self.scheme == "qdq-int4"
        if check_method(self.method) != "rtn" and self.scheme != "weight-only" and not searched:
            other = "imatrix or rtn" if self.scheme == "qdq-int4" else "rtn"
            raise CalibrationError(f"--method {self.method} chooses MatMulNBits' blocks; with --scheme {self.scheme} use {other}")
        if self.method == "hqq" and self.bits != 4:
            raise CalibrationError("onnxruntime multiplies HQQ's zero points, which are fractions, at 4 bits only; use --method rtn")
        if self.method == "imatrix" and (self.bits != 4 or not self.symmetric):
            what = "8 bits" if self.bits != 4 else "zero points"
            raise CalibrationError(f"--method imatrix searches the scales of 4-bit blocks, not {what}; use --method rtn")
        if not self.symmetric and self.scheme != "weight-only":
            raise CalibrationError(f"--scheme {self.scheme} has symmetric weights only; asymmetric ones: --scheme weight-only")
        if self.symmetric and self.method in ASYMMETRIC:
            raise CalibrationError(f"--method {self.method} chooses a zero point for every block; leave out --symmetric, or use rtn")

    def _check_embeddings(self, scheme: Scheme) -> None:
        if self.embeddings not in EMBEDDINGS:
            raise CalibrationError(f"the embedding is quantized to 4 or 8 bits, not {self.embeddings}")
        if self.embeddings and scheme.runtime == "tensorrt":
            raise CalibrationError(
                f"TensorRT has no lookup in a quantized table, so --scheme {self.scheme} leaves the embedding in float; leave out "
                "--embeddings, or use an onnxruntime scheme (weight-only, dynamic, static)"
            )

    @property
    def kind(self) -> Scheme:
        return SCHEMES[self.scheme]

    @property
    def quantizes_head(self) -> bool:
        """Whether the head is one of the scheme's own products."""
        return self.kind.lm_head if self.lm_head is None else self.lm_head

    @property
    def format(self) -> BlockFormat:
        """Of weights in blocks."""
        return BlockFormat(bits=self.bits, block_size=self.block_size, symmetric=self.symmetric, method=self.method)

    @property
    def int8_format(self) -> BlockFormat:
        """Of the weights that ``int8`` names."""
        return BlockFormat(bits=8, block_size=DEFAULT_BLOCK[8])

    @property
    def embedding_bits(self) -> int:
        if self.embeddings is None:
            return 8 if self.kind.runtime == "onnxruntime" else 0
        return self.embeddings

    @property
    def table_format(self) -> BlockFormat:
        """Of the embedding's rows and of a head tied to them. Other bits than the weights' are rounded: GatherBlockQuantized takes no
        fractions for zero points, and at 8 bits a search gains nothing."""
        bits = self.embedding_bits
        if self.scheme == "weight-only" and bits == self.bits and self.method != "hqq":
            return replace(self.format, method="rtn") if self.method == "imatrix" else self.format
        return BlockFormat(bits=bits, block_size=DEFAULT_BLOCK[bits], symmetric=bits == 8)


def check_scheme(name: str) -> SchemeName:
    return _known(name, SCHEMES, "--scheme")


def check_method(name: str) -> Method:
    if name in ELSEWHERE:
        raise CalibrationError(f"--method {name} is not served: {ELSEWHERE[name]}")
    return _known(name, METHODS, "--method")


def check_cache(name: str) -> CacheType:
    if name == "fp16":
        raise CalibrationError(NO_FP16_CACHE)
    return _known(name, CACHES, "--cache")


def _known(name: str, names: Collection[_Name], option: str) -> _Name:
    found = next((known for known in names if known == name), None)
    if found is None:
        raise CalibrationError(f"{option} {name!r} is unknown; known: {', '.join(names)}")
    return found


def settings_for(
    scheme: str,
    bits: int | None = None,
    *,
    method: str | None = None,
    block_size: int | None = None,
    symmetric: bool | None = None,
    accuracy_level: int | None = None,
    keep_high: tuple[str, ...] = (),
    int8: tuple[str, ...] = (),
    lm_head: bool | None = None,
    embeddings: int | None = None,
    cache: str = "float",
) -> QuantizationSettings:
    """Settings of a scheme; None is the scheme's own default. Raises CalibrationError for what it cannot do.

    4-bit blocks are imatrix's, and those of weight-only have no zero point unless asked otherwise: it was not worth its bytes in a real
    model (docs/quantization-quality.md). Of a base that others quantized to 4 bits they are the base's own, unless a method, a block size
    or zero points are asked for.
    """
    name = check_scheme(scheme)
    kind, fast = SCHEMES[name], name == "weight-only" and method != "hqq"
    width = kind.bits[0] if bits is None else bits
    plain = method is None and block_size is None and symmetric is None
    if method is None:
        method = "imatrix" if name in ("weight-only", "qdq-int4") and width == 4 and symmetric is not False else "rtn"
    return QuantizationSettings(
        scheme=name,
        bits=width,
        method=check_method(method),
        block_size=(DEFAULT_BLOCK[width] if kind.blockwise else 0) if block_size is None else block_size,
        symmetric=method not in ASYMMETRIC if symmetric is None else symmetric,
        accuracy_level=(4 if fast else 1) if accuracy_level is None else accuracy_level,
        keep_high=keep_high,
        int8=int8,
        lm_head=lm_head,
        embeddings=embeddings,
        cache=check_cache(cache),
        keep_given=plain and name == "weight-only" and width == 4,
    )


def check_source(settings: QuantizationSettings, *, quantized: int | None, precision: str, opset: int, where: str) -> None:
    """Raises CalibrationError for a bundle that the scheme cannot start from."""
    if quantized is not None:
        raise CalibrationError(f"{where} is quantized already (int{quantized}); quantize the float bundle that it was made from")
    kind = settings.kind
    if precision not in kind.precisions:
        others = ", ".join(name for name, s in SCHEMES.items() if precision in s.precisions)
        raise CalibrationError(
            f"{where} is a {precision} bundle; --scheme {settings.scheme} starts from the {' or '.join(kind.precisions)} one"
            + (f" (for {precision}: {others})" if others else "")
        )
    if kind.opset > max(opset, 21 if opset == 20 else 0):
        raise CalibrationError(f"{where} has opset {opset}, --scheme {settings.scheme} needs {kind.opset}; export it again with --opset 20")
