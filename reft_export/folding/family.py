"""Whether an adapter's base is of the family that the files beside a graph name: llama, gpt2, bert."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reft_export.bundling.genai import CONFIG_FILE, FAMILIES, read_genai_config, stated_json
from runtimes.edits.adapter import Adapter
from runtimes.errors import AdapterError

_HEADS = re.compile(r"(For[A-Z]\w*|LMHeadModel|Model)$")
"""What a class of transformers adds to its family's name: LlamaForCausalLM, GPT2LMHeadModel."""


def check_family(adapters: Mapping[str, Adapter], source: Path) -> None:
    """Raises AdapterError for an adapter whose base is of another family than config.json, or genai_config.json, beside the graph says.

    Width and depth are often those of several families: an edit trained on one then steers another by chance. A file that names none is
    no evidence, nor is an adapter that was saved before adapters named theirs.
    """
    folder = source.parent
    config = stated_json(folder / "config.json")
    stated, where = _of_config(config), folder / "config.json"
    builders = read_genai_config(folder).get("model")
    genai = str(builders.get("type") or "") if isinstance(builders, Mapping) else ""
    for name, adapter in adapters.items():
        family = adapter.base.model_type
        # onnxruntime-genai runs a family that it does not know under a borrowed name: names count where it knows both.
        known = stated or ({genai} if {_plain(genai), _plain(family)} <= set(map(_plain, FAMILIES)) else set())
        if family and known and _plain(family) not in map(_plain, known):
            says = f"{where if stated else folder / CONFIG_FILE} says that the graph is a {sorted(known)[0]}"
            raise AdapterError(
                f"adapter {name} was trained on {adapter.base.name}, a {family}; {says}; pass the graph of the base it was trained on, or "
                "correct the file"
            )


def check_same_family(adapters: Mapping[str, Adapter]) -> None:
    """Raises AdapterError where two adapters for one graph were trained on bases of different families."""
    named = {name: adapter.base for name, adapter in adapters.items() if adapter.base.model_type}
    first = next(iter(named), "")
    for name, base in named.items():
        if _plain(base.model_type) != _plain(named[first].model_type):
            raise AdapterError(
                f"adapter {first} was trained on {named[first].name}, a {named[first].model_type}, and adapter {name} on {base.name}, a "
                f"{base.model_type}; one graph is of one base: fold them apart"
            )


def _of_config(config: Mapping[str, Any]) -> set[str]:
    """The families that a config.json names, its text model's too; by its classes where it has no model_type. Empty where it says none."""
    text = config.get("text_config")
    parts = [config, *([text] if isinstance(text, Mapping) else [])]
    if types := {part["model_type"] for part in parts if isinstance(part.get("model_type"), str) and part["model_type"]}:
        return types
    classes = config.get("architectures")
    return {_HEADS.sub("", name).lower() for name in classes if isinstance(name, str)} if isinstance(classes, list) else set()


def _plain(family: str) -> str:
    """``gpt_oss`` and ``gptoss``, ``gemma3`` and its text model ``gemma3_text``, ``xlm-roberta`` and ``XLMRoberta`` are each one."""
    return re.sub("[^a-z0-9]", "", family.lower()).removesuffix("text")
