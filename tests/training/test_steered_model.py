"""A Trainer script of somebody else's trains a steered model: what it learns, saves and refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models.classifiers import build_classifier
from tiny import build
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments

from reft_export import check_parity, export_bundle, get_steered_model, train
from reft_export.base.load import Base, save_base
from reft_export.eager.steering import steered
from reft_export.exporting.settings import ExportSettings
from reft_export.training import recomputed
from reft_export.training.data import load_data
from reft_export.training.edits import LayerEdits
from reft_export.training.settings import TrainSettings
from reft_export.training.steered_model import SteeredModel, _in_float32, prompt_lengths
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.edits.edit import Site
from runtimes.errors import AdapterError, InputError
from runtimes.text.chat import trained_without_template

EDITS = TrainSettings(rank=2, layers="0;2", positions="f2+l2", seed=7)
LOOP: dict[str, Any] = {"max_steps": 6, "learning_rate": 5e-2, "per_device_train_batch_size": 12, "warmup_steps": 0, "seed": 7}


@pytest.fixture
def rows(base: Base, data: Path) -> list[dict[str, Any]]:
    """The lines as a script has them: tokens, and labels that are -100 in the prompt."""
    examples = load_data(data, base.tokenizer, max_length=256, stop_tokens=()).examples
    return [{"input_ids": list(each.input_ids), "labels": list(each.labels)} for each in examples]


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {name: torch.tensor([[*row[name], *[pad] * (width - len(row[name]))] for row in rows]) for name, pad in fill.items()}
    return batch | {"attention_mask": torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])}


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        self.found += [logs["loss"]] if "loss" in logs else []


def fit(model: SteeredModel, rows: list[dict[str, Any]], folder: Path, resume: bool = False, **options: Any) -> list[float]:
    args = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to="none", logging_steps=1, disable_tqdm=True, max_grad_norm=1.0, **LOOP | options
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=collated, callbacks=[losses := Losses()])
    trainer.train(resume_from_checkpoint=resume)
    return losses.found


def test_a_trainer_script_takes_the_steps_of_train(base: Base, data: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """The same edit, seed, rows and rates: the same losses and parameters, and what is saved answers as what was trained."""
    model = get_steered_model(base.model, EDITS)
    assert all(p.requires_grad for p in model.parameters()) and not any(p.requires_grad for p in model.get_base_model().parameters())
    losses = fit(model, rows, tmp_path / "loop", save_strategy="no")
    model.save_pretrained(tmp_path / "style")
    inputs = {name: value for name, value in collated(rows).items() if name != "labels"}
    (prompt,) = torch.tensor([rows[0]["input_ids"][:8]])[None]
    with torch.no_grad():
        mine = model.eval()(**inputs).logits
        written = model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
        with model.disable_adapter():
            plain = model(**inputs).logits
    assert torch.equal(plain, model.unload()(**inputs).logits)
    adapter = load_adapter(tmp_path / "style")
    with steered(base.model, adapter), torch.no_grad():
        theirs = base.model(**inputs).logits
        assert torch.equal(written, base.model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False))
    assert (mine - theirs).abs().max() < 1e-5 * mine.abs().max() < 1e-2 * (mine - plain).abs().max()

    settings = TrainSettings(**{**vars(EDITS), "lr": 5e-2, "warmup": 0, "max_steps": 6, "batch_size": 12, "samples": 0, "max_length": 256})
    result = train(base, data, settings, tmp_path / "trained")
    assert losses[-1] < 0.98 * losses[0]
    assert losses == pytest.approx([record.loss for record in result.history], rel=1e-5)
    for name, value in result.adapter.tensors.items():
        assert abs(value - adapter.tensors[name]).max() < 1e-4, name


@pytest.mark.slow
def test_what_is_saved_is_exported_and_passes(base: Base, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    model = get_steered_model(base, EDITS)
    fit(model, rows, tmp_path / "loop", save_strategy="no")
    model.save_pretrained(tmp_path / "style")
    save_base(base, tmp_path / "base")
    model.unload()
    export_bundle(str(tmp_path / "base"), [tmp_path / "style"], tmp_path / "bundle", ExportSettings(), report=lambda _: None)
    assert check_parity(tmp_path / "bundle", report=lambda _: None).passed


def test_checkpoints_hold_the_edit_alone_and_are_gone_on_from(
    base: Base, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Trainer's own means; blocks that are computed again in the backward pass change nothing."""
    model = get_steered_model(base, EDITS)
    straight = fit(model, rows, tmp_path / "loop", save_strategy="steps", save_steps=3)
    last = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(last) == {name for name, _ in model.named_parameters()}
    (tmp_path / "loop" / "checkpoint-6").rename(tmp_path / "six")
    model.unload()

    blocks: list[Any] = []
    monkeypatch.setattr(recomputed, "checkpoint", lambda block, *a, **k: blocks.append(block) or checkpoint(block, *a, **k))
    again = get_steered_model(base, EDITS)
    rest = fit(again, rows, tmp_path / "loop", resume=True, save_strategy="no", gradient_checkpointing=True)
    again.unload()
    assert len(blocks) == 3 * len(base.model.model.layers)
    assert rest == pytest.approx(straight[3:], rel=1e-6)
    parts = get_steered_model(base, EDITS)
    split = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    assert fit(parts, rows, tmp_path / "parts", save_strategy="no", **split) == pytest.approx(straight[:1], rel=1e-5), "tokens weigh alike"
    parts.unload()
    assert all(torch.allclose(value, last[name], atol=1e-6) for name, value in again.state_dict().items())
    assert not base.model._forward_pre_hooks and "forward" not in vars(base.model.model.layers[0])


