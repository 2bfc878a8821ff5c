"""A rank that subspaces share out: each example is edited by the rows of its own, and a subspace alone is an adapter of a lower rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from shared_folders import shared_folder
from typer.testing import CliRunner, Result

from reft_export.base.load import Base, load_base
from reft_export.cli.main import app
from reft_export.eager.steering import steer, steered
from reft_export.importing.subspaces import subspace_of
from reft_export.training.data import collate, load_data
from reft_export.training.interventions import Interventions
from reft_export.training.settings import TrainSettings
from reft_export.training.ways import Batch
from runtimes.edits.adapter import Adapter, load_adapter
from runtimes.edits.edit import Site
from runtimes.edits.form import EditForm
from runtimes.edits.positions import PositionRule
from runtimes.errors import InputError

LINES = [{"prompt": f"say {i}", "completion": end * 3, "subspace": name} for i in range(4) for name, end in (("up", "A"), ("down", "b"))]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def folder() -> Path:
    """With a base, the data, and an adapter trained in two subspaces."""

    def make(output: Path) -> None:
        output.mkdir()
        tiny.save_base(output / "base")
        (output / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
        options = ("--subspaces", "up:2;down:3", "--layers", "0;2", "--positions", "l2", "--max-steps", 30, "--lr", 0.02)
        done = invoke("train", "-m", output / "base", "-d", output / "data.jsonl", "-o", output / "both", *options)
        assert done.exit_code == 0, done.output

    return shared_folder("training/subspaces", make)


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(folder / "base")


def logits(base: Base, adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), steered(base.model, adapter):
        return base.model(input_ids=ids).logits


def loss(base: Base, adapter: Adapter, name: str) -> float:
    lines = [{key: value for key, value in line.items() if key != "subspace"} for line in LINES if line["subspace"] == name]
    assert base.tokenizer is not None
    batch = collate(load_data(lines, base.tokenizer, max_length=64).examples, pad_token_id=0)
    with torch.no_grad(), steered(base.model, adapter) as steering:
        steering.prompt_length = batch["prompt_length"]
        found = base.model(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")})
    return float(found.loss)


def test_each_subspace_has_learned_its_own(folder: Path, base: Base) -> None:
    whole = load_adapter(folder / "both")
    assert whole.rank == 5 and whole.training["subspaces"] == {"up": [0, 2], "down": [2, 5]} and not whole.probes
    parts = {name: subspace_of(whole, name) for name in ("up", "down")}
    assert {name: part.rank for name, part in parts.items()} == {"up": 2, "down": 3}
    for name, other in (("up", "down"), ("down", "up")):
        assert loss(base, parts[name], name) < 0.8 * loss(base, parts[other], name), "the other's examples are not its own"


def test_a_row_of_a_batch_is_edited_by_its_subspace(base: Base) -> None:
    """As the adapter that the subspace alone is, whatever the rows beside it; both are the whole edit less what the other adds."""
    torch.manual_seed(0)
    forms = {Site(layer=layer): EditForm(method="loreft", rank=5, activation="gelu") for layer in (0, 1)}
    interventions = Interventions(forms, width=tiny.WIDTH, subspaces=(range(2), range(2, 5)))
    rule = PositionRule.parse("l2")
    whole = interventions.to_adapter(base.info, rule, training={"subspaces": {"a": [0, 2], "b": [2, 5]}})
    ids = torch.arange(24).reshape(4, 6) + 3
    chosen = torch.tensor([0, 1, 1, 0])
    batch = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, prompt_length=torch.full((4,), 6), subspaces=chosen)
    with torch.no_grad(), steer(base.model, interventions.edits(), rule=rule, tied=True) as steering:
        batch.told(steering)
        mixed = base.model(input_ids=ids).logits
    for row, name in enumerate("abba"):
        alone = logits(base, subspace_of(whole, name), ids[row : row + 1])[0]
        torch.testing.assert_close(mixed[row], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
    assert float((mixed - logits(base, whole, ids)).abs().max()) > 1e-2
    both = subspace_of(whole, "b;a")
    assert all(np.array_equal(both.tensors[name], value) for name, value in whole.tensors.items())


def test_a_subspace_is_imported(folder: Path, tmp_path: Path) -> None:
    done = invoke("import", folder / "both", "-m", folder / "base", "-o", tmp_path / "down", "--subspace", "down")
    assert done.exit_code == 0 and "its subspace down, loreft, rank 3" in " ".join(done.stdout.split()), done.output
    part, whole = load_adapter(tmp_path / "down"), load_adapter(folder / "both")
    assert np.array_equal(part.tensors["0.block_output.R"], whole.tensors["0.block_output.R"][2:])
    for asked, message in (("left", "no subspace 'left'; known: up, down"), ("up;left", "no subspace 'left'")):
        refused = invoke("import", folder / "both", "-m", folder / "base", "-o", tmp_path / "no", "--subspace", asked)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split()) and not (tmp_path / "no").exists()
    again = invoke("import", tmp_path / "down", "-m", folder / "base", "-o", tmp_path / "no", "--subspace", "down")
    assert again.exit_code == 2 and "it was trained without --subspaces" in " ".join(again.stderr.split())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "names no subspace; a line of this run has a subspace, one of up, down"),
        ({"prompt": "a", "completion": "b", "subspace": "left"}, "subspace is 'left'; a line of this run"),
    ],
)
def test_refused_lines(base: Base, line: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_data([line], base.tokenizer, max_length=64, subspaces=("up", "down"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subspaces": "up"}, "'up' is not understood; use different names and ranks, like pirate:4;polite:4"),
        ({"subspaces": "up:0"}, "is not understood"),
        ({"subspaces": "up:1;up:2"}, "'up:2' is named twice"),
        ({"subspaces": "up:1", "method": "red"}, "red is of full rank"),
        ({"subspaces": "up:1", "tied": False}, "tied does not go with subspaces"),
        ({"subspaces": "up:1", "metric": "exact-match"}, "metric does not go with subspaces"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainSettings(**settings)
    assert TrainSettings(subspaces="up:2;down:3").rank == 5
