"""Several adapters as one: it does what they do one after the other, and says how much they overlap."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_bundle import ADAPTERS, LAYERS, ROUNDING, WIDTH, ToyDecoder, write_toy_bundle
from typer.testing import CliRunner

import reft_export.composing.compose as composing
from reft_export.cli.main import app
from reft_export.composing.compose import compose, compose_adapters
from reft_export.composing.overlap import interaction, overlap_of, row_basis
from runtimes.edits.adapter import Adapter, load_adapter, save_adapter
from runtimes.edits.edit import LowRankEdit, Site
from runtimes.edits.methods import METHODS
from runtimes.edits.positions import PositionRule
from runtimes.edits.strength import scaled
from runtimes.errors import AdapterError, InputError, ReftError
from runtimes.ort.session import OrtSession

DECODER = ToyDecoder.random()
LINEAR = [name for name, method in METHODS.items() if not method.full_rank]
BASE = ADAPTERS["all"].base


def adapter(
    method: str = "loreft",
    *,
    seed: int = 0,
    rank: int = 2,
    tied: bool = True,
    activation: str = "",
    layers: tuple[int, ...] = (0, 1),
    positions: str = "f1+l2",
) -> Adapter:
    """Of random parameters; RED's scale is around 1."""
    random = np.random.default_rng([seed, rank])
    rank = 0 if METHODS[method].full_rank else rank
    tensors = {
        f"{layer}.block_output.{group}{name}": np.asarray((name == "scale") + 0.3 * random.standard_normal(shape), np.float32)
        for layer in layers
        for group in ("",)[: int(tied)] or ("prefix.", "suffix.")
        for name, shape in METHODS[method].shapes(rank, WIDTH).items()
    }
    return Adapter(
        method=method, rank=rank, sites=tuple(Site(layer=layer) for layer in layers), positions=PositionRule.parse(positions), tied=tied,
        activation=activation, base=BASE, tensors=tensors,
    )  # fmt: skip


def one_after_the_other(
    adapters: Mapping[str, Adapter], strengths: Mapping[str, float], site: Site, group: str, h: np.ndarray
) -> np.ndarray:
    """By each method's own formula in float64: h + s delta(h), in turn."""
    for name, each in adapters.items():
        if site in each.sites:
            parameters = {key: np.asarray(x, np.float64) for key, x in each.parameters(site, "" if each.tied else group).items()}
            h = h + strengths.get(name, 1.0) * METHODS[each.form(site).method].delta(parameters, h, lambda z: z)
    return h


def check(adapters: Mapping[str, Adapter], strengths: Mapping[str, float]) -> Adapter:
    made = compose(adapters, strengths).adapter
    h = np.random.default_rng(7).standard_normal((5, WIDTH))
    for site in made.sites:
        for group, edit in zip(made.groups, made.edits()[site], strict=True):
            want = one_after_the_other(adapters, strengths, site, group, h)
            # Every parameter is rounded once to float32.
            np.testing.assert_allclose(
                edit.apply(h), want, rtol=0, atol=np.abs(want).max() * rounding.edit(WIDTH, made.form(site).rank, in_sequence=3)
            )
    return made


kinds = st.tuples(
    st.integers(0, 9), st.integers(1, 4), st.booleans(), st.sampled_from([(0,), (1,), (0, 1)]), st.sampled_from([1.0, 0.5, -1.0])
)


@given(st.lists(st.tuples(st.sampled_from(LINEAR), kinds), min_size=2, max_size=4))
@settings(max_examples=60, deadline=None)
def test_it_is_its_parts_in_series(drawn) -> None:
    """Of any methods, ranks, sites, strengths, tied and untied."""
    parts = {
        f"a{i}": adapter(method, seed=seed, rank=rank, tied=tied, layers=layers)
        for i, (method, (seed, rank, tied, layers, _)) in enumerate(drawn)
    }
    strengths = {f"a{i}": kind[-1] for i, (_, kind) in enumerate(drawn)}
    made = check(parts, strengths)
    for site, form in made.site_forms.items():
        there = [name for name, a in parts.items() if site in a.sites]
        alone = len(there) == 1 and strengths[there[0]] == 1
        assert form.method == (parts[there[0]].method if alone else "direft")
        assert form.rank == sum(parts[name].rank for name in there)
    assert made.tied == all(a.tied for a in parts.values())


