"""Adapters into a finished bundle and out of it: the same bytes elsewhere, held or said not to be, whole at every moment."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import tiny
from reseal import reseal
from typer.testing import CliRunner

from reft_export.adding import add as module
from reft_export.adding.add import add_adapter, remove_adapter
from reft_export.base.load import load_base
from reft_export.cli.main import app
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.parity.check import check_parity
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.edits.edit import Site
from runtimes.errors import AdapterError, BundleError, InputError, ParityError
from runtimes.files import folders
from runtimes.open import open_session

QUIET = {"report": lambda _: None}


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def bundle(bundle_folder, tmp_path):
    """A copy of a finished one, to be changed in place."""

    def copy(family: str = "llama", precision: str = "fp32") -> Path:
        return Path(shutil.copytree(bundle_folder(family, precision), tmp_path / f"{family}-{precision}"))

    return copy


@pytest.fixture
def new(adapter_folders, tmp_path):
    """Folders of adapters that the bundles have nodes for, under names that they do not have."""

    def folders(*names: str) -> list[Path]:
        made = []
        for number, (name, source) in enumerate(zip(names, adapter_folders("llama", ("tied", "untied", "all-direft")), strict=False)):
            adapter = load_adapter(source)
            save_adapter(
                replace(adapter, tensors={k: v * np.float32(0.9 - 0.1 * number) for k, v in adapter.tensors.items()}), tmp_path / name
            )
            made.append(tmp_path / name)
        return made

    return folders


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_held_to_eager(precision, bundle, new, base_folder) -> None:
    """Only the new adapters are run and written; taken out again, nothing is left of them."""
    folder = bundle("llama", precision)
    before = _bytes(folder)
    result = add_adapter(folder, new("one", "two"), model=str(base_folder("llama")), **QUIET)
    assert result.parity.passed and all("one: " in rung.name or "two: " in rung.name for rung in result.parity.rungs)
    after, opened = _bytes(folder), open_bundle(folder)
    written = {f"adapters/{name}.{kind}" for name in ("one", "two") for kind in ("json", "onnx_adapter")}
    written |= {"manifest.json", "golden/one.npz", "golden/two.npz"}
    assert {name for name in after if after[name] != before.get(name)} == written
    assert opened.manifest.not_held == () and opened.adapter_names[-2:] == ("one", "two")
    assert check_parity(folder, **QUIET).passed
    remove_adapter(folder, ["one"], **QUIET)
    remove_adapter(folder, ["two"], **QUIET)
    assert _bytes(folder) == before and not list(folder.parent.glob(".*"))


def test_without_the_base_it_is_said_everywhere(bundle, new) -> None:
    folder = bundle("llama", "int4")
    before = _bytes(folder)
    add_adapter(folder, new("one"), **QUIET)
    assert open_bundle(folder).manifest.not_held == ("one",)
    report = check_parity(folder, **QUIET)
    assert report.passed and not any("one" in rung.name for rung in report.rungs) and "adapter one is not held" in report.notes[0]
    run = CliRunner().invoke(app, ["run", str(folder), "-a", "one", "-p", "Tell", "-n", "2", "--chat", "never"])
    assert run.exit_code == 0 and "adapter one is not held" in " ".join(run.stderr.split())
    shown = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).stdout)
    assert {row["name"]: row["held"] for row in shown["adapters"]}["one"] is False
    with pytest.raises(BundleError, match="adapter one is not held .*add it again with --model"):
        open_bundle(folder).golden("one")
    remove_adapter(folder, ["one"], **QUIET)
    assert _bytes(folder) == before


def test_it_steers_as_an_exported_one(bundle, adapter_folders, tmp_path) -> None:
    """The same adapter under another name, from another verb: the same logits to the bit."""
    folder = bundle()
    again = Path(shutil.copytree(adapter_folders("llama", ("untied",))[0], tmp_path / "again"))
    add_adapter(folder, [again], output=tmp_path / "out", **QUIET)
    assert open_bundle(folder).adapter_names == open_bundle(tmp_path / "out").adapter_names[:-1]
    ids, logits = np.array([[1, 5, 9, 40, 7, 8]]), {}
    with open_session(open_bundle(tmp_path / "out")) as session:
        for name in (None, "untied", "again"):
            session.set_adapter(name)
            logits[name] = session.step(ids, np.ones_like(ids)).logits
    assert np.array_equal(logits["again"], logits["untied"]) and not np.array_equal(logits["again"], logits[None])


def test_into_a_bundle_of_sites_alone_and_out_to_its_base(base_folder, tmp_path) -> None:
    base, info = str(base_folder("llama")), load_base(base_folder("llama")).info
    export_bundle(base, [], tmp_path / "b", ExportSettings(sites=(Site(layer=1),)), **QUIET)
    before = _bytes(tmp_path / "b")
    save_adapter(tiny.random_adapter(info, layers=(1,)), tmp_path / "fits")
    save_adapter(tiny.random_adapter(info, layers=(0, 1, 2)), tmp_path / "lacks")
    save_adapter(tiny.random_adapter(info, layers=(1,), method="red", rank=0), tmp_path / "red")
    said = (
        r"no edit node reft\.0\.block_output, reft\.2\.block_output, which adapter lacks needs; .* --sites '0.block_output;2.block_output'"
    )
    with pytest.raises(AdapterError, match=said):
        add_adapter(tmp_path / "b", [tmp_path / "lacks"], **QUIET)
    with pytest.raises(AdapterError, match=r"which adapter red needs; `reft-export export` it with this adapter$"):
        add_adapter(tmp_path / "b", [tmp_path / "red"], **QUIET)
    assert add_adapter(tmp_path / "b", [tmp_path / "fits"], model=base, **QUIET).parity.passed
    remove_adapter(tmp_path / "b", ["fits"], **QUIET)
    assert _bytes(tmp_path / "b") == before and not (tmp_path / "b" / "adapters").exists()


def test_a_missed_budget_leaves_the_bundle(bundle, new, base_folder, monkeypatch) -> None:
    """A bank that is off by 1 % of what eager was steered with: the gate sees it, and nothing was added."""
    folder, right = bundle(), module.write_adapters
    before = _bytes(folder)

    def wrong(made, adapters):
        off = {n: replace(a, tensors={k: v * np.float32(1.01) for k, v in a.tensors.items()}) for n, a in adapters.items()}
        return right(made, off)

    monkeypatch.setattr(module, "write_adapters", wrong)
    with pytest.raises(ParityError, match="nothing was added"):
        add_adapter(folder, new("one"), model=str(base_folder("llama")), **QUIET)
    assert _bytes(folder) == before and not list(folder.parent.glob(".*"))


KILLED = """
    import sys
    from pathlib import Path
    from reft_export.adding.add import add_adapter
    from runtimes.files import folders

    def killed(*_, **__):
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(folders, sys.argv[3], killed)
    add_adapter(Path(sys.argv[1]), [Path(sys.argv[2])])
