"""Every fixture case imported once, and one bundle that holds them all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import BASE, CASES
from shared_folders import shared_folder

from reft_export.base.load import Base, load_base
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.importing.importer import import_adapter


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base() -> Base:
    """With the attention that the libraries ran it with."""
    base = load_base(BASE)
    base.model.set_attn_implementation("eager")
    return base


@pytest.fixture(scope="session")
def imported() -> dict[str, Path]:
    def make(root: Path) -> None:
        for case in CASES:
            import_adapter(case.adapter, str(BASE), root / case.label, case.request, report=lambda _: None)

    root = shared_folder("imported", make)
    return {case.label: root / case.label for case in CASES}


@pytest.fixture(scope="session")
def bundle(imported: dict[str, Path]) -> Path:
    """All of them in one graph: every stream, with and without each activation."""

    def make(output: Path) -> None:
        export_bundle(str(BASE), list(imported.values()), output, ExportSettings(), report=lambda _: None)

    return shared_folder("bundles/imported", make)
