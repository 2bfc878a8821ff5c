"""``reft-export bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_export.cli.console import err, guarded, out, print_table, size
from reft_export.cli.options import AsJson, Kernel, Provider, Threads, check_session_options


def register(app: typer.Typer) -> None:
    app.command("bench")(guarded(bench))


def bench(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    adapter: Annotated[list[str] | None, typer.Option("--adapter", "-a", help="Only these adapters; default: all.")] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Decode steps.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", help="Pairs of base and steered runs, in turn.")] = 7,
    provider: Provider = "cpu",
    kernel: Kernel = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure time to first token, tokens per second and peak memory, and what steering costs over the base."""
    from runtimes.bench import bench as measure
    from runtimes.bundle import open_bundle
    from runtimes.ort_session import OrtSession

    check_session_options(provider, kernel)
    opened = open_bundle(bundle)
    for name in adapter or ():
        opened.adapter(name)

    with err.status("measuring") as status:
        result = measure(
            lambda: OrtSession(opened, provider=provider, threads=threads, kernel=kernel),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            adapters=adapter,
            on_run=lambda done, total: status.update(f"measuring {done}/{total}"),
        )
    if as_json:
        typer.echo(result.to_json())
        return
    title = f"{result.model}, {result.provider}, {result.kernel}: {prompt_tokens} prompt and {new_tokens} new tokens, {repeats} pairs"
    print_table(title, result.HEADER, result.rows())
    memory = "unknown" if result.peak_memory is None else size(result.peak_memory)
    out.print(f"loaded in {result.load_seconds:.2f} s, peak memory of the process {memory}")
