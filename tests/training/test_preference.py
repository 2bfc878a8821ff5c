"""Pairs of a chosen and a rejected answer: the losses against trl's, what they teach, how the data is read, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models.bases import byte_tokenizer
from test_data_forms import TURNS
from test_training_run import files, stop_at
from transformers import PreTrainedTokenizerFast
from trl_preference import BETAS, FIGURES, PAIRS, sine_adapter, sine_model

from reft_export.base.load import Base, base_from_memory
from reft_export.training.endings import TrainingInterrupted
from reft_export.training.preference import log_odds, orpo_losses
from reft_export.training.preference_data import load_pairs
from reft_export.training.settings import TrainSettings, settings_like
from reft_export.training.statistics import statistics_of
from reft_export.training.tokenizing import Example
from reft_export.training.trainer import train
from runtimes.edits.positions import PositionRule
from runtimes.errors import InputError

SETTINGS = TrainSettings(
    objective="dpo", rank=2, layers="0;2", positions="f2+l2", lr=2e-2, max_steps=6, batch_size=4, samples=0, seed=7, probes=4
)
LINES = [{"prompt": f"what is {i}?", "chosen": " ok" * (1 + i % 2), "rejected": " bad" * (1 + i % 3)} for i in range(6)]


def side_of(tokenizer: PreTrainedTokenizerFast, example: Example | None) -> tuple[str, str]:
    assert example is not None
    ids, at = list(example.input_ids), example.prompt_length
    return tokenizer.decode(ids[:at]), tokenizer.decode(ids[at:])


@pytest.mark.parametrize("beta", BETAS)
def test_losses_are_those_of_trls_trainers(beta: float, tmp_path: Path) -> None:
    base = base_from_memory(sine_model(), byte_tokenizer())
    start, told = sine_adapter(base), json.loads(FIGURES.read_text())[str(beta)]

    def loss(objective: str, size: int, accumulation: int = 1) -> float:
        settings = settings_like(
            start, objective=objective, beta=beta, lr=0.0, max_steps=1, samples=0, device="cpu", dtype="float32",
            batch_size=size, gradient_accumulation=accumulation,
        )  # fmt: skip
        return train(base, PAIRS, settings, tmp_path / f"{objective}{size}", start=start).history[0].loss

    assert loss("dpo", 3) == pytest.approx(told["dpo"], rel=1e-5)
    assert loss("dpo", 1, 3) == pytest.approx(told["dpo"], rel=1e-5), "a pair counts alike whatever its batch"
    # trl's first term is over the prompts, too; ours is what it logs as the chosen answers' mean log-likelihood.
    chosen, _ = told["orpo_mean_logps"]
    assert loss("orpo", 3) == pytest.approx(-chosen - beta * told["orpo_log_odds_ratio"], rel=1e-5)


def test_odds_near_certainty_have_figures_and_gradients() -> None:
    mean = torch.tensor([-1e-6, -0.5, -40.0, 0.0], requires_grad=True)
    found = log_odds(mean)
    for value, m in zip(found.tolist(), (-1e-6, -0.5, -40.0), strict=False):
        assert value == pytest.approx(m - math.log(-math.expm1(m)), rel=1e-5)
    (gradient,) = torch.autograd.grad(orpo_losses(mean, mean - 1.0, 0.1)[:3].sum(), mean)
    assert torch.isfinite(found).all() and torch.isfinite(gradient).all()


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_the_chosen_answers_are_preferred(objective: str, base: Base, tmp_path: Path) -> None:
    settings = replace(SETTINGS, objective=objective, positions="all", max_steps=25, init="identity", eval_fraction=0.34)
    result = train(base, LINES, settings, tmp_path / "a")
    history = result.history
    held = [record.eval_loss for record in history if record.eval_loss is not None]
    assert history[-1].loss < {"dpo": 0.7, "orpo": 0.85}[objective] * history[0].loss and held[-1] < held[0]
    if objective == "dpo":
        assert history[0].loss == pytest.approx(math.log(2), rel=1e-5), "an edit that does nothing prefers as the base does"
    note = result.notes[-1]
    assert note.startswith("log p(chosen) - log p(rejected) of 2 held-out pairs, base to steered: ")
    before, after = map(float, note.split("steered: ")[1].split(";")[0].split(" to "))
    assert after > before
    assert {frozenset(probe) for probe in result.adapter.probes} == {frozenset({"prompt", "completion"})}
    assert result.statistics.forms == {"preference": 6}


def test_a_run_goes_on_where_it_ended(base: Base, tmp_path: Path) -> None:
    settings = replace(SETTINGS, positions="l2")
    whole = train(base, LINES, settings, tmp_path / "whole")
    assert any("tokens stand before the first edited one" in note for note in whole.notes), "the faster way was taken"
    with pytest.raises(TrainingInterrupted):
        train(base, LINES, settings, tmp_path / "a", on_step=stop_at(4))
    with pytest.raises(InputError, match="objective: 'dpo', now 'orpo'"):
        train(base, LINES, replace(settings, objective="orpo", resume=True), tmp_path / "a")
    train(base, LINES, replace(settings, resume=True), tmp_path / "a")
    assert files(tmp_path / "a") == files(tmp_path / "whole")


def test_every_form_of_a_pair_is_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TURNS
    user, good, bad = ({"role": role, "content": text} for role, text in (("user", "u"), ("assistant", "a"), ("assistant", "b")))
    lines: list[dict[str, Any]] = [
        {"prompt": "u", "chosen": "a", "rejected": "b", "score_chosen": 4.0},
        {"prompt": [user], "chosen": [good], "rejected": [bad]},
        {"chosen": [user, good], "rejected": [user, bad]},
        {"prompt": "u", "chosen": [user, good], "rejected": [user, bad]},
    ]
    read = load_pairs(lines, tokenizer, max_length=200, stop_tokens=(257,))
    for example in read.examples:
        assert side_of(tokenizer, example) == ("<user>u<assistant>", "a</s>")
        assert side_of(tokenizer, example.rejected) == ("<user>u<assistant>", "b</s>")
    assert len(read.examples) == 4 and read.templated


def test_a_cut_answer_of_either_side_is_told(tokenizer: PreTrainedTokenizerFast) -> None:
    sides = ("a", "bcd" * 9)
    lines = [{"prompt": "u", "chosen": sides[n % 2], "rejected": sides[1 - n % 2]} for n in range(2)] + [
        {"prompt": "u", "chosen": "a", "rejected": "b"}
    ]
    read = load_pairs(lines, tokenizer, max_length=12)
    assert read.truncated_lines == tuple(example.where for example in read.examples[:2])
    assert statistics_of(read.examples, (), PositionRule.parse("all"), tokenizer).truncated == 2


def test_what_is_refused(base: Base, tmp_path: Path) -> None:
    user, good = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
    fine = LINES[0]
    for line, said in (
        ({"prompt": "u", "chosen": "a"}, r"lacks \['rejected'\]; expected lines like"),
        ({"prompt": "u", "completion": "a"}, r"lacks \['chosen', 'rejected'\]"),
        ({"chosen": "a", "rejected": "b"}, r"lacks \['prompt'\]"),
        (fine | {"rejected": fine["chosen"]}, "chosen and rejected are the same answer"),
        (fine | {"rejected": " "}, "rejected: completion is empty"),
        (fine | {"chosen": 3}, "chosen: completion is int"),
    ):
        with pytest.raises(InputError, match=rf"data\[1\](, )?:? ?{said}"):
            train(base, [fine, line], SETTINGS, tmp_path / "a")
    late = {"prompt": "u" * 9, "chosen": "so much is the same: a", "rejected": "so much is the same: b"}
    with pytest.raises(InputError, match=r"data\[0\]: chosen and rejected are the same in the 20 tokens of max_length"):
        train(base, [late], replace(SETTINGS, max_length=20), tmp_path / "a")
    base.tokenizer.chat_template = TURNS
    with pytest.raises(InputError, match=r"data\[0\], rejected: messages must be a list of at least one message"):
        train(base, [{"chosen": [user, good], "rejected": [user]}], SETTINGS, tmp_path / "a")
    with pytest.raises(InputError, match=r"has unknown keys \['chosen', 'rejected'\]; .*; pairs are of train --objective dpo or orpo"):
        train(base, [fine], replace(SETTINGS, objective="sft"), tmp_path / "a")
    with pytest.raises(InputError, match=r"data\[0\]: chosen and rejected differ before their last answer"):
        train(base, [{"chosen": [user, good], "rejected": [user | {"content": "v"}, good]}], SETTINGS, tmp_path / "a")
    base.tokenizer.chat_template = None
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="has no examples; expected lines like"):
        train(base, tmp_path / "empty.jsonl", SETTINGS, tmp_path / "a")
    for name, value in {"kl_weight": 1.0, "distill_system": "be brief", "train_on": "all", "format": "messages"}.items():
        with pytest.raises(InputError, match=f"{name} is of completions, and objective dpo is of pairs"):
            replace(SETTINGS, **{name: value})
    with pytest.raises(InputError, match="objective 'ppo' is unknown; known: sft, dpo, orpo"):
        TrainSettings(objective="ppo")
    assert not (tmp_path / "a").exists()
