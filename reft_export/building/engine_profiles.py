"""The shapes that an engine admits: one optimization profile for prefill, one for decode.

input                       shape                       prefill                      decode
input_ids, position_ids,    [batch, sequence]           sequence 1 .. max_sequence   sequence 1
  reft.slots (reft_slot)
attention_mask              [batch, past + sequence]
past_key_values.*           [batch, heads, past, dim]   past 0 .. context - 1        past 0 .. context - 1
reft.prompt_length          [batch]
the other rules             [batch], or [1] for all rows
banks                       [N, r, D], [N, r]; RED's    N 1 .. max_slots, r 1 .. max_rank in both
                            [N, D]
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from runtimes.artifacts.engine import Profile, ShapeRange
from runtimes.artifacts.manifest import TensorRecord
from runtimes.edits.op import EXPLICIT_SLOTS, RULE_DEFAULTS, SLOT_INPUT
from runtimes.errors import EngineError, InputError

PLUGIN_MAX_RANK = 256
TUNED_PROMPT = 128
"""Columns of the prompt that the prefill profile is tuned for, where it admits as many."""


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """The largest shapes of an engine; ``tuned_slots`` and ``tuned_rank`` are those of the bundle's own adapters."""

    max_batch: int
    max_sequence: int
    context: int
    """Columns of past and current tokens together."""
    max_slots: int
    max_rank: int
    tuned_slots: int = 1
    tuned_rank: int = 1

    def __post_init__(self) -> None:
        for option, value, least, who in (
            ("--max-batch", self.max_batch, 1, "every call needs"),
            ("--max-sequence", self.max_sequence, 1, "every call needs"),
            ("--context", self.context, 2, "a prompt and its answer need"),
            ("--max-slots", self.max_slots, self.tuned_slots, "the bundle's adapters need"),
            ("--max-rank", self.max_rank, self.tuned_rank, "the bundle's adapters need"),
        ):
            if value < least:
                raise InputError(f"{option} is {value}; {who} at least {least}")
        if self.max_sequence > self.context:
            raise InputError(f"--max-sequence {self.max_sequence} is more than the --context of {self.context}; give one that fits into it")
        if self.max_rank > PLUGIN_MAX_RANK:
            raise InputError(f"--max-rank {self.max_rank} is more than the kernels take, which is {PLUGIN_MAX_RANK}")


def engine_profiles(inputs: Sequence[TensorRecord], banks: Collection[str], limits: EngineLimits) -> tuple[Profile, Profile]:
    """(prefill, decode) for a graph with these inputs; ``banks`` are the names of those that hold the edits' parameters.

    Raises EngineError for an input that a decoder with a KV cache does not have, or whose heads or widths vary.
    """
    past = (0, limits.context // 2, limits.context - 1)
    prefill = {"sequence": (1, min(TUNED_PROMPT, limits.max_sequence), limits.max_sequence), "past": (0, 0, past[2])}
    decode = {"sequence": (1, 1, 1), "past": past}
    shared = {
        "batch": (1, 1, limits.max_batch),
        "slots": (1, limits.tuned_slots, limits.max_slots),
        "rank": (1, limits.tuned_rank, limits.max_rank),
    }
    return (
        _profile("prefill", inputs, banks, {**shared, **prefill}),
        _profile("decode", inputs, banks, {**shared, **decode}),
    )


def _profile(name: str, inputs: Sequence[TensorRecord], banks: Collection[str], ranges: dict[str, tuple[int, int, int]]) -> Profile:
    past, sequence = ranges["past"], ranges["sequence"]
    ranges["total"] = (past[0] + sequence[0], past[1] + sequence[1], past[2] + sequence[2])
    shapes = {}
    for tensor in inputs:
        if all(isinstance(dim, int) for dim in tensor.shape):
            continue
        bounds = list(_bounds(tensor, banks, ranges))
        shapes[tensor.name] = ShapeRange(min=_column(bounds, 0), opt=_column(bounds, 1), max=_column(bounds, 2))
    return Profile(name=name, shapes=shapes)


def _bounds(tensor: TensorRecord, banks: Collection[str], ranges: dict[str, tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    meanings = _meanings(tensor.name, banks)
    if len(meanings) < len(tensor.shape):
        raise EngineError(f"graph input {tensor.name} {list(tensor.shape)} is none that a decoder with a KV cache has; no engine is built")
    for dim, meaning in zip(tensor.shape, meanings, strict=False):
        if isinstance(dim, int):
            yield dim, dim, dim
        elif meaning is None:
            raise EngineError(f"graph input {tensor.name} {list(tensor.shape)}: {dim} varies, and only batch, sequence and past may")
        else:
            yield ranges[meaning]


def _meanings(name: str, banks: Collection[str]) -> tuple[str | None, ...]:
    if name in ("input_ids", "position_ids", EXPLICIT_SLOTS, SLOT_INPUT):
        return "batch", "sequence"
    if name == "attention_mask":
        return "batch", "total"
    if name in RULE_DEFAULTS:
        return ("batch",)
    if name in banks:
        return "slots", "rank", None  # RED's second axis is the width, a number, which no range is asked for
    if name.startswith("past_key_values."):
        return "batch", None, "past", None
    return ()


def _column(bounds: Sequence[tuple[int, int, int]], index: int) -> tuple[int, ...]:
    return tuple(bound[index] for bound in bounds)
