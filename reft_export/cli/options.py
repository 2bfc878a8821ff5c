"""Options that mean the same for every verb that takes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from runtimes.edits.edit import Site

Model = Annotated[str, typer.Option("--model", "-m", help="The base: a local folder, a .gguf file or a Hugging Face id.")]
Adapters = Annotated[
    list[Path] | None,
    typer.Option("--adapter", "-a", help="An adapter folder; repeat for several. An adapter's name is its folder's."),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output; the old one is kept until the new one is complete.")]
AcceptBase = Annotated[
    bool, typer.Option("--accept-base", help="Take a base that differs from the recorded one in its config.json alone, not in weights.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout; logs stay on stderr.")]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Make every check that needs no weights, print the plan and a memory and disk forecast; write nothing."),
]
Sites = Annotated[
    str, typer.Option("--sites", help="Further places for edits, for example 3;5.mlp_output: adapters trained later can use them.")
]
Provider = Annotated[
    str | None,
    typer.Option(
        "--provider",
        help="onnxruntime's for a bundle: cpu (default), cuda, or tensorrt for one without edits. An engine runs in the one it was "
        "built for.",
    ),
]
Kernel = Annotated[
    str | None,
    typer.Option(
        "--kernel",
        help="fused: the op library; function: the ONNX function in the graph. Default: fused where it is. An engine has the one it was "
        "built with: plugin or expanded.",
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Threads of onnxruntime; default: its own choice.")]
MinRetention = Annotated[
    float,
    typer.Option("--min-retention", help="The least share of its training that quantization may leave an adapter, measured on its probes."),
]
AcceptLoss = Annotated[
    bool, typer.Option("--accept-loss", help="Write the bundle though an adapter lost more; its manifest says what. It must be exact.")
]
BlockSize = Annotated[int, typer.Option("--block-size", help="Weights that share a scale, along the input dimension.")]
AccuracyLevel = Annotated[int, typer.Option("--accuracy-level", help="4: int8 products, fast; 1: float32 products, exact.")]


def parse_sites(text: str) -> tuple[Site, ...]:
    """``3;5.mlp_output`` as sites; raises InputError."""
    from runtimes.edits.edit import Site
    from runtimes.errors import AdapterError, InputError

    try:
        return tuple(Site.parse(part.strip()) for part in text.split(";") if part.strip())
    except AdapterError as e:
        raise InputError(f"--sites {text!r}: {e}") from None


def check_choice(name: str, value: str | None, known: tuple[str, ...]) -> None:
    from runtimes.errors import InputError

    if value is not None and value not in known:
        raise InputError(f"{name} {value!r} is unknown; known: {', '.join(known)}")


def check_session_options(provider: str | None, kernel: str | None) -> None:
    check_choice("--provider", provider, ("cpu", "cuda", "tensorrt", "tensorrt-rtx"))
    check_choice("--kernel", kernel, ("fused", "function", "plugin", "expanded"))


def given(context: typer.Context, name: str) -> bool:
    """Whether the user wrote the option, by its parameter's name; a default says nothing about what was meant."""
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def refuse_given(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Raises InputError for the first of the options, by parameter name, that the user wrote: "--x is <reason>"."""
    from runtimes.errors import InputError

    for name in names:
        if given(context, name):
            raise InputError(f"--{name.replace('_', '-')} is {reason}; leave it out")
