"""An option of one value that is given twice is refused by every verb: nothing of what was said is dropped without a word."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from reft_export.cli.main import app

COMMAND = typer.main.get_command(app)
OPTIONS = [(verb, p) for verb, command in COMMAND.commands.items() for p in command.params if p.param_type_name == "option"]
SINGLE = [(verb, p) for verb, p in OPTIONS if not p.multiple]
SEVERAL = {
    ("train", "--data"), ("export", "--adapter"), ("add", "--adapter"), ("add", "--remove"), ("fold", "--adapter"),
    ("quantize", "--adapter"), ("quantize", "--keep-high"), ("export", "--keep-high"),
    ("build", "--sm"), ("run", "--prompt"), ("run", "--pair"), ("run", "--stop"), ("bench", "--adapter"),
    ("compose", "--strength"), ("sweep", "--data"), ("serve", "--api-key"), ("train", "--orthogonal-to"),
    ("train", "--edit"), ("evaluate", "--data"), ("evaluate", "--adapter"), ("evaluate", "--metric"),
}  # fmt: skip
"""Every option that takes several values, and uses them all."""


def refused(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and done.stdout == "", done.output
    assert done.stderr == f"error: {said}\n"


def test_which_options_take_several() -> None:
    assert {(verb, max(p.opts, key=len)) for verb, p in OPTIONS if p.multiple} == SEVERAL


@pytest.mark.parametrize(("verb", "option"), SINGLE, ids=lambda x: x if isinstance(x, str) else x.name)
def test_every_single_option_is_refused_twice(verb: str, option, capsys) -> None:
    """Long and short, with and without =, the same value or another; of a flag also with its opposite; before and behind arguments."""
    name, others = max(option.opts, key=len), [*option.opts, *option.secondary_opts]
    for other in others:
        if option.is_flag:
            pairs = [([name, "x", other], f"({name}, {other})"), ([other, name], f"({other}, {name})")]
        else:
            pairs = [([name, "1", "x", other, "-2"], "(1, -2)"), ([f"{name}=1", other, "1"], "(1, 1)")]
            pairs.append(([other, "-1", f"{name}="], "(-1, )"))
        for arguments, values in pairs:
            with pytest.raises(SystemExit) as left:
                COMMAND([verb, *arguments])
            stdout, stderr = capsys.readouterr()
            assert (left.value.code, stdout, stderr.count("\n")) == (2, "", 1), stderr
            assert stderr.startswith(f"error: {name} is given twice {values}; give it once")


def test_remedies() -> None:
    refused(
        ["train", "--layers", "1", "--layers=3", "--layers", "8-16"],
        "--layers is given 3 times (1, 3, 8-16); give it once; several layers go in one value: --layers '1;3;8-16'",
    )
    refused(
        ["quantize", "--mixture", "base=1", "--mixture", "a=2"],
        "--mixture is given twice (base=1, a=2); give it once; several shares go in one value: --mixture 'base=1,a=2'",
    )
    refused(
        ["run", "b", "-p", "x", "-a", "one", "-atwo"],
        "--adapter is given twice (one, two); give it once; one adapter answers; in a file of --prompts each line may name its own",
    )
    refused(["train", "--tied", "--untied"], "--tied is given twice (--tied, --untied); give it once")
    refused(["run", "--system", "s" * 50, "--system", "a\n[b]"], f"--system is given twice ({'s' * 40}.., a [b]); give it once")


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "b", "--system", "--stream", "--no-stream"],  # a value that looks like an option
        ["run", "b", "-p", "-n", "-p", "-n"],
        ["run", "b", "-n", "3", "--", "-n"],  # behind -- nothing is an option
    ],
)
def test_values_are_no_options(arguments: list[str]) -> None:
    assert "is given" not in CliRunner().invoke(app, arguments).output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "b", "--refit-lr", "1"], "--refit-lr is of a --refit, which is not asked for"),
        (["quantize", "b", "--checker-tokens", "9"], "--checker-tokens is of a --checker, which is not given"),
        (["quantize", "b", "--observer", "mse"], "--observer is of --calibrate or --ranges, and neither is given"),
        (["quantize", "b", "--decode-tokens", "1", "--ranges", "x"], "--decode-tokens is of --calibrate, which is not given"),
        (["quantize", "b", "--percentile", "99", "--calibrate", "x"], "--percentile is of --observer percentile, which is not asked for"),
        (["export", "--format", "pyreft", "-p", "int4"], "--precision is a graph's, and --format pyreft writes an adapter alone"),
        (["train", "-d", "x", "--epochs", "2", "--max-steps", "3"], "--epochs is what --max-steps is in place of"),
    ],
)
def test_an_option_that_nothing_asks_for_is_refused(arguments: list[str], said: str) -> None:
    refused([*arguments, "-m", "m", "-o", "o"], f"{said}; leave it out")


def test_help_is_given_whatever_stands_beside_it() -> None:
    for arguments in (["run", "-n", "1", "-n", "2", "--help"], ["train", "-h", "-h"]):
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0 and "Usage: " in done.stdout


def test_several_data_files_are_all_trained_on(base_folder, tmp_path) -> None:
    files = []
    for name in ("one", "two"):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps({"prompt": f"say {name} {i}", "completion": "yes"}) + "\n" for i in range(2)))
    common = ["-m", str(base_folder("llama")), "-o", str(tmp_path / "a"), "--max-steps", "1", "--layers", "1", "--samples", "0"]
    done = CliRunner().invoke(app, ["train", "-d", str(files[0]), "--data", str(files[1]), *common])
    assert done.exit_code == 0, done.output
    trained = json.loads((tmp_path / "a" / "adapter.json").read_text())["training"]["data"]
    assert [f["file"] for f in trained["files"]] == ["one.jsonl", "two.jsonl"] and trained["examples"] == 4
    files[1].write_text('{"prompt": "x"}\n')
    done = CliRunner().invoke(app, ["train", "-d", str(files[0]), "-d", str(files[1]), *common, "--force"])
    assert done.exit_code == 2 and "two.jsonl:1: lacks ['completion']" in done.stderr
    inside = ["-o", str(files[1]), "--force"]
    done = CliRunner().invoke(app, ["train", "-d", str(files[0]), "-d", str(files[1]), *common[:2], *inside])
    assert done.exit_code == 2 and files[1].is_file()
