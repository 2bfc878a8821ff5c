"""Which examples a step sees, in which order, and in which process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from reft_export.training.data import E
from reft_export.training.processes import process_count, process_index

GROUPED = 50
"""Batches whose examples are sorted by length together, as transformers does."""
NO_ROWS = {"labels": torch.zeros(0, dtype=torch.int64)}
"""A batch of which another process has all rows."""


class Listed(Dataset[E]):
    """A list as the dataset that Trainer's signature asks for."""

    def __init__(self, examples: list[E]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> E:
        return self._examples[index]


class LengthGrouped(Sampler[int]):
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


class _Share(Sampler[list[int]]):
    """This process's part of every batch: each example of one process's batch is in one process. A part may be empty, so that all
    processes take the same steps."""

    def __init__(self, order: LengthGrouped | SeedableRandomSampler, size: int) -> None:
        self._order, self._batches = order, BatchSampler(order, size, drop_last=False)

    def set_epoch(self, epoch: int) -> None:
        """Asked for by Trainer here where it has skipped the steps before a checkpoint."""
        self._order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches:
            yield batch[process_index() :: process_count()]


class SharedBatches(DataLoader[Any]):
    """The batches that one process would train on, in its order, each shared out among the processes.

    accelerate's own fill the last batch of an epoch up with examples of its beginning, and the loss would depend on how many there are.
    """

    def __init__(
        self, dataset: Listed[Any], grouped: LengthGrouped | None, size: int, seed: int, collate: Callable[..., Any], *, pin: bool
    ) -> None:
        """``grouped``: an order of its own; else each epoch's is drawn by the ``seed``. ``pin``: for copies to a GPU."""
        self._share = _Share(grouped or SeedableRandomSampler(dataset, data_seed=seed), size)
        super().__init__(dataset, batch_sampler=self._share, collate_fn=lambda rows: collate(rows) if rows else NO_ROWS, pin_memory=pin)

    def set_epoch(self, epoch: int) -> None:
        self._share.set_epoch(epoch)
