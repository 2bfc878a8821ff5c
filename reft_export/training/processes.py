"""Processes that a launcher (torchrun, accelerate launch) started for one training.

Each holds the whole base, and the interventions; a step's batch is shared out among them, and gradients are summed over it
(DistributedDataParallel). The first writes and speaks; the others are heard where something goes wrong in them alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from runtimes.errors import InputError, ReftError

T = TypeVar("T")

SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""What accelerate's launcher sets for what shards a model's parameters."""

PATIENCE = timedelta(days=1)
"""For what the first process does alone, with the others waiting: a distillation's teacher answers prompts for hours, and torch gives up
after 10 minutes on GPUs. A process that has ended is noticed all the same, by its closed connection or by the launcher."""

LOST = "another process of this training ended"


class ProcessFailed(ReftError):
    """What went wrong in this process, or in the one that it waited for: said by whichever is left."""

    of_one_process = True


def process_count() -> int:
    """Of this training; 1 without a launcher, which sets LOCAL_RANK too."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def process_index() -> int:
    return int(os.environ["RANK"]) if process_count() > 1 else 0


def leads() -> bool:
    """Whether this process is the one that writes."""
    return process_index() == 0


def join(device: str) -> None:
    """Meets the other processes, where there are any; a GPU is this process's own from then on.

    ``device``: that of the settings. Raises InputError for a launcher that would shard what is trained.
    """
    for variable, name in SHARDING.items():
        if os.environ.get(variable, "").lower() in ("1", "true"):
            raise InputError(
                f"{name} shards what is trained, which is a few kilobytes here, and would leave the base whole in every process all the "
                "same; launch without it (torchrun, or accelerate launch --multi_gpu)"
            )
    if process_count() == 1:
        return
    import torch
    from accelerate import PartialState

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if not on_cpu:
        own, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if own >= there:
            raise InputError(f"the launcher started {own + 1} processes or more here, and there are {there} GPUs; start one for each")
        torch.cuda.set_device(own)
    PartialState(cpu=on_cpu, timeout=PATIENCE)  # whatever asks accelerate later finds it


def agreed(produce: Callable[[], T]) -> T:
    """What ``produce`` gives in the first process, or the ReftError that it raises there, in every one; all of them ask, and none is ahead.

    Raises ProcessFailed where another one is gone."""
    if process_count() == 1:
        return produce()
    from torch import distributed

    said: list[tuple[Any, ReftError | None]] = [(None, None)]
    with _answered():
        distributed.barrier()
    if leads():
        try:
            said = [(produce(), None)]
        except ReftError as e:
            said = [(None, e)]
    with _answered():
        distributed.broadcast_object_list(said, src=0)
    value, refusal = said[0]
    if refusal is not None:
        raise refusal
    return value


def summed(values: list[float]) -> list[float]:
    """Sums over the processes; all of them ask. Raises ProcessFailed where another one is gone."""
    if process_count() == 1:
        return values
    import torch
    from torch import distributed

    total = torch.tensor(values, dtype=torch.float64, device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    with _answered():
        distributed.all_reduce(total)
    return total.tolist()


def lost_process(e: Exception) -> bool:
    """Whether ``e`` says that another process no longer answers."""
    from torch import distributed

    return isinstance(e, (ProcessFailed, distributed.DistError)) or any(said in str(e) for said in ("gloo", "Connection closed by peer"))


@contextmanager
def _answered() -> Iterator[None]:
    try:
        yield
    except Exception as e:
        if lost_process(e):
            raise ProcessFailed(f"{LOST}, and its own message or the launcher's says why; no adapter was written") from None
        raise
