"""What a base does with a text, as the host sees it: one row a task, by the name that a base and a manifest store.

A task says what its bases are recorded on and what is recorded of them, how they may be padded, and what of an export means nothing for
them. The graph's route is that of exporting/routes.py; the device's half is runtimes/tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from reft_export.tasks.classification import Classification
from reft_export.tasks.generation import Generation
from runtimes.artifacts.ort_adapter_file import Tensor
from runtimes.parity.figures import Figures
from runtimes.session import Session

if TYPE_CHECKING:  # what a task refuses, and what it would do, is said before torch is loaded
    import onnx_ir as ir
    import torch
    from transformers import PreTrainedModel

    from reft_export.base.load import Base
    from reft_export.eager.steering import Steerer, Steering


class Row(Protocol):
    """One row of the inputs, alone and so without pads."""

    @property
    def number(self) -> int: ...

    def run(self, session: Session) -> tuple[np.ndarray, Mapping[str, Tensor]]:
        """(logits [positions, V] or [1, labels], every output by name) of the task's session."""
        ...

    def eager(self, model: PreTrainedModel, steering: Steering | None) -> torch.Tensor:
        """The same logits of the eager model, steered where ``steering`` is its handle."""
        ...


class Inputs(Protocol):
    """What a base or an adapter is recorded on."""

    task: ClassVar[str]

    @property
    def likelihoods(self) -> bool:
        """Whether ``said`` says log-probabilities of completions."""
        ...

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """By the names of runtimes/artifacts/golden_schema.py."""
        ...

    def for_adapters(self, model: PreTrainedModel) -> Inputs:
        """Of the base's: what adapters without probes are recorded on."""
        ...

    def said(self, model: PreTrainedModel, steerer: Steerer | None = None) -> dict[str, np.ndarray]:
        """What the model answers, by the names of golden_schema.py without what tells KINDS apart."""
        ...

    def differs(self, model: PreTrainedModel, steerer: Steerer | None, said: Mapping[str, np.ndarray]) -> Figures:
        """Of what the model says now, against what was ``said``."""
        ...

    def rows(self) -> Iterator[Row]:
        """Those that are fed in every way."""
        ...


class Task(Protocol):
    name: str
    recorded: str
    """What the eager model says, for a forecast."""
    decodes: bool
    """Whether its graphs keep a cache of keys and values, and go on from it."""
    swaps_head: bool
    """Whether an adapter may bring a head of its own."""
    no_genai: str
    """Why onnxruntime-genai opens none of its bundles; empty where it may."""

    def inputs(self, base: Base) -> Inputs:
        """The base's."""
        ...

    def with_likelihoods(self, base: Base, inputs: Any) -> Inputs:
        """The base's ``inputs``, and what its likelihood is measured on where it is quantized; as they are where that is there, or where
        there is none: a classifier's texts have no right labels, and a base without tokenizer has no text."""
        ...

    def probe_inputs(self, model: PreTrainedModel, examples: Sequence[Any], of_base: Any) -> Inputs:
        """Those of an adapter with probes: ``examples`` as its training reads them; ``of_base``: ``inputs`` of the same model."""
        ...

    def answers(self, model: PreTrainedModel, asked: Mapping[str, tuple[Any, Steerer | None]]) -> dict[str, dict[str, np.ndarray]]:
        """By name what is recorded of its inputs beside what ``said`` gives: a decoder's greedy tokens."""
        ...

    def stored_inputs(self, arrays: Mapping[str, np.ndarray]) -> Inputs:
        """Those that golden arrays were recorded on."""
        ...

    def check_settings(self, base: str, *, exporter: str, logits: str) -> None:
        """Raises InputError for what the base of that name has no use for."""
        ...

    def logits_shape(self, logits: str) -> str:
        """The forecast's words for --logits."""
        ...

    def padding(self, graph: ir.Graph) -> str:
        """The manifest's: on which side a batch may be padded."""
        ...

    def kv_cache(self, graph: ir.Graph) -> str:
        """The manifest's: how a step's keys and values join those before."""
        ...


GENERATION: Task = Generation()
CLASSIFICATION: Task = Classification()
TASKS: Mapping[str, Task] = {task.name: task for task in (GENERATION, CLASSIFICATION)}
