"""A steered decoder as a module that transformers' Trainer, or any loop of one's own, trains: what peft's ``get_peft_model`` is for LoRA.

The base lies outside of the module tree, frozen and in eval mode, with hooks that stay until ``unload``: parameters, state dict and
checkpoints are the edit's alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_export.base.adapters import check_fit
from reft_export.base.load import Base, base_from_memory
from reft_export.eager.steering import EditFn, Steering, steer
from reft_export.training.objective import Origin
from reft_export.training.preparation import interventions_of
from reft_export.training.processes import leads
from reft_export.training.recomputed import recomputed_blocks
from reft_export.training.settings import OF_EDITS, TrainSettings, settings_like
from reft_export.training.tokenizing import IGNORED
from reft_export.training.trainer import versions
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
from runtimes.edits.adapter import Adapter, load_adapter, save_adapter
from runtimes.edits.positions import PositionRule, Positions
from runtimes.errors import InputError
from runtimes.files.folders import name_of

OF_MODEL = (*OF_EDITS, "edits", "positions", "tied", "dropout", "init", "seed", "chat_template")
"""Settings that are of the edit, and not of the loop that trains it."""


def get_steered_model(model: PreTrainedModel | Base, config: TrainSettings) -> SteeredModel:
    """``model`` with edits to be trained, for transformers' Trainer or a loop of one's own; ``save_pretrained`` writes the adapter.

    ``model``: a decoder in memory, or from ``load_base``. It is frozen, put into eval mode and steered in place, until ``unload``.
    ``config``: what is edited: method, rank, layers, streams, activation or edits; positions, tied, dropout, init and seed. Rates, steps
    and batches are the Trainer's. ``chat_template="never"`` says that the data goes through none, and so the device's prompts.

    A batch is input_ids [B, S], attention_mask [B, S] and labels [B, S], int64, -100 where there is no loss. A row's prompt, by which
    positions are counted, ends where its labels begin; where they begin with its first token, as of plain text, it is the first half of its
    tokens, rounded up. ``prompt_length`` [B] in the batch says otherwise.

    Raises InputError for a classifier, settings that are the Trainer's, sites that the base lacks, and a model that is steered already.

    Example::

        model = get_steered_model(model, TrainSettings(rank=4, layers="8-16", positions="f5+l5"))
        model.print_trainable_parameters()
        Trainer(model=model, args=args, train_dataset=rows, data_collator=collator).train()
        model.save_pretrained("style")
    """
    if config.subspaces:
        raise InputError("subspaces are named by the lines that `reft_export.train` reads; here none come: leave them out")
    different = [field.name for field in fields(config) if getattr(config, field.name) != field.default]
    if strange := [name for name in different if name not in OF_MODEL]:
        raise InputError(f"{strange[0]} is of the loop that trains, which is yours; say it there (TrainingArguments), and leave it out")
    return SteeredModel(_free(model), config)


class SteeredModel(nn.Module):
    """Made by ``get_steered_model`` or ``from_pretrained``. What it does not have itself is the base's: ``generate``, ``config``,
    ``device``."""

    def __init__(self, base: Base, settings: TrainSettings, start: Adapter | None = None) -> None:
        super().__init__()
        if base.task == TEXT_CLASSIFICATION:
            raise InputError(
                f"{base.info.name} is a classifier, whose head is trained with the edit; `reft_export.train` does that, this is of decoders"
            )
        if settings.marks:
            raise InputError("positions marked are of prompts whose marks `reft_export.train` reads; here none come: use other positions")
        self.interventions, self.positions = interventions_of(base, settings, Origin(start=start))
        self.interventions.to(base.model.device)
        self._outside, self._settings, self._start = (base,), settings, start
        self._hooks, self._recomputing = ExitStack(), ExitStack()
        edits = {site: partial(_in_float32, edit) for site, edit in self.interventions.edits().items()}
        steering = steer(base.model, edits, rule=self.positions, tied=settings.tied)
        self._steering: Steering = self._hooks.enter_context(steering)

    @classmethod
    def from_pretrained(cls, model: PreTrainedModel | Base, folder: Path | str, *, accept_base: bool = False) -> SteeredModel:
        """``model`` steered by a saved adapter, to be used or trained further. ``accept_base``: a base of equal weights will do.

        Raises AdapterError for a folder that is no adapter, and for one that was trained on another base; else as ``get_steered_model``.
        """
        base, adapter = _free(model), load_adapter(Path(folder))
        check_fit(name_of(Path(folder)), adapter, base, accept_base=accept_base)
        return cls(base, settings_like(adapter), adapter).eval()

    @property
    def base(self) -> Base:
        """What is steered."""
        return self._outside[0]

    def get_base_model(self) -> PreTrainedModel:
        """It is steered too, while it is not unloaded."""
        return self.base.model

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base's own loss takes num_items_in_batch, which Trainer asks: the tokens of accumulated batches weigh alike then."""
        accepted = inspect.signature(self.base.model.forward).parameters.values()
        return bool(getattr(self.base.model, "accepts_loss_kwargs", any(each.kind is each.VAR_KEYWORD for each in accepted)))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_length: Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """The base's own output, steered, its loss where there are labels. Raises InputError for a training step that would train nothing,
        or without what tells where prompts end."""
        learns = self.training and torch.is_grad_enabled()
        if prompt_length is None and labels is not None:
            prompt_length = prompt_lengths(labels, attention_mask)
        if learns:
            _check_rows(self.positions, prompt_length, attention_mask, inputs.get("position_ids"))
            inputs.setdefault("use_cache", False)  # nobody reads a step's, and blocks that are computed again would write to it twice
        self._steering.prompt_length = prompt_length
        try:
            output = self.base.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **inputs)
        finally:
            self._steering.prompt_length = None
        if learns and not output.logits.requires_grad and self._steering.rows is None:
            raise InputError(
                f"positions {self.positions} edit no token of this batch (each end gets at most half of a prompt, which ends where the "
                "labels begin); lengthen the prompts, use positions prompt, or give prompt_length [B]"
            )
        return output

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is the base, bit for bit."""
        with self._steering.switched_off():
            yield

    def unload(self) -> PreTrainedModel:
        """The base without the edits, which it does not have from then on; this model is of no use any more."""
        self._recomputing.close()
        self._hooks.close()
        return self.base.model

    def adapter(self) -> Adapter:
        """What stands now, as a folder holds it; raises AdapterError for parameters that are not finite."""
        base, settings, start = self.base, self._settings, self._start
        record = {name: value for name, value in settings.record().items() if name in OF_MODEL}
        kept = {} if settings.chat_template != "never" else {"data": {"chat_template": False}}
        made = self.interventions.to_adapter(
            base.info,
            self.positions,
            dtype=base.dtype,
            trained_on=None if start is None else start.trained_on,
            training={"settings": record, "versions": versions(), **kept} | ({} if start is None else {"start": start.digest}),
        )
        return made if start is None else replace(made, probes=start.probes)

    def save_pretrained(self, folder: Path | str, *, force: bool = False) -> None:
        """Writes the adapter folder, which ``reft-export export -a`` takes, whole or not at all; one that exists is kept unless ``force``.
        Of several processes the first one writes.

        Trainer's own checkpoints hold the same parameters for its ``resume_from_checkpoint``, and are no adapters.
        """
        if leads():
            save_adapter(self.adapter(), Path(folder), force=force)

    def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
        """Raises InputError: the base's own would push the base."""
        raise InputError(
            "push_to_hub is the base's, and would push the base; write the adapter with save_pretrained(FOLDER), and push it with "
            "`reft-export push FOLDER owner/name`"
        )

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained numbers, those and the base's)."""
        trained = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        return trained, sum(parameter.numel() for parameter in (*self.parameters(), *self.base.model.parameters()))

    def print_trainable_parameters(self) -> None:
        trained, everything = self.get_nb_trainable_parameters()
        print(f"trainable params: {trained:,d} || all params: {everything:,d} || trainable%: {100 * trained / everything:.4f}")

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Blocks are computed again in the backward pass; Trainer calls it where its arguments ask for that. transformers' own does nothing
        to a base in eval mode. No keyword of it is used."""
        self.activation_checkpointing_disable()
        self._recomputing.enter_context(recomputed_blocks(self.base.model, self._steering))

    def activation_checkpointing_disable(self) -> None:
        self._recomputing.close()

    # What transformers calls them in version 4.
    gradient_checkpointing_enable, gradient_checkpointing_disable = activation_checkpointing_enable, activation_checkpointing_disable

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_outside":  # before it is there
                raise
            return getattr(self.base.model, name)

    def _apply(self, fn: Any, recurse: bool = True) -> SteeredModel:
        """``to``, ``cuda`` and the like are of the base, too; the edit stays in float32."""
        self.base.model._apply(fn)
        super()._apply(fn, recurse)
        self.interventions.float()
        return self


def prompt_lengths(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """L [B], int64: the real tokens of each row before its first label that is not -100; of a row without one all.

    Where the first real token has a label the row is plain text, whose prompt is the first half of its tokens, rounded up, as of ``train``.
    labels, attention_mask: [B, S], padded on either side.
    """
    real = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    before = (real & ((real & (labels != IGNORED)).cumsum(1) == 0)).sum(1)
    return torch.where(before > 0, before, (real.sum(1) + 1) // 2)


def _check_rows(positions: Positions, prompt_length: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None) -> None:
    """Raises InputError for rows of several examples, and for rows of which nothing says where the prompt ends."""
    if position_ids is not None and position_ids.dim() == 2:
        falls = position_ids[:, 1:] < position_ids[:, :-1]
        if attention_mask is not None:  # what pads have is no position
            falls = falls & (attention_mask[:, 1:] != 0) & (attention_mask[:, :-1] != 0)
        if bool(falls.any()):
            raise InputError(
                "a row of the batch packs several examples (its position_ids fall), and positions are of one prompt a row; give each a row"
            )
    if prompt_length is None and not (isinstance(positions, PositionRule) and positions.everywhere):
        raise InputError(
            f"a training step with positions {positions} needs to know where prompts end: give labels, or prompt_length [B] where a label "
            "smoother or a loss function of your own takes the labels away"
        )


def _in_float32(edit: EditFn, h: Tensor, slot: Tensor) -> Tensor:
    """Under autocast the edit is computed as it is on a device."""
    with torch.autocast(h.device.type, enabled=False):
        return edit(h, slot)


def _free(model: PreTrainedModel | Base) -> Base:
    """As a Base. Raises InputError for a model that is steered already, whose edits would act twice."""
    if isinstance(model, SteeredModel):
        raise InputError("the model is steered already; its unload() gives the base back, which can be steered anew")
    base = model if isinstance(model, Base) else base_from_memory(model)
    if any(isinstance(getattr(hook, "__self__", None), Steering) for hook in base.model._forward_pre_hooks.values()):
        raise InputError(f"{base.info.name} is steered already; end that first, with unload() of the steered model")
    return base
