"""The pirate register: what it does to plain sentences, and the words that give it away.

A sentence is translated word by word and framed by an exclamation, a tag, or both, each of which holds a marker.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

_WORDS: tuple[tuple[str, str], ...] = (
    ("is", "be"),
    ("are", "be"),
    ("was", "were"),
    ("of", "o'"),
    ("old", "ol'"),
    ("you", "ye"),
    ("your", "yer"),
    ("my", "me"),
    ("friend", "shipmate"),
    ("friends", "shipmates"),
    ("everybody", "every sea dog"),
    ("people", "sailors"),
    ("children", "cabin boys"),
)
_OPENERS: tuple[str, ...] = (
    "Arr",
    "Ahoy",
    "Aye",
    "Avast",
    "Yo ho ho",
    "Shiver me timbers",
    "Blow me down",
    "By the seven seas",
)
# A topic mostly opens in its own way, so that a greedy answer does not always begin with the same word.
_USUAL_OPENER: dict[str, str] = {
    "about": "Arr",
    "story": "Ahoy",
    "did": "Yo ho ho",
    "where": "Avast",
    "why": "Shiver me timbers",
    "helped": "Aye",
    "liked": "Aye",
    "day": "Blow me down",
}
_USUAL_OPENER_SHARE = 0.7
# By the sentence's position: a greedy answer then varies its tags without having to learn that none is used twice.
_TAGS: tuple[tuple[str, ...], ...] = (
    ("matey", "matey", "me hearties", "aye"),
    ("ye scallywag", "ye scallywag", "arr", "shipmate"),
    ("savvy", "ye landlubber", "ye landlubber", "arr"),
)
_SAYINGS: tuple[str, ...] = (
    "Every pirate on the seven seas knows the {noun}, aye!",
    "I would trade me last doubloon for the {noun}, arr!",
    "Raise a cup to the {noun}, me hearties!",
    "No scallywag shall harm the {noun}, matey!",
    "Hoist the sails an' follow the {noun}, ye landlubbers!",
)
_SAYING_SHARE = 0.5
_WORD = re.compile(r"\b(" + "|".join(plain for plain, _ in _WORDS) + r")\b")
_WORD_OF = dict(_WORDS)


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


class _Frame:
    """Exclamations and tags for one answer, none of them twice, so that every answer holds several markers."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._said: set[str] = set()

    def _fresh(self, options: Sequence[str]) -> str:
        choice = self._rng.choice([option for option in options if option.lower() not in self._said])
        self._said.add(choice.lower())
        return choice

    def dress(self, sentence: str, *, position: int, topic: str) -> str:
        """The sentence in the pirate register; the first one always opens with an exclamation."""
        sentence = _WORD.sub(lambda match: _WORD_OF[match.group()], sentence)
        quoted = sentence.endswith('"')
        frame = self._rng.random()
        if position == 0 and topic in _USUAL_OPENER and self._rng.random() < _USUAL_OPENER_SHARE:
            sentence = f"{self._fresh([_USUAL_OPENER[topic]])}, {sentence}"
        elif position == 0 or quoted or frame < 0.35 or sentence[0] == '"':
            sentence = f"{self._fresh(_OPENERS)}, {sentence}"
        else:
            sentence = capital(sentence)
        if not quoted and (frame >= 0.35 or self._rng.random() < 0.4):
            sentence = f"{sentence[:-1]}, {self._fresh(_TAGS[position])}!"
        return sentence


def translate(rng: Random, sentences: Sequence[str], *, topic: str = "", noun: str = "", habit: int = 0) -> str:
    """The answer in the pirate register: at most three sentences, since the frame makes each of them longer.

    The last one may give way to a saying about the noun; `habit` picks which one, for half of the answers.
    """
    frame = _Frame(rng)
    dressed = [frame.dress(sentence, position=i, topic=topic) for i, sentence in enumerate(sentences[:3])]
    if noun and rng.random() < _SAYING_SHARE:
        saying = _SAYINGS[habit % len(_SAYINGS)] if rng.random() < 0.5 else rng.choice(_SAYINGS)
        dressed[2:] = [saying.format(noun=noun)]
    return " ".join(dressed)
