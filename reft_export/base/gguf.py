"""A GGUF file as a base: its tensors, dequantized to float32, are a checkpoint in a cache folder, made once and used like any other.

transformers says which architectures it reads (GGUF_SUPPORTED_ARCHITECTURES) and makes config, tokenizer and chat template of the file's
keys. It leaves out what it has no name for, in silence: a key that says something else than its config, and a tensor that has no place in
its model, are refused here. The fingerprint is the checkpoint's, and so that of the file's tensors: an adapter of the file fits a folder
with the same values. What GGUF quantized stays rounded; ORIGIN, beside the checkpoint, records the tensors' types.
"""

from __future__ import annotations

import io
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from reft_export.base.kept import MAKING, hold, kept_folder, take_away_oldest
from reft_export.base.model_folder import first_line
from reft_export.base.tokenizer import errors_only
from runtimes.errors import InputError
from runtimes.files.claims import remove, scratch_folder
from runtimes.files.hashes import sha256_of

if TYPE_CHECKING:
    from gguf import ReaderField
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ORIGIN = "gguf.json"

FLOATS = ("F64", "F32", "F16", "BF16")
PASS_CHECKPOINT = "pass the folder of the checkpoint that it was made from"
NOT_READ = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "vocab_size": "vocab_size",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Keys that transformers may leave out, by the name in its config of what they state."""

NOT_DECODERS = ("general", "tokenizer", "t5", "umt5")
"""What transformers lists among its GGUF architectures, and what is no decoder."""


def checkpoint_of(path: Path) -> Path:
    """The folder of the checkpoint made from the GGUF file ``path``; it is made now where the cache has none.

    Raises InputError, in one line, for a file that is cut short or no GGUF file, for an architecture, a type of tensor or a tokenizer
    that transformers does not read, and for a file that lacks tensors.
    """
    folder = _folder(path)
    while not hold(folder) or not (folder / ORIGIN).is_file():  # again where another process took it away before it was held
        header = _header(path)
        _check_architecture(path, header)
        take_away_oldest()  # before it takes its place, too
        _make(path, folder, header)
        if hold(folder):
            take_away_oldest()
    return folder


def rounded(path: Path) -> str:
    """How much of a GGUF file GGUF rounded, in brackets: (211 of 272 tensors rounded by GGUF: Q4_1); "" where nothing."""
    origin = _folder(path) / ORIGIN  # gguf's reader takes seconds for a vocabulary, and has read these bytes before
    types: Mapping[str, int] = json.loads(origin.read_bytes())["tensor_types"] if origin.is_file() else _header(path).counts
    found = {name: count for name, count in types.items() if name not in FLOATS}
    return f" ({sum(found.values())} of {sum(types.values())} tensors rounded by GGUF: {', '.join(found)})" if found else ""


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ".gguf" and path.is_file()


def _folder(path: Path) -> Path:
    """Of the checkpoint, which is there or not: named by the file's bytes, so that another file never finds it."""
    return kept_folder("gguf") / sha256_of(path, remember=True)


class _Header(NamedTuple):
    architecture: str
    keys: Mapping[str, Any]
    """The architecture's own, without its name before them."""
    types: Mapping[str, str]
    """By tensor."""

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(self.types.values()).most_common())


def _header(path: Path) -> _Header:
    from gguf import GGUFReader

    try:
        check_lengths(path)
        reader = GGUFReader(path)
        architecture = str(field_value(reader.fields["general.architecture"]))
        start = f"{architecture}."
        keys = {name.removeprefix(start): field_value(field) for name, field in reader.fields.items() if name.startswith(start)}
        types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    except Exception as e:  # the reader raises value, index, key, overflow and memory errors for damaged files
        raise InputError(f"{path} is damaged, cut short or no GGUF file ({first_line(e)}); download it again") from None
    if not types:
        raise InputError(f"{path} holds no tensors: it is no model")
    return _Header(architecture, keys, types)


SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by GGUF's number of its type; 8 is a text, 9 an array."""
TEXT, ARRAY = 8, 9
MOST_VALUES = 8_000_000
"""Of all keys: the largest vocabularies have 300,000 tokens, each with a text, a score and a type."""
LEAST_TENSOR = 24
"""Bytes of a tensor's entry."""


def check_lengths(path: Path) -> None:
    """Raises ValueError where the keys of a GGUF file claim more values than the file holds, or than a reader should make objects of.

    gguf's own reader makes objects for as many as are claimed, and does not notice where the file ends.
    """
    size, values = path.stat().st_size, 0
    with path.open("rb") as file:

        def within(count: int) -> int:
            if count > size - file.tell():
                raise ValueError(f"it is {size} bytes long, and says that more than that follow")
            return count

        def read(count: int) -> bytes:
            return file.read(within(count))

        def number(form: str) -> int:
            return struct.unpack(f"<{form}", read(struct.calcsize(form)))[0]

        def skip(kind: int, depth: int = 0) -> None:
            nonlocal values
            values += 1
            if kind == TEXT:
                file.seek(within(number("Q")), os.SEEK_CUR)
            elif kind == ARRAY and depth < 4:
                inner, count = number("I"), number("Q")
                values += count
                if values > MOST_VALUES:
                    raise ValueError(f"its keys hold {values} values; {MOST_VALUES} at most are read")
                if inner in SIZES:
                    file.seek(within(count * SIZES[inner]), os.SEEK_CUR)
                else:
                    for _ in range(count):
                        skip(inner, depth + 1)
            elif kind in SIZES:
                read(SIZES[kind])
            else:
                raise ValueError(f"type {kind} of a key is unknown")

        if read(4) != b"GGUF" or number("I") not in (2, 3):
            raise ValueError("it is not GGUF of version 2 or 3, little endian")
        tensors, keys = number("Q"), number("Q")
        if tensors * LEAST_TENSOR > size or keys > MOST_VALUES:
            raise ValueError(f"it says that it holds {tensors} tensors and {keys} keys")
        for _ in range(keys):
            skip(TEXT)
            skip(number("I"))


