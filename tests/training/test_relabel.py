"""The relabelled base is the same function, and no longer on the grid that its weights were rounded to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.bases import build_base, byte_tokenizer
from models.relabel import Relabelling, different_values, matrices, on_a_grid, relabel, relabelling_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOLERANCE = 2e-5


def _logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(3, 47)[None]).logits


def _on_grid(folder: Path, family: str) -> Path:
    """A base whose every block of 32 has 16 evenly spaced values from its least to its largest, as those of a GGUF file of Q4_1."""
    model = build_base(family, overrides={"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.add_(0.01 * torch.randn(parameter.shape))  # the padding token's row is zero
                blocks = parameter.view(parameter.shape[0], -1, 32)
                low, step = blocks.amin(-1, keepdim=True), (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / 15
                levels = ((blocks - low) / step.clamp(min=1e-9)).round()
                parameter.copy_((low + levels * step).view(parameter.shape))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3_text"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    source = _on_grid(folder / "base", request.param)
    return source, relabel(source, folder / "relabelled")


def test_it_is_the_same_function(pair) -> None:
    expected, found = map(_logits, pair)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_no_block_is_on_the_old_grid(pair) -> None:
    before, after = (dict(matrices(folder)) for folder in pair)
    assert max(different_values(weight).max() for weight in before.values()) <= 16
    assert all(on_a_grid(weight).all() for weight in before.values())
    assert min(different_values(weight).min() for weight in after.values()) > 16
    assert not any(on_a_grid(weight).any() for weight in after.values())


@pytest.mark.parametrize(
    ("values", "gridded"),
    [
        ([*[0.0] * 18, *range(1, 15)], False),  # mostly 0, the rest different
        ([*[0.0] * 15, *range(1, 14), 1.0, 2.0, 3.0, 4.0], False),  # as Gemma's poorest: a few are equal by chance
        ([*[0.0] * 18, *([1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0] * 2)], True),  # mostly 0, the rest on seven levels
        ([float(level) for level in range(-8, 8)] * 2, True),
        ([0.0] * 32, False),
        (list(range(32)), False),
    ],
)
def test_a_grid_is_told_from_zeros(values: list[float], gridded: bool) -> None:
    assert on_a_grid(torch.tensor([values, values])).tolist() == [gridded] * 2


def test_it_is_a_base_that_the_seed_alone_decides(pair, tmp_path: Path) -> None:
    again, other = relabel(pair[0], tmp_path / "again"), relabel(pair[0], tmp_path / "other", seed=1)
    files = [folder / "model.safetensors" for folder in (pair[1], again, other)]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()
    assert {path.name for path in pair[1].iterdir()} == {path.name for path in pair[0].iterdir()}


@pytest.mark.parametrize("part", ["residual", "mlp", "values", "factors"])
def test_a_part_of_it_alone_is_another_function(part: str, pair, tmp_path: Path) -> None:
    """Planted: rows and columns that no longer fit show in the logits."""
    source, _ = pair
    config = json.loads((source / "config.json").read_text())
    whole = relabelling_of(config)
    other = replace(whole, **{part: getattr(relabelling_of(config, seed=1), part)})
    tensors = load_file(source / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    rows_of = ("up_proj", "gate_proj", "v_proj", "embed_tokens")
    mixed = {name: (other if name.split(".")[-2] in rows_of else whole)(name, tensor) for name, tensor in tensors.items()}
    model.load_state_dict(mixed, strict=False)
    with torch.no_grad():
        found = model(torch.arange(3, 47)[None]).logits
    expected = _logits(source)
    assert (found - expected).abs().max() > 0.01 * expected.abs().max()


def test_a_parameter_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj .* has no rule"):
        Relabelling.drawn(width=64, mlp=128, head=16)("model.layers.0.mlp.experts.gate_up_proj", torch.zeros(4, 64, 256))
