"""What ``reft-export run`` was asked, as the two tasks take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from runtimes.artifacts.artifact import Artifact


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The verb's own options; a task has refused those that mean nothing to it."""

    prompt: Sequence[str]
    prompts: Path | None
    pair: Sequence[str]
    adapter: str | None
    strength: float
    """Of every adapter that steers."""
    chat: str
    system: str | None
    stream: bool
    batch_size: int
    prefill_chunk: int | None
    speculate: int
    """Tokens at most that a prompt which runs alone is fed ahead."""
    as_json: bool
    """Answers as JSONL; those of a file are."""
    json_schema: Path | None
    """That every answer fits, but where a line says another, or null."""
    settings: Mapping[str, Any]
    """Of GenerationSettings, not yet checked."""


class Line(Protocol):
    @property
    def where(self) -> str: ...

    @property
    def options(self) -> Mapping[str, Any]: ...


def check_adapters(opened: Artifact, lines: Sequence[Line]) -> None:
    """Raises BundleError with the line for an adapter of its own that is not in the artifact."""
    from runtimes.errors import BundleError

    for line in lines:
        if (name := line.options.get("adapter")) is not None:
            try:
                opened.adapter(name)
            except BundleError as e:
                raise BundleError(f"{line.where}: {e}") from None
