"""``reft-export pull``."""

from __future__ import annotations

from typing import Annotated

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import AsJson, Force, Output
from reft_export.console import escape, out, print_json, progress


def register(app: typer.Typer) -> None:
    app.command("pull")(guarded(pull))


def pull(
    repository: Annotated[str, typer.Argument(help="owner/name on the hub.")],
    output: Output,
    revision: Annotated[str | None, typer.Option("--revision", help="A branch, a tag or a commit; default: main.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Pull an adapter or a bundle from a Hugging Face hub, held against its own digests before it is put in place."""
    from reft_export.hub.pull import pull_folder
    from runtimes.edits.adapter import Adapter
    from runtimes.edits.form import described

    with progress() as report:
        pulled = pull_folder(repository, output, revision=revision, force=force, report=report)
    content = pulled.content
    kind = "adapter" if isinstance(content, Adapter) else "bundle"
    if as_json:
        print_json({"output": str(output), "kind": kind, "commit": pulled.commit, "digest": content.digest, "files": pulled.files})
        return
    if isinstance(content, Adapter):
        what = f"{described(content.site_forms)}, positions {content.where}, for {content.base.name}"
    else:
        what = f"{content.manifest.model.name}, {content.manifest.precision}, adapters {', '.join(content.adapter_names) or 'none'}"
    out.print(escape(f"{output}: {kind}, {what}; commit {pulled.commit[:12]}, digest {content.digest[:12]}"))
