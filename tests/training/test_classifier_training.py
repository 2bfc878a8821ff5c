"""Training of a classifier: a toy task is learned, head and all; the adapter does what was trained; runs resume; data is checked."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_encoders
import torch
from reseal import reseal
from tokenizers import normalizers

from reft_export.base.load import Base, base_from_memory, load_base
from reft_export.eager.steering import steered
from reft_export.training.endings import TrainingInterrupted
from reft_export.training.labelled_data import collate_labelled, load_labelled
from reft_export.training.settings import TrainSettings, settings_like
from reft_export.training.trainer import train
from runtimes.edits.adapter import load_adapter
from runtimes.errors import AdapterError, InputError

GLUE = {"rank": 1, "positions": "f2", "batch_size": 16, "eval_fraction": 0.2}
"""The paper's GLUE setting in small, one token more: its encoders read words, this one bytes."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(tiny_encoders.save_base(tmp_path_factory.mktemp("base") / "tiny"))


@pytest.fixture
def moods(tmp_path: Path) -> Path:
    """The first letter says the label; labels are names and numbers in turn."""
    path, generator = tmp_path / "moods.jsonl", random.Random(0)
    with path.open("w") as f:
        for i in range(160):
            number = generator.randrange(3)
            text = "gqs"[number] + "".join(generator.choice("abcdef") for _ in range(generator.randint(3, 8)))
            f.write(json.dumps({"text": text, "label": tiny_encoders.LABELS[number] if i % 2 else number}) + "\n")
    return path


def accuracy(base: Base, data: Path, adapter) -> float:
    examples = load_labelled(data, base.tokenizer, base.info.labels, max_length=64).examples
    batch = collate_labelled(examples, pad_token_id=tiny_encoders.PAD)
    with torch.no_grad(), steered(base.model, adapter):
        logits = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return float((logits.argmax(-1) == batch["labels"]).float().mean())


@pytest.mark.slow
def test_the_toy_task_is_learned(base: Base, moods: Path, tmp_path: Path) -> None:
    before = [p.clone() for p in base.model.parameters()]
    result = train(base, moods, TrainSettings(lr=2e-2, max_steps=120, **GLUE), tmp_path / "mood")
    assert result.accuracy.held_out and result.accuracy.before < 0.7 and result.accuracy.after > 0.95
    adapter = load_adapter(tmp_path / "mood")
    assert accuracy(base, moods, adapter) > 0.95, "the saved adapter is what was trained"
    assert accuracy(base, moods, replace(adapter, head={})) < 0.9, "and its head is a part of it"
    assert all(torch.equal(p, q) for p, q in zip(before, base.model.parameters(), strict=True)), "the base stays as it is"
    assert adapter.training["accuracy"] == result.accuracy.after and adapter.training["accuracy_on"] == "held-out texts"


