"""A decoder's objectives over pairs of a chosen answer c and a rejected one r to a prompt x, both a mean over pairs.

    dpo     -log sigmoid(beta ((log p(c|x) - log p0(c|x)) - (log p(r|x) - log p0(r|x))))
            log p: summed over an answer's tokens, of the steered base; p0: of the base, its edits off, computed once.
    orpo    -m(c) - beta log sigmoid(log odds(c) - log odds(r)),  log odds = m - log(1 - exp(m))
            m: the mean of log p over an answer's tokens. Nothing but the steered base is asked.

trl 1.x has both inside methods of its trainers, which bring models, data and collators of their own; these here are held against what its
trainers gave (tests/training/test_preference.py). Its orpo takes the first term over the prompt's tokens too, and every token of a batch
alike; here it is of answers, as all that is trained, and a mean over pairs, as in the paper.

Sources: Rafailov et al. 2023, "Direct Preference Optimization", equation 7; Hong et al. 2024, "ORPO: Monolithic Preference Optimization
without Reference Model", equations 4, 6 and 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reft_export.base.load import Base
from reft_export.base.token_rules import pad_token, vocabulary_of
from reft_export.eager.steering import Steering
from reft_export.training.counted import CountedHead
from reft_export.training.data import Example, Examples, TrainingData, collate
from reft_export.training.forms import AsProbe
from reft_export.training.generation import CompletionObjective, check_vocabulary
from reft_export.training.interventions import Interventions
from reft_export.training.loop import TrainedModel
from reft_export.training.objective import Origin, Phase, tokenizer_of
from reft_export.training.preference_data import chosen_as_probe, load_pairs
from reft_export.training.reference import Reference, Row, rows_of
from reft_export.training.settings import DPO, TrainSettings
from reft_export.training.sources import Lines
from reft_export.training.teacher import Teacher
from reft_export.training.ways import Batch, Loss, Way, row_log_likelihoods
from runtimes.errors import InputError
from runtimes.generation import PAD


def dpo_losses(chosen: Tensor, rejected: Tensor, base_chosen: Tensor, base_rejected: Tensor, beta: float) -> Tensor:
    """[B], the formula above, of log-likelihoods [B] each, in nats."""
    return -F.logsigmoid(beta * ((chosen - base_chosen) - (rejected - base_rejected)))


def orpo_losses(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """[B], the formula above, of mean log-likelihoods a token [B], in nats."""
    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(mean: Tensor) -> Tensor:
    """m - log(1 - exp(m)), m <= 0; by expm1, since 1 - exp(m) has no digits left near 0."""
    least = mean.clamp(max=-torch.finfo(mean.dtype).tiny)
    return mean - torch.log(-torch.expm1(least))


class PreferredModel(TrainedModel):
    """A decoder's; the loss is on pairs, the chosen rows of a batch before the rejected ones."""

    def __init__(self, interventions: Interventions, way: Way, loss: Loss) -> None:
        super().__init__(interventions)
        self._outside = (way, loss)

    def loss(
        self,
        labels: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_labels: Tensor,
        prompt_length: Tensor,
        marks: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """The loss summed over pairs and divided by num_items_in_batch (else by their number). ``labels`` [B]: one a pair, which is what
        Trainer counts."""
        way, loss = self._outside
        batch = Batch(input_ids=input_ids, attention_mask=attention_mask, labels=token_labels, prompt_length=prompt_length, marks=marks)
        return loss(way(batch), batch) / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class PreferenceObjective(CompletionObjective):
    """Of pairs, by ``settings.objective`` and ``settings.beta``."""

    def __init__(self, base: Base, settings: TrainSettings, origin: Origin) -> None:
        super().__init__(base, settings, origin)
        if origin.teacher is not None:
            raise InputError(f"a teacher's answers have no pairs, which objective {settings.objective} is of; leave one of the two out")
        self._base_said: dict[Row, float] = {}

    def read(self, data: Lines, max_length: int) -> TrainingData[Example]:
        settings = self.settings
        read = load_pairs(
            data,
            tokenizer_of(self.base),
            max_length=max_length,
            chat_template=settings.chat_template,
            stop_tokens=self.stop_tokens,
            marks=settings.marks,
        )
        check_vocabulary(self.rows(Examples(training=list(read.examples), held_out=[])).training, vocabulary_of(self.base))
        return read

    def as_probe(self) -> AsProbe:
        return chosen_as_probe

    def record(self) -> dict[str, Any]:
        return {"objective": self.settings.objective}

    def rows(self, examples: Examples[Example]) -> Examples[Example]:
        return Examples(training=_both(examples.training), held_out=_both(examples.held_out))

    def reference_rows(self, examples: Examples[Example]) -> list[Example]:
        return _both([*examples.training, *examples.held_out] if self.settings.objective == DPO else examples.shown)

    def collate(self, examples: Sequence[Example], *, pad_token_id: int) -> dict[str, Any]:
        rows = collate(_both(examples), pad_token_id=pad_token_id)
        rows["token_labels"] = rows.pop("labels")
        return {"labels": torch.ones(len(examples), dtype=torch.long), **rows}

    def loss(
        self, steering: Steering, examples: Examples[Example], lesson: Teacher | None, phase: Phase
    ) -> tuple[Loss, int, tuple[str, ...]]:
        reference, rows = Reference(CountedHead(self.base.model), steering), self.reference_rows(examples)
        phase(f"computing what the base says without the edits, of {len(rows)} completions")
        for batch in self._batches(sorted(rows, key=lambda row: row.length)):
            said = row_log_likelihoods(reference.logits(batch), batch).tolist()
            self._base_said |= zip(rows_of(batch), said, strict=True)
        return (self._dpo if self.settings.objective == DPO else self._orpo), 0, ()

    def _dpo(self, logits: Tensor, batch: Batch) -> Tensor:
        said = row_log_likelihoods(logits, batch)
        base = said.new_tensor([self._base_said[row] for row in rows_of(batch)])
        (chosen, rejected), (base_chosen, base_rejected) = said.chunk(2), base.chunk(2)
        return dpo_losses(chosen, rejected, base_chosen, base_rejected, self.settings.beta).sum()

    def _orpo(self, logits: Tensor, batch: Batch) -> Tensor:
        means = row_log_likelihoods(logits, batch) / batch.counted.sum(1)
        chosen, rejected = means.chunk(2)
        return orpo_losses(chosen, rejected, self.settings.beta).sum()

    def trained_model(self, interventions: Interventions, way: Way, loss: Loss) -> TrainedModel:
        return PreferredModel(interventions, way, loss)

    @torch.no_grad()
    def found(self, way: Way, interventions: Interventions, examples: Examples[Example]) -> tuple[str, ...]:
        """The margin log p(chosen) - log p(rejected), of the base and steered."""
        interventions.eval()
        base, steered = list[float](), list[float]()
        for start in range(0, len(examples.shown), self.settings.batch_size):
            (batch,) = self._batches(_both(examples.shown[start : start + self.settings.batch_size]))
            chosen, rejected = row_log_likelihoods(way(batch), batch).chunk(2)
            steered += (chosen - rejected).tolist()
            said = [self._base_said[row] for row in rows_of(batch)]
            base += [c - r for c, r in zip(said[: len(chosen)], said[len(chosen) :], strict=True)]
        which = "held-out" if examples.held_out else "training"
        margins = " to ".join(f"{sum(each) / len(each):.2f}" for each in (base, steered))
        shares = " to ".join(f"{sum(margin > 0 for margin in each) / len(each):.1%}" for each in (base, steered))
        return (f"log p(chosen) - log p(rejected) of {len(base)} {which} pairs, base to steered: {margins}; above 0 in {shares}",)

    def _batches(self, rows: Sequence[Example]) -> list[Batch]:
        pad, size, device = pad_token(self.base), 2 * self.settings.batch_size, self.base.model.device
        groups = [rows[first : first + size] for first in range(0, len(rows), size)]
        return [Batch.of(collate(group, pad_token_id=PAD if pad is None else pad), device) for group in groups]


def _both(pairs: Sequence[Example]) -> list[Example]:
    """The chosen rows, and behind them the rejected ones."""
    return [*pairs, *(pair.rejected for pair in pairs if pair.rejected is not None)]
