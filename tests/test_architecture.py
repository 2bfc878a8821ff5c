"""The rooms and who may import whom, held by the syntax tree rather than by habit."""

from __future__ import annotations

import ast
from collections.abc import Callable
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
    "llguidance": ("text/grammars.py",),
    **dict.fromkeys(("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"), ("serving/",)),
    "ray": ("serving/cluster.py",),
}
"""A backend is imported only by its own folder of runtimes, and so is what serves, and what holds answers to a schema; onnxruntime also
writes and reads its own adapter files. starlette and pydantic are fastapi's own."""
BOTTOM_TO_TOP = {
    "runtimes": "errors version bound_process machine precision native_library native files edits artifacts bank_files stacked bank rows "
    "text session memory kv_cache in_place ort tensorrt speculation generation prefixes batch_rows batching parity bench batch_bench "
    "tasks golden open conversation first_steps upgrade serving",
    "graph_passes": "accessors cumulative_sum shape_inputs graph_file function_body find external cache_shapes stored_cache fuse head "
    "tied_head slots first_logit insert unfold new_columns tensorrt_graph fold edge_llm",
    "reft_export": "console base composing eager evaluation tasks bundling training evaluating lm_eval contrasting sweeping importing "
    "parity folding adding quantizing exporting building packaging hub quickstart forecast op_bench bench_plot cli",
}
"""Folders, and files beside them: each imports itself and those that are named before it."""

LIGHT = (
    "reft_export.adding.add",
    "reft_export.building.build",
    "reft_export.composing.compose",
    "reft_export.evaluating.evaluate",
    "reft_export.exporting.export",
    "reft_export.folding.fold",
    "reft_export.forecast",
    "reft_export.importing.importer",
    "reft_export.quantizing.quantize",
    "reft_export.quantizing.swap",
    "reft_export.sweeping.folder",
    "reft_export.sweeping.settings",
    "reft_export.training.data",
)
"""What verbs call. They refuse what they can before they import what takes seconds."""


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


def _at_head(path: Path) -> set[str]:
    """Full names of what is imported when the file itself is: not inside functions, nor for types alone."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    body += [inner for node in body if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test) for inner in node.body]
    names = {alias.name for node in body if isinstance(node, ast.Import) for alias in node.names}
    for node in body:
        if isinstance(node, ast.ImportFrom):
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("entry", LIGHT)
def test_what_refuses_brings_no_framework(entry: str) -> None:
    known = {_name(path): path for path in _modules()}
    seen, left = {}, [(entry, "")]
    while left:
        name, by = left.pop()
        if name in known and name not in seen:
            seen[name] = by
            left += [(target, name) for target in _at_head(known[name])]
        assert name.partition(".")[0] not in ("torch", "transformers", "onnxruntime"), f"{by} imports {name}"


def test_no_module_imports_in_a_circle() -> None:
    tuple(TopologicalSorter(_graph()).static_order())  # raises CycleError, which names the circle


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


TASK_NAMES = {"TEXT_GENERATION", "TEXT_CLASSIFICATION", "text-generation", "text-classification"}
DEVICE_VERBS = [
    ROOT / "reft_export" / "cli" / f"{verb}.py" for verb in ("run", "answer", "converse", "classify", "parity", "bench", "inspect", "serve")
]


def _device_modules() -> list[Path]:
    return [*(ROOT / "runtimes").rglob("*.py"), *DEVICE_VERBS]


def _found(paths: list[Path], wanted: Callable[[ast.AST], bool]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if wanted(node)
    ]


def test_nothing_on_a_device_asks_which_task_it_is() -> None:
    """A table says what a task does, by the name that the manifest stores: runtimes/tasks/task.py, and the golden layouts."""

    def asks(node: ast.AST) -> bool:
        if not isinstance(node, ast.Compare):
            return False
        parts = list(ast.walk(node))
        names = {getattr(part, "id", getattr(part, "value", None)) for part in parts if isinstance(part, (ast.Name, ast.Constant))}
        equal = any(isinstance(op, (ast.Eq, ast.NotEq)) for op in node.ops)
        return bool(names & TASK_NAMES) or (
            equal and any(isinstance(p, ast.Attribute) and p.attr == "task" for p in [node.left, *node.comparators])
        )

    assert not _found([p for p in _device_modules() if p.parent != ROOT / "runtimes" / "tasks"], asks)


def test_a_bundle_and_an_engine_are_told_apart_where_they_are_opened() -> None:
    """They are siblings under Artifact, which has all that both have."""
    trees = [ast.parse((ROOT / "runtimes" / "artifacts" / f"{name}.py").read_text(encoding="utf-8")) for name in ("bundle", "engine")]
    bases = {
        node.name: [ast.unparse(base) for base in node.bases] for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)
    }
    assert bases["Bundle"] == bases["Engine"] == ["Artifact"]

    def tells(node: ast.AST) -> bool:
        if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("isinstance", "type"):
            return False
        return bool(
            {"Bundle", "Engine"} & {part.id for argument in node.args[1:] for part in ast.walk(argument) if isinstance(part, ast.Name)}
        )

    assert not _found([p for p in (ROOT / "runtimes").rglob("*.py") if p != ROOT / "runtimes" / "open.py"], tells)


def test_sessions_and_what_runs_them_have_types() -> None:
    """One protocol for each kind of session: nothing takes any object for one."""
    inside = ROOT / "runtimes"
    files = [inside / f"{name}.py" for name in ("session", "open", "generation", "golden", "bench", "first_steps")]
    folders = [path for folder in ("ort", "tasks", "parity") for path in (inside / folder).glob("*.py") if path.name != "figures.py"]
    paths = [*files, *folders, inside / "tensorrt" / "session.py"]
    assert not _found(paths, lambda node: isinstance(node, ast.Name) and node.id == "Any")


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


def test_one_folder_imports_optuna() -> None:
    found = {path for path in _modules() if _imports(path) & {"optuna", "sqlalchemy"}}
    assert found and all(path.parent == ROOT / "reft_export" / "sweeping" for path in found)
