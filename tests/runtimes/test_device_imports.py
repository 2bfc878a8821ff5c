"""The device's modules load without any framework; onnxruntime only with its session."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from toy_bundle import write_toy_bundle

from reft_export.cli.main import VERBS

FRAMEWORKS = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
BACKENDS = ("tensorrt", "tensorrt_rtx", "cuda")
MODULES = ("text.tokenizer", "text.chat", "native_library", "generation", "parity.figures", "golden", "bench", "open", "tensorrt.session")
"""An engine's device needs no onnxruntime."""


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, cwd=root)
    return set(run.stdout.split())


@pytest.mark.parametrize("module", MODULES)
def test_no_framework_is_imported(module: str) -> None:
    assert not loaded_by(f"import runtimes.{module}") & {*FRAMEWORKS, *BACKENDS}


def test_the_session_imports_onnxruntime_alone() -> None:
    assert loaded_by("import runtimes.ort.session") & set(FRAMEWORKS) == {"onnxruntime"}


def test_a_verb_is_all_of_the_command_line_that_an_answer_imports(tmp_path: Path) -> None:
    bundle = write_toy_bundle(tmp_path / "bundle")
    arguments = ["reft-export", "run", str(bundle.folder), "-p", "Hi", "-n", "1"]
    loaded = loaded_by(
        f"sys.argv = {arguments}\nfrom reft_export.cli.main import main\ntry: main()\nexcept SystemExit as e: assert not e.code"
    )
    assert "reft_export.cli.answer" in loaded
    assert loaded & set(VERBS.values()) == {"reft_export.cli.run"}
    assert not loaded & {"rich.console", "numpy.random", "runtimes.golden", "runtimes.bench"}


def test_without_onnxruntime_the_session_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from runtimes.errors import BackendUnavailable\n"
        "try:\n    import runtimes.ort.session\nexcept BackendUnavailable as e:\n    print(e.exit_code, e)"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, cwd=root)
    assert run.stdout.startswith("4 onnxruntime is not installed; pip install onnxruntime")
