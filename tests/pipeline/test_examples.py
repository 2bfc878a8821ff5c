"""The programs of ``examples/``, run as they stand: what each prints is what it is there to show."""

from __future__ import annotations

import inspect
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch

import reft_export
import runtimes
from reft_export.quickstart import base_path
from runtimes.edits.adapter import load_adapter
from runtimes.generation import GenerationSettings
from runtimes.rows import AdapterRows
from runtimes.text.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
PIRATE = re.compile(r"\b(arr|ahoy|aye|matey|hearties|scallywag|shipmate)\b", re.IGNORECASE)


def run(name: str, *arguments: object, cwd: Path) -> str:
    """What an example prints, in a process of its own."""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr
    return done.stdout


def run_here(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, cwd: Path) -> str:
    """The same in this process, which has torch already."""
    monkeypatch.chdir(cwd)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def answers(printed: str, *names: str) -> dict[str, str]:
    """What follows ``name: ``, up to the next name; an answer may have lines of its own."""
    either = "|".join(map(re.escape, names))
    parts = re.split(rf"(?m)^({either}): ", printed)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_example_is_short_and_is_run_here() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    for example in EXAMPLES.glob("*.py"):
        lines = example.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 60, example
        assert f'"{example.name}"' in tests, f"{example} is not run"


@pytest.mark.parametrize("name", ["stock_onnxruntime.py", "mixed_adapters.py", "stock_genai.py"])
def test_a_stock_runtime_imports_nothing_of_this_project(name: str) -> None:
    imported = re.findall(r"(?m)^(?:import|from) (\w+)", (EXAMPLES / name).read_text(encoding="utf-8"))
    assert imported and not {"runtimes", "graph_passes", "calibration", "reft_export"} & set(imported)


@pytest.mark.parametrize("name", ["device.py", "stock_onnxruntime.py"])
def test_a_device_answers_without_torch(name: str, bundle_folder, tmp_path: Path) -> None:
    bundle = bundle_folder("llama")
    names = ["base", *(path.stem for path in bundle.glob("adapters/*.onnx_adapter"))]
    printed = run(name, bundle, "Count 3: ", cwd=tmp_path)
    found = answers(printed.partition("imported of")[0], *names)
    assert set(found) == set(names)
    assert len(set(found.values())) > 1, "no adapter steers"
    if name == "device.py":
        assert "comparisons pass, on cpu" in printed
        assert printed.endswith("imported of torch, transformers, onnx: none\n")


def test_adapters_in_one_batch_answer_as_each_does_alone(bundle_folder, tmp_path: Path) -> None:
    """Tied and untied ones, of every kind of position; the base beside them. The batch decodes on where a row alone would stop."""
    bundle = bundle_folder("llama")
    names = ["base", *(path.stem for path in bundle.glob("adapters/*.onnx_adapter"))]
    alone, mixed = (answers(run(name, bundle, "Count 3: ", cwd=tmp_path), *names) for name in ("stock_onnxruntime.py", "mixed_adapters.py"))
    assert set(mixed) == set(names) and len(set(mixed.values())) > 1
    for name in names:
        length = min(len(alone[name]), len(mixed[name])) - 3  # the last token may end within a character
        assert length > 3 and mixed[name][:length] == alone[name][:length], name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where train_and_export.py ran, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("examples"), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        runpy.run_path(str(EXAMPLES / "train_and_export.py"), run_name="__main__")
    return folder, printed.getvalue()


@pytest.mark.slow
def test_an_adapter_is_trained_exported_and_run_by_every_runtime(trained, genai_installed) -> None:
    folder, printed = trained
    losses = [float(loss) for loss in re.findall(r"step \d+ of 120, loss (\S+)", printed)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert "MISS" not in printed and printed.count(", pass\n") == 8
    for line in re.findall(r"(?m)^  (?:base|steered) .*", printed):
        assert bool(PIRATE.search(line)) == line.startswith("  steered"), line
    said = [answers(run(name, cwd=folder), "base", "pirate") for name in ("device.py", "stock_onnxruntime.py", "stock_genai.py")]
    for found in said:
        assert PIRATE.search(found["pirate"]) and not PIRATE.search(found["base"])
        assert found["base"].split() == said[0]["base"].split(), "the runtimes disagree"


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [*(getattr(runtimes, name) for name in runtimes.__all__), reft_export.steered, reft_export.check_parity],
    ids=lambda f: f.__name__,
)
def test_the_example_of_a_docstring_runs(function, trained, tmp_path, monkeypatch) -> None:
    """Of the functions that need no more than a bundle and its base; test_api.py binds the arguments of the others."""
    for name, target in {"pirate": "pirate", "pirate-bundle": "bundle"}.items():
        (tmp_path / name).symlink_to(trained[0] / "examples-out" / target)
    (tmp_path / "base").symlink_to(base_path())
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "polite").symlink_to(tmp_path / "pirate")
    monkeypatch.chdir(tmp_path)
    public = {name: getattr(package, name) for package in (runtimes, reft_export) for name in package.__all__}
    also = {
        "np": np,
        "Path": Path,
        "Tokenizer": Tokenizer,
        "GenerationSettings": GenerationSettings,
        "load_adapter": load_adapter,
        "AdapterRows": AdapterRows,
    }
    ids = np.array([[5, 6, 7]] * 3) if function is runtimes.open_bank else torch.tensor([[5, 6, 7]])
    exec(dedent(inspect.getdoc(function).partition("Example::\n")[2]), {**public, **also, "ids": ids, "mask": ids * 0 + 1})


@pytest.mark.slow
def test_a_steering_vector_of_two_prompts_steers(tmp_path, monkeypatch, capsys) -> None:
    found = answers(run_here("steering_vector.py", monkeypatch, capsys, cwd=tmp_path), "base", "ahoy")
    assert PIRATE.search(found["ahoy"]) and not PIRATE.search(found["base"])


@pytest.mark.slow
def test_a_trainer_script_trains_and_exports(tmp_path, monkeypatch, capsys) -> None:
    printed = run_here("transformers_trainer.py", monkeypatch, capsys, cwd=tmp_path)
    losses = [float(loss) for loss in re.findall(r"'loss': '?([0-9.]+)", printed)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    found = answers(printed.partition("\nexported, and held")[0], "pirate", "base")
    assert PIRATE.search(found["pirate"]) and not PIRATE.search(found["base"])
    assert load_adapter(tmp_path / "examples-out" / "trainer-pirate").training["settings"]["positions"] == "f2+l2"


@pytest.mark.slow
def test_an_adapter_of_pyreft_answers_as_pyreft_did(tmp_path, monkeypatch, capsys) -> None:
    printed = run_here("from_pyreft.py", monkeypatch, capsys, cwd=tmp_path)
    assert "loreft of rank 4 at 1.block_output, 2.block_output" in printed
    away = {name: float(text.partition(" ")[0]) for name, text in answers(printed, "base", "from-pyreft").items()}
    assert away["from-pyreft"] < 2e-5 < 0.01 < away["base"]