def test_a_saved_adapter_is_loaded_and_trained_further(base: Base, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    edits = TrainSettings(edits=(LayerEdits.parse("0: loreft r2 f2"), LayerEdits.parse("2: red all")), chat_template="never", seed=3)
    model = get_steered_model(base, edits)
    fit(model, rows, tmp_path / "loop", save_strategy="no", max_steps=2)
    model.save_pretrained(tmp_path / "one")
    with pytest.raises(InputError, match="one exists"):
        model.save_pretrained(tmp_path / "one")
    model.unload()
    one = load_adapter(tmp_path / "one")
    assert trained_without_template(one.training) and one.training["settings"]["edits"] == ["0: loreft r2 f2", "2: red all"]

    save_adapter(replace(one, probes=({"text": "what is 1?"},)), tmp_path / "one", force=True)
    model = SteeredModel.from_pretrained(base, tmp_path / "one")
    assert not model.training
    loaded = model.adapter()
    assert loaded.site_forms == one.site_forms and loaded.site_rules == one.site_rules and loaded.probes
    assert trained_without_template(loaded.training) and loaded.training["start"] == one.digest
    assert all(abs(loaded.tensors[name] - value).max() < 1e-6 for name, value in one.tensors.items())
    fit(model, rows, tmp_path / "loop", save_strategy="no", max_steps=1)
    model.unload()
    assert any(abs(value - one.tensors[name]).max() > 1e-4 for name, value in model.adapter().tensors.items())
    with pytest.raises(AdapterError, match="adapter one was trained on tiny-llama .*, this base is"):
        SteeredModel.from_pretrained(build("llama", hidden_size=64), tmp_path / "one")


def test_prompts_end_where_labels_begin() -> None:
    ignored = -100
    labels = torch.tensor([[ignored, ignored, 5, 6, ignored], [ignored, ignored, ignored, 5, ignored], [1, 2, 3, ignored, ignored]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert prompt_lengths(labels, mask).tolist() == [2, 2, 2], "the last row is plain text: half of it, rounded up"
    assert prompt_lengths(labels, None).tolist() == [2, 3, 3]
    assert prompt_lengths(torch.full((1, 4), ignored), None).tolist() == [4]


def test_positions_are_those_of_the_prompt(base: Base, rows: list[dict[str, Any]]) -> None:
    """By labels in a batch that is padded on either side, or by prompt_length; never by the answer's tokens."""
    model = get_steered_model(base, TrainSettings(rank=2, layers="0", positions="l1"))
    with torch.no_grad():
        right = collated(rows[:3])
        loss = model(**right).loss
        flipped = {name: torch.stack([roll(row, mask) for row, mask in zip(value, right["attention_mask"], strict=True)])
                   for name, value in right.items()}  # fmt: skip
        positions = (flipped["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert torch.allclose(model(**flipped, position_ids=positions).loss, loss, rtol=1e-5)
        lengths = prompt_lengths(right["labels"], right["attention_mask"])
        assert torch.equal(model(**right, prompt_length=lengths).loss, loss)
        assert abs(model(**right, prompt_length=lengths - 1).loss - loss) > 1e-5
    model.unload()


def roll(row: Tensor, mask: Tensor) -> Tensor:
    """A right-padded row as a left-padded one."""
    return torch.roll(row, int((mask == 0).sum()))


def test_lower_precision_is_the_bases_alone(rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    model = get_steered_model(build("llama"), EDITS)
    model.print_trainable_parameters()
    assert capsys.readouterr().out == "trainable params: 516 || all params: 152,516 || trainable%: 0.3383\n"
    batch = collated(rows[:2])
    exact = model(**batch).loss
    h, slot, edit = torch.randn(4, model.config.hidden_size), torch.zeros(4, dtype=torch.int32), model.interventions.edits()[Site(layer=0)]
    outside = edit(h, slot)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()
        assert torch.equal(_in_float32(edit, h, slot), outside)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.float32}
    assert abs(model(**batch).loss - exact) < 0.02 * exact


def test_refusals(base: Base, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    def refused(message: str, call: Any, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(InputError, match=message):
            call(*args, **kwargs)

    refused("^lr is of the loop that trains, which is yours", get_steered_model, base, TrainSettings(lr=0.1))
    refused("layer 9 does not exist", get_steered_model, base, TrainSettings(layers="9"))
    refused("^subspaces are named by the lines", get_steered_model, base, TrainSettings(subspaces="a:2;b:2"))
    refused("positions marked are of prompts", get_steered_model, base, replace(EDITS, positions="marked"))
    refused("is a classifier, whose head is trained", get_steered_model, build_classifier("bert"), EDITS)
    model = get_steered_model(base, EDITS)
    refused("is steered already", get_steered_model, base, EDITS)
    refused("is steered already", get_steered_model, model, EDITS)
    batch = collated(rows[:2])
    refused("needs to know where prompts end", model, **{name: value for name, value in batch.items() if name != "labels"})
    packed = torch.arange(batch["input_ids"].shape[1])[None].repeat(2, 1) % 4
    refused("packs several examples", model, **batch, position_ids=packed)
    one_token = torch.ones(2, dtype=torch.long)
    refused(r"positions f2\+l2 edit no token of this batch", model, **batch, prompt_length=one_token)
    refused("push_to_hub is the base's, and would push the base", model.push_to_hub, "me/style")
    with model.disable_adapter():
        assert not model(**batch).loss.requires_grad
    model.unload()


def test_of_several_processes_the_first_one_saves(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a launcher's script calls it in each."""
    model = get_steered_model(base, EDITS)
    for name, value in (("LOCAL_RANK", "1"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    model.save_pretrained(tmp_path / "style")
    assert not (tmp_path / "style").exists()
    monkeypatch.setenv("RANK", "0")
    model.save_pretrained(tmp_path / "style")
    assert load_adapter(tmp_path / "style").sites
    model.unload()
