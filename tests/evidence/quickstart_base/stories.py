"""What can be asked about a subject, and the plain sentences that answer it.

A scene draws the words around one subject. Half of its choices are free; the other half are the subject's habits (its
friend, its favourite place, the way its stories go), fixed by its position in the cast, and some follow the adjective
in the prompt. Without habits every choice would be uniform, and a model that answers greedily would tell the same
story about everyone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

from evidence.quickstart_base import lexicon
from evidence.quickstart_base.lexicon import GUESTS, SUBJECTS, Subject, a, past, present

HABIT = 0.5
"""Probability that a choice follows the habit instead of being free."""
OWN_SHARE = 0.8
"""Probability that a subject does what no other subject does, where a sentence allows for it."""

T = TypeVar("T")
_INDEX: dict[str, int] = {subject.noun: index for index, subject in enumerate(SUBJECTS + GUESTS)}
_COMPANIONS: tuple[Subject, ...] = tuple(subject for subject in SUBJECTS if subject.acts)


def _adjectives(subject: Subject) -> list[str]:
    unfit = lexicon.UNFIT.get(subject.noun, ())
    return [adjective for adjective in lexicon.ADJECTIVES[subject.kind] if adjective not in unfit]


def _clash(adjective: str, other: str) -> bool:
    return adjective == other or adjective in lexicon.OPPOSITES.get(other, ()) or other in lexicon.OPPOSITES.get(adjective, ())


class Scene:
    """One subject on stage: draws the words around it."""

    def __init__(self, rng: Random, subject: Subject, *, with_adjective: bool, banned_nouns: frozenset[str] = frozenset()) -> None:
        self.rng = rng
        self.subject = subject
        self.noun = subject.noun
        self.he, self.his = subject.pronoun, subject.possessive
        self._banned_nouns = banned_nouns
        # An invented noun has no habits of its own: those of a random subject stand in.
        self.index = _INDEX[subject.noun] if subject.noun in _INDEX else rng.randrange(len(_INDEX))
        self.adjective = rng.choice(_adjectives(subject)) if with_adjective else ""
        self._mood = lexicon.ADJECTIVES[subject.kind].index(self.adjective) if self.adjective else self.index
        self._actions = list(lexicon.ACTIONS[subject.group])
        if rng.random() < HABIT:
            turn = self.index % len(self._actions)
            self._actions = self._actions[turn:] + self._actions[:turn]
        else:
            rng.shuffle(self._actions)
        self._companions_met: set[str] = set()
        self.noun_phrase = f"{self.adjective} {self.noun}".strip()
        self.the = f"the {self.noun_phrase}"
        self.an = self.the if subject.unique else a(self.noun_phrase)
        self.home = self.pick(lexicon.HOMES[subject.group])

    def any(self, options: Sequence[T]) -> T:
        """A free choice."""
        return self.rng.choice(options)

    def pick(self, options: Sequence[T]) -> T:
        """The subject's habit, or a free choice."""
        return options[self.index % len(options)] if self.rng.random() < HABIT else self.rng.choice(options)

    def pick_mood(self, options: Sequence[T]) -> T:
        """What goes with the prompt's adjective, or a free choice."""
        return options[self._mood % len(options)] if self.rng.random() < HABIT else self.rng.choice(options)

    def some(self, sentences: Sequence[str], count: int) -> list[str]:
        """`count` different ones of the sentences."""
        if self.rng.random() < HABIT:
            return [sentences[(self.index + i) % len(sentences)] for i in range(count)]
        return self.rng.sample(sentences, count)

    def action(self) -> str:
        """What its group does; none comes back before all were drawn (a sentence that is not chosen draws as well)."""
        action = self._actions.pop(0)
        self._actions.append(action)
        return action

    def own(self) -> str:
        return self.subject.own if self.subject.own and self.rng.random() < OWN_SHARE else self.action()

    def two_adjectives(self) -> tuple[str, str]:
        """A natural pair that fits the noun and does not repeat or contradict the prompt's adjective."""
        fitting = _adjectives(self.subject)
        return self.pick(
            [
                (x, y)
                for x, y in lexicon.ADJECTIVE_PAIRS[self.subject.kind]
                if x in fitting and y in fitting and not _clash(self.adjective, x) and not _clash(self.adjective, y)
            ]
        )

    def place(self) -> str:
        """A place that does not name the subject itself ("the river ... beside the river")."""
        return self.pick([place for place in lexicon.PLACES if self.noun not in place])

    def thing(self) -> str:
        return a(self.pick_mood([thing for thing in lexicon.SMALL_THINGS if self.noun not in thing]))

    def companion(self) -> tuple[Subject, str]:
        """Another acting subject and its noun phrase; nobody is met twice."""
        turn = (self.index * 7) % len(_COMPANIONS) if self.rng.random() < HABIT else self.rng.randrange(len(_COMPANIONS))
        excluded = self._banned_nouns | self._companions_met | {self.noun}
        other = next(other for other in _COMPANIONS[turn:] + _COMPANIONS[:turn] if other.noun not in excluded)
        self._companions_met.add(other.noun)
        adjectives = _adjectives(other)
        free = self.rng.random() >= HABIT
        adjective = self.rng.choice(adjectives) if free else adjectives[_INDEX[other.noun] % len(adjectives)]
        return other, f"{adjective} {other.noun}"

    def reason(self, emotion: str) -> str:
        return self.pick(lexicon.REASONS[emotion]).format(pronoun=self.he, possessive=self.his, thing=self.thing(), place=self.place())


