"""A GGUF file of relabelled weights holds exactly them, under every key of the file that it was made from."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from evidence import float_gguf
from models import gguf_files
from models.relabel import relabel

from reft_export.base.load import load_base

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", gguf_files.ARCHITECTURES)
def test_it_is_the_relabelled_base(family: str, tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    source = gguf_files.write(tmp_path / "small.gguf", gguf_files.build(family), kind=kind)
    folder = relabel(source, tmp_path / "relabelled")
    target = float_gguf.write(source, folder, tmp_path / "float.gguf")
    (former, expected, found) = (load_base(path).model(IDS).logits for path in (source, folder, target))
    assert torch.equal(found, expected)
    assert (found - former).abs().max() <= 2e-5 * former.abs().max()
    keys = [{name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()} for path in (source, target)]
    assert keys[1].pop("general.file_type") == float_gguf.ALL_F32
    keys[0].pop("general.file_type", None)
    del keys[0]["GGUF.kv_count"], keys[1]["GGUF.kv_count"]
    assert keys[0] == keys[1]
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(target).tensors} == {"F32"}


def test_another_base_is_refused(tmp_path: Path) -> None:
    source = gguf_files.write(tmp_path / "small.gguf", gguf_files.build("llama"))
    other = relabel(gguf_files.write(tmp_path / "other.gguf", gguf_files.build("qwen2")), tmp_path / "relabelled")
    with pytest.raises(ValueError, match=r"k_proj\.bias .* is no tensor of"):
        float_gguf.write(source, other, tmp_path / "float.gguf")
    assert not (tmp_path / "float.gguf").exists()
