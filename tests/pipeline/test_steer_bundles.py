"""``reft-export steer`` from its lines to a bundle: what a device says is what eager PyTorch said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from models import gguf_files
from typer.testing import CliRunner

from reft_export.base.load import load_base
from reft_export.cli.main import app
from reft_export.composing.compose import compose_adapters
from reft_export.eager.steering import steered
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.parity.check import check_parity
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.edits.edit import Site
from runtimes.open import open_artifact, open_session

GLAD = [{"prompt": f"How is day {n}?", "completion": f"It is glad{'!' * (n % 3 + 1)}"} for n in range(7)]
SAD = [{"prompt": f"How is day {n}?", "completion": f"It is a sad one, {n}."} for n in range(5)]


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("contrast")
    for name, lines in (("glad", GLAD), ("sad", SAD)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return folder / "glad.jsonl", folder / "sad.jsonl"


def test_from_lines_to_a_bundle_that_says_the_same(base_folder, files, tmp_path) -> None:
    base, one = base_folder(), "1.block_output"
    shown = json.loads(run("steer", *files, "-m", base, "-o", tmp_path / "glad", "--strength", 1.5, "--layers", 1, "--json"))
    assert (shown["method"], shown["edited"], shown["strength"], shown["read"]) == ("add", [one], 1.5, "mean")
    assert [each["site"] for each in shown["sites"]] == [one] and shown["sites"][0]["accuracy"] > 0.5
    assert [each["strength"] for each in shown["strengths"]] == [0, 0.75, 1.5, 3] and len(shown["samples"]) == 3
    said = run("steer", *files, "-m", base, "-o", tmp_path / "less", "--method", "ablate", "--samples", 1)
    assert "ablated" in said and "chosen" in said and "2.block_output, positions all" in said

    export_bundle(str(base), [tmp_path / "glad", tmp_path / "less"], tmp_path / "bundle", ExportSettings(), report=lambda _: None)
    assert check_parity(tmp_path / "bundle", report=lambda _: None).passed
    eager, ids = load_base(base), np.array([[5, 9, 40, 77, 12, 3]])
    with open_session(open_artifact(tmp_path / "bundle"), threads=1) as session:
        for name in ("glad", "less"):
            adapter = load_adapter(tmp_path / name)
            with torch.no_grad(), steered(eager.model, adapter):
                expected = eager.model(torch.from_numpy(ids)).logits[0].numpy()
            session.set_adapter(name)
            logits = session.step(ids, np.ones_like(ids)).logits[0]
            np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())

    both = compose_adapters([tmp_path / "glad", tmp_path / "less"], tmp_path / "both").adapter
    h = np.random.default_rng(0).normal(size=(4, tiny.WIDTH))
    (first,), (second,) = (load_adapter(tmp_path / name).edits()[Site(layer=1)] for name in ("glad", "less"))
    np.testing.assert_allclose(both.edits()[Site(layer=1)][0].apply(h), second.apply(first.apply(h)), atol=1e-6)


def test_a_gguf_base(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    base = gguf_files.write(tmp_path / "small.gguf", gguf_files.build("llama"))
    run("steer", *files, "-m", base, "-o", tmp_path / "glad", "--samples", 0)
    assert load_adapter(tmp_path / "glad").base.name == "small"


def test_on_the_weights_of_a_bundle(base_folder, bundle_folder, files, tmp_path) -> None:
    bundle = bundle_folder("llama", "int4")
    run("steer", *files, "-m", base_folder(), "--base", bundle, "-o", tmp_path / "int4", "--layers", 1, "--strength", 1, "--samples", 0)
    run("steer", *files, "-m", base_folder(), "-o", tmp_path / "float", "--layers", 1, "--strength", 1, "--samples", 0)
    rounded, plain = (load_adapter(tmp_path / name) for name in ("int4", "float"))
    assert rounded.trained_on == open_artifact(bundle).digest and plain.trained_on is None
    assert rounded.digest != plain.digest and rounded.base.fingerprint == plain.base.fingerprint


@pytest.mark.slow
def test_a_rotation_of_other_weights_is_refused(base_folder, bundle_folder, tmp_path) -> None:
    """Its source is read where it was trained: from the base itself, or from the weights of that one bundle."""
    bundle, lines = bundle_folder("llama", "int4"), tmp_path / "lines.jsonl"
    pairs = [{"prompt": f"say {a}", "source": f"say {b}", "completion": b} for a in "abc" for b in "abc" if a != b]
    lines.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train = ("train", "-m", base_folder(), "-d", lines, "--objective", "interchange", "--layers", 1, "--max-steps", 1, "--samples", 0)
    run(*train, "-o", tmp_path / "plain")
    run(*train, "-o", tmp_path / "rounded", "--base", bundle)
    rounded = load_adapter(tmp_path / "rounded")
    assert rounded.trained_on == open_artifact(bundle).digest
    save_adapter(replace(rounded, trained_on="a" * 64), tmp_path / "another")
    steer = ("steer", "-m", base_folder(), "-o", tmp_path / "b", "--source", "say b", "--rotation")
    for name, base, theirs in (
        ("plain", ("--base", bundle), "the base itself"),
        ("rounded", (), f"the weights of a bundle ({rounded.trained_on[:12]})"),
        ("another", ("--base", bundle), "the weights of a bundle (aaaaaaaaaaaa)"),
    ):
        done = CliRunner().invoke(app, [str(each) for each in (*steer, tmp_path / name, *base)])
        expected = f"{name} was trained on {theirs}, where its source has to be read, too; give --base as train had it"
        assert done.exit_code == 2 and expected in " ".join(done.stderr.split()) and not (tmp_path / "b").exists(), done.output
    run(*steer, tmp_path / "rounded", "--base", bundle)
    assert load_adapter(tmp_path / "b").trained_on == rounded.trained_on


def test_a_dry_run_writes_nothing_and_one_file_holds_both(base_folder, tmp_path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f"{json.dumps({'prompt': str(n), 'positive': 'yes', 'negative': 'no'})}\n" for n in range(4)))
    plan = json.loads(run("steer", pairs, "-m", base_folder(), "-o", tmp_path / "a", "--dry-run", "--json"))
    assert f"read mean of 4 positive and 4 negative lines at {tiny.LAYERS} sites" in plan["steps"]
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "push"], "method 'push' is unknown"),
        (["--layers", "7"], "layer 7 does not exist in this base"),
        (["-o", "bad name!"], "bad name!"),
        (["--base", "nowhere"], "nowhere"),
    ],
)
def test_refusals_are_one_line(arguments, said, base_folder, files, tmp_path) -> None:
    given = [*map(str, files), "-m", str(base_folder()), *([] if "-o" in arguments else ["-o", str(tmp_path / "a")]), *arguments]
    done = CliRunner().invoke(app, ["steer", *given])
    assert done.exit_code == 2 and done.stdout == ""
    assert said in done.stderr and done.stderr.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "a").exists()
