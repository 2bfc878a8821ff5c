"""Adapters whose layers have edits of their own, end to end: eager PyTorch against the exported bundle, in a batch, and every place where
an adapter goes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rounding
import tiny
from models.adapters import mixed_adapter
from reseal import reseal
from shared_folders import shared_folder
from typer.testing import CliRunner

import runtimes.session as session_inputs
from reft_export.base.load import load_base
from reft_export.building.plan import plan_build
from reft_export.building.settings import BuildSettings
from reft_export.cli.inspect import inspect_adapter, inspect_bundle
from reft_export.cli.main import app
from reft_export.composing.compose import compose
from reft_export.exporting.assemble import not_in_engines
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.importing.foreign import Request
from reft_export.importing.importer import import_adapter
from reft_export.importing.pyreft.write import export_to_pyreft
from reft_export.training.edits import LayerEdits, forms_of_edits, rules_of_edits
from runtimes.artifacts.bundle import open_bundle
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter, write_onnx_adapter
from runtimes.bank import AdapterBank
from runtimes.edits.adapter import Adapter, BaseModel, load_adapter, save_adapter
from runtimes.edits.edit import Site
from runtimes.edits.form import EditForm
from runtimes.edits.positions import PositionRule
from runtimes.errors import AdapterError, BundleError, EngineError
from runtimes.files.hashes import sha256_of
from runtimes.golden import check_golden
from runtimes.ort.session import OrtSession
from runtimes.rows import AdapterRows

QUIET: dict[str, Any] = {"report": lambda _: None}
EXPLICIT = {
    "rules": (["0: loreft r2 f1", "1: direft r3 gelu all mlp_output", "2: red f2+l2"], {"positions": "f2+l2", "tied": False, "seed": 3}),
    "chosen": (["0-2: loreft r2"], {"positions": "1,3,-2", "seed": 4}),
    "marked": (["0: loreft r2 marked", "1: red l1"], {"seed": 6}),
    "every": (["0: red", "2: noreft r2 prompt"], {"positions": "every3", "seed": 5}),
}
"""Whose slots no graph computes."""
MIXED = {
    "ranks": (["0: loreft r2", "2: loreft r7"], {"positions": "f2+l2"}),
    "methods": (["0: red", "1: direft r3", "2: noreft r2 gelu"], {"positions": "f1+l3", "tied": False, "seed": 1}),
    "streams": (["0-1: direft r1 tanh mlp_output", "1: red attention_output", "2: loreft r4", "2: lobireft r2 block_input"],
                {"positions": "all", "seed": 2}),
}  # fmt: skip
"""(edits, the adapter's one rule)"""
RECIPES = MIXED | EXPLICIT


def forms(edits: list[str]) -> dict[Site, EditForm]:
    return forms_of_edits([LayerEdits.parse(each) for each in edits], tiny.LAYERS)


def made(info: BaseModel, edits: list[str], *, positions: str = "f2+l2", **rest: Any) -> Adapter:
    rules = rules_of_edits([LayerEdits.parse(each) for each in edits], tiny.LAYERS, PositionRule.parse(positions))
    return mixed_adapter(info, forms(edits), positions=positions, rules=rules, **rest)


@pytest.fixture(scope="module")
def adapters(base_folder) -> dict[str, Adapter]:
    info = load_base(base_folder()).info
    return {name: made(info, edits, **rest) for name, (edits, rest) in RECIPES.items()}


@pytest.fixture(scope="module")
def bundle_of_recipes(base_folder, adapters, tmp_path_factory) -> Path:
    def make(output: Path) -> None:
        folders = [tmp_path_factory.mktemp("recipes") / name for name in adapters]
        for folder in folders:
            save_adapter(adapters[folder.name], folder)
        export_bundle(str(base_folder()), folders, output, ExportSettings(), **QUIET)

    return shared_folder("bundles/layer-edits", make)


def test_eager_against_the_bundle(bundle_of_recipes) -> None:
    """Prefill and decode, chunks, padding on both sides, greedy tokens, at the budget of fp32."""
    bundle = open_bundle(bundle_of_recipes)
    report = check_golden(bundle, OrtSession(bundle, threads=1))
    assert report.passed and {r.budget.logits for r in report.rungs} == {2e-5}
    assert [r.figures.greedy_equal for r in report.rungs if r.figures.greedy_equal is not None] == [True] * (1 + len(RECIPES))
    cosines = [r.delta.cosine for r in report.rungs if r.delta is not None]
    assert cosines and min(cosines) > 0.99999
    base = bundle.golden("base")["logits"]
    assert all(np.abs(bundle.golden(name)["logits"] - base).max() > 0.1 for name in RECIPES)
    kinds = {(n.layer, n.stream, n.op, n.activation) for n in bundle.manifest.nodes}
    assert {(2, "block_output", "LoReFT", "gelu"), (1, "attention_output", "RED", ""), (0, "mlp_output", "LoReFT", "tanh")} <= kinds
    assert bundle.manifest.genai == "supported"
    ranks = read_onnx_adapter(bundle.adapter("ranks").file)
    assert [ranks[f"reft.{layer}.block_output.A"].shape[1] for layer in (0, 2)] == [2, 7], "each node has the rank of its layer"
    rows = {row["name"]: (row["method"], row["rank"]) for row in inspect_bundle(bundle_of_recipes)["adapters"]}
    assert rows["ranks"] == ("loreft", "2 to 7") and rows["methods"] == ("red + direft + noreft", "2 to 3")


def test_rows_of_a_batch(bundle_of_recipes) -> None:
    """Each as alone with its own adapter."""
    bundle = open_bundle(bundle_of_recipes)
    names = ["methods", None, "rules", "ranks", "every", "methods", "chosen", "streams"]
    ids = np.random.default_rng(0).integers(0, 250, (len(names), 7))
    mask = np.ones_like(ids)
    with OrtSession(bundle, threads=1) as session, AdapterRows(AdapterBank(bundle), names) as rows:
        session.set_rows(rows)
        mixed = session.step(ids, mask).logits
    for row, name in enumerate(names):
        with OrtSession(bundle, threads=1, adapter=name) as session:
            alone = session.step(ids[row : row + 1], mask[row : row + 1]).logits[0]
        np.testing.assert_allclose(mixed[row], alone, rtol=0, atol=2e-5 * np.abs(alone).max(), err_msg=str(name))
    assert rounding.distance(mixed[0], mixed[5]) > 1e-3, "other prompts have other logits"


@pytest.mark.parametrize("fault", ["a layer has another one's edit", "a layer keeps its streams as they are"])
def test_a_planted_fault_is_seen(fault: str, bundle_of_recipes, tmp_path) -> None:
    folder = Path(shutil.copytree(bundle_of_recipes, tmp_path / "b"))
    file = folder / "adapters" / "streams.onnx_adapter"
    banks = dict(read_onnx_adapter(file))
    if fault.startswith("a layer has"):
        for bank in "UAb":
            one, other = (f"reft.{layer}.mlp_output.tanh.{bank}" for layer in (0, 1))
            banks[one], banks[other] = banks[other], banks[one]
    else:
        banks["reft.1.attention_output.red.scale"] = np.ones_like(banks["reft.1.attention_output.red.scale"])
    write_onnx_adapter(file, banks)
    seal = {"sha256": sha256_of(file), "size": file.stat().st_size}
    reseal(folder, lambda manifest: manifest["files"].update({f"adapters/{file.name}": seal}))
    bundle = open_bundle(folder)
    assert not check_golden(bundle, OrtSession(bundle, threads=1)).passed


def test_slots_of_several_rules(bundle_of_recipes, tmp_path) -> None:
    bundle = open_bundle(bundle_of_recipes)
    suffixes = {name: bundle.adapter(name).file.suffix for name in RECIPES}
    assert suffixes == {name: ".banks" if name in EXPLICIT else ".onnx_adapter" for name in RECIPES}
    banks = read_onnx_adapter(bundle.adapter("rules").file)
    # Sets of f1, all, f2+l2 of two groups: with `all` in every one, 2 * 3.
    assert {node.name: len(banks[node.bank_names[0]]) for node in bundle.nodes if len(banks[node.bank_names[0]]) > 1} == {
        "reft.0.block_output": 6, "reft.1.mlp_output.gelu": 6, "reft.2.block_output.red": 6,
    }  # fmt: skip
    folder = Path(shutil.copytree(bundle_of_recipes, tmp_path / "b"))
    shutil.copyfile(folder / "adapters" / "rules.banks", folder / "adapters" / "ranks.banks")
    with pytest.raises(BundleError, match="ranks.banks is not listed"):
        open_bundle(folder)
    listed, other = "adapters/ranks.onnx_adapter", "adapters/ranks.banks"
    (folder / listed).rename(folder / other)
    reseal(folder, lambda manifest: manifest["files"].update({other: manifest["files"].pop(listed)}))
    with pytest.raises(BundleError, match=r"lists no adapters/ranks.onnx_adapter, where the banks of an adapter that edits at"):
        AdapterBank(open_bundle(folder)).load("ranks")
    with pytest.raises(EngineError, match="adapter rules edits at f1; all; f2.l2, which no engine computes"):
        plan_build(bundle_of_recipes, BuildSettings(target="tensorrt"))


def test_where_several_rules_do_not_go(adapters, base_folder, tmp_path) -> None:
    for name in ("rules", "ranks"):
        save_adapter(adapters[name], tmp_path / name)
    with pytest.raises(AdapterError, match="rules edits at several rules of positions .f1; all; f2.l2.; compose adapters of one"):
        compose({name: adapters[name] for name in ("ranks", "rules")}, {})
    with pytest.raises(AdapterError, match="pyreft has one rule of positions, and this adapter has f1; all; f2.l2"):
        export_to_pyreft(str(base_folder()), tmp_path / "rules", tmp_path / "p", **QUIET)
    named = {name: adapters[name] for name in ("rules", "ranks")}
    assert not_in_engines(named) == "no engine computes the positions of rules, and build refuses a bundle with it"
    shown = inspect_adapter(tmp_path / "rules")
    assert shown["positions"] == "f1; all; f2+l2" and "no .onnx_adapter" in shown["explicit"]
    assert shown["sites"][1] == "1.mlp_output: direft, rank 3, gelu, all"
    assert "explicit" not in inspect_adapter(tmp_path / "ranks")


def test_a_planted_fault_in_the_slots_is_seen(bundle_of_recipes, monkeypatch) -> None:
    """One slot further on: another set of the rules."""
    bundle = open_bundle(bundle_of_recipes)
    plain = session_inputs.slots
    monkeypatch.setattr(session_inputs, "slots", lambda *a, **k: np.where((s := plain(*a, **k)) == 1, 2, s).astype(np.int32))
    report = check_golden(bundle, OrtSession(bundle, threads=1))
    assert {rung.name.partition(":")[0] for rung in report.rungs if not rung.passed} == {"rules", "marked"}, "no other has that slot"


def test_a_folder_holds_each_layers_form(adapters, tmp_path) -> None:
    for name, adapter in adapters.items():
        save_adapter(adapter, tmp_path / name)
        again = load_adapter(tmp_path / name)
        assert (again.site_forms, again.site_rules, again.where) == (adapter.site_forms, adapter.site_rules, adapter.where)
        assert again.digest == adapter.digest and again.tied == adapter.tied
    stored = json.loads((tmp_path / "methods" / "adapter.json").read_text())
    assert stored["format_version"] == 2
    assert [(s["form"], s["rank"]) for s in stored["sites"]] == [(None, None), ("direft", 3), ("noreft gelu", 2)]
    with pytest.raises(AdapterError, match=r"2.block_output.R has shape \[7, 64\], expected \[2, 64\]"):
        replace(adapters["ranks"], forms={})
    with pytest.raises(AdapterError, match="a form is given for 1.block_output, which the adapter does not edit"):
        replace(adapters["ranks"], forms={Site(layer=1): EditForm(method="red", rank=0)})
    shown = inspect_adapter(tmp_path / "methods")
    assert shown["sites"][1:] == ["1.block_output: direft, rank 3", "2.block_output: noreft, rank 2, gelu"]
    assert shown["activation"] == "none + gelu"
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "streams")])
    assert done.exit_code == 0 and "1.attention_output: red" in done.stdout


