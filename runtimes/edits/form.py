"""What the edit of one site is, apart from its values: the method, its rank, and the activation of its learned source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from runtimes.edits.edit import ACTIVATIONS, Site
from runtimes.edits.methods import METHODS, form_of
from runtimes.errors import AdapterError


@dataclass(frozen=True, kw_only=True)
class EditForm:
    """``METHODS[method].formula`` with ``rank`` rows, 0 of a method of full rank. Raises AdapterError for what no edit is."""

    method: str
    rank: int
    activation: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise AdapterError(f"method {self.method!r} is unknown; known: {', '.join(METHODS)}")
        method = METHODS[self.method]
        if self.activation not in ACTIVATIONS:
            raise AdapterError(f"activation {self.activation!r} is unknown; known: {', '.join(filter(None, ACTIVATIONS))}")
        if self.activation and not method.activated:
            raise AdapterError(f"{self.method} has no learned source for {self.activation} to act on")
        if self.rank != 0 if method.full_rank else self.rank < 1:
            expected = "0, since it has none to choose" if method.full_rank else "at least 1"
            raise AdapterError(f"rank {self.rank} does not fit {self.method}, whose rank is {expected}")

    def __str__(self) -> str:
        """``loreft, rank 4, gelu``."""
        return f"{form_of(self.method, self.rank)}{f', {self.activation}' if self.activation else ''}"

    @property
    def name(self) -> str:
        """The form but for its rank, as files say it: ``red``, ``noreft gelu``."""
        return f"{self.method} {self.activation}".rstrip()

    @classmethod
    def named(cls, name: str, rank: int) -> EditForm:
        """The inverse of ``name``."""
        method, _, activation = name.partition(" ")
        return cls(method=method, rank=rank, activation=activation)


def one_form(sites: Iterable[Site], *, method: str, rank: int, activation: str = "") -> dict[Site, EditForm]:
    """The same form at every site; of a method of full rank it is of rank 0, whatever is given."""
    full_rank = method in METHODS and METHODS[method].full_rank
    return dict.fromkeys(sites, EditForm(method=method, rank=0 if full_rank else rank, activation=activation))


def commonest(forms: Mapping[Site, EditForm]) -> EditForm:
    """The form of most sites; of several that most have, the lowest site's."""
    counts = Counter(form for _, form in sorted(forms.items(), key=lambda item: item[0]))
    return counts.most_common(1)[0][0]


def described(forms: Mapping[Site, EditForm]) -> str:
    """``loreft, rank 4``, or where sites differ ``loreft, rank 4 at 7 sites; red at 1 site``."""
    counts = Counter(form for _, form in sorted(forms.items(), key=lambda item: item[0]))
    if len(counts) == 1:
        return str(next(iter(counts)))
    return "; ".join(f"{form} at {count} site{'' if count == 1 else 's'}" for form, count in counts.items())
