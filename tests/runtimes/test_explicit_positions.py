"""Positions that no graph computes: tokens by number, every n-th, and several rules in one adapter, against a count by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_bundle import EXPLICIT, ROUNDING, ToyDecoder, toy_adapter, write_toy_bundle

from reft_export.quantizing.calibrate import banks_digest
from reft_export.quantizing.refit import RefitSettings, load_sources
from reft_export.training.frozen_prefix import frozen_tokens
from runtimes.edits.adapter import save_adapter
from runtimes.edits.positions import PositionRule, Positions, RuleSets, needs_slots, of_rules, slot_count, slots
from runtimes.errors import AdapterError, InputError
from runtimes.ort.session import OrtSession

explicit = st.one_of(
    st.builds(lambda numbers: PositionRule(chosen=tuple(numbers)), st.lists(st.integers(-9, 9), min_size=1, max_size=4)),
    st.builds(lambda n: PositionRule(every=n), st.integers(1, 5)),
)
graphs = st.sampled_from([PositionRule.parse(text) for text in ("f1", "l2", "f2+l3", "prompt", "all")])
rules = st.lists(st.one_of(explicit, graphs), min_size=1, max_size=4, unique=True)


def by_hand(rule: PositionRule, at: int, length: int, *, tied: bool) -> int:
    """Token ``at`` of a row whose prompt has ``length``."""
    if rule.everywhere:
        return 0
    if at >= length:
        return -1
    if rule.every:
        return 0 if at % rule.every == 0 else -1
    if rule.chosen:
        return 0 if at in rule.chosen or at - length in rule.chosen else -1
    if rule.prompt:
        return 0
    first, last = min(rule.first, length // 2), min(rule.last, length // 2)
    return (0 if tied else int(bool(rule.first))) if at >= length - last else 0 if at < first else -1


def of_row(where: Positions, count: int, length: int, *, tied: bool) -> list[int]:
    every = where.rules if isinstance(where, RuleSets) else (where,)
    found = [tuple(by_hand(rule, at, length, tied=tied) for rule in every) for at in range(count)]
    if isinstance(where, RuleSets):
        return [-1 if max(one) < 0 else where.sets.index(one) for one in found]
    return [one for (one,) in found]


@given(rules, st.booleans(), st.integers(1, 12), st.integers(0, 5), st.integers(0, 4), st.booleans(), st.integers(1, 20))
def test_slots_are_those_counted_by_hand(each, tied: bool, length: int, answer: int, pads: int, left: bool, chunk: int) -> None:
    """Whatever side pads stand on, in one call or in several; beside a row of another length."""
    where, count = of_rules(each, tied=tied), length + answer
    want = of_row(where, count, length, tied=tied)
    if not isinstance(where, RuleSets) and not tied and not (where.first and where.last):
        tied = True  # no adapter is untied there
        want = of_row(where, count, length, tied=tied)
    mask = np.zeros((2, count + pads), np.int64)
    real = slice(pads, None) if left else slice(count)
    mask[0, real] = 1
    mask[1] = 1
    lengths = np.array([length, count])
    found = []
    for start in range(0, count + pads, chunk):
        end = min(start + chunk, count + pads)
        if not mask[:, :end].any(1).all():  # a row of pads alone
            found.append(np.full((2, end - start), -1))
            continue
        found.append(slots(where, mask[:, :end], end - start, tied=tied, prompt_length=lengths))
    slot = np.concatenate(found, 1)[0]
    assert slot.max() < slot_count(where, tied=tied)
    if left or pads == 0:
        assert slot[real].tolist() == want
    assert (slot[mask[0] == 0] == -1).all()
    assert slots(where, mask[:1, real], count, tied=tied, prompt_length=lengths[:1])[0].tolist() == want


@given(rules, st.integers(1, 30), st.integers(1, 40))
def test_frozen_tokens_stand_before_the_first_slot(each, length: int, counted: int) -> None:
    where = of_rules(each, tied=True)
    edited = slots(where, np.ones((1, length), np.int64), length, prompt_length=np.array([length]))[0] >= 0
    assert frozen_tokens(where, length, counted) <= min(int(edited.argmax()) if edited.any() else length, counted)


@given(st.one_of(explicit, graphs, st.just(PositionRule(marked=True))))
def test_text_and_back(rule: PositionRule) -> None:
    assert PositionRule.parse(str(rule)) == rule and needs_slots(rule) == bool(rule.chosen or rule.every or rule.marked)
    if rule.explicit:  # handed no slots, a graph edits nothing
        assert not any(rule.tensors(tied=True)[name].any() for name in ("reft.first", "reft.last", "reft.prompt", "reft.everywhere"))


def test_numbers_are_put_in_order() -> None:
    assert str(PositionRule.parse("5,-1,1,5,-3")) == "1,5,-3,-1" and str(PositionRule.parse("-2")) == "-2"
    assert PositionRule.parse("0") == PositionRule(chosen=(0,)) and PositionRule.parse("every3").every == 3


@pytest.mark.parametrize("text", ["1,,2", ",1", "1,", "every", "every0", "every-1", "-", "1;2", "1, 2", "f2,3"])
def test_refused_text(text: str) -> None:
    with pytest.raises(
        InputError, match="are not understood; use f<n>, l<n>, f<n>.l<n>, prompt, all, numbers like 1,3,-2, every<n>, or marked"
    ):
        PositionRule.parse(text)


def test_refused_numbers() -> None:
    with pytest.raises(InputError, match="numbers reach from"):
        PositionRule.parse("99999999999999999999")
    with pytest.raises(InputError, match="5 position rules in one adapter, expected at most 4"):
        of_rules([PositionRule(first=n) for n in range(1, 6)], tied=True)
    with pytest.raises(InputError, match="positions are one of"):
        PositionRule(chosen=(1,), every=2)


def test_a_set_has_each_of_its_rules() -> None:
    """The first token needs both: f1 at one layer, all at another."""
    where = RuleSets((PositionRule(first=1), PositionRule(everywhere=True)), True)
    assert where.sets == ((-1, 0), (0, 0)) and str(where) == "f1; all"
    assert slots(where, np.ones((1, 5), np.int64), 5, prompt_length=np.array([3]))[0].tolist() == [1, 0, 0, 0, 0]


def test_a_graph_of_version_1_is_handed_all_slots(tmp_path: Path) -> None:
    """By its own input, at every step."""
    decoder, tokens, prompt = ToyDecoder.random(), [3, 1, 4, 1, 5, 9], np.array([4])
    bundle = write_toy_bundle(tmp_path / "b", slot_mode="input", adapters=EXPLICIT)
    for name, adapter in EXPLICIT.items():
        with OrtSession(bundle, threads=1, adapter=name) as session:
            ids, mask = np.array([tokens]), np.ones((1, len(tokens)), np.int64)
            first = session.step(ids[:, :3], mask[:, :3], prompt_length=prompt)
            rest = session.step(ids[:, 3:], mask, past=first.past)
        said = np.concatenate([first.logits[0], rest.logits[0]])
        np.testing.assert_allclose(said, decoder.logits(tokens, adapter, 4), rtol=0, atol=ROUNDING)


def test_ranges_are_of_the_positions_that_they_were_collected_at(tmp_path: Path) -> None:
    """The banks of positions by number are those of any others."""
    every = {"one": "1,-2", "same": "1,-2", "other": "0,3", "nth": "every2"}
    bundles = {name: write_toy_bundle(tmp_path / name, adapters={"x": toy_adapter(text, seed=5)}) for name, text in every.items()}
    found = {name: banks_digest(bundle, "x") for name, bundle in bundles.items()}
    assert found["one"] == found["same"] and len(set(found.values())) == 3


def test_a_refit_starts_at_the_bundles_own_positions(tmp_path: Path) -> None:
    """The banks of others may be the same."""
    bundle = write_toy_bundle(tmp_path / "b", adapters={"x": toy_adapter("1,-2", seed=5)})
    for name, text in (("same", "-2,1"), ("other", "0,3"), ("graphs", "l1")):
        save_adapter(toy_adapter(text, seed=5), tmp_path / name / "x")
    settings = RefitSettings(data=None, sources=(tmp_path / "same" / "x",), objective="data")
    assert set(load_sources(bundle, settings)) == {"x"}
    for name in ("other", "graphs"):
        with pytest.raises(AdapterError, match="adapter x: its folder edits at (0,3|l1), and .* holds it at 1,-2; pass the folder"):
            load_sources(bundle, replace(settings, sources=(tmp_path / name / "x",)))
