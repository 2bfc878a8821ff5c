"""The host's own rungs: what they leave out, or take no value of, they do not call equal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reft_export.evaluation.quantization_report import QuantizationReport, Steering, Variant
from reft_export.parity import activation_ladder as step_by_step
from reft_export.parity import edit_ladder
from reft_export.parity.edit_ladder import edit_rungs
from reft_export.tasks.generation import GoldenInputs, golden_inputs
from runtimes.edits.edit import LowRankEdit, Site
from runtimes.edits.op import EditNode, bank_of
from runtimes.parity.figures import Delta, Figures

NODE = EditNode(site=Site(layer=0))
WIDTH, RANK = 8, 2


@pytest.fixture
def banked(monkeypatch: pytest.MonkeyPatch) -> tuple[SimpleNamespace, tuple[LowRankEdit, ...]]:
    """(a bundle with one node's bank of 60 slots, more than a rung has rows by default; its edits)."""
    random = np.random.default_rng(0)
    edits = tuple(
        LowRankEdit(U=random.standard_normal((RANK, WIDTH)), A=random.standard_normal((RANK, WIDTH)), b=random.standard_normal(RANK))
        for _ in range(60)
    )
    bank = dict(zip(NODE.bank_names, bank_of(edits, np.dtype(np.float32)), strict=True))
    monkeypatch.setattr(edit_ladder, "read_onnx_adapter", lambda path: bank)
    return SimpleNamespace(manifest=SimpleNamespace(precision="fp32"), adapter=lambda name: SimpleNamespace(file=Path(name))), edits


def test_every_slot_has_a_row(banked, monkeypatch) -> None:
    bundle, edits = banked
    seen: list[np.ndarray] = []
    numpy_edit = edit_ladder.numpy_edit
    monkeypatch.setattr(edit_ladder, "numpy_edit", lambda h, slot, bank, node: seen.append(slot) or numpy_edit(h, slot, bank, node))
    rungs = edit_rungs(bundle, "a", {NODE: edits}, kernel="function")
    assert all(r.passed and r.figures.compared >= len(edits) for r in rungs) and len(rungs) == 2
    assert set(seen[0].tolist()) == set(range(-1, len(edits) + 1))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_kernel_that_gives_no_numbers_fails(banked, monkeypatch, value) -> None:
    bundle, edits = banked

    def broken(node: EditNode, h: np.ndarray, slot: np.ndarray, *_: object) -> np.ndarray:
        return np.where(((slot >= 0) & (slot < len(edits)))[:, None], np.float32(value), h)

    monkeypatch.setattr(edit_ladder, "run_node", broken)
    by_name = {r.name: r for r in edit_rungs(bundle, "a", {NODE: edits}, kernel="function")}
    assert by_name["numpy, a"].passed and not by_name["function, a"].passed


def test_an_adapter_without_edits_has_no_edit_rung(banked) -> None:
    assert edit_rungs(banked[0], "a", {}) == []


@pytest.mark.parametrize("read", [True, False])
def test_steps_that_no_product_took_do_not_pass(tmp_path, monkeypatch, read) -> None:
    """The eager model goes on from the graph's roundings; where none of its products reads one, its logits show nothing of them."""
    from calibration.activations import ActivationQuantization

    linear = torch.nn.Linear(4, 6, bias=False)
    x = np.array([[[127.0, 3.0, -5.0, 64.0]]], np.float32)  # multiples of the token's scale: what is restored is x itself
    inputs = GoldenInputs(
        input_ids=np.array([[1]]),
        attention_mask=np.array([[1]]),
        prompt_length=np.array([1]),
        logit_positions=np.array([[0, 0]]),
        logit_columns=np.array([[0]]),
        continued=1,
    )

    def model(**_: object) -> SimpleNamespace:
        return SimpleNamespace(logits=linear(torch.from_numpy(x)))

    np.savez(tmp_path / "base.0.npz", logits=model().logits[0].detach().numpy(), x=x)
    how = SimpleNamespace(restore=lambda value: value, kind=ActivationQuantization(kind="token").kind, block_size=0, scale=None)
    monkeypatch.setattr(step_by_step, "linears_of", lambda *_: [linear] if read else [])
    bundle = SimpleNamespace(manifest=SimpleNamespace(weights={}, quantization=SimpleNamespace(label="dynamic")))
    rung = step_by_step._hold(bundle, model, "base", None, inputs, {"w": how}, {"w": ("x",)}, tmp_path)
    assert rung.passed == read
    assert read or rung.note == "nothing was compared; no product of the eager model read a quantized input"


class Vocabulary:
    """As much of a model as positions are chosen by: 600,000 logits, so that few positions are kept."""

    def get_output_embeddings(self) -> SimpleNamespace:
        return SimpleNamespace(get_parameter=lambda _: np.empty((600_000, 0)))


def test_the_positions_that_are_kept_show_every_edit_of_a_prompts_ends(monkeypatch) -> None:
    from reft_export.tasks import generation as generation_module

    monkeypatch.setattr(generation_module, "_greedy", lambda model, prompts, count: np.ones((len(prompts), count), np.int64))
    prompts = [[1] * n for n in (3, 8, 13, 21)]
    inputs = golden_inputs(Vocabulary(), prompts)
    kept = set(map(tuple, inputs.logit_positions.tolist()))
    assert kept >= {(row, column) for row, p in enumerate(prompts) for column in (0, len(p) - 1, len(p) + 11)}
    assert 12 <= len(kept) == len(inputs.logit_positions) <= 27


def test_a_report_has_no_figure_for_steering_that_moves_nothing() -> None:
    figures = Figures(compared=3, max_abs=0.0, max_relative=0.0, kl=0.0, top1=1.0)
    rows = {}
    for moved in (True, False):
        steering = Steering(adapter="a", delta=Delta(cosine=1.0, norm_ratio=1.0, moved=moved), figures=figures)
        variant = Variant(name="int4", size=1, perplexity=None, success=None, steering=(steering,))
        report = QuantizationReport(bundle="b", variants=(variant,))
        rows[moved] = dict(zip(report.HEADER, report.rows()[0], strict=True))
    assert (rows[True]["delta cos"], rows[True]["delta norm"]) == ("1.0000", "1.000")
    assert (rows[False]["delta cos"], rows[False]["delta norm"]) == ("", "")
