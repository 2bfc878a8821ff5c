"""``-m FOLDER`` that GPTQ, AWQ or compressed-tensors quantized: the base is what its integers mean, and what is not read costs one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from models.packed_checkpoints import FORMATS, edit_config, quantize_folder
from safetensors.numpy import load_file, save_file

from calibration.weight_only import dequantize
from reft_export.base.checkpoint import open_checkpoint
from reft_export.base.load import load_base, outline_base
from reft_export.base.origin import described
from reft_export.base.packed.blocks import ORIGIN, PACKED, packed_blocks
from reft_export.base.packed.layouts import Integers, blocks_of, dequantized
from runtimes.errors import InputError

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reft-export" / "quantized"


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny.save_base(tmp_path / "small")


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("group", [16, 64, -1])
@pytest.mark.parametrize("format", FORMATS)
def test_a_base_is_what_its_integers_mean_and_keeps_them(format, group, symmetric, folder, cache) -> None:
    floats = load_file(folder / "model.safetensors")
    means = quantize_folder(folder, format, group=group, symmetric=symmetric)
    made = open_checkpoint(folder).folder
    assert made.parent == cache and (made / "tokenizer.json").is_file()
    stored = load_file(made / "model.safetensors")
    assert stored.keys() == floats.keys() and len(means) == 7 * tiny.LAYERS
    assert all((stored[name] == means.get(name, floats[name])).all() for name in stored)
    blocks = packed_blocks(made)
    assert blocks is not None and set(blocks.formats) == set(means) and not blocks.without
    for name, weight in means.items():
        taken, how = blocks.read(name), blocks.formats[name]
        assert how.symmetric == symmetric and how.block_size == (weight.shape[1] if group < 0 else group)
        shape = weight.shape[::-1]
        restored = dequantize(taken.packed, taken.scales, taken.zero_points, how.bits, how.block_size, *shape)
        assert (weight == restored.T).all(), "MatMulNBits' blocks mean the same, to the bit"


def test_the_base_is_loaded_as_any_other(folder, cache) -> None:
    means = quantize_folder(folder, "gptq")
    base = load_base(folder, require_tokenizer=True)
    assert base.info.name == "small" and (base.model.get_parameter(f"{UP}.weight").numpy() == means[f"{UP}.weight"]).all()
    assert outline_base(folder).info.fingerprint == base.info.fingerprint
    assert described(folder) == f"{folder} (21 of 30 tensors quantized by GPTQ, 4 bits, groups of 32)"
    (made,) = cache.iterdir()
    assert described(made) == str(made) and outline_base(made).info.fingerprint == base.info.fingerprint
    with torch.no_grad():
        assert torch.isfinite(base.model(torch.tensor([[3, 1, 4]])).logits).all()


def test_groups_that_are_ordered_by_activation_are_a_base_and_no_blocks(folder) -> None:
    means = quantize_folder(folder, "gptq", ordered=True)
    made = open_checkpoint(folder).folder
    stored, blocks = load_file(made / "model.safetensors"), packed_blocks(made)
    assert all((stored[name] == weight).all() for name, weight in means.items())
    assert blocks is not None and set(blocks.without) == set(means) and not blocks.formats


def test_a_checkpoint_that_changed_is_another_base(folder, cache) -> None:
    quantize_folder(folder, "awq")
    before = open_checkpoint(folder).folder
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.qweight"] = tensors[f"{UP}.qweight"] ^ 1
    save_file(tensors, folder / "model.safetensors")
    assert open_checkpoint(folder).folder != before and len(list(cache.iterdir())) == 2


def test_a_cache_that_lost_a_file_is_made_again(folder, cache) -> None:
    quantize_folder(folder, "awq")
    made = open_checkpoint(folder).folder
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    for name in (ORIGIN, PACKED, "model.safetensors"):
        (made / name).unlink()
        assert open_checkpoint(folder).folder == made and list(cache.iterdir()) == [made]
        assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def _tensor(change):
    def changed(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")

    return changed


def _config(**stated):
    return lambda folder: edit_config(folder, stated)


def _ordered(change):
    def changed(folder: Path) -> None:
        _config(desc_act=True)(folder)
        _tensor(change)(folder)

    return changed


def _name_another_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"configuration_files": ["config.other.json"]}))


def _say_it_beside(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (folder / "config.json").write_text(json.dumps(config))


REFUSED = {
    "said in another file": ("gptq", _say_it_beside, "quantize_config.json says how its weights were quantized, and config.json does not"),
    "8 bits": ("gptq", _config(bits=8), "GPTQ with 8 bits is not read: 4 are; pass the float model"),
    "no group size": ("awq", _config(group_size=None), "AWQ with group_size None is not read"),
    "marlin": ("gptq", _config(checkpoint_format="marlin"), "GPTQ with format marlin is not read: gptq and gptq_v2 are"),
    "other words": ("gptq", _config(pack_dtype="int16"), "pack_dtype int16 is not read: int32 is"),
    "a rotation": ("gptq", _config(rotation="hadamard"), "rotation 'hadamard' is not read"),
    "gemv": ("awq", _config(version="gemv"), "AWQ with version gemv is not read: gemm is"),
    "float integers": ("compressed-tensors", _config(format="float-quantized"), "format float-quantized is not read: pack-quantized is"),
    "a cache": ("compressed-tensors", _config(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is not read"),
    "rotated": ("compressed-tensors", _config(transform_config={"config_groups": {"u": {}}}), "transform_config is not read"),
    "activations": (
        "compressed-tensors",
        _config(config_groups={"group_0": {"weights": {"num_bits": 4, "strategy": "channel"}, "input_activations": {"num_bits": 8}}}),
        "activations that group_0 quantizes is not read: weights alone are",
    ),
    "a preset": ("compressed-tensors", _config(config_groups={"W4A16": ["Linear"]}), "int of None bits of W4A16 is not read: int of 4 is"),
    "another group": (
        "gptq",
        _config(group_size=128),
        r"down_proj.weight has .* scales \[4, 64\] .* and config.json says .* groups of 128",
    ),
    "a scale is missing": ("gptq", _tensor(lambda t: t.pop(f"{UP}.scales")), "up_proj.qweight has no scales beside it"),
    "zero points are missing": (
        "compressed-tensors",
        _tensor(lambda t: t.pop(f"{UP}.weight_zero_point")),
        "up_proj.weight: config.json says symmetric false, and there is no weight_zero_point",
    ),
    "zero points of more bits": (
        "compressed-tensors",
        _tensor(lambda t: t.update({f"{UP}.weight_zero_point": np.full((128, 2), -9, np.int8)})),
        "up_proj.weight: a zero point is not from -8 to 7",
    ),
    "an order is missing": ("gptq", _ordered(lambda t: t.pop(f"{UP}.g_idx")), "up_proj.weight has no g_idx, and config.json"),
    "an order of nothing": ("gptq", _tensor(lambda t: t.update({f"{UP}.g_idx": np.zeros(0, np.int32)})), "a g_idx that is not 64 numbers"),
    "another config": ("awq", _name_another_config, "small/config.json lists config.other.json, which"),
    "a stray tensor": ("awq", _tensor(lambda t: t.update({"model.act.scales": np.ones(4)})), "model.act.scales is no part of a weight"),
    "no integers": ("gptq", _tensor(lambda t: [t.pop(n) for n in list(t) if "_proj." in n]), r"no tensor is called \*.qweight"),
    "infinite": ("gptq", _tensor(lambda t: t[f"{UP}.scales"].fill(np.inf)), "up_proj.weight has scales that are not finite"),
    "groups there are not": ("gptq", _tensor(lambda t: t[f"{UP}.g_idx"].fill(7)), "a g_idx that is not 64 numbers from 0 to 1"),
    "groups that are no numbers": (
        "gptq",
        _tensor(lambda t: t.update({f"{UP}.g_idx": np.full(64, np.nan, np.float32)})),
        "up_proj.weight has a g_idx that is not 64 numbers",
    ),
    "a point of 0 less 1": ("gptq", _tensor(lambda t: t[f"{UP}.qzeros"].fill(-1)), "up_proj.weight: a zero point is 0 less 1.* gptq_v2"),
    "half the words": (
        "compressed-tensors",
        _tensor(lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:, :4]})),
        "up_proj.weight has weight_packed",
    ),
}


def _with(**added):
    return _tensor(lambda tensors: tensors.update({name.replace("__", "."): value for name, value in added.items()}))


def test_what_the_model_has_no_place_for_is_told_in_one_line(folder, capsys) -> None:
    quantize_folder(folder, "gptq")
    bias = {f"{UP}.bias".replace(".", "__"): np.zeros(load_base(folder).model.get_parameter(f"{UP}.weight").shape[0], np.float16)}
    capsys.readouterr()
    _with(**bias)(folder)
    load_base(folder)
    said = capsys.readouterr().err
    assert "dequantizing" in said and "note" not in said, "AutoGPTQ writes such zeros beside weights without a bias"
    _with(model__visual__proj__weight=np.ones((2, 2), np.float32), model__visual__proj__bias=np.ones(2, np.float32))(folder)
    load_base(folder)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "note: small: 2 tensor(s) of the checkpoint have no place in LlamaForCausalLM and are left out, first model.visual.proj.bias"
        in said
    )


def test_a_bias_that_the_model_would_not_add_is_refused(folder) -> None:
    quantize_folder(folder, "gptq")
    width = load_base(folder).model.get_parameter(f"{UP}.weight").shape[0]
    _with(**{f"{UP}.bias".replace(".", "__"): np.ones(width, np.float16)})(folder)
    with pytest.raises(InputError, match=f"small: {UP}.bias is not zero, and LlamaForCausalLM adds no bias there"):
        load_base(folder)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_name_and_leaves_nothing(case, folder, cache) -> None:
    format, change, match = REFUSED[case]
    quantize_folder(folder, format)
    change(folder)
    with pytest.raises(InputError, match=match) as refused:
        open_checkpoint(folder)
    assert "\n" not in str(refused.value) and (not cache.exists() or not list(cache.iterdir()))


def test_zero_points_of_a_byte_each_are_read(folder) -> None:
    """As compressed-tensors wrote them before release 0.9."""
    means = quantize_folder(folder, "compressed-tensors")

    def a_byte_each(tensors) -> None:
        words = tensors[f"{UP}.weight_zero_point"].view(np.uint32)
        nibbles = (words[:, None] >> np.arange(0, 32, 4, dtype=np.uint32)[:, None]) & 15
        tensors[f"{UP}.weight_zero_point"] = (nibbles.reshape(-1, words.shape[1]).astype(np.int16) - 8).astype(np.int8)

    _tensor(a_byte_each)(folder)
    stored = load_file(open_checkpoint(folder).folder / "model.safetensors")
    assert (stored[f"{UP}.weight"] == means[f"{UP}.weight"]).all()


def test_a_file_that_is_cut_short(folder, cache) -> None:
    quantize_folder(folder, "gptq")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="is damaged or cut short"):
        open_checkpoint(folder)
    assert not cache.exists() or not list(cache.iterdir())


@pytest.mark.parametrize(("group", "size"), [(48, 16), (96, 32), (512, 256)])
def test_a_group_of_several_blocks_is_several_with_one_scale(group, size) -> None:
    """Of 3 groups of 48 that are 9 blocks, an odd number, whose zero points are packed in pairs."""
    random = np.random.default_rng(0)
    q, scales = random.integers(0, 16, (8, 3 * group), np.uint8), random.random((8, 3), np.float32)
    weight = Integers(q, scales, random.integers(0, 16, (8, 3), np.uint8), np.arange(3 * group) // group, group)
    made = blocks_of(weight)
    assert made is not None and made[1].block_size == size
    restored = dequantize(made[0].packed, made[0].scales, made[0].zero_points, 4, size, 3 * group, 8)
    assert (dequantized(weight) == restored.T).all()
