"""``-m base.gguf``: the file's tensors are the base, whatever it is used for, and what cannot be read costs one line."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from models import gguf_files
from models.adapters import random_adapter
from models.bases import build_base

from reft_export.base.checkpoint import open_checkpoint
from reft_export.base.load import base_from_memory, load_base, outline_base
from reft_export.base.origin import described
from reft_export.exporting.export import ExportSettings, export_bundle
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import save_adapter
from runtimes.edits.edit import Site
from runtimes.errors import InputError

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reft-export" / "gguf"


@pytest.mark.parametrize("family", gguf_files.ARCHITECTURES)
def test_a_file_is_the_base_that_it_was_made_of(family, tmp_path, cache) -> None:
    model = gguf_files.build(family)
    base = load_base(gguf_files.write(tmp_path / "small.gguf", model), require_tokenizer=True)
    with torch.no_grad():
        assert torch.equal(base.model(IDS).logits, model(IDS).logits)
    assert base.info.name == "small" and base.tokenizer is not None
    if family != "gemma3_text":  # whose tokenizer is of another kind than the bytes here
        assert base.tokenizer.encode("baab", add_special_tokens=False) == [gguf_files.VOCABULARY - 1, gguf_files.VOCABULARY - 2]
    assert base.info.parts.weights == base_from_memory(model).info.parts.weights, "the fingerprint is of the file's tensors"
    made = list(cache.iterdir())
    assert outline_base(tmp_path / "small.gguf").info.fingerprint == base.info.fingerprint and list(cache.iterdir()) == made


def test_rounded_tensors_are_said_and_used_as_they_are_stored(tmp_path) -> None:
    model = gguf_files.build("llama")
    path = gguf_files.write(tmp_path / "small.gguf", model, kind=gguf.GGMLQuantizationType.Q8_0)
    assert described(path) == f"{path} (16 of 21 tensors rounded by GGUF: Q8_0)" and described(tmp_path) == str(tmp_path)
    weight = load_base(path).model.get_parameter("model.layers.1.mlp.up_proj.weight")
    asked = model.get_parameter("model.layers.1.mlp.up_proj.weight").detach().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    assert (weight.numpy() == gguf.quants.dequantize(gguf.quants.quantize(asked, kind), kind)).all() and (weight.numpy() != asked).any()


def test_a_file_is_read_once_and_what_takes_its_place_is_another_base(tmp_path, monkeypatch) -> None:
    path = gguf_files.write(tmp_path / "small.gguf", gguf_files.build("llama"), kind=gguf.GGMLQuantizationType.Q8_0)
    said, name = described(path), "model.layers.1.mlp.up_proj.weight"
    first = load_base(path).model.get_parameter(name)
    with monkeypatch.context() as patched:
        patched.setattr(gguf, "GGUFReader", lambda *_: pytest.fail("its keys take seconds to read"))
        assert described(path) == said and torch.equal(load_base(path).model.get_parameter(name), first)
    gguf_files.write(path, gguf_files.build("llama"))
    assert described(path) == str(path), "before it is made"
    second = load_base(path).model.get_parameter(name)
    assert described(path) == str(path), "and after it"
    assert not torch.equal(first, second)


@pytest.mark.slow
def test_an_adapter_of_the_file_is_exported_with_it(tmp_path) -> None:
    path = gguf_files.write(tmp_path / "small.gguf", gguf_files.build("llama"), kind=gguf.GGMLQuantizationType.Q8_0)
    adapter = random_adapter(outline_base(path).info, (Site(layer=1, stream="block_output"),), positions="f2+l2", rank=4)
    save_adapter(adapter, tmp_path / "style")
    said: list[str] = []
    result = export_bundle(path, [tmp_path / "style"], tmp_path / "bundle", ExportSettings(), report=said.append)
    assert result.parity is not None and result.parity.passed and open_bundle(tmp_path / "bundle").manifest.model.name == "small"
    assert any("rounded by GGUF: Q8_0" in line for line in said)
    # The checkpoint that it became is the same base.
    again = export_bundle(open_checkpoint(path).folder, [tmp_path / "style"], tmp_path / "again", ExportSettings(), report=said.append)
    assert again.manifest.model.fingerprint == result.manifest.model.fingerprint


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
            "key llama.rope.scaling.type is 'linear', and transformers leaves it out",
        ),
        (lambda w: w.add_rope_dimension_count(2), "llama.attention.key_length is 16, and transformers makes head_dim 2 of the file"),
        (lambda w: w.add_logit_scale(0.5), "key llama.logit_scale is 0.5"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32)), "does not read rope_freqs.weight"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)), "holds 22 tensors, and .* takes 21"),
    ],
    ids=["scaled rotation", "part of a head rotated", "scaled logits", "a table of angles", "a bias"],
)
def test_what_transformers_would_leave_out_is_refused(more, match, tmp_path, cache) -> None:
    path = gguf_files.write(tmp_path / "small.gguf", gguf_files.build("llama"), more=more)
    with pytest.raises(InputError, match=match):
        load_base(path)
    assert not cache.exists() or not list(cache.iterdir())


def test_heads_of_another_size_than_the_family_has_by_default(tmp_path) -> None:
    """transformers does not read the size of Qwen 3's heads."""
    model = build_base("qwen3", layers=2, overrides={"vocab_size": gguf_files.VOCABULARY})
    with pytest.raises(InputError, match=r"key qwen3.attention.key_length is \d+, and transformers makes head_dim 128 of the file"):
        load_base(gguf_files.write(tmp_path / "small.gguf", model))


def _unknown_type(data: bytearray) -> bytearray:
    at = bytes(data).find(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 2 * 8  # n_dims, two dimensions
    data[at : at + 4] = (99).to_bytes(4, "little")
    return data


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data[: len(data) // 2], "is damaged, cut short or no GGUF file"),
        (lambda data: data[:100], "is damaged, cut short or no GGUF file"),
        (lambda data: bytearray(b"hello"), "it is not GGUF of version 2 or 3"),
        (_unknown_type, r"99\)? is not a valid GGMLQuantizationType"),
        (
            lambda data: data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0llamb", 1),
            "architecture llamb cannot be read from GGUF",
        ),
        (lambda data: data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight", 1), "lacks 1 parameters .* model.layers.1.mlp.up_proj"),
        (lambda data: data.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenx", 1), "cannot be loaded"),
    ],
    ids=["half of it", "its head", "another file", "unknown type", "another architecture", "a tensor is missing", "no tokens"],
)
def test_what_cannot_be_read_is_refused_in_one_line(change, match, tmp_path, cache) -> None:
    path = gguf_files.write(tmp_path / "small.gguf", gguf_files.build("llama"))
    path.write_bytes(change(bytearray(path.read_bytes())))
    with pytest.raises(InputError, match=match) as caught:
        load_base(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not cache.exists() or not list(cache.iterdir()), "nothing is left of it"
