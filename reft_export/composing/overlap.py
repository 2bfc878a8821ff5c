"""How much two edits of one site get in each other's way, by the spaces that they write to and read from.

An edit y = h + U^T act(A h + b) writes to the row space of U and reads that of A. For two of them, with orthonormal bases Q1, Q2 of the
row spaces of U1, U2 (or of A1, A2):

    principal angles   arccos of the singular values of Q1 Q2^T, min(r1, r2) of them, in degrees, least first
    overlap            ||Q1 Q2^T||_F^2 / min(r1, r2)            0: orthogonal; 1: one space lies in the other
    interaction        ||A2 U1^T||_F / (||A2||_F ||U1||_F)      0: the second does not read what the first writes

Without interaction in either direction the order does not matter: both add what each adds alone.

Source: Bjorck and Golub 1973, "Numerical methods for computing angles between linear subspaces".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from runtimes.edits.edit import LowRankEdit

TOUCHES = 1e-6
"""An interaction up to this is float32's rounding of none."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Of two edits, the second after the first. A space of no dimension, as what a steering vector reads, has no angles and overlap 0."""

    write_angles: tuple[float, ...]
    """Degrees, between the row spaces of U."""
    write_overlap: float
    read_angles: tuple[float, ...]
    """Degrees, between the row spaces of A."""
    read_overlap: float
    interaction: float
    """Of the second's A with the first's U."""
    reverse_interaction: float
    """Of the first's A with the second's U: what the other order would meet."""


def overlap_of(first: LowRankEdit, second: LowRankEdit) -> Overlap:
    write_angles, write_overlap = _spaces(first.U, second.U)
    read_angles, read_overlap = _spaces(first.A, second.A)
    return Overlap(
        write_angles=write_angles,
        write_overlap=write_overlap,
        read_angles=read_angles,
        read_overlap=read_overlap,
        interaction=interaction(second.A, first.U),
        reverse_interaction=interaction(first.A, second.U),
    )


def interaction(A: np.ndarray, U: np.ndarray) -> float:
    """||A U^T||_F / (||A||_F ||U||_F), for A, U: [r, D]; 0 where either is zero."""
    A, U = np.asarray(A, np.float64), np.asarray(U, np.float64)
    size = float(np.linalg.norm(A) * np.linalg.norm(U))
    return float(np.linalg.norm(A @ U.T)) / size if size else 0.0


def row_basis(*matrices: np.ndarray) -> np.ndarray:
    """Orthonormal rows [k, D] that span the rows of all ``matrices`` [r, D], each of the same weight, whatever its size; in float64."""
    sizes = [(np.asarray(m, np.float64), float(np.linalg.norm(m))) for m in matrices]
    rows = np.vstack([m / size if size else m for m, size in sizes])
    _, s, v = np.linalg.svd(rows, full_matrices=False)
    # Parameters are float32: what is smaller than their rounding is no direction of its own.
    return v[s > (s[0] if s.size else 0.0) * np.finfo(np.float32).eps * max(rows.shape) ** 0.5] if s.size and s[0] else v[:0]


def _spaces(one: np.ndarray, other: np.ndarray) -> tuple[tuple[float, ...], float]:
    """(principal angles, overlap)."""
    cosines = np.linalg.svd(row_basis(one) @ row_basis(other).T, compute_uv=False)
    if not cosines.size:
        return (), 0.0
    angles = np.degrees(np.arccos(np.clip(cosines, 0.0, 1.0)))
    return tuple(float(angle) for angle in angles), float((cosines**2).sum()) / len(cosines)
