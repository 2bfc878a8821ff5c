"""Edits of layers: their grammar, recipes, and training with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reft_export.base.load import Base
from reft_export.training.edits import LayerEdits, edits_of_forms, forms_of_edits, rules_of_edits
from reft_export.training.recipe import read_recipe
from reft_export.training.settings import TrainSettings, settings_like
from reft_export.training.trainer import train
from runtimes.edits.adapter import load_adapter
from runtimes.edits.edit import ACTIVATIONS, STREAMS, Site
from runtimes.edits.form import EditForm
from runtimes.edits.methods import METHODS
from runtimes.edits.positions import PositionRule
from runtimes.errors import InputError

EDITS = ("0: loreft r2", "1: direft r3 gelu mlp_output", "2: red")
SETTINGS = TrainSettings(edits=tuple(map(LayerEdits.parse, EDITS)), positions="f2+l2", lr=5e-2, epochs=10, batch_size=4, samples=1, seed=7)
FORMS = {
    Site(layer=0): EditForm(method="loreft", rank=2),
    Site(layer=1, stream="mlp_output"): EditForm(method="direft", rank=3, activation="gelu"),
    Site(layer=2): EditForm(method="red", rank=0),
}


@st.composite
def layer_edits(draw: st.DrawFn) -> LayerEdits:
    method = draw(st.sampled_from(sorted(METHODS)))
    return LayerEdits(
        layers=draw(st.sampled_from(["all", "3", "4-10", "3;9", "0-2;8"])),
        method=method,
        rank=None if METHODS[method].full_rank else draw(st.integers(1, 64)),
        activation=draw(st.sampled_from(ACTIVATIONS)) if METHODS[method].activated else "",
        positions=draw(st.sampled_from([None, "f1+l2", "all", "1,3,-2", "every3"])),
        streams=";".join(draw(st.lists(st.sampled_from(STREAMS), min_size=1, unique=True))),
    )


@given(layer_edits())
def test_text_and_back(edit: LayerEdits) -> None:
    again = LayerEdits.parse(str(edit))
    assert again.form == edit.form and again.positions == edit.positions
    forms, rules = forms_of_edits([edit], 16), rules_of_edits([edit], 16, PositionRule(last=1))
    assert forms_of_edits([again], 16) == forms
    whole = edits_of_forms(forms, rules)
    assert forms_of_edits(whole, 16) == forms and rules_of_edits(whole, 16, PositionRule(first=9)) == rules


def test_forms_of_several() -> None:
    assert forms_of_edits(SETTINGS.edits, 3) == FORMS
    assert LayerEdits.parse("4-10:loreft").rank == 4 and LayerEdits.parse(" 3 : red ").rank == 0
    assert LayerEdits.parse("3: direft gelu 1,-2 r8 block_input;mlp_output") == LayerEdits(
        layers="3", method="direft", rank=8, activation="gelu", positions="1,-2", streams="block_input;mlp_output"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4-10 loreft r4", "is not understood; expected LAYERS: METHOD"),
        (": red", "is not understood"),
        ("3:", "is not understood"),
        ("3: magic", "method 'magic' is unknown; known: loreft"),
        ("3: loreft four", "'four' is no rank .r4., activation, stream or positions"),
        ("3: loreft l1 all", "says its positions twice, l1 and all"),
        ("3: loreft r4 r8", "says its rank twice, r4 and r8"),
        ("3: red r4", "red is of full rank and has none to choose; leave r4 out"),
        ("3: loreft r0", "rank 0 does not fit loreft"),
        ("3: consreft gelu", "consreft has no learned source for gelu to act on"),
    ],
)
def test_refused_edits(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LayerEdits.parse(text)


def test_refused_together() -> None:
    parse = LayerEdits.parse
    with pytest.raises(InputError, match="'0-2: loreft r4' and '1: red' are both of 1.block_output"):
        forms_of_edits([parse("0-2: loreft"), parse("1: red")], 3)
    with pytest.raises(InputError, match="layer 3 does not exist in this base .3 layers"):
        forms_of_edits([parse("3: red")], 3)
    with pytest.raises(InputError, match="rank and layers beside edits, which say it each for themselves"):
        TrainSettings(edits=SETTINGS.edits, rank=8, layers="3")
    with pytest.raises(InputError, match=r"untied interventions need a prefix and a suffix .f<n>.l<n>.; positions are l1; all"):
        TrainSettings(edits=(parse("0: loreft l1"), parse("1: red all")), tied=False)
    with pytest.raises(InputError, match="init identity: consreft has no values"):
        TrainSettings(edits=(parse("0: loreft"), parse("1: consreft")), init="identity")
    with pytest.raises(InputError, match="edits has '0: red', expected LayerEdits; LayerEdits.parse reads a text"):
        TrainSettings(edits=("0: red",))  # pyright: ignore[reportArgumentType]


def test_recipes_of_both_kinds(tmp_path: Path) -> None:
    rows = [{"layers": "0", "method": "loreft", "rank": 2}, {"layers": "1", "method": "direft", "rank": 3, "activation": "gelu",
            "streams": "mlp_output"}, {"layers": "2", "method": "red"}]  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps({"edits": rows}))
    (tmp_path / "r.yaml").write_text(
        "edits:\n  - {layers: 0, method: loreft, rank: 2}\n"
        "  - {layers: 1, method: direft, rank: 3, activation: gelu, streams: mlp_output}\n"
        "  - layers: 2\n    method: red\n"
    )
    assert read_recipe(tmp_path / "r.json") == read_recipe(tmp_path / "r.yaml") == SETTINGS.edits
    (tmp_path / "r.yaml").write_text("edits: [{layers: 010}, {layers: 3:20}, {layers: 4, positions: -2, rank: null}]")
    assert [edit.layers for edit in read_recipe(tmp_path / "r.yaml")] == ["010", "3:20", "4"], "not octal, and not of base 60"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.txt", "", "is neither .yaml nor .yml nor .json"),
        ("none.json", None, "cannot be read"),
        ("r.json", "{", "is not JSON"),
        ("r.json", '{"edits": [], "edits": []}', "'edits' is given twice"),
        ("r.json", '{"layers": "3"}', "has no edits; expected edits: a list"),
        ("r.json", '{"edits": [{"layers": "3"}], "lr": 1}', "r.json: key 'lr' is unknown"),
        ("r.json", '{"edits": [{"layers": "3", "ranks": 2}]}', r"r.json: edits\[0\]: key 'ranks' is unknown; known: layers, method, rank"),
        ("r.json", '{"edits": [{"rank": 2}]}', r"edits\[0\]: lacks \['layers'\]"),
        ("r.json", '{"edits": ["3: red"]}', r"edits\[0\] is '3: red', expected dict"),
        ("r.json", '{"edits": [{"layers": "3", "rank": "2"}]}', r"edits\[0\].rank is '2', expected int"),
        ("r.json", '{"edits": [{"layers": "3"}, {"layers": "4", "method": "magic"}]}', r"edits\[1\]: .*method 'magic' is unknown"),
        ("r.json", '{"edits": [{"layers": "3", "positions": "l"}]}', r"edits\[0\]: positions 'l' are not understood"),
        ("r.yaml", "edits: [", "is not YAML"),
        ("r.yaml", "edits:\n  - layers: 3\n    layers: 4\n", "key 'layers' is given twice"),
        ("r.yaml", "edits:\n  - {layers: 1, positions: 2024-13-01}\n", r"edits\[0\]: positions '2024-13-01' are not understood"),
        ("r.yaml", "edits:\n  - layers: !!int three\n", "is not YAML"),
        ("r.yaml", "edits:\n  - layers: !!bool three\n", "is not YAML"),
        ("r.yaml", "edits: !!python/object/apply:os.system ['true']\n", "is not YAML"),
    ],
)
def test_refused_recipes(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_recipe(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_run_with_edits_learns_and_goes_on(base: Base, data: Path, tmp_path: Path) -> None:
    result = train(base, data, SETTINGS, tmp_path / "a")
    assert result.history[-1].loss < 0.9 * result.history[0].loss
    adapter = load_adapter(tmp_path / "a")
    assert adapter.site_forms == FORMS and adapter.training["settings"]["edits"] == list(map(str, SETTINGS.edits))
    assert not {"rank", "method", "layers"} & set(adapter.training["settings"])
    like = settings_like(adapter, max_steps=1, lr=0.0, samples=0)
    more = train(base, data, like, tmp_path / "b", start=adapter)
    assert more.adapter.site_forms == FORMS
    assert abs(more.history[0].loss - result.history[-1].loss) < 0.5 * abs(result.history[0].loss - result.history[-1].loss)
    several = replace(
        SETTINGS, edits=tuple(map(LayerEdits.parse, ("0: loreft r2 1,-2", "1: direft r1", "2: red all"))), tied=False, max_steps=4
    )
    mixed = train(base, data, several, tmp_path / "d").adapter
    assert str(mixed.where) == "1,-2; f2+l2; all" and "1.block_output.suffix.W1" in mixed.tensors
    again = train(base, data, settings_like(load_adapter(tmp_path / "d"), max_steps=1, lr=0.0, samples=0), tmp_path / "e", start=mixed)
    assert again.adapter.site_rules == mixed.site_rules
    plain = train(base, data, replace(SETTINGS, edits=(), layers="0", rank=2, max_steps=1), tmp_path / "c").adapter
    assert "edits" not in plain.training["settings"]
