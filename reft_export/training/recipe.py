"""``--recipe``: a YAML or JSON file with the edits of layers.

    edits:
      - {layers: 4-10, method: loreft, rank: 4}
      - {layers: 18, method: red, positions: all, streams: mlp_output}

The keys of an edit are the fields of ``LayerEdits``; ``layers`` alone must be there.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from reft_export.training.edits import LayerEdits
from runtimes.errors import InputError
from runtimes.files.records import RecordError, from_json, parse_json, read_regular

SUFFIXES = (".yaml", ".yml", ".json")
EXPECTED = "expected edits: a list of edits, each with layers and what else it says"
TEXTS = ("layers", "positions")
"""Keys of an edit whose value may be a bare number in YAML."""


def read_recipe(path: Path) -> tuple[LayerEdits, ...]:
    """Raises InputError, naming file and key, for what is no recipe."""
    if path.suffix not in SUFFIXES:
        raise InputError(f"recipe {path} is neither {' nor '.join(SUFFIXES)}; name it by what it holds")
    try:
        text = read_regular(path).decode("utf-8-sig")
    except OSError as e:
        raise InputError(f"recipe {path} cannot be read ({e.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"recipe {path} is not UTF-8; save it as text") from None
    content = _json(text, path) if path.suffix == ".json" else _yaml(text, path)
    if not isinstance(content, dict) or not isinstance(content.get("edits"), list) or not content["edits"]:
        raise InputError(f"recipe {path} has no edits; {EXPECTED}")
    if unknown := sorted(str(key) for key in content if key != "edits"):
        raise InputError(f"recipe {path}: key {unknown[0]!r} is unknown; {EXPECTED}")
    return tuple(_edit(each, f"recipe {path}: edits[{number}]") for number, each in enumerate(content["edits"]))


def _edit(content: Any, where: str) -> LayerEdits:
    if isinstance(content, dict):
        content = {key: str(value) if key in TEXTS and type(value) is int else value for key, value in content.items()}
        if unknown := sorted(str(key) for key in content if key not in LayerEdits.__dataclass_fields__):
            known = ", ".join(LayerEdits.__dataclass_fields__)
            raise InputError(f"{where}: key {unknown[0]!r} is unknown; known: {known}")
    try:
        return from_json(LayerEdits, content, where)
    except (RecordError, InputError) as e:
        text = str(e)
        raise InputError(text if text.startswith(where) else f"{where}: {text}") from None


def _json(text: str, path: Path) -> Any:
    try:
        return parse_json(text, keys_once=True)
    except ValueError as e:
        raise InputError(f"recipe {path} is not JSON: {e}") from None


def _yaml(text: str, path: Path) -> Any:
    try:
        import yaml  # comes with transformers
    except ImportError:
        raise InputError(f"recipe {path} needs PyYAML: pip install pyyaml, or write it as JSON") from None

    class KeysOnce(yaml.SafeLoader):
        """Plain values alone: of YAML 1.1's bare words null, true and whole numbers, as it would read layers 010 as 8 and 3:20 as 200. A
        key that stands twice is refused, of which it would keep the last."""

        yaml_implicit_resolvers = {
            first: [each for each in known if each[0].rpartition(":")[2] in ("null", "bool", "merge")]
            for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            names = [key.value for key, _ in node.value]
            if twice := [name for i, name in enumerate(names) if name in names[:i]]:
                raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
            return super().construct_mapping(node, deep)

    KeysOnce.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("(?:0|-?[1-9][0-9]*)$"), list("-0123456789"))
    try:
        return yaml.load(text, KeysOnce)  # noqa: S506  # a SafeLoader
    except Exception as e:  # a tag that is written out raises what its conversion happens to raise
        raise InputError(f"recipe {path} is not YAML: {' '.join(str(e).split())}") from None
