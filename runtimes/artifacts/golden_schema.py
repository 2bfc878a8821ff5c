"""Golden arrays as one table: what golden/<name>.npz holds, the writer that keeps to it, and the reader that refuses anything else.

One npz per name, "base" and every adapter: inputs, and what the eager model answered to them, recorded on the host so that a device can
check itself without PyTorch. LAYOUTS below are the format, by task. A letter in a shape is a size that all arrays of a file share:

    B rows    S columns    R rows that are continued    G greedy tokens    K recorded positions    T tokens of all rows' completions
    C columns of the vocabulary at a position    M likeliest tokens there    V the model's vocabulary    L a classifier's labels

Rows are right padded. A decoder's are prompts, each followed by a completion: of an adapter with probes its probes and theirs, else the
first tokens of the base's greedy continuation. The first R are fed in every way, and have all positions whose logits are recorded.

Logits [K, V] of a real vocabulary would be larger than the adapter: a file holds a seeded random sample of the columns, other ones at every
position, which is an unbiased sample of all values, so that errors and the steering's cosine and norm are taken over it; beside it each
position's likeliest tokens and the log of the sum of all exponentials (``logsumexp``), which top-1 and KL need. All columns together are
the whole vocabulary several times, or as much of it as fits. ``log_probabilities`` are of every token of a completion after all before it,
one row behind the other: of adapters with probes, and of a quantized base, behind whose continued rows stand passages that were written
for it (the first token is their prompt). A classifier has ``targets``, the labels of its probes.

Logits are those of the eager model with the weights that the bundle ships, so that export errors show alone; the fp32 ones are of the
float32 model before any quantization or rounding, and delta parity is measured against them, so that it says what quantization left of
the steering. A refitted adapter's are of the adapter that it was refitted from.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION
from runtimes.errors import BundleError, InputError

BASE_GOLDEN = "base"
"""The name of the golden arrays of the base, which no adapter may have."""

LARGEST = 2**28
"""Bytes of one file's arrays, unpacked; the recorder stays below a quarter of that."""

