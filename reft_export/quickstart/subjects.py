"""What a story is told of: the built-in base that talks like a pirate, or a real model that answers in upper case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reft_export.quickstart import base_path, task, upper
from reft_export.training.settings import TrainSettings
from runtimes.errors import InputError

SMOLLM2 = "smollm2"
"""The name under which ``make models`` puts SmolLM2-135M-Instruct into a clone's ``real-models``."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A base, and the property that its answers are to have."""

    name: str
    """Of the adapter, and of the file of its examples."""
    base: str
    settings: TrainSettings
    examples: Callable[[], Sequence[dict[str, str]]]
    prompts: Callable[[], Sequence[str]]
    """Held out of the training."""
    passes: Callable[[str], bool]
    says: str
    """What a text that passes does: "talks like a pirate"."""
    ask: str
    """A prompt to try."""
    answer_tokens: int
    base_limit: float
    steered_limit: float
    """The story fails when as many of the base's answers, or no more of the steered ones, have the property."""
    compares: bool
    """Whether calibrated ranges and a refit are compared, and every rung of the float bundle is gone through again: minutes on a real
    model."""
    may_be_refused: tuple[str, ...] = ()
    """Precisions that may miss their budget: the story says so, and goes on."""


def built_in() -> Subject:
    return Subject(
        name="pirate",
        base=str(base_path()),
        settings=TrainSettings(
            method="loreft", rank=4, layers="all", positions="f2+l2", lr=4e-3, max_steps=120, batch_size=16, samples=0, seed=0
        ),
        examples=task.training_examples,
        prompts=task.held_out_prompts,
        passes=task.talks_like_a_pirate,
        says="talks like a pirate",
        ask="Tell me about the moon.",
        answer_tokens=80,
        base_limit=0.10,
        steered_limit=0.90,
        compares=True,
    )


def real(base: Path) -> Subject:
    """Of a chat model with 19 layers or more."""
    return Subject(
        name="upper",
        base=str(base),
        settings=TrainSettings(
            method="loreft", rank=4, layers="4;10;18", positions="f5+l5", lr=4e-3, max_steps=40, batch_size=4, samples=0, seed=42
        ),
        examples=upper.training_examples,
        prompts=upper.held_out_prompts,
        passes=upper.in_upper_case,
        says="is in upper case",
        ask="What is the capital of France?",
        answer_tokens=24,
        base_limit=0.10,
        steered_limit=0.50,
        compares=False,
        may_be_refused=("int4",),
    )


def subject_of(model: str | None) -> Subject:
    """``model``: smollm2, or a folder or .gguf file of a chat model; None is the built-in base. Raises InputError for what is not there."""
    if model is None:
        return built_in()
    path = Path("real-models") / f"{SMOLLM2}.gguf" if model == SMOLLM2 else Path(model)
    if path.exists():
        return real(path)
    if model == SMOLLM2:
        raise InputError(
            f"{path} is not here; in a clone `make models` downloads it (100 MB), elsewhere pass SmolLM2-135M-Instruct "
            "(HuggingFaceTB/SmolLM2-135M-Instruct on the Hugging Face hub) as a folder or a .gguf file: --model PATH"
        )
    raise InputError(f"{model} does not exist; --model takes {SMOLLM2}, or a folder or .gguf file of a chat model")
