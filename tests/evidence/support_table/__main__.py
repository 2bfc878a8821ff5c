"""``PYTHONPATH=tests python -m evidence.support_table``: runs the cells that are missing, and writes SUPPORT.md and support.json.

An interrupted run goes on where it stopped. A route whose exporter is not installed here is left as it is: run it in an environment
that has it, with ``--route``, into the same results or into others that ``--merge`` takes in.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from models.bases import FAMILIES
from models.classifiers import CLASSIFIERS
from models.classifiers import ROUTE as CLASSIFIER_ROUTE

from evidence.support_table.cells import DTYPES, Cell, run_family
from evidence.support_table.page import PAGE, RESULTS, ROUTES, page, read_results, write_results
from reft_export.exporting.installed import check_exporter
from runtimes.errors import BackendUnavailable, InputError, ReftError

app = typer.Typer(add_completion=False)
ALL = (*FAMILIES, *CLASSIFIERS)


@app.command()
def main(
    route: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(ROUTES)}; all that are installed here by default.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="A family of the list, classifiers among them; all by default.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(DTYPES)}; all by default.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also cells that were run before.")] = False,
    minutes: Annotated[float, typer.Option(help="Start no family after this time.")] = 1e9,
    merge: Annotated[list[Path] | None, typer.Option(help="Results of another environment, taken into these.")] = None,
    results: Annotated[Path, typer.Option(help="The results; the page lies beside them.")] = RESULTS,
) -> None:
    """Which families go through which exporter, and at what parity."""
    try:
        _check("route", route, tuple(ROUTES))
        _check("family", family, ALL)
        _check("dtype", dtype, DTYPES)
        _check_classifiers(route, family)
        for path in merge or ():
            write_results(read_results(results) | read_results(path), results)
        if merge:
            _write_page(results)
            return
        _run(route, family or list(ALL), dtype or list(DTYPES), again, time.monotonic() + 60 * minutes, results)
    except ReftError as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(e.exit_code) from None


def _run(routes: list[str] | None, families: list[str], dtypes: list[str], again: bool, deadline: float, path: Path) -> None:
    torch.set_num_threads(1)
    cells = read_results(path)
    work = []
    for route in routes or ROUTES:
        try:
            check_exporter(route)
        except BackendUnavailable as e:
            if routes:
                raise
            typer.echo(f"{route} is left as it is: {e}", err=True)
            continue
        for name in families:
            if name in CLASSIFIERS and route != CLASSIFIER_ROUTE:
                continue  # refused by what they are, as the page says
            wanted = [d for d in dtypes if again or (name, route, d) not in cells]
            if wanted:
                work.append((name, route, wanted))

    def keep(cell: Cell) -> None:
        cells[cell.key] = cell
        write_results(cells, path)
        figure = "" if cell.relative is None else f" {cell.relative:.1e}"
        typer.echo(f"  {cell.dtype:9}{cell.outcome}{figure} {cell.reason}".rstrip(), err=True)

    for number, (name, route, wanted) in enumerate(work, 1):
        if time.monotonic() > deadline:
            typer.echo(f"stopped after --minutes; {len(work) - number + 1} families are left, run it again", err=True)
            break
        typer.echo(f"[{number}/{len(work)}] {name}, {route}", err=True)
        run_family(name, route, wanted, keep)
    write_results(cells, path)
    _write_page(path)


def _write_page(path: Path) -> None:
    target = PAGE if path == RESULTS else path.with_suffix(".md")
    target.write_text(page(read_results(path)), encoding="utf-8")


def _check(what: str, given: list[str] | None, known: tuple[str, ...]) -> None:
    for name in given or ():
        if name not in known:
            raise InputError(f"--{what} {name!r} is unknown; known: {', '.join(known)}")


def _check_classifiers(routes: list[str] | None, families: list[str] | None) -> None:
    for name in families or ():
        if name in CLASSIFIERS and routes and CLASSIFIER_ROUTE not in routes:
            raise InputError(f"--family {name} is a classifier, which goes through --route {CLASSIFIER_ROUTE} only; leave the other out")


if __name__ == "__main__":
    app()
