"""Adapters of classifiers, imported with their heads: AdapterHub's own logits, and a folder of pyreft's form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rounding
import torch

from reft_export.base.load import load_base
from reft_export.eager.steering import steered
from reft_export.importing.foreign import Request
from reft_export.importing.importer import import_adapter
from reft_export.importing.pyreft.write import export_to_pyreft
from runtimes.edits.adapter import load_adapter
from runtimes.errors import AdapterError, InputError

FIXTURES = Path(__file__).parent / "fixtures" / "classifiers"
BASE = FIXTURES / "base-roberta-tiny"
TOLERANCE = 2 * rounding.logits(width=64, layers=3)
"""Of the largest logit, as for decoders."""
HEAD = [f"classifier.{module}.{parameter}" for module in ("dense", "out_proj") for parameter in ("weight", "bias")]


def logits_of(folder: Path, texts: list[np.ndarray]) -> np.ndarray:
    base = load_base(BASE)
    with torch.no_grad(), steered(base.model, load_adapter(folder)):
        return np.stack([base.model(input_ids=torch.from_numpy(text)[None]).logits[0].numpy() for text in texts])


def imported(source: Path, output: Path, request: Request = Request()):
    return import_adapter(source, str(BASE), output, request, report=lambda _: None)


@pytest.mark.parametrize("case", ["static", "flexible"])
def test_adapterhub_with_its_head(case: str, tmp_path: Path) -> None:
    """static: the model's own head; flexible: AdapterHub's classification head, which on RoBERTa is the same."""
    result = imported(FIXTURES / case / "adapter", tmp_path / "mood")
    assert list(result.adapter.head) == HEAD and result.adapter.base.labels == ("sad", "calm", "happy") and not result.notes
    with np.load(FIXTURES / case / "io.npz") as io:
        texts, wanted = [io[name] for name in sorted(io) if name != "logits"], io["logits"]
    assert rounding.distance(logits_of(tmp_path / "mood", texts), wanted) < TOLERANCE
    headless = tmp_path / "headless"
    shutil.copytree(FIXTURES / case / "adapter", headless)
    (headless / "pytorch_model_head.bin").unlink()
    plain = imported(headless, tmp_path / "plain")
    assert not plain.adapter.head and plain.notes[0].endswith("it is used with base-roberta-tiny's own")
    assert rounding.distance(logits_of(tmp_path / "plain", texts), wanted) > 50 * TOLERANCE, "the head was trained, too"


def test_heads_that_are_not_the_bases(tmp_path: Path) -> None:
    def refused(match: str, config: dict | None = None, **tensors: torch.Tensor) -> None:
        folder = tmp_path / "foreign"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(FIXTURES / "flexible" / "adapter", folder)
        path = folder / "head_config.json"
        recorded = json.loads(path.read_text())
        path.write_text(json.dumps(recorded | {"config": recorded["config"] | (config or {})}))
        if tensors:
            torch.save(dict(tensors), folder / "pytorch_model_head.bin")
        with pytest.raises(AdapterError, match=match):
            imported(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused("is not the head of a roberta", config={"activation_function": "relu"})
    refused("is not the head of a roberta", config={"use_pooler": True})
    refused("with labels yes, no, base-roberta-tiny has sad, calm, happy", config={"label2id": {"yes": 0, "no": 1}})
    refused(r"holds classifier.dense.bias, .* other than the head of base-roberta-tiny", **{"classifier.dense.weight": torch.zeros(32, 32)})
    refused(r"classifier.dense.weight", **{name: torch.zeros(2, 2) for name in HEAD})


def pyreft_folder(folder: Path) -> dict[str, torch.Tensor]:
    """As pyreft's GLUE script saves it: path-style components, and the trained head with include_model=True."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    components = [f"roberta.encoder.layer[{layer}].output" for layer in (0, 2)]
    keys = [f"comp_{component.replace('.', '_')}_unit_pos_nunit_1#0" for component in components]
    for key in keys:
        rotation = torch.linalg.qr(torch.randn(32, 1, generator=generator))[0]
        state = {"rotate_layer": rotation, "weight": torch.randn(1, 32, generator=generator), "bias": torch.randn(1, generator=generator)}
        torch.save(state, folder / f"intkey_{key}.bin")
    config = {
        "intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"] * 2,
        "representations": [[0, component, "pos", 1, 1, *[None] * 9] for component in components],
        "mode": "parallel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"dense.weight": (32, 32), "dense.bias": (32,), "out_proj.weight": (3, 32), "out_proj.bias": (3,)}
    head = {f"classifier.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(head, folder / "pytorch_model.bin")
    return head


def test_pyreft_with_its_head(tmp_path: Path) -> None:
    head = pyreft_folder(tmp_path / "reft")
    request = Request(positions="f1", activation="none")
    result = imported(tmp_path / "reft", tmp_path / "mood", request)
    assert list(map(str, result.adapter.sites)) == ["0.block_output", "2.block_output"] and list(result.adapter.head) == HEAD
    assert all(np.array_equal(result.adapter.head[name], value.numpy()) for name, value in head.items())
    with pytest.raises(InputError, match="pyvene knows no layer components of encoders"):
        export_to_pyreft(str(BASE), tmp_path / "mood", tmp_path / "back", report=lambda _: None)
    (tmp_path / "reft" / "pytorch_model.bin").unlink()
    plain = imported(tmp_path / "reft", tmp_path / "plain", request)
    assert not plain.adapter.head and "include_model=True" in plain.notes[-1]
    torch.save(head | {"roberta.pooler.dense.bias": torch.zeros(32)}, tmp_path / "reft" / "pytorch_model.bin")
    with pytest.raises(AdapterError, match=r"holds roberta.pooler.dense.bias other than the head"):
        imported(tmp_path / "reft", tmp_path / "more", request)
    assert not (tmp_path / "more").exists() and not (tmp_path / "back").exists()
