"""Which weights have 8 bits where the others have 4, by what each costs in nats and what it would cost in bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from calibration.quantize import int8_weights, plan_graph
from calibration.settings import BlockFormat, QuantizationSettings
from calibration.weight_only import WeightBlocks
from graph_passes.accessors import input_of, shape_of, tensor_of
from graph_passes.find.weights import find_token_embedding, weight_name
from runtimes.errors import CalibrationError

AUTO_SHARE = 0.15
"""Of the bytes of all weights: how much more a mixed bundle takes where no budget is given."""
TABLE_SHARE = 2 / 3
"""Of the bytes of all weights in int4, from which on an embedding in int8 is too many of them. Gemma 3 270M has 0.74 there, and loses less
in fewer bytes with its embedding in int4 and the most sensitive of the other weights in int8; SmolLM2 has 0.3, and does not
(docs/quantization-quality.md)."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """``smallest``: bytes of all weights as the settings store them; ``extra``: of each int4 weight, what 8 bits would add; ``table``: of
    the quantized embedding."""

    smallest: int
    extra: Mapping[str, int]
    table: int = 0


def sizes(
    graph: ir.Graph,
    settings: QuantizationSettings,
    float_inputs: Collection[str] = (),
    parameters: Collection[str] | None = None,
    blocks: WeightBlocks | None = None,
) -> Sizes:
    """Of a graph whose head is untied, for a weight-only scheme; nothing is quantized. ``blocks``: as ``quantize_graph`` takes it."""
    plan, selection = plan_graph(graph, settings, float_inputs, parameters)
    shapes = {weight_name(node): shape_of(input_of(node, 1)) for node in selection.products}
    int8 = int8_weights(graph, selection, settings)
    blocks = blocks or WeightBlocks()
    formats = {name: settings.int8_format if name in int8 else blocks.format_of(name, settings.format) for name in shapes}
    stored = {name: stored_bytes(shape, formats[name]) for name, shape in shapes.items()}
    lookup, in_blocks = find_token_embedding(graph), 0
    gone = {*shapes, *([plan.head_name] if plan.head_name else [])}
    if plan.format is not None and lookup is not None:
        table = input_of(lookup, 0)
        vocabulary, width = shape_of(table)
        stored[f"{table.name} in blocks"] = in_blocks = stored_bytes((width, vocabulary), plan.format)
        gone.add(table.name or "")
    left = sum(
        int(tensor_of(value).nbytes) for name, value in graph.initializers.items() if name not in gone and value.const_value is not None
    )
    extra = {name: stored_bytes(shape, settings.int8_format) - stored[name] for name, shape in shapes.items() if name not in int8}
    return Sizes(smallest=left + sum(stored.values()), extra=extra, table=in_blocks)


def outweighed_by_table(graph: ir.Graph, settings: QuantizationSettings, parameters: Collection[str]) -> bool:
    """Whether int4 would spend ``TABLE_SHARE`` of its bytes on an embedding in int8 that nobody asked for; of a graph whose head is
    untied."""
    if settings.scheme != "weight-only" or settings.bits != 4 or settings.embeddings is not None:
        return False
    known = sizes(graph, settings, (), parameters)
    return known.table > TABLE_SHARE * known.smallest


def stored_bytes(shape: tuple[int, ...], format: BlockFormat) -> int:
    """Of a weight [K, N] in blocks: integers, float32 scales, and zero points unless it is symmetric; HQQ's are float32."""
    rows, columns = shape
    blocks = -(-rows // format.block_size)
    points = 0 if format.symmetric else 4 * blocks if format.method == "hqq" else -(-blocks * format.bits // 8)
    return columns * (blocks * format.block_size * format.bits // 8 + 4 * blocks + points)


def choose_int8(nats: Mapping[str, float], sizes: Sizes, budget: int | None = None) -> tuple[str, ...]:
    """The weights that lose most for each byte that 8 bits would add, as many as ``budget`` bytes hold; None: ``AUTO_SHARE`` more.

    A weight that is too large for what is left is passed over. Raises CalibrationError for a budget below the smallest graph.
    """
    check_budget(sizes, budget)
    left = int(AUTO_SHARE * sizes.smallest) if budget is None else budget - sizes.smallest
    chosen = []
    for name in sorted(nats, key=lambda name: -nats[name] / max(sizes.extra.get(name, 0), 1)):
        if 0 < sizes.extra.get(name, 0) <= left and nats[name] > 0:
            left -= sizes.extra[name]
            chosen.append(name)
    return tuple(chosen)


def check_budget(sizes: Sizes, budget: int | None) -> None:
    """Raises CalibrationError for one that not even int4 weights alone keep."""
    if budget is not None and budget < sizes.smallest:
        raise CalibrationError(
            f"--budget-mb leaves {max(budget, 0) / 1e6:.1f} MB for the weights, and in int4 alone they take {sizes.smallest / 1e6:.1f} MB; "
            f"give {(sizes.smallest - budget) / 1e6:.1f} MB more, or leave it out"
        )
