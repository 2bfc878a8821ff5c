"""A dry run makes every check that the run makes before it loads weights: the same exit code, the same words, and nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import tiny_encoders
from models.bases import FAMILIES
from reseal import reseal
from safetensors.numpy import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM
from typer.testing import CliRunner

from reft_export.base.load import load_base, load_without_weights
from reft_export.base.token_rules import stop_tokens
from reft_export.cli.main import app
from reft_export.exporting.assemble import check_model
from reft_export.exporting.plan import KEYS_AND_VALUES, plan_export
from reft_export.exporting.settings import ExportSettings
from reft_export.training.checkpoints import HISTORY_FILE, open_working_folder
from reft_export.training.preparation import prepare
from reft_export.training.settings import TrainSettings
from runtimes.edits.adapter import save_adapter
from runtimes.errors import EngineError

DATA = [{"prompt": f"a prompt number {n}", "completion": "an answer"} for n in range(4)]
TEXTS = [{"text": f"a text {n}", "label": n % 3} for n in range(4)]


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, adapters and data, good ones and bad ones; tests read them only."""
    root = tmp_path_factory.mktemp("files")
    tiny.save_base(root / "base", "llama")
    tiny.save_base(root / "other", "llama", hidden_size=32, intermediate_size=48)
    tiny_encoders.save_base(root / "encoder")
    MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)).save_pretrained(root / "mamba")
    adapter = tiny.random_adapter(load_base(root / "base").info)
    save_adapter(adapter, root / "good")
    (root / "second").mkdir()
    save_adapter(adapter, root / "second" / "good")
    save_adapter(tiny.random_adapter(load_base(root / "other").info), root / "of-another")
    shutil.copytree(root / "base", root / "twin")
    weights, name = load_file(root / "twin" / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: -weights[name]}, root / "twin" / "model.safetensors", metadata={"format": "pt"})
    save_adapter(tiny.random_adapter(load_base(root / "twin").info), root / "of-twin")
    for name in ("garbage", "damaged", "not-finite"):
        shutil.copytree(root / "good", root / name)
    (root / "garbage" / "adapter.json").write_bytes(b"\x00\xff garbage")
    weights = root / "damaged" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    tensors = load_file(root / "not-finite" / "adapter.safetensors")
    first = next(iter(tensors))
    save_file(tensors | {first: tensors[first] * float("nan")}, root / "not-finite" / "adapter.safetensors")
    reseal(root / "not-finite")
    for name in ("cut", "bad-tokenizer", "no-tokenizer", "no-config"):
        shutil.copytree(root / "base", root / name)
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    (root / "bad-tokenizer" / "tokenizer.json").write_text('{"version": "1.0"')
    for path in (root / "no-tokenizer").glob("*token*"):
        path.unlink()
    (root / "no-config" / "config.json").unlink()
    write_lines(root / "data.jsonl", DATA)
    write_lines(root / "texts.jsonl", TEXTS)
    write_lines(root / "unknown-key.jsonl", [*DATA, {"prompt": "a", "answer": "b"}])
    (root / "broken.jsonl").write_text(json.dumps(DATA[0]) + "\n{broken\n")
    write_lines(root / "one-token.jsonl", [{"prompt": "a", "completion": "b"}])
    write_lines(root / "label.jsonl", [*TEXTS, {"text": "a", "label": "angry"}])
    return root


def invoke(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "300"})
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, " ".join(done.stderr.split())


def refused_alike(arguments: list[str], files: Path, work: Path, code: int, match: str) -> None:
    """The run and its dry run: one line, ``match`` in it, the same for both; the folder is left as it was."""
    words = [word.format(files=files, work=work) for word in arguments]
    before = sorted(work.rglob("*"))
    dry, real = invoke(*words, "--dry-run"), invoke(*words)
    assert dry == real
    assert real[0] == code and real[1] == "" and match in real[2], real
    assert sorted(work.rglob("*")) == before


