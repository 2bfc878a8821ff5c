"""Whole runs on a tiny base: they learn, resume, repeat, and leave the base as it was."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import resource
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reft_export.base.load import Base, base_from_memory
from reft_export.eager.steering import greedy_tokens, steered
from reft_export.training.edits import parse_layers
from reft_export.training.endings import TrainingInterrupted
from reft_export.training.settings import TrainSettings
from reft_export.training.trainer import TrainResult, train
from runtimes.edits.adapter import load_adapter
from runtimes.errors import BackendUnavailable, InputError, ReftError

SETTINGS = TrainSettings(rank=2, layers="0;2", positions="f2+l2", lr=5e-3, epochs=3, batch_size=4, samples=1, seed=7)


def losses(result: TrainResult) -> list[float]:
    return [record.loss for record in result.history]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stop_at(step: int) -> Any:
    def on_step(at: int, total: int, loss: float, eval_loss: float | None) -> None:
        if at == step:
            raise KeyboardInterrupt

    return on_step


def test_training_learns_and_leaves_the_base_alone(base: Base, data: Path, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    base.model.requires_grad_(True)
    base.model.train()
    steps: list[tuple[int, int, float, float | None]] = []
    phases: list[str] = []
    settings = replace(SETTINGS, epochs=10, eval_fraction=0.25, positions="all", lr=5e-2)
    result = train(base, data, settings, tmp_path / "adapter", on_step=lambda *s: steps.append(s), on_phase=phases.append)
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert base.model.training and all(p.requires_grad for p in base.model.parameters()), "put back as it was"
    assert all(p.grad is None for p in base.model.parameters())
    base.model.eval()
    base.model.requires_grad_(False)

    history = result.history
    assert [r.step for r in history] == list(range(1, 31))
    assert history[-1].loss < 0.8 * history[0].loss
    evaluated = [r.eval_loss for r in history if r.eval_loss is not None]
    assert len(evaluated) == 10 and evaluated[-1] < evaluated[0]
    assert history[0].lr == 0.0 < history[1].lr, "the warm-up starts from 0"
    assert [s[0] for s in steps if s[3] is None] == [1, 2, 3] and steps[-1][:2] == (30, 30) and steps[-1][3] == evaluated[-1]
    prepared = ["trying to leave out of a step what its loss does not need", "computing the layers below the first edit, of 12 examples"]
    assert phases == ["reading the data", "sampling the base", *prepared, "training", "sampling the steered model"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "data.jsonl"], "no other file is left"

    adapter = load_adapter(tmp_path / "adapter")
    assert adapter.training["final_loss"] == history[-1].loss and adapter.training["data"]["files"][0]["file"] == "data.jsonl"
    assert adapter.training["settings"]["positions"] == "all" and adapter.training["steps"] == 30
    prompt = torch.tensor([base.tokenizer("what is 1?")["input_ids"]])
    plain = greedy_tokens(base.model, prompt, None, 8)
    with steered(base.model, adapter):
        assert greedy_tokens(base.model, prompt, None, 8) != plain
    assert len(result.samples_before) == 1 == len(result.samples_after)
    assert result.samples_before[0].prompt == result.samples_after[0].prompt
    assert result.samples_after[0].text.startswith(" ok ok") and not result.samples_before[0].text.startswith(" ok")


def test_a_notebooks_model_and_records_train_as_their_files_do(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, base: Base, data: Path, tmp_path: Path
) -> None:
    settings, records = replace(SETTINGS, max_steps=2), [json.loads(line) for line in data.read_text().splitlines()]
    train(base, data, settings, tmp_path / "files")
    result = train(llama, records, settings, tmp_path / "memory", tokenizer=tokenizer)
    one, other = (files(tmp_path / name)["adapter.safetensors"] for name in ("files", "memory"))
    assert one == other and result.adapter.base.fingerprint == base.info.fingerprint
    (held,) = result.adapter.training["data"]["files"]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    assert held == {"file": "data", "sha256": hashlib.sha256(lines.encode()).hexdigest()}


def test_what_is_in_memory_is_checked_as_files_are(llama: PreTrainedModel, base: Base, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    def refused(message: str, model: Any, records: Any, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            train(model, records, SETTINGS, tmp_path / "a", **options)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl"]

    fine = {"prompt": "what is 1?", "completion": " ok"}
    refused("has no tokenizer, which training needs; pass it as tokenizer", llama, [fine])
    refused("tokenizer goes with a model in memory, and tiny-llama is a Base", base, [fine], tokenizer=tokenizer)
    refused("there is no training data", base, [])
    refused("mixes files and records in memory", base, [fine, data])
    refused(r"data\[1\]: lacks \['completion'\]", base, [fine, {"prompt": "a"}])
    refused(r"data\[1\] is no record of texts and numbers: Object of type bytes", base, [fine, {"prompt": b"a", "completion": "b"}])
    refused("head is a classifier's, and tiny-llama is a decoder", base, [fine], head=True)
    refused("a teacher is steered by the adapter that the run starts from; pass start", base, [fine], teacher=llama)


def test_same_seed_same_bytes(base: Base, data: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, dropout=0.2)
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        train(base, data, replace(settings, seed=seed), tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b") != files(tmp_path / "c")


@pytest.mark.parametrize("step", [1, 4, 5, 9])
def test_resumed_run_equals_the_uninterrupted_one(base: Base, data: Path, tmp_path: Path, step: int) -> None:
    """Interrupted before the first checkpoint, which leaves nothing to resume, in the second epoch, and at the very end; with dropout, so
    that random state counts."""
    settings = replace(SETTINGS, dropout=0.2, eval_fraction=0.1, schedule="cosine", weight_decay=0.01)
    whole = train(base, data, settings, tmp_path / "whole")
    output = tmp_path / "resumed"
    with pytest.raises(TrainingInterrupted, match=rf"stopped at step {step} of 9; no adapter was written"):
        train(base, data, settings, output, on_step=stop_at(step))
    assert not output.exists()
    assert (tmp_path / "resumed.checkpoints").exists() == (step > 1)
    resumed = train(base, data, replace(settings, resume=step > 1), output)
    assert losses(resumed) == losses(whole) and resumed.history == whole.history
    assert files(output) == files(tmp_path / "whole")
    assert not (tmp_path / "resumed.checkpoints").exists()


def test_training_on_several_files_is_training_on_their_lines(base: Base, data: Path, tmp_path: Path) -> None:
    """The adapter of the joined file, both files in its record; a run is resumed with the same files in the same order only."""
    lines = data.read_text().splitlines(keepends=True)
    parts = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for part, text in zip(parts, (lines[:5], lines[5:]), strict=True):
        part.write_text("".join(text))
    whole, several = train(base, data, SETTINGS, tmp_path / "whole"), train(base, parts, SETTINGS, tmp_path / "several")
    assert several.history == whole.history
    assert all((several.adapter.tensors[name] == value).all() for name, value in whole.adapter.tensors.items())
    recorded = load_adapter(tmp_path / "several").training["data"]["files"]
    digests = [hashlib.sha256(part.read_bytes()).hexdigest() for part in parts]
    assert recorded == [{"file": part.name, "sha256": digest} for part, digest in zip(parts, digests, strict=True)]

    output, going_on = tmp_path / "resumed", replace(SETTINGS, resume=True)
    with pytest.raises(TrainingInterrupted):
        train(base, parts, SETTINGS, output, on_step=stop_at(5))
    last = parts[1].read_text()
    for others in (parts[:1], parts[::-1], data):
        with pytest.raises(InputError, match="was run otherwise .*data"):
            train(base, others, going_on, output)
    parts[1].write_text(last + "\n" + json.dumps({"prompt": "one more", "completion": "ok"}))
    with pytest.raises(InputError, match="was run otherwise .*data"):
        train(base, parts, going_on, output)
    parts[1].write_text(last)
    assert train(base, parts, going_on, output).history == whole.history


def test_checkpoints_hold_the_edit_only_and_nothing_pickled(base: Base, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "a"
    with pytest.raises(TrainingInterrupted, match=r"a.checkpoints/checkpoint-\d is kept: pass --resume to go on from it"):
        train(base, data, SETTINGS, output, on_step=stop_at(5))
    (checkpoint,) = (tmp_path / "a.checkpoints").glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-4"
    assert sum(p.stat().st_size for p in checkpoint.iterdir()) < 40_000
    assert not (checkpoint / "training_args.bin").exists()
    for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")]:
        with torch.serialization.safe_globals(_numpy_state()):
            torch.load(path, weights_only=True)

    with pytest.raises(InputError, match="an interrupted run left .*checkpoint-4; pass --resume to go on, or --force"):
        train(base, data, SETTINGS, output)
    other = replace(SETTINGS, resume=True, lr=1.0)
    with pytest.raises(InputError, match=r"was run otherwise \(lr: 0.005, now 1.0\)"):
        train(base, data, other, output)
    # A checkpoint that was being written when the process died is not used.
    half = tmp_path / "a.checkpoints" / "checkpoint-5"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    resumed = train(base, data, replace(SETTINGS, resume=True), output)
    assert len(resumed.history) == 9
    with pytest.raises(InputError, match="there is nothing to resume"):
        train(base, data, replace(SETTINGS, resume=True), tmp_path / "b")


def _numpy_state() -> list[Any]:
    import numpy as np

    return [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def test_run_that_died_after_its_last_step_resumes_to_the_same_adapter(
    base: Base, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(base, data, SETTINGS, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("reft_export.training.trainer.save_adapter", _disk_fails)
        with pytest.raises(OSError, match="no disk"):
            train(base, data, SETTINGS, tmp_path / "a")
    train(base, data, replace(SETTINGS, resume=True), tmp_path / "a")
    assert files(tmp_path / "a") == files(tmp_path / "whole")


def _disk_fails(*_: Any, **__: Any) -> None:
    raise OSError("no disk")


def test_force_starts_over_and_replaces(base: Base, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "a"
    with pytest.raises(TrainingInterrupted):
        train(base, data, SETTINGS, output, on_step=stop_at(3))
    train(base, data, SETTINGS, output, force=True)
    with pytest.raises(InputError, match="exists; choose another output or pass --force"):
        train(base, data, SETTINGS, output)
    first = files(output)
    train(base, data, replace(SETTINGS, seed=1), output, force=True)
    assert files(output) != first
    (tmp_path / "mine.checkpoints").mkdir()
    with pytest.raises(InputError, match="does not hold this tool's checkpoints"):
        train(base, data, SETTINGS, tmp_path / "mine", force=True)


@pytest.mark.parametrize("method", ["loreft", "lobireft"])
def test_gradient_accumulation_equals_the_large_batch(base: Base, data: Path, tmp_path: Path, method: str) -> None:
    """Every token weighs the same: batches of 4, 2 x 2 and 1 x 4 take the same steps, although their lengths differ."""
    runs = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        settings = replace(SETTINGS, method=method, batch_size=batch, gradient_accumulation=accumulation)
        runs.append(train(base, data, settings, tmp_path / f"{batch}"))
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)
    assert losses(runs[2]) == pytest.approx(losses(runs[0]), rel=1e-4)
    # What a mean of means would give is far outside: the same data in batches of 2 without accumulation.
    other = train(base, data, replace(SETTINGS, method=method, batch_size=2, max_steps=9), tmp_path / "other")
    assert losses(other) != pytest.approx(losses(runs[0]), rel=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2", "qwen3_moe"])
def test_other_families_train(tiny: Any, tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path, name: str) -> None:
    base = base_from_memory(tiny(name), tokenizer, name=name)
    settings = replace(SETTINGS, streams="mlp_output;block_output", tied=False, max_steps=6, lr=2e-2, warmup=0.0)
    result = train(base, data, settings, tmp_path / "a")
    assert result.history[-1].loss < result.history[0].loss
    assert len(result.adapter.tensors) == 2 * 2 * 2 * 3


@pytest.mark.parametrize("positions", ["prompt", "all", "l1"])
def test_loss_is_that_of_the_saved_adapter(base: Base, data: Path, tmp_path: Path, positions: str) -> None:
    settings = replace(SETTINGS, positions=positions, eval_fraction=0.3, batch_size=12)
    result = train(base, data, settings, tmp_path / "a")
    assert result.kept is result.history[-1]
    assert result.history[-1].eval_loss == pytest.approx(held_out_loss(base, data, tmp_path / "a", settings), rel=1e-4)


def held_out_loss(base: Base, data: Path, adapter: Path, settings: TrainSettings) -> float:
    """By the saved adapter and transformers' own loss, one row at a time."""
    from reft_export.training.data import load_data, split

    _, held_out = split(load_data(data, base.tokenizer, max_length=256).examples, settings.eval_fraction, settings.seed)
    total, tokens = 0.0, 0
    with steered(base.model, load_adapter(adapter)) as steering, torch.no_grad():
        for example in held_out:
            steering.prompt_length = [example.prompt_length]
            out = base.model(torch.tensor([example.input_ids]), labels=torch.tensor([example.labels]))
            count = len(example.input_ids) - example.prompt_length
            total, tokens = total + float(out.loss) * count, tokens + count
    return total / tokens


