"""The adapter folder: what is written is read back to the bit, and everything else is refused in one line."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from reseal import reseal
from safetensors.numpy import load_file, save_file

from runtimes.edits.adapter import BaseModel, load_adapter, save_adapter
from runtimes.edits.edit import LowRankEdit, activate, in_sequence
from runtimes.edits.methods import METHODS, fold_parameters
from runtimes.edits.op import bank_of
from runtimes.edits.positions import PositionRule
from runtimes.errors import AdapterError, InputError

BASE = BaseModel(name="base", fingerprint="f" * 64, num_hidden_layers=tiny.LAYERS, hidden_size=tiny.WIDTH)


@pytest.mark.parametrize("method", METHODS)
def test_round_trip(method, tmp_path) -> None:
    adapter = tiny.random_adapter(BASE, method=method, tied=False, positions="f1+l3")
    save_adapter(adapter, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["adapter.json", "adapter.safetensors"]
    again = load_adapter(tmp_path / "a")
    for name in ("method", "rank", "sites", "positions", "tied", "activation", "base", "training"):
        assert getattr(again, name) == getattr(adapter, name)
    assert all(np.array_equal(again.tensors[k], v) for k, v in adapter.tensors.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mystery": 1}, "unknown keys"),
        ({"rank": True}, "rank is True, expected int"),
        ({"rank": 5}, "expected \\[5"),
        ({"sites": [{"site": "0.block_output"}]}, "unknown"),
        ({"sites": [{"site": "0.nowhere"}]}, "stream 'nowhere' is unknown"),
        ({"sites": [{"site": "0.block_output", "rule": 1}]}, "follows rule 1, and the adapter has 1, from 0"),
        ({"sites": [{"site": "0.block_output", "rank": 2}]}, "unknown \\['2.block_output.R', "),
        ({"sites": [{"site": "0.block_output", "form": "folded"}]}, "site 0.block_output: method 'folded' is unknown"),
        ({"method": "magic"}, "method 'magic' is unknown"),
        ({"rules": [{"positions": "f0+l0", "truncate": True, "tied": True}]}, "positions"),
        ({"rules": [{"positions": "all", "truncate": True, "tied": True}] * 2}, "no site follows position rule 1"),
        ({"rules": []}, "0 position rules, expected 1 to 4"),
        ({"positions": "all"}, "unknown keys"),
        ({"format_version": 3}, "version 3"),
        ({"format_version": True}, "version True"),
        ({"format": "another"}, "is 'another', expected 'reft-export adapter'"),
        ({"tensors_sha256": None}, "lacks the sha256 of adapter.safetensors"),
        ({"probes": {"count": 1, "sha256": "0" * 64}}, "probes.jsonl cannot be read"),
        ({"activation": "gelu", "method": "consreft"}, "no learned source"),
        ({"rank": 0}, "rank 0 does not fit loreft, whose rank is at least 1"),
        ({"method": "red"}, "rank 4 does not fit red, whose rank is 0"),
    ],
)
def test_config_is_strict(change, message, tmp_path) -> None:
    save_adapter(tiny.random_adapter(BASE), tmp_path / "a")
    reseal(tmp_path / "a", **change)
    with pytest.raises((AdapterError, InputError), match=message):
        load_adapter(tmp_path / "a")


def test_the_family_of_the_base_may_be_absent(tmp_path) -> None:
    """Adapters that were saved before it was recorded load, and say none."""
    save_adapter(tiny.random_adapter(replace(BASE, model_type="llama")), tmp_path / "a")
    assert load_adapter(tmp_path / "a").base.model_type == "llama"
    reseal(tmp_path / "a", lambda content: content["base"].pop("model_type"))
    assert load_adapter(tmp_path / "a").base == BASE


def test_missing_key_and_broken_json(tmp_path) -> None:
    save_adapter(tiny.random_adapter(BASE), tmp_path / "a")
    path = tmp_path / "a" / "adapter.json"
    reseal(path, lambda content: content["rules"][0].pop("tied"))
    with pytest.raises(AdapterError, match=r"lacks \['tied'\]"):
        load_adapter(tmp_path / "a")
    path.write_bytes(b"\xff{")
    with pytest.raises(AdapterError, match="is not JSON"):
        load_adapter(tmp_path / "a")


@pytest.mark.parametrize("damage", ["nan", "shape", "dtype", "missing", "extra", "truncated"])
def test_damaged_tensors(damage, tmp_path) -> None:
    save_adapter(tiny.random_adapter(BASE), tmp_path / "a")
    path = tmp_path / "a" / "adapter.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-4])
    else:
        tensors = load_file(path)
        name = "0.block_output.W"
        if damage == "nan":
            tensors[name][1, 2] = np.nan
        elif damage == "shape":
            tensors[name] = tensors[name][:, :-1].copy()
        elif damage == "dtype":
            tensors[name] = tensors[name].astype(np.float16)
        elif damage == "missing":
            del tensors[name]
        else:
            tensors["9.block_output.W"] = tensors[name]
        save_file(tensors, path)
    reseal(tmp_path / "a")
    with pytest.raises(AdapterError, match="a: |damaged"):
        load_adapter(tmp_path / "a")


def test_existing_adapter_survives(tmp_path) -> None:
    save_adapter(tiny.random_adapter(BASE), tmp_path / "a")
    before = (tmp_path / "a" / "adapter.safetensors").read_bytes()
    with pytest.raises(InputError, match="--force"):
        save_adapter(tiny.random_adapter(BASE, seed=1), tmp_path / "a")
    assert (tmp_path / "a" / "adapter.safetensors").read_bytes() == before
    save_adapter(tiny.random_adapter(BASE, seed=1), tmp_path / "a", force=True)
    assert (tmp_path / "a" / "adapter.safetensors").read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@given(st.sampled_from(sorted(METHODS)), st.integers(1, 6), st.integers(2, 40), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_canonical_form_is_the_formula(method, rank, width, seed) -> None:
    """The table of the design, written out by hand in float64."""
    g = np.random.default_rng(seed)
    p = {n: g.standard_normal(shape) for n, shape in METHODS[method].shapes(rank, width).items()}
    h = g.standard_normal((3, width))
    edit = fold_parameters(method, p)
    expected = {
        "loreft": lambda: h + (h @ p["W"].T + p["b"] - h @ p["R"].T) @ p["R"],
        "noreft": lambda: h + (h @ p["W"].T + p["b"] - (h @ p["P"].T + p["p"])) @ p["P"],
        "direft": lambda: h + (h @ p["W1"].T + p["b"]) @ p["W2"],
        "consreft": lambda: h + (p["s"] - h @ p["R"].T) @ p["R"],
        "lobireft": lambda: h + p["s"] @ p["R"],
        "red": lambda: h @ np.diag(p["scale"]) + p["bias"],
    }[method]()
    np.testing.assert_allclose(edit.apply(h), expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])
@pytest.mark.parametrize("method", ["loreft", "noreft", "direft"])
def test_activation_acts_on_the_learned_source_alone(method, activation) -> None:
    g = np.random.default_rng(0)
    p = {n: g.standard_normal(shape) for n, shape in METHODS[method].shapes(4, 16).items()}
    h = g.standard_normal((5, 16))
    edit = fold_parameters(method, p, activation)
    if method == "direft":
        expected = h + activate(h @ p["W1"].T + p["b"], activation) @ p["W2"]
    else:
        projection, offset = (p["R"], 0.0) if method == "loreft" else (p["P"], p["p"])
        expected = h + (activate(h @ p["W"].T + p["b"], activation) - h @ projection.T - offset) @ projection
    np.testing.assert_allclose(edit.apply(h), expected, rtol=1e-12, atol=1e-10)


def test_two_edits_in_sequence_are_one() -> None:
    g = np.random.default_rng(0)
    first, second = (LowRankEdit(U=g.standard_normal((r, 12)), A=g.standard_normal((r, 12)), b=g.standard_normal(r)) for r in (2, 5))
    h = g.standard_normal((7, 12))
    np.testing.assert_allclose(in_sequence(first, second).apply(h), second.apply(first.apply(h)), atol=1e-9)


@pytest.mark.parametrize("activated", ["all", "first_half"])
def test_ranks_are_padded_without_effect(activated) -> None:
    """A bank of edits of several ranks applies each as it is, whatever the activation makes of the zero rows."""
    g = np.random.default_rng(0)
    edits = [
        LowRankEdit(
            U=g.standard_normal((r, 8)), A=g.standard_normal((r, 8)), b=g.standard_normal(r), activation="sigmoid", activated=activated
        )
        for r in (2, 6)
    ]
    U, A, b = bank_of(edits, np.float64)
    h = g.standard_normal((3, 8))
    for slot, edit in enumerate(edits):
        padded = LowRankEdit(U=U[slot], A=A[slot], b=b[slot], activation="sigmoid", activated=activated)
        np.testing.assert_allclose(padded.apply(h), edit.apply(h), atol=1e-12)


def test_overflow_in_half_precision_is_refused() -> None:
    edit = LowRankEdit(U=np.full((1, 4), 1e5), A=np.ones((1, 4)), b=np.zeros(1))
    with pytest.raises(AdapterError, match="overflows float16"):
        bank_of([edit], np.float16)


@pytest.mark.parametrize("text", ["f7+l7", "f3", "l1", "prompt", "all"])
def test_positions_grammar(text) -> None:
    assert str(PositionRule.parse(text)) == text


@pytest.mark.parametrize("text", ["", "f", "g3", "f1l1", "l1+f1", "f0", "f1+", "+l1", "f-1", "ALL", "f1+l1+all"])
def test_positions_that_are_refused(text) -> None:
    with pytest.raises(InputError, match="positions"):
        PositionRule.parse(text)


def test_counts_beyond_the_graphs_int64() -> None:
    """Python refuses to read thousands of digits as a number."""
    largest = PositionRule.parse(f"f{2**63 - 1}+l1")
    assert largest.tensors(tied=True)["reft.first"].tolist() == [2**63 - 1]
    for text in (f"f{2**63}", f"l{10**20}", "f1+l" + "9" * 5000):
        with pytest.raises(InputError, match=r"positions: a count is beyond 9223372036854775807") as e:
            PositionRule.parse(text)
        assert len(str(e.value)) < 200
    with pytest.raises(InputError, match="a count is beyond"):
        PositionRule(last=2**63)
