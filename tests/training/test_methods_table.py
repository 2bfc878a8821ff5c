"""The table of methods is all that a method is: its rows are what is said elsewhere, and a new row alone is trained, saved and folded."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reft_export.base.load import base_from_memory
from reft_export.cli.main import app
from reft_export.eager.steering import steered
from reft_export.importing.assemble import assemble
from reft_export.importing.foreign import ForeignAdapter, ForeignEdit
from reft_export.training.interventions import INITIAL
from reft_export.training.settings import TrainSettings, settings_like
from reft_export.training.trainer import train
from runtimes.edits.adapter import load_adapter
from runtimes.edits.edit import LowRankEdit, ScaleBiasEdit, Site, activate
from runtimes.edits.methods import METHODS, Method, Parameter, fold_parameters
from runtimes.edits.positions import PositionRule

ROOT = Path(__file__).parent.parent.parent
LISTS = (ast.Tuple, ast.List, ast.Set)

GATED = Method(
    formula="y = h + G^T act(G h)",
    parameters=(Parameter(name="G", axes=("r", "D"), role="projection", initial="linear"),),
    delta=lambda x, h, act: act(h @ x["G"].T) @ x["G"],
    fold=lambda x, activation: LowRankEdit(U=x["G"], A=x["G"], b=np.zeros(len(x["G"])), activation=activation),
    activated=True,
)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_agrees_with_itself(name: str) -> None:
    """What is trained is what is folded; what a row says of other methods' forms is the same edit; initial values are known."""
    method, generator = METHODS[name], np.random.default_rng(0)
    assert len({parameter.role for parameter in method.parameters}) == len(method.parameters)
    assert {parameter.initial for parameter in method.parameters} <= set(INITIAL)
    x = {n: generator.standard_normal(shape) for n, shape in method.shapes(4, 16).items()}
    h = generator.standard_normal((5, 16))
    for activation in ("", "gelu") if method.activated else ("",):
        edit = fold_parameters(name, x, activation)
        assert isinstance(edit, ScaleBiasEdit if method.full_rank else LowRankEdit)
        y = h + method.delta(x, h, lambda z, name=activation: activate(z, name))
        np.testing.assert_allclose(edit.apply(h), y, rtol=1e-12, atol=1e-12)
        if method.as_noreft is not None:
            np.testing.assert_allclose(fold_parameters("noreft", method.as_noreft(x), activation).apply(h), y, rtol=1e-12, atol=1e-12)
    if method.of_edit is not None:
        plain = fold_parameters(name, x)
        np.testing.assert_allclose(fold_parameters(name, method.of_edit(plain)).apply(h), plain.apply(h), rtol=1e-12, atol=1e-12)


def test_there_is_no_second_table() -> None:
    """Nothing else is keyed by methods, or lists them: what tells them apart stands in their rows."""
    second = []
    for path in sorted(p for room in ("runtimes", "graph_passes", "calibration", "reft_export") for p in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            listed = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", []) if isinstance(node, LISTS) else []
            if len({each.value for each in listed if isinstance(each, ast.Constant)} & set(METHODS)) > 1:
                second.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert [where for where in second if not where.startswith("runtimes/edits/methods.py:")] == []
    assert second, "the table itself is found"


def test_the_command_line_names_every_method() -> None:
    (option,) = (p for p in typer.main.get_command(app).commands["train"].params if p.name == "method")
    low, full = ([name for name, method in METHODS.items() if method.full_rank == whole] for whole in (False, True))
    assert option.help.startswith(f"{', '.join(low)}; {', '.join(full)}: ")


def test_a_new_row_is_trained_saved_loaded_imported_and_folded(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "gated", GATED)
    base, data = base_from_memory(llama, tokenizer, name="tiny-llama"), tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "what is 1?", "completion": " ok"}))
    settings = TrainSettings(method="gated", rank=2, layers="1", positions="all", activation="relu", max_steps=2, warmup=0.0, samples=0)
    trained = train(base, data, settings, tmp_path / "adapter").adapter
    saved = load_adapter(tmp_path / "adapter")
    assert saved.method == "gated" and set(saved.tensors) == {"1.block_output.G"} and saved.digest == trained.digest
    assert settings_like(saved).method == "gated"

    G = saved.tensors["1.block_output.G"].astype(np.float64)
    h = np.random.default_rng(0).standard_normal((3, G.shape[1]))
    (edit,) = saved.edits()[Site(layer=1)]
    np.testing.assert_allclose(edit.apply(h), h + np.maximum(h @ G.T, 0) @ G, rtol=1e-12, atol=1e-12)
    ids = torch.tensor([tokenizer("what is 1?")["input_ids"]])
    with torch.no_grad():
        plain = llama(input_ids=ids).logits
        with steered(llama, saved):
            assert not torch.equal(llama(input_ids=ids).logits, plain)

    foreign = ForeignEdit.of_roles("theirs", "gated", projection=G.astype(np.float32))
    edits = {Site(layer=1): ((foreign,),)}
    imported = assemble(
        ForeignAdapter(format="x", edits=edits, positions=PositionRule.parse("all"), tied=True, activation="relu"), base.info
    )
    assert imported.method == "gated" and np.array_equal(imported.tensors["1.block_output.G"], saved.tensors["1.block_output.G"])