EXPORT = ["export", "-m", "{files}/base", "-o", "{work}/out"]


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        ([*EXPORT, "-a", "{files}/none"], 2, "none"),
        ([*EXPORT, "-a", "{files}/garbage"], 2, "adapter.json is not JSON"),
        ([*EXPORT, "-a", "{files}/damaged"], 2, "adapter.safetensors"),
        ([*EXPORT, "-a", "{files}/not-finite"], 2, "not finite"),
        ([*EXPORT, "-a", "{files}/base"], 2, "adapter.json is missing"),
        ([*EXPORT, "-a", "{files}/of-another"], 2, "adapter of-another was trained on other"),
        ([*EXPORT, "-a", "{files}/good", "-a", "{files}/of-another"], 2, "adapter of-another was trained on other"),
        ([*EXPORT, "-a", "{files}/good", "-a", "{files}/second/good"], 2, "two adapters are called good"),
        ([*EXPORT, "--sites", "9"], 2, "layer 9 does not exist"),
        ([*EXPORT, "--sites", "1.nowhere"], 2, "--sites '1.nowhere'"),
        ([*EXPORT, "--opset", "30"], 2, "opset 30 is not supported"),
        ([*EXPORT, "-p", "int3"], 2, "precision 'int3' is unknown"),
        ([*EXPORT, "-p", "int4", "--block-size", "17"], 2, "17"),
        ([*EXPORT, "-p", "int4", "--accuracy-level", "3"], 2, "accuracy"),
        ([*EXPORT, "--exporter", "optimum", "--logits", "last"], 2, "optimum's exporter makes float32 graphs with all logits"),
        (["export", "-m", "{files}/none", "-o", "{work}/out"], 2, "is not a folder"),
        (["export", "-m", "{files}/data.jsonl", "-o", "{work}/out"], 2, "is a file; a base is given by its folder"),
        (["export", "-m", "{files}/no-config", "-o", "{work}/out"], 2, "config.json is missing"),
        (["export", "-m", "{files}/cut", "-o", "{work}/out"], 2, "is damaged or cut short"),
        (["export", "-m", "{files}/bad-tokenizer", "-o", "{work}/out"], 2, "the tokenizer cannot be loaded"),
        (["export", "-m", "{files}/mamba", "-o", "{work}/out"], 1, "mamba cannot be exported: its layers do not all keep keys and values"),
        (["export", "-m", "{files}/encoder", "-o", "{work}/out", "--exporter", "builder"], 2, "is a classifier, which --exporter builder"),
        (["export", "-m", "{files}/encoder", "-a", "{files}/good", "-o", "{work}/out"], 2, "adapter good was trained on base"),
        (["export", "-m", "{files}/base", "-o", "{work}/taken"], 2, "exists; choose another output or pass --force"),
        (["export", "-m", "{files}/base", "-o", "{work}/taken", "--force"], 2, "holds other files than ours"),
        (["export", "-m", "{files}/base", "-a", "{files}/good", "-o", "{files}/good", "--force"], 2, "holds the input"),
        (["export", "-m", "{files}/base", "-o", "{work}/taken/file"], 2, "is a file; an output folder is expected"),
    ],
)
def test_export(files, tmp_path, arguments, code, match) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    refused_alike(arguments, files, tmp_path, code, match)


