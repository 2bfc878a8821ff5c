"""pyreft's LoReFT with subspaces: what a call chooses of it is imported as an adapter of a lower rank."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases import BASE, FIXTURES

from reft_export.importing.foreign import Request
from reft_export.importing.importer import import_adapter
from runtimes.errors import AdapterError, InputError, ReftError

LOREFT = FIXTURES / "pyreft" / "a_loreft_tied_r4_f2l2" / "adapter"
SAID = Request(positions="f2+l2", tied=True, activation="none")
PARTS = [[0, 1], [1, 4]]


def saved(folder: Path, *, partition: Any = None, kind: str = "__main__.SubloreftIntervention") -> Path:
    """The fixture as pyvene saves a class of the user's own, which has LoReFT's state dict."""
    shutil.copytree(LOREFT, folder)
    config = json.loads((folder / "config.json").read_text())
    config["intervention_types"] = [f"<class '{kind}'>"] * 2
    for representation in config["representations"]:
        representation[7] = partition
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("partition", "subspace", "rows"),
    [(None, "0", [0]), (None, "1;3", [1, 3]), (PARTS, "1", [1, 2, 3]), (PARTS, "0-1", [0, 1, 2, 3]), (PARTS, "all", [0, 1, 2, 3])],
)
def test_what_is_chosen_is_what_pyreft_computes(partition: Any, subspace: str, rows: list[int], tmp_path: Path) -> None:
    """diff = W h + b - R h; h + diff[S] R[S], by the saved tensors."""
    source = saved(tmp_path / "saved", partition=partition)
    adapter = import_adapter(source, str(BASE), tmp_path / "a", replace(SAID, subspace=subspace), report=lambda _: None).adapter
    assert adapter.rank == len(rows) and adapter.method == "loreft" and adapter.training["subspace"] == subspace
    h = np.random.default_rng(0).standard_normal((5, adapter.base.hidden_size))
    for site, (edit,) in adapter.edits().items():
        name = f"intkey_layer_{site.layer}_comp_block_output_unit_pos_nunit_1#0.bin"
        state = {key: value.double().numpy() for key, value in torch.load(source / name, weights_only=True).items()}
        weight = state["rotate_layer"]
        diff = h @ state["weight"].T + state["bias"] - h @ weight
        np.testing.assert_allclose(edit.apply(h), h + diff[:, rows] @ weight[:, rows].T, rtol=0, atol=1e-6 * np.abs(h).max())


@pytest.mark.parametrize(
    ("partition", "kind", "subspace", "message", "error"),
    [
        (
            None,
            "__main__.SubloreftIntervention",
            None,
            "edited in subspaces, which every call chooses; pass --subspace 0, 0-3 or all",
            InputError,
        ),
        (PARTS, "pyreft.interventions.LoreftIntervention", None, "of subspace_partition .*, which every call chooses", InputError),
        (PARTS, "__main__.SubloreftIntervention", "2", "--subspace 2: .* has 2 parts, 0 to 1", InputError),
        (None, "__main__.SubloreftIntervention", "1-4", "has 4 rows, 0 to 3", InputError),
        (None, "__main__.SubloreftIntervention", "a", "'a' is not understood; use numbers like 0, 0-3 or 0;2, or all", InputError),
        ([[0, 9]], "__main__.SubloreftIntervention", "0", "subspace_partition is .*, expected pairs", AdapterError),
        ("half", "__main__.SubloreftIntervention", "0", "subspace_partition is 'half', expected pairs", AdapterError),
    ],
)
def test_refused(partition: Any, kind: str, subspace: str | None, message: str, error: type[ReftError], tmp_path: Path) -> None:
    source = saved(tmp_path / "saved", partition=partition, kind=kind)
    with pytest.raises(error, match=message):
        import_adapter(source, str(BASE), tmp_path / "a", replace(SAID, subspace=subspace), report=lambda _: None)
    assert not (tmp_path / "a").exists()


def test_others_have_no_subspaces(tmp_path: Path) -> None:
    hub = FIXTURES / "adapterhub" / "aa_loreft_tied_p2s2" / "adapter"
    with pytest.raises(InputError, match="--subspace does not apply to adapterhub: it has none"):
        import_adapter(hub, str(BASE), tmp_path / "a", Request(subspace="0"), report=lambda _: None)