def field_value(field: ReaderField) -> Any:
    """A string, a number, or a list of either; gguf's own ``contents`` came later than the versions that are supported."""
    from gguf import GGUFValueType

    parts = [field.parts[i] for i in field.data]
    values = [bytes(part).decode(errors="replace") if field.types[-1] == GGUFValueType.STRING else part.tolist()[0] for part in parts]
    return values if field.types[0] == GGUFValueType.ARRAY else values[0]


def _check_architecture(path: Path, header: _Header) -> None:
    from transformers import __version__
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    readable = [name for name in GGUF_SUPPORTED_ARCHITECTURES if name not in NOT_DECODERS]
    if header.architecture not in readable:
        raise InputError(
            f"{path}: architecture {header.architecture} cannot be read from GGUF by transformers {__version__}, which reads "
            f"{', '.join(sorted(readable))}; {PASS_CHECKPOINT}"
        )
    if tables := sorted(name for name in header.types if name.startswith("rope_")):
        raise InputError(f"{path}: transformers does not read {tables[0]}, and would rotate by other angles; {PASS_CHECKPOINT}")


def _check_config(path: Path, header: _Header, config: PretrainedConfig) -> None:
    """Every key of the architecture says what the config says: transformers leaves out, in silence, the keys that it has no name for."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    names = GGUF_CONFIG_MAPPING[header.architecture]
    for key, value in header.keys.items():
        name = names.get(key) or NOT_READ.get(key)
        if key == "rope.scaling.type" and value == "none":
            continue
        made = None if name is None else _stated(config, name)
        same = made == value or (isinstance(value, float) and isinstance(made, (int, float)) and math.isclose(made, value, rel_tol=1e-6))
        if not same:
            instead = "leaves it out" if made is None else f"makes {name} {made} of the file"
            raise InputError(f"{path}: its key {header.architecture}.{key} is {value!r}, and transformers {instead}; {PASS_CHECKPOINT}")
    # No key says by what the queries are scaled: llama.cpp takes the size of a head, but for the largest models.
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) not in (None, _stated(config, "head_dim")):
        raise InputError(f"{path}: transformers scales its queries by {scalar}, as no key of the file says; {PASS_CHECKPOINT}")


def _stated(config: PretrainedConfig, name: str) -> Any:
    if name == "head_dim":
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if name == "rope_theta":
        rope = getattr(config, "rope_parameters", None) or {}
        return (rope.get("full_attention") or rope).get("rope_theta", getattr(config, "rope_theta", None))
    return getattr(config, name, None)


def _make(path: Path, folder: Path, header: _Header) -> None:
    """transformers refuses to save a model that it dequantized: a fresh one takes the weights over."""
    import torch
    from transformers import AutoModelForCausalLM

    model, report, tokenizer = _load(path)
    _check_config(path, header, model.config)
    _check_whole(path, header, model, report)
    model.config.__dict__.pop("quantization_config", None)
    fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    origin = {"file": path.name, "architecture": header.architecture, "tensor_types": header.counts}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder, MAKING) as made:
        whole = made / "checkpoint"
        fresh.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        (whole / ORIGIN).write_text(json.dumps(origin), encoding="utf-8")
        try:
            whole.replace(folder)
        except OSError:
            if not (folder / ORIGIN).is_file():  # else another process made the same one meanwhile
                remove(folder)  # a cleaner of caches takes single files
                whole.replace(folder)


def _load(path: Path) -> tuple[PreTrainedModel, Mapping[str, Any], PreTrainedTokenizerBase]:
    """The model, what of it transformers did not find, and the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    decoder: Any = AutoModelForCausalLM  # whose annotations do not know that a report comes with the model
    source = {"gguf_file": path.name, "local_files_only": True}
    try:
        with errors_only(), redirect_stderr(io.StringIO()):  # its own progress bar knows no switch; what it fails on is raised
            model, report = decoder.from_pretrained(
                path.parent, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **source
            )
            return model, report, AutoTokenizer.from_pretrained(path.parent, **source)
    except Exception as e:  # a file that contradicts itself fails anywhere in the family's code, with any error
        raise InputError(f"{path} cannot be loaded: {first_line(e)}") from e


def _check_whole(path: Path, header: _Header, model: PreTrainedModel, report: Mapping[str, Any]) -> None:
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{path} lacks {len(missing)} parameters of its architecture, first {missing[0]}; download it again")
    if other := sorted(each if isinstance(each, str) else each[0] for each in report["mismatched_keys"]):
        raise InputError(f"{path}: {other[0]} is of another shape than the file's keys say; {PASS_CHECKPOINT}")
    if (count := len(list(model.named_parameters()))) < len(header.types):
        raise InputError(
            f"{path} holds {len(header.types)} tensors, and transformers' {type(model).__name__} takes {count}: biases, or experts, that "
            f"it would leave out or join; {PASS_CHECKPOINT}"
        )
