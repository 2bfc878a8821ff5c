"""The command line as a user meets it: verbs and flags, one line per mistake, exit codes, JSON on stdout."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import typer
from foreign_graphs import save_foreign
from hypothesis import example, given
from hypothesis import strategies as st
from reseal import as_version_1, reseal
from rich.markup import render
from rich.text import Text
from typer.testing import CliRunner

from reft_export import console
from reft_export.cli.classify import read_texts
from reft_export.cli.guard import guarded
from reft_export.cli.main import app
from reft_export.console import escape
from runtimes.errors import InputError
from runtimes.text.prompts import read_prompts, read_requests

SURFACE = {
    "quickstart": {"--output", "--model", "--force"},
    "train": {
        "--model", "--data", "--output", "--method", "--rank", "--subspaces", "--layers", "--stream", "--positions", "--tied",
        "--activation",
        "--dropout", "--lr", "--schedule", "--warmup", "--epochs", "--max-steps", "--batch-size", "--gradient-accumulation",
        "--weight-decay", "--eval-fraction", "--eval-data", "--metric", "--patience", "--keep", "--max-length",
        "--chat-template", "--format", "--train-on", "--report-to", "--samples", "--distill-system", "--max-new-tokens", "--kl-weight",
        "--objective", "--beta", "--edit", "--recipe",
        "--probes", "--seed", "--dtype", "--init", "--group-by-length", "--gradient-checkpointing", "--cache-mb", "--cache-dtype",
        "--device", "--resume", "--base", "--start", "--head", "--orthogonal-to", "--accept-base", "--force", "--preview",
        "--dry-run", "--json",
    },
    "sweep": {
        "--model", "--data", "--output", "--layers", "--ranks", "--positions", "--learning-rates", "--methods", "--trials", "--storage",
        "--probe-only", "--stream", "--init", "--schedule", "--warmup", "--epochs", "--max-steps", "--batch-size",
        "--gradient-accumulation", "--weight-decay", "--eval-fraction", "--eval-data", "--metric", "--patience", "--keep",
        "--max-length", "--chat-template", "--format", "--train-on", "--samples", "--probes", "--seed", "--dtype", "--device",
        "--group-by-length", "--gradient-checkpointing", "--cache-mb", "--cache-dtype", "--base", "--accept-base", "--json",
    },
    "steer": {
        "--model", "--output", "--method", "--layers", "--stream", "--from-layer", "--strength", "--positions", "--read",
        "--chat-template", "--max-length", "--batch-size", "--samples", "--probes", "--dtype", "--device", "--base", "--accept-base",
        "--rotation", "--source", "--force", "--dry-run", "--json",
    },
    "import": {
        "--model", "--output", "--format", "--positions", "--tied", "--activation", "--method", "--stream", "--layers", "--scale",
        "--subspace", "--probes", "--force", "--json",
    },
    "compose": {"--output", "--strength", "--accept-base", "--force", "--dry-run", "--json"},
    "export": {
        "--model", "--adapter", "--output", "--precision", "--exporter", "--logits", "--sites", "--opset",
        "--target", "--block-size", "--accuracy-level", "--min-retention", "--accept-loss", "--format",
        "--method", "--symmetric", "--keep-high", "--budget-mb", "--embeddings", "--cache", "--accept-base", "--force",
        "--dry-run", "--json",
    },
    "fold": {"--adapter", "--output", "--model", "--sites", "--as-lora", "--accept-base", "--force", "--json"},
    "quantize": {
        "--model", "--output", "--precision", "--scheme", "--method", "--block-size", "--symmetric", "--accuracy-level",
        "--keep-high", "--lm-head", "--embeddings", "--cache", "--calibrate",
        "--budget-mb", "--ranges", "--mixture", "--observer", "--percentile", "--decode-tokens",
        "--min-retention", "--accept-loss", "--accept-base", "--force", "--json", "--compare", "--refit", "--adapter", "--refit-steps",
        "--refit-lr", "--refit-objective", "--refit-output", "--perplexity", "--checker", "--checker-data", "--checker-tokens",
    },
    "add": {
        "--adapter", "--model", "--output", "--remove", "--min-retention", "--accept-loss", "--accept-base", "--force",
        "--dry-run", "--json",
    },
    "build": {
        "--output", "--target", "--sm", "--freeze", "--plugin", "--no-plugin", "--max-batch", "--max-sequence", "--context",
        "--max-slots", "--max-rank", "--timing-cache", "--workspace", "--weight-streaming", "--force", "--dry-run", "--json",
    },
    "run": {
        "--prompt", "--prompts", "--interactive", "--pair", "--adapter", "--strength", "--provider", "--kernel", "--threads", "--chat",
        "--system", "--stream", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--repetition-penalty", "--seed", "--stop",
        "--batch-size", "--prefill-chunk", "--json-schema", "--verify", "--json", "--speculate",
    },
    "serve": {
        "--adapters", "--host", "--port", "--api-key", "--admin-token", "--rows", "--queue", "--concurrency", "--max-tokens",
        "--max-prompt-tokens", "--max-choices", "--max-body-kb", "--max-upload-mb", "--request-seconds", "--grace-seconds", "--cache-mb",
        "--prefix-mb", "--bank-mb", "--prefill-chunk", "--schemas", "--kernel", "--threads", "--verify", "--speculate", "--replicas",
        "--ray-address",
    },
    "parity": {"--model", "--provider", "--kernel", "--full", "--report", "--accept-base", "--verify", "--json"},
    "evaluate": {
        "--data", "--model", "--adapter", "--output", "--metric", "--format", "--chat-template", "--max-length", "--max-new-tokens",
        "--batch-size", "--limit", "--dtype", "--device", "--provider", "--kernel", "--threads", "--accept-base", "--force", "--json",
    },
    "bench": {"--adapter", "--prompt-tokens", "--new-tokens", "--repeats", "--provider", "--kernel", "--threads", "--op", "--adapters",
              "--concurrency", "--plot", "--json"},
    "inspect": {"--json"},
    "package": {"--wheels", "--output", "--archive", "--triton", "--force", "--json"},
    "push": {"--private", "--revision", "--base-model", "--license", "--force", "--dry-run", "--json"},
    "pull": {"--output", "--revision", "--force", "--json"},
    "upgrade": {"--output", "--force", "--json"},
    "doctor": {"--json"},
}  # fmt: skip
"""Verbs and long flags; a change here is a change for every user."""


def fresh(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as a user starts it; of every verb at least once, for what its imports say and set."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "reft_export.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In this process, which has torch loaded."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


def refused(*arguments: object, code: int, match: str, run: Callable[..., subprocess.CompletedProcess[str]] = cli) -> None:
    """One line on stderr that begins with "error:", nothing on stdout, the right exit code."""
    done = run(*arguments)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert match in lines[0], lines[0]


def test_verbs_and_flags() -> None:
    group = typer.main.get_command(app)
    found = {
        verb: {o for p in command.params for o in p.opts if o.startswith("--")} - {"--help"} for verb, command in group.commands.items()
    }
    assert found == {verb: {*options, "--debug"} for verb, options in SURFACE.items()}


def test_help_says_all_of_its_text() -> None:
    """rich takes [words in brackets] for a style, and leaves them out."""
    verbs = typer.main.get_command(app).commands
    texts = [(f"{name} {p.name}", p.help or "") for name, verb in verbs.items() for p in verb.params if hasattr(p, "help")]
    for where, text in [*texts, *((name, verb.help or "") for name, verb in verbs.items())]:
        assert Text.from_markup(text).plain == text, where


@pytest.mark.parametrize("read", [read_requests, read_prompts, read_texts])
def test_hostile_lines_cost_one_line(read, tmp_path) -> None:
    path, key = tmp_path / "lines.jsonl", "text" if read is read_texts else "prompt"
    bad = {"[" * 200_000: "nested too deeply", '{"KEY": ' + "1" * 5000 + "}": "not JSON", '{"KEY": "a\\ud83d"}': "half of a surrogate"}
    for line, said in bad.items():
        path.write_text(f'{{"{key}": "fine"}}\n' + line.replace("KEY", key) + "\n")
        with pytest.raises(InputError, match=f"lines.jsonl:2: .*{said}"):
            read(path)


def test_bench_takes_as_many_tokens_as_fit(bundle_folder) -> None:
    options = ["-a", "tied", "--new-tokens", "450", "--repeats", "1", "--json"]
    done = CliRunner().invoke(app, ["bench", str(bundle_folder("llama")), *options])
    measured = json.loads(done.stdout)
    assert (measured["prompt_tokens"], measured["new_tokens"]) == (512 - 450, 450)


def test_help_needs_no_framework() -> None:
    """`--help` and the device verbs' help answer without torch, transformers or onnx being imported."""
    code = (
        "import sys\nfrom reft_export.cli.main import app\n"
        "try:\n    app(['export', '--help'])\nexcept SystemExit:\n    pass\n"
        "bad = {'torch', 'transformers', 'onnx', 'onnx_ir', 'onnxruntime'} & set(sys.modules)\nassert not bad, bad"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_run(bundle_folder, tmp_path) -> None:
    bundle = bundle_folder("llama")
    plain = fresh("run", bundle, "-p", "hello", "-n", 12)
    steered = fresh("run", bundle, "-p", "hello", "-n", 12, "-a", "tied")
    assert plain.returncode == steered.returncode == 0
    assert plain.stdout and plain.stdout != steered.stdout
    assert cli("run", bundle, "-p", "hello", "-n", 12, "--no-stream").stdout == plain.stdout
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "hello"}\n\n{"prompt": "a much longer prompt than the first"}\n')
    done = cli("run", bundle, "--prompts", prompts, "-n", 12, "-a", "tied")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["index"] for r in records] == [0, 1]
    assert records[0]["text"] + "\n" == steered.stdout, "a prompt in a padded batch is answered as it is alone"
    sampled = [cli("run", bundle, "-p", "hello", "-n", 12, "--temperature", 1, "--seed", s).stdout for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_run_refusals(bundle_folder, tmp_path) -> None:
    bundle = bundle_folder("llama")
    refused("run", tmp_path / "no", "-p", "x", code=2, match="is not a folder")
    refused("run", bundle, code=2, match="--prompt")
    refused("run", bundle, "-p", "x", "-a", "nope", code=2, match="has no adapter 'nope'", run=fresh)
    refused("run", bundle, "-p", "x" * 600, code=2, match="do not fit the context of llama (512)")
    refused("run", bundle, "-p", "x", "--provider", "cuda", code=4, match="pip")
    for verb in (["run", bundle, "-p", "x"], ["parity", bundle], ["bench", bundle]):
        refused(*verb, "--provider", "tensorrt", code=4, match="use --provider cuda, or build an engine: reft-export build")
    refused("run", bundle, "-p", "x", "--kernel", ":x:", code=2, match="--kernel ':x:' is unknown")  # no emoji
    refused("run", bundle, "-p", "x", "--kernel", "magic", code=2, match="--kernel 'magic' is unknown")
    refused("run", bundle, "-p", "x", "--system", "be kind", code=2, match="chat template")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "fine"}\n{"prompt": 3}\n')
    refused("run", bundle, "--prompts", broken, code=2, match="broken.jsonl:2: ")
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    data = copy / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    refused("run", copy, "-p", "x", code=2, match="truncated")