UNREADABLE = (
    OSError, EOFError, MemoryError, RuntimeError, SyntaxError, ValueError, tokenize.TokenError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What zipfile and numpy raise over a file that is none of theirs: headers are Python literals, which numpy parses."""

OLDER = "logit_columns"
"""Which files of earlier versions lack."""

ALWAYS, ADAPTERS, FLOAT32, NOISE = "always", "adapters", "adapters, of a bundle that is not float32", "where activations are quantized"
PROBES, FLOAT32_PROBES = "adapters with probes", "adapters with probes, of a bundle that is not float32"
SCORED, FLOAT32_SCORED = "adapters with probes, and a quantized base with passages", "the same, of a bundle that is not float32"
MARKED = "adapters at positions marked"
"""When an array is there. FLOAT32 ones may be there for every adapter; NOISE may be left out, which is no noise, and
MARKED, without which such an adapter is refused."""
LIKELIHOODS = {PROBES, FLOAT32_PROBES, SCORED, FLOAT32_SCORED}


@dataclass(frozen=True, kw_only=True)
class GoldenArray:
    """One array of the file: ``lowest`` and ``below`` bound every value, tokens' where the mask is 1; floats are finite besides."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    holds: str
    when: str = ALWAYS
    lowest: float | None = None
    below: float | str | None = None


_NOISE = GoldenArray(
    name="noise", dtype="float32", shape=(2,), when=NOISE, lowest=0, below=float(np.nextafter(np.float32(1), np.float32(2))),
    holds="largest relative error and lowest top-1 agreement of the reference against itself where its embeddings move by 1e-5",
)  # fmt: skip


OF_THIS, OF_BASE = "of this name", "the base's, on the same inputs"
KINDS = {
    "": (ALWAYS, OF_THIS),
    "base_": (ADAPTERS, OF_BASE),
    "fp32_": (FLOAT32, f"{OF_THIS}, by the float32 model"),
    "fp32_base_": (FLOAT32, f"{OF_BASE}, by the float32 model"),
}
"""Whose answers an array holds, by what its name begins with: when it is there, and in words."""


def _logits(rows: str, width: str, what: str = "") -> tuple[GoldenArray, ...]:
    return tuple(
        GoldenArray(name=f"{kind}logits", dtype="float32", shape=(rows, width), when=when, holds=f"{what}{holds}")
        for kind, (when, holds) in KINDS.items()
    )


def _sampled_logits() -> tuple[GoldenArray, ...]:
    """At every position those of the sampled columns; and, for what is compared token by token, of the likeliest tokens and all."""
    arrays = list(_logits("K", "C"))
    for kind in ("", "fp32_"):
        when, holds = KINDS[kind]
        arrays += (
            _integers(f"{kind}best_tokens", ("K", "M"), 0, "V", f"the likeliest tokens, the best first, {holds}", when),
            GoldenArray(name=f"{kind}best_logits", dtype="float32", shape=("K", "M"), when=when, holds=f"their logits, {holds}"),
            GoldenArray(
                name=f"{kind}logsumexp", dtype="float64", shape=("K",), when=when, holds=f"log of sum exp of all V logits, {holds}"
            ),
        )
    return tuple(arrays)


def _log_probabilities() -> tuple[GoldenArray, ...]:
    kinds = {
        "log_probabilities": (SCORED, "of every token of the completions, in nats, under this name"),
        "base_log_probabilities": (PROBES, "the same under the base"),
        "fp32_log_probabilities": (FLOAT32_SCORED, "under this name, by the float32 model"),
        "fp32_base_log_probabilities": (FLOAT32_PROBES, "under the base, by the float32 model"),
    }
    return tuple(
        GoldenArray(name=name, dtype="float32", shape=("T",), when=when, holds=holds, lowest=-math.inf, below=1e-3)
        for name, (when, holds) in kinds.items()
    )


def _integers(name: str, shape: tuple[str | int, ...], lowest: int, below: float | str, holds: str, when: str = ALWAYS) -> GoldenArray:
    return GoldenArray(name=name, dtype="int64", shape=shape, lowest=lowest, below=below, holds=holds, when=when)


@dataclass(frozen=True, kw_only=True)
class GoldenLayout:
    """One task's arrays. ``check_rows`` raises GoldenError where they do not fit one another, of rows of so many tokens."""

    arrays: tuple[GoldenArray, ...]
    check_rows: Callable[[Mapping[str, np.ndarray], np.ndarray], None] | None = None

    @property
    def has_labels(self) -> bool:
        return any("L" in array.shape for array in self.arrays)


DECODER = (
    _integers("input_ids", ("B", "S"), 0, "V", "a prompt and its completion"),
    _integers("attention_mask", ("B", "S"), 0, 2, "1 for tokens, 0 for the pads behind them"),
    _integers("prompt_length", ("B",), 1, "S", "tokens of each prompt; at least one of the completion follows"),
    _integers("marks", ("B", "S"), 0, 2, "1 for the prompt's tokens that an adapter at positions marked edits", MARKED),
    _integers("logit_positions", ("K", 2), 0, math.inf, "(row, column) of the recorded logits, each once, on tokens, one behind a prompt"),
    _integers("logit_columns", ("K", "C"), 0, "V", "the columns of the vocabulary that are recorded there, ascending"),
    _integers("greedy_tokens", ("R", "G"), -1, "V", "the first R prompts' greedy continuations, end tokens ignored; -1 behind them"),
    *_sampled_logits(),
    *_log_probabilities(),
    _NOISE,
)
CLASSIFIER = (
    _integers("input_ids", ("B", "S"), 0, "V", "a text or a pair of texts"),
    _integers("attention_mask", ("B", "S"), 0, 2, "1 for tokens, 0 for the pads behind them"),
    _integers("token_type_ids", ("B", "S"), 0, 2, "which text of a pair each token is of"),
    _integers("targets", ("B",), -1, "L", "the label of each text that is a probe; -1 of others", PROBES),
    *_logits("B", "L"),
    _NOISE,
)


class GoldenError(ValueError):
    """What is wrong with golden arrays; their reader and their writer say where."""


@dataclass(frozen=True, kw_only=True)
class GoldenSchema:
    """What one file must hold. ``float32``: the bundle's own weights and activations are that; ``noisy``: its activations are quantized."""

    task: str
    vocabulary: int
    labels: int = 0
    context: int | None = None
    """Columns that fit the model; None where the writer asks, whose model has just run them."""
    adapter: bool
    float32: bool
    noisy: bool

    @property
    def layout(self) -> GoldenLayout:
        return LAYOUTS[self.task]

    @property
    def table(self) -> dict[str, GoldenArray]:
        """Every array that may be there, by name."""
        absent = {*(() if self.adapter else (ADAPTERS, MARKED, FLOAT32, PROBES, FLOAT32_PROBES)), *(() if self.noisy else (NOISE,))}
        return {array.name: array for array in self.layout.arrays if array.when not in absent}

    @property
    def required(self) -> set[str]:
        optional = {NOISE, MARKED, *LIKELIHOODS, *((FLOAT32,) if self.float32 else ())}
        return {name for name, array in self.table.items() if array.when not in optional}

    def required_with(self, names: Collection[str]) -> set[str]:
        """``required`` of a file that holds the arrays ``names``: of some kinds all are there or none."""
        table = self.table
        kinds = {table[name].when for name in names if name in table}
        if kinds & {FLOAT32_PROBES, FLOAT32_SCORED} or (kinds & LIKELIHOODS and not self.float32):
            kinds |= {FLOAT32, *LIKELIHOODS}
        elif kinds & LIKELIHOODS:
            kinds |= {PROBES, SCORED}
        return self.required | {name for name, array in table.items() if array.when in kinds - {NOISE, MARKED}}

    def check_headers(self, headers: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
        """Raises GoldenError unless names, dtypes and shapes are the table's, and sizes agree; needs no values."""
        table = self.table
        if OLDER in set(table) - set(headers) and "logits" in headers and headers["logits"][1][1:] == (self.vocabulary,):
            raise GoldenError("is of an older version, which held the logits of the whole vocabulary")
        if missing := sorted(self.required_with(headers) - set(headers)):
            raise GoldenError(f"lacks {missing}")
        if unknown := sorted(set(headers) - set(table)):
            raise GoldenError(f"holds {unknown}, which no golden arrays of this kind have")
        sizes: dict[str, int] = {"L": self.labels}
        for name, array in table.items():
            if name not in headers:
                continue
            dtype, shape = headers[name]
            if dtype != np.dtype(array.dtype) or len(shape) != len(array.shape):
                raise GoldenError(f"has {name} as {dtype} {list(shape)}, expected {array.dtype} {_shape(array)}")
            for axis, size in zip(array.shape, shape, strict=True):
                expected = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
                if size != expected:
                    raise GoldenError(f"has {name} of shape {list(shape)}, expected {_shape(array)} with {axis} = {expected}")
                if not size:
                    raise GoldenError(f"has {name} of shape {list(shape)}: there is nothing to compare")
        longest = max(sizes["S"], sizes.get("G", 0))
        if self.context is not None and longest > self.context:
            raise GoldenError(f"has rows of {longest} tokens, more than the model's context ({self.context})")
        if (size := sum(dtype.itemsize * math.prod(shape) for dtype, shape in headers.values())) > LARGEST:
            raise GoldenError(f"unpacks to {size} bytes, more than {LARGEST}")

    def check(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raises GoldenError unless ``arrays`` are the table's, value by value, and say what can be compared."""
        self.check_headers({name: (array.dtype, array.shape) for name, array in arrays.items()})
        for name, array in arrays.items():
            self._check_range(name, array, arrays["attention_mask"])
        mask = arrays["attention_mask"]
        lengths = mask.sum(1)
        if (mask != (np.arange(mask.shape[1]) < lengths[:, None])).any() or not lengths.all():
            raise GoldenError("has an attention_mask of other rows than tokens followed by pads")
        if self.layout.check_rows is not None:
            self.layout.check_rows(arrays, lengths)

    def _check_range(self, name: str, array: np.ndarray, mask: np.ndarray) -> None:
        entry = self.table[name]
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise GoldenError(f"has values in {name} that are not finite")
        if entry.lowest is None or entry.below is None:
            return
        below = {"V": self.vocabulary, "S": mask.shape[1], "L": self.labels}[entry.below] if isinstance(entry.below, str) else entry.below
        values = array[mask > 0] if name == "input_ids" else array
        if values.size and (values.min() < entry.lowest or values.max() >= below):
            raise GoldenError(f"has values in {name} from {values.min()} to {values.max()}, expected {entry.lowest:g} to below {below:g}")


def _shape(array: GoldenArray) -> str:
    return f"[{', '.join(map(str, array.shape))}]"


def _check_rows(arrays: Mapping[str, np.ndarray], lengths: np.ndarray) -> None:
    """A decoder's arrays against one another."""
    prompt, positions, greedy = (arrays[name] for name in ("prompt_length", "logit_positions", "greedy_tokens"))
    if (prompt >= lengths).any():
        raise GoldenError("has a prompt_length that leaves no token of its row's completion")
    said, tokens = arrays.get("log_probabilities"), int((lengths - prompt).sum())
    if said is not None and len(said) != tokens:
        raise GoldenError(f"has {len(said)} log_probabilities, and its completions are {tokens} tokens")
    if len(greedy) > len(lengths):
        raise GoldenError(f"has greedy_tokens of {len(greedy)} rows, and there are {len(lengths)}")
    rows, columns = positions.T
    if rows.max() >= len(greedy) or (columns >= lengths[rows]).any():
        raise GoldenError("has logit_positions that are no token's of a row with greedy_tokens")
    if len(np.unique(positions, axis=0)) != len(positions):
        raise GoldenError("has logit_positions twice")
    if not (columns >= prompt[rows]).any():
        raise GoldenError("has no logit_positions behind a prompt: no decode step could be compared")
    ended = greedy < 0
    if ended[:, 0].any() or (ended[:, :-1] & ~ended[:, 1:]).any():
        raise GoldenError("has greedy_tokens with a row that is empty, or goes on after its end")
    if (np.diff(arrays["logit_columns"], axis=1) <= 0).any():
        raise GoldenError("has logit_columns that do not ascend")
    for kind in ("", "fp32_"):
        if f"{kind}best_tokens" in arrays:
            _check_best(kind, *(arrays[f"{kind}{name}"] for name in ("best_tokens", "best_logits", "logsumexp", "logits")))


def _check_best(kind: str, tokens: np.ndarray, best: np.ndarray, logsumexp: np.ndarray, logits: np.ndarray) -> None:
    """The likeliest tokens and their logits [K, M] against each other, and against all that is known of the rest."""
    if (np.diff(np.sort(tokens, 1), axis=1) == 0).any():
        raise GoldenError(f"has {kind}best_tokens with one twice")
    if (np.diff(best, axis=1) > 0).any():
        raise GoldenError(f"has {kind}best_logits that ascend")
    if (logits.max(1) > best[:, 0]).any():
        raise GoldenError(f"has {kind}logits above those of its likeliest token")
    if (logsumexp < best[:, 0] - 1e-4 * np.abs(best[:, 0])).any():
        raise GoldenError(f"has {kind}logsumexp below the logit of its likeliest token")


LAYOUTS = {TEXT_GENERATION: GoldenLayout(arrays=DECODER, check_rows=_check_rows), TEXT_CLASSIFICATION: GoldenLayout(arrays=CLASSIFIER)}
"""By the task that the manifest stores."""


def write_golden(path: Path, arrays: Mapping[str, np.ndarray], schema: GoldenSchema) -> None:
    """``path`` from ``arrays``; raises InputError where they are not what the reader takes."""
    try:
        schema.check(arrays)
    except GoldenError as e:
        raise InputError(f"what the eager model says cannot be held against: {path.name} {e}; check the base and its adapters") from None
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)


def read_golden(path: Path, schema: GoldenSchema) -> dict[str, np.ndarray]:
    """Every array of ``path``. What their headers declare is checked before anything is unpacked.

    Raises BundleError for a file that is no archive of arrays, and for arrays that are not the schema's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = [member.filename.removesuffix(".npy") for member in members]
            if len(set(names)) != len(names):
                raise GoldenError("holds an array twice")
            if other := [member.filename for member in members if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)]:
                raise GoldenError(f"holds {other[0]} in a compression that numpy does not write")
            headers = {}
            for name, member in zip(names, members, strict=True):
                with archive.open(member) as stream:
                    headers[name] = _read_header(name, stream, member.file_size)
            schema.check_headers(headers)
            arrays = {}
            for name, member in zip(names, members, strict=True):
                with archive.open(member) as stream:
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
        schema.check(arrays)
    except GoldenError as e:
        raise BundleError(f"{path} {e}; export the bundle again") from None
    except UNREADABLE as e:
        raise BundleError(f"{path} cannot be read as golden arrays ({' '.join(str(e).split())}); export the bundle again") from None
    return arrays


def _read_header(name: str, stream: IO[bytes], size: int) -> tuple[np.dtype, tuple[int, ...]]:
    """(dtype, shape) as the array's header declares them, of ``size`` bytes with its values."""
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise GoldenError(f"has {name} in version {version} of the npy format")
    shape, _, dtype = read(stream)
    if dtype.hasobject:
        raise GoldenError(f"has {name} as Python objects, which are not read")
    if min(shape, default=0) < 0 or stream.tell() + dtype.itemsize * math.prod(shape) != size:
        raise GoldenError(f"has {name} of {size} bytes, which is not what its header declares ({dtype} {list(shape)})")
    return dtype, shape
