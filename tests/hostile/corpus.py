"""The cases: of each kind, a folder that is damaged by a seed, and the verb that reads it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiny

from hostile import mutations
from hostile.mutations import Random, one


@dataclass(frozen=True, kw_only=True)
class Originals:
    """What cases copy and damage."""

    bundle: Path
    adapter: Path
    graph: Path
    base: Path
    vectors: Mapping[str, Path]
    """Adapters of others by the kind of their file: gguf, npz, safetensors; and pyreft, a folder with a pickle."""


def make_originals(root: Path, *, bundle: Path, base: Path) -> Originals:
    """The other files of a tiny ``base`` and its ``bundle`` for tensorrt, which has an adapter "tied"; ``root`` is a new folder."""
    from foreign_graphs import save_foreign

    from reft_export.base.load import load_base
    from reft_export.importing.pyreft.write import export_to_pyreft
    from runtimes.edits.adapter import save_adapter

    info = load_base(base).info
    save_adapter(tiny.random_adapter(info), root / "style")
    export_to_pyreft(str(base), root / "style", root / "pyreft", report=lambda _: None)
    vectors = write_vectors(root / "vectors", info.hidden_size) | {"pyreft": root / "pyreft"}
    return Originals(bundle=bundle, adapter=root / "style", graph=save_foreign(bundle, root / "graph"), base=base, vectors=vectors)


def make_all(root: Path) -> Originals:
    """``make_originals`` with a base and a bundle of its own."""
    from reft_export.base.load import load_base
    from reft_export.exporting.export import ExportSettings, export_bundle
    from runtimes.edits.adapter import save_adapter

    base = tiny.save_base(root / "base")
    save_adapter(tiny.random_adapter(load_base(base).info), root / "tied")
    export_bundle(str(base), [root / "tied"], root / "bundle", ExportSettings(target="tensorrt"), report=lambda _: None)
    return make_originals(root, bundle=root / "bundle", base=base)


Case = tuple[list[object], str]
"""The command line, and what was damaged; "" where this seed damages nothing."""
Make = Callable[[Random, Originals, Path], Case]


def case_of(kind: str, seed: int, originals: Originals, folder: Path) -> Case:
    return KINDS[kind](random.Random(f"{kind}/{seed}"), originals, folder)


def _bundle(originals: Originals, folder: Path) -> Path:
    return Path(shutil.copytree(originals.bundle, folder / "bundle"))


def _reading(chance: Random, bundle: Path, *, golden: bool = False) -> list[object]:
    inspect, run = ["inspect", bundle], ["run", bundle, "-a", "tied", "-p", "hello", "--max-new-tokens", 2, "--threads", 1]
    return ["parity", bundle] if golden else one(chance, (inspect, run))


def _bit(chance: Random, originals: Originals, folder: Path) -> Case:
    whole = one(chance, (originals.bundle, originals.adapter))
    copy = Path(shutil.copytree(whole, folder / "copy"))
    files = sorted(p for p in copy.rglob("*") if p.is_file() and p.name != "genai_config.json")
    return ["inspect", copy], mutations.flipped_bit(chance, one(chance, files))


def _manifest(chance: Random, originals: Originals, folder: Path) -> Case:
    bundle = _bundle(originals, folder)
    return _reading(chance, bundle), mutations.sealed(chance, bundle / "manifest.json")


def _record(chance: Random, originals: Originals, folder: Path) -> Case:
    bundle = _bundle(originals, folder)
    said = mutations.sealed(chance, bundle / "adapters" / "tied.json")
    mutations.rehash(bundle)
    return _reading(chance, bundle), said


def _golden(chance: Random, originals: Originals, folder: Path) -> Case:
    bundle = _bundle(originals, folder)
    said = mutations.npz(chance, bundle / "golden" / "tied.npz")
    mutations.rehash(bundle)
    return _reading(chance, bundle, golden=True), said


def _onnx_adapter(chance: Random, originals: Originals, folder: Path) -> Case:
    bundle = _bundle(originals, folder)
    said = mutations.bytes_of(chance, bundle / "adapters" / "tied.onnx_adapter")
    mutations.rehash(bundle)
    return ["run", bundle, "-a", "tied", "-p", "hello", "--max-new-tokens", 2, "--threads", 1], said


def _tokenizer(chance: Random, originals: Originals, folder: Path) -> Case:
    bundle = _bundle(originals, folder)
    names = [n for n in ("tokenizer.json", "tokenizer.json", "tokenizer_config.json") if (bundle / n).is_file()]
    path = bundle / one(chance, names)
    said = one(chance, (mutations.sealed, mutations.sealed, mutations.bytes_of))(chance, path)
    mutations.rehash(bundle)
    return ["run", bundle, "-p", "hello", "--max-new-tokens", 2, "--threads", 1], said


def _odd_file(chance: Random, originals: Originals, folder: Path) -> Case:
    whole = one(chance, (originals.bundle, originals.adapter, originals.graph.parent))
    copy = Path(shutil.copytree(whole, folder / "copy"))
    said = mutations.odd_file(chance, one(chance, sorted(p for p in copy.rglob("*") if p.is_file())))
    return ["inspect", copy], said


def _adapter(chance: Random, originals: Originals, folder: Path) -> Case:
    adapter = Path(shutil.copytree(originals.adapter, folder / "style"))
    tensors = adapter / "adapter.safetensors"
    if chance.random() < 0.4:
        said = one(chance, (mutations.safetensors, mutations.bytes_of))(chance, tensors)
        mutations.reseal(adapter)
    else:
        said = mutations.sealed(chance, adapter / "adapter.json")
    return one(chance, (["inspect", adapter], ["fold", originals.graph, "-a", adapter, "-o", folder / "out"])), said


def _graph(chance: Random, originals: Originals, folder: Path) -> Case:
    copy = Path(shutil.copytree(originals.graph.parent, folder / "graph")) / originals.graph.name
    said = one(chance, (mutations.graph, mutations.graph, mutations.graph, mutations.bytes_of))(chance, copy)
    return one(chance, (["inspect", copy], ["fold", copy, "-a", originals.adapter, "-o", folder / "out"])), said


def _foreign(kind: str, mutate: mutations.Mutation) -> Make:
    def make(chance: Random, originals: Originals, folder: Path) -> Case:
        copy = Path(shutil.copy(originals.vectors[kind], folder))
        said = one(chance, (mutate, mutations.bytes_of))(chance, copy)
        return ["import", copy, "-m", originals.base, "--positions", "all", "-o", folder / "out"], said

    return make


def _pyreft(chance: Random, originals: Originals, folder: Path) -> Case:
    copy = Path(shutil.copytree(originals.vectors["pyreft"], folder / "pyreft"))
    config, pickles = copy / "config.json", sorted(copy.glob("*.bin"))
    said = mutations.sealed(chance, config) if chance.random() < 0.5 else mutations.bytes_of(chance, one(chance, pickles))
    asked = ["--positions", "f2+l2", "--tied", "--activation", "none"]
    return ["import", copy, "-m", originals.base, *asked, "-o", folder / "out"], said


KINDS: dict[str, Make] = {
    "bit": _bit,
    "manifest": _manifest,
    "record": _record,
    "golden": _golden,
    "onnx_adapter": _onnx_adapter,
    "tokenizer": _tokenizer,
    "odd file": _odd_file,
    "adapter": _adapter,
    "graph": _graph,
    "gguf": _foreign("gguf", mutations.bytes_of),
    "npz": _foreign("npz", mutations.npz),
    "safetensors": _foreign("safetensors", mutations.safetensors),
    "pyreft": _pyreft,
}


def write_vectors(folder: Path, width: int) -> dict[str, Path]:
    """Two steering vectors of ones, in each format."""
    import gguf
    from safetensors.numpy import save_file

    folder.mkdir()
    arrays = {f"layer_{n}": np.ones(width, np.float32) for n in (1, 2)}
    np.savez(folder / "v.npz", **arrays)
    save_file(arrays, folder / "v.safetensors")
    writer = gguf.GGUFWriter(folder / "v.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_array("controlvector.notes", ["a", "b"])
    for n in (1, 2):
        writer.add_tensor(f"direction.{n}", np.ones(width, np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return {kind: folder / f"v.{kind}" for kind in ("npz", "safetensors", "gguf")}