@given(st.lists(kinds, min_size=2, max_size=3))
@settings(max_examples=30, deadline=None)
def test_red_is_its_parts_in_series(drawn) -> None:
    parts = {f"a{i}": adapter("red", seed=seed, tied=tied, layers=layers) for i, (seed, _, tied, layers, _) in enumerate(drawn)}
    assert check(parts, {f"a{i}": kind[-1] for i, kind in enumerate(drawn)}).method == "red"


def test_the_order_matters() -> None:
    one, two = adapter(seed=1), adapter(seed=2)
    ways = [check(parts, {}) for parts in ({"one": one, "two": two}, {"two": two, "one": one})]
    h = np.ones((1, WIDTH))
    assert not np.allclose(*[way.edits()[Site(layer=0)][0].apply(h) for way in ways])


@pytest.mark.parametrize("method", ["direft", "noreft", "loreft"])
def test_activations_of_sites_of_their_own_or_without_interaction(method: str) -> None:
    parts = {
        "low": adapter(method, seed=1, activation="gelu", layers=(0,)),
        "high": adapter(method, seed=2, rank=3, activation="gelu", layers=(1,)),
    }
    made = compose(parts, {"low": 0.5} if method == "direft" else {})
    h = np.random.default_rng(3).standard_normal((4, WIDTH))
    for (name, part), layer in zip(parts.items(), (0, 1), strict=True):
        want = scaled(part.edits()[Site(layer=layer)][0], made.strengths[name]).apply(h)
        np.testing.assert_allclose(made.adapter.edits()[Site(layer=layer)][0].apply(h), want, rtol=1e-6, atol=1e-6)
    assert made.adapter.activation == "gelu" and not made.meetings

    # At one site: the second one lives in the other half of the channels.
    halves = {}
    for number, name in enumerate(("left", "right")):
        part = adapter(method, seed=number, activation="gelu", layers=(0,))
        keep = (np.arange(WIDTH) < WIDTH // 2) == (name == "left")
        halves[name] = replace(part, tensors={k: v * keep.astype(np.float32) if v.ndim == 2 else v for k, v in part.tensors.items()})
    made = compose(halves, {})
    want = h
    for part in halves.values():
        want = part.edits()[Site(layer=0)][0].apply(want)
    np.testing.assert_allclose(made.adapter.edits()[Site(layer=0)][0].apply(h), want, rtol=1e-6, atol=1e-6)
    overlap = made.meetings[0].overlap
    assert overlap is not None and overlap.write_overlap < 1e-30 and overlap.interaction == 0


def test_overlap_is_what_it_says() -> None:
    rows = np.eye(6)
    first = LowRankEdit(U=rows[:2], A=2 * rows[2:4], b=np.zeros(2))
    found = overlap_of(first, LowRankEdit(U=3 * rows[1:4], A=np.vstack([rows[:1] + rows[4:5], rows[5:6], 0 * rows[:1]]), b=np.zeros(3)))
    assert found.write_overlap == pytest.approx(0.5) and found.write_angles == pytest.approx((0, 90))
    assert found.read_overlap == 0 and found.read_angles == pytest.approx((90, 90))
    assert found.interaction == pytest.approx(1 / (3**0.5 * 2**0.5))
    assert found.reverse_interaction == pytest.approx(2 * 3 * 2**0.5 / (8**0.5 * 27**0.5))
    assert interaction(np.zeros((1, 6)), rows[:1]) == 0 and row_basis(np.zeros((2, 6))).shape == (0, 6)
    turned = LowRankEdit(U=np.array([[np.cos(0.3), np.sin(0.3), 0, 0, 0, 0]]), A=rows[:1], b=np.zeros(1))
    assert overlap_of(replace(first, U=rows[:1], A=rows[:1], b=np.zeros(1)), turned).write_angles == pytest.approx((np.degrees(0.3),))


@pytest.mark.parametrize("fault", ["the second reads what it would alone", "strength of the whole of RED"])
def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault.startswith("the second"):
        stacked = lambda a, b: LowRankEdit(**{x: np.concatenate([getattr(a, x), getattr(b, x)]) for x in ("U", "A", "b")})  # noqa: E731
        monkeypatch.setattr(composing, "in_sequence", stacked)
        parts = {"one": adapter(seed=1), "two": adapter(seed=2)}
    else:
        monkeypatch.setattr(composing, "scaled", lambda edit, s: replace(edit, scale=s * edit.scale, bias=s * edit.bias))
        parts = {"one": adapter("red", seed=1), "two": adapter("red", seed=2)}
    with pytest.raises(AssertionError):
        check(parts, {"one": 0.5})


@pytest.mark.parametrize(("method", "tied"), [("loreft", True), ("loreft", False), ("red", True)])
def test_in_a_graph(tmp_path: Path, method: str, tied: bool) -> None:
    """Folded in fp32, against the edits one after the other in numpy."""
    parts = {"one": adapter(method, seed=1), "two": adapter("noreft" if method != "red" else "red", seed=2, rank=3, tied=tied, layers=(1,))}
    made = compose(parts, {"two": 0.5}).adapter
    bundle = write_toy_bundle(tmp_path / "b", adapters={"both": made})
    tokens = [5, 9, 2, 70, 33, 4]
    ids = np.array([tokens])
    with OrtSession(bundle, threads=1, adapter="both") as session:
        found = session.step(ids, np.ones_like(ids)).logits[0]
    rounding.check(found, DECODER.logits(tokens, made), ROUNDING)

    class Series(Adapter):
        def edits(self):
            return {site: tuple(InTurn(site, group) for group in self.groups) for site in self.sites}

    class InTurn:
        def __init__(self, site: Site, group: str) -> None:
            self.site, self.group = site, group

        def apply(self, h: np.ndarray) -> np.ndarray:
            return one_after_the_other(parts, {"two": 0.5}, self.site, self.group, h)

    series = Series(**{name: getattr(made, name) for name in made.__dataclass_fields__})
    rounding.check(found, DECODER.logits(tokens, series), ROUNDING)
    assert rounding.distance(found, DECODER.logits(tokens, parts["one"])) > 100 * ROUNDING and LAYERS == 2


def test_what_does_not_fit_one_adapter_is_refused() -> None:
    one = adapter()
    other_base = replace(BASE, fingerprint="1" * 64)
    gelu = adapter("direft", activation="gelu")
    refusals: dict[str, tuple[dict[str, Adapter], dict[str, float], type[ReftError]]] = {
        "1 adapter is given, expected two or more": ({"one": one}, {}, InputError),
        "a strength is given for three, which is none of one, two": ({"one": one, "two": one}, {"three": 1}, InputError),
        "the strength of two is 0, which adds nothing": ({"one": one, "two": one}, {"two": 0}, InputError),
        "the strength of two is inf, expected a finite number": ({"one": one, "two": one}, {"two": float("inf")}, InputError),
        "the composed W2 is beyond float32; lower the strengths": ({"one": one, "two": one}, {"two": 1e39}, InputError),
        "one was trained on toy .fingerprint.* adapter two on toy .1111.* compose adapters of one base": (
            {"one": one, "two": replace(one, base=other_base)}, {}, AdapterError,
        ),
        "one has f1.l2, two has all; train one with the positions of the other": (
            {"one": one, "two": adapter(positions="all")}, {}, AdapterError,
        ),
        "one has f1.l2, two has f1.l2 .overlapping": (
            {"one": one, "two": replace(one, positions=replace(one.positions, truncate=False))}, {}, AdapterError,
        ),
        r"RED\) and a low-rank edit fit no one edit of 0.block_output: one .loreft, rank 2., two .red.": (
            {"one": one, "two": adapter("red")}, {}, AdapterError,
        ),
        "one .loreft, rank 2., two .direft, rank 2, gelu.; compose those that have the same": ({"one": one, "two": gelu}, {}, AdapterError),
        "direft and the others fit no one method": (
            {"one": gelu, "two": adapter("noreft", activation="gelu")}, {}, AdapterError,
        ),
        "two reads at 0.block_output what one writes there": (
            {"one": gelu, "two": adapter("direft", seed=1, activation="gelu")}, {}, AdapterError,
        ),
        "no stored form holds one .noreft. at strength 0.5; leave it out": (
            {name: adapter("noreft", activation="gelu", layers=(i,)) for i, name in enumerate(("one", "two"))}, {"one": 0.5}, AdapterError,
        ),
        "two on bundle 000000000000; train both on the same": ({"one": one, "two": replace(one, trained_on="0" * 64)}, {}, AdapterError),
    }  # fmt: skip
    for message, (adapters, strengths, kind) in refusals.items():
        with pytest.raises(kind, match=message) as caught:
            compose(adapters, strengths)
        assert "\n" not in str(caught.value)


def test_the_verb(tmp_path: Path) -> None:
    probes = ({"prompt": "Hi", "completion": "yes"},)
    for name, made in {"one": replace(adapter(seed=1), probes=probes), "two": adapter("direft", seed=2, layers=(1,))}.items():
        save_adapter(made, tmp_path / name)

    def run(*arguments: object):
        return CliRunner().invoke(app, ["compose", *map(str, arguments)])

    folders = (tmp_path / "one", f"2nd={tmp_path / 'two'}")
    shown = run(*folders, "-o", tmp_path / "both", "--dry-run")
    assert shown.exit_code == 0 and "1.block_output" in shown.stdout and "interact" in shown.stdout, shown.output  # 80 columns cut it
    assert "probes are those of one: 1" in shown.stdout and not (tmp_path / "both").exists()
    done = run(*folders, "-o", tmp_path / "both", "--strength", "2nd=0.5")
    form = "loreft, rank 2 at 1 site; direft, rank 4 at 1 site, tied"
    said = f"both: one + 2nd at strength 0.5; {form}, positions f1+l2, 2 sites"
    assert done.exit_code == 0 and said in done.stdout.replace("\n", "")
    both = load_adapter(tmp_path / "both")
    assert both.probes == probes and both.training["parts"]["2nd"]["strength"] == 0.5
    refused = run(*folders, "-o", tmp_path / "both")
    assert refused.exit_code == 2 and "--force" in refused.stderr
    told = json.loads(run(*folders, "-o", tmp_path / "both", "--force", "--json").stdout)
    assert told["sites"] == [
        {"site": "0.block_output", "method": "loreft", "rank": 2},
        {"site": "1.block_output", "method": "direft", "rank": 4},
    ]
    assert len(told["meetings"]) == 1 and len(told["meetings"][0]["overlap"]["write_angles"]) == 2
    for text, match in {
        "2nd": "is not understood; write NAME=0.5",
        "2nd=x": "is not understood",
        "x=2": "which is none of one, 2nd",
    }.items():
        wrong = run(*folders, "-o", tmp_path / "no", "--strength", text)
        assert wrong.exit_code == 2 and match in wrong.stderr, wrong.output
    twice = run(tmp_path / "one", tmp_path / "one", "-o", tmp_path / "no")
    assert twice.exit_code == 2 and "two adapters are called one" in twice.stderr
    compose_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "api")
    assert [form.rank for form in load_adapter(tmp_path / "api").site_forms.values()] == [2, 4]
