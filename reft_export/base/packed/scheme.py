"""What config.json says of how a checkpoint was quantized, and what of it is not read here: each is refused by name.

Read are 4-bit integers with a scale for each group of inputs, or one for each output, of which

    GPTQ                format gptq (zero points stored less 1) and gptq_v2 (stored as they are)     AutoGPTQ, GPTQModel
    AWQ                 version gemm                                                                 AutoAWQ, GPTQModel
    compressed-tensors  format pack-quantized, of groups or channels                                 llm-compressor

Sources: ``QuantizeConfig`` of GPTQModel, ``AwqConfig`` of transformers, ``QuantizationConfig`` of compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.errors import InputError

GPTQ, AWQ, COMPRESSED = "gptq", "awq", "compressed-tensors"
NAMES = {GPTQ: "GPTQ", AWQ: "AWQ", COMPRESSED: "compressed-tensors"}
BITS = 4
PASS_FLOAT = "pass the float model that it was made from"
WHOLE = -1
"""The group of a scheme with one scale for each output."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """``groups``: how many inputs share a scale, as config.json states it, ``WHOLE`` for all of them."""

    method: str
    groups: tuple[int, ...]
    less_one: bool = False
    """Whether zero points are stored less 1."""
    zero_points: bool = False
    """Whether each weight has some of its own, where a checkpoint may leave them out."""
    ordered: bool = False
    """Whether each weight says which group an input is of: by activation, not by its place."""

    @property
    def label(self) -> str:
        """GPTQ, 4 bits, groups of 128"""
        sizes = " and ".join("a scale for each output" if group == WHOLE else f"groups of {group}" for group in self.groups)
        return f"{NAMES[self.method]}, {BITS} bits, {sizes}"


def scheme_of(config: Mapping[str, Any], where: Path) -> Scheme | None:
    """None for a checkpoint that no method of ``NAMES`` quantized. Raises InputError for one that is not read."""
    stated = config.get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if not isinstance(stated, dict) or not isinstance(method, str) or method not in NAMES:
        return None
    for what in _refused[method](stated):
        raise InputError(f"{where}: {NAMES[method]} with {what}; {PASS_FLOAT}")
    if method == COMPRESSED:
        weights = [group["weights"] for group in stated["config_groups"].values()]
        groups = {WHOLE if each["strategy"] == "channel" else each["group_size"] for each in weights}
        return Scheme(
            method=method,
            groups=tuple(sorted(groups)),
            zero_points=not any(each.get("symmetric", True) for each in weights),
            ordered=all(each.get("actorder") in ("group", "dynamic") for each in weights),
        )
    less_one, ordered = method == GPTQ and _format(stated) == "gptq", method == GPTQ and stated.get("desc_act") is True
    return Scheme(method=method, groups=(stated["group_size"],), less_one=less_one, ordered=ordered)


def _format(stated: Mapping[str, Any]) -> Any:
    return stated.get("checkpoint_format") or stated.get("format") or "gptq"


def _common(stated: Mapping[str, Any]) -> Iterator[str]:
    """What of either older config is not read, in words."""
    bits, group = stated.get("bits"), stated.get("group_size")
    if bits != BITS:
        yield f"{bits!r} bits is not read: {BITS} are"
    if type(group) is not int or (group < 1 and group != WHOLE):
        yield f"group_size {group!r} is not read: it is a number of inputs, or {WHOLE} for all of them"


def _refused_gptq(stated: Mapping[str, Any]) -> Iterator[str]:
    yield from _common(stated)
    if _format(stated) not in ("gptq", "gptq_v2") or stated.get("is_marlin_format"):
        yield f"format {'marlin' if stated.get('is_marlin_format') else _format(stated)} is not read: gptq and gptq_v2 are"
    if stated.get("pack_dtype", "int32") != "int32":
        yield f"pack_dtype {stated['pack_dtype']} is not read: int32 is"
    for key in ("rotation", "adapter"):  # the model is more than its weights then
        if stated.get(key):
            yield f"{key} {stated[key]!r} is not read"


def _refused_awq(stated: Mapping[str, Any]) -> Iterator[str]:
    yield from _common(stated)
    version = str(stated.get("version") or stated.get("checkpoint_format") or stated.get("format") or "gemm").lower()
    if version != "gemm":
        yield f"version {version} is not read: gemm is"


def _refused_compressed(stated: Mapping[str, Any]) -> Iterator[str]:
    if stated.get("format") != "pack-quantized":
        yield f"format {stated.get('format')} is not read: pack-quantized is"
    if stated.get("kv_cache_scheme"):
        yield "kv_cache_scheme is not read: keys and values are float here, or int8 by --cache"
    if (sparsity := _keys(stated.get("sparsity_config")).get("format", "dense")) != "dense":
        yield f"sparsity {sparsity} is not read: dense is"
    if _keys(stated.get("transform_config")).get("config_groups"):
        yield "transform_config is not read: the model is more than its weights then"
    groups = _keys(stated.get("config_groups"))
    if not groups:
        yield "no config_groups is not read"
    for name, group in ((name, _keys(group)) for name, group in groups.items()):
        weights = _keys(group.get("weights"))
        if group.get("input_activations") or group.get("output_activations"):
            yield f"activations that {name} quantizes is not read: weights alone are"
        if group.get("format") not in (None, "pack-quantized"):
            yield f"format {group['format']} of {name} is not read: pack-quantized is"
        if (weights.get("num_bits"), weights.get("type", "int")) != (BITS, "int"):
            yield f"{weights.get('type', 'int')} of {weights.get('num_bits')} bits of {name} is not read: int of {BITS} is"
        if weights.get("strategy") not in ("group", "channel"):
            yield f"strategy {weights.get('strategy')} of {name} is not read: group and channel are"
        if weights.get("strategy") == "group" and (type(weights.get("group_size")) is not int or weights["group_size"] < 1):
            yield f"group_size {weights.get('group_size')!r} of {name} is not read: it is a number of inputs"


def _keys(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


_refused = {GPTQ: _refused_gptq, AWQ: _refused_awq, COMPRESSED: _refused_compressed}
