"""README and the pages: they are short, their links lead somewhere, what they say of the command line is there, and what they show of its
output is what it prints."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import typer
from evidence.reference import PAGES as PAGES_OF_THE_SOURCES
from typer.testing import CliRunner

from reft_export import console
from reft_export.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = ("runtimes", "graph_passes", "calibration", "reft_export")
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])(?:--[a-z][a-z0-9-]*|-[a-zA-Z])(?![\w-])")
OF_PYTEST = {"--require-gpu", "--op-kernels"}
OF_OTHERS = {"--check", "--system-site-packages"}
"""ruff's and venv's."""

VERBS = {
    verb: {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    for verb, command in typer.main.get_command(app).commands.items()
}
"""Each verb's options, the negative ones and ``--help`` too."""
EVERY_OPTION = set.union(*VERBS.values()) | {"--help", "-h", "--version"} | OF_PYTEST | OF_OTHERS


def code_of(text: str) -> list[str]:
    """Every piece of code of a page: lines that are indented or fenced, but for output, and what stands between backticks."""
    pieces, prose, fenced, shell = [], [], False, False
    for line in text.split("\n"):
        shell = line.startswith("    $ ") or (shell and (line.startswith("    ") or not line))
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            if not shell or line.startswith("    $ "):
                pieces.append(line.strip())
        else:
            prose.append(line)
    return pieces + [" ".join(piece.split()) for piece in re.findall(r"`([^`]+)`", "\n".join(prose))]


def command_of(code: str) -> tuple[str, set[str]] | None:
    """The verb that the code runs and the options that it gives; None where it runs none of ours."""
    words = re.sub(r"\s#\s.*", "", code).replace("$ ", "").split()
    if words[:1] == ["reft-export"]:
        words = words[1:]
    elif not (words and words[0] in VERBS and len(words) > 1):
        return None
    verb = next((word for word in words if not word.startswith("-")), None)
    quoted = re.sub(r'"[^"]*"', "TEXT", " ".join(words))
    return None if verb is None else (verb, set(OPTION.findall(quoted)))


def transcripts(text: str) -> list[list[tuple[str, str]]]:
    """Every indented block that begins with a command after ``$``: its commands, each with the output that is shown of it."""
    found = []
    for block in re.findall(r"(?m)(?:^    \$ .*\n)(?:(?:    .*|)\n)*", f"{text}\n"):
        lines = "\n".join(line[4:] for line in block.rstrip().split("\n")).replace("\\\n", " ")
        parts = re.split(r"(?m)^\$ (.*)$", lines)[1:]
        found.append(list(zip(parts[::2], (part.strip("\n") for part in parts[1::2]), strict=True)))
    return found


