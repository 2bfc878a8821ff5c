"""``reft-export push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import AsJson
from reft_export.console import escape, out, print_json, progress, size


def register(app: typer.Typer) -> None:
    app.command("push")(guarded(push))


def push(
    folder: Annotated[Path, typer.Argument(help="An adapter's folder, or a bundle's.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the hub; it is made where it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it a repository that nobody else sees.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="A branch, made where it is not there; default: main.")] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The base's id on the hub, for the card; default: its name, where that is one.")
    ] = None,
    license: Annotated[str | None, typer.Option("--license", help="For the card, as the hub spells it: apache-2.0. Default: none.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter or a bundle that lies there, and its card.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the folder, and print the card and the files; ask no hub.")] = False,
    as_json: AsJson = False,
) -> None:
    """Push an adapter or a bundle, verified, to a Hugging Face hub, with a card. The token is HF_TOKEN, or that of `hf auth login`."""
    from reft_export.hub.push import outgoing, push_folder

    with progress() as report:
        report(f"reading {folder}")
        content = outgoing(folder, repository, base_model=base_model, license=license)
        pushed = None
        if not dry_run:
            pushed = push_folder(content, repository, private=private, revision=revision, force=force, report=report)
    if as_json:
        sent = {} if pushed is None else {"url": pushed.url, "commit": pushed.commit}
        print_json({"kind": content.kind, **sent, "files": sorted(content.files), "bytes": content.size, "card": content.card})
        return
    if pushed is None:
        out.print(content.card, markup=False, soft_wrap=True)
        out.print(f"would push {len(content.files)} files, {size(content.size)}: {', '.join(sorted(content.files))}", markup=False)
        return
    out.print(escape(f"{pushed.url}: {content.kind}, {len(content.files)} files, {size(content.size)}, commit {pushed.commit[:12]}"))