def test_head_and_edit_are_trained_and_saved_together(base: Base, moods: Path, tmp_path: Path) -> None:
    settings = TrainSettings(lr=1e-2, max_steps=4, keep="last", **GLUE)  # the first step, at a rate of 0, may be the best
    result = train(base, moods, settings, tmp_path / "with")
    names = [f"classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("weight", "bias")]
    config = json.loads((tmp_path / "with" / "adapter.json").read_text())
    assert list(result.adapter.head) == config["head"] == names and config["base"]["labels"] == list(tiny_encoders.LABELS)
    own = dict(base.model.named_parameters())
    assert all(np.abs(value - own[name].numpy()).max() > 0 for name, value in result.adapter.head.items())
    saved = load_adapter(tmp_path / "with")
    assert saved.digest == result.adapter.digest != replace(saved, head={}).digest

    without = train(base, moods, settings, tmp_path / "without", head=False)
    assert not without.adapter.head and not load_adapter(tmp_path / "without").head


def test_the_same_seed_gives_the_same_adapter_and_a_run_resumes(base: Base, moods: Path, tmp_path: Path) -> None:
    settings = TrainSettings(lr=1e-2, max_steps=12, **GLUE)
    whole = train(base, moods, settings, tmp_path / "whole")

    def interrupt(step: int, *_: object) -> None:
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(TrainingInterrupted, match="pass --resume"):
        train(base, moods, settings, tmp_path / "resumed", on_step=interrupt)
    assert not (tmp_path / "resumed").exists()
    with pytest.raises(InputError, match="head: True, now False"):
        train(base, moods, replace(settings, resume=True), tmp_path / "resumed", head=False)
    resumed = train(base, moods, replace(settings, resume=True), tmp_path / "resumed")
    assert resumed.adapter.digest == whole.adapter.digest


def test_a_notebooks_classifier_and_records_train_as_their_files_do(base: Base, moods: Path, tmp_path: Path) -> None:
    settings, records = TrainSettings(lr=1e-2, max_steps=2, **GLUE), [json.loads(line) for line in moods.read_text().splitlines()]
    train(base, moods, settings, tmp_path / "files")
    result = train(base.model, records, settings, tmp_path / "memory", tokenizer=base.tokenizer)
    one, other = (load_adapter(tmp_path / name) for name in ("files", "memory"))
    assert one.digest == other.digest and one.base.fingerprint == other.base.fingerprint and result.accuracy.texts == 32
    with pytest.raises(InputError, match="teacher is a decoder's"):
        train(base, records, settings, tmp_path / "taught", start=one, teacher=base.model)
    with pytest.raises(InputError, match="kl_weight is a decoder's"):
        train(base, records, replace(settings, kl_weight=1.0), tmp_path / "near")


def test_going_on_starts_from_the_adapters_head(base: Base, moods: Path, tmp_path: Path) -> None:
    first = train(base, moods, TrainSettings(lr=1e-2, max_steps=3, **GLUE), tmp_path / "first").adapter
    settings = settings_like(first, lr=0.0, max_steps=1, batch_size=16)
    again = train(base, moods, settings, tmp_path / "again", start=first).adapter
    frozen = train(base, moods, settings, tmp_path / "frozen", start=first, head=False).adapter
    for adapter in (again, frozen):
        assert all(np.array_equal(adapter.head[name], value) for name, value in first.head.items())


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "a", "label": 3}', "label 3 is none of the base's: sad, calm, happy, or 0 to 2"),
        ('{"text": "a", "label": "SAD"}', "label 'SAD' is none"),
        ('{"text": "a", "label": true}', "label True is none"),
        ('{"text": "a"}', r"lacks \['label'\]"),
        ('{"text": "a", "label": 0, "idx": 4}', r"unknown keys \['idx'\]"),
        ('{"text": " ", "label": 0}', "text is empty"),
        ('{"text": "a", "text_pair": 4, "label": 0}', "text_pair is int"),
        ('{"text": "a", "label": 0', "not JSON"),
    ],
)
def test_a_bad_line_is_named(base: Base, tmp_path: Path, line: str, said: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "fine", "label": "calm"}\n' + line + "\n")
    with pytest.raises(InputError, match=f"data.jsonl:2: .*{said}"):
        train(base, data, TrainSettings(), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [data]


def test_texts_are_framed_paired_and_cut(base: Base, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "ab", "label": 2}\n{"text": "ab", "text_pair": "cdefghijkl", "label": "sad"}\n')
    one, two = load_labelled(data, base.tokenizer, base.info.labels, max_length=10).examples
    byte = {c: base.tokenizer.convert_tokens_to_ids(c) for c in "abcdef"}
    assert (one.text.ids, one.label, one.truncated) == ((0, byte["a"], byte["b"], 2), 2, False)
    assert two.text.ids == (0, byte["a"], byte["b"], 2, 2, byte["c"], byte["d"], byte["e"], byte["f"], 2)
    assert (two.label, two.truncated, two.prompt_length) == (0, True, 10)
    bert = load_labelled(data, tiny_encoders.tokenizer("bert"), base.info.labels, max_length=64).examples[1].text
    assert bert.types == (0,) * 4 + (1,) * 11
    batch = collate_labelled([one, two], pad_token_id=tiny_encoders.PAD)
    assert batch["input_ids"][0].tolist() == [*one.text.ids, *[tiny_encoders.PAD] * 6]
    assert batch["attention_mask"].sum(1).tolist() == [4, 10] and batch["labels"].tolist() == [2, 0]


def test_a_length_without_room_for_text_is_refused(base: Base, tmp_path: Path) -> None:
    """The tokenizer itself would leave such a text whole, or nothing of it but the special tokens."""
    single, pair, none = (tmp_path / name for name in ("single", "pair", "none"))
    single.write_text('{"text": "abcdef", "label": 0}\n')
    pair.write_text('\n{"text": "abc", "text_pair": "defg", "label": 0}\n')
    none.write_text('{"text": "\\u0000", "label": 0}\n')
    for path, line, special, least in ((single, 1, 2, 3), (pair, 2, 4, 6)):
        for length in range(1, least):
            with pytest.raises(InputError, match=f"{path.name}:{line}: .* special tokens alone are {special}; allow {least} or more"):
                train(base, path, TrainSettings(max_length=length), tmp_path / "out")
        (example,) = load_labelled(path, base.tokenizer, base.info.labels, max_length=least).examples
        assert len(example.text.ids) == least and example.truncated
    wordless = tiny_encoders.tokenizer("bert")
    wordless.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    with pytest.raises(InputError, match=r"none:1: the text has no token of its own \(special tokens alone are 2\)"):
        load_labelled(none, wordless, base.info.labels, max_length=8)
    assert not (tmp_path / "out").exists()


def test_a_head_needs_labels(moods: Path, base: Base, tmp_path: Path) -> None:
    adapter = train(base, moods, TrainSettings(max_steps=1, **GLUE), tmp_path / "a").adapter
    with pytest.raises(AdapterError, match="holds a classification head, and its base tiny has no labels"):
        replace(adapter, base=replace(adapter.base, labels=()))
    path = tmp_path / "a" / "adapter.json"
    config = json.loads(path.read_text())
    reseal(path, head=[*config["head"], "classifier.more"])
    with pytest.raises(AdapterError, match=r"lacks head\.classifier\.more"):
        load_adapter(tmp_path / "a")
    reseal(path, head=[])
    with pytest.raises(AdapterError, match=r"unknown \['head\."):
        load_adapter(tmp_path / "a")


def test_a_base_without_tokenizer_is_refused(moods: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        train(base_from_memory(tiny_encoders.build(), name="tiny"), moods, TrainSettings(), tmp_path / "out")
