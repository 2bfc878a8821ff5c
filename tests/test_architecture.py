"""The rooms and who may import whom, held by the syntax tree rather than by habit."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("runtimes", "graph_passes", "calibration", "reft_export")
"""A room imports only rooms to its left."""
OUTSIDE = {
    "runtimes": {"numpy", "ml_dtypes", "safetensors", "tokenizers", "jinja2"},
    "graph_passes": {"numpy", "ml_dtypes", "onnx_ir", "onnx", "onnxscript", "google"},
    "calibration": {"numpy", "ml_dtypes", "onnx_ir", "onnx", "onnxruntime"},
}
BACKENDS = {
    "onnxruntime": ("ort/", "artifacts/ort_adapter_file.py"),
    "tensorrt": ("tensorrt/",),
    "tensorrt_rtx": ("tensorrt/",),
    "cuda": ("tensorrt/",),
}
"""A backend is imported only by its own folder of runtimes; onnxruntime also writes and reads its own adapter files."""
BOTTOM_TO_TOP = {
    "runtimes": "errors version precision native_library native files edits artifacts text session ort tensorrt generation parity tasks "
    "golden bench open first_steps",
    "graph_passes": "accessors graph_file function_body find external cache_shapes head slots insert unfold tensorrt_graph fold edge_llm",
    "reft_export": "console base eager evaluation tasks bundling training importing parity exporting folding quantizing building "
    "quickstart forecast op_bench cli",
}
"""Folders, and files beside them: each imports itself and those that are named before it."""


def _modules() -> list[Path]:
    return [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def _imports(path: Path) -> set[str]:
    """Top-level names of everything the file imports, at its head or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} uses a relative import"
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("path", _modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_left(path: Path) -> None:
    import sys

    room = path.relative_to(ROOT).parts[0]
    imports = _imports(path) - set(sys.stdlib_module_names)
    rooms = {name for name in imports if name in ROOMS}
    assert rooms <= set(ROOMS[: ROOMS.index(room) + 1]), f"{path} imports a room to its right"
    if room in OUTSIDE:
        inside = path.relative_to(ROOT / room).as_posix()
        backends = {name for name, where in BACKENDS.items() if room == "runtimes" and inside.startswith(where)}
        assert imports - set(ROOMS) <= OUTSIDE[room] | backends


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _graph() -> dict[str, set[str]]:
    """Who imports whom among all modules: at their heads, inside functions, and for types alone."""
    known = {_name(path): path for path in _modules()}
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= (full & set(known)) | ({node.module} & set(known) if full - set(known) else set())
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & set(known)
    return graph


def test_only_the_command_line_imports_the_command_line() -> None:
    cli = "reft_export.cli"
    above = {name: found for name, targets in _graph().items() if (found := {t for t in targets if t.startswith(cli)})}
    assert not {name: found for name, found in above.items() if not name.startswith(cli)}


@pytest.mark.parametrize("room", BOTTOM_TO_TOP)
def test_no_import_runs_up(room: str) -> None:
    order = BOTTOM_TO_TOP[room].split()
    graph = {name: targets for name, targets in _graph().items() if name.startswith(f"{room}.")}
    assert {name.split(".")[1] for name in graph} == set(order), "a folder or file has no place in the order"
    up = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in targets
        if target.startswith(f"{room}.") and order.index(target.split(".")[1]) > order.index(name.split(".")[1])
    ]
    assert not up


def test_no_module_imports_in_a_circle() -> None:
    tuple(TopologicalSorter(_graph()).static_order())  # raises CycleError, which names the circle


WITHOUT_TORCH = (
    "reft_export.exporting.plan", "reft_export.exporting.export", "reft_export.forecast", "reft_export.tasks.task",
    "reft_export.base.adapters", "reft_export.bundling.files", "reft_export.cli.export",
)  # fmt: skip
"""What refuses an export, and forecasts it: each imports its heavy half inside the functions that need it."""


def _heads(path: Path) -> set[str]:
    """Modules that the file imports when it is imported."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_refusals_import_no_torch(module: str) -> None:
    files = {_name(path): path for path in _modules()}
    reached, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name in files and name not in reached:
            reached.add(name)
            todo += _heads(files[name])
        assert name.partition(".")[0] not in ("torch", "transformers"), f"{module} reaches {name}"


def test_the_task_is_asked_for_by_name_in_one_place_a_room() -> None:
    """Everything else asks tasks/task.py; base/ decides which one it is."""
    rooms = {"tasks", "exporting", "bundling", "parity"}
    tells = {"is_classifier", "TEXT_CLASSIFICATION", "TEXT_GENERATION"}
    where = {"tasks/generation.py", "tasks/classification.py", "exporting/routes.py"}
    for path in _modules():
        inside = path.relative_to(ROOT).as_posix().removeprefix("reft_export/")
        if inside.partition("/")[0] in rooms and inside not in where:
            used = {node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
            assert not used & tells, path


def test_the_product_knows_nothing_of_its_tests() -> None:
    """The evidence and its models stand among the tests, with which they share the path."""
    names = {path.stem for path in (ROOT / "tests").iterdir() if path.is_dir() or path.suffix == ".py"} - set(ROOMS)
    assert not {str(path): found for path in _modules() if (found := _imports(path) & names)}


def test_no_catch_all_modules() -> None:
    assert not [p for p in _modules() if p.stem in ("utils", "common", "helpers", "misc")]


def test_top_level_is_as_agreed() -> None:
    import subprocess

    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    if listed == [""]:
        pytest.skip("not a git checkout")
    top = {name.partition("/")[0] for name in listed if name}
    files = {"pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "LICENSE", ".gitignore"}
    assert top <= {*ROOMS, "tests", "docs", "examples", ".ci", *files}
