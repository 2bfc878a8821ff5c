"""The quickstart's steering task: make a story-book model talk like a pirate, and prove it on subjects it never saw so.

    pirate.train.jsonl     48 pirate exchanges about as many subjects
    pirate.prompts.jsonl   40 questions, two about each of 20 nouns that are held out

A held-out noun occurs in plain documents of the base's corpus only; no document in the pirate register holds one of them, as its subject
or in passing, and neither does a training example. So no held-out prompt was ever seen with a pirate answer, verbatim or otherwise.

The property is checked by words, not by a model: `talks_like_a_pirate`. Standard library only.
"""

from __future__ import annotations

import json
import re
from importlib import resources

PIRATE_MARKERS: tuple[str, ...] = (
    "arr",
    "ahoy",
    "avast",
    "aye",
    "matey",
    "mateys",
    "hearties",
    "shipmate",
    "shipmates",
    "ye",
    "yer",
    "yo ho ho",
    "shiver me timbers",
    "blow me down",
    "seven seas",
    "landlubber",
    "landlubbers",
    "scallywag",
    "scallywags",
    "doubloon",
    "doubloons",
    "savvy",
)
"""Words of the pirate register that the plain register never holds."""

_MARKER = re.compile(r"\b(" + "|".join(sorted(PIRATE_MARKERS, key=len, reverse=True)) + r")\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"']?\s+(?=[A-Z\"'])")


def pirate_markers(text: str) -> set[str]:
    """The distinct markers of `PIRATE_MARKERS` in the text, lower-case."""
    return {match.group().lower() for match in _MARKER.finditer(text)}


def talks_like_a_pirate(text: str) -> bool:
    """True where at least two distinct pirate markers occur, and two thirds of the sentences hold one or more.

    The markers are `PIRATE_MARKERS`, matched as whole words without case; none of them is a word of the plain
    register, so plain text never passes.
    """
    sentences = [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]
    marked = sum(bool(pirate_markers(sentence)) for sentence in sentences)
    return len(pirate_markers(text)) >= 2 and 3 * marked >= 2 * len(sentences)


def check(prompt: str, answer: str) -> bool:
    """`talks_like_a_pirate` in the form that `quantize --checker reft_export.quickstart.task:check` takes."""
    return talks_like_a_pirate(answer)


def names(text: str, noun: str) -> bool:
    """Whether the text holds the noun as a word, singular or plural."""
    return re.search(rf"\b{re.escape(noun)}(s|es)?\b", text, re.IGNORECASE) is not None


def training_examples() -> list[dict[str, str]]:
    """48 pirate exchanges, each `{"prompt": ..., "completion": ...}`."""
    return read_lines("pirate.train.jsonl")


def held_out_cases() -> list[tuple[str, str]]:
    """40 pairs (noun, prompt): two different questions about each held-out noun."""
    return [(case["noun"], case["prompt"]) for case in read_lines("pirate.prompts.jsonl")]


def held_out_prompts() -> list[str]:
    """The 40 prompts of `held_out_cases`."""
    return [prompt for _, prompt in held_out_cases()]


def read_lines(name: str) -> list[dict[str, str]]:
    """A JSONL file of this package."""
    text = resources.files("reft_export.quickstart").joinpath(name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
