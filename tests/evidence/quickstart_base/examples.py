"""The quickstart's training examples and held-out prompts, composed by the grammar that the base was trained on.

    PYTHONPATH=tests python -m evidence.quickstart_base.examples        writes both files into reft_export/quickstart

What is held out: `lexicon.HELD_OUT_NOUNS` (20 nouns, five of each kind), which occur in no document of the corpus in the pirate
register. The 48 training examples are about 48 other subjects, twelve of each kind, and hold no held-out noun either.
"""

from __future__ import annotations

import json
from random import Random

from evidence.quickstart_base.corpus import compose
from evidence.quickstart_base.lexicon import HELD_OUT_NOUNS, SUBJECTS, Subject
from evidence.quickstart_base.stories import topics_of
from reft_export.quickstart import base_path

_TRAINING_SEED = 1701
_HELD_OUT_SEED = 1718
_KINDS = ("animal", "person", "nature", "object")
_TRAINING_SUBJECTS_PER_KIND = 12


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


def training_file() -> str:
    """What pirate.train.jsonl holds."""
    return "".join(json.dumps(example) + "\n" for example in training_examples())


def prompts_file() -> str:
    """What pirate.prompts.jsonl holds."""
    return "".join(json.dumps({"noun": noun, "prompt": prompt}) + "\n" for noun, prompt in held_out_cases())


if __name__ == "__main__":
    folder = base_path().parent
    (folder / "pirate.train.jsonl").write_text(training_file(), encoding="utf-8")
    (folder / "pirate.prompts.jsonl").write_text(prompts_file(), encoding="utf-8")
