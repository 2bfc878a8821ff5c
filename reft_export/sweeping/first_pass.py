"""Before any trial: where the base can be steered to the data's answers, layer by layer, and what to try first.

    score = gain * readable      by layer and positions
    gain       what a vector added there takes off the loss, to first order (gains.py)
    readable   (accuracy - 1/k) / (the best layer's - 1/k) of data with k different answers (readability.py): an edit that shall depend
               on the answer must read it from h; 1 of free-form answers, which no map of few classes reads

The score of several layers is the sum of theirs, as first-order gains add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from reft_export.base.load import Base
from reft_export.sweeping.gains import layer_gains
from reft_export.sweeping.readability import answers_of, layer_accuracies
from reft_export.sweeping.settings import AUTO, Point, Space, SweepSettings
from reft_export.training.data import Example
from reft_export.training.objective import Phase
from reft_export.training.settings import parse_layers
from runtimes.edits.methods import METHODS
from runtimes.edits.probes import spread

MOST_LINES = 128
"""Lines that are looked at, spread over the training data."""
EVENLY = 5
"""Single layers among the candidates of ``auto``, whatever the scores say: what the guess is held against."""
PROPOSED = 3


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """Of one layer, all of its edited streams together."""

    layer: int
    gains: Mapping[str, float]
    """By positions, nats a trained token."""
    accuracy: float | None
    """Balanced, over the data's different answers; None where they are not few."""
    scores: Mapping[str, float]

    @property
    def score(self) -> float:
        return max(self.scores.values())


@dataclass(frozen=True, kw_only=True)
class FirstPass:
    """``answers``: how many different ones the data has, where they are few."""

    lines: int
    answers: int | None
    layers: tuple[LayerFigures, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Layers, the best score first."""
        return tuple(each.layer for each in sorted(self.layers, key=lambda each: (-each.score, each.layer)))

    def score(self, layers: str, positions: str) -> float:
        """Of an edit at all of ``layers``."""
        return sum(self.layers[layer].scores[positions] for layer in parse_layers(layers, len(self.layers)))


def look(base: Base, examples: Sequence[Example], settings: SweepSettings, report: Phase = lambda _: None) -> FirstPass:
    """The figures of every layer, from MOST_LINES of the training examples at most."""
    chosen, depth = [examples[index] for index in spread(len(examples), MOST_LINES)], base.info.num_hidden_layers
    sites = replace(settings.training, layers="all").sites(depth)
    size, space = settings.training.batch_size, settings.space
    report("taking the gradient at every layer")
    gains = layer_gains(base, chosen, sites, space.positions, batch_size=size, report=report)
    answers, accuracies = answers_of(chosen), {}
    if answers is not None:
        report("reading the answers from every layer")
        accuracies = layer_accuracies(base, chosen, answers, sites, batch_size=size, report=report)
    chance = None if answers is None else 1 / (max(answers) + 1)
    best = max(accuracies.values(), default=0.0)
    found = []
    for layer in range(depth):
        here = [site for site in sites if site.layer == layer]
        gain = {each: sum(gains[site][each] for site in here) for each in space.positions}
        accuracy = max((accuracies[site] for site in here), default=None) if accuracies else None
        readable = 1.0
        if accuracy is not None and chance is not None:
            readable = max(0.0, accuracy - chance) / (best - chance) if best > chance else 1.0
        scores = {each: value * readable for each, value in gain.items()}
        found.append(LayerFigures(layer=layer, gains=gain, accuracy=accuracy, scores=scores))
    return FirstPass(lines=len(chosen), answers=None if answers is None else max(answers) + 1, layers=tuple(found))


def candidates(space: Space, found: FirstPass) -> Space:
    """``space`` with the layers of ``auto`` written out: EVENLY single layers and the best one, three layers evenly and the best three at
    least a tenth of the depth apart, and all."""
    depth = len(found.layers)
    space = space.of_depth(depth)
    if space.layers != (AUTO,):
        return space
    single = sorted({depth * (2 * part + 1) // (2 * EVENLY) for part in range(EVENLY)} | {found.order[0]})
    apart: list[int] = []
    for layer in found.order:
        if len(apart) < 3 and all(abs(layer - other) * 10 >= depth for other in apart):
            apart.append(layer)
    sets = [
        *((layer,) for layer in single),
        tuple(depth * (2 * part + 1) // 6 for part in range(3)),
        tuple(sorted(apart)),
        tuple(range(depth)),
    ]
    distinct = dict.fromkeys(tuple(sorted(set(each))) for each in sets)
    return replace(space, layers=tuple("all" if len(each) == depth else ";".join(map(str, each)) for each in distinct))


def proposals(space: Space, found: FirstPass, trials: int) -> tuple[Point, ...]:
    """What is tried first: PROPOSED points at most, a third of the trials or one, spread over the front of most score for so many layers;
    with the positions that score most there, the middle rank, the first method and the (geometric) middle of the rates."""
    depth = len(found.layers)
    best = []
    for layers in space.layers:
        positions = max(space.positions, key=lambda each: found.score(layers, each))
        best.append((len(parse_layers(layers, depth)), -found.score(layers, positions), layers, positions))
    best.sort()
    front = [each for index, each in enumerate(best) if all(each[1] < other[1] for other in best[:index])]
    front.reverse()  # the highest score first
    count = max(1, min(PROPOSED, trials // 3))
    rate = (space.rates[0] * space.rates[1]) ** 0.5 if space.log else space.rates[len(space.rates) // 2]
    method = space.methods[0]
    rank = 0 if METHODS[method].full_rank else space.ranks[len(space.ranks) // 2]
    return tuple(
        Point(method=method, layers=layers, rank=rank, positions=positions, lr=rate)
        for _, _, layers, positions in (front[index] for index in spread(len(front), count))
    )
