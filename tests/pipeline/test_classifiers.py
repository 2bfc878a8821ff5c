"""Encoder classifiers from base to device: every layout and stream, heads that swap with their adapters, quantization, refusals."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rounding
import tiny
import tiny_encoders
import torch
from shared_folders import shared_folder
from tiers import slow_and_long
from typer.testing import CliRunner

from calibration.settings import settings_for
from graph_passes.external import load_graph, write_graph
from graph_passes.unfold import unfold_graph
from reft_export.adding.add import add_adapter
from reft_export.base.load import load_base
from reft_export.cli.main import app
from reft_export.eager.steering import steered
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.parity.ladder import stored_inputs
from reft_export.quantizing.quantize import quantize_bundle
from reft_export.quantizing.settings import CalibrationRequest
from reft_export.tasks.classification import model_inputs
from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter, write_onnx_adapter
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.edits.edit import ACTIVATIONS
from runtimes.errors import AdapterError, BackendUnavailable, InputError, ParityError
from runtimes.golden import check_golden
from runtimes.open import open_bank
from runtimes.ort.classifier import OrtClassifier

ADAPTERS = {
    "untied": {"tied": False, "positions": "f1+l3", "seed": 1},
    "attention-gelu": {"positions": "prompt", "activation": "gelu", "stream": "attention_output", "seed": 2},
    "mlp": {"positions": "f3+l3", "stream": "mlp_output", "seed": 3},
    "input-direft": {"positions": "l2", "method": "direft", "stream": "block_input", "seed": 4},
}
"""Every stream, tied and untied, with and without activation."""
HEADLESS = ("mlp",)


def quiet(_: str) -> None:
    pass


def write_adapters(base_folder: Path, root: Path, adapters: dict[str, dict]) -> list[Path]:
    base = load_base(base_folder)
    for seed, (name, form) in enumerate(adapters.items()):
        adapter = tiny.random_adapter(base.info, **form)
        head = {} if name in HEADLESS else tiny_encoders.random_head(base.model, seed)
        save_adapter(replace(adapter, head=head), root / name)
    return [root / name for name in adapters]


@pytest.fixture(scope="module")
def made() -> Callable[..., tuple[Bundle, Path, dict[str, Path]]]:
    """(bundle, base, adapter folders) by family; tests copy before they change anything."""

    @functools.cache
    def get(family: str = "roberta") -> tuple[Bundle, Path, dict[str, Path]]:
        def make(root: Path) -> None:
            base = tiny_encoders.save_base(root / "base", family)
            export_bundle(str(base), write_adapters(base, root / "adapters", ADAPTERS), root / "bundle", ExportSettings(), report=quiet)

        root = shared_folder(f"classifiers/{family}", make)
        return open_bundle(root / "bundle"), root / "base", {name: root / "adapters" / name for name in ADAPTERS}

    return get


def session_logits(bundle: Bundle, name: str | None) -> np.ndarray:
    inputs = stored_inputs(bundle)["base"]
    session = OrtClassifier(bundle, threads=1, adapter=name)
    return session.classify(inputs.input_ids, inputs.attention_mask, inputs.token_type_ids).logits


def test_manifest_says_what_it_is(made) -> None:
    bundle, base, _ = made()
    manifest = bundle.manifest
    assert (manifest.task, manifest.labels, manifest.padding) == ("text-classification", tiny_encoders.LABELS, "right")
    assert [t.name for t in manifest.inputs if not t.name.startswith("reft.")] == ["input_ids", "attention_mask"]
    assert manifest.outputs[0].shape[1] == len(tiny_encoders.LABELS)
    assert set(manifest.head) == {f"reft.head.classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("weight", "bias")}
    assert not set(manifest.head) & set(manifest.weights)
    assert manifest.model.context_length == tiny_encoders.POSITIONS - tiny_encoders.PAD - 1
    assert "decoder" in manifest.genai and not (bundle.folder / "genai_config.json").exists()


def test_every_way_to_feed_the_texts_is_exact(made) -> None:
    bundle, _, _ = made()
    report = check_golden(bundle, OrtClassifier(bundle, threads=1))
    assert {r.name for r in report.rungs} >= {"base: one batch", "untied: single texts", "mlp: more padding"}
    assert report.passed and all(r.figures.max_relative < 2e-5 for r in report.rungs)
    assert {r.name.partition(":")[0] for r in report.rungs if r.delta is not None} == set(ADAPTERS)


def test_an_adapter_swaps_its_head_too(made) -> None:
    bundle, base_folder, folders = made()
    base, inputs = load_base(base_folder), stored_inputs(bundle)["base"]
    plain = inputs.logits(base.model)
    scale = np.abs(plain).max()
    for name, folder in folders.items():
        adapter = load_adapter(folder)
        with steered(base.model, adapter):
            wanted = inputs.logits(base.model)
        with steered(base.model, replace(adapter, head={})):
            headless = inputs.logits(base.model)
        assert bool(adapter.head) == (np.abs(wanted - headless).max() > 1e-2 * scale)
        assert np.abs(session_logits(bundle, name) - wanted).max() <= 2e-5 * np.abs(wanted).max()
    assert np.array_equal(inputs.logits(base.model), plain), "the eager model got its own head back"


def test_rows_of_a_batch_share_a_head(made) -> None:
    with pytest.raises(InputError, match="is a classifier, whose adapters bring heads, and a batch has one; use set_adapter"):
        open_bank(made()[0])


def test_an_adapter_is_added_with_its_head(made, tmp_path) -> None:
    bundle, base_folder, folders = made()
    adapter, base = load_adapter(folders["untied"]), load_base(base_folder)
    save_adapter(replace(adapter, head=tiny_encoders.random_head(base.model, 9)), tmp_path / "late")
    for options in ({}, {"model": str(base_folder)}):
        result = add_adapter(bundle.folder, [tmp_path / "late"], output=tmp_path / "b", force=True, report=quiet, **options)
        assert result.parity is None or result.parity.passed
        added, inputs = open_bundle(tmp_path / "b"), stored_inputs(bundle)["base"]
        with steered(base.model, load_adapter(tmp_path / "late")):
            wanted = inputs.logits(base.model)
        assert np.abs(session_logits(added, "late") - wanted).max() <= 2e-5 * np.abs(wanted).max()
    assert result.parity is not None and added.manifest.not_held == ()
    other = {f"x.{name}": value for name, value in adapter.head.items()}
    save_adapter(replace(adapter, head=other), tmp_path / "other")
    with pytest.raises(AdapterError, match="a head of other parameters than .*, first classifier"):
        add_adapter(bundle.folder, [tmp_path / "other"], output=tmp_path / "c", report=quiet)


def test_without_an_adapter_the_bundle_is_the_base_again(made) -> None:
    bundle, _, _ = made()
    inputs = stored_inputs(bundle)["base"]
    session = OrtClassifier(bundle, threads=1)
    before = session.classify(inputs.input_ids, inputs.attention_mask, inputs.token_type_ids).logits
    session.set_adapter("untied")
    steered_ = session.classify(inputs.input_ids, inputs.attention_mask, inputs.token_type_ids).logits
    session.set_adapter(None)
    after = session.classify(inputs.input_ids, inputs.attention_mask, inputs.token_type_ids).logits
    assert np.array_equal(before, after) and np.abs(steered_ - before).max() > 1e-2


@pytest.mark.parametrize("fault", ["head", "bank"])
def test_a_planted_fault_fails_the_gate(made, tmp_path: Path, fault: str) -> None:
    bundle, _, _ = made()
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    path = folder / "adapters" / "untied.onnx_adapter"
    tensors = {name: value.copy() for name, value in read_onnx_adapter(path).items()}
    name = "reft.head.classifier.out_proj.bias" if fault == "head" else "reft.0.block_output.b"
    tensors[name] = tensors[name] + np.float32(1e-3)
    path.unlink()
    write_onnx_adapter(path, tensors)
    changed = Bundle(folder=folder, manifest=bundle.manifest)  # past the hashes, which would tell, too
    report = check_golden(changed, OrtClassifier(changed, threads=1))
    assert {r.name.partition(":")[0] for r in report.rungs if not r.passed} == {"untied"}
    with pytest.raises(ParityError, match="untied: one batch"):
        report.require()


def test_eager_steering_is_a_hand_written_hook(made) -> None:
    """y = h + R^T (W h + b - R h) on the first token by one edit and on the last three real ones by another, and the adapter's head."""
    _, base_folder, folders = made()
    base, adapter = load_base(base_folder), load_adapter(folders["untied"])
    ids = torch.tensor([[0, 40, 50, 60, 70, 80, 90, 2], [0, 41, 2, 1, 1, 1, 1, 1]])
    mask = (ids != tiny_encoders.PAD).long()
    hidden = []

    def hook(layer: int):
        def edit(module, arguments, output):
            h = output[0].clone() if isinstance(output, tuple) else output.clone()
            for row, length in enumerate(mask.sum(1).tolist()):
                last = range(length - min(3, length // 2), length)
                for column in [0, *last]:
                    key = f"{layer}.block_output.{'suffix' if column in last else 'prefix'}"
                    R, W, b = (torch.from_numpy(adapter.tensors[f"{key}.{p}"]) for p in "RWb")
                    h[row, column] += R.T @ (W @ h[row, column] + b - R @ h[row, column])
            hidden.append(h)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return edit

    with torch.no_grad():
        with steered(base.model, adapter):
            ours = base.model(input_ids=ids, attention_mask=mask).logits
        handles = [base.model.roberta.encoder.layer[i].register_forward_hook(hook(i)) for i in (0, tiny.LAYERS - 1)]
        base.model(input_ids=ids, attention_mask=mask)
        for handle in handles:
            handle.remove()
    head = {name: torch.from_numpy(value) for name, value in adapter.head.items()}
    x = torch.tanh(head["classifier.dense.weight"] @ hidden[-1][:, 0].T + head["classifier.dense.bias"][:, None])
    wanted = (head["classifier.out_proj.weight"] @ x).T + head["classifier.out_proj.bias"]
    rounding.check(ours, wanted, 2 * rounding.logits_of(base.model))


def test_int4_keeps_the_head_in_float(made, tmp_path: Path) -> None:
    bundle, base, _ = made()
    result = quantize_bundle(bundle.folder, str(base), tmp_path / "q", settings_for("weight-only", bits=4, block_size=32), report=quiet)
    assert result.parity.passed and not any("classifier" in weight.name for weight in result.weight_errors)
    quantized = open_bundle(tmp_path / "q")
    assert quantized.manifest.labels == tiny_encoders.LABELS and quantized.manifest.head == bundle.manifest.head
    exact = [r for r in result.parity.rungs if r.name.startswith("int4 level 1")]
    assert exact and all(r.figures.max_relative < 1e-4 for r in exact)


@pytest.mark.parametrize("scheme", slow_and_long(["int8", "dynamic", "static", "qdq-int8", "qdq-int4"], "int8", "static"))
def test_every_scheme(made, tmp_path: Path, scheme: str) -> None:
    bundle, base, _ = made()
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"text {i} " + "and more" * (i % 3), "label": i % 3}) + "\n" for i in range(12)))
    settings = settings_for("weight-only", bits=8, block_size=32) if scheme == "int8" else settings_for(scheme)
    calibration = CalibrationRequest(data=data) if scheme in ("static", "qdq-int8") else None
    result = quantize_bundle(bundle.folder, str(base), tmp_path / "q", settings, calibration=calibration, report=quiet)
    assert result.parity.passed
    assert open_bundle(tmp_path / "q").manifest.quantization.scheme == ("weight-only" if scheme == "int8" else scheme)


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in tiny_encoders.FAMILIES if f != "roberta"])
def test_every_family(made, family: str) -> None:
    bundle, _, _ = made(family)
    assert check_golden(bundle, OrtClassifier(bundle, threads=1)).passed
    takes_types = "token_type_ids" in [t.name for t in bundle.manifest.inputs]
    assert takes_types == (family in ("bert", "electra"))
    types = bundle.golden("base")["token_type_ids"]
    assert types.any() == takes_types, "the pairs' second texts are told apart"


