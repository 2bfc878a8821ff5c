"""A command line that cannot be read is refused as everything else is: one line on stderr, exit code 2, nothing on stdout."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from reft_export.cli.main import VERBS, app


def refused(arguments: list[str], said: str, see: str) -> None:
    """The words are those of the typer that is installed, older ones' and newer ones' the same but for an argument's capitals."""
    done = CliRunner().invoke(app, arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    assert done.stderr.casefold().startswith(f"error: {said}".casefold()) and done.stderr.endswith(f"; see {see} --help\n"), done.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_refuses_an_unknown_option(verb: str) -> None:
    refused([verb, "--nonsense", "1"], "no such option: --nonsense", f"reft-export {verb}")


@pytest.mark.parametrize(
    ("words", "said", "see"),
    [
        ("export --modle x", "no such option: --modle (Possible options: --method, --model)", "reft-export export"),
        ("exprot", "no such command 'exprot' (did you mean 'export'?)", "reft-export"),
        ("--nonsense export", "no such option: --nonsense", "reft-export"),
        ("run", "missing argument 'bundle'", "reft-export run"),
        ("export -m x", "missing option '--output' / '-o'", "reft-export export"),
        ("run x -p", "option '-p' requires an argument", "reft-export run"),
        ("run x --json=5", "option '--json' does not take a value", "reft-export run"),
        ("inspect a b", "got unexpected extra argument", "reft-export inspect"),
    ],
)
def test_what_is_wrong_and_what_was_meant(words: str, said: str, see: str) -> None:
    refused(words.split(), said, see)


@pytest.mark.parametrize(("words", "option"), [("train -m m -d d -o o --epochs", "--epochs"), ("run x -p y --threads", "--threads")])
def test_a_value_of_the_wrong_kind_is_repeated(words: str, option: str) -> None:
    """How it is wrong is said in the words of the typer that is installed."""
    done = CliRunner().invoke(app, [*words.split(), "many" * 20])
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    assert done.stderr.startswith(f"error: invalid value for '{option}': ") and f"not '{'many' * 10}..'" in done.stderr
    assert done.stderr.endswith(f"; see reft-export {words.split()[0]} --help\n")
