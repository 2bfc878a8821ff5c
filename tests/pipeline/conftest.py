"""Bases, adapters and bundles that several pipeline tests read; each is made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import tiny
import torch
from shared_folders import shared_folder

from reft_export.base.load import load_base
from reft_export.exporting.export import ExportSettings, export_bundle
from runtimes.edits.adapter import save_adapter

Target = Literal["onnxruntime", "tensorrt"]

ADAPTERS = {
    "tied": {},
    "untied": {"tied": False, "positions": "f1+l3", "seed": 1},
    "prompt-relu": {"positions": "prompt", "activation": "relu", "seed": 2},
    "all-direft": {"positions": "all", "method": "direft", "seed": 3},
    "first-noreft": {"positions": "f3", "method": "noreft", "seed": 4},
    "last-consreft": {"positions": "l1", "method": "consreft", "seed": 5},
}
"""Every kind of position, tied and untied, with and without activation, and most methods."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder() -> Callable[[str], Path]:
    def folder(family: str = "llama") -> Path:
        return shared_folder(f"bases/{family}", lambda output: tiny.save_base(output, family))

    return folder


@pytest.fixture(scope="session")
def adapter_folders(tmp_path_factory: pytest.TempPathFactory, base_folder: Callable[[str], Path]) -> Callable[..., list[Path]]:
    def folders(family: str = "llama", names: tuple[str, ...] = tuple(ADAPTERS)) -> list[Path]:
        root = tmp_path_factory.mktemp("adapters")
        info = load_base(base_folder(family)).info
        for name in names:
            save_adapter(tiny.random_adapter(info, **ADAPTERS[name]), root / name)
        return [root / name for name in names]

    return folders


@pytest.fixture(scope="session")
def bundle_folder(base_folder: Callable[[str], Path], adapter_folders: Callable[..., list[Path]]) -> Callable[..., Path]:
    """A finished bundle by family, precision and target; tests copy it before they change anything."""

    def folder(family: str = "llama", precision: str = "fp32", *, target: Target = "onnxruntime") -> Path:
        def make(output: Path) -> None:
            settings = ExportSettings(precision=precision, target=target)
            export_bundle(str(base_folder(family)), adapter_folders(family), output, settings, report=lambda _: None)

        return shared_folder(f"bundles/{target}/{family}-{precision}", make)

    return folder


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibration") / "prompts.jsonl"
    lines = [{"prompt": f"Number {i} and the sea" + " far away" * (i % 4), "completion": "yes"} for i in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def float_bundle(base_folder, adapter_folders):
    """(bundle, base) by family, with two adapters: untied ones, and ones with an activation."""

    def folder(family: str = "llama", precision: str = "fp32", *, target: Target = "onnxruntime") -> tuple[Path, str]:
        def make(output: Path) -> None:
            adapters = adapter_folders(family, ("untied", "prompt-relu"))
            settings = ExportSettings(precision=precision, target=target)
            export_bundle(str(base_folder(family)), adapters, output, settings, report=lambda _: None)

        return shared_folder(f"float/{target}/{precision}/{family}", make), str(base_folder(family))

    return folder
