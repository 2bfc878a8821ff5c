"""Adapters written back as pyreft saves them: the tensors of every class, and import after export is the identity."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from cases import BASE, CASES, Case

from reft_export.base.load import Base, outline_base
from reft_export.importing.foreign import Request
from reft_export.importing.importer import import_adapter
from reft_export.importing.pyreft.write import export_to_pyreft
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.edits.methods import METHODS
from runtimes.errors import AdapterError, InputError

CONVERTED = ("mixed", "two_a_site", "one_a_site", "paths")
UNIFORM = [c for c in CASES if c.library.startswith("pyreft") and not any(n in c.name for n in CONVERTED)]
"""Those whose form pyreft and we share; the others come back in the form that the import gave them."""


def same(one: Path, other: Path) -> None:
    a, b = load_adapter(one), load_adapter(other)
    for name in ("method", "rank", "sites", "positions", "tied", "activation", "dropout", "base"):
        assert getattr(a, name) == getattr(b, name)
    assert a.tensors.keys() == b.tensors.keys()
    assert all(np.array_equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.mark.parametrize("case", UNIFORM, ids=lambda c: c.label)
def test_what_pyreft_wrote_comes_back(case: Case, imported: dict[str, Path], tmp_path: Path) -> None:
    """The same files with the same tensors, in bfloat16's case widened; raw rotations mean the same R to the bit."""
    export_to_pyreft(str(BASE), imported[case.label], tmp_path / "back", report=lambda _: None)
    assert {p.name for p in (tmp_path / "back").iterdir()} == {p.name for p in case.adapter.iterdir()} | {"reft_export.json"}
    mine, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "back", case.adapter))
    for key in ("representations", "intervention_types", "intervention_dimensions", "sorted_keys", "mode"):
        assert sorted(map(str, mine[key])) == sorted(map(str, theirs[key])), key
    for path in case.adapter.glob("*.bin"):
        found, expected = (torch.load(f / path.name, weights_only=True) for f in (tmp_path / "back", case.adapter))
        unused = {"proj_layer.bias"} if "nodireft" in case.name else set()
        assert found.keys() == expected.keys() - unused
        for name in found:
            if "parametrizations" not in name:
                assert torch.equal(found[name], expected[name].float() if expected[name].is_floating_point() else expected[name]), name
    import_adapter(tmp_path / "back", str(BASE), tmp_path / "again", Request(), report=lambda _: None)
    same(imported[case.label], tmp_path / "again")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", [method for method in METHODS if method != "red"])
def test_our_own_round_trip(method: str, tied: bool, tmp_path: Path) -> None:
    """Every method, several streams, an activation where it has one, and a position rule without a pyreft name."""
    info = outline_base(BASE).info
    activation = "silu" if method in ("loreft", "direft") else ""
    positions = "prompt" if tied else "f3+l1"
    adapter = tiny.random_adapter(
        info, method=method, tied=tied, positions=positions, activation=activation, layers=(0, 3), stream="mlp_output"
    )
    save_adapter(adapter, tmp_path / "mine")
    result = export_to_pyreft(str(BASE), tmp_path / "mine", tmp_path / "back", report=lambda _: None)
    assert result.interventions == (2 if tied else 4) and "share_weights" in result.notes[0]
    assert any("no name for positions prompt" in note for note in result.notes) == tied
    assert ("rounds learned sources" in result.notes[-1]) == (method in ("loreft", "consreft", "lobireft"))
    import_adapter(tmp_path / "back", str(BASE), tmp_path / "again", Request(), report=lambda _: None)
    same(tmp_path / "mine", tmp_path / "again")


def test_an_adapter_of_adapterhubs_comes_back(imported: dict[str, Path], tmp_path: Path) -> None:
    """Positions that a short prompt does not cut, and a dropout: the side file holds both."""
    source = imported["adapterhub-aa_loreft_tied_p2s2"]
    dropped = replace(load_adapter(source), dropout=0.25)
    assert not dropped.positions.truncate
    save_adapter(dropped, tmp_path / "mine")
    export_to_pyreft(str(BASE), tmp_path / "mine", tmp_path / "back", report=lambda _: None)
    import_adapter(tmp_path / "back", str(BASE), tmp_path / "again", Request(positions="f2+l2"), report=lambda _: None)
    same(tmp_path / "mine", tmp_path / "again")
    side = json.loads((tmp_path / "back" / "reft_export.json").read_text())
    for key, value in (("truncate", 0), ("dropout", "0.1"), ("dropout", 2), ("dropout", True)):
        (tmp_path / "back" / "reft_export.json").write_text(json.dumps(side | {key: value}))
        with pytest.raises(AdapterError, match=f"reft_export.json: {key} is .*, expected"):
            import_adapter(tmp_path / "back", str(BASE), tmp_path / "no", Request(), report=lambda _: None)


def test_red_is_refused(tmp_path: Path) -> None:
    save_adapter(tiny.random_adapter(outline_base(BASE).info, method="red"), tmp_path / "mine")
    with pytest.raises(AdapterError, match=r"pyreft has no intervention for red \(scale and bias\)"):
        export_to_pyreft(str(BASE), tmp_path / "mine", tmp_path / "back", report=lambda _: None)
    assert not (tmp_path / "back").exists()


def test_imported_forms_that_pyreft_cannot_express_say_so(imported: dict[str, Path], tmp_path: Path) -> None:
    hub = export_to_pyreft(str(BASE), imported["adapterhub-aa_loreft_tied_p2s2"], tmp_path / "hub", report=lambda _: None)
    assert any("half of a short prompt" in note for note in hub.notes)
    for name in ("mixed_forms", "loreft_two_a_site"):
        result = export_to_pyreft(str(BASE), imported[f"pyreft-generated-{name}"], tmp_path / name, report=lambda _: None)
        assert "NodireftIntervention" in result.kinds


def test_refusals(base: Base, imported: dict[str, Path], tmp_path: Path) -> None:
    quiet = {"report": lambda _: None}
    source = imported["pyreft-generated-consreft"]
    other = tiny.save_base(tmp_path / "other")
    with pytest.raises(AdapterError, match="was trained on base-llama-tiny .fingerprint.*this base is other"):
        export_to_pyreft(str(other), source, tmp_path / "out", **quiet)
    export_to_pyreft(str(BASE), source, tmp_path / "out", **quiet)
    before = sorted((tmp_path / "out").iterdir())
    with pytest.raises(InputError, match="--force"):
        export_to_pyreft(str(BASE), source, tmp_path / "out", **quiet)
    export_to_pyreft(str(BASE), source, tmp_path / "out", force=True, **quiet)
    assert sorted((tmp_path / "out").iterdir()) == before
    with pytest.raises(InputError, match="--positions l1 contradicts .*reft_export.json"):
        import_adapter(tmp_path / "out", str(BASE), tmp_path / "again", Request(positions="l1"), **quiet)
    adapter = load_adapter(source)
    adapter.tensors["1.block_output.R"][0] *= 2
    save_adapter(adapter, tmp_path / "skewed")
    with pytest.raises(AdapterError, match="R of this consreft is not orthonormal"):
        export_to_pyreft(str(BASE), tmp_path / "skewed", tmp_path / "no", **quiet)
    assert not (tmp_path / "no").exists()
