"""Damaged files of every kind, chosen by seed: one line, exit code 2, and neither a hang nor a flood of memory.

What CI runs is a sample; ``python -m hostile.harness`` runs as many as one has time for.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from foreign_graphs import save_foreign
from hostile import corpus, harness
from hostile.corpus import KINDS, Originals, case_of, write_vectors

from reft_export.base.load import load_base
from reft_export.importing.pyreft.write import export_to_pyreft
from runtimes.edits.adapter import save_adapter

FAST = 2
"""Seeds of each kind at every commit."""
SLOW = 25


@pytest.fixture(scope="module")
def originals(tmp_path_factory, bundle_folder, base_folder) -> Originals:
    root = tmp_path_factory.mktemp("hostile")
    bundle = bundle_folder("llama", target="tensorrt")
    base = load_base(base_folder("llama"))
    save_adapter(tiny.random_adapter(base.info), root / "style")
    vectors = write_vectors(root / "vectors", base.info.hidden_size)
    export_to_pyreft(str(base_folder("llama")), root / "style", root / "pyreft", report=lambda _: None)
    harness.preload()
    return Originals(
        bundle=bundle,
        adapter=root / "style",
        graph=save_foreign(bundle, root / "graph"),
        base=base_folder("llama"),
        vectors={**vectors, "pyreft": root / "pyreft"},
    )


def hold(kind: str, seeds: range, originals: Originals, folder: Path) -> None:
    """Every finding of all seeds, at once."""
    wrong = []
    for seed in seeds:
        where = folder / str(seed)
        where.mkdir()
        arguments, said = case_of(kind, seed, originals, where)
        if said:
            outcome = harness.run(arguments)
            finding = outcome.wrong or ("is not refused" if kind == "bit" and outcome.code != 2 else "")
            wrong += [f"{kind}/{seed} ({said}; {arguments[0]}): {finding}"] if finding else []
        shutil.rmtree(where)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("kind", list(KINDS)[:4])
def test_a_sample(kind: str, originals: Originals, tmp_path: Path) -> None:
    hold(kind, range(FAST), originals, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_sample(kind: str, originals: Originals, tmp_path: Path) -> None:
    hold(kind, range(SLOW), originals, tmp_path)


def test_the_harness_finds(originals: Originals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb that shows a traceback, one that hangs, one that is killed and one that takes too much."""
    from reft_export.cli import inspect

    def fails(path: Path) -> None:
        raise KeyError(path)

    def hangs(path: Path) -> None:
        while True:
            pass

    def dies(path: Path) -> None:
        import os

        os.abort()

    def floods(path: Path) -> None:
        assert b"x" * (1300 << 20)

    for fault, said in ((fails, "a bug: "), (hangs, "took more than"), (dies, "died of SIGABRT"), (floods, "MB")):
        monkeypatch.setattr(inspect, "_content", fault)
        assert said in harness.run(["inspect", originals.bundle], seconds=6.0).wrong


def test_cases_are_what_their_seeds_say(originals: Originals, tmp_path: Path) -> None:
    for kind in corpus.KINDS:
        one, other = tmp_path / "one", tmp_path / "other"
        said = []
        for folder in (one, other):
            folder.mkdir()
            said.append(case_of(kind, 7, originals, folder)[1])
            shutil.rmtree(folder)
        assert said[0] == said[1]
