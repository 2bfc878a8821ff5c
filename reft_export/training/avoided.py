"""What a new edit keeps out of, so that it and edits of adapters that are there do not interfere (``train --orthogonal-to``).

An edit y = h + U^T act(A h + b) writes to the row space of U and reads that of A. Beside edits U_g, A_g of one site the new one has

    U U_g^T = 0 and U A_g^T = 0      it writes what they neither write nor read
    A U_g^T = 0                      it reads nothing that they write

so that, one after the other in either order, each adds what it adds alone: y = h + delta_g(h) + delta(h). Through the layers above they
still meet. Free rows X become X (I - Q^T Q), Q an orthonormal basis of what is avoided: rows of U of both spaces, rows of the learned
source (W; A = W - R) of the first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from reft_export.composing.overlap import row_basis
from runtimes.edits.adapter import Adapter
from runtimes.edits.edit import LowRankEdit, Site
from runtimes.edits.form import EditForm
from runtimes.edits.methods import METHODS, Role
from runtimes.errors import AdapterError, InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Avoided:
    """Orthonormal bases at one site, float64: ``written`` [k, D] spans the given edits' U, ``touched`` [m, D] their U and A."""

    written: np.ndarray
    touched: np.ndarray

    def of(self, role: Role) -> np.ndarray | None:
        """What rows of that role keep out of; None: nothing."""
        return {"projection": self.touched, "source": self.written}.get(role)


def avoided(given: Mapping[str, Adapter], forms: Mapping[Site, EditForm], width: int) -> dict[Site, Avoided]:
    """By site, of those that any of the ``given`` adapters, by name, edits too; ``forms``: of the edits that are trained, by site.

    Raises AdapterError for adapters of another width or of full rank, InputError for a method of full rank, for an adapter that edits none
    of the sites, and where a rank does not fit beside them.
    """
    if not given:
        return {}
    if full_rank := [form.method for form in forms.values() if METHODS[form.method].full_rank]:
        raise InputError(f"{full_rank[0]} writes every channel, and is orthogonal to nothing; train a low-rank method with --orthogonal-to")
    for name, adapter in given.items():
        if full_rank := [form.method for form in adapter.site_forms.values() if METHODS[form.method].full_rank]:
            raise AdapterError(f"{name} is {full_rank[0]}, which writes every channel: nothing is orthogonal to it; leave it out")
        if adapter.base.hidden_size != width:
            raise AdapterError(f"{name} is for width {adapter.base.hidden_size}, this base has {width}; give adapters of this base")
        if not set(adapter.sites) & set(forms):
            edited, trained = (", ".join(map(str, sorted(each))) for each in (adapter.sites, forms))
            raise InputError(f"{name} edits {edited}, and {trained} are trained: they do not meet; leave it out of --orthogonal-to")
    found = {}
    for site, form in forms.items():
        theirs = (a.edit(site, group) for a in given.values() if site in a.sites for group in a.groups_of(site))
        edits = [edit for edit in theirs if isinstance(edit, LowRankEdit)]
        if not edits:
            continue
        U = [edit.U for edit in edits]
        spaces = Avoided(written=row_basis(*U), touched=row_basis(*U, *(edit.A for edit in edits)))
        if form.rank + len(spaces.touched) > width:
            raise InputError(
                f"rank {form.rank} does not fit at {site}: {', '.join(given)} write and read {len(spaces.touched)} of its {width} "
                "dimensions; lower --rank"
            )
        found[site] = spaces
    return found
