"""``reft-export compose``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.hub_adapters import here
from reft_export.cli.options import AcceptBase, AsJson, Force, Output
from reft_export.console import escape, out, print_json, print_table

if TYPE_CHECKING:
    from reft_export.composing.compose import Composition, Meeting


def register(app: typer.Typer) -> None:
    app.command("compose")(guarded(compose))


def compose(
    adapters: Annotated[
        list[Path],
        typer.Argument(help="Two adapter folders or more, in the order in which they act. Names are the folders', or given: NAME=FOLDER."),
    ],
    output: Output,
    strength: Annotated[
        list[str] | None,
        typer.Option("--strength", help="NAME=0.5: how much of what that adapter adds is added; 1 by default. Repeat for several."),
    ] = None,
    accept_base: AcceptBase = False,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report the overlap alone; write nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several of one base, and say how much they overlap: what each writes to and reads from at every site."""
    from reft_export.base.adapters import folders_of, load_adapters
    from reft_export.composing import compose as composing
    from runtimes.artifacts.adapter_record import check_adapter_name
    from runtimes.files.folders import check_destination

    strengths = _strengths(strength or [])
    check_adapter_name(output.resolve().name)
    adapters = here(adapters)
    if dry_run:
        check_destination(output, force=force, inputs=folders_of(adapters))
        made = composing.compose(load_adapters(adapters), strengths, accept_base=accept_base)
    else:
        made = composing.compose_adapters(adapters, output, strengths=strengths, accept_base=accept_base, force=force)
    if as_json:
        print_json(_record(None if dry_run else output, made))
        return
    if made.meetings:
        print_table("", ("site", "rank", "adapters", "overlap", "angle", "reads", "angle", "interaction"), _rows(made))
    else:
        out.print("the adapters have no site in common")
    for note in made.notes:
        out.print(f"[yellow]note:[/] {escape(note)}")
    if not dry_run:
        out.print(_said(output, made), markup=False)


def _strengths(given: list[str]) -> dict[str, float]:
    """NAME=NUMBER, each name once; raises InputError."""
    from runtimes.errors import InputError

    strengths: dict[str, float] = {}
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or math.isnan(value):
            raise InputError(f"--strength {text!r} is not understood; write NAME=0.5")
        if name in strengths:
            raise InputError(f"--strength is given twice for {name}; give it once")
        strengths[name] = value
    return strengths


def _record(output: Path | None, made: Composition) -> dict[str, Any]:
    from runtimes.edits.form import described
    from runtimes.files.records import to_json

    a = made.adapter
    return {
        "adapter": None if output is None else str(output),
        "form": described(a.site_forms),
        "positions": str(a.positions),
        "tied": a.tied,
        "base": a.base.name,
        "probes": len(a.probes),
        "strengths": dict(made.strengths),
        "sites": [{"site": str(site), "method": a.form(site).method, "rank": rank} for site, rank in made.ranks.items()],
        "meetings": [
            {
                "site": str(each.site),
                "group": each.group,
                "first": each.first,
                "second": each.second,
                "overlap": None if each.overlap is None else to_json(each.overlap),
            }
            for each in made.meetings
        ],
        "notes": list(made.notes),
    }


def _rows(made: Composition) -> list[tuple[str, ...]]:
    """One a meeting; angles are the least, in degrees."""
    return [_row(each, made) for each in made.meetings]


def _row(each: Meeting, made: Composition) -> tuple[str, ...]:
    where = f"{each.site}{f' {each.group}' if each.group else ''}"
    names = f"{each.first}, {each.second}"
    if (found := each.overlap) is None:
        return where, "full", names, "all", "", "all", "", ""
    angles = [f"{angle[0]:.1f}" if angle else "" for angle in (found.write_angles, found.read_angles)]
    overlaps = [f"{value:.4f}" for value in (found.write_overlap, found.read_overlap)]
    return where, str(made.ranks[each.site]), names, overlaps[0], angles[0], overlaps[1], angles[1], f"{found.interaction:.2g}"


def _said(output: Path, made: Composition) -> str:
    from runtimes.edits.form import described

    a = made.adapter
    form = f"{described(a.site_forms)}, {'tied' if a.tied else 'untied'}"
    return f"{output}: {a.training['composed']}; {form}, positions {a.positions}, {len(a.sites)} sites"