def test_the_best_step_is_kept_or_the_last_where_asked(base: Base, tmp_path: Path) -> None:
    """What is learned by heart says nothing of other lines, whose loss rises again; an interrupted run keeps the same step."""
    chance, data = random.Random(3), tmp_path / "data.jsonl"
    words = [" " + "".join(chance.choices("abcdefgh", k=6)) for _ in range(12)]
    data.write_text("".join(json.dumps({"prompt": f"what is {i}?", "completion": word}) + "\n" for i, word in enumerate(words)))
    settings = replace(SETTINGS, eval_fraction=0.3, epochs=20, rank=4, lr=5e-2, schedule="constant", positions="all")
    best, last, resumed = (tmp_path / name for name in ("best", "last", "resumed"))
    result = train(base, data, settings, best)
    evaluated = [record for record in result.history if record.eval_loss is not None]
    assert result.kept == min(evaluated, key=lambda record: record.eval_loss) != result.history[-1], "else this shows nothing"
    assert result.kept.eval_loss == pytest.approx(held_out_loss(base, data, best, settings), rel=1e-4)
    assert load_adapter(best).training["kept_step"] == result.kept.step < load_adapter(best).training["steps"]
    ends = train(base, data, replace(settings, keep="last"), last)
    assert ends.history == result.history and ends.kept is ends.history[-1]
    assert ends.kept.eval_loss == pytest.approx(held_out_loss(base, data, last, settings), rel=1e-4)
    with pytest.raises(TrainingInterrupted):
        train(base, data, settings, resumed, on_step=stop_at(result.history[-1].step - 1))
    assert train(base, data, replace(settings, resume=True), resumed).kept == result.kept
    assert files(resumed)["adapter.safetensors"] == files(best)["adapter.safetensors"]


