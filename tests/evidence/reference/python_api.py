"""docs/python-api.md: the public functions and the classes of their signatures, read from the source text; nothing is imported.

Signatures and defaults stand as they are written, which no release of Python prints otherwise.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = {
    "reft_export": "The host's: trains, exports, folds, quantizes, builds. Needs the extra `host`.",
    "runtimes": "The device's: opens, runs and proves what the host made. Imports neither torch nor transformers nor onnx.",
}
HEAD = """# From Python

    $ python -c "import reft_export, runtimes; print(*reft_export.__all__, *runtimes.__all__, sep='\\n')"
    {names}

Written by `make docs` from the sources; do not edit this page. The functions are imported when they are first asked for; classes are
imported from the module that their heading names. Every error is a `ReftError` of `runtimes.errors`, whose message is one line.
Programs that use them: [examples](index.md#examples).
"""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Module:
    name: str
    text: str
    tree: ast.Module

    @classmethod
    def of(cls, name: str) -> Module:
        path = ROOT.joinpath(*name.split("."))
        text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
        return cls(name=name, text=text, tree=ast.parse(text))

    def header(self, function: Function) -> str:
        """Decorators and signature, as they are written."""
        first = min([function.lineno, *(each.lineno for each in function.decorator_list)])
        lines = self.text.splitlines()[first - 1 : function.body[0].lineno - 1]
        if function.body[0].lineno == function.lineno:  # def f() -> int: ...
            lines = [self.text.splitlines()[function.lineno - 1].rsplit(":", 1)[0] + ":"]
        return "\n".join(line[function.col_offset :] for line in lines).rstrip(":")

    def segment(self, node: ast.AST | None) -> str:
        return "" if node is None else " ".join((ast.get_source_segment(self.text, node) or "").split())

    def imported(self) -> dict[str, str]:
        """The module that each imported name is of, those imported for types alone among them."""
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, ast.ImportFrom)]
        return {alias.asname or alias.name: node.module or "" for node in nodes for alias in node.names}

    def definition(self, name: str) -> tuple[Module, ast.stmt] | None:
        """The class or function ``name``, here or in the module of ours that it is imported from; None for anything else."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef | Function) and node.name == name:
                return self, node
        home = self.imported().get(name, "")
        return Module.of(home).definition(name) if home.partition(".")[0] in PACKAGES or home.startswith("calibration.") else None


def page() -> str:
    parts, names, shown = [], [], set()
    for package, what in PACKAGES.items():
        homes = _homes(Module.of(package))
        names += homes
        parts.append(f"## {package}\n\n{what}\n")
        found = [_found(Module.of(home), name) for name, home in homes.items()]
        parts += [f"### {function.name}\n\n{_code(module.header(function))}\n\n{_prose(function)}\n" for module, function in found]
        classes = {(home.name, each.name): (home, each) for module, function in found for home, each in _classes(module, function)}
        parts += [_class(*classes[key]) for key in sorted(classes.keys() - shown, key=lambda key: key[1])]
        shown |= classes.keys()
    return "\n".join([HEAD.format(names="\n    ".join(names)), *parts])


def _homes(package: Module) -> dict[str, str]:
    """Every public name in the order of ``__all__``, and the module that defines it."""
    stated = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in package.tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    return {name: stated["_HOMES"][name] for name in stated["__all__"]}


def _found(module: Module, name: str) -> tuple[Module, Function]:
    found = module.definition(name)
    assert found is not None and isinstance(found[1], Function), f"{module.name} has no function {name}"
    return found[0], found[1]


def _classes(module: Module, function: Function) -> Iterator[tuple[Module, ast.ClassDef]]:
    """The classes of ours that the signature names, each where it is defined, and those beside one that derive from it."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    annotations = [each.annotation for each in arguments if each.annotation] + ([function.returns] if function.returns else [])
    for node in (node for annotation in annotations for node in ast.walk(annotation)):
        found = module.definition(node.id) if isinstance(node, ast.Name) else None
        if found is not None and isinstance(found[1], ast.ClassDef):
            yield found[0], found[1]
            yield from ((found[0], each) for each in found[0].tree.body if isinstance(each, ast.ClassDef) and _derives(each, found[1].name))


def _derives(node: ast.ClassDef, name: str) -> bool:
    return not node.name.startswith("_") and any(isinstance(base, ast.Name) and base.id == name for base in node.bases)


def _class(module: Module, node: ast.ClassDef) -> str:
    parts = [f"### {node.name}\n", f"`from {module.name} import {node.name}`\n"]
    if ast.get_docstring(node):
        parts.append(f"{_prose(node)}\n")
    if rows := list(_fields(module, node)):
        parts.append("| field | type | default | |\n|---|---|---|---|\n" + "".join(rows))
    methods = [each for each in node.body if isinstance(each, Function) and not each.name.startswith("_")]
    if methods:
        parts.append("".join(_method(module, each) for each in methods))
    return "\n".join(parts)


def _fields(module: Module, node: ast.ClassDef) -> Iterator[str]:
    for each, behind in zip(node.body, [*node.body[1:], None], strict=True):
        if not (isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)) or each.target.id.startswith("_"):
            continue
        told = isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant) and isinstance(behind.value.value, str)
        meaning = behind.value.value if told else ""
        default = f"`{_cell(module.segment(each.value))}`" if each.value else ""
        yield f"| `{each.target.id}` | `{_cell(module.segment(each.annotation))}` | {default} | {_cell(meaning)} |\n"


def _method(module: Module, node: Function) -> str:
    """One line: a property's name and type, or a method's signature, and the first sentence of what it does."""
    decorators = [module.segment(each) for each in node.decorator_list]
    arguments = "" if "property" in decorators else f"({', '.join(_arguments(node))})"
    returns = module.segment(node.returns)
    told = _cell((ast.get_docstring(node) or "").partition("\n\n")[0])
    return f"- `{node.name}{arguments}{f' -> {returns}' if returns and returns != 'None' else ''}`{f': {told}' if told else ''}\n"


def _arguments(node: Function) -> list[str]:
    names = [each.arg for each in (*node.args.posonlyargs, *node.args.args) if each.arg not in ("self", "cls")]
    optional = len(node.args.defaults)
    names = [f"{name}=..." if optional and number >= len(names) - optional else name for number, name in enumerate(names)]
    keywords = [
        each.arg if default is None else f"{each.arg}=..."
        for each, default in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    ]
    return [*names, *(["*", *keywords] if keywords else [])]


def _prose(node: Function | ast.ClassDef) -> str:
    """The docstring in Markdown: single backticks, its example fenced."""
    text, _, example = (ast.get_docstring(node) or "").partition("Example::\n")
    text = text.replace("``", "`").rstrip()
    return f"{text}\n\n{_code(dedent(example).strip())}" if example else text


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("``", "`").replace("|", "\\|")
