"""What the files of a base say of it before torch is loaded: its task, its sizes, its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_export.base.classifiers import check_classifier, check_has_head, is_classifier
from reft_export.base.hub import locate
from reft_export.base.model_folder import read_config, weight_files
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION
from runtimes.errors import InputError

LAYER_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim")
"""What families call them in config.json."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A base's folder whose config.json is one of a base, and whose weight files are all there."""

    folder: Path
    name: str
    config: Mapping[str, Any]
    task: str
    files: tuple[Path, ...]

    @property
    def layers(self) -> int | None:
        """As config.json states it; None where it leaves that to its family's default."""
        return self._stated(LAYER_KEYS)

    @property
    def width(self) -> int | None:
        """As ``layers``."""
        return self._stated(WIDTH_KEYS)

    def _stated(self, keys: tuple[str, ...]) -> int | None:
        text = self.config.get("text_config")  # a multimodal model's decoder
        config = text if isinstance(text, dict) else self.config
        return next((config[key] for key in keys if type(config.get(key)) is int), None)


def open_checkpoint(model: str | Path, *, name: str | None = None) -> Checkpoint:
    """The base in a folder, or of a hub id, which is downloaded. ``name``: what it is called; its folder's name, or its id, otherwise.

    Raises InputError for what is no base that can be steered, as far as config.json tells, and for missing weight files.
    """
    folder, found = locate(model)
    config = read_config(folder)
    task = task_of(config, folder)
    return Checkpoint(folder=folder, name=name or found, config=config, task=task, files=tuple(weight_files(folder)))


def task_of(config: Mapping[str, Any], where: Path | str) -> str:
    """The task of a base by its config.json: decided here, and stored from here on.

    Raises InputError for a classifier that is not supported, a bare encoder, and a config that names no model type.
    """
    if is_classifier(config):
        check_classifier(config, where)
        return TEXT_CLASSIFICATION
    check_has_head(config, where)
    if config.get("model_type") is None:
        raise InputError(f"{Path(where) / 'config.json'} lacks model_type; it was not written by transformers")
    return TEXT_GENERATION
