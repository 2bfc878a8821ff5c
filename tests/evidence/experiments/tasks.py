"""What the rows are trained and measured on: lines as ``train`` takes them.

sentiment   Is this review positive or negative? Film reviews of 5 to 16 words that twenty people rated clearly, half of each kind; held out
            are other film reviews, and product reviews.
style       Answers in upper case, as the quickstart's real task; held out are 12 of its 60 exchanges, and 20 prompts of another list.
memory      The beginning of a text that is to be said word for word.
off task    The style's exchanges in sentence case, which no row is trained on: what a row has forgotten.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from evidence.real_adapters import CLEAR, FORMS, QUESTION, THINGS
from evidence.review_text import MOVIES, PRODUCTS, reviews
from reft_export.quickstart.upper import training_examples

SEED = 18
TRAIN, CHOOSING, HELD_OUT = 320, 80, 200
"""Lines: those of a learning rate's choice are held out of both."""
LABELS = ("positive", "negative")
STYLE_HELD_OUT, PROMPTS = 12, 20
ALICE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or twice she had peeped "
    "into the book her sister was reading, but it had no pictures or conversations in it, and what is the use of a book, thought Alice, "
    "without pictures or conversations? So she was considering in her own mind (as well as she could, for the hot day made her feel very "
    "sleepy and stupid)"
)
"""Lewis Carroll, 1865."""
Line = dict[str, list[dict[str, str]]]


def line(prompt: str, answer: str) -> Line:
    """With a system message of one word in place of the template's own, which is 14 tokens longer."""
    said = (("system", "Answer."), ("user", prompt), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def sentiment(folder: Path) -> dict[str, list[Line]]:
    """train, choosing, films and products; ``folder`` as of review_text.reviews."""
    films, products = (_labelled(folder, kind) for kind in (MOVIES, PRODUCTS))
    first, second = TRAIN, TRAIN + CHOOSING
    return {
        "train": films[:first],
        "choosing": films[first:second],
        "films": films[second : second + HELD_OUT],
        "products": products[:HELD_OUT],
    }


def _labelled(folder: Path, kind: str) -> list[Line]:
    """Half of each label, in turn; no text twice."""
    clear = {each.text: each for each in reviews(folder, [kind]) if abs(each.rating) >= CLEAR and 5 <= len(each.text.split()) <= 16}
    texts = sorted(clear)
    random.Random(SEED).shuffle(texts)
    kinds = [[text for text in texts if (clear[text].rating > 0) == positive] for positive in (True, False)]
    return [line(QUESTION + text, label) for both in zip(*kinds, strict=False) for text, label in zip(both, LABELS, strict=True)]


def style() -> dict[str, list[Line]]:
    """train and held."""
    told = [line(each["prompt"], each["completion"]) for each in training_examples()]
    random.Random(SEED).shuffle(told)
    return {"train": told[STYLE_HELD_OUT:], "held": told[:STYLE_HELD_OUT]}


def off_task() -> list[Line]:
    return [line(each["prompt"], each["completion"].capitalize()) for each in training_examples()]


def prompts() -> list[str]:
    """Of the style; none of their things is in its lines."""
    asked = [form.format(thing) for thing in THINGS for form in FORMS]
    random.Random(SEED).shuffle(asked)
    return asked[:PROMPTS]


def drawn(lines: Sequence[Line], count: int | None, seed: int) -> list[Line]:
    """``count`` of them; None: all."""
    return list(lines) if count is None else random.Random(seed).sample(list(lines), count)
