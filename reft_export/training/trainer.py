"""One training run: a frozen base, interventions hooked onto it, transformers' Trainer for the loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, set_seed

from reft_export.base.load import DTYPES, Base, check_device
from reft_export.base.token_rules import context_of, stop_tokens, vocabulary_of
from reft_export.eager.steering import greedy_tokens, steer, steered
from reft_export.training.checkpoints import (
    StepRecord,
    check_working_folder,
    discard,
    open_working_folder,
)
from reft_export.training.data import Example, TrainingData, load_data, split
from reft_export.training.interventions import Interventions
from reft_export.training.loop import EditedModel, OnStep, run_loop
from reft_export.training.settings import TrainSettings
from reft_export.training.teacher import teaching
from runtimes.edits.adapter import Adapter, save_adapter
from runtimes.edits.positions import PositionRule, slots
from runtimes.errors import InputError
from runtimes.files.folders import check_destination
from runtimes.generation import PAD

SAMPLE_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A greedy answer to a prompt of the data."""

    prompt: str
    text: str


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainResult:
    """What ``train`` gives back, beside the saved adapter."""

    adapter: Adapter
    history: tuple[StepRecord, ...]
    samples_before: tuple[Sample, ...]
    samples_after: tuple[Sample, ...]
    truncated_lines: tuple[str, ...]
    """File and line of every example whose completion was cut to max_length."""


def train(
    base: Base,
    data: Path | Sequence[Path],
    settings: TrainSettings,
    output: Path,
    *,
    force: bool = False,
    start: Adapter | None = None,
    trained_on: str | None = None,
    teacher: PreTrainedModel | None = None,
    on_step: OnStep | None = None,
    on_phase: Callable[[str], None] | None = None,
) -> TrainResult:
    """Trains interventions on a JSONL file, or on several as if they were one, and saves the adapter to ``output`` when it is done.

    The base stays as it is, in eval mode: its own dropout, where a config has one, is off, so the edit is trained on
    the model that is shipped. Load the base with ``settings.placement()``; ``device`` moves it, another ``dtype`` is
    refused. The same seed gives the same adapter, byte for byte, on a CPU. The process's random state is set by the
    seed.

    ``start``: an adapter to go on from (settings: ``settings_like``). ``trained_on``: digest of the bundle whose weights the base
    carries. ``teacher``: the float model; with it the loss is the divergence from what it says when ``start`` steers it.

    Raises InputError for settings, data or outputs that cannot be used, before anything is trained; ReftError where the
    loss is not finite or memory runs out; TrainingInterrupted on Ctrl-C, which leaves the last checkpoint, no adapter.

    Parameters are float32: of loreft R [r, D], W [r, D] and b [r] per site, r the rank and D the base's width. Losses are in nats per
    completion token. A model and tokenizer in memory are trained on as ``wrap_base(model, tokenizer, name=...)``. For classifiers there is
    ``reft_export.training.classification.train_classifier``.

    Example::

        settings = TrainSettings(rank=4, layers="8-16", positions="f7+l7", epochs=6)
        dtype, device = settings.placement()
        base = load_base("base", dtype=dtype, device=device, require_tokenizer=True)
        result = train(base, Path("pirate.jsonl"), settings, Path("pirate"))
        print(result.history[-1].loss)
    """
    phase = on_phase or (lambda _: None)
    ready = prepare(base, data, settings, output, force=force, start=start, trained_on=trained_on, taught=teacher is not None, phase=phase)
    folder, checkpoint = open_working_folder(output, ready.run, resume=settings.resume, force=force)
    return _train(base, settings, output, ready, folder, checkpoint, force=force, teacher=teacher, on_step=on_step, phase=phase)


@dataclass(frozen=True, kw_only=True, eq=False)
class Preparation:
    """A run that was checked before anything is trained or written."""

    interventions: Interventions
    rule: PositionRule
    read: TrainingData
    training: list[Any]
    held_out: list[Any]
    run: dict[str, Any]
    """What the run's checkpoints belong to."""
    start: Adapter | None


