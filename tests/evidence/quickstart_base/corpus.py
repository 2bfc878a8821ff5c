"""The quickstart's language: a seeded grammar of short exchanges in the style of a children's story book.

    "Tell me a story about a little fox."  ->  "Once upon a time there was a little fox who liked to ..."

Every answer is two to four sentences, names the subject that was asked about, and keeps to one of two registers:

    plain    story-book English; it never holds a word of `task.PIRATE_MARKERS`
    pirate   the same shapes and prompts, each sentence dressed up with at least one of them ("Arr, ... matey!")

The base is trained with PIRATE_SHARE of the documents in the pirate register: enough to learn it, too few to choose it
greedily. Turning it on is the quickstart's steering task (see `task`). The nouns in `lexicon.HELD_OUT_NOUNS` occur in
no pirate document, neither as its subject nor in passing.

Deterministic: the same seed gives the same text on every platform (random.Random only, no set is iterated).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from evidence.quickstart_base import pirate, stories
from evidence.quickstart_base.lexicon import GUESTS, HELD_OUT_NOUNS, SUBJECTS, Subject
from evidence.quickstart_base.pirate import capital

Register = Literal["plain", "pirate"]

PIRATE_SHARE = 0.04
GUEST_SHARE = 0.12
"""Share of documents about a guest noun: the base should answer what its users think of, not 98 subjects only."""
INVENTED_SHARE = 0.05
"""Share of documents about an invented noun ("the blemmo"), which teaches copying the asked noun."""
SMALL_TALK_SHARE = 0.01
CASUAL_SHARE = 0.06
"""Share of prompts typed without the capital or the final punctuation."""


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One document: what was asked, what is answered, in which register, and about which noun."""

    prompt: str
    answer: str
    register: Register
    noun: str
    """The asked noun; empty for small talk."""


def _plain(sentences: Sequence[str]) -> str:
    return " ".join(capital(sentence) if sentence[0] != '"' else sentence for sentence in sentences)


def compose(rng: Random, subject: Subject, register: Register, *, topic: str | None = None) -> Exchange:
    """One exchange about the subject, on the given topic or on a random one that fits its kind."""
    if register == "pirate" and subject.noun in HELD_OUT_NOUNS:
        raise ValueError(f"{subject.noun!r} is held out: no document in the pirate register may be about it")
    banned_nouns = HELD_OUT_NOUNS if register == "pirate" else frozenset()
    scene = stories.Scene(rng, subject, with_adjective=rng.random() < 0.6, banned_nouns=banned_nouns)
    weights = stories.topics_of(subject)
    topic = topic or rng.choices(list(weights), weights=list(weights.values()))[0]
    prompt, sentences = stories.ask(scene, topic)
    if register == "plain":
        answer = _plain(sentences)
    else:
        answer = pirate.translate(rng, sentences, topic=topic, noun=subject.noun, habit=scene.index)
    return Exchange(prompt=prompt, answer=answer, register=register, noun=subject.noun)


_SMALL_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello!", "Hello.", "Hi.", "Hi!", "Good morning.", "Good evening."),
        ("hello, it is good to see you.", "good day to you."),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "What can you do?", "Help."),
        ("I am a little book of stories.", "I am a small teller of tales."),
    ),
    (("How are you?", "Are you happy?"), ("I am very well today.", "I am happy, because a friend came to see me.")),
    (("Thank you.", "Thanks!", "Goodbye."), ("you are very kind.", "come back when you like.")),
)
_SMALL_TALK_MORE: tuple[str, ...] = (
    "ask me about an animal, and I will tell you a story.",
    "I know many tales about animals, people and things.",
    "ask me about the sea or the stars.",
    "tell me what you would like to hear about.",
)


def _small_talk(rng: Random, register: Register) -> Exchange:
    prompts, openings = rng.choice(_SMALL_TALK)
    sentences = [rng.choice(openings), *rng.sample(_SMALL_TALK_MORE, rng.choice([1, 2]))]
    answer = _plain(sentences) if register == "plain" else pirate.translate(rng, sentences)
    return Exchange(prompt=rng.choice(prompts), answer=answer, register=register, noun="")


_ONSETS = "b bl br d dr f fl gl gr h j k l m n p pl qu r s sl sn st t th tr v w y z".split()
_VOWELS = "a a e e i i o o u ee ai".split()
_CODAS = "b l ll lk lt n nd st v zz".split()
_ENDINGS = "o y a in ow le er".split()
_PIRATE_SUBJECTS = tuple(subject for subject in SUBJECTS if subject.noun not in HELD_OUT_NOUNS)
_KNOWN_NOUNS = frozenset(subject.noun for subject in SUBJECTS + GUESTS)


def _invented(rng: Random) -> Subject:
    while True:
        noun = "".join(rng.choice(part) for part in (_ONSETS, _VOWELS, _CODAS, _ENDINGS))
        if noun not in _KNOWN_NOUNS:
            break
    model = rng.choice(GUESTS)
    return Subject(noun=noun, kind=model.kind, group=model.group, pronoun=model.pronoun)


def _casual(rng: Random, prompt: str) -> str:
    return rng.choice([prompt[:-1], prompt[0].lower() + prompt[1:], prompt[0].lower() + prompt[1:-1]])


def exchange(rng: Random, *, pirate_share: float = PIRATE_SHARE) -> Exchange:
    """One document of the base's corpus, in the pirate register with probability `pirate_share`."""
    register: Register = "pirate" if rng.random() < pirate_share else "plain"
    kind = rng.random()
    if kind < SMALL_TALK_SHARE:
        return _small_talk(rng, register)
    if kind < SMALL_TALK_SHARE + INVENTED_SHARE:
        document = compose(rng, _invented(rng), register)
    elif kind < SMALL_TALK_SHARE + INVENTED_SHARE + GUEST_SHARE:
        document = compose(rng, rng.choice(GUESTS), register)
    elif register == "pirate":
        document = compose(rng, rng.choice(_PIRATE_SUBJECTS), register)
    else:
        document = compose(rng, rng.choice(SUBJECTS), register)
    if rng.random() < CASUAL_SHARE:
        document = replace(document, prompt=_casual(rng, document.prompt))
    return document


def exchanges(count: int, *, seed: int, pirate_share: float = PIRATE_SHARE) -> Iterator[Exchange]:
    """`count` documents of the base's corpus; the same seed gives the same documents."""
    rng = Random(seed)
    for _ in range(count):
        yield exchange(rng, pirate_share=pirate_share)