@pytest.mark.slow
def test_every_activation(made, tmp_path: Path) -> None:
    _, base, _ = made()
    forms = {f"a-{a}": {"activation": a, "seed": i} for i, a in enumerate(filter(None, ACTIVATIONS))} | {"all": {"positions": "all"}}
    folders = write_adapters(base, tmp_path / "adapters", forms)
    result = export_bundle(str(base), folders, tmp_path / "b", ExportSettings(), report=quiet)
    assert result.parity.passed and len(result.parity.rungs) == 3 * (1 + len(forms))


@pytest.mark.slow
def test_a_half_precision_graph_holds_its_heads_in_half(made, tmp_path: Path) -> None:
    _, base, folders = made()
    result = export_bundle(str(base), [folders["untied"]], tmp_path / "b", ExportSettings(precision="fp16"), report=quiet)
    head = read_onnx_adapter(tmp_path / "b" / "adapters" / "untied.onnx_adapter")["reft.head.classifier.out_proj.bias"]
    assert result.parity.passed and head.dtype == np.float16


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_run_prints_labels_and_probabilities(made, tmp_path: Path) -> None:
    bundle, base_folder, folders = made()
    code, out, _ = invoke("run", bundle.folder, "-p", "a fine day", "--pair", "it rains", "-a", "untied", "--json")
    record = json.loads(out)
    base = load_base(base_folder)
    ids = torch.tensor([base.tokenizer("a fine day", "it rains")["input_ids"]])
    with torch.no_grad(), steered(base.model, load_adapter(folders["untied"])):
        wanted = base.model(**model_inputs(base.model, ids, torch.ones_like(ids), torch.zeros_like(ids))).logits.softmax(-1)[0]
    assert code == 0 and record["label"] == tiny_encoders.LABELS[int(wanted.argmax())] and record["adapter"] == "untied"
    assert list(record["probabilities"]) == list(tiny_encoders.LABELS)
    rounding.check(list(record["probabilities"].values()), wanted, 2 * rounding.logits_of(base.model))

    lines = tmp_path / "texts.jsonl"
    lines.write_text('{"text": "a fine day", "label": "sad"}\n\n{"text": "a fine day", "text_pair": "it rains"}\n')
    code, out, _ = invoke("run", bundle.folder, "--prompts", lines, "-a", "untied")
    assert code == 0 and [json.loads(line)["index"] for line in out.splitlines()] == [0, 1]
    typo = tmp_path / "typo.jsonl"
    typo.write_text('{"text": "a fine day", "txt_pair": "it rains"}\n')
    code, _, said = invoke("run", bundle.folder, "--prompts", typo)
    assert code == 2 and "typo.jsonl:1: has unknown keys ['txt_pair']" in said
    again = json.loads(out.splitlines()[1])["probabilities"]
    rounding.check(list(again.values()), list(record["probabilities"].values()), 2 * rounding.logits_of(base.model))
    bad = {
        '"max_new_tokens": 3': "max_new_tokens is for text generation",
        '"prompt": "x"': "prompt is for text generation",
        '"adapter": 3': "adapter is 3, expected an adapter's name",
        '"adapter": "nope"': "has no adapter 'nope'",
    }
    for key, why in bad.items():
        typo.write_text('{"text": "a fine day"}\n{"text": "a fine day", ' + key + "}\n")
        code, printed, said = invoke("run", bundle.folder, "--prompts", typo)
        assert code == 2 and printed == "" and "typo.jsonl:2: " in said and why in " ".join(said.split())


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_every_line_of_a_classifier_has_its_own_adapter(made, tmp_path: Path, batch_size: int) -> None:
    """As a run of its own; the command's adapter where a line names none."""
    bundle, _, folders = made()
    first, second = list(folders)[:2]
    given = [{"adapter": second}, {}, {"adapter": None}, {"adapter": second}, {}]
    lines = [{"text": text} | own for text, own in zip(("a fine day", "no", "a fine day", "it rains", "a fine day"), given, strict=True)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = invoke("run", bundle.folder, "--prompts", path, "-a", first, "--batch-size", batch_size)
    got = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["index"] for r in got] == [0, 1, 2, 3, 4]
    assert [r["adapter"] for r in got] == [second, first, None, second, first]
    for line, record in zip(lines, got, strict=True):
        asked = line.get("adapter", first)
        options = [] if asked is None else ["-a", asked]
        alone = json.loads(invoke("run", bundle.folder, "-p", line["text"], "--json", *options)[1])
        values = [list(r["probabilities"].values()) for r in (record, alone)]
        assert np.allclose(*values, rtol=1e-4) and record["label"] == alone["label"]
    assert len({tuple(r["probabilities"].values()) for r in (got[0], got[2], got[4])}) == 3