"""


@pytest.mark.parametrize("step", ["_put_in_place", "_exchange"])
def test_killed_on_the_way_the_old_bundle_is_whole(step, bundle, new) -> None:
    folder = bundle()
    before = _bytes(folder)
    command = [sys.executable, "-c", dedent(KILLED), str(folder), str(new("one")[0]), step]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert _bytes(folder) == before and open_bundle(folder, verify=True)


def test_what_lies_beside_the_listed_files_stays(bundle, new) -> None:
    """Its user's notes, an edited genai_config.json; neither gets into the manifest."""
    folder = bundle()
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / "genai_config.json").write_text("{}")
    before = _bytes(folder)
    add_adapter(folder, new("one"), **QUIET)
    assert (folder / "notes" / "mine.txt").read_text() == "mine" and (folder / "genai_config.json").read_text() == "{}"
    remove_adapter(folder, ["one"], **QUIET)
    assert _bytes(folder) == before


@pytest.mark.parametrize("reflink", ["as here", "none"])
def test_files_are_copied_never_linked(reflink, bundle, new, tmp_path, monkeypatch) -> None:
    """Of a bundle whose files are hard links and read-only, by a link to its folder: the folder is replaced, the link stays."""
    if reflink == "none":
        monkeypatch.setattr(folders, "_reflink", lambda *_: False)
    folder, linked = bundle(), tmp_path / "linked"
    shutil.copytree(folder, linked, copy_function=os.link)
    for path in linked.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = _bytes(folder)
    (tmp_path / "name").symlink_to(linked)
    add_adapter(tmp_path / "name", new("one"), **QUIET)
    assert (tmp_path / "name").is_symlink() and open_bundle(linked).adapter_names[-1] == "one"
    assert {path.stat().st_nlink for path in linked.rglob("*") if path.is_file()} == {1}
    assert _bytes(folder) == before


def test_a_reflink_is_taken_where_there_are_any(tmp_path, monkeypatch) -> None:
    asked = []
    (tmp_path / "one").write_bytes(b"bytes")
    monkeypatch.setattr("fcntl.ioctl", lambda target, request, source: asked.append(request))
    folders.copy_file(tmp_path / "one", tmp_path / "two")
    assert asked == [0x40049409] and (tmp_path / "two").read_bytes() == b""  # the call that was stood in for shares the bytes


def test_a_copy_of_other_bytes_is_refused(bundle, new, monkeypatch) -> None:
    from reft_export.adding import files

    folder = bundle()
    before = _bytes(folder)
    monkeypatch.setattr(files, "copy_file", lambda source, target: target.write_bytes(source.read_bytes()[:-1] + b"?"))
    with pytest.raises(BundleError, match="was copied to other bytes than manifest.json says"):
        add_adapter(folder, new("one"), **QUIET)
    assert _bytes(folder) == before


