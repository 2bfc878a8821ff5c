"""The base's tokenizer, as transformers reads it from the base's folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reft_export.base.model_folder import first_line
from runtimes.errors import InputError
from runtimes.files.records import read_json_object

if TYPE_CHECKING:  # whether there is a tokenizer is told before torch is loaded
    from transformers import PreTrainedTokenizerBase

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    TOKENIZER_CONFIG,
)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The base's tokenizer without its model. Raises InputError where it has none."""
    tokenizer = load_tokenizer_if_any(folder)
    if tokenizer is None:
        raise InputError(f"{folder} has no tokenizer; expected tokenizer.json beside config.json")
    return tokenizer


def load_tokenizer_if_any(folder: Path) -> PreTrainedTokenizerBase | None:
    """None where ``folder`` has none; raises InputError for one that cannot be loaded."""
    if not has_tokenizer(folder):
        return None
    config = _tokenizer_config(folder)
    _check_tokenizer_file(config, folder)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        # transformers 5 writes tokenizer_class TokenizersBackend, its new name for PreTrainedTokenizerFast, which
        # transformers 4 does not know.
        backend = config.get("tokenizer_class") == "TokenizersBackend" and (folder / "tokenizer.json").is_file()
        loader = PreTrainedTokenizerFast if backend else AutoTokenizer
        with errors_only():
            return loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:  # the tokenizers library raises bare Exception for a damaged file
        raise InputError(f"{folder}: the tokenizer cannot be loaded: {first_line(e)}") from e


def is_plain_tokenizer(folder: Path) -> bool:
    """Whether ``folder`` has no tokenizer, or a tokenizer.json that the tokenizers library reads: nothing is left for transformers to
    refuse."""
    import tokenizers

    if not has_tokenizer(folder):
        return True
    _check_tokenizer_file(_tokenizer_config(folder), folder)
    try:
        tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the library raises bare Exception, for a missing file too
        return False
    return True


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, empty where there is none; InputError for what is no JSON object."""
    path = folder / TOKENIZER_CONFIG
    return read_json_object(path, InputError, "download it again") if path.is_file() else {}


def _check_tokenizer_file(config: Mapping[str, Any], folder: Path) -> None:
    """transformers reads another file than tokenizer.json where tokenizer_config.json lists one for its release; a device does not."""
    listed = config.get("fast_tokenizer_files")
    if others := [name for name in (listed if isinstance(listed, list) else ()) if name != "tokenizer.json"]:
        raise InputError(
            f"{folder / TOKENIZER_CONFIG} lists {others[0]}, which some releases of transformers read in place of tokenizer.json; remove "
            "fast_tokenizer_files, and keep the tokenizer that is meant as tokenizer.json"
        )


@contextmanager
def errors_only() -> Iterator[None]:
    """Without transformers' warnings: that the class in tokenizer_config.json has another name, its table of what a checkpoint lacks."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