@pytest.mark.parametrize("exporter", ["builder", "optimum", "transformers"])
def test_export_without_the_exporter(files, tmp_path, exporter, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused_alike([*EXPORT, "--exporter", exporter], files, tmp_path, 4, f"--exporter {exporter} needs")


def test_the_builder_reads_a_tokenizer(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("reft_export.exporting.plan.check_exporter", lambda _: None)
    arguments = ["export", "-m", "{files}/no-tokenizer", "-o", "{work}/out", "--exporter", "builder"]
    refused_alike(arguments, files, tmp_path, 2, "has no tokenizer, which the builder reads")


TRAIN = ["train", "-m", "{files}/base", "-d", "{files}/data.jsonl", "-o", "{work}/out"]


def on(data: str, *more: str, model: str = "base") -> list[str]:
    return ["train", "-m", f"{{files}}/{model}", "-d", f"{{files}}/{data}", "-o", "{work}/out", *more]


@pytest.mark.parametrize(
    ("arguments", "code", "match"),
    [
        (on("none.jsonl"), 2, "none.jsonl is not a file"),
        (on("broken.jsonl"), 2, "broken.jsonl:2"),
        (on("unknown-key.jsonl"), 2, "unknown-key.jsonl:5"),
        (on("texts.jsonl"), 2, "texts.jsonl:1"),
        (on("one-token.jsonl"), 2, "one-token.jsonl:1: the prompt has 1 token, and positions f7+l7 edit none of it"),
        ([*TRAIN, "--layers", "1-9"], 2, "layer 9 does not exist in this base"),
        ([*TRAIN, "--positions", "x7"], 2, "positions 'x7' are not understood"),
        ([*TRAIN, "--max-length", "100000"], 2, "max_length is 100000; the context of base ends at"),
        ([*TRAIN, "--max-length", "2"], 2, "data.jsonl:1"),
        ([*TRAIN, "--eval-fraction", "0.95"], 2, "leaves none to train on"),
        ([*TRAIN, "--chat-template", "always"], 2, "the tokenizer has no chat template"),
        ([*TRAIN, "--resume"], 2, "there is nothing to resume"),
        ([*TRAIN, "--head"], 2, "--head is a classifier's, and base is a decoder"),
        ([*TRAIN, "--device", "cuda"], 4, "torch finds no CUDA GPU here"),
        ([*TRAIN, "--start", "{files}/garbage"], 2, "adapter.json is not JSON"),
        ([*TRAIN, "--start", "{files}/of-another"], 2, "adapter of-another was trained on other"),
        ([*TRAIN, "--start", "{files}/good", "--rank", "9"], 2, "its form is loreft, rank 4"),
        ([*TRAIN, "--base", "{files}/good"], 2, "manifest.json"),
        (on("data.jsonl", model="no-tokenizer"), 2, "has no tokenizer"),
        (on("data.jsonl", model="cut"), 2, "is damaged or cut short"),
        (on("data.jsonl", model="encoder"), 2, "data.jsonl:1"),
        (on("label.jsonl", model="encoder"), 2, "label.jsonl:5: label 'angry' is none of the base's"),
        (on("texts.jsonl", "--samples", "2", model="encoder"), 2, "--samples is a decoder's"),
        (on("texts.jsonl", "--max-length", "1000", model="encoder"), 2, "max_length is 1000"),
        (["train", "-m", "{files}/base", "-d", "{files}/data.jsonl", "-o", "{work}/taken"], 2, "exists; choose another output"),
        (["train", "-m", "{files}/base", "-d", "{files}/data.jsonl", "-o", "{work}/two words"], 2, "two words"),
        (["train", "-m", "{files}/base", "-d", "{files}/data.jsonl", "-o", "{work}/begun"], 2, "an interrupted run left"),
        (["train", "-m", "{files}/base", "-d", "{files}/data.jsonl", "-o", "{work}/begun", "--resume"], 2, "was run otherwise"),
        (["train", "-m", "{files}/base", "-d", "{files}/data.jsonl", "-o", "{work}/odd"], 2, "does not hold this tool's checkpoints"),
    ],
)
def test_train(files, tmp_path, arguments, code, match) -> None:
    for name in ("taken", "odd.checkpoints"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    folder, _ = open_working_folder(tmp_path / "begun", {"method": "another"}, resume=False, force=False)
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / HISTORY_FILE).write_text("[]")
    refused_alike(arguments, files, tmp_path, code, match)


def test_train_on_a_float_bundle(bundle_folder, files, tmp_path) -> None:
    refused_alike([*TRAIN, "--base", str(bundle_folder("llama"))], files, tmp_path, 2, "is a float bundle, whose weights are the base's")


@pytest.mark.parametrize(
    ("more", "code", "match"),
    [
        (["--freeze", "nobody"], 2, "has no adapter 'nobody'"),
        (["--context", "100000"], 4, "is not installed"),
        (["--no-plugin", "--plugin", "x"], 2, "exclude each other"),
        (["--sm", "ampere"], 2, "is not a compute capability"),
        (["-o", "{work}/taken"], 2, "exists; choose another output"),
    ],
)
def test_build(bundle_folder, files, tmp_path, more, code, match) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    output = [] if "-o" in more else ["-o", "{work}/out"]
    arguments = ["build", str(bundle_folder("llama", target="tensorrt")), "--target", "tensorrt-rtx", *output, *more]
    refused_alike(arguments, files, tmp_path, code, match)


def test_build_of_a_bundle_for_onnxruntime(bundle_folder, files, tmp_path) -> None:
    """The command that makes the other one is named, with the adapters that go into it."""
    arguments = ["build", str(bundle_folder("llama")), "--target", "tensorrt-rtx", "-o", "{work}/out"]
    refused_alike(arguments, files, tmp_path, 4, "-a last-consreft -o OUT --target tensorrt`")


def test_build_of_what_is_no_bundle(files, tmp_path) -> None:
    arguments = ["build", "{files}/good", "--target", "tensorrt-rtx", "-o", "{work}/out"]
    refused_alike(arguments, files, tmp_path, 2, "manifest.json")


def test_build_plans_the_shapes(bundle_folder, files, tmp_path, monkeypatch) -> None:
    """An input that no profile has a shape for is refused before the builder runs."""

    def refuse(*_: object) -> None:
        raise EngineError("graph input x varies")

    monkeypatch.setattr("reft_export.building.plan._builder", lambda settings, notes: ("python", ("8.6",)))
    monkeypatch.setattr("reft_export.building.plan.engine_profiles", refuse)
    arguments = ["build", str(bundle_folder("llama", target="tensorrt")), "--target", "tensorrt-rtx", "--no-plugin", "-o", "{work}/out"]
    refused_alike(arguments, files, tmp_path, 4, "graph input x varies")


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("a dry run loads no weights")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([*EXPORT, "-a", "{files}/good", "-p", "int4"], "base and 1 adapters"),
        (["export", "-m", "{files}/encoder", "-o", "{work}/out"], "logits one row a text"),
        (EXPORT, "KV cache written in place where the family's attention allows it"),
        ([*EXPORT, "--target", "tensorrt"], "KV cache copied at every step"),
        ([*EXPORT, "-p", "bf16"], "KV cache copied at every step"),
        ([*TRAIN, "--start", "{files}/good"], "4 examples"),
        ([*TRAIN, "--eval-fraction", "0.25", "--device", "cpu"], "3 examples"),
        (on("texts.jsonl", "--positions", "f1", model="encoder"), "4 examples"),
    ],
)
def test_good_input_gets_its_plan(files, tmp_path, arguments, says, monkeypatch) -> None:
    monkeypatch.setattr("reft_export.base.load._load_model", forbidden)
    code, out, err = invoke(*(word.format(files=files, work=tmp_path) for word in arguments), "--dry-run")
    assert code == 0 and says in out and "M parameters" in out, err
    assert list(tmp_path.iterdir()) == []


