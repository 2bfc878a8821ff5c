"""``reft-export serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import Kernel, Threads, check_session_options
from reft_export.console import err, escape
from runtimes.errors import InputError


def register(app: typer.Typer) -> None:
    app.command("serve")(guarded(serve))


def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle folder.")],
    adapters: Annotated[
        Path | None, typer.Option("--adapters", help="A folder of adapters' folders, beside the bundle's own; uploads go there.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="The address to listen at; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key",
            envvar="REFT_API_KEY",
            help="Clients send one as a bearer token; repeat for several. Default: open.",
            show_default=False,
        ),
    ] = None,
    admin_token: Annotated[
        str | None,
        typer.Option(
            "--admin-token",
            envvar="REFT_ADMIN_TOKEN",
            help="Uploads and deletes adapters. Default: nobody does.",
            show_default=False,
        ),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Answers that run at once; more wait.")] = 16,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Answers that wait; more are refused (429).")] = 256,
    concurrency: Annotated[int, typer.Option("--concurrency", min=1, help="Requests that run or wait; more are refused (429).")] = 256,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="New tokens of an answer; what a chat without max_tokens gets, too.")
    ] = 1024,
    max_prompt_tokens: Annotated[
        int | None, typer.Option("--max-prompt-tokens", min=1, help="Tokens of a prompt; default: what the context leaves.")
    ] = None,
    max_choices: Annotated[int, typer.Option("--max-choices", min=1, help="Answers of one request: prompts times n.")] = 8,
    max_body_kb: Annotated[int, typer.Option("--max-body-kb", min=1, help="kB (1024 bytes) of a request.")] = 1024,
    max_upload_mb: Annotated[int, typer.Option("--max-upload-mb", min=1, help="MB (10^6 bytes) of an adapter's files.")] = 64,
    request_seconds: Annotated[float, typer.Option("--request-seconds", help="A request's time, waiting included.")] = 300.0,
    grace_seconds: Annotated[float, typer.Option("--grace-seconds", help="What running requests have left after SIGTERM.")] = 30.0,
    cache_mb: Annotated[
        float | None, typer.Option("--cache-mb", min=0.001, help="MB (10^6 bytes) of KV cache; default: half of the memory that is left.")
    ] = None,
    prefix_mb: Annotated[
        float | None,
        typer.Option("--prefix-mb", min=0, help="MB (10^6 bytes) of answered prompts that are kept; default: up to 512. 0: none."),
    ] = None,
    bank_mb: Annotated[
        float | None, typer.Option("--bank-mb", min=0.001, help="MB (10^6 bytes) of adapters in memory; default: no bound.")
    ] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option("--prefill-chunk", min=0, help="Prompt tokens per step; default: 128. 0: all at once.")
    ] = None,
    speculate: Annotated[
        int, typer.Option("--speculate", min=0, help="Tokens at most that an answer which runs alone is fed ahead, by prompt lookup.")
    ] = 0,
    schemas: Annotated[
        bool,
        typer.Option("--schemas/--no-schemas", help="Whether answers may be held to JSON schemas; the start reads the tokenizer for it."),
    ] = True,
    replicas: Annotated[
        str | None,
        typer.Option(
            "--replicas",
            metavar="N|MIN-MAX",
            help="Processes that answer, on Ray Serve; MIN-MAX: as many as there is to do. Default: this one.",
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", help="HOST:PORT of a Ray cluster for the replicas; default: this machine alone.", show_default=False),
    ] = None,
    kernel: Kernel = None,
    threads: Threads = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash large files again, too.")] = False,
) -> None:
    """Serve a bundle over HTTP by OpenAI's API: the base and every adapter, any mixture of them in one batch."""
    from runtimes.serving.process import serve as serve_bundle
    from runtimes.serving.settings import BatchSettings, ServeSettings

    check_session_options(None, kernel)
    settings = ServeSettings(
        adapters=adapters,
        api_keys=tuple(api_key or ()),
        admin_token=admin_token,
        max_body=max_body_kb << 10,
        max_upload=max_upload_mb * 10**6,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_tokens,
        max_choices=max_choices,
        concurrency=concurrency,
        request_seconds=request_seconds,
        schemas=schemas,
        grace_seconds=grace_seconds,
    )
    if not settings.api_keys and host not in ("127.0.0.1", "localhost", "::1"):
        err.print(f"[yellow]note:[/] {escape(host)} is open to whoever reaches it; --api-key asks for a key")
    batch = BatchSettings(
        rows=rows,
        queue=queue,
        cache_bytes=None if cache_mb is None else int(cache_mb * 1e6),
        prefix_bytes=None if prefix_mb is None else int(prefix_mb * 1e6),
        bank_bytes=None if bank_mb is None else int(bank_mb * 1e6),
        prefill_chunk=prefill_chunk,
        speculate=speculate,
        threads=threads,
        kernel=kernel,
        verify=verify,
    )

    def on_start(address: str) -> None:
        err.print(f"serving {escape(str(bundle))} at {address}/v1")

    if replicas is None:
        if ray_address is not None:
            raise InputError("--ray-address is for replicas; pass --replicas, too")
        serve_bundle(bundle, settings, batch, host=host, port=port, on_start=on_start)
        return
    least, most = _counts(replicas)
    from runtimes.serving.cluster import ClusterSettings, serve_cluster

    cluster = ClusterSettings(least=least, most=most, address=ray_address)
    serve_cluster(bundle, settings, batch, cluster, host=host, port=port, on_start=on_start)


def _counts(replicas: str) -> tuple[int, int]:
    """Of N, or MIN-MAX. Raises InputError before Ray is imported, which takes seconds."""
    least, _, most = replicas.partition("-")
    most = most or least
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise InputError(f"--replicas is {replicas!r}, expected a number of at least 1, or two as in 1-4")
    return int(least), int(most)