def test_run_without_tokenizer(bundle_folder, tmp_path) -> None:
    copy = Path(shutil.copytree(bundle_folder("llama"), tmp_path / "copy"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
        reseal(copy, lambda manifest, name=name: manifest["files"].pop(name))
    refused("run", copy, "-p", "x", code=2, match="tokenizer.json is missing")


def test_upgrade(adapter_folders, tmp_path) -> None:
    """In place, then there is nothing left to do; what was changed is refused by name, and nothing is written."""
    folder = Path(shutil.copytree(adapter_folders("llama", ("tied",))[0], tmp_path / "tied"))
    as_version_1(folder)
    done = fresh("inspect", folder)
    note = f"{folder}/adapter.json: version 1, without digests; `reft-export upgrade {folder}` writes version 2\n"
    assert done.returncode == 0 and "version: 1, without digests" in done.stdout and done.stderr == note
    done = fresh("upgrade", folder)
    assert (done.returncode, done.stdout) == (0, f"{folder}: the adapter, version 2, every hash checked\n"), done.stderr
    assert "version: 2, digest " in cli("inspect", folder).stdout
    done = cli("upgrade", folder, "-o", tmp_path / "other")
    assert done.returncode == 0 and "is of version 2 already" in done.stdout and not (tmp_path / "other").exists()
    assert json.loads(cli("upgrade", folder, "--json").stdout) == {"kind": "adapter", "written": None}
    before = (folder / "adapter.json").read_text()
    (folder / "adapter.json").write_text(before.replace('"rank": 4', '"rank": 5'))
    for verb in ("upgrade", "inspect"):
        refused(verb, folder, code=2, match="adapter.json was changed after it was written")
    refused("upgrade", tmp_path, code=2, match="is not an adapter folder")


def test_parity_exit_codes(bundle_folder, base_folder, tmp_path) -> None:
    """0 and a table when it passes; 3 and the report all the same when golden arrays are perturbed."""
    import numpy as np

    from runtimes.files.hashes import sha256_of

    done = fresh("parity", bundle_folder("llama"), "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["passed"]
    copy = Path(shutil.copytree(bundle_folder("llama"), tmp_path / "copy"))
    golden = copy / "golden" / "tied.npz"
    with np.load(golden) as arrays:
        changed = dict(arrays)
    for name in ("logits", "best_logits", "logsumexp"):
        changed[name] = changed[name] + changed[name].dtype.type(1e-3)
    np.savez_compressed(golden, **changed)
    seal = {"sha256": sha256_of(golden), "size": golden.stat().st_size}
    reseal(copy, lambda manifest: manifest["files"].update({"golden/tied.npz": seal}))
    done = cli("parity", copy, "--report", tmp_path / "report.json")
    assert done.returncode == 3
    assert "FAIL" in done.stdout and done.stderr.startswith("error: ") and "budget" in done.stderr
    assert not json.loads((tmp_path / "report.json").read_text())["passed"]
    refused("parity", copy, "-m", base_folder("qwen2"), code=2, match="pass the base it was made from")


def test_train_export_fold(base_folder, bundle_folder, tmp_path) -> None:
    """The verbs in a row, and fold on the plain graph that another tool would have made."""
    import onnx_ir as ir

    from graph_passes.external import load_graph
    from graph_passes.unfold import unfold_graph

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": "yes"}) + "\n" for i in range(8)))
    trained = fresh(
        "train", "-m", base_folder("llama"), "-d", data, "-o", tmp_path / "yes", "--max-steps", 3, "--positions", "l1", "--layers", "1"
    )
    assert trained.returncode == 0, trained.stderr
    assert "loss" in trained.stdout
    graph = load_graph(bundle_folder("llama") / "model.onnx")
    assert unfold_graph(graph) > 0
    (tmp_path / "plain").mkdir()
    ir.save(graph, tmp_path / "plain" / "decoder.onnx", external_data="decoder.data")
    shutil.copy(base_folder("llama") / "tokenizer.json", tmp_path / "plain")
    folded = fresh("fold", tmp_path / "plain", "-a", tmp_path / "yes", "-o", tmp_path / "folded")
    assert folded.returncode == 0, folded.stderr
    answer = cli("run", tmp_path / "folded", "-p", "say 3", "-a", "yes", "-n", 8)
    assert answer.returncode == 0 and answer.stdout
    ladder = cli("parity", tmp_path / "folded", "-m", base_folder("llama"))
    assert ladder.returncode == 0, ladder.stderr
    for path in (tmp_path / "yes", tmp_path / "folded", tmp_path / "plain", tmp_path / "folded" / "adapters" / "yes.onnx_adapter"):
        shown = (fresh if path.name == "folded" else cli)("inspect", path)
        assert shown.returncode == 0 and shown.stdout, shown.stderr
        json.loads(cli("inspect", path, "--json").stdout)
    refused("inspect", tmp_path / "data.jsonl", code=2, match="is not an adapter folder")


def test_train_refusals(base_folder, tmp_path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", \n')
    model, output = base_folder("llama"), tmp_path / "out"
    refused("train", "-m", model, "-d", data, "-o", output, code=2, match="data.jsonl:2: not JSON")
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    refused("train", "-m", model, "-d", data, "-o", output, "--layers", "31", code=2, match="layer 31 does not exist")
    refused("train", "-m", model, "-d", data, "-o", output, "--positions", "g3", code=2, match="positions 'g3'")
    refused("train", "-m", tmp_path, "-d", data, "-o", output, code=2, match="config.json is missing")
    refused("train", "-m", "no/such-model", "-d", data, "-o", output, code=2, match="no/such-model", run=fresh)
    form = ("train", "-m", model, "-d", data, "-o", output)
    refused(*form, "--distill-system", "sytem.txt", code=2, match="--distill-system sytem.txt is not a file")
    refused(*form, "--max-new-tokens", 9, code=2, match="--max-new-tokens is for answers that --distill-system gives; leave it out")
    refused(*form, "--beta", 1, code=2, match="--beta is of --objective dpo or orpo; leave it out")
    refused(*form, "--objective", "dpo", code=2, match="data.jsonl:1: lacks ['chosen', 'rejected']")
    refused(*form, "--kl-weight", -1, code=2, match="kl_weight is -1")
    assert not output.exists()
    data.write_text('{"prompt": "what is it?", "completion": "b"}\n')
    planned = cli(*form, "--distill-system", "Be brief.", "--kl-weight", 1, "--dry-run")
    assert "compute what the base says without the edits" in planned.stdout and "answer" not in planned.stdout, planned
    data.write_text('{"prompt": "what is it?", "chosen": "a", "rejected": "b"}\n')
    planned = cli(*form, "--objective", "dpo", "--dry-run")
    assert "compute what the base says without the edits" in planned.stdout and "1 preference" in planned.stdout, planned
    data.write_text('{"prompt": "what is it?"}\n' * 3)
    planned = cli(*form, "--distill-system", "Be brief.", "--max-new-tokens", 9, "--dry-run")
    assert "answer 3 prompts with the system prompt, at most 9 tokens each" in planned.stdout, planned


@pytest.mark.slow
def test_train_on_a_bundle_and_refit(base_folder, bundle_folder, adapter_folders, tmp_path) -> None:
    """train --base, the adapter put into the bundle, and its refit with every figure of the report."""
    model, bundle, data = base_folder("llama"), bundle_folder("llama", "int4"), tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": "yes"}) + "\n" for i in range(8)))
    started = adapter_folders("llama", ("tied",))[0]
    done = cli("train", "--base", bundle, "--start", started, "-m", model, "-d", data, "-o", tmp_path / "on", "--max-steps", 3)
    assert done.returncode == 0 and f"{tmp_path / 'on'}: loreft, rank 4, 2 sites" in done.stdout, done.stderr
    digest = json.loads(cli("inspect", bundle, "--json").stdout)["digest"]
    assert json.loads(cli("inspect", tmp_path / "on", "--json").stdout)["trained on"] == digest
    put = cli("quantize", bundle, "-m", model, "-a", tmp_path / "on", "-o", tmp_path / "put", "--json")
    assert put.returncode == 0 and json.loads(put.stdout)["adapters"][-1] == "on", put.stderr
    assert cli("run", tmp_path / "put", "-p", "say 3", "-a", "on", "-n", 4).returncode == 0

    text, checker = tmp_path / "text.txt", tmp_path / "judge.py"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 3)
    checker.write_text("def judge(prompt, answer):\n    return 'e' in answer\n\ndef broken(prompt, answer):\n    return 'yes'\n")
    asked = ("--refit", data, "-a", started, "--refit-steps", 5, "--perplexity", text, "--checker-data", data, "--checker-tokens", 8)
    shown = fresh("quantize", bundle, "-m", model, "-o", tmp_path / "re", *asked, "--checker", f"{checker}:judge")  # with its wide table
    assert shown.returncode == 0, shown.stderr
    assert "int4 + refit" in shown.stdout and "ppl" in shown.stdout and "refit of tied: 5 steps" in shown.stdout
    report = json.loads((tmp_path / "re.quantization.json").read_text())
    assert [v["name"] for v in report["variants"]] == ["int4", "int4 + refit"] and report["refits"][0]["adapter"] == "tied"
    assert all(0 <= v["success"] <= 1 and v["perplexity"] > 1 for v in report["variants"])
    assert (tmp_path / "re.quantization.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "re.adapters" / "tied" / "adapter.json").is_file()

    wrong = ("quantize", bundle, "-m", model, "-o", tmp_path / "no", *asked)
    refused(*wrong, "--checker", f"{checker}:broken", code=2, match="returned 'yes' for the prompt of")
    refused(*wrong, "--checker", f"{checker}:nothing", code=2, match="has no nothing")
    refused(*wrong, "--checker", f"{checker}:judge", "-p", "int8", code=2, match="keeps its graph, so --precision would do nothing")
    refused(*wrong, code=2, match="--checker and --checker-data go together", run=fresh)
    refused("train", "--base", bundle_folder("llama"), "-m", model, "-d", data, "-o", tmp_path / "no", code=2, match="train without --base")
    refused("train", "--start", started, "--rank", 9, "-m", model, "-d", data, "-o", tmp_path / "no", code=2, match="is loreft, rank 4")
    refused("quantize", bundle_folder("llama"), "-m", model, "-a", tmp_path / "on", "-o", tmp_path / "no", code=2, match="on")
    assert not (tmp_path / "no").exists()


def test_orthogonal_adapters_in_one(base_folder, adapter_folders, tmp_path) -> None:
    """train --orthogonal-to says what is left of overlap and interaction, and compose sees the same."""
    model, data = base_folder("llama"), tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"say {i}", "completion": "yes"}) + "\n" for i in range(8)))
    there = adapter_folders("llama", ("tied",))[0]
    sites = json.loads(cli("inspect", there, "--json").stdout)["sites"]
    layers = ";".join(site.partition(".")[0] for site in sites)
    form = ("-m", model, "-d", data, "--rank", 2, "--layers", layers, "--positions", "f2+l2", "--max-steps", 3, "--samples", 0)
    done = cli("train", *form, "-o", tmp_path / "new", "--orthogonal-to", f"there={there}", "--json")
    assert done.returncode == 0, done.stderr
    left = json.loads(done.stdout)["orthogonal_to"]["there"]
    assert left["sites"] == len(sites) and left["overlap"] < 1e-6 and left["interaction"] < 1e-6
    shown = fresh("compose", there, tmp_path / "new", "-o", tmp_path / "both", "--json")
    assert shown.returncode == 0, shown.stderr
    assert all(each["overlap"]["interaction"] < 1e-6 for each in json.loads(shown.stdout)["meetings"])
    said = cli("train", *form, "-o", tmp_path / "again", "--orthogonal-to", there)
    assert re.search(r"tied: overlap \S+e-\d+, interaction \S+e-\d+ at \d shared sites", said.stdout), said.stdout
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (tmp_path / "new" / "adapter.safetensors").read_bytes()
    again = ("train", *form, "-o", tmp_path / "no", "--orthogonal-to", there)
    refused(*again, "--start", tmp_path / "new", code=2, match="--orthogonal-to is for an adapter that begins anew")
    refused(*again, "--method", "red", code=2, match="--rank 2 does not apply to red")
    other = adapter_folders("gpt2", ("tied",))[0]
    refused("train", *form, "-o", tmp_path / "no", "--orthogonal-to", other, code=2, match="adapter tied was trained on gpt2")
    assert not (tmp_path / "no").exists()


