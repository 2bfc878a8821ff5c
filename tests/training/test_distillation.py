"""What a system prompt does, learned without it: which tokens are compared, what is kept, who answers, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_data_forms import TURNS, chat
from test_training_run import files, stop_at
from tiny import random_adapter
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reft_export.base.load import Base
from reft_export.cli.options import text_or_file
from reft_export.eager.steering import greedy_tokens, steer
from reft_export.training import greedy
from reft_export.training.counted import CountedHead
from reft_export.training.data import collate, load_data
from reft_export.training.distillation import DistillationObjective
from reft_export.training.distilled_data import PromptedTeacher
from reft_export.training.endings import TrainingInterrupted
from reft_export.training.interventions import Interventions
from reft_export.training.objective import Origin
from reft_export.training.reference import Reference
from reft_export.training.settings import TrainSettings
from reft_export.training.tokenizing import Example
from reft_export.training.trainer import TrainResult, train
from reft_export.training.ways import Batch
from runtimes.edits.edit import Site
from runtimes.edits.form import one_form
from runtimes.edits.positions import PositionRule
from runtimes.errors import InputError

SYSTEM = "speak up"
SETTINGS = TrainSettings(rank=2, layers="0;2", positions="f2+l2", lr=2e-2, max_steps=4, batch_size=4, samples=0, seed=7, probes=4)
DISTILL = replace(SETTINGS, distill_system=SYSTEM)
PAIRS = [{"prompt": f"what is {'very ' * (i % 3)}{i}?", "completion": " ok" * (1 + i % 3)} for i in range(8)]
PROMPTS = [{"prompt": pair["prompt"]} for pair in PAIRS]


def divergences(model: PreTrainedModel, teacher: list[int], student: list[int], answer: list[int]) -> list[float]:
    """KL(p || q) before every token of the answer, from forwards over what stands before it and nothing else."""

    @torch.no_grad()
    def said(tokens: list[int]) -> torch.Tensor:
        return model(input_ids=torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)

    each = [(said([*teacher, *answer[:t]]), said([*student, *answer[:t]])) for t in range(len(answer))]
    return [float((p.exp() * (p - q)).sum()) for p, q in each]


def test_the_loss_compares_the_same_tokens_behind_either_prompt(base: Base, tmp_path: Path) -> None:
    result = train(base, PAIRS, replace(DISTILL, init="identity", lr=0.0, max_steps=1, batch_size=8, eval_fraction=0.25), tmp_path / "a")
    examples = load_data(PAIRS, base.tokenizer, max_length=200, stop_tokens=(257,)).examples
    found: dict[str, list[float]] = {}
    for example in examples:
        prompt, answer = list(example.input_ids[: example.prompt_length]), list(example.input_ids[example.prompt_length :])
        prompted = base.tokenizer(f"{SYSTEM}\n\n").input_ids + prompt
        found[example.where] = divergences(base.model, prompted, prompt, answer)
    trained = [each for example in examples for each in found[example.where]]
    held = result.history[-1].eval_loss
    assert held is not None and result.history[0].loss > 0.01
    mean = (result.history[0].loss * (len(trained) - count_held(result)) + held * count_held(result)) / len(trained)
    assert mean == pytest.approx(sum(trained) / len(trained), rel=1e-4), "training and held-out losses together are those of all lines"


def count_held(result: TrainResult) -> int:
    """Tokens of the held-out answers."""
    assert len(result.adapter.probes) == result.statistics.held_out
    return sum(len(str(probe["completion"])) + 1 for probe in result.adapter.probes)


def test_every_answer_of_a_conversation_is_the_same_for_both(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TURNS
    talk = chat("user:u", "assistant:a1", "user:more", "assistant:b22")
    own = chat("system:own", *(f"{m['role']}:{m['content']}" for m in talk["messages"]))
    teacher = PromptedTeacher(system=SYSTEM, context=200)
    read = load_data([talk, own], tokenizer, max_length=200, stop_tokens=(257,), train_on="all", teacher=teacher)
    for example, before in zip(read.examples, ("", "own"), strict=True):
        seen = example.for_teacher
        assert [example.input_ids[a:b] for a, b in example.trained] == [seen.input_ids[a:b] for a, b in seen.trained]
        assert len(example.trained) == 2 and not seen.prompted
        said = SYSTEM + (f"\n\n{before}" if before else "")
        assert tokenizer.decode(list(seen.input_ids)).startswith(f"<system>{said}<user>u<assistant>a1</s>")
    tokenizer.chat_template = TURNS.replace("</s>", "{{ '!' if messages[0]['role'] == 'system' }}</s>")
    with pytest.raises(InputError, match="renders the answer otherwise behind the system prompt"):
        load_data([talk], tokenizer, max_length=200, stop_tokens=(257,), teacher=teacher)


def reference_of(model: PreTrainedModel, batch: Batch, check: Callable[[Reference, torch.Tensor], None]) -> None:
    """A reference of a model whose edits would show, and the logits without them."""
    torch.manual_seed(1)
    made = Interventions(one_form([Site(layer=0)], method="loreft", rank=2), width=model.config.hidden_size)
    with torch.no_grad():
        plain = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.counted]
        with steer(model, made.edits(), rule=PositionRule(everywhere=True), tied=True) as steering:
            reference = Reference(CountedHead(model), steering)
            check(reference, plain)
            edited = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[batch.counted]
        assert (edited - plain).abs().max() > 1e-2, "and the edits are on again"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_the_base_says_is_kept_where_its_head_says_all(tiny: Any, family: str) -> None:
    examples = [Example(input_ids=tuple(range(3, 3 + n)), prompt_length=2, line=1, where="") for n in (5, 9)]
    batch = Batch.of(collate(examples, pad_token_id=258), torch.device("cpu"))

    def check(reference: Reference, plain: torch.Tensor) -> None:
        reference.keep([batch], limit=10)
        assert not len(reference), "it does not fit"
        torch.testing.assert_close(reference.logits(batch), plain, rtol=1e-5, atol=1e-5)
        reference.keep([batch], limit=10**6)
        assert len(reference) == (2 if family == "llama" else 0), "gemma2 caps its logits behind the head"
        torch.testing.assert_close(reference.logits(batch), plain, rtol=1e-5, atol=1e-5)
        other = Batch.of(collate(examples[::-1], pad_token_id=258), torch.device("cpu"))
        swapped = torch.cat([plain[3:], plain[:3]])
        torch.testing.assert_close(reference.logits(other), swapped, rtol=1e-5, atol=1e-5)

    reference_of(tiny(family).requires_grad_(False), batch, check)


def test_prompts_alone_are_answered_by_the_prompted_base(base: Base, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)))
    settings = replace(DISTILL, max_new_tokens=5, eval_fraction=0.25)
    result = train(base, path, settings, tmp_path / "a", on_phase=(phases := []).append)
    assert any(phase.startswith("answering with the system prompt") for phase in phases)
    first = base.tokenizer(f"{SYSTEM}\n\n{PROMPTS[0]['prompt']}", return_tensors="pt").input_ids
    (greedy,) = greedy_tokens(base.model, first, None, 5, eos=257)
    answer = base.tokenizer.decode(greedy, skip_special_tokens=True).strip()
    assert result.answers[f"{path}:1"] == answer and len(result.answers) == len(PROMPTS)
    pairs = [{**each, "completion": result.answers[f"{path}:{i}"]} for i, each in enumerate(PROMPTS, 1) if result.answers[f"{path}:{i}"]]
    written = train(base, pairs, settings, tmp_path / "b")
    assert files(tmp_path / "a")["adapter.safetensors"] == files(tmp_path / "b")["adapter.safetensors"]
    assert result.adapter.probes == written.adapter.probes and not written.answers
    assert result.adapter.training["settings"]["distill_system"] == SYSTEM
    with pytest.raises(TrainingInterrupted):
        train(base, path, settings, tmp_path / "c", on_step=stop_at(3))
    train(base, path, replace(settings, resume=True), tmp_path / "c")
    assert files(tmp_path / "c")["adapter.safetensors"] == files(tmp_path / "a")["adapter.safetensors"]


def test_answers_go_to_their_own_prompts(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data and held-out data in memory, line for line; one answer is as long as the context lets it be."""
    monkeypatch.setattr(greedy, "greedy_tokens", lambda model, ids, mask, room, **_: [ids[i, -1:].tolist() * room for i in range(len(ids))])
    data, held_out = (
        [{"prompt": f"{'x' * length} ends in {end}"} for length, end in each] for each in (((9, "a"), (200, "b")), ((9, "c"),))
    )
    settings = replace(DISTILL, max_new_tokens=250, max_steps=1, probes=2)
    result = train(base, data, settings, tmp_path / "a", eval_data=held_out)
    assert {where: set(answer) for where, answer in result.answers.items()} == {"data[0]": {"a"}, "data[1]": {"b"}, "eval_data[0]": {"c"}}
    assert [probe["prompt"] for probe in result.adapter.probes] == [held_out[0]["prompt"]]


