"""Changes to golden arrays and manifests, chosen by a seeded generator: what damage, carelessness and an edit by hand leave behind."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np

from runtimes.artifacts.manifest import NOT_HASHED, hash_files
from runtimes.files.records import to_json
from runtimes.files.sealed import write_sealed

Random = np.random.Generator
Arrays = dict[str, np.ndarray]
Manifest = dict
KINDS = ("", "base_", "fp32_", "fp32_base_")
AT_POSITIONS = {
    *("logit_positions", "logit_columns"),
    *(f"{kind}{name}" for kind in KINDS for name in ("logits", "best_tokens", "best_logits", "logsumexp")),
}


def _choose(random: Random, options: list) -> object:
    return options[random.integers(len(options))]


def _one(random: Random, arrays: Arrays) -> str:
    return str(_choose(random, sorted(arrays)))


def _at(random: Random, array: np.ndarray, value: object) -> np.ndarray:
    """One value replaced, where it can be."""
    array = array.copy()
    if array.size:
        with np.errstate(all="ignore"):
            array.flat[random.integers(array.size)] = np.asarray(value).astype(array.dtype)
    return array


def _drop(random: Random, arrays: Arrays) -> Arrays:
    gone = _one(random, arrays)
    return {n: a for n, a in arrays.items() if n != gone}


def _rename(random: Random, arrays: Arrays) -> Arrays:
    name = _one(random, arrays)
    return {n + ("_" if n == name else ""): a for n, a in arrays.items()}


def _swap(random: Random, arrays: Arrays) -> Arrays:
    a, b = _one(random, arrays), _one(random, arrays)
    return arrays | {a: arrays[b], b: arrays[a]}


def _empty(random: Random, arrays: Arrays) -> Arrays:
    name = _one(random, arrays)
    axis = random.integers(arrays[name].ndim)
    return arrays | {name: np.take(arrays[name], [], axis=axis)}


def _empty_all(_: Random, arrays: Arrays) -> Arrays:
    """No position at all, consistently; of a classifier, no text."""
    of = AT_POSITIONS
    return {n: a[:0] if n in of or "logit_positions" not in arrays and n != "noise" else a for n, a in arrays.items()}


def _no_rows(_: Random, arrays: Arrays) -> Arrays:
    return {n: a if n == "noise" else a[:0] for n, a in arrays.items()}


def _permute(random: Random, arrays: Arrays) -> Arrays:
    name = _one(random, arrays)
    return arrays | {name: random.permutation(arrays[name])}


def _repeat(random: Random, arrays: Arrays) -> Arrays:
    name = _one(random, arrays)
    return arrays | {name: np.repeat(arrays[name], 2, axis=random.integers(arrays[name].ndim))}


def _truncate(random: Random, arrays: Arrays) -> Arrays:
    name = _one(random, arrays)
    axis = random.integers(arrays[name].ndim)
    return arrays | {name: np.take(arrays[name], range(max(1, arrays[name].shape[axis] // 2)), axis=axis)}


def _dtype(random: Random, arrays: Arrays) -> Arrays:
    name = _one(random, arrays)
    kind = _choose(random, ["int32", "uint64", "bool", "float16", "float64", "complex64", ">i8", ">f4", "S4", "datetime64[s]"])
    with np.errstate(all="ignore"):
        return arrays | {name: np.nan_to_num(arrays[name]).astype(np.int64).astype(str(kind))}


def _value(random: Random, arrays: Arrays) -> Arrays:
    name = _one(random, arrays)
    kinds = [np.nan, np.inf, -np.inf, 3e38, 0, 1e-3] if arrays[name].dtype.kind == "f" else [-1, -2, 0, 1, 2**31, 2**62, -(2**63), 299]
    return arrays | {name: _at(random, arrays[name], _choose(random, kinds))}


def _fill(random: Random, arrays: Arrays) -> Arrays:
    name = _one(random, arrays)
    kinds = [np.nan, np.inf, 0, 1, 3e38] if arrays[name].dtype.kind == "f" else [-1, 0, 1, 2**40]
    return arrays | {name: np.full_like(arrays[name], _choose(random, kinds))}


def _noise(random: Random, arrays: Arrays) -> Arrays:
    kinds = [[np.inf, 1], [np.inf, 0], [np.nan, np.nan], [-1, 1], [0, 5], [1, 0], [0.9, 0], [0.05, 0.98], [1e30, 1], [0, -np.inf], [0, 1]]
    return arrays | {"noise": np.array(_choose(random, kinds), np.float32)}


def _few_positions(random: Random, arrays: Arrays) -> Arrays:
    """Some of the positions, and their logits: right, and less."""
    rows = random.permutation(len(arrays["logits"]))[: random.integers(0, 4)]
    of = AT_POSITIONS
    return {n: a[rows] if n in of or "logit_positions" not in arrays and n != "noise" else a for n, a in arrays.items()}


def _perturb(random: Random, arrays: Arrays) -> Arrays:
    name = str(_choose(random, [n for n in arrays if n.endswith(("logits", "log_probabilities", "logsumexp"))]))
    scale = 10.0 ** random.uniform(-9, 1) * np.abs(arrays[name]).max(initial=0)
    noise = scale * random.standard_normal(arrays[name].shape)
    noise = -np.abs(noise) if random.integers(2) else noise  # no logit rises above the likeliest, no probability above 1
    return arrays | {name: (arrays[name] + noise).astype(arrays[name].dtype)}


def _perturb_all(random: Random, arrays: Arrays) -> Arrays:
    """Every logit moved alike, with what is known of their sums: nothing contradicts itself."""
    move = 10.0 ** random.uniform(-9, 0)
    names = [n for n in arrays if n.endswith(("logits", "logsumexp"))]
    return arrays | {n: (arrays[n] + move).astype(arrays[n].dtype) for n in names}


def _perturb_completions(random: Random, arrays: Arrays) -> Arrays:
    """Less probable tokens, by any amount."""
    move = 10.0 ** random.uniform(-7, 1)
    return arrays | {n: a - np.float32(move) for n, a in arrays.items() if n.endswith("log_probabilities")}


def _unsteered(_: Random, arrays: Arrays) -> Arrays:
    """What a recorder that forgot to steer writes."""
    return arrays | {n: arrays[n.replace("logits", "base_logits")] for n in ("logits",) if "base_logits" in arrays}


def _no_greedy(random: Random, arrays: Arrays) -> Arrays:
    tokens = arrays.get("greedy_tokens", np.zeros((1, 1), np.int64)).copy()
    tokens[:, random.integers(0, 3) :] = -1
    return arrays | {"greedy_tokens": tokens}


def _pads(random: Random, arrays: Arrays) -> Arrays:
    """Other masks: none, left padded, holes."""
    mask = arrays["attention_mask"]
    return arrays | {"attention_mask": _choose(random, [np.zeros_like(mask), mask[:, ::-1], 1 - mask, 2 * mask, np.ones_like(mask)])}


def _prompts(random: Random, arrays: Arrays) -> Arrays:
    if "prompt_length" not in arrays:
        return arrays
    length = arrays["prompt_length"]
    whole = arrays["attention_mask"].sum(1) if "attention_mask" in arrays else length
    return arrays | {"prompt_length": _choose(random, [0 * length, -length, whole, length + 1, length - 1, length + 1000])}


def _positions(random: Random, arrays: Arrays) -> Arrays:
    if "logit_positions" not in arrays:
        return arrays
    p = arrays["logit_positions"]
    return arrays | {"logit_positions": _choose(random, [p + 1, p - 1, p[:, ::-1], 0 * p, p + 10**6, -p, p[:1].repeat(len(p), 0)])}


def _objects(random: Random, arrays: Arrays) -> Arrays:
    return arrays | {_one(random, arrays): np.array([{"a": 1}, None], object)}


def _more(random: Random, arrays: Arrays) -> Arrays:
    name = str(_choose(random, ["extra", "../logits", "fp32_logits", "fp32_base_logits", "base_logits"]))
    return arrays | {name: arrays[_one(random, arrays)]}


def _none(_: Random, arrays: Arrays) -> Arrays:
    return arrays


ARRAY_CHANGES: list[Callable[[Random, Arrays], Arrays]] = [
    _drop, _rename, _swap, _empty, _empty_all, _no_rows, _permute, _repeat, _truncate, _dtype, _value, _value, _value, _fill, _noise,
    _few_positions, _few_positions, _perturb, _perturb, _perturb, _unsteered, _no_greedy, _pads, _prompts, _positions, _objects, _more,
    _none, *[_perturb_all] * 8, *[_perturb_completions] * 4,
]  # fmt: skip


def _bytes(random: Random, content: bytes) -> bytes:
    """The file itself: cut, some bytes changed, a member twice, a header that lies, text."""
    kind = random.integers(5)
    if kind == 0:
        return content[: random.integers(len(content))]
    if kind == 1:
        changed = bytearray(content)
        for _ in range(random.integers(1, 20)):
            changed[random.integers(len(changed))] = random.integers(256)
        return bytes(changed)
    if kind == 2:
        return b"no archive" * 10
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for number, name in enumerate(source.namelist()):
            member = source.read(name)
            if kind == 3 and number == 0:
                target.writestr("again.npy" if random.integers(2) else "logits.npy", member)
            elif kind == 4 and name == "logits.npy":
                member = member.replace(b"'shape': (", b"'shape': (9" if random.integers(2) else b"'shape': (-")
            target.writestr(name, member)
    return out.getvalue()


def _set(place: str, values: list) -> Callable[[Random, Manifest], object]:
    def change(random: Random, manifest: Manifest) -> None:
        *path, last = place.split(".")
        for key in path:
            manifest = manifest[key]
        manifest[last] = _choose(random, values)

    return change


def _quantization(random: Random, manifest: Manifest) -> None:
    """A record that no quantization wrote: it asks for another row of the budgets."""
    manifest["quantization"] = {
        "scheme": _choose(random, ["weight-only", "dynamic", "static", "fp8", "qdq-int8", "anything", ""]),
        "bits": int(_choose(random, [4, 8, 3, 0])), "block_size": 32, "symmetric": True, "accuracy_level": int(_choose(random, [0, 1, 4])),
    }  # fmt: skip


WILD = [np.inf, -np.inf, np.nan, 1e9, 1.0, 0.5, 0.0, -1.0, 1e-5, 0.999999, "1", None, True]
MANIFEST_CHANGES: list[Callable[[Random, Manifest], object]] = [
    *(_set(f"parity_budget.{key}", WILD) for key in ("logits", "top1", "delta", "delta", "Logits", "logit", "noise")),
    _set("parity_budget", [{}, None, [], {"logits": 1e-5, "top1": 1.0, "delta": 0.999995}, {"budget": 1.0}]),
    _quantization,
    _quantization,
    _set("precision", ["fp16", "bf16", "fp64", "", "fp32"]),
    _set("adapters", [[], ["ends", "ends"], ["base"], ["other"], ["ends", "other"], "ends"]),
    _set("logits", ["all", "last", "none"]),
    _set("padding", ["none", "left", "right", "x"]),
    _set("model.vocab_size", [0, 1, -1, 299, 10**9]),
    _set("model.context_length", [0, 1, -5, 20, 10**12]),
    _set("model.sliding_window", [0, 1, 10**6]),
    _set("task", ["text-generation", "text-classification", "x"]),
    _set("labels", [[], ["a"], ["a", "b", "c"]]),
]


class Mutator:
    """A bundle folder that is changed for one case and put back for the next."""

    def __init__(self, folder: Path, names: tuple[str, ...]) -> None:
        self.folder, self._names = folder, names
        self._golden = {name: (folder / "golden" / f"{name}.npz").read_bytes() for name in names}
        self._manifest = (folder / "manifest.json").read_text()

    def mutate(self, case: int) -> None:
        """One to three changes to the arrays of some names, to the manifest or to both, sealed by their hashes again."""
        random = np.random.default_rng([11, case])
        for name, content in self._golden.items():
            (self.folder / "golden" / f"{name}.npz").write_bytes(content)
        manifest = json.loads(self._manifest)
        where = random.integers(4)
        if where != 0:
            for name in self._names if random.integers(2) else (_choose(random, list(self._names)),):
                self._change_arrays(random, str(name))
        if where in (0, 1):
            for _ in range(random.integers(1, 3)):
                with suppress(TypeError):  # a change to what an earlier one has taken away
                    MANIFEST_CHANGES[random.integers(len(MANIFEST_CHANGES))](random, manifest)
        manifest["files"] = to_json(hash_files(self.folder, NOT_HASHED))
        try:
            write_sealed(self.folder / "manifest.json", manifest)
        except ValueError:  # a number that canonical JSON does not have: somebody wrote it all the same
            (self.folder / "manifest.json").write_text(json.dumps(manifest))

    def _change_arrays(self, random: Random, name: str) -> None:
        path = self.folder / "golden" / f"{name}.npz"
        if random.integers(8) == 0:
            path.write_bytes(_bytes(random, self._golden[name]))
            return
        with np.load(io.BytesIO(self._golden[name])) as stored:
            arrays = dict(stored)
        for _ in range(random.integers(1, 3)):
            with suppress(KeyError, IndexError, TypeError, ValueError):  # a change to what an earlier one has taken away
                arrays = ARRAY_CHANGES[random.integers(len(ARRAY_CHANGES))](random, arrays)
        np.savez(path, **arrays)