def test_export_refusals_and_dry_run(base_folder, tmp_path) -> None:
    refused("export", "-m", base_folder("llama"), "-o", tmp_path / "b", "-p", "int3", code=2, match="precision 'int3' is unknown")
    refused("export", "-m", base_folder("llama"), "-a", tmp_path, "-o", tmp_path / "b", code=2, match="adapter.json is missing")
    refused("export", "-m", base_folder("llama"), "-o", tmp_path / "b", "--sites", "9", code=2, match="layer 9 does not exist")
    (tmp_path / "file").write_text("")
    refused("export", "-m", base_folder("llama"), "-o", tmp_path / "file", code=2, match="is a file")
    done = cli("export", "-m", base_folder("llama"), "-o", tmp_path / "b", "-p", "int4", "--dry-run")
    assert done.returncode == 0 and "M parameters" in done.stdout
    assert not (tmp_path / "b").exists()


def test_ctrl_c_in_mid_export(base_folder, tmp_path) -> None:
    """SIGINT to the process while it exports: 130, one line, nothing left behind."""
    command = [sys.executable, "-m", "reft_export.cli.main", "export", "-m", str(base_folder("llama")), "-o", str(tmp_path / "b")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".b.*.partial")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1].startswith("error: interrupted")
    assert "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyError("[/x] \\[red]"), 1, "KeyError: '[/x] \\\\[red]'; this is a bug of reft-export: run it again with --debug"),
        (ValueError("two\nlines" * 1000), 1, "ValueError: two lines"),
        (UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"), 1, "UnicodeEncodeError: 'utf-8' codec"),
        (RecursionError("maximum recursion depth"), 2, "what was read is nested too deeply"),
        (type("PanicException", (BaseException,), {})("a panic"), 1, "PanicException: a panic; this is a bug"),
        (RuntimeError("basic_ios::clear: iostream error"), 1, "no space left on the disk, or for so large a file"),
        (sqlite3.OperationalError("database or disk is full"), 1, "no space left on the disk, or for so large a file"),
        (OSError(errno.EFBIG, "File too large"), 1, "no space left on the disk, or for so large a file (ulimit -f); no output"),
        (MemoryError(), 1, "out of memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 1, "out of memory"),
        (InputError("no"), 2, "no"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_no_traceback_unless_it_is_asked_for(error, code, said) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @guarded
    def verb() -> None:
        raise error

    done = CliRunner().invoke(app, [])
    assert (done.exit_code, done.stdout) == (code, "") and done.stderr.startswith(f"error: {said}"), done.stderr
    assert len(done.stderr.splitlines()) == 1 and len(done.stderr) < 500
    shown = CliRunner().invoke(app, ["--debug"])
    assert shown.exit_code == code and shown.stderr.startswith("Traceback (most recent call last):"), shown.stderr
    assert shown.stderr.endswith(done.stderr)


@pytest.mark.parametrize("arguments", [("run", "B", "-p", "caf\udce9"), ("inspect", "caf\udce9"), ("train", "-d", "caf\udce9")])
def test_arguments_that_are_no_text(arguments) -> None:
    refused(*arguments, code=2, match=r"argument 'caf\udce9' is not UTF-8")


def test_nothing_steers_the_terminal(monkeypatch) -> None:
    """Nor do names take part in the markup of a title."""
    hostile = "[/x] \x1b[2J\x9b31m\ud83d\x07[red]\rfine"
    shown = io.StringIO()
    monkeypatch.setattr(console, "out", console.LazyConsole(stderr=False))
    with redirect_stdout(shown):
        console.print_table(hostile, (hostile, "note"), [(hostile, hostile)])
        console.out.print(hostile, markup=False)
        console.out.print(f"[bold]{escape(hostile)}[/]")
    text = shown.getvalue()
    assert text.count("[/x] [2J31m\ufffd[red]fine") == 6 and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text), text


SLOW_VERB = """
import sys, time
from pathlib import Path
import typer
from reft_export.cli.guard import guarded
from runtimes.files.folders import atomic_folder
app = typer.Typer(pretty_exceptions_enable=False)
@app.command()
@guarded
def write(output: Path):
    with atomic_folder(output) as work:
        (work / "weights").write_text("much")
        print("writing", flush=True)
        time.sleep(60)
app()
"""


@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated"), (signal.SIGHUP, "hung up")])
def test_signals_clean_up(number, said, tmp_path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_VERB, str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, number, signal.SIG_DFL),  # nohup and the like have it ignored by every child
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (128 + number, f"error: {said}\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["fold", pytest.param("export", marks=pytest.mark.slow)])
def test_full_disk(verb, base_folder, bundle_folder, adapter_folders, tmp_path) -> None:
    """A real full file system, in a mount namespace of its own."""
    mount = tmp_path / "small"
    mount.mkdir()
    if verb == "fold":
        arguments = (
            f"{save_foreign(bundle_folder('llama', target='tensorrt'), tmp_path / 'plain')} -a {adapter_folders('llama', ('tied',))[0]}"
        )
    else:
        arguments = f"-m {base_folder('llama')}"
    unshare = ["unshare", "--user", "--map-root-user", "--mount"] if os.geteuid() else ["unshare", "--mount"]
    command = f"{sys.executable} -m reft_export.cli.main {verb} {arguments} -o {mount}/b"
    script = f"mount -t tmpfs -o size=400k none {mount} && {{ {command}; code=$?; ls -A {mount}; exit $code; }}"
    try:
        probe = subprocess.run([*unshare, "sh", "-c", f"mount -t tmpfs -o size=400k none {mount}"], capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if probe.returncode:
        pytest.skip("this machine allows no mount namespaces")
    done = subprocess.run([*unshare, "sh", "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout == "", "nothing is left on the full disk"
    assert "no space left" in done.stderr and "Traceback" not in done.stderr


def test_doctor_and_bench(bundle_folder, tmp_path: Path) -> None:
    rows = json.loads(fresh("doctor", "--json").stdout)
    assert {"reft-export", "onnxruntime", "machine", "CUDA driver", "providers", "edit kernel", "memory left"} <= {r["what"] for r in rows}
    done = fresh("bench", bundle_folder("llama"), "--prompt-tokens", 16, "--new-tokens", 4, "--repeats", 2, "--json")
    result = json.loads(done.stdout)
    adapters = json.loads((bundle_folder("llama") / "manifest.json").read_text())["adapters"]
    assert [m["name"] for m in result["measurements"]] == ["base", *adapters]
    assert result["peak_memory"] > 0 and result["measurements"][1]["decode_ratio"] > 0
    alone = json.loads(cli("bench", bundle_folder("llama"), "--op", "-a", "tied", "--json").stdout)
    options = ("--adapters", 5, "--concurrency", 3, "--prompt-tokens", 8, "--new-tokens", 4, "--repeats", 1)
    batch = json.loads(cli("bench", bundle_folder("llama"), *options, "--json", "--plot", tmp_path / "batch.png").stdout)
    assert [m["name"] for m in batch["measurements"]] == ["base", "tied", "5 adapters"] and (tmp_path / "batch.png").stat().st_size > 5000
    assert [m["ratio"] is None for m in batch["measurements"]] == [True, False, False] and batch["bank_factor"] >= 1
    refused("bench", bundle_folder("llama"), "--plot", tmp_path / "x.png", code=2, match="draws concurrent requests; give --concurrency")
    refused("bench", bundle_folder("llama"), "--concurrency", 2, "--plot", tmp_path / "x.txt", code=2, match="no .png, .svg, .pdf file")
    refused("bench", bundle_folder("llama"), "--adapters", 2, "-a", "tied", code=2, match="--adapters is how many are mixed")
    refused("bench", bundle_folder("llama"), "--op", "--repeats", 2, code=2, match="--repeats is a whole model's")
    refused("bench", bundle_folder("llama"), "--op", "-a", "tied", "-a", "untied", code=2, match="2 are given; give one -a")
    assert len(alone["nodes"]) == 5 and all(n["function"] is not None for n in alone["nodes"])


def test_quickstart_refuses_an_existing_folder(tmp_path) -> None:
    (tmp_path / "x").write_text("mine")
    refused("quickstart", "-o", tmp_path, code=2, match="--force")
    assert (tmp_path / "x").read_text() == "mine"


def test_wrong_base_of_a_folded_graph_is_refused(base_folder, bundle_folder, adapter_folders, tmp_path) -> None:
    """The graph does not say where it came from; the adapter does, as soon as a base is at hand."""
    import onnx_ir as ir

    from graph_passes.external import load_graph
    from graph_passes.unfold import unfold_graph

    graph = load_graph(bundle_folder("llama") / "model.onnx")
    unfold_graph(graph)
    (tmp_path / "plain").mkdir()
    ir.save(graph, tmp_path / "plain" / "model.onnx", external_data="model.onnx.data")
    done = cli("fold", tmp_path / "plain", "-a", adapter_folders("gpt2", ("tied",))[0], "-o", tmp_path / "folded")
    assert done.returncode == 0 and "fingerprints are not checked" in done.stdout
    refused("parity", tmp_path / "folded", "-m", base_folder("llama"), code=2, match="adapter tied was trained on gpt2", run=fresh)
    refused("fold", tmp_path / "plain", "-o", tmp_path / "folded" / "sub", code=2, match="lies inside")


def test_tables_fit_a_terminal(bundle_folder) -> None:
    bundle = bundle_folder("llama")
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "reft_export.cli.main", "parity", bundle.name]  # a path is as long as it is
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=bundle.parent)
    assert done.returncode == 0 and "…" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_prompts_are_checked_before_the_first_answer(bundle_folder, tmp_path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a\u2028b"}] * 9 + [{"prompt": "x" * 600}]
    prompts.write_text("\ufeff" + "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    refused("run", bundle_folder("llama"), "--prompts", prompts, code=2, match="prompts.jsonl:10: 600 tokens")
    refused("parity", bundle_folder("llama"), "--report", tmp_path / "no" / "x.json", code=2, match="its folder does not exist")


@given(st.text(alphabet="\\[]/a1= "))
@example(r"Add\[/x]62")
@example(r"a\\[1] [1, 2] \[")
def test_names_out_of_files_are_no_markup(text: str) -> None:
    assert render(escape(text), emoji=False).plain == text
