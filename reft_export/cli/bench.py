"""``reft-export bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import AsJson, Kernel, Provider, Threads, check_session_options, refuse_given
from reft_export.console import out, print_json, print_table, progress, size

if TYPE_CHECKING:
    from runtimes.artifacts.bundle import Bundle
    from runtimes.bench import BenchResult, ClassifierBench

WHOLE_MODEL = ("prompt_tokens", "new_tokens", "repeats", "provider", "kernel", "threads")
"""Parameters that mean nothing for the op alone."""


def register(app: typer.Typer) -> None:
    app.command("bench")(guarded(bench))


def bench(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="A bundle or engine folder.")],
    adapter: Annotated[list[str] | None, typer.Option("--adapter", "-a", help="Only these adapters; default: all.")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", help="Tokens of the prompt; default: 128, or as many as fit.")
    ] = None,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Decode steps.")] = 32,
    repeats: Annotated[
        int | None, typer.Option("--repeats", help="Pairs of base and steered runs, in turn; default: 7. Rounds of concurrent requests: 3.")
    ] = None,
    adapters: Annotated[
        int | None,
        typer.Option(
            "--adapters", min=1, help="So many different adapters in one batch, beside one and none; copies where the bundle has fewer."
        ),
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, help="Requests that run at once, in onnxruntime; default with --adapters: 16.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="With --concurrency: the figures as a PNG or SVG file.")] = None,
    provider: Provider = None,
    kernel: Kernel = None,
    threads: Threads = None,
    op: Annotated[
        bool, typer.Option("--op", help="The edit op alone, at this bundle's width and rank, on one CPU thread; not of an engine.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure time to first token, tokens per second and peak memory, and what steering costs over the base.

    Of a classifier: the time of one forward pass over --prompt-tokens tokens.
    """
    from contextlib import ExitStack

    from runtimes.artifacts.bundle import Bundle
    from runtimes.bench import BenchSettings
    from runtimes.errors import InputError
    from runtimes.open import open_artifact, open_session
    from runtimes.tasks.task import task_of

    check_session_options(provider, kernel)
    opened = open_artifact(bundle)
    for name in adapter or ():
        opened.adapter(name)
    if op:
        if not isinstance(opened, Bundle):
            raise InputError(f"--op measures the op in onnxruntime; {bundle} is an engine: pass the bundle that it was built from")
        refuse_given(context, WHOLE_MODEL, "a whole model's, and --op measures the op alone")
        if adapter and len(adapter) > 1:
            raise InputError(f"--op measures at one adapter's width and rank, and {len(adapter)} are given; give one -a")
        _bench_op(opened, adapter, as_json)
        return
    if concurrency or adapters:
        refuse_given(context, ("adapter",), "to choose adapters, and --adapters is how many are mixed")
        if not isinstance(opened, Bundle):
            raise InputError(f"--concurrency is for onnxruntime; {bundle} is an engine: pass the bundle that it was built from")
        asked = {"adapters": adapters, "concurrency": concurrency, "prompt_tokens": prompt_tokens, "repeats": repeats}
        given = {name: value for name, value in asked.items() if value is not None}
        _bench_batch(opened, {"new_tokens": new_tokens, **given}, provider, kernel, threads, plot, as_json)
        return
    if plot:
        raise InputError("--plot draws concurrent requests; give --concurrency, too")
    task = task_of(opened)
    refuse_given(context, task.not_in_bench, f"for text generation, and {bundle} is a classifier")
    with progress() as report, ExitStack() as sessions:
        report("measuring")
        result = task.bench(
            opened,
            lambda: sessions.enter_context(open_session(opened, provider=provider, kernel=kernel, threads=threads)),
            BenchSettings(prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=7 if repeats is None else repeats, adapters=adapter),
            lambda done, total: report.update(f"measuring {done}/{total}", done, total),
        )
    _show(result, as_json)


def _bench_batch(
    bundle: Bundle,
    asked: dict[str, int],
    provider: str | None,
    kernel: str | None,
    threads: int | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    from reft_export.bench_plot import draw, drawable
    from runtimes.batch_bench import BatchBenchSettings, bench_batch
    from runtimes.errors import InputError
    from runtimes.open import open_session
    from runtimes.ort.session import OrtSession
    from runtimes.text.tokenizer import Tokenizer

    if plot:
        drawable(plot)
    settings = BatchBenchSettings(**asked)
    tokenizer = Tokenizer.load(bundle.folder, bundle.manifest.model)
    with progress() as report, open_session(bundle, provider=provider, kernel=kernel, threads=threads) as session:
        if not isinstance(session, OrtSession):
            raise InputError(f"{bundle.folder} is a classifier: its texts are batched by `reft-export run --batch-size`")
        report("measuring")
        result = bench_batch(
            session, tokenizer, settings, on_run=lambda done, total: report.update(f"measuring {done}/{total}", done, total)
        )
    if plot:
        draw(result, plot)
    if as_json:
        typer.echo(result.to_json())
        return
    print_table(result.title, result.HEADER, result.rows())
    out.print(f"{size(result.bank.banks)} of adapters in memory, {result.bank.factor:.2f} times what they are by themselves")


def _show(result: BenchResult | ClassifierBench, as_json: bool) -> None:
    if as_json:
        typer.echo(result.to_json())
        return
    print_table(result.title, result.HEADER, result.rows())
    memory = "unknown" if result.peak_memory is None else size(result.peak_memory)
    out.print(f"loaded in {result.load_seconds:.2f} s, peak memory of the process {memory}")


def _bench_op(bundle: Bundle, adapters: list[str] | None, as_json: bool) -> None:
    from dataclasses import asdict

    from reft_export.op_bench import KERNEL_HEADER, NODE_HEADER, kernel_rows, kernel_times, node_rows, node_times
    from runtimes.errors import InputError
    from runtimes.native_library import find_op_library

    names = adapters or bundle.adapter_names
    if not names:
        raise InputError(f"{bundle.folder} has no adapter whose width and rank could be measured")
    banks = bundle.adapter_tensors(names[0])
    # The nodes that the adapter does not use carry one row of zeros: the largest rank is that of those it uses.
    low_rank = [a.shape for name, a in banks.items() if name.endswith(".U")]
    if not low_rank:
        raise InputError(f"--op measures the low-rank op (LoReFT), and {bundle.folder} has no node of it; pass a bundle that has one")
    slots, rank, width = max(low_rank, key=lambda shape: shape[1])
    with progress() as report:
        report("measuring the op")
        nodes = node_times(width, rank, slots)
        kernels = kernel_times(width, rank) if find_op_library() else []
    if as_json:
        measured = {"nodes": [asdict(t) for t in nodes], "kernels": [asdict(t) for t in kernels]}
        print_json({"width": width, "rank": rank, "slots": slots, **measured})
        return
    print_table(f"one node, float32, D {width}, r {rank}, N {slots}", NODE_HEADER, node_rows(nodes))
    if kernels:
        print_table("256 of 256 rows edited, over one in-place pass", KERNEL_HEADER, kernel_rows(kernels))
