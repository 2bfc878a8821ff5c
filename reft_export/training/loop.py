"""The loop: transformers' Trainer over a module whose parameters are the interventions alone."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from reft_export.base.load import Base
from reft_export.base.token_rules import pad_token
from reft_export.training.checkpoints import (
    StepRecord,
    best_step,
    complete_checkpoint,
    discard,
    last_checkpoint,
    read_best,
    read_history,
    stale_evaluations,
)
from reft_export.training.data import E, Examples
from reft_export.training.interventions import Interventions
from reft_export.training.reporting import events_folder, reporting_callbacks
from reft_export.training.settings import NO_REPORT, SCHEDULES, TrainSettings
from runtimes.errors import InputError, ReftError
from runtimes.files.folders import NO_SPACE, disk_is_full
from runtimes.generation import PAD

OnStep = Callable[[int, int, float, "float | None"], None]
"""(step, total steps, its loss, latest held-out loss); called once more for a step after which that loss was taken."""

Measure = Callable[[], float]
"""The share of the held-out examples that the model does right as it stands."""

CHECKPOINTS_PER_RUN = 10
GROUPED = 50
"""Batches whose examples are sorted by length together, as transformers does."""


class TrainingInterrupted(ReftError):
    """Ctrl-C while training; the message says how to go on."""

    exit_code = 130


class _NotFinite(Exception):
    """What became non-finite; ``run_loop`` adds the step."""


class TrainedModel(nn.Module):
    """Loss of the hooked base, as a module whose parameters are what is trained alone; subclasses give ``forward``.

    The base is kept out of the module tree on purpose: Trainer then optimises, moves and checkpoints the edit only, and
    ``train()`` leaves the base in eval mode.
    """

    accepts_loss_kwargs = True  # Trainer passes num_items_in_batch, so that accumulated batches weigh each token alike

    def __init__(self, interventions: Interventions) -> None:
        super().__init__()
        self.interventions = interventions
        self._step_loss = 0.0

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return self.interventions.parameter_groups(weight_decay)

    def counted(self, loss: Tensor) -> dict[str, Tensor]:
        """What ``forward`` returns; raises _NotFinite."""
        if not torch.isfinite(loss):
            raise _NotFinite("the loss")
        if self.training:
            self._step_loss += loss.detach().item()
        return {"loss": loss}

    def take_step_loss(self) -> float:
        loss, self._step_loss = self._step_loss, 0.0
        return loss


class _Recorder(TrainerCallback):
    """History, progress and checkpoints. Trainer's own log is not used: it rounds the loss to four digits."""

    def __init__(
        self,
        model: TrainedModel,
        history: list[StepRecord],
        best: dict[str, Tensor] | None,
        total: int,
        evaluates: bool,
        patience: int | None,
        measure: Measure | None,
        on_step: OnStep | None,
    ) -> None:
        self.patience, self.measure = patience, measure
        self.report: Callable[[dict[str, float]], None] = lambda _: None
        """Sends figures to where the run reports, in transformers' names; the held-out loss Trainer sends itself."""
        self.model, self.history, self.total, self.evaluates = model, history, total, evaluates
        self.best = best
        """The parameters of the best step so far."""
        self.on_step = on_step or (lambda *_: None)
        self.every = math.ceil(total / CHECKPOINTS_PER_RUN)
        self.lr = 0.0
        self.eval_loss = next((r.eval_loss for r in reversed(history) if r.eval_loss is not None), None)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not all(torch.isfinite(g).all() for g in gradients):
            raise _NotFinite("a gradient")
        self.lr = kwargs["optimizer"].param_groups[0]["lr"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        record = StepRecord(step=state.global_step, loss=self.model.take_step_loss(), lr=self.lr)
        self.history.append(record)
        due = record.step % self.every == 0 or record.step == self.total
        control.should_save = due
        control.should_evaluate = due and self.evaluates
        self.report({"loss": record.loss, "learning_rate": record.lr})
        self.on_step(record.step, self.total, record.loss, self.eval_loss)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        self.eval_loss = metrics["eval_loss"]
        last = self.history[-1]
        metric = None if self.measure is None else self.measure()
        self.history[-1] = replace(last, eval_loss=self.eval_loss, metric=metric)
        if metric is not None:
            self.report({"eval_metric": metric})
        if best_step(self.history) is self.history[-1]:
            self.best = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        if self.patience is not None and stale_evaluations(self.history) >= self.patience:
            control.should_training_stop = True
        self.on_step(last.step, self.total, last.loss, self.eval_loss)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        complete_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.history, self.best)


class _Listed(Dataset[E]):
    """A list as the dataset that Trainer's signature asks for."""

    def __init__(self, examples: list[E]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> E:
        return self._examples[index]


class _LengthGrouped(Sampler[int]):
    """Indices by batches of like lengths, an order of its own for each epoch: shuffled examples, GROUPED batches of them sorted by length,
    and their batches shuffled. The incomplete batch is the last."""

    def __init__(self, lengths: Sequence[int], size: int, seed: int) -> None:
        self._lengths, self._size, self._seed, self._epoch = lengths, size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed} {self._epoch}")
        order, chunk = draw.sample(range(len(self)), len(self)), GROUPED * self._size
        last = order[len(order) - len(order) % self._size :]
        order = order[: len(order) - len(last)]
        sorted_ = [i for first in range(0, len(order), chunk) for i in sorted(order[first : first + chunk], key=self._lengths.__getitem__)]
        batches = [sorted_[first : first + self._size] for first in range(0, len(sorted_), self._size)]
        draw.shuffle(batches)
        yield from (index for batch in (*batches, last) for index in batch)