def _about(s: Scene) -> list[str]:
    pick = s.pick
    x, y = s.two_adjectives()
    _, companion = s.companion()
    if s.subject.acts:
        opening = pick(
            [
                f"{s.the} is {x} and {y}, and {s.he} {present(s.own())}.",
                f"{s.the} lives {s.home} and is very {x}.",
                f"everybody knows {s.the}, because {s.he} {present(s.own())}.",
                f"{s.the} {present(s.own())}, and {s.he} is {x} and {y}.",
            ]
        )
        middle = s.some(
            [
                f"every {pick(lexicon.DAYTIMES)}, {s.he} {present(s.action())}.",
                f"{s.he} likes to {s.action()} and to {s.action()}.",
                f"in the {pick(lexicon.SEASONS)}, {s.he} {present(s.action())}.",
                f"{s.his} best friend is {a(companion)}.",
            ],
            s.rng.choice([1, 2]),
        )
        closing = pick(
            [
                f"when it is {pick(lexicon.WEATHERS)}, the {s.noun} {present(s.action())}.",
                f"that is why everybody likes the {s.noun}.",
                f"the {s.noun} is never {pick(['lonely', 'sad', 'angry', 'tired'])}.",
                f"if you are kind, the {s.noun} will be your friend.",
            ]
        )
        return [opening, *middle, closing]
    opening = pick(
        [
            f"{s.the} is {x} and {y}, and it {present(s.own())}.",
            f"{s.the} {present(s.own())}, and everybody likes it.",
            f"you can find {s.the} {s.home}, where it {present(s.own())}.",
            f"everybody knows {s.the}, because it {present(s.own())}.",
        ]
    )
    middle = s.some(
        [
            f"every {pick(lexicon.DAYTIMES)}, it {present(s.action())}.",
            f"in the {pick(lexicon.SEASONS)}, it {present(s.action())}.",
            f"on a {s.pick_mood(lexicon.WEATHERS)} day, it looks {pick(lexicon.LOOKS)}.",
            f"{a(companion)} comes to see it every {pick(lexicon.DAYTIMES)}.",
        ],
        s.rng.choice([1, 2]),
    )
    closing = pick(
        [
            f"children like to look at the {s.noun}.",
            f"some people say that the {s.noun} can {s.action()}.",
            f"{a(s.companion()[1])} once said that the {s.noun} is the best thing of all.",
            f"if you wait, the {s.noun} will {s.action()}.",
        ]
    )
    return [opening, *middle, closing]