@pytest.mark.parametrize("head", [True, False])
def test_tensorrts_provider_is_refused_for_edits_and_heads(made, head: bool) -> None:
    bundle, _, _ = made()
    manifest = bundle.manifest
    changed = replace(manifest, nodes=(), adapters=()) if head else replace(manifest, head={})
    with pytest.raises(BackendUnavailable, match="answer unsteered; use --provider cuda$"):
        OrtClassifier(replace(bundle, manifest=changed), provider="tensorrt")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "{bundle}", "-p", "x", "--temperature", "1"], "--temperature is for text generation"),
        (["run", "{bundle}", "-p", "x", "--stop", "y"], "--stop is for text generation"),
        (["run", "{bundle}", "-p", "x", "--pair", "y", "--pair", "z"], "1 --prompt and 2 --pair"),
        (["run", "{bundle}", "-p", "x" * 80], "82 tokens, and base takes 64 at most"),
        (["run", "{bundle}", "-p", " "], "is empty"),
        (["run", "{bundle}", "--prompts", "{deep}"], "deep.jsonl:1: not JSON (it is nested too deeply)"),
        (["run", "{bundle}", "--prompts", "{deep}", "--pair", "x"], "--pair goes with --prompt"),
        (["export", "-m", "{base}", "-o", "{out}", "--logits", "last"], "classifier, which --logits last is not for"),
        (["export", "-m", "{base}", "-o", "{out}", "--dry-run", "--exporter", "builder"], "which --exporter builder is not for"),
        (["build", "{bundle}", "-o", "{out}", "--target", "tensorrt-rtx"], "is a classifier, and engines are built of decoders"),
        (["quantize", "{bundle}", "-m", "{base}", "-o", "{out}", "--refit", "{data}", "-a", "{adapter}"], "--refit trains adapters on"),
        (["train", "-m", "{base}", "-d", "{data}", "-o", "{out}", "--samples", "2"], "--samples is a decoder's"),
        (["train", "-m", "{base}", "-d", "{data}", "-o", "{out}"], "texts.jsonl:2: label 'angry' is none of the base's: sad, calm, happy"),
    ],
)
def test_refusals_leave_nothing_behind(made, tmp_path: Path, arguments: list[str], said: str) -> None:
    bundle, base, folders = made()
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": "angry"}\n')
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 200_000)
    before = sorted(tmp_path.iterdir())
    places = {"deep": deep, "bundle": bundle.folder, "base": base, "out": tmp_path / "out", "data": data, "adapter": folders["mlp"]}
    code, out, err = invoke(*(a.format(**places) for a in arguments))
    assert code == 2 and out == "" and said in " ".join(err.split()) and "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("exporter", ["builder", "optimum", "transformers"])