def anchors_of(text: str) -> set[str]:
    """The anchors that a forge makes of the headings: lower case, without punctuation, with dashes for spaces."""
    seen: Counter[str] = Counter()
    anchors = set()
    for heading in re.findall(r"(?m)^#{1,6} +(.+?) *$", re.sub(r"(?ms)^```.*?^```", "", text)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.add(slug if not seen[slug] else f"{slug}-{seen[slug]}")
        seen[slug] += 1
    return anchors


def broken_links(page: Path, root: Path = ROOT) -> list[str]:
    broken = []
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", page.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "http://")):
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        if not (found.exists() and found.is_relative_to(root)) or (anchor and anchor not in anchors_of(found.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def unknown_words(text: str) -> list[str]:
    """What the page's code says of the command line that is not there: verbs, options of their verbs, options of no verb at all."""
    unknown = []
    for code in code_of(text):
        command = command_of(code)
        if command is None:
            ours = set(OPTION.findall(code)) if re.match(r"--[a-z]", code) else set()
            unknown += [f"{option} in `{code}`" for option in sorted(ours - EVERY_OPTION)]
            continue
        verb, options = command
        if verb not in VERBS:
            unknown.append(f"{verb} in `{code}`")
        else:
            unknown += [f"{verb} {option} in `{code}`" for option in sorted(options - VERBS[verb] - {"--help", "-h"})]
    return unknown


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_verb_and_option_is_there(page: Path) -> None:
    assert unknown_words(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("name", PAGES_OF_THE_SOURCES)
def test_a_page_that_is_written_from_the_sources_is_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == PAGES_OF_THE_SOURCES[name](), f"{name} is old; `make docs` writes it"


@pytest.mark.parametrize("contents", ["README.md", "docs/index.md"])
def test_every_page_stands_in_the_tables_of_pages(contents: str) -> None:
    table = ROOT / contents
    linked = {(table.parent / target.partition("#")[0]).resolve() for target in LINK.findall(table.read_text(encoding="utf-8"))}
    assert {page for page in PAGES if page.parent == ROOT / "docs"} - {table} <= linked


def unknown_names(text: str) -> list[str]:
    """Files, folders and names between backticks that no source has."""
    folders = (*ROOMS, "tests")
    paths = [path.relative_to(ROOT).as_posix() for name in folders for path in (ROOT / name).rglob("*") if "__pycache__" not in path.parts]
    paths += [*folders, "docs", ".ci"]
    sources = [path for path in paths if path.endswith((".py", ".h")) and path != "tests/test_documents.py"]
    known = {word for path in sources for word in re.findall(r"\w+", (ROOT / path).read_text(encoding="utf-8"))}
    unknown = []
    for piece in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"[\w./]*(?:/|\.(?:py|h))", piece):
            if not any(f"/{path}/".endswith(f"/{piece.strip('/')}/") for path in paths):
                unknown.append(piece)
        elif re.fullmatch(r"\w[\w.]*", piece):
            unknown += [piece] if piece.rpartition(".")[2] not in known | {*ROOMS} else []
    return unknown


@pytest.mark.parametrize("name", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_every_name_is_there(name: str) -> None:
    assert unknown_names((ROOT / name).read_text(encoding="utf-8")) == []


def test_a_name_that_is_not_there_is_found() -> None:
    text = "`runtimes/open.py` `find/` `no_such/` `open.py` `no_such.py` `runtimes.golden.check_golden` `nowhere_at_all` `--force` `a b`"
    assert unknown_names(text) == ["no_such/", "no_such.py", "nowhere_at_all"]


OF_THE_README = {"concepts.md", "devices.md", "not-proven.md", "quantize.md"}
"""Pages that go on with what README's program writes."""
NOT_RUN = {
    "index.md": "the quickstart has tests of its own",
    "benchmarks.md": "times",
    "SUPPORT.md": "test_support_table runs cells",
    "QUANTIZED_STEERING.md": "minutes",
    "experiments.md": "a real model, an hour",
    "quantization-quality.md": "real models, hours",
    "serve.md": "it serves until it is stopped; tests/serving starts it",
    "tensorrt-plugins.md": "the line names folders of the machine",
    "tensorrt.md": "needs TensorRT-RTX, where test_build builds",
}
SHOWN = [page for page in PAGES if page.parent == ROOT / "docs" and page.name not in NOT_RUN]


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT / "docs"], ids=lambda p: p.name)
def test_every_page_starts_with_a_command_and_its_output(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    opening = re.match(r"# .*\n\n(    \$ .*\n(?:(?:    .*|)\n)*)", text)
    assert opening, "the first thing below the title is a command after $"
    ((_, output), *_), *_ = transcripts(opening[1])
    assert output


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like a clone's root, to run what a page says in."""
    link_to_clone(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console.out._console, "width", 110)
    return tmp_path


def link_to_clone(folder: Path) -> None:
    for name in ("reft_export", "tests", "examples"):
        (folder / name).symlink_to(ROOT / name)


@pytest.fixture(scope="module")
def of_the_readme(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where README's program ran, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("readme"), StringIO()
    link_to_clone(folder)
    (program,) = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"))
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})
    return folder, printed.getvalue()


@pytest.mark.slow
def test_the_program_of_the_readme_steers(of_the_readme: tuple[Path, str]) -> None:
    assert re.search(r"(?i)\b(arr|ahoy|aye|matey)\b", of_the_readme[1].splitlines()[-1])


@pytest.mark.parametrize("page", [page for page in SHOWN if page.name not in OF_THE_README], ids=lambda p: p.name)
def test_what_a_page_shows_is_what_its_commands_print(page: Path, clone: Path) -> None:
    assert "\n".join(differences(page.read_text(encoding="utf-8"))) == ""


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in SHOWN if page.name in OF_THE_README], ids=lambda p: p.name)
def test_what_a_page_shows_of_the_readmes_bundle_is_what_its_commands_print(
    page: Path, clone: Path, of_the_readme: tuple[Path, str]
) -> None:
    for name in ("style", "bundle"):
        (clone / name).symlink_to(of_the_readme[0] / name)
    assert "\n".join(differences(page.read_text(encoding="utf-8"))) == ""


