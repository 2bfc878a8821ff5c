"""Another base of equal weights, verb by verb: refused by the key that differs, taken with --accept-base; and files of older releases."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny
from foreign_graphs import save_foreign
from reseal import reseal
from safetensors.numpy import load_file, save_file
from tiers import slow_and_long
from typer.testing import CliRunner

from reft_export.base.load import outline_base
from reft_export.base.model_folder import fingerprint_v1
from reft_export.cli.main import app
from runtimes.artifacts.bundle import open_bundle
from runtimes.artifacts.manifest import write_manifest
from runtimes.edits.adapter import load_adapter, save_adapter

DIFFERS = "config.json's max_position_embeddings is 128, expected 512"
OFFER = "or take this one, whose weights are equal, with --accept-base"


@dataclass(frozen=True, kw_only=True)
class Made:
    """A base, one that differs from it in a key of its config, one of other weights, and what was made of the first."""

    root: Path
    base: Path
    longer: Path
    other: Path
    style: Path
    bundle: Path
    small: Path
    graph: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory, base_folder, bundle_folder) -> Made:
    root = tmp_path_factory.mktemp("accept")
    base = base_folder("llama")
    longer, other = (Path(shutil.copytree(base, root / name)) for name in ("longer", "other"))
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    weights = load_file(other / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(weights | {name: -weights[name]}, other / "model.safetensors", metadata={"format": "pt"})
    save_adapter(tiny.random_adapter(outline_base(base).info), root / "style")
    bundle, small = bundle_folder("llama"), bundle_folder("llama", "int4")
    graph = save_foreign(bundle, root / "graph")
    return Made(root=root, base=base, longer=longer, other=other, style=root / "style", bundle=bundle, small=small, graph=graph)


def data(folder: Path) -> Path:
    path = folder / "data.jsonl"
    path.write_text('{"prompt": "How far is the sea?", "completion": "yes"}\n' * 4)
    return path


VERBS: dict[str, Callable[[Made, Path, Path], list[object]]] = {
    "export": lambda m, base, out: ["export", "-m", base, "-a", m.style, "-o", out / "b"],
    "export --format pyreft": lambda m, base, out: ["export", "-m", base, "-a", m.style, "-o", out / "p", "--format", "pyreft"],
    "fold -m": lambda m, base, out: ["fold", m.graph, "-m", base, "-a", m.style, "-o", out / "b"],
    "quantize": lambda m, base, out: ["quantize", m.bundle, "-m", base, "-p", "int8", "-o", out / "q"],
    "quantize --calibrate": lambda m, base, out: [
        *("quantize", m.bundle, "-m", base, "--scheme", "static", "--calibrate", data(out), "-o", out / "q"),
    ],
    "quantize -a": lambda m, base, out: ["quantize", m.small, "-m", base, "-a", m.style, "-o", out / "q"],
    "parity -m": lambda m, base, out: ["parity", m.bundle, "-m", base],
    "train --start": lambda m, base, out: [
        *("train", "-m", base, "--start", m.style, "-d", data(out), "-o", out / "a", "--max-steps", 1, "--samples", 0),
    ],
    "train --base": lambda m, base, out: [
        *("train", "-m", base, "--base", m.small, "-d", data(out), "-o", out / "a", "--max-steps", 1, "--samples", 0),
    ],
}
QUICK = ("export --format pyreft", "fold -m", "parity -m", "train --start", "train --base")
"""Run at every commit; the others make whole bundles."""


def cli(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    return done.exit_code, done.output if done.exit_code in (0, 3) else done.stderr.strip()


def written(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()} - {"data.jsonl"}


@pytest.mark.parametrize("verb", VERBS)
def test_the_key_is_named_and_the_flag_offered(made: Made, verb: str, tmp_path: Path) -> None:
    code, said = cli(*VERBS[verb](made, made.longer, tmp_path))
    assert code == 2 and DIFFERS in said and OFFER in said and len(said.splitlines()) == 1, said
    assert not written(tmp_path)


@pytest.mark.parametrize("verb", VERBS)
def test_other_weights_are_refused_whatever_is_accepted(made: Made, verb: str, tmp_path: Path) -> None:
    code, said = cli(*VERBS[verb](made, made.other, tmp_path), "--accept-base")
    assert code == 2 and "it has other values in layers.1.mlp.up_proj.weight; " in said and "--accept-base" not in said, said
    assert not written(tmp_path)


@pytest.mark.parametrize(
    "verb", [*QUICK, *slow_and_long([verb for verb in VERBS if verb not in QUICK], "quantize --calibrate", "quantize -a")]
)
def test_equal_weights_are_accepted(made: Made, verb: str, tmp_path: Path) -> None:
    code, said = cli(*VERBS[verb](made, made.longer, tmp_path), "--accept-base")
    assert code == 0, said
    bundles = [path for path in tmp_path.iterdir() if (path / "manifest.json").is_file()]
    for bundle in bundles:  # what was made is of the base that was taken
        assert open_bundle(bundle).manifest.model.fingerprint == outline_base(made.longer).info.fingerprint
    if verb.startswith("train"):
        assert load_adapter(tmp_path / "a").base == outline_base(made.longer).info


# --- files with fingerprints of version 1 ----------------------------------------------------------


def former_bundle(made: Made, source: Path, folder: Path) -> Path:
    bundle = open_bundle(shutil.copytree(source, folder))
    for path in (folder / "adapters").glob("*.json"):
        record = json.loads(path.read_text())
        record["base"]["fingerprint"] = fingerprint_v1(made.base)
        del record["base"]["parts"]
        path.write_text(json.dumps(record))
    model = replace(bundle.manifest.model, fingerprint=fingerprint_v1(made.base), parts=None)
    write_manifest(folder, replace(bundle.manifest, model=model))
    reseal(folder, lambda manifest: manifest["model"].pop("parts"))
    return folder


def former_adapter(made: Made, folder: Path) -> Path:
    shutil.copytree(made.style, folder)
    former = {"fingerprint": fingerprint_v1(made.base)}
    reseal(folder, lambda adapter: (adapter["base"].update(former), adapter["base"].pop("parts")))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("bundle", ["former", "new"])
@pytest.mark.parametrize("adapter", ["former", "new"])
def test_adapters_and_bundles_of_either_version_fit_together(made: Made, bundle: str, adapter: str, tmp_path: Path) -> None:
    """A hot-swap, which compares adapter, bundle and base."""
    small = former_bundle(made, made.small, tmp_path / "small") if bundle == "former" else made.small
    style = former_adapter(made, tmp_path / "former") if adapter == "former" else made.style
    code, said = cli("quantize", small, "-m", made.base, "-a", style, "-o", tmp_path / "q")
    assert code == 0, said
    code, said = cli("quantize", small, "-m", made.other, "-a", style, "-o", tmp_path / "r")
    assert code == 2 and "was made from llama" in said, said


def test_an_adapter_of_another_base_is_not_put_into_a_former_bundle(made: Made, tmp_path: Path) -> None:
    """Two records of two versions tell nothing; the base that is loaded does."""
    small = former_bundle(made, made.small, tmp_path / "small")
    save_adapter(tiny.random_adapter(outline_base(made.other).info), tmp_path / "theirs")
    code, said = cli("quantize", small, "-m", made.base, "-a", tmp_path / "theirs", "-o", tmp_path / "q")
    assert code == 2 and "adapter theirs was trained on other" in said and "it has other values in layers.1.mlp.up_proj.weight" in said
    assert not (tmp_path / "q").exists()


def test_former_bundles_are_held_against_their_base(made: Made, tmp_path: Path) -> None:
    bundle = former_bundle(made, made.bundle, tmp_path / "bundle")
    code, said = cli("parity", bundle, "-m", made.base)
    assert code == 0, said
    code, said = cli("parity", bundle, "-m", made.longer, "--accept-base")
    assert code == 2 and "pass the base it was made from" in said and "--accept-base" not in said