def test_the_bases_own_dropout_is_off(tokenizer: Any, data: Path, tmp_path: Path, tiny: Any) -> None:
    """GPT-2's config has dropout 0.1; the edit is trained on the model that is shipped, which has none."""
    runs = []
    for name, rate in (("with", 0.5), ("without", 0.0)):
        model = copy.deepcopy(tiny("gpt2"))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = rate
        base = base_from_memory(model, tokenizer, name="gpt2")
        model.train()
        runs.append(train(base, data, replace(SETTINGS, max_steps=2), tmp_path / name))
    assert losses(runs[0]) == losses(runs[1])


def test_bfloat16_base_keeps_float32_parameters(tmp_path: Path, data: Path, tokenizer: Any, llama: PreTrainedModel) -> None:
    base = base_from_memory(copy.deepcopy(llama).bfloat16(), tokenizer, name="half")
    result = train(base, data, replace(SETTINGS, dtype="bfloat16", lr=2e-2), tmp_path / "a")
    assert result.adapter.dtype == "bfloat16"
    assert all(value.dtype == "float32" for value in result.adapter.tensors.values())
    assert result.history[-1].loss < result.history[0].loss
    with pytest.raises(InputError, match="loaded in bfloat16, the settings ask for float32"):
        train(base, data, replace(SETTINGS, dtype="float32"), tmp_path / "b")