FIGURES = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?|\b(?:equal|differ)\b")
"""What differs between machines: figures with a decimal point, and whether greedy tokens of a quantized graph are eager PyTorch's."""


def differences(text: str) -> list[str]:
    """Where a command prints something else than its page shows, but for FIGURES; ``...`` is anything, and a space any white space."""
    wrong, code = [], 0
    for command, shown in (pair for block in transcripts(text) for pair in block):
        printed, code = (f"{code}", 0) if command == "echo $?" else output_of(shlex.split(command))
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if not doctest.OutputChecker().check_output(FIGURES.sub("N", shown), FIGURES.sub("N", printed), flags):
            wrong.append(f"$ {command}\n{printed}\ninstead of\n{shown}")
    return wrong


def output_of(words: list[str]) -> tuple[str, int]:
    """What a command prints on stdout, or on stderr where it fails; the stages that a long one logs are no output."""
    if words[0] == "reft-export":
        done = CliRunner().invoke(app, words[1:])
        return done.stdout if done.exit_code == 0 else done.stderr, done.exit_code
    assert words[0] == "python", f"{words[0]} is not run here; list the page in NOT_RUN"
    run = subprocess.run(
        [sys.executable, *words[1:]], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    return run.stdout if run.returncode == 0 else run.stderr, run.returncode


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    """The checks above on pages that are wrong, each in one way."""
    assert unknown_words("    reft-export export -m MODEL -a style --no-such -o bundle   # --neither") == [
        "export --no-such in `reft-export export -m MODEL -a style --no-such -o bundle   # --neither`"
    ]
    assert unknown_words("so `run --prompt TEXT` does, `run --rank 4` and\n`reft-export\nexplode x` do not, nor `--no-such`") == [
        "run --rank in `run --rank 4`",
        "explode in `reft-export explode x`",
        "--no-such in `--no-such`",
    ]
    assert unknown_words("    $ reft-export run bundle -p hi\n    reft-export explode --no-such\n\n    $ reft-export doctor --deep\n") == [
        "doctor --deep in `$ reft-export doctor --deep`"
    ]
    page = "Text\n\n    $ reft-export \\\n        --version\n    reft-export ...\n    $ echo $?\n    1\n"
    assert transcripts(page) == [[("reft-export      --version", "reft-export ..."), ("echo $?", "1")]]
    assert differences(page) == ["$ echo $?\n0\ninstead of\n1"]
    assert unknown_words('    reft-export run bundle -p "say --no-such" -z') == ['run -z in `reft-export run bundle -p "say --no-such" -z`']
    assert anchors_of("# What is `refused`, and why\n\n## Twice\n## Twice\n") == {"what-is-refused-and-why", "twice", "twice-1"}
    (tmp_path / "other.md").write_text("# Here\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#here) [b](other.md#there) ![c](no.png) [d](#nowhere) [e](../..) `[f](code.md)` [g](https://x.org)", "utf-8"
    )
    assert broken_links(page, tmp_path) == ["other.md#there", "no.png", "#nowhere", "../.."]