def test_other_exporters_are_refused(made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exporter: str) -> None:
    def missing(_: str) -> None:
        raise BackendUnavailable("is not installed")

    monkeypatch.setattr("reft_export.exporting.plan.check_exporter", missing)  # nobody is to install what would be refused afterwards
    with pytest.raises(InputError, match=f"base is a classifier, which --exporter {exporter} is not for"):
        export_bundle(str(made()[1]), [], tmp_path / "out", ExportSettings(exporter=exporter), report=quiet)
    assert not (tmp_path / "out").exists()


def test_an_adapter_belongs_to_its_labels(made, tmp_path: Path) -> None:
    bundle, base, folders = made()
    two = tiny_encoders.save_base(tmp_path / "two", labels=("no", "yes"))
    with pytest.raises(AdapterError, match="adapter untied was trained on base"):
        export_bundle(str(two), [folders["untied"]], tmp_path / "out", ExportSettings(), report=quiet)
    adapter = load_adapter(folders["untied"])
    with pytest.raises(AdapterError, match="labels sad, calm, happy; this base has no, yes"), steered(load_base(two).model, adapter):
        pass
    cut = replace(adapter, head={name: value for name, value in adapter.head.items() if "dense.bias" not in name})
    with pytest.raises(AdapterError, match=r"classifier\.dense\.bias is missing"), steered(load_base(base).model, cut):
        pass
    assert not (tmp_path / "out").exists()


