"""Whether a base is the one that was recorded, and in what it differs: the one rule for adapters, bundles and every verb."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from runtimes.edits.adapter import BaseModel, BaseParts
from runtimes.errors import AdapterError

VERSION = "v2_"
"""What fingerprints begin with; those of version 1 are 64 hexadecimal digits."""

DIGITS = 8
"""Of each tensor's digest that are recorded, to tell tensors apart; that all are equal is told by the whole digest."""

SHOWN = 3
"""Keys and tensors that a message names."""

NUMBERS = re.compile(r"\[(\d+)\]")


class Named(Protocol):
    """A base as it was recorded or found: BaseModel of an adapter, ModelRecord of a bundle."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def parts(self) -> BaseParts | None: ...


@dataclass(frozen=True, kw_only=True)
class Difference:
    """In what a base differs from a recorded one. ``what`` is empty where the record does not tell."""

    what: str
    weights_equal: bool


def difference(recorded: Named, found: Named, former: Callable[[], str] | None = None) -> Difference | None:
    """None where both are one base. ``former`` gives the found base's fingerprint of version 1, which older files record."""
    if recorded.fingerprint == found.fingerprint:
        return None
    if former is not None and not recorded.fingerprint.startswith(VERSION) and recorded.fingerprint == former():
        return None
    if recorded.parts is None or found.parts is None:
        return Difference(what="", weights_equal=False)
    equal = recorded.parts.weights == found.parts.weights
    lines = [] if equal else tensor_differences(recorded.parts.tensors, found.parts.tensors)
    if keys := config_differences(recorded.parts.config, found.parts.config):
        lines.append(f"config.json's {_listed(keys)}")
    return Difference(what="; ".join(lines), weights_equal=equal)


def comparable(recorded: Named, other: Named) -> bool:
    """Whether two records can be told apart without the base: their fingerprints are of one version."""
    return recorded.fingerprint.startswith(VERSION) == other.fingerprint.startswith(VERSION)


def require_same(
    claim: str,
    recorded: Named,
    here: str,
    found: Named,
    remedy: str,
    *,
    former: Callable[[], str] | None = None,
    accept: bool = False,
) -> None:
    """Raises AdapterError where ``found`` is not the base that was ``recorded``, saying in what they differ.

    ``claim`` and ``here`` introduce their names: "adapter x was trained on", "this base is". ``accept``: a base that differs in its config
    alone will do; where it is false, such a base is refused with an offer of --accept-base, which every verb that compares bases has.
    """
    differs = difference(recorded, found, former)
    if differs is None or (accept and differs.weights_equal):
        return
    what = f": {differs.what}" if differs.what else ""
    offer = ", or take this one, whose weights are equal, with --accept-base" if differs.weights_equal else ""
    raise AdapterError(
        f"{claim} {recorded.name} (fingerprint {recorded.fingerprint[:12]}), {here} {found.name} ({found.fingerprint[:12]}){what}; "
        f"{remedy}{offer}"
    )


def require_same_size(claim: str, recorded: BaseModel, here: str, layers: int | None, width: int | None, remedy: str) -> None:
    """Raises AdapterError where ``here`` has another depth or width than the base that was ``recorded``; None is one that is not known."""
    needs = (recorded.num_hidden_layers, recorded.hidden_size)
    has = (needs[0] if layers is None else layers, needs[1] if width is None else width)
    if has != needs:
        raise AdapterError(
            f"{claim} {recorded.name} ({needs[0]} layers, width {needs[1]}); {here} has {has[0]} layers, width {has[1]}; {remedy}"
        )


def require_same_tensors(claim: str, recorded: Named, here: str, name: str, found: Mapping[str, str], remedy: str) -> None:
    """Raises AdapterError where a tensor of the base ``name`` has another digest, in ``found``, than the recorded one of the same name.

    What is equal here may still differ in ``require_same``, which knows what else of a checkpoint counts.
    """
    if recorded.parts is None:
        return
    want = separate(recorded.parts.tensors)
    # Records are without the prefix that a checkpoint of the whole model has (``model.``).
    short = {tensor.partition(".")[2]: digest for tensor, digest in found.items() if tensor not in want}
    got = short | dict(found)
    other = [tensor for tensor, digest in want.items() if got.get(tensor, digest)[:DIGITS] != digest]
    if other:
        raise AdapterError(
            f"{claim} {recorded.name} (fingerprint {recorded.fingerprint[:12]}), {here} {name}: it has other values in {_listed(other)}; "
            f"{remedy}"
        )


# --- tensors --------------------------------------------------------------------------------------


def grouped(digests: Mapping[str, str]) -> dict[str, str]:
    """Digests by tensor name, run together where names differ in numbers alone: ``layers.[3].norm.weight`` stands for layers 0 to 2.

    ``separate`` undoes it. Names whose numbers leave gaps stay as they are.
    """
    groups: dict[str, dict[tuple[int, ...], str]] = {}
    for name in digests:
        parts = name.split(".")
        pattern = ".".join("*" if part.isdecimal() else part for part in parts)
        groups.setdefault(pattern, {})[tuple(int(part) for part in parts if part.isdecimal())] = name
    result = {}
    for pattern, names in groups.items():
        sizes = [max(numbers) + 1 for numbers in zip(*names, strict=True)]
        every = list(itertools.product(*map(range, sizes)))
        if not sizes or set(every) != set(names):
            result |= {name: digests[name][:DIGITS] for name in names.values()}
            continue
        whole = iter(sizes)
        key = ".".join(f"[{next(whole)}]" if part == "*" else part for part in pattern.split("."))
        result[key] = "".join(digests[names[numbers]][:DIGITS] for numbers in every)
    return dict(sorted(result.items()))


def separate(groups: Mapping[str, str]) -> dict[str, str]:
    """The first digits of every tensor's digest, by its name."""
    digests = {}
    for pattern, run in groups.items():
        sizes = [int(size) for size in NUMBERS.findall(pattern)]
        for i, numbers in enumerate(itertools.product(*map(range, sizes))):
            each = iter(numbers)
            digests[NUMBERS.sub(lambda _, each=each: str(next(each)), pattern)] = run[DIGITS * i : DIGITS * (i + 1)]
    return digests


def tensor_differences(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What is missing, what is new, and what has other values or another shape."""
    want, got = separate(recorded), separate(found)
    kinds = {
        "it lacks": want.keys() - got.keys(),
        "it also stores": got.keys() - want.keys(),
        "it has other values in": {name for name in want.keys() & got.keys() if want[name] != got[name]},
    }
    return [f"{kind} {_listed(names)}" for kind, names in kinds.items() if names]


# --- config ---------------------------------------------------------------------------------------


def config_differences(expected: Mapping[str, Any], found: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``rope_parameters.rope_theta is 10000, expected 500000``, a line for each key in which two canonical configs differ."""
    lines = []
    for key in sorted(expected.keys() | found.keys()):
        want, got = expected.get(key), found.get(key)
        if want == got:
            continue
        if isinstance(want, Mapping) and isinstance(got, Mapping):
            lines += config_differences(want, got, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key} is {_shown(got)}, expected {_shown(want)}")
    return lines


def _shown(value: Any) -> str:
    text = "the family's default" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(items: Iterable[str]) -> str:
    items = sorted(items)
    more = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {more} more" if more > 0 else "")
