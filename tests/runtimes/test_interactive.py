"""``run --interactive``: a conversation typed into a terminal, and one out of a pipe."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_bundle import ADAPTERS, change_manifest, write_toy_bundle
from typer.testing import CliRunner, Result

from reft_export.cli.main import app
from runtimes.conversation import Conversation
from runtimes.generation import GenerationSettings
from runtimes.open import open_artifact, open_session
from runtimes.text.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"
NAME = next(iter(ADAPTERS))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interactive") / "bundle"
    made = write_toy_bundle(folder, in_place=True, adapters=ADAPTERS)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    change_manifest(made)
    return folder


def piped(bundle: Path, text: str | bytes, *options: str, tokens: int = 4) -> Result:
    command = ["run", str(bundle), "--interactive", "-n", str(tokens), *options]
    return CliRunner().invoke(app, command, input=text, catch_exceptions=False)


def said(bundle: Path, *turns: tuple[str, str | None]) -> list[str]:
    """The answers to (text, adapter), by a conversation in this process."""
    artifact = open_artifact(bundle)
    tokenizer = Tokenizer.load(artifact.folder, artifact.manifest.model)
    settings = GenerationSettings(max_new_tokens=4)
    with open_session(artifact) as session, Conversation(session, tokenizer, settings=settings) as conversation:
        return [conversation.say(text, adapter=adapter).text for text, adapter in turns]


def test_a_pipe_line_by_line(bundle: Path) -> None:
    done = piped(bundle, f"c d\n\n/adapter {NAME}\ne\n/adapter none\n/reset\na b\n", "-p", "a b")
    answers = said(bundle, ("a b", None), ("c d", None), ("e", NAME))
    assert done.exit_code == 0, done.stderr
    assert done.stdout == "".join(f"{text}\n" for text in (*answers, answers[0]))
    whole = piped(bundle, "a b\n/exit\nnot said\n", "--no-stream", "-a", NAME)
    assert whole.stdout == said(bundle, ("a b", NAME))[0] + "\n"
    base = piped(bundle, "/strength 0\na b\n", "-a", NAME)
    assert base.stdout == answers[0] + "\n"


def test_a_schema_holds_every_turn(bundle: Path, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(
        json.dumps({"type": "object", "properties": {"a": {"enum": ["b", "c"]}}, "required": ["a"], "additionalProperties": False})
    )
    done = piped(bundle, "a b\n/reset\nc d\n", "--json-schema", str(schema), tokens=48)
    assert done.exit_code == 0, done.stderr
    first, end = json.JSONDecoder().raw_decode(done.stdout)
    assert first["a"] in ("b", "c") and json.loads(done.stdout[end:])["a"] in ("b", "c")
    schema.write_text("[")
    refused = piped(bundle, "a b\n", "--json-schema", str(schema))
    assert refused.exit_code == 2 and str(schema) in refused.stderr


@pytest.mark.parametrize(
    ("text", "options", "match"),
    [
        ("/adapter nope\n", (), "has no adapter 'nope'"),
        ("/strength much\n", (), "/strength much: expected a number"),
        ("/strength nan\n", (), "expected a finite number"),
        ("/what\n", (), "'/what' is no command; /adapter NAME"),
        ("a b c d e f g " * 20 + "\n", (), "do not fit"),
        ("a\n", ("--json",), "--json is for answers to prompts"),
        ("a\n", ("--prompts", "-"), "--prompts is answers that are known beforehand"),
        ("a\n", ("--chat", "never"), "needs a chat template, which"),
        (b"\xff\xfe\n", (), "stdin is no UTF-8 text"),
    ],
)
def test_refusals_out_of_a_pipe(text: str | bytes, options: tuple[str, ...], match: str, bundle: Path) -> None:
    done = piped(bundle, text, *options)
    assert done.exit_code == 2, done.stderr
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and match in done.stderr


class Terminal:
    """The command in a terminal of its own."""

    def __init__(self, *command: str) -> None:
        ours, theirs = pty.openpty()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
        os.close(theirs)
        self.fd, self.shown = ours, ""

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, text: str, times: int = 1, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while self.shown.count(text) < times:
            assert time.monotonic() < end, self.shown
            try:
                self.shown += os.read(self.fd, 4096).decode()
            except OSError:  # the terminal was left
                assert self.shown.count(text) >= times, self.shown

    def until_it_waits(self, seconds: float = 30) -> None:
        """Python's readline shows the prompt, then waits, and a signal in between is not looked at before the next key."""
        end = time.monotonic() + seconds
        while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end, self.shown
            time.sleep(0.01)


@pytest.fixture
def terminal(bundle: Path) -> Iterator[Terminal]:
    opened = Terminal(sys.executable, "-m", "reft_export.cli.main", "run", str(bundle), "-i", "-n", "4")
    yield opened
    opened.process.kill()
    opened.process.wait()
    os.close(opened.fd)


def test_a_terminal(terminal: Terminal, bundle: Path) -> None:
    """What cannot be done is said, and the conversation goes on; Ctrl-C outside an answer and Ctrl-D end it."""
    answers = said(bundle, ("a b", None), ("c d", None))
    terminal.until("> ")
    terminal.type("a b\n")
    terminal.until(answers[0].strip())
    terminal.until("> ", 2)
    terminal.type("/adapter nope\n")
    terminal.until("has no adapter 'nope'")
    terminal.until("> ", 3)
    terminal.type("c d\n")
    terminal.until(answers[1].strip())
    terminal.until("> ", 4)
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


def test_ctrl_c_at_the_prompt_ends_it(terminal: Terminal) -> None:
    terminal.until("> ")
    terminal.until_it_waits()
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.process.wait(30) == 130
