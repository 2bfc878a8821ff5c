"""What a refit aims at: the float model, steered by the adapter as it was before its base was quantized.

Cross entropy on the completions pulls an adapter on towards the data, and a few dozen lines are soon learned by heart. Against the
teacher's distributions the loss is zero exactly where steering on the quantized weights says what it said on the float ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from reft_export.eager.steering import Steering, steered
from reft_export.training.counted import CountedHead
from reft_export.training.ways import Batch, divergence
from runtimes.edits.adapter import Adapter


class Teacher:
    """A second model in memory beside the trained one; it takes no gradient."""

    def __init__(self, model: PreTrainedModel, steering: Steering) -> None:
        self._head, self._steering = CountedHead(model), steering

    @torch.no_grad()
    def _targets(self, batch: Batch) -> Tensor:
        batch.told(self._steering)
        return self._head.logits(batch.counted, input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    def divergence(self, logits: Tensor, batch: Batch) -> Tensor:
        """sum over counted tokens of KL(teacher || student), in nats; logits [n, V] are the student's at those tokens."""
        return divergence(logits, self._targets(batch))


@contextmanager
def teaching(model: PreTrainedModel, adapter: Adapter) -> Iterator[Teacher]:
    """A Teacher while ``model`` is steered by ``adapter``; AdapterError for one that does not fit."""
    with steered(model, adapter) as steering:
        yield Teacher(model, steering)
