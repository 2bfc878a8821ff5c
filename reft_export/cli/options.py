"""Options that mean the same for every verb that takes them."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from runtimes.edits.edit import Site

Model = Annotated[str, typer.Option("--model", "-m", help="The base: a local folder, a .gguf file or a Hugging Face id.")]
Adapters = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter",
        "-a",
        help="An adapter folder, or its owner/name or owner/name@revision on a Hugging Face hub; repeat for several. An adapter's name is "
        "its folder's, or is given: NAME=FOLDER.",
    ),
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
BlockSize = Annotated[
    int | None,
    typer.Option("--block-size", help="Weights that share a scale, along the input dimension; default: 32 of int4, 64 of int8."),
]
AccuracyLevel = Annotated[
    int | None,
    typer.Option("--accuracy-level", help="Of weight-only: 4: int8 products, fast (default); 1: float32 products, exact."),
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="How weight-only blocks are chosen: imatrix (the default of int4 without zero points), rtn; weight-only also hqq, k_quant.",
        show_default=False,
    ),
]
Symmetric = Annotated[
    bool | None,
    typer.Option("--symmetric/--asymmetric", help="Whether weight-only blocks have no zero point; default: none, but for hqq and k_quant."),
]
AUTO = "auto"
"""Of --keep-high: chosen by measurement."""
EMBEDDINGS = {"float": 0, "int4": 4, "int8": 8}
Embeddings = Annotated[
    str | None,
    typer.Option(
        "--embeddings",
        help="float, int8 or int4 rows of the token embedding, and of a head that is tied to it; default: int8 where the weights are "
        "quantized for onnxruntime.",
    ),
]
CacheStore = Annotated[
    str,
    typer.Option(
        "--cache",
        help="How the KV cache is stored: float, or rounded to int8: a quarter of the memory, faster to decode in long contexts, slower "
        "to fill.",
    ),
]
KeepHigh = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-high",
        help="Layers or weights that stay in float: 0;31, 4-7, *.mlp.down_proj; repeat for several. auto: the weights of int4 that cost "
        "most become int8.",
    ),
]
BudgetMB = Annotated[
    float | None,
    typer.Option(
        "--budget-mb", min=0.001, help="--keep-high auto up to about so many MB (10^6 bytes) of the whole bundle; default: 15 % more"
    ),
]
MinRetention = Annotated[
    float,
    typer.Option(
        "--min-retention",
        help="The least share of its training that quantization may leave an adapter, measured on its probes; int4 aims at 0.9.",
    ),
]
AcceptLoss = Annotated[
    bool, typer.Option("--accept-loss", help="Write the bundle though an adapter lost more; its manifest says what. It must be exact.")
]


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


def embedding_bits(value: str | None) -> int | None:
    """Of --embeddings; raises InputError."""
    check_choice("--embeddings", value, tuple(EMBEDDINGS))
    return None if value is None else EMBEDDINGS[value]


def parse_patterns(values: list[str] | None) -> tuple[str, ...]:
    """``0;31`` and ``*.mlp.down_proj``, from however many --keep-high; without its ``auto``."""
    parts = (part.strip() for value in values or () for part in value.split(";"))
    return tuple(part for part in parts if part and part != AUTO)


def asks_auto(values: list[str] | None) -> bool:
    return any(part.strip() == AUTO for value in values or () for part in value.split(";"))


def check_session_options(provider: str | None, kernel: str | None) -> None:
    check_choice("--provider", provider, ("cpu", "cuda", "tensorrt", "tensorrt-rtx"))
    check_choice("--kernel", kernel, ("fused", "function", "plugin", "expanded"))


def text_or_file(value: str, option: str) -> str:
    """A file's content, else the text itself. Raises InputError for a single word that is no file: that is a file's name with a slip."""
    from runtimes.errors import InputError

    try:
        if Path(value).is_file():
            value, where = Path(value).read_text(encoding="utf-8"), f"{option} {value}"
        else:
            where = option
    except UnicodeDecodeError as e:
        raise InputError(f"{option} {value}: byte {e.start + 1} is not UTF-8; save the file as UTF-8") from None
    except OSError as e:
        if e.errno != errno.ENAMETOOLONG:  # of a text
            raise InputError(f"{option} {value} cannot be read: {e.strerror}") from None
        where = option
    if not value.strip():
        raise InputError(f"{where} is empty; give the text")
    if len(value.split()) == 1 and where == option:
        raise InputError(f"{option} {value} is not a file, and one word is no system prompt; name the file, or write the text")
    return value.strip()


def given(context: typer.Context, name: str) -> bool:
    """Whether the user wrote the option, by its parameter's name; a default says nothing about what was meant."""
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def refuse_given(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Raises InputError for the first of the options, by parameter name, that the user wrote: "--x is <reason>"."""
    from runtimes.errors import InputError

    for name in names:
        if given(context, name):
            raise InputError(f"{flag_of(context, name)} is {reason}; leave it out")


def flag_of(context: typer.Context, name: str) -> str:
    """As a user writes the option of a parameter's name."""
    return next(flag for each in context.command.params if each.name == name for flag in each.opts if flag.startswith("--"))
