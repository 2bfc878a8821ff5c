"""The public functions of ``reft_export`` and ``runtimes``: found lazily, documented, and enough for a whole program."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import tiny

import reft_export
import runtimes

ROOT = Path(__file__).parent.parent
API = {
    reft_export: {
        "add_adapter",
        "build_engine",
        "check_parity",
        "compose_adapters",
        "export_bundle",
        "fold_bundle",
        "get_steered_model",
        "import_adapter",
        "load_base",
        "quantize_bundle",
        "remove_adapter",
        "steer_adapter",
        "steered",
        "sweep",
        "train",
    },
    runtimes: {"check_golden", "generate", "open_artifact", "open_bank", "open_batcher", "open_session", "upgrade_folder"},
}
FUNCTIONS = [(package, name) for package, names in API.items() for name in sorted(names)]
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "numpy", "ml_dtypes", "safetensors", "tokenizers"}


def _loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, cwd=ROOT)
    return set(run.stdout.split())


@pytest.mark.parametrize("package", ["runtimes", "reft_export"])
def test_importing_a_package_imports_nothing_else(package: str) -> None:
    statement = f"import {package}; dir({package}); assert {package}.__all__; hasattr({package}, 'no_such_name')"
    assert not _loaded_by(statement) & HEAVY


def test_parity_by_golden_arrays_needs_no_framework() -> None:
    heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime"}
    assert not _loaded_by("from reft_export import check_parity; from runtimes import check_golden, generate, open_session") & heavy


@pytest.mark.parametrize("package", API, ids=lambda p: p.__name__)
def test_the_names_are_told_everywhere(package: object) -> None:
    """``__all__``, ``dir``, the homes that are imported at first use, and the imports that type checkers read."""
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    homes = {alias.name: node.module for node in typed.body for alias in node.names}
    assert set(package.__all__) == API[package] and len(package.__all__) == len(API[package])
    assert homes == package._HOMES
    assert set(homes) == API[package] <= set(dir(package))
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'no_such_name'"):
        package.no_such_name  # noqa: B018


@pytest.mark.parametrize("package", API, ids=lambda p: p.__name__)
def test_no_module_takes_a_functions_name(package: object) -> None:
    """The import system sets a submodule on its package, and would so replace the function, but only once somebody imports it."""
    assert not {module.name for module in pkgutil.iter_modules(package.__path__)} & API[package]


@pytest.mark.parametrize(("package", "name"), FUNCTIONS, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_every_name_is_its_rooms_own_function_with_an_example_that_can_be_called(package: object, name: str) -> None:
    function = getattr(package, name)
    assert function is getattr(importlib.import_module(package._HOMES[name]), name)
    assert inspect.isfunction(function) and function.__name__ == name

    text = inspect.getdoc(function)
    assert "Raises" in text
    calls = _calls(dedent(text.partition("Example::\n")[2]))
    assert name in {call.func.id for call in calls}, "the example does not call the function"
    for call in calls:
        home = next((p for p, names in API.items() if call.func.id in names), None)
        if home is not None:  # raises TypeError for an argument that the function does not take, or lacks
            inspect.signature(getattr(home, call.func.id)).bind(*call.args, **{k.arg: k.value for k in call.keywords})


def _calls(code: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]


@pytest.mark.parametrize("package", ["runtimes", "graph_passes", "calibration", "reft_export"])
def test_type_checkers_are_told_that_the_package_is_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_a_program_from_a_base_to_its_steered_answers(tmp_path: Path) -> None:
    import torch

    from reft_export import check_parity, export_bundle, load_base, train
    from reft_export.exporting.export import ExportSettings
    from reft_export.training.settings import TrainSettings
    from runtimes import check_golden, generate, open_artifact, open_session
    from runtimes.generation import GenerationSettings
    from runtimes.text.tokenizer import Tokenizer

    torch.set_num_threads(1)
    folder, data = tiny.save_base(tmp_path / "base"), tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"Count {n}: ", "completion": "aye aye"}) for n in range(8)), encoding="utf-8")

    settings = TrainSettings(layers="0;2", max_steps=20, lr=0.05, samples=0, device="cpu", positions="all")
    trained = train(load_base(folder), data, settings, tmp_path / "sailor")
    assert trained.history[-1].loss < trained.history[0].loss

    exported = export_bundle(str(folder), [tmp_path / "sailor"], tmp_path / "bundle", ExportSettings(), report=lambda _: None)
    assert exported.manifest.adapters == ("sailor",)

    artifact = open_artifact(tmp_path / "bundle")
    tokenizer = Tokenizer.load(artifact.folder, artifact.manifest.model)
    with open_session(artifact, threads=1) as session:
        answers = {}
        for adapter in (None, "sailor"):
            session.set_adapter(adapter)
            answers[adapter] = generate(session, tokenizer, ["Count 3: "], GenerationSettings(max_new_tokens=8))[0].text
        assert answers["sailor"] != answers[None]
        report = check_golden(artifact, session)
    assert report.passed
    assert check_parity(tmp_path / "bundle", report=lambda _: None).rungs == report.rungs
