"""The quickstart's steering task: make a story-book model talk like a pirate, and prove it on subjects it never saw so.

What is held out, exactly:

- `lexicon.HELD_OUT_NOUNS` (20 nouns, five of each kind). In the base's corpus they occur in plain documents only; no
  document in the pirate register holds one of them, as its subject or in passing. So no held-out prompt was ever seen
  with a pirate answer, verbatim or otherwise.
- The 48 training examples are about 48 other subjects, twelve of each kind, and hold no held-out noun either.
- `held_out_prompts` asks two questions about each held-out noun.

The property is checked by words, not by a model: `talks_like_a_pirate`. Standard library only.
"""

from __future__ import annotations

import re
from random import Random

from reft_export.quickstart.corpus import compose
from reft_export.quickstart.lexicon import HELD_OUT_NOUNS, SUBJECTS, Subject
from reft_export.quickstart.pirate import PIRATE_MARKERS
from reft_export.quickstart.stories import topics_of

_TRAINING_SEED = 1701
_HELD_OUT_SEED = 1718
_KINDS = ("animal", "person", "nature", "object")
_TRAINING_SUBJECTS_PER_KIND = 12

_MARKER = re.compile(r"\b(" + "|".join(sorted(PIRATE_MARKERS, key=len, reverse=True)) + r")\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"']?\s+(?=[A-Z\"'])")


def pirate_markers(text: str) -> set[str]:
    """The distinct markers of `pirate.PIRATE_MARKERS` in the text, lower-case."""
    return {match.group().lower() for match in _MARKER.finditer(text)}


def talks_like_a_pirate(text: str) -> bool:
    """True where at least two distinct pirate markers occur, and two thirds of the sentences hold one or more.

    The markers are `pirate.PIRATE_MARKERS`, matched as whole words without case; none of them is a word of the plain
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


def training_subjects() -> list[Subject]:
    """The 48 subjects of the training examples: twelve of each kind, none of them held out."""
    rng = Random(_TRAINING_SEED)
    return [
        subject
        for kind in _KINDS
        for subject in rng.sample(
            [subject for subject in SUBJECTS if subject.kind == kind and subject.noun not in HELD_OUT_NOUNS],
            _TRAINING_SUBJECTS_PER_KIND,
        )
    ]


def training_examples() -> list[dict[str, str]]:
    """48 pirate exchanges, each `{"prompt": ..., "completion": ...}`, one for each of the training subjects.

    The topics take turns, so that every kind of question is in there several times; those that ask who have two turns,
    because their plain answers open with a name, which is the farthest from a pirate's exclamation.
    """
    rng = Random(_TRAINING_SEED + 1)
    turns = {True: 0, False: 0}
    examples = []
    for subject in training_subjects():
        topics = [*topics_of(subject), "helped" if subject.acts else "liked"]
        examples.append(compose(rng, subject, "pirate", topic=topics[turns[subject.acts] % len(topics)]))
        turns[subject.acts] += 1
    rng.shuffle(examples)
    return [{"prompt": example.prompt, "completion": example.answer} for example in examples]


def held_out_cases() -> list[tuple[str, str]]:
    """40 pairs (noun, prompt): two different questions about each held-out noun."""
    rng = Random(_HELD_OUT_SEED)
    cases: list[tuple[str, str]] = []
    for subject in SUBJECTS:
        if subject.noun not in HELD_OUT_NOUNS:
            continue
        prompts: list[str] = []
        while len(prompts) < 2:
            prompt = compose(rng, subject, "plain").prompt
            if prompt not in prompts:
                prompts.append(prompt)
        cases += [(subject.noun, prompt) for prompt in prompts]
    return cases


def held_out_prompts() -> list[str]:
    """The 40 prompts of `held_out_cases`."""
    return [prompt for _, prompt in held_out_cases()]
