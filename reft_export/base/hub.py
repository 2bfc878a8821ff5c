"""Where a base lies: a local folder, a GGUF file that becomes one, or a Hugging Face id that is downloaded.

A folder that GPTQ, AWQ or compressed-tensors quantized becomes one of floats, as a GGUF file does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reft_export.base.gguf import checkpoint_of, is_gguf
from reft_export.base.model_folder import first_line
from reft_export.base.packed.checkpoint import plain_folder
from runtimes.errors import InputError
from runtimes.files.folders import name_of

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def locate(model: str | Path) -> tuple[Path, str]:
    """The base's folder, downloaded where it is a hub id, and its name. Raises InputError for what is no base."""
    if Path(model).is_file():
        if not is_gguf(Path(model)):
            raise InputError(f"{model} is a file; a base is given by its folder, by a .gguf file, or by its Hugging Face id")
        with without_progress_bars():
            return checkpoint_of(Path(model)), Path(model).stem
    if Path(model).is_dir():
        return plain_folder(Path(model)), name_of(Path(model))
    return plain_folder(_download(str(model))), str(model)


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not HUB_ID.fullmatch(model):
        raise InputError(f"{model} is not a folder, nor the form of a Hugging Face id (owner/name)")
    # Other frameworks' copies, and Mistral's second copy of the weights, are not ours to download.
    text, other = ["*.json", "*.jinja", "*.model", "*.txt"], ["*/*", "consolidated*"]
    try:
        with without_progress_bars(), without_retry_warnings():
            folder = Path(snapshot_download(model, allow_patterns=[*text, "*.safetensors"], ignore_patterns=other))
            if not any(folder.glob("*.safetensors")):
                folder = Path(snapshot_download(model, allow_patterns=[*text, "pytorch_model*.bin"], ignore_patterns=other))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as e:
        raise InputError(
            f"{model} is not a folder here, and cannot be had from the Hugging Face hub: {first_line(e)}; "
            "give a folder with config.json, or check the name, the network and `hf auth login`"
        ) from e
    return folder


@contextmanager
def without_retry_warnings() -> Iterator[None]:
    """What huggingface_hub tries again is not said: what comes of it is one line."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """No progress bars from the libraries where nobody watches: a log file is not a terminal."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