def test_bases_that_are_no_classifiers_of_ours(tmp_path: Path) -> None:
    folder = tiny_encoders.save_base(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())

    def refused(match: str, **changes: object) -> None:
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError, match=match):
            load_base(folder)

    refused("without a classification head; give it one", architectures=["RobertaForMaskedLM"])
    refused("is a classifier on bloom", architectures=["BloomForSequenceClassification"], model_type="bloom")
    llama = {"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}
    refused("names no pad_token_id, by which a llama", **llama, pad_token_id=None)
    refused("names no pad_token_id but -1, by which a llama", **llama, pad_token_id=-1)
    refused("a single output is no choice", id2label={"0": "score"}, label2id={"score": 0})
    refused("multi_label_classification is no choice", problem_type="multi_label_classification")


def test_dry_run_promises_what_is_done(made, tmp_path: Path) -> None:
    """No greedy tokens, and one row of logits a text."""
    code, out, _ = invoke("export", "-m", made()[1], "-o", tmp_path / "out", "--dry-run", "--json")
    steps = json.loads(out)["steps"]
    assert code == 0 and "record eager logits, base and 0 adapters" in steps[0] and steps[1].endswith("logits one row a text")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["export", "train", "fold"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"id2label": list(tiny_encoders.LABELS)}, r"id2label is \['sad', 'calm', 'happy'\], expected an object like"),
        ({"id2label": {"sad": "0", "calm": "1", "happy": "2"}}, r"id2label is \{'sad': '0'.*expected an object like"),
        ({"id2label": {"0": "sad", "1": "calm", "5": "happy"}}, "id2label is .*'5': 'happy'.*expected an object like"),
        ({"id2label": {"0": "sad", "1": "calm", "²": "happy"}}, "id2label is .*expected an object like"),
        ({"id2label": {"0": "sad", "1": "calm", "2": None}}, "id2label is .*None.*expected an object like"),
        ({"id2label": 3}, "id2label is 3, expected an object like"),
        ({"id2label": {"0": "sad", "1": "sad", "2": "happy"}}, "id2label has the label sad twice"),
        ({"id2label": {"0": "sad", "1": "calm"}}, r"\[2(, 64)?\] by config.json, and of another|names 2 labels, .* 3 logits"),
        ({"architectures": 7}, "holds no architecture, a roberta without a classification head"),
        ({"pad_token_id": "x"}, "pad_token_id"),
    ],
)
def test_a_hostile_config_costs_one_line(made, tmp_path: Path, verb: str, changes: dict, said: str) -> None:
    bundle, base, folders = made()
    config = json.loads((base / "config.json").read_text())
    changed = Path(shutil.copytree(base, tmp_path / "base"))
    (changed / "config.json").write_text(json.dumps(config | changes))
    (tmp_path / "texts.jsonl").write_text('{"text": "a", "label": 0}\n')
    arguments = {"export": ["export", "-m", changed], "train": ["train", "-m", changed, "-d", tmp_path / "texts.jsonl"]}
    if verb == "fold":  # of the graph beside the config; our own, without its edits' inputs
        if "architectures" in changes:
            pytest.skip("a graph says itself what it is")
        graph = load_graph(bundle.graph_path)
        unfold_graph(graph)
        write_graph(graph, changed)
        arguments["fold"] = ["fold", changed / "model.onnx", "-a", folders["mlp"]]
    code, out, err = invoke(*arguments[verb], "-o", tmp_path / "out")
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1 and re.search(said, err), err
    assert not (tmp_path / "out").exists()