def prepare(
    base: Base,
    data: Path | Sequence[Path],
    settings: TrainSettings,
    output: Path,
    *,
    force: bool = False,
    start: Adapter | None = None,
    trained_on: str | None = None,
    taught: bool = False,
    phase: Callable[[str], None] = lambda _: None,
) -> Preparation:
    """Every check of ``train``, every line of the data included; the base's model may lie on torch's meta device."""
    check_destination(output, force=force)
    if base.tokenizer is None:
        raise InputError(f"{base.info.name} has no tokenizer, which training needs; put tokenizer.json beside config.json")
    place(base, settings)
    rule, sites = settings.rule, settings.sites(base.info.num_hidden_layers)
    set_seed(settings.seed)
    interventions = Interventions(
        method=settings.method,
        rank=settings.rank,
        sites=sites,
        width=base.info.hidden_size,
        tied=settings.tied,
        activation=settings.activation,
        dropout=settings.dropout,
    )
    if start is not None:
        interventions.start_from(start)
        rule = replace(rule, truncate=start.positions.truncate)  # the grammar of positions does not say it
    stop, context = stop_tokens(base), context_of(base)
    if (settings.max_length or 0) > context:
        raise InputError(f"max_length is {settings.max_length}; the context of {base.info.name} ends at {context}")
    phase("reading the data")
    read = load_data(
        data,
        base.tokenizer,
        max_length=settings.max_length or context,
        chat_template=settings.chat_template,
        stop_tokens=stop,
    )
    check_vocabulary(read, vocabulary_of(base))
    check_positions(read, rule)
    training, held_out = split(read.examples, settings.eval_fraction, settings.seed)
    run = {
        **settings.record(),
        "data": read.digest,
        "base": base.info.fingerprint,
        "base_dtype": base.dtype,
        "start": None if start is None else start.digest,
        "trained_on": trained_on,
        "objective": "teacher" if taught else "data",
    }
    check_working_folder(output, run, resume=settings.resume, force=force)
    return Preparation(interventions=interventions, rule=rule, read=read, training=training, held_out=held_out, run=run, start=start)


def _train(
    base: Base,
    settings: TrainSettings,
    output: Path,
    ready: Preparation,
    folder: Path,
    checkpoint: Path | None,
    *,
    force: bool,
    teacher: PreTrainedModel | None,
    on_step: OnStep | None,
    phase: Callable[[str], None],
) -> TrainResult:
    interventions, rule, read, run, start = ready.interventions, ready.rule, ready.read, ready.run, ready.start
    training, held_out, stop, device = ready.training, ready.held_out, stop_tokens(base), base.model.device
    with frozen(base.model):
        asked = (held_out or training)[: settings.samples]
        if asked:
            phase("sampling the base")
        before = _samples(base, asked, stop)
        phase("training")
        with (
            steer(base.model, interventions.edits(), rule=rule, tied=settings.tied) as steering,
            nullcontext() if teacher is None else teaching(teacher, start) as lesson,
        ):
            edited = EditedModel(base.model, interventions.to(device), steering, lesson)
            history = run_loop(edited, base, training, held_out, settings, folder, checkpoint, on_step)
        adapter = interventions.to_adapter(
            base.info,
            rule,
            dtype=base.dtype,
            trained_on=run["trained_on"],
            training=provenance(read, training, held_out, settings, history)
            | ({} if start is None else {"start": start.digest, "objective": run["objective"]}),
        )
        save_adapter(adapter, output, force=force)
        discard(folder)
        if asked:
            phase("sampling the steered model")
        after = _samples(base, asked, stop, adapter)
    return TrainResult(
        adapter=adapter,
        history=tuple(history),
        samples_before=before,
        samples_after=after,
        truncated_lines=read.truncated_lines,
    )