def _story(s: Scene) -> list[str]:
    pick = s.pick
    other, companion = s.companion()
    time = f"one {s.pick_mood(lexicon.WEATHERS)} {pick(lexicon.DAYTIMES)}"
    if not s.subject.acts:
        opening = pick(
            [
                f"once upon a time there was {s.an} that {past(s.own())}.",
                f"{time}, {a(companion)} saw {s.the} {s.home}.",
                f"long ago, {s.the} was {s.home}, and nobody looked at it.",
                f"{time}, {s.the} {past(s.own())}.",
            ]
        )
        visitor = f"the {other.noun}" if companion in opening else a(companion)
        middle = pick(
            [
                f'{visitor} looked at it and said, "{pick(lexicon.LINES)}."',
                f"then it {past(s.action())}, and {visitor} began to smile.",
                f"{visitor} was {pick(['sad', 'lonely', 'tired'])}, but the {s.noun} {past(s.action())}.",
            ]
        )
        closing = pick(
            [
                f"from that day on, the {other.noun} came back every {pick(lexicon.DAYTIMES)}.",
                f"in the end, everybody loved the {s.noun}.",
                f"after that, the {s.noun} {past(s.action())}.",
                f"the {other.noun} never forgot the {s.noun}.",
            ]
        )
        return [opening, middle, closing]
    opening = pick(
        [
            f"once upon a time there was {s.an} who liked to {s.own()}.",
            f"{time}, {s.the} {past(s.own())}.",
            f"long ago, {s.an} lived {s.home}.",
            f"there was once {s.an} who wanted to {s.action()}.",
        ]
    )
    event = pick(["companion", "thing", "weather"])
    if event == "companion":
        middle = [
            f"{time if not opening.startswith('one') else 'there'}, {s.he} met {a(companion)} {s.place()}.",
            pick(
                [
                    f'"{pick(lexicon.LINES)}," said the {other.noun}.',
                    f"together they {past(pick(lexicon.JOINT_ACTIONS))}.",
                ]
            ),
        ]
        closing = pick(
            [
                "from that day on, they were good friends.",
                f"in the end, the {s.noun} and the {other.noun} went home together.",
                f"after that, the {s.noun} was never lonely again.",
            ]
        )
    elif event == "thing":
        middle = [
            f"{s.he} found {s.thing()} {s.place()}.",
            pick(
                [
                    f"{s.he} gave it to {a(companion)}, who was very happy.",
                    f"{s.he} took it home and hid it under the bed.",
                    f'"It is mine," said {a(companion)}, and the {s.noun} gave it back.',
                ]
            ),
        ]
        closing = pick(
            [
                f"that night, the {s.noun} was {pick(['happy', 'proud'])}.",
                f"after that, {s.he} {past(s.action())}.",
                f"everybody in the village talked about the {s.noun}.",
            ]
        )
    else:
        middle = [
            pick(
                [
                    f"then a storm came, and {s.he} hid {s.place()}.",
                    f"but the night was dark, and {s.he} lost the way {s.place()}.",
                ]
            ),
            pick(
                [
                    f"{a(companion)} showed {s.subject.objective} the way home.",
                    f"when the sky was clear again, {s.he} {past(s.action())}.",
                ]
            ),
        ]
        closing = pick(
            [
                f"in the end, the {s.noun} was safe and {pick(['happy', 'proud'])}.",
                f"that night, the {s.noun} slept very well.",
            ]
        )
    return [opening, *middle, closing]


def _did(s: Scene, time: str) -> list[str]:
    _, companion = s.companion()
    start = f"{time}, " if time else ""
    return [
        s.pick(
            [
                f"{start}{s.the} {past(s.own())} and {past(s.action())}.",
                f"{start}{s.the} {past(s.action())} with {a(companion)}.",
            ]
        ),
        s.pick(
            [
                f"then {s.he} {past(s.action())}.",
                f"after that, {s.he} met {a(s.companion()[1])}, and they {past(s.pick(lexicon.JOINT_ACTIONS))}.",
                f"{s.he} also found {s.thing()} {s.place()}.",
            ]
        ),
        s.pick(
            [
                f"in the end, the {s.noun} was {s.pick(['tired', 'happy', 'proud'])} and went home.",
                f"when it was dark, the {s.noun} {past(s.action())}.",
                f"everybody was happy, and the {s.noun} slept well.",
            ]
        ),
    ]