def test_prompts_to_which_the_base_says_nothing_are_left_out_and_told(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(*said: str) -> None:
        answers = {f"data[{i}]": each for i, each in enumerate(said)}
        monkeypatch.setattr("reft_export.training.trainer.teacher_answers", lambda *_: answers)

    answer("ok", "", " fine")
    result = train(base, PROMPTS[:3], replace(DISTILL, max_steps=1), tmp_path / "a")
    assert result.statistics.examples == 2 and result.notes[0].startswith("1 of 3 prompts left out") and result.notes[0].endswith("data[1]")
    answer("", "", "")
    with pytest.raises(InputError, match="the base says nothing to any line; give it another"):
        train(base, PROMPTS[:3], DISTILL, tmp_path / "b")


def test_the_prompt_is_learned(base: Base, tmp_path: Path) -> None:
    settings = replace(DISTILL, positions="all", lr=3e-2, max_steps=40, batch_size=8, init="identity", kl_weight=0.0, eval_fraction=0.25)
    history = train(base, PAIRS, settings, tmp_path / "a").history
    held = [record.eval_loss for record in history if record.eval_loss is not None]
    assert history[-1].loss < 0.6 * history[0].loss and held[-1] < held[0]
    pulled = train(base, PAIRS, replace(settings, kl_weight=50.0, keep="last"), tmp_path / "b").history
    assert pulled[0].loss == pytest.approx(history[0].loss, rel=1e-4), "an edit that does nothing is no way from the base"
    assert pulled[-1].loss > 0.9 * pulled[0].loss, "a heavy penalty leaves the base as it is"


def test_a_penalty_is_added_to_the_cross_entropy(base: Base, tmp_path: Path) -> None:
    start = replace(SETTINGS, lr=0.0, max_steps=1, batch_size=8)
    plain, one, two = (train(base, PAIRS, replace(start, kl_weight=w), tmp_path / str(w)).history[0].loss for w in (0.0, 1.0, 2.0))
    assert one - plain > 1e-3 and two - plain == pytest.approx(2 * (one - plain), rel=1e-2)
    still = replace(start, init="identity")
    losses = [train(base, PAIRS, replace(still, kl_weight=w), tmp_path / f"i{w}").history[0].loss for w in (0.0, 5.0)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    kept = replace(SETTINGS, kl_weight=1.0, epochs=2, max_steps=None, batch_size=8)
    notes = train(base, PAIRS, kept, tmp_path / "kept").notes
    assert any("computed once of 8 of 8 completions" in note for note in notes)
    again = train(base, PAIRS, replace(kept, cache_mb=0), tmp_path / "anew")
    assert any("in every step" in note for note in again.notes)


def test_what_is_refused(base: Base, llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, records: Any, settings: TrainSettings = DISTILL, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            train(base, records, settings, tmp_path / "a", **options)
        assert not (tmp_path / "a").exists()

    refused(r"data\[0\]: is plain text, which has no prompt", [{"text": "some words"}])
    refused(r"data\[0\], with the system prompt: the prompt has \d+ tokens", PAIRS, replace(DISTILL, distill_system="long " * 60))
    long = {"prompt": "abcdef", "completion": "b" * 240}
    refused(r"data\[0\]: has 2\d\d tokens with the system prompt, and the base's context ends at 256", [long])
    refused(r"data\[0\]: lacks \['completion'\]", PROMPTS, SETTINGS)
    monkeypatch.setattr(
        base.tokenizer, "chat_template", "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
    )
    refused(r"data\[0\], with the system prompt: .* refuses these messages: no system; .* pass --chat-template never", PAIRS)
    monkeypatch.undo()
    refused(r"data\[0\]: lacks \['completion', 'prompt'\]", [{"question": "a"}])
    refused(r"data\[0\]: prompt is empty", [{"prompt": " "}])
    with pytest.raises(InputError, match="distill_system is empty"):
        TrainSettings(distill_system="  ")
    with pytest.raises(InputError, match="kl_weight is -1"):
        TrainSettings(kl_weight=-1.0)
    started = random_adapter(base.info, layers=(0,))
    with pytest.raises(InputError, match="leave teacher or distill_system out"):
        DistillationObjective(base, DISTILL, Origin(teacher=llama, start=started))


def test_a_text_or_a_file_of_it(tmp_path: Path) -> None:
    path = tmp_path / "system.txt"
    path.write_text("Be brief.\n")
    assert text_or_file(str(path), "--x") == "Be brief." == text_or_file("Be brief.", "--x")
    assert text_or_file("Be very brief. " * 500, "--x").endswith("brief."), "no file has so long a name"
    path.write_text(" \n")
    for value, said in ((str(path), "is empty"), ("", "--x is empty"), ("sytem.txt", "--x sytem.txt is not a file")):
        with pytest.raises(InputError, match=said):
            text_or_file(value, "--x")
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="byte 1 is not UTF-8"):
        text_or_file(str(path), "--x")
