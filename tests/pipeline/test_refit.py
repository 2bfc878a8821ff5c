"""Refit on the weights that ship, and adapters swapped into a quantized bundle whose graph keeps its bytes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from reseal import reseal

from graph_passes.external import load_graph
from reft_export.base.dequantized import activations_quantized, load_dequantized
from reft_export.base.load import load_base
from reft_export.cli.inspect import inspect_adapter, inspect_bundle
from reft_export.parity.ladder import host_ladder
from reft_export.quantizing.quantize import quantize_bundle
from reft_export.quantizing.refit import adapter_loss, load_on_bundle, plan_refit, read_examples, refit_adapters
from reft_export.quantizing.settings import RefitSettings
from reft_export.quantizing.swap import swap_bundle
from reft_export.training.settings import TrainSettings, settings_like
from reft_export.training.trainer import train
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.edits.edit import Site
from runtimes.errors import AdapterError, BundleError, CalibrationError, InputError, ParityError
from runtimes.files.hashes import sha256_of
from runtimes.ort.session import OrtSession

QUIET = {"report": lambda _: None}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Prompts and answers of different lengths, more than a batch."""
    path = tmp_path_factory.mktemp("data") / "refit.jsonl"
    lines = [{"prompt": f"what is {'very ' * (i % 3)}{i}?", "completion": " ok" * (1 + i % 4)} for i in range(12)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Said(list):
    """A report that hears every count, too."""

    def __call__(self, stage: str) -> None:
        self.append((stage,))

    def update(self, text: str, done: int, total: int) -> None:
        self.append((text.partition(",")[0], done, total))


@pytest.fixture(scope="module")
def said() -> Said:
    return Said()


@pytest.fixture(scope="module")
def refitted(bundle_folder, base_folder, adapter_folders, data, tmp_path_factory, said) -> tuple[Path, Path, object]:
    """(int4 bundle, the same with two of its adapters refitted, the result)."""
    source, output = bundle_folder("llama", "int4"), tmp_path_factory.mktemp("refit") / "again"
    settings = RefitSettings(data=data, sources=tuple(adapter_folders("llama", ("tied", "untied"))), steps=20)
    return source, output, swap_bundle(source, str(base_folder("llama")), output, refit=settings, report=said)


@pytest.mark.parametrize("objective", ["teacher", "data"])
@pytest.mark.parametrize("name", ["tied", "untied", "prompt-relu", "first-noreft", "last-consreft"])
def test_refit_improves_on_the_shipped_weights(objective, name, bundle_folder, base_folder, adapter_folders, data, tmp_path) -> None:
    """Measured by eager PyTorch with the dequantized weights, set up here by hand. A refit on float weights would leave the teacher's loss
    where it is: there it starts at zero."""
    bundle, model = open_bundle(bundle_folder("llama", "int4")), str(base_folder("llama"))
    source = adapter_folders("llama", (name,))[0]
    plan = plan_refit(bundle, model, RefitSettings(data=data, sources=(source,), objective=objective), tmp_path / "o", force=False)
    done = refit_adapters(bundle, model, plan, lambda _: None)[name]
    assert not done.figures.kept and done.adapter.trained_on == bundle.digest
    base, teacher = load_base(model), load_base(model).model if objective == "teacher" else None
    original = load_adapter(source)
    assert done.adapter.base == original.base and done.adapter.positions == original.positions
    graph, examples = load_graph(bundle.graph_path), read_examples(base, data)
    load_dequantized(base.model, graph, bundle.manifest.weights)
    with activations_quantized(base.model, graph, bundle.manifest.weights):
        lesson = None if teacher is None else (teacher, original)
        before, after = (adapter_loss(base, a, examples, teacher=lesson) for a in (original, done.adapter))
    assert (before, after) == pytest.approx((done.figures.before, done.figures.after), rel=1e-3)
    assert after < 0.98 * before and before > 1e-3


def test_every_step_of_a_refit_is_counted(refitted, said) -> None:
    steps = [("refitting tied", step, 20) for step in range(1, 21)]
    assert said[said.index(("refitting tied, 20 steps",)) :][1:21] == steps


def test_only_the_adapters_and_their_golden_arrays_change(refitted) -> None:
    source, output, _ = refitted
    old, new = (open_bundle(folder, verify=True) for folder in (source, output))
    assert old.digest == new.digest and old.adapter_names == new.adapter_names
    changed = {name for name, file in new.manifest.files.items() if old.manifest.files.get(name) != file}
    assert set(old.manifest.files) == set(new.manifest.files)
    expected = {f"{place}/{name}.{end}" for name in ("tied", "untied") for place, end in (("adapters", "onnx_adapter"), ("golden", "npz"))}
    assert changed == expected | {"adapters/tied.json", "adapters/untied.json"}
    assert replace(old.manifest, files={}, digest="") == replace(new.manifest, files={}, digest="")


def test_new_adapter_in_a_session_over_the_old_graph(refitted, tmp_path) -> None:
    """One file of the new bundle in the old one: the session says what the new bundle says, bit for bit; others are as before."""
    source, output, _ = refitted
    mixed = Path(shutil.copytree(source, tmp_path / "mixed"))
    shutil.copyfile(output / "adapters" / "tied.onnx_adapter", mixed / "adapters" / "tied.onnx_adapter")
    file = mixed / "adapters" / "tied.onnx_adapter"
    seal = {"sha256": sha256_of(file), "size": file.stat().st_size}
    reseal(mixed, lambda manifest: manifest["files"].update({"adapters/tied.onnx_adapter": seal}))
    ids = np.arange(12)[None] + 60

    def says(folder: Path, adapter: str | None) -> np.ndarray:
        session = OrtSession(open_bundle(folder), adapter=adapter)
        return session.step(ids, np.ones_like(ids)).logits

    assert np.array_equal(says(mixed, "tied"), says(output, "tied"))
    assert not np.array_equal(says(mixed, "tied"), says(source, "tied"))
    for same in ("untied", "prompt-relu", None):
        assert np.array_equal(says(mixed, same), says(source, same))


def test_provenance(refitted, adapter_folders) -> None:
    source, output, result = refitted
    digest = open_bundle(source).digest
    assert set(result.refitted) == {"tied", "untied"} and result.refitted["tied"] == output.with_name("again.adapters") / "tied"
    for name, folder in result.refitted.items():
        adapter, original = load_adapter(folder), load_adapter(adapter_folders("llama", (name,))[0])
        assert adapter.trained_on == digest and adapter.base == original.base
        assert adapter.training["start"] == original.digest and adapter.training["objective"] == "teacher"
        assert inspect_adapter(folder)["trained on"] == digest
    rows = {row["name"]: row["trained on"] for row in inspect_bundle(output)["adapters"]}
    assert rows["tied"] == rows["untied"] == digest[:12] and rows["prompt-relu"] == "the base"


def test_golden_arrays_are_the_new_adapters_and_the_aim_is_the_old_ones(refitted, base_folder) -> None:
    """What the bundle says changes; what delta parity is held to does not, on the device and when eager PyTorch runs again."""
    source, output, result = refitted
    old, new = open_bundle(source), open_bundle(output)
    for name in ("tied", "untied"):
        before, after = old.golden(name), new.golden(name)
        assert np.array_equal(before["fp32_logits"], after["fp32_logits"])
        assert np.abs(before["logits"] - after["logits"]).max() > 1e-3
    assert result.parity.passed
    ladder = host_ladder(new, str(base_folder("llama")), report=lambda _: None)
    ladder.require()
    shipped = {r.name.partition(": ")[0]: r.delta.cosine for r in result.parity.rungs if r.delta is not None}
    again = {r.name.partition(": ")[0]: r.delta.cosine for r in ladder.rungs if r.delta is not None}
    assert shipped["int4 level 4, tied"] == pytest.approx(again["int4 level 4, tied"], abs=1e-4)


def test_stale_golden_arrays_are_seen(bundle_folder, base_folder, adapter_folders, data, tmp_path, monkeypatch) -> None:
    """Planted: the bundle gets the new adapter, and keeps the golden arrays of the old one."""
    from reft_export.adding import held as module

    monkeypatch.setattr(module, "shutil", SimpleNamespace(copyfile=_except_golden(module.shutil.copyfile)))
    settings = RefitSettings(data=data, sources=tuple(adapter_folders("llama", ("tied",))), steps=40, lr=5e-3)
    with pytest.raises(ParityError, match=r"int4 level 1, tied: .* against eager: relative logit error"):
        swap_bundle(bundle_folder("llama", "int4"), str(base_folder("llama")), tmp_path / "o", refit=settings, **QUIET)
    assert not (tmp_path / "o").exists() and not (tmp_path / "o.adapters").exists()


def _except_golden(copyfile):
    def copy(source, destination):
        if Path(destination).name == "tied.npz" and Path(destination).exists():
            return destination
        return copyfile(source, destination)

    return copy


def test_an_adapter_under_another_ones_name_is_refused(bundle_folder, base_folder, adapter_folders, data, tmp_path) -> None:
    folder = Path(shutil.copytree(adapter_folders("llama", ("untied",))[0], tmp_path / "tied"))
    with pytest.raises(AdapterError, match="adapter tied: its folder does not fold to the banks"):
        swap_bundle(
            bundle_folder("llama", "int4"),
            str(base_folder("llama")),
            tmp_path / "o",
            refit=RefitSettings(data=data, sources=(folder,)),
            **QUIET,
        )


@pytest.mark.slow
def test_refit_while_quantizing_and_again_from_the_original(bundle_folder, base_folder, adapter_folders, data, tmp_path) -> None:
    """The bundle of quantize --refit; a second refit starts from the same original, not from its own result."""
    from calibration.settings import settings_for

    model, sources = str(base_folder("llama")), tuple(adapter_folders("llama", ("tied",)))
    settings = RefitSettings(data=data, sources=sources, steps=10, output=tmp_path / "kept")
    plain = quantize_bundle(bundle_folder("llama"), model, tmp_path / "plain", settings_for("weight-only", 4), **QUIET)
    both = quantize_bundle(bundle_folder("llama"), model, tmp_path / "q", settings_for("weight-only", 4), refit=settings, **QUIET)
    assert open_bundle(tmp_path / "plain").digest == open_bundle(tmp_path / "q").digest
    assert [v.name for v in plain.report.variants] == ["int4"] and [v.name for v in both.report.variants] == ["int4", "int4 + refit"]
    assert both.report.variants[0] == plain.report.variants[0]
    assert both.refitted == {"tied": tmp_path / "kept" / "tied"}
    again = swap_bundle(tmp_path / "q", model, tmp_path / "again", refit=replace(settings, output=tmp_path / "other"), **QUIET)
    assert np.array_equal(open_bundle(tmp_path / "again").golden("tied")["logits"], open_bundle(tmp_path / "q").golden("tied")["logits"])
    assert again.report.refits[0] == both.report.refits[0]
    with pytest.raises(AdapterError, match=r"so the float model steered by it is no teacher; pass the adapter it was refitted from"):
        swap_bundle(tmp_path / "q", model, tmp_path / "no", refit=replace(settings, sources=(tmp_path / "kept" / "tied",)), **QUIET)


def test_a_refit_that_does_not_help_is_thrown_away(bundle_folder, base_folder, adapter_folders, data, tmp_path) -> None:
    settings = RefitSettings(data=data, sources=tuple(adapter_folders("llama", ("tied",))), steps=2, lr=3.0)
    source = bundle_folder("llama", "int4")
    result = swap_bundle(source, str(base_folder("llama")), tmp_path / "o", refit=settings, **QUIET)
    assert result.report.refits[0].kept and result.refitted == {} and not (tmp_path / "o.adapters").exists()
    assert open_bundle(tmp_path / "o").manifest == open_bundle(source).manifest


def test_train_on_a_bundle_and_put_the_adapter_in(bundle_folder, base_folder, data, tmp_path) -> None:
    source, model = open_bundle(bundle_folder("llama", "int4")), str(base_folder("llama"))
    base = load_on_bundle(source, model)
    linear = base.model.get_submodule("model.layers.1.mlp.up_proj").weight
    assert not torch.equal(linear, load_base(model).model.get_submodule("model.layers.1.mlp.up_proj").weight)
    settings = TrainSettings(rank=2, layers="0;2", positions="f2+l2", max_steps=4, samples=0, tied=False)
    train(base, data, settings, tmp_path / "fresh", trained_on=source.digest)
    adapter = load_adapter(tmp_path / "fresh")
    assert adapter.trained_on == source.digest and adapter.base == load_base(model).info
    swap_bundle(source.folder, model, tmp_path / "o", adapters=[tmp_path / "fresh"], **QUIET)
    assert open_bundle(tmp_path / "o").adapter_names == (*source.adapter_names, "fresh")
    assert open_bundle(tmp_path / "o").digest == source.digest
    elsewhere = replace(adapter, trained_on="0" * 64)
    save_adapter(elsewhere, tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match="train it on this one with --base"):
        swap_bundle(source.folder, model, tmp_path / "p", adapters=[tmp_path / "elsewhere"], **QUIET)
    other_site = tiny.random_adapter(load_base(model).info, layers=(1,))
    save_adapter(other_site, tmp_path / "site")
    with pytest.raises(AdapterError, match=r"the graph of .* has no edit node reft\.1\.block_output, which adapter site needs"):
        swap_bundle(source.folder, model, tmp_path / "p", adapters=[tmp_path / "site"], **QUIET)


def test_refusals(bundle_folder, base_folder, adapter_folders, data, tmp_path) -> None:
    quantized, model, tied = bundle_folder("llama", "int4"), str(base_folder("llama")), tuple(adapter_folders("llama", ("tied",)))
    settings = RefitSettings(data=data, sources=tied)

    def refused(kind, match, source=quantized, base=model, **changes) -> None:
        with pytest.raises(kind, match=match):
            swap_bundle(source, base, tmp_path / "o", refit=replace(settings, **changes), **QUIET)
        assert not (tmp_path / "o").exists() and not (tmp_path / "o.adapters").exists()

    refused(CalibrationError, "is a float bundle: adapters get into it with `reft-export add`", source=bundle_folder("llama"))
    refused(AdapterError, "pass the base it was made from", base=str(base_folder("qwen2")))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    refused(InputError, "empty.jsonl has no examples", data=empty)
    stranger = Path(shutil.copytree(tied[0], tmp_path / "stranger"))
    refused(BundleError, "has no adapter 'stranger'; it has: tied", sources=(stranger,))
    with pytest.raises(InputError, match=r"name the folders of those to refit with --adapter"):
        replace(settings, sources=())
    with pytest.raises(InputError, match="--refit-objective 'both' is unknown"):
        replace(settings, objective="both")
    with pytest.raises(InputError, match="at least one step"):
        replace(settings, steps=0)
    with pytest.raises(CalibrationError, match="train without --base, or quantize the bundle first"):
        load_on_bundle(open_bundle(bundle_folder("llama")), model)
    with pytest.raises(AdapterError, match="pass the base it was made from"):
        load_on_bundle(open_bundle(quantized), str(base_folder("qwen2")))


def test_settings_of_a_started_adapter(base_folder) -> None:
    info = load_base(base_folder("llama")).info
    adapter = tiny.random_adapter(info, method="direft", activation="gelu", tied=False, positions="f1+l3", layers=(0, 2), rank=3)
    settings = settings_like(adapter, max_steps=5)
    assert (settings.method, settings.activation, settings.tied, settings.rank, settings.max_steps) == ("direft", "gelu", False, 3, 5)
    assert settings.sites(3) == adapter.sites and settings.forms(3) == adapter.site_forms and settings.rule == adapter.positions
    tensors = {k.replace("2.block_output", "2.mlp_output"): v for k, v in adapter.tensors.items()}
    sites = (adapter.sites[0], Site(layer=2, stream="mlp_output"))
    uneven = replace(adapter, sites=sites, tensors=tensors)
    assert settings_like(uneven).forms(3) == uneven.site_forms
