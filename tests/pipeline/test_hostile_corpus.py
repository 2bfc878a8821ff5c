"""Damaged files of every kind, chosen by seed: one line, exit code 2, and neither a hang nor a flood of memory.

What CI runs is a sample; ``python -m hostile.harness`` runs as many as one has time for.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hostile import corpus, harness
from hostile.corpus import KINDS, Originals, case_of, make_originals

FAST = 2
"""Seeds of each kind at every commit."""
SLOW = 36
BITS = 100
OWN_CACHES = ("reft-export", "Microsoft")
"""The second is onnxruntime's."""


@pytest.fixture(scope="module")
def originals(tmp_path_factory, bundle_folder, base_folder) -> Originals:
    root = tmp_path_factory.mktemp("hostile")
    made = make_originals(root, bundle=bundle_folder("llama", target="tensorrt"), base=base_folder("llama"))
    harness.preload()
    return made


def hold(kind: str, seeds: range, originals: Originals, folder: Path) -> None:
    """Every finding of all seeds, at once; and nothing is left anywhere but in the cache."""
    wrong = []
    before = harness.listing(originals.bundle)
    with harness.confined(folder / "places"):
        for seed in seeds:
            where = folder / str(seed)
            where.mkdir()
            wrong += filter(None, [harness.finding(kind, seed, originals, where)])
            shutil.rmtree(where)
    assert not wrong, "\n".join(wrong)
    assert {p.name for p in (folder / "places" / "scratch").iterdir()} <= {".ses"}  # a mark of onnxruntime's own
    home, caches = folder / "places" / "home", {folder / "places" / "home" / ".cache" / name for name in OWN_CACHES}
    assert not [p for p in home.rglob("*") if p.is_file() and not caches & {*p.parents}]
    assert harness.listing(originals.bundle) == before


@pytest.mark.parametrize("kind", list(KINDS)[:4])
def test_a_sample(kind: str, originals: Originals, tmp_path: Path) -> None:
    hold(kind, range(FAST), originals, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_larger_sample(kind: str, originals: Originals, tmp_path: Path) -> None:
    hold(kind, range(BITS if kind == "bit" else SLOW), originals, tmp_path)


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
        assert said in harness.run(["inspect", originals.bundle], seconds=6.0 if fault is hangs else 60.0).wrong


def test_what_is_written_beside_the_output_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "manifest.json").write_text("{}")
    before = harness.listing(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out.parity.json").write_text("{}")
    assert not harness.strayed(before, harness.listing(tmp_path))
    (tmp_path / "copy" / "manifest.json").write_text("{ }")
    (tmp_path / ".out.lock").write_text("")
    assert harness.strayed(before, harness.listing(tmp_path)) == "wrote .out.lock, copy/manifest.json"


def test_cases_are_what_their_seeds_say(originals: Originals, tmp_path: Path) -> None:
    for kind in corpus.KINDS:
        one, other = tmp_path / "one", tmp_path / "other"
        said = []
        for folder in (one, other):
            folder.mkdir()
            said.append(case_of(kind, 7, originals, folder)[1])
            shutil.rmtree(folder)
        assert said[0] == said[1]