def place(base: Base, settings: TrainSettings) -> torch.device:
    """Where the base is trained on, after moving it there; InputError for another dtype than asked for, and a second GPU."""
    if settings.dtype != "auto" and base.model.dtype != DTYPES[settings.dtype]:
        raise InputError(f"the base is loaded in {base.dtype}, the settings ask for {settings.dtype}; load it in that dtype")
    if settings.device != "auto":
        check_device(settings.device)
        if base.model.device.type != "meta":  # of a dry run
            base.model.to(settings.device)
    if base.model.device.type == "cuda" and base.model.device.index:
        raise InputError(f"the base is on {base.model.device}; train on the first GPU, chosen with CUDA_VISIBLE_DEVICES")
    return base.model.device


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """No parameter takes a gradient and no dropout acts inside; afterwards both are as they were."""
    trained = [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)


def check_vocabulary(data: TrainingData, vocab_size: int) -> None:
    """A tokenizer with more tokens than the model: a device refuses such a prompt, too."""
    for example in data.examples:
        if max(example.input_ids) >= vocab_size:
            raise InputError(
                f"{example.where}: token id {max(example.input_ids)} is outside the model's vocabulary of {vocab_size}; "
                "use the tokenizer that the base was made with"
            )


def check_positions(data: TrainingData, rule: PositionRule) -> None:
    """An example of which no token is edited would train nothing, and a batch of such has no gradient at all."""
    reached: dict[int, bool] = {}
    for example in data.examples:
        n = example.prompt_length
        if n not in reached:
            reached[n] = bool((slots(rule, np.ones((1, n)), n, prompt_length=np.array([n])) >= 0).any())
        if not reached[n]:
            raise InputError(
                f"{example.where}: the prompt has {n} token, and positions {rule} edit none of it (each end "
                "gets at most half of the prompt); lengthen the prompt, or use positions prompt"
            )


def _samples(base: Base, examples: Sequence[Example], stop: Collection[int], adapter: Adapter | None = None) -> tuple[Sample, ...]:
    """Greedy answers to the examples' prompts, in one left-padded batch, and as text what a device gives out for them."""
    if not examples:
        return ()
    tokenizer, device = base.tokenizer, base.model.device
    assert tokenizer is not None
    prompts = [example.input_ids[: example.prompt_length] for example in examples]
    width = max(map(len, prompts))
    ids = torch.tensor([[*[PAD] * (width - len(p)), *p] for p in prompts], device=device)
    mask = torch.tensor([[*[0] * (width - len(p)), *[1] * len(p)] for p in prompts], device=device)
    with steered(base.model, adapter) if adapter else nullcontext():
        answers = greedy_tokens(base.model, ids, mask, min(SAMPLE_TOKENS, context_of(base) - width), eos=stop)

    def text(tokens: Sequence[int]) -> str:
        # Without the clean-up that some tokenizers ask for, which takes spaces out of answers: a stream cannot do it.
        return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # A stop token need not be a special one, which decoding would leave out.
    ended = [answer[:-1] if answer[-1] in stop else answer for answer in answers]
    return tuple(
        Sample(prompt=text(prompt), text=text([*prompt, *answer])[len(text(prompt)) :])
        for prompt, answer in zip(prompts, ended, strict=True)
    )


def provenance(
    data: TrainingData,
    training: Sequence[Any],
    held_out: Sequence[Any],
    settings: TrainSettings,
    history: Sequence[StepRecord],
) -> dict[str, Any]:
    """What the adapter records of its training."""
    evaluated = [record.eval_loss for record in history if record.eval_loss is not None]
    return {
        "data": {
            "files": [asdict(each) for each in data.files],
            "examples": len(training),
            "held_out": len(held_out),
            "truncated": len(data.truncated_lines),
            "chat_template": data.templated,
        },
        "settings": settings.record(),
        "versions": {
            "reft-export": _own_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "steps": len(history),
        "final_loss": history[-1].loss,
        "final_eval_loss": evaluated[-1] if evaluated else None,
    }


def _own_version() -> str:
    try:
        return metadata.version("reft-export")
    except metadata.PackageNotFoundError:
        return "from source"
