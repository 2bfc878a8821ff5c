"""README and the pages: they are short, their links lead somewhere, and what they say of the command line is there."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import typer

from reft_export.cli.main import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])(?:--[a-z][a-z0-9-]*|-[a-zA-Z])(?![\w-])")
OF_PYTEST = {"--require-gpu", "--op-kernels"}
OF_OTHERS = {"--check"}
"""ruff's."""

VERBS = {
    verb: {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    for verb, command in typer.main.get_command(app).commands.items()
}
"""Each verb's options, the negative ones and ``--help`` too."""
EVERY_OPTION = set.union(*VERBS.values()) | {"--help", "-h", "--version"} | OF_PYTEST | OF_OTHERS


def code_of(text: str) -> list[str]:
    """Every piece of code of a page: lines that are indented or fenced, and what stands between backticks."""
    pieces, prose, fenced = [], [], False
    for line in text.split("\n"):
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
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


@pytest.mark.parametrize("contents", ["README.md", "docs/index.md"])
def test_every_page_stands_in_the_tables_of_pages(contents: str) -> None:
    table = ROOT / contents
    linked = {(table.parent / target.partition("#")[0]).resolve() for target in LINK.findall(table.read_text(encoding="utf-8"))}
    assert {page for page in PAGES if page.parent == ROOT / "docs"} - {table} <= linked


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
    assert unknown_words('    reft-export run bundle -p "say --no-such" -z') == ['run -z in `reft-export run bundle -p "say --no-such" -z`']
    assert anchors_of("# What is `refused`, and why\n\n## Twice\n## Twice\n") == {"what-is-refused-and-why", "twice", "twice-1"}
    (tmp_path / "other.md").write_text("# Here\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#here) [b](other.md#there) ![c](no.png) [d](#nowhere) [e](../..) `[f](code.md)` [g](https://x.org)", "utf-8"
    )
    assert broken_links(page, tmp_path) == ["other.md#there", "no.png", "#nowhere", "../.."]