def test_training_says_no_rank_of_red(made, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a", "label": 0}\n')
    options = ["--method", "red", "--max-steps", 1]
    code, out, _ = invoke("train", "-m", made()[1], "-d", tmp_path / "texts.jsonl", "-o", tmp_path / "red", *options)
    assert code == 0 and f"/red: red, {tiny.LAYERS} sites" in out


@pytest.mark.slow
def test_red_trained_with_its_head_beside_another_adapter(made, tmp_path: Path) -> None:
    """From the command line: train, export, parity, and the label's probabilities by each adapter and by none."""
    _, base_folder, folders = made()
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": "gqs"[i % 3] + "abcdef"[i % 5 :], "label": i % 3}) + "\n" for i in range(36)))
    training = ["--method", "red", "--positions", "f2", "--lr", "1e-2", "--max-steps", 6, "--batch-size", 12]
    assert invoke("train", "-m", base_folder, "-d", data, "-o", tmp_path / "red", *training)[0] == 0
    trained = load_adapter(tmp_path / "red")
    assert trained.method == "red" and set(trained.head) == set(load_adapter(folders["untied"]).head)
    code, out, _ = invoke("export", "-m", base_folder, "-a", tmp_path / "red", "-a", folders["untied"], "-o", tmp_path / "b", "--json")
    assert code == 0 and json.loads(out)["parity"]["passed"]
    for more in ([], ["-m", base_folder]):
        code, out, _ = invoke("parity", tmp_path / "b", *more, "--json")
        assert code == 0 and json.loads(out)["passed"]
    bundle, base = open_bundle(tmp_path / "b"), load_base(base_folder)
    inputs = stored_inputs(bundle)["base"]
    plain = inputs.logits(base.model)
    session = OrtClassifier(bundle, threads=1)
    for name, folder in (("red", tmp_path / "red"), (None, None), ("untied", folders["untied"]), ("red", tmp_path / "red")):
        session.set_adapter(name)
        got = session.classify(inputs.input_ids, inputs.attention_mask, inputs.token_type_ids).logits
        with steered(base.model, load_adapter(folder)) if folder else nullcontext():
            wanted = inputs.logits(base.model)
        assert np.abs(got - wanted).max() <= 2e-5 * np.abs(wanted).max(), name
        assert (np.abs(wanted - plain).max() > 1e-2 * np.abs(plain).max()) == (name is not None)


def test_bench_and_inspect_know_classifiers(made) -> None:
    bundle, _, folders = made()
    code, out, _ = invoke("bench", bundle.folder, "--prompt-tokens", 16, "--repeats", 2, "--json")
    measured = json.loads(out)
    assert code == 0 and measured["tokens"] == 16 and [m["name"] for m in measured["measurements"]] == ["base", *ADAPTERS]
    assert [m["ratio"] is None for m in measured["measurements"]] == [True] + [False] * len(ADAPTERS)
    code, out, err = invoke("bench", bundle.folder, "--repeats", 1, "-a", "mlp", "--json")
    assert code == 0 and json.loads(out)["tokens"] == bundle.manifest.model.context_length < 128, err
    _, out, _ = invoke("inspect", bundle.folder, "--json")
    assert json.loads(out)["task"] == "text-classification: sad, calm, happy" and "4 parameters" in json.loads(out)["head"]
    _, out, _ = invoke("inspect", folders["untied"], "--json")
    assert json.loads(out)["labels"] == ["sad", "calm", "happy"] and json.loads(out)["head"] == 64 * 64 + 64 + 3 * 64 + 3
    _, out, _ = invoke("inspect", bundle.folder / "adapters" / "untied.onnx_adapter", "--json")
    assert "reft.head.classifier.dense.bias" in [row["tensor"] for row in json.loads(out)["banks"]]
