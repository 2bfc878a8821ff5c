"""The loop: transformers' Trainer over a module whose parameters are the interventions alone."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from reft_export.base.load import Base
from reft_export.base.token_rules import pad_token
from reft_export.training.batches import LengthGrouped, Listed, SharedBatches
from reft_export.training.checkpoints import (
    StepRecord,
    best_step,
    complete_checkpoint,
    read_best,
    read_history,
    stale_evaluations,
)
from reft_export.training.data import E, Examples
from reft_export.training.endings import NotFinite, endings
from reft_export.training.interventions import Interventions
from reft_export.training.processes import agreed, leads, process_count, process_index, summed
from reft_export.training.reporting import events_folder, reporting_callbacks
from reft_export.training.settings import NO_REPORT, SCHEDULES, TrainSettings
from runtimes.generation import PAD

OnStep = Callable[[int, int, float, "float | None"], None]
"""(step, total steps, its loss, latest held-out loss); called once more for a step after which that loss was taken."""

OnEvaluation = Callable[[StepRecord], None]
"""Told of every step after which the held-out examples were taken; what it raises ends the run without an adapter."""

Measure = Callable[[], float]
"""The share of the held-out examples that the model does right as it stands."""

CHECKPOINTS_PER_RUN = 10


class TrainedModel(nn.Module):
    """Loss of the hooked base, as a module whose parameters are what is trained alone; subclasses give ``loss``.

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

    @abstractmethod
    def loss(self, **batch: Any) -> Tensor:
        """Of what the run's ``collate`` made: over num_items_in_batch where Trainer gives it, else the batch's mean."""

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Raises NotFinite."""
        loss = self.loss(**batch) if len(batch["labels"]) else torch.zeros(())  # another process has the rows of this batch
        if process_count() > 1:  # which wait for the gradient of every parameter
            loss = loss + torch.stack([0.0 * p.sum() for p in self.parameters()]).sum()
        # Of several processes one that ended here would be waited for: their gradients tell all of them.
        if not torch.isfinite(loss) and process_count() == 1:
            raise NotFinite("the loss")
        if self.training:
            self._step_loss += loss.detach().item()
        return {"loss": loss}

    def take_step_loss(self) -> float:
        """Of all processes; all of them ask."""
        loss, self._step_loss = self._step_loss, 0.0
        return summed([loss])[0]


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
        on_evaluation: OnEvaluation | None,
    ) -> None:
        self.patience, self.measure = patience, measure
        self.report: Callable[[dict[str, float]], None] = lambda _: None
        """Sends figures to where the run reports, in transformers' names; the held-out loss Trainer sends itself."""
        self.model, self.history, self.total, self.evaluates = model, history, total, evaluates
        self.best = best
        """The parameters of the best step so far."""
        self.on_step = on_step or (lambda *_: None)
        self.on_evaluation = on_evaluation or (lambda _: None)
        self.every = math.ceil(total / CHECKPOINTS_PER_RUN)
        self.lr = 0.0
        self.eval_loss = next((r.eval_loss for r in reversed(history) if r.eval_loss is not None), None)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not all(torch.isfinite(g).all() for g in gradients):
            raise NotFinite("a gradient")
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
        metric = None if self.measure is None else agreed(self.measure)
        self.history[-1] = replace(last, eval_loss=self.eval_loss, metric=metric)
        if metric is not None:
            self.report({"eval_metric": metric})
        if best_step(self.history) is self.history[-1]:
            self.best = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        if self.patience is not None and stale_evaluations(self.history) >= self.patience:
            control.should_training_stop = True
        self.on_step(last.step, self.total, last.loss, self.eval_loss)
        self.on_evaluation(self.history[-1])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        agreed(lambda: None)  # every process has written its random state
        if leads():
            complete_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.history, self.best)


class _Trainer(Trainer):
    """With the order of examples, and the held-out loss, that do not depend on the number of processes."""

    batches: Callable[[], SharedBatches]
    held_out: Callable[[], Iterator[tuple[int, dict[str, Tensor]]]]
    """Batches with their numbers of examples."""

    def get_train_dataloader(self) -> SharedBatches:
        return self.batches()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """{"eval_loss": the mean of the batches' means, each weighed by its examples}."""
        model = self.model
        assert isinstance(model, TrainedModel)
        model.eval()
        losses, examples = 0.0, 0.0
        with torch.no_grad():
            for number, (count, batch) in enumerate(self.held_out()):
                if number % process_count() == process_index():
                    losses += count * model(**self._prepare_inputs(batch))["loss"].item()
                    examples += count
        losses, examples = summed([losses, examples])
        metrics = {"eval_loss": losses / examples}
        if not math.isfinite(losses):
            raise NotFinite("the held-out loss")
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


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
    on_evaluation: OnEvaluation | None = None,
) -> list[StepRecord]:
    """Trains ``model`` on batches that ``collate`` makes of the examples; its loss after every step.

    Its parameters are those of the step that ``settings.keep`` says.
    """
    batches = math.ceil(len(examples.training) / settings.batch_size)
    total = settings.max_steps or settings.epochs * math.ceil(batches / settings.gradient_accumulation)
    history = read_history(checkpoint)
    best, evaluates = read_best(checkpoint), bool(examples.held_out)
    recorder = _Recorder(model, history, best, total, evaluates, settings.patience, measure, on_step, on_evaluation)
    pad = pad_token(base)
    padded = partial(collate, pad_token_id=PAD if pad is None else pad)
    training, held_out, size = Listed(examples.training), examples.held_out, settings.batch_size
    trainer = _Trainer(
        model=model,
        args=_arguments(settings, total, folder, base.model.device),
        train_dataset=training,
        optimizers=(
            torch.optim.AdamW(model.parameter_groups(settings.weight_decay), lr=settings.lr),
            None,
        ),
        callbacks=[recorder, *reporting_callbacks(settings.report_to, events_folder(folder))],
    )
    grouped = LengthGrouped([example.length for example in examples.training], size, settings.seed) if settings.group_by_length else None
    trainer.batches = lambda: SharedBatches(training, grouped, size, settings.seed, padded, pin=base.model.device.type == "cuda")
    parts = [held_out[first : first + size] for first in range(0, len(held_out), size)]
    trainer.held_out = lambda: ((len(part), padded(part)) for part in parts)
    if settings.report_to != NO_REPORT:
        recorder.report = trainer.log
    trainer.remove_callback(PrinterCallback)
    with endings(model, base, settings, history, total, folder):
        if checkpoint is not None and settings.patience is not None and stale_evaluations(history) >= settings.patience:
            model.load_state_dict(load_file(checkpoint / "model.safetensors"))  # its patience had ended when it was killed
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if settings.keep == "best" and recorder.best is not None:
        model.load_state_dict(recorder.best)
    return history


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
        ddp_find_unused_parameters=False,  # TrainedModel leaves none unused
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
    assert args.world_size == process_count()
    assert args.device.type == device.type  # and asking for the device has counted the GPUs
    args._n_gpu = 1  # hooks do not survive DataParallel, which Trainer would use where several are visible
    return args
