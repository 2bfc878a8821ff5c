"""``train --orthogonal-to``: the new edit and those that were there do not interfere, and it still learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models.adapters import random_adapter

import reft_export.training.interventions as modules
from reft_export.base.load import Base
from reft_export.composing.compose import compose, meetings_of
from reft_export.training.avoided import avoided
from reft_export.training.interventions import Interventions
from reft_export.training.settings import TrainSettings
from reft_export.training.trainer import train
from runtimes.edits.adapter import Adapter
from runtimes.edits.edit import Site
from runtimes.edits.form import one_form
from runtimes.edits.methods import METHODS
from runtimes.errors import AdapterError, InputError, ReftError

SETTINGS = TrainSettings(rank=2, layers="0;2", positions="all", lr=5e-2, epochs=10, batch_size=4, samples=0, seed=7, chat_template="never")
SITES = (Site(layer=0), Site(layer=2))
FORMS = one_form(SITES, method="loreft", rank=2)
LOW_RANK = [name for name, method in METHODS.items() if not method.full_rank]


def given_to(base: Base) -> dict[str, Adapter]:
    return {
        "first": random_adapter(base.info, SITES[:1], rank=3, positions="f2+l2", tied=False, seed=1),
        "second": random_adapter(base.info, SITES, method="direft", rank=2, positions="all", seed=2),
        "gelu": random_adapter(base.info, SITES[1:], method="noreft", rank=1, positions="all", activation="gelu", seed=3),
    }


def check_apart(new: Adapter, given: dict[str, Adapter]) -> None:
    for name, other in given.items():
        found = [each.overlap for each in meetings_of({"new": new, name: other})]
        assert found
        for overlap in found:
            assert overlap is not None and overlap.write_overlap < 1e-10
            assert max(overlap.interaction, overlap.reverse_interaction) < 1e-6


@pytest.mark.parametrize("method", LOW_RANK)
def test_it_learns_and_does_not_interfere(base: Base, data: Path, tmp_path: Path, method: str) -> None:
    given = given_to(base)
    settings = replace(SETTINGS, method=method, weight_decay=0.01)
    result = train(base, data, settings, tmp_path / "new", orthogonal_to=given)
    check_apart(result.adapter, given)
    assert result.history[-1].loss < 0.9 * result.history[0].loss
    assert result.adapter.training["orthogonal_to"] == {name: each.digest for name, each in given.items()}

    # In either order both add what each adds alone.
    parts = {"new": result.adapter, "second": given["second"]}
    h = np.random.default_rng(0).standard_normal((4, base.info.hidden_size))
    orders = [compose(dict(order), {}).adapter for order in (parts.items(), reversed(parts.items()))]
    for site in SITES:
        want = h + sum(part.edits()[site][0].apply(h) - h for part in parts.values())
        for made in orders:
            np.testing.assert_allclose(made.edits()[site][0].apply(h), want, rtol=1e-5, atol=1e-5)


def test_the_same_without_it_does_interfere(base: Base, data: Path, tmp_path: Path) -> None:
    given = given_to(base)
    with pytest.raises(AssertionError):
        check_apart(train(base, data, replace(SETTINGS, epochs=1), tmp_path / "new").adapter, given)


@pytest.mark.parametrize("fault", ["only U", "only R"])
def test_a_planted_fault_is_seen(base: Base, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Orthogonal to what the others write alone, and a source that reads it."""
    given, width = given_to(base), base.info.hidden_size
    spaces = avoided(given, FORMS, width)
    if fault == "only U":
        spaces = {site: replace(each, touched=each.written) for site, each in spaces.items()}
    else:
        monkeypatch.setattr(modules.FreeRows, "forward", lambda self: self.V)
    trained = Interventions(FORMS, width=width, avoided=spaces)
    with pytest.raises(AssertionError):
        check_apart(trained.to_adapter(base.info, SETTINGS.rule), given)


def test_checkpoints_hold_no_more_than_before(base: Base) -> None:
    """What is avoided follows from the adapters; a run without any moves as before."""
    width = base.info.hidden_size
    spaces = avoided(given_to(base), FORMS, width)
    torch.manual_seed(0)
    plain = Interventions(FORMS, width=width)
    torch.manual_seed(0)
    apart = Interventions(FORMS, width=width, avoided=spaces)
    free = [{name.removesuffix(".V"): value for name, value in each.state_dict().items()} for each in (plain, apart)]
    assert free[0].keys() == free[1].keys() and all(torch.equal(value, free[1][name]) for name, value in free[0].items())
    assert [len(group["params"]) for group in apart.parameter_groups(0.1)] == [
        len(group["params"]) for group in plain.parameter_groups(0.1)
    ]


def test_refusals(base: Base, data: Path, tmp_path: Path) -> None:
    info, given = base.info, given_to(base)
    other = replace(info, hidden_size=info.hidden_size // 2)
    red = {"red": random_adapter(info, SITES, method="red")}
    refusals: dict[str, tuple[type[ReftError], TrainSettings, dict[str, Adapter], Adapter | None]] = {
        "red writes every channel, and is orthogonal to nothing": (InputError, replace(SETTINGS, method="red"), given, None),
        "red is red, which writes every channel: nothing is orthogonal to it": (AdapterError, SETTINGS, red, None),
        "x is for width": (AdapterError, SETTINGS, {"x": random_adapter(other, SITES)}, None),
        "first edits 0.block_output, and 1.block_output are trained: they do not meet": (
            InputError, replace(SETTINGS, layers="1"), {"first": given["first"]}, None,
        ),
        "rank .* does not fit at 0.block_output: .* of its .* dimensions; lower --rank": (
            InputError, replace(SETTINGS, rank=info.hidden_size - 4), given, None,
        ),
        "a started adapter is not orthogonal to others": (InputError, SETTINGS, given, random_adapter(info, SITES, rank=2)),
    }  # fmt: skip
    for message, (kind, settings, others, start) in refusals.items():
        with pytest.raises(kind, match=message) as caught:
            train(base, data, settings, tmp_path / "no", orthogonal_to=others, start=start)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "no").exists()
