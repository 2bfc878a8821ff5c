"""A row of docs/experiments.md, from its setup to its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evidence.experiments import tasks
from evidence.experiments.contestants import Made, Prefixes, contestant, saved, train
from evidence.experiments.measures import accuracy_and_loss, answers, loss, recalled, upper
from evidence.experiments.rows import Row
from evidence.experiments.setups import Setup
from reft_export.base.load import load_base
from reft_export.training.data import Example, load_data
from runtimes.edits.adapter import save_adapter
from runtimes.edits.positions import PositionRule

LONGEST, ANSWER = 256, 24
"""Tokens: of an example, and of an answer in upper case or not."""
HELD_OUT = {"sentiment": ("films", "products"), "style": ("held",)}
MEASURED = {"sentiment": ("choosing", "films", "products"), "rate": ("choosing",), "form": ("choosing",)}
"""Sections that are measured on other lines than their task's held-out ones."""
REMEMBERS = ("sentiment",)
"""Sections whose rows are also measured off their task."""

Figures = dict[str, float]
Say = Callable[[str], None]


class Bench:
    """The base and the lines, loaded once."""

    def __init__(self, model: str, reviews: Path, folder: Path) -> None:
        self.base = load_base(model, require_tokenizer=True)
        self.base.model.requires_grad_(False)
        self.prefixes = Prefixes(self.base)
        self.folder = folder
        self.lines = {"sentiment": tasks.sentiment(reviews), "style": tasks.style(), "off task": {"held": tasks.off_task()}}

    def examples(self, lines: Sequence[tasks.Line]) -> list[Example]:
        return list(load_data(lines, self.base.tokenizer, max_length=LONGEST).examples)

    def measured(self, setup: Setup, say: Say) -> Row:
        seen = self._seen(setup)
        if setup.saved:
            switched_on = saved(self.base, setup, self._kept(setup.saved))
        else:
            switched_on = contestant(self.base, setup, [example for each in seen.values() for example in each], self.prefixes)
        with switched_on as made:
            done = train(made, setup, seen.get("train", ()), say)
            figures, said = getattr(self, f"_{setup.task}")(made, setup, seen)
            if done.losses:
                figures["train loss"] = sum(done.losses[-10:]) / len(done.losses[-10:])
            if made.interventions is not None:
                adapter = made.interventions.to_adapter(self.base.info, PositionRule.parse(setup.positions))
                save_adapter(adapter, self._kept(setup.key), force=True)
            return Row(setup=setup, figures=figures, parameters=made.count, seconds=done.seconds, peak_mb=done.peak_mb, said=said)

    def _kept(self, key: str) -> Path:
        return self.folder / key.replace("/", "-").replace(" ", "_")

    def _seen(self, setup: Setup) -> Mapping[str, list[Example]]:
        """By name; ``train`` are those that it is trained on."""
        if setup.task == "memory":
            return {"train": self.examples([tasks.line("Say the text.", self._beginning(setup))])}
        if setup.saved:
            return {}
        lines = dict(self.lines[setup.task])
        for name in set(lines) - {"train", *MEASURED.get(setup.section, HELD_OUT[setup.task])}:
            del lines[name]
        lines["train"] = tasks.drawn(lines["train"], setup.examples, setup.seed)
        if setup.section in REMEMBERS:
            lines["off task"] = self.lines["off task"]["held"]
        return {name: self.examples(each) for name, each in lines.items()}

    def _beginning(self, setup: Setup) -> str:
        """Of ALICE, as many tokens as the row's name says."""
        tokenizer: Any = self.base.tokenizer
        return tokenizer.decode(tokenizer(tasks.ALICE)["input_ids"][: int(setup.name.split()[0])])

    def _sentiment(self, made: Made, setup: Setup, seen: Mapping[str, list[Example]]) -> tuple[Figures, list[str]]:
        figures: Figures = {}
        for name in (name for name in ("choosing", "films", "products") if name in seen):
            figures[name], figures[f"{name} loss"] = accuracy_and_loss(made, seen[name], self.base)
        if "off task" in seen:
            figures["off task loss"] = loss(made, seen["off task"])
        return figures, []

    def _style(self, made: Made, setup: Setup, seen: Mapping[str, list[Example]]) -> tuple[Figures, list[str]]:
        said = answers(made, self.base, self._prompts(), ANSWER)
        return {"upper": upper(said), "held loss": loss(made, seen["held"])}, said[:3]

    def _strength(self, made: Made, setup: Setup, seen: Mapping[str, list[Example]]) -> tuple[Figures, list[str]]:
        """Fluency is what the base itself loses on the answers in sentence case."""
        said = answers(made, self.base, self._prompts(), ANSWER)
        lines = [tasks.line(prompt, text.strip().capitalize()) for prompt, text in zip(tasks.prompts(), said, strict=True) if text.strip()]
        assert made.steering is not None
        with made.steering.switched_off():
            base_loss = loss(made, self.examples(lines)) if lines else float("nan")
        words = [text.lower().split() for text in said]
        distinct = sum(len(set(each)) for each in words) / max(1, sum(map(len, words)))
        return {"upper": upper(said), "base loss": base_loss, "distinct words": distinct}, said[:3]

    def _prompts(self) -> list[list[int]]:
        """The questions as the base sees them, without the answers."""
        asked = self.examples([tasks.line(prompt, "X") for prompt in tasks.prompts()])
        return [list(example.input_ids[: example.prompt_length]) for example in asked]

    def _memory(self, made: Made, setup: Setup, seen: Mapping[str, list[Example]]) -> tuple[Figures, list[str]]:
        (example,) = seen["train"]
        right, wanted = recalled(made, self.base, example)
        return {"recalled": right, "tokens": wanted}, []
