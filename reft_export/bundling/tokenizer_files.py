"""Tokenizer files as transformers reads them: a class named in tokenizer_config.json may rebuild what tokenizer.json says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from runtimes.text.tokenizer import CONFIG_FILE, TOKENIZER_FILE, read_tokenizer_config, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

NOTHING_ADDED = [{"Sequence": {"id": "A", "type_id": 0}}]
_INDENTATION = re.compile(rb"\n[ \t\r\n]*")


def without_indentation(content: bytes) -> bytes:
    """The same JSON without line breaks and what stands before each line: more than half of a large tokenizer.json.

    No string of JSON holds a line break (RFC 8259, 7), so none is changed.
    """
    return _INDENTATION.sub(b"", content)


def write_as_read(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Corrects the files in ``folder`` where a device would read other tokens out of them than ``tokenizer``.

    Files that say the same stay as they are, byte for byte.
    """
    theirs = tokenizer.backend_tokenizer.to_str()
    if not _same(tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_FILE)).to_str(), theirs):
        (folder / TOKENIZER_FILE).write_text(theirs, encoding="utf-8")
    config, named = read_tokenizer_config(folder), _named(tokenizer)
    changes: dict[str, Any] = {}
    if (known := special_tokens(config)) != named:
        changes |= dict.fromkeys(known) | named
    if bool(config.get("split_special_tokens")) != tokenizer.split_special_tokens:
        changes["split_special_tokens"] = tokenizer.split_special_tokens
    if changes:
        (folder / CONFIG_FILE).write_text(json.dumps({**config, **changes}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _same(ours: str, theirs: str) -> bool:
    """Whether two serialized tokenizers read texts alike; padding and truncation are set anew by whoever asks."""
    return ours == theirs or _content(ours) == _content(theirs)


def _content(serialized: str) -> dict[str, Any]:
    content = json.loads(serialized)
    processor = content["post_processor"]
    if processor and processor.get("single") == NOTHING_ADDED:  # what transformers writes for none
        content["post_processor"] = None
    return {**content, "padding": None, "truncation": None}


def _named(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """bos_token, eos_token, .. as chat templates see them."""
    return {name: token for name, token in tokenizer.special_tokens_map.items() if name.endswith("_token") and isinstance(token, str)}