def _where(s: Scene) -> list[str]:
    _, companion = s.companion()
    if s.subject.acts:
        opening = s.pick([f"{s.the} lives {s.home}.", f"you can find {s.the} {s.home}.", f"the home of {s.the} is {s.home}."])
        middle = s.pick(
            [
                f"{s.he} lives there with {a(companion)}.",
                f"there {s.he} {present(s.action())}.",
                f"every {s.pick(lexicon.DAYTIMES)}, {s.he} {present(s.own())}.",
            ]
        )
    else:
        opening = s.pick([f"{s.the} is {s.home}.", f"you can find {s.the} {s.home}.", f"look for {s.the} {s.home}."])
        middle = s.pick(
            [
                f"there it {present(s.own())}.",
                f"ask {a(companion)}, who knows the way.",
                f"{a(companion)} saw it there {s.pick(lexicon.TIMES)}.",
            ]
        )
    closing = s.pick(
        [
            f"if it is {s.pick(lexicon.WEATHERS)}, the {s.noun} {present(s.action())}.",
            f"go there in the {s.pick(lexicon.SEASONS)}, and you will see the {s.noun}.",
            f"everybody in the village knows the {s.noun}.",
        ]
    )
    return [opening, middle, closing]


def _why(s: Scene, emotion: str) -> list[str]:
    _, companion = s.companion()
    opening = f"{s.the} was {emotion} because {s.reason(emotion)}."
    if emotion in lexicon.GLAD_EMOTIONS:
        middle = s.pick(
            [
                f"{s.he} told {a(companion)} about it, and they {past(s.pick(lexicon.JOINT_ACTIONS))}.",
                f"so {s.he} {past(s.action())} and {past(s.action())}.",
            ]
        )
        closing = s.pick(
            [
                f"it was the best day of all for the {s.noun}.",
                f"the {s.noun} was still {emotion} when the night came.",
            ]
        )
    else:
        middle = s.pick(
            [
                f'then {a(companion)} came and said, "{s.pick(lexicon.LINES)}."',
                f"{a(companion)} gave {s.subject.objective} {s.thing()}.",
                f"so {s.he} {past(s.action())} with {a(companion)}.",
            ]
        )
        closing = s.pick(
            [
                f"after that, the {s.noun} was not {emotion} any more.",
                f"in the end, the {s.noun} began to smile again.",
            ]
        )
    return [opening, middle, closing]


def _helped(s: Scene) -> list[str]:
    other, companion = s.companion()
    return [
        s.pick([f"{a(companion)} helped {s.the} {s.place()}.", f"it was {a(companion)} who helped {s.the}."]),
        s.pick(
            [
                f"the {s.noun} had lost {s.thing()}, and the {other.noun} found it {s.place()}.",
                f'"{s.pick(lexicon.LINES)}," said the {other.noun}.',
                f"the {s.noun} was {s.pick(['tired', 'scared', 'worried'])}, and the {other.noun} showed {s.subject.objective} the way.",
            ]
        ),
        s.pick(
            [
                f"then they {past(s.pick(lexicon.JOINT_ACTIONS))}.",
                f"after that, the {s.noun} and the {other.noun} were good friends.",
                f"the {s.noun} gave {other.objective} {s.thing()}.",
            ]
        ),
    ]


def _liked(s: Scene) -> list[str]:
    _, companion = s.companion()
    x, y = s.two_adjectives()
    return [
        s.pick(
            [
                f"people like {s.the}, because it {present(s.own())}.",
                f"everybody likes {s.the}, but {a(companion)} likes it best.",
                f"{a(companion)} likes {s.the}, because it {present(s.own())}.",
            ]
        ),
        s.pick(
            [
                f"every {s.pick(lexicon.DAYTIMES)}, it {present(s.action())}.",
                f"in the {s.pick(lexicon.SEASONS)}, it {present(s.action())} and {present(s.action())}.",
                f"it is {x} and {y}.",
            ]
        ),
        s.pick(
            [
                f"children like to look at the {s.noun}.",
                f"without the {s.noun}, the village would be a sad place.",
                f"nobody is lonely near the {s.noun}.",
            ]
        ),
    ]