def test_start_from_an_adapter(base: Base, data: Path, tmp_path: Path) -> None:
    first = train(base, data, replace(SETTINGS, lr=2e-2), tmp_path / "a")
    second = train(base, data, SETTINGS, tmp_path / "b", start=first.adapter, trained_on="digest")
    assert second.history[0].loss < first.history[0].loss and second.adapter.trained_on == "digest"


def test_loss_that_is_not_finite_stops_the_run(base: Base, data: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, method="noreft", lr=1e30, max_gradient_norm=0.0, warmup=0.0)
    with pytest.raises(ReftError, match=r"is not finite at step [23] of 9 \(last loss .*lower the learning rate"):
        train(base, data, settings, tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl"]


def test_interrupted_before_the_first_checkpoint(base: Base, data: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=10)
    with pytest.raises(TrainingInterrupted, match="there was no checkpoint yet"):
        train(base, data, settings, tmp_path / "a", on_step=stop_at(1))
    assert len(train(base, data, settings, tmp_path / "a").history) == 30


def test_nothing_is_printed(base: Base, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(base, data, replace(SETTINGS, eval_fraction=0.2), tmp_path / "a")
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_refused_before_any_work(base: Base, data: Path, tmp_path: Path, llama: PreTrainedModel) -> None:
    def refused(message: str, base: Base = base, kind: type[Exception] = InputError, **changes: Any) -> None:
        with pytest.raises(kind, match=message):
            train(base, data, replace(SETTINGS, **changes), tmp_path / "a")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl"]

    refused("layer 3 does not exist in this base .3 layers, 0 to 2.", layers="1-3")
    refused("rank 33 does not fit this base; use 1 to its width 32", rank=33)
    refused("max_length is 257; the context of tiny-llama ends at 256", max_length=257)
    refused("has no tokenizer", base=base_from_memory(llama, None, name="bare"))
    refused("data.jsonl:1: the prompt has .* leaves none of 8 ", max_length=8)
    if not torch.cuda.is_available():
        refused("no CUDA GPU here", kind=BackendUnavailable, device="cuda")
    data.write_text('{"prompt": "long enough", "completion": "b"}\n{"prompt": "a", "completion": "b"}\n')
    refused(r"data.jsonl:2: the prompt has 1 token, and positions f2\+l2 edit none of it")
    with pytest.raises(TypeError, match="learning_rate"):
        TrainSettings(learning_rate=1.0)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("all", range(24)), ("8-16", range(8, 17)), ("3;9;18", (3, 9, 18)), ("5", (5,)), ("0-2, 2, 1;23", (0, 1, 2, 23))],
)
def test_layers_grammar(text: str, layers: Any) -> None:
    assert parse_layers(text, 24) == tuple(layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "31"}, "layer 31 does not exist in this base .24 layers, 0 to 23."),
        ({"layers": "3-40"}, "layer 40 does not exist"),
        ({"layers": "9-3"}, "runs backwards; did you mean 3-9"),
        ({"layers": "3;;4"}, "not understood at ''"),
        ({"layers": "-1"}, "not understood at '-1'"),
        ({"streams": "block_output;mlp"}, "stream 'mlp' is unknown"),
        ({"positions": "f0"}, "positions are one of"),
        ({"tied": False, "positions": "l3"}, "untied interventions need a prefix and a suffix"),
        ({"method": "lora"}, "method 'lora' is unknown"),
        ({"method": "consreft", "activation": "relu"}, "consreft has no place for an activation"),
        ({"activation": "elu"}, "activation 'elu' is unknown"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"schedule": "step"}, "schedule 'step' is unknown"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"seed": 2**32}, "seed is 4294967296; it must be at least 0 and below 4294967296"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
    ],
)
def test_refused_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainSettings(**changes).sites(24)


@pytest.mark.parametrize("kilobytes", [1, 12])
def test_files_that_cannot_grow(kilobytes, base: Base, data: Path, tmp_path: Path) -> None:
    """As on a full disk: one line, no adapter, no half-written checkpoint; by the limit it is another file that is too large."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, hard))
    try:
        with pytest.raises(ReftError, match=r"^no space left on the disk, or for so large a file \(ulimit -f\)"):
            train(base, data, SETTINGS, tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.rglob("*") if "jsonl" not in path.name] == []


def test_two_trainings_do_not_share_checkpoints(base: Base, data: Path, tmp_path: Path) -> None:
    seen = []

    def second(*_: object) -> None:
        with ThreadPoolExecutor(1) as pool, pytest.raises(InputError, match=rf"a is being written by process {os.getpid()} "):
            pool.submit(train, base, data, SETTINGS, tmp_path / "a", force=True).result()
        seen.append(sorted(path.name for path in tmp_path.iterdir()))

    train(base, data, replace(SETTINGS, max_steps=1, epochs=1), tmp_path / "a", on_step=second)
    assert "a.checkpoints" in seen[0] and (tmp_path / "a" / "adapter.json").is_file()