class _Trainer(Trainer):
    """With a sampler of its own, where there is one."""

    grouped: _LengthGrouped | None = None

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return self.grouped or super()._get_train_sampler(*args, **kwargs)


def run_loop(
    model: TrainedModel,
    base: Base,
    examples: Examples[E],
    collate: Callable[..., dict[str, Tensor]],
    settings: TrainSettings,
    folder: Path,
    checkpoint: Path | None,
    on_step: OnStep | None,
    measure: Measure | None = None,
) -> list[StepRecord]:
    """Trains ``model`` on batches that ``collate`` makes of the examples; its loss after every step.

    Its parameters are those of the step that ``settings.keep`` says.
    """
    batches = math.ceil(len(examples.training) / settings.batch_size)
    total = settings.max_steps or settings.epochs * math.ceil(batches / settings.gradient_accumulation)
    history = read_history(checkpoint)
    recorder = _Recorder(model, history, read_best(checkpoint), total, bool(examples.held_out), settings.patience, measure, on_step)
    pad = pad_token(base)
    trainer = _Trainer(
        model=model,
        args=_arguments(settings, total, folder, base.model.device),
        data_collator=partial(collate, pad_token_id=PAD if pad is None else pad),
        train_dataset=_Listed(examples.training),
        eval_dataset=_Listed(examples.held_out) if examples.held_out else None,
        optimizers=(
            torch.optim.AdamW(model.parameter_groups(settings.weight_decay), lr=settings.lr),
            None,
        ),
        callbacks=[recorder, *reporting_callbacks(settings.report_to, events_folder(folder))],
    )
    if settings.group_by_length:
        lengths = [example.length for example in examples.training]
        trainer.grouped = _LengthGrouped(lengths, settings.batch_size, settings.seed)
    if settings.report_to != NO_REPORT:
        recorder.report = trainer.log
    trainer.remove_callback(PrinterCallback)
    with _failures(model, base, settings, history, total, folder):
        if checkpoint is not None and settings.patience is not None and stale_evaluations(history) >= settings.patience:
            model.load_state_dict(load_file(checkpoint / "model.safetensors"))  # its patience had ended when it was killed
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if settings.keep == "best" and recorder.best is not None:
        model.load_state_dict(recorder.best)
    return history


@contextmanager
def _failures(
    model: TrainedModel, base: Base, settings: TrainSettings, history: list[StepRecord], total: int, folder: Path
) -> Iterator[None]:
    """What can go wrong inside, said with the step at which it did and what to do."""
    try:
        yield
    except _NotFinite as e:
        discard(folder)
        raise ReftError(
            f"{e} is not finite at step {len(history) + 1} of {total} (last loss "
            f"{history[-1].loss if history else 'none'}, lr {settings.lr:g}, base in {base.dtype}); "
            "no adapter was written; lower the learning rate, or train with a base in float32"
        ) from None
    except torch.OutOfMemoryError:
        raise ReftError(
            f"out of memory at step {len(history) + 1} with batches of {settings.batch_size}; lower the batch size and "
            "raise gradient accumulation by as much, or lower max_length"
        ) from None
    except KeyboardInterrupt:
        raise TrainingInterrupted(f"stopped at step {len(history)} of {total}; no adapter was written; {_to_go_on(folder)}") from None
    except Exception as e:
        if not disk_is_full(e):
            raise
        raise ReftError(f"{NO_SPACE} at step {len(history)} of {total}; no adapter was written; {_to_go_on(folder)}") from None
    finally:
        model.zero_grad(set_to_none=True)


def _to_go_on(folder: Path) -> str:
    """What is left of a run that ended early, and how to go on; half-written checkpoints are removed."""
    last = last_checkpoint(folder)
    if last is None:
        discard(folder)
        return "there was no checkpoint yet to go on from"
    for other in folder.glob("checkpoint-*"):
        if other != last:
            discard(other)
    return f"{last} is kept: pass --resume to go on from it"


def _arguments(settings: TrainSettings, total: int, folder: Path, device: torch.device) -> TrainingArguments:
    on_cpu = device.type == "cpu"
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=total,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=math.ceil(total * settings.warmup),
        max_grad_norm=settings.max_gradient_norm,
        seed=settings.seed,
        # The base has its final dtype and the edit is float32: no autocast on top.
        bf16=False,
        fp16=False,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        # _Recorder asks for both.
        save_strategy="no",
        eval_strategy="no",
    )
    if args.world_size > 1:
        raise InputError(f"training takes one process, and this is one of {args.world_size}; start it without a launcher")
    assert args.device.type == device.type  # and asking for the device has counted the GPUs
    args._n_gpu = 1  # hooks do not survive DataParallel, which Trainer would use where several are visible
    return args