def test_refusals(bundle, new, adapter_folders, base_folder, tmp_path) -> None:
    """One line each, nothing written."""
    folder, (one,) = bundle(), new("one")
    before = _bytes(folder)
    adapter = load_adapter(one)

    def other(name: str, **changes) -> Path:
        save_adapter(replace(adapter, **changes), tmp_path / "others" / name)
        return tmp_path / "others" / name

    def refused(kind, match, *adapters, **options) -> None:
        with pytest.raises(kind, match=match):
            add_adapter(folder, adapters, **{"output": None, **options, **QUIET})
        assert _bytes(folder) == before and not list(folder.parent.glob(".*"))

    fingerprint = adapter.base.fingerprint[:-4] + "0000"
    refused(AdapterError, "was trained on .*was made from", other("foreign", base=replace(adapter.base, fingerprint=fingerprint)))
    refused(AdapterError, "fingerprint is of another version .*--model", other("old", base=replace(adapter.base, fingerprint="0" * 64)))
    deeper = replace(adapter.base, num_hidden_layers=adapter.base.num_hidden_layers + 1)
    refused(AdapterError, r"\d layers, width", other("deep", base=deeper))
    refused(AdapterError, "with labels good, bad; .* has none", other("labels", base=replace(adapter.base, labels=("good", "bad"))))
    refused(AdapterError, "train it on this one with --base", other("elsewhere", trained_on="0" * 64))
    refused(InputError, "has an adapter tied already; pass --force", *adapter_folders("llama", ("tied",)))
    refused(InputError, "no adapter is given")
    refused(AdapterError, "is not an adapter folder", tmp_path / "others")
    refused(InputError, "holds the input", folder)
    refused(InputError, "holds the input", one, output=one.parent, force=True)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    refused(InputError, "exists; choose another output", one, output=tmp_path / "taken")
    refused(AdapterError, "pass the base it was made from", one, model=str(base_folder("qwen3")))
    with pytest.raises(BundleError, match="has no adapter 'nobody'"):
        remove_adapter(folder, ["nobody"], **QUIET)
    damaged = folder / "model.onnx.data"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    with pytest.raises(BundleError, match="does not match its sha256"):
        add_adapter(folder, [one], **QUIET)


def test_force_replaces_one_of_the_name(bundle, new, base_folder) -> None:
    folder, (tied,) = bundle(), new("tied")
    names = open_bundle(folder).adapter_names
    was = open_bundle(folder).manifest.files["adapters/tied.onnx_adapter"]
    add_adapter(folder, [tied], force=True, **QUIET)
    opened = open_bundle(folder)
    assert opened.adapter_names == names and opened.manifest.not_held == ("tied",) and "golden/tied.npz" not in opened.manifest.files
    assert opened.manifest.files["adapters/tied.onnx_adapter"] != was
    add_adapter(folder, [tied], model=str(base_folder("llama")), force=True, **QUIET)
    assert open_bundle(folder).manifest.not_held == () and check_parity(folder, **QUIET).passed


def test_on_the_command_line(bundle, new, base_folder) -> None:
    folder, (one,) = bundle(), new("one")
    before = _bytes(folder)

    def run(*arguments: object) -> dict:
        done = CliRunner().invoke(app, ["add", str(folder), *map(str, arguments), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    planned = run("-a", one, "-m", base_folder("llama"), "--dry-run")
    assert planned["steps"][1] == "write one" and planned["memory"] > 1e8 and _bytes(folder) == before
    assert run("--remove", "tied", "--dry-run")["disk"] > 0 and _bytes(folder) == before
    told = run("-a", one)
    assert told["adapters"][-1] == "one" and told["parity"] is None and "not held" in told["note"]
    assert run("--remove", "one")["adapters"] == list(open_bundle(folder).adapter_names) and _bytes(folder) == before
    mixed = CliRunner().invoke(app, ["add", str(folder), "-a", str(one), "--remove", "tied"])
    assert mixed.exit_code == 2 and "--adapter is for adapters that come" in " ".join(mixed.stderr.split())


def test_what_is_said_not_to_be_held_is_true(bundle) -> None:
    folder = bundle()
    for name, said in (("tied", "has golden arrays"), ("nobody", "is no adapter of it")):
        reseal(folder, not_held=[name])
        with pytest.raises(BundleError, match=f"'{name}' is listed as not held, and {said}"):
            open_bundle(folder)


def test_what_was_measured_of_an_adapter_goes_with_it(bundle, new) -> None:
    folder = bundle()
    reseal(folder, retention={"tied": 0.9, "untied": 0.8}, loss={"tied": 0.1})
    remove_adapter(folder, ["tied"], **QUIET)
    manifest = open_bundle(folder).manifest
    assert (manifest.retention, manifest.loss) == ({"untied": 0.8}, {})