def test_to_pyreft_and_back(base_folder, tmp_path) -> None:
    """Classes and ranks of their own come back; one act_fn is all that pyreft has."""
    info = load_base(base_folder()).info
    adapter = mixed_adapter(info, forms(["0: loreft r2", "1: direft r3", "2: noreft r2"]), positions="f2+l2")
    save_adapter(adapter, tmp_path / "a")
    done = export_to_pyreft(str(base_folder()), tmp_path / "a", tmp_path / "p", **QUIET)
    assert done.kinds == ("LoreftIntervention", "NodireftIntervention", "NoreftIntervention")
    again = import_adapter(tmp_path / "p", str(base_folder()), tmp_path / "back", Request(), **QUIET).adapter
    assert again.site_forms == adapter.site_forms
    assert all(np.array_equal(value, again.tensors[name]) for name, value in adapter.tensors.items())
    gelu = mixed_adapter(info, forms(["0: loreft r2", "1: loreft r2 gelu"]))
    save_adapter(gelu, tmp_path / "gelu")
    with pytest.raises(AdapterError, match="pyreft has one act_fn, and sites of this adapter have none and gelu"):
        export_to_pyreft(str(base_folder()), tmp_path / "gelu", tmp_path / "no", **QUIET)


def test_the_verb(base_folder, tmp_path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"what is {i}?", "completion": " ok"}) + "\n" for i in range(4)))
    (tmp_path / "r.json").write_text(json.dumps({"edits": [{"layers": "0", "rank": 2}, {"layers": "2", "method": "red"}]}))

    def run(output: str, *options: str, positions: str = "l2"):
        common = ["-m", str(base_folder()), "-d", str(data), "-o", str(tmp_path / output), "--max-steps", "2", "--samples", "0"]
        return CliRunner().invoke(app, ["train", *common, "--positions", positions, *options])

    done = run("a", "--edit", "0: loreft r2", "--edit", "2: red")
    assert done.exit_code == 0, done.output
    assert "a: loreft, rank 2 at 1 site; red at 1 site, 2 sites" in done.stdout.replace("\n", "")
    assert run("b", "--recipe", str(tmp_path / "r.json")).exit_code == 0
    one, other = (load_adapter(tmp_path / name) for name in "ab")
    assert one.digest == other.digest and one.training == other.training
    more = run("c", "--start", str(tmp_path / "a"))
    assert more.exit_code == 0 and load_adapter(tmp_path / "c").site_forms == one.site_forms, more.output
    shown = run("d", "--edit", "0: loreft r2", "--edit", "1: red all", "--dry-run")
    assert shown.exit_code == 0 and "train 0: loreft r2; 1: red all, positions l2; all, " in " ".join(shown.stdout.split()), shown.output
    numbers = run("n", "--layers", "0", positions="-2")
    assert numbers.exit_code == 0 and str(load_adapter(tmp_path / "n").where) == "-2", numbers.output
    for options, message in (
        (("--edit", "0: red", "--rank", "4"), "--rank is of one edit for all layers, and --edit says each layer's own"),
        (("--edit", "0: red", "--stream", "mlp_output"), "--stream is of one edit"),
        (("--edit", "0: red", "--recipe", str(tmp_path / "r.json")), "--edit and --recipe both say"),
        (("--recipe", str(tmp_path / "r.json"), "--method", "loreft"), "and --recipe says each layer's own"),
        (("--edit", "0: loreft r3", "--start", str(tmp_path / "a")), "cannot start from this adapter: its form is"),
        (("--stream", "mlp_output", "--start", str(tmp_path / "a")), "--stream is of one edit for all layers, and those of --start"),
    ):
        refused = run("no", *options)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split()), refused.output
        assert not (tmp_path / "no").exists()