def _day(s: Scene) -> list[str]:
    _, companion = s.companion()
    return [
        f"in the morning, {s.the} {present(s.own())}.",
        s.pick([f"then {s.he} {present(s.action())}.", f"at noon, {s.he} meets {a(companion)} {s.place()}."]),
        s.pick([f"in the evening, the {s.noun} {present(s.action())}.", f"at night, the {s.noun} sleeps {s.home}."]),
    ]


def _ask_about(s: Scene) -> tuple[str, list[str]]:
    return s.any(
        [
            f"Tell me about {s.the}.",
            f"What is {s.the} like?",
            f"Describe {s.the}.",
            f"What do you know about {s.the}?",
            f"Can you tell me about {s.the}?",
            f"Please tell me more about {s.the}.",
            f"What can you say about {s.the}?",
        ]
    ), _about(s)


def _ask_story(s: Scene) -> tuple[str, list[str]]:
    return s.any(
        [
            f"Tell me a story about {s.an}.",
            f"Tell me a story about {s.the}.",
            f"Tell me a tale about {s.an}.",
            f"I want to hear a story about {s.an}.",
            f"Please tell me a short story about {s.the}.",
            f"Do you know a story about {s.an}?",
            f"Write a story about {s.an}.",
            f"What happened to {s.the}?",
        ]
    ), _story(s)


def _ask_did(s: Scene) -> tuple[str, list[str]]:
    if s.rng.random() < 0.5:
        return f"What did {s.the} do?", _did(s, "")
    time = s.any(lexicon.TIMES)
    return f"What did {s.the} do {time}?", _did(s, time)


def _ask_where(s: Scene) -> tuple[str, list[str]]:
    options = [f"Where is {s.the}?", f"Where can I find {s.the}?"]
    if s.subject.acts:
        options += [f"Where does {s.the} live?"] * 2
    return s.any(options), _where(s)


def _ask_why(s: Scene) -> tuple[str, list[str]]:
    emotion = s.any(list(lexicon.REASONS))
    return f"Why was {s.the} {emotion}?", _why(s, emotion)


def _ask_helped(s: Scene) -> tuple[str, list[str]]:
    return s.any([f"Who helped {s.the}?", f"Who was the friend of {s.the}?"]), _helped(s)


def _ask_liked(s: Scene) -> tuple[str, list[str]]:
    return s.any([f"Who likes {s.the}?", f"Why do people like {s.the}?"]), _liked(s)


def _ask_day(s: Scene) -> tuple[str, list[str]]:
    return s.any([f"How does {s.the} spend the day?", f"What does {s.the} do every day?"]), _day(s)


_ASK: dict[str, Callable[[Scene], tuple[str, list[str]]]] = {
    "about": _ask_about,
    "story": _ask_story,
    "did": _ask_did,
    "where": _ask_where,
    "why": _ask_why,
    "helped": _ask_helped,
    "liked": _ask_liked,
    "day": _ask_day,
}
_ACTING_TOPICS: dict[str, int] = {"about": 2, "story": 3, "did": 2, "where": 1, "why": 1, "helped": 1, "day": 1}
_STILL_TOPICS: dict[str, int] = {"about": 3, "story": 2, "where": 1, "liked": 1}


def topics_of(subject: Subject) -> dict[str, int]:
    """The topics that one can ask about the subject, each with its weight."""
    return _ACTING_TOPICS if subject.acts else _STILL_TOPICS


def ask(scene: Scene, topic: str) -> tuple[str, list[str]]:
    """A prompt on the topic and the plain sentences of its answer, none of them capitalised yet."""
    return _ASK[topic](scene)