LIGHT = """
import json, sys
from typer.testing import CliRunner
from reft_export.cli.main import app

for arguments, code, said in json.load(open(sys.argv[1])):
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})
    assert done.exit_code == code and said in " ".join(done.output.split()), (arguments, done.output, done.exception)
    heavy = {"torch", "transformers", "onnx", "onnxruntime"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
"""


def test_refusals_and_dry_runs_of_known_families_load_no_torch(files, tmp_path) -> None:
    """Neither does the one line of a refusal wait for it, nor the forecast."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    cases: list[tuple[list[str], int, str]] = [
        ([*EXPORT, "-a", "{files}/none"], 2, "none"),
        ([*EXPORT, "-a", "{files}/garbage"], 2, "adapter.json is not JSON"),
        ([*EXPORT, "-a", "{files}/of-another"], 2, "was trained on other (3 layers, width 32); base has 3 layers, width 64; pass the base"),
        ([*EXPORT, "-a", "{files}/of-twin"], 2, "this base is base: it has other values in layers.1.mlp.up_proj.weight; pass the base"),
        ([*EXPORT, "--sites", "9"], 2, "layer 9 does not exist in base (3 layers, 0 to 2)"),
        ([*EXPORT, "--target", "coreml"], 2, "--target 'coreml' is unknown; known: onnxruntime, tensorrt"),
        ([*EXPORT, "--target", "tensorrt", "--exporter", "builder"], 2, "use --exporter dynamo for --target tensorrt"),
        ([*EXPORT, "--exporter", "tvm"], 2, "exporter 'tvm' is unknown"),
        ([*EXPORT, "-p", "int3"], 2, "precision 'int3' is unknown"),
        ([*EXPORT, "-p", "int4", "--block-size", "17"], 2, "17"),
        (["export", "-m", "{files}/base", "-o", "{work}/taken"], 2, "exists; choose another output"),
        (["export", "-m", "{files}/no-config", "-o", "{work}/out"], 2, "config.json is missing"),
        (["export", "-m", "{files}/cut", "-o", "{work}/out"], 2, "is damaged or cut short"),
        (["export", "-m", "{files}/encoder", "-o", "{work}/out", "--exporter", "builder"], 2, "is a classifier, which --exporter builder"),
        ([*EXPORT, "-a", "{files}/good", "-p", "int4", "--dry-run"], 0, "M parameters"),
        (["export", "-m", "{files}/encoder", "-o", "{work}/out", "--dry-run"], 0, "M parameters"),
    ]
    filled = [([word.format(files=files, work=tmp_path) for word in words], code, said) for words, code, said in cases]
    (tmp_path / "cases.json").write_text(json.dumps(filled))
    done = subprocess.run([sys.executable, "-c", LIGHT, str(tmp_path / "cases.json")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("change", [{}, {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, {"model_type": "mamba"}], ids=str)
def test_what_the_files_do_not_settle_is_left_to_the_model(files, tmp_path, change) -> None:
    folder = Path(shutil.copytree(files / "base", tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    plan = plan_export(folder, [files / "good"], tmp_path / "out", ExportSettings())
    assert plan.settled == (not change)


@pytest.mark.parametrize("family", ["encoder", *sorted(set(KEYS_AND_VALUES) & set(FAMILIES))])
def test_the_headers_count_what_the_model_has(family, tmp_path) -> None:
    """And known families have the cache that is not looked at for them."""
    folder = tiny_encoders.save_base(tmp_path / "b") if family == "encoder" else tiny.save_base(tmp_path / "b", family)
    if family == "gpt2":  # whose head is tied, and may be stored all the same
        weights = load_file(folder / "model.safetensors")
        save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"]}, folder / "model.safetensors", metadata={"format": "pt"})
    plan = plan_export(folder, [], tmp_path / "out", ExportSettings())
    asked = check_model(plan, ExportSettings())
    assert plan.settled and sum(asked.parameters) == sum(plan.parameters)
    # Where the files call the output head lm_head, the model calls it embed_out, by which it counts as an embedding.
    assert asked == plan or family == "gpt_neox"


def test_a_base_from_a_hub_is_not_downloaded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("reft_export.base.hub._download", forbidden)
    write_lines(tmp_path / "d.jsonl", DATA)
    for verb in (["export"], ["train", "-d", tmp_path / "d.jsonl"]):
        code, _, err = invoke(*verb, "-m", "someone/a-model", "-o", tmp_path / "out", "--dry-run")
        assert code == 2 and "--dry-run reads a local folder, and someone/a-model is none; download the model first" in err


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_base_without_weights_is_the_same_base(family, tmp_path) -> None:
    """What checks read of it: fingerprint, sizes, dtype, stop tokens; so a run's record, which a resume compares, is the same too."""
    folder = tiny.save_base(tmp_path / "base", family)
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": [5, 257]}))
    data = write_lines(tmp_path / "data.jsonl", DATA)
    records = []
    for load in (load_base, load_without_weights):
        base = load(folder, dtype="bfloat16", require_tokenizer=True)
        ready = prepare(base, data, TrainSettings(positions="f1+l1"), tmp_path / "out")
        records.append((base.info, base.dtype, base.task, stop_tokens(base), ready.run, ready.examples.training))
    assert records[0] == records[1] and 5 in records[0][3]


def test_an_encoder_without_weights_is_the_same_base(files, tmp_path) -> None:
    found: list[Callable[..., object]] = []
    for load in (load_base, load_without_weights):
        base = load(files / "encoder", require_tokenizer=True)
        ready = prepare(base, files / "texts.jsonl", TrainSettings(positions="f1"), tmp_path / "out")
        found.append((base.info, base.task, ready.run, ready.examples.training))
    assert found[0] == found[1]
