"""``reft-export quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_export.cli.console import guarded, parity_failed, progress
from reft_export.cli.export import show_result
from reft_export.cli.options import AsJson, Force, Model, Output, check_choice

EMBEDDINGS = {"float": 0, "int4": 4, "int8": 8}
BITS = {"int4": 4, "int8": 8, "fp8": 8}


def register(app: typer.Typer) -> None:
    app.command("quantize")(guarded(quantize))


def quantize(
    bundle: Annotated[Path, typer.Argument(help="A float bundle.")],
    model: Model,
    output: Output,
    precision: Annotated[str | None, typer.Option("--precision", "-p", help="int4, int8 or fp8; default: the scheme's own.")] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            help="onnxruntime: weight-only (blockwise; default), dynamic (int8, a scale per token), static (int8, calibrated). "
            "TensorRT: qdq-int4 (weights), qdq-int8, fp8 (weights and calibrated activations).",
        ),
    ] = None,
    method: Annotated[str, typer.Option("--method", help="How weight-only blocks are chosen: rtn or hqq.")] = "rtn",
    block_size: Annotated[
        int | None, typer.Option("--block-size", help="Weights that share a scale, along the input dimension; default 32.")
    ] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric/--asymmetric", help="Whether weight-only blocks have no zero point.")] = True,
    accuracy_level: Annotated[
        int | None, typer.Option("--accuracy-level", help="Of weight-only: 4: int8 products, fast (default); 1: float32 products, exact.")
    ] = None,
    keep_high: Annotated[
        list[str] | None,
        typer.Option("--keep-high", help="Layers or weights that stay in float: 0;31, 4-7, *.mlp.down_proj; repeat for several."),
    ] = None,
    lm_head: Annotated[
        bool | None, typer.Option("--lm-head/--no-lm-head", help="Quantize the head; default: not where activations have fixed ranges.")
    ] = None,
    embeddings: Annotated[str, typer.Option("--embeddings", help="float, int8 or int4 rows of the token embedding.")] = "float",
    calibrate: Annotated[
        Path | None, typer.Option("--calibrate", help="Prompts (JSONL, as for train) on which activation ranges are measured, edits on.")
    ] = None,
    ranges: Annotated[
        Path | None, typer.Option("--ranges", help="In place of --calibrate: the OUTPUT.calibration of an earlier run of this bundle.")
    ] = None,
    mixture: Annotated[
        str, typer.Option("--mixture", help="How much base and adapters count: base=1,pirate=3; default: all alike.")
    ] = "",
    observer: Annotated[str, typer.Option("--observer", help="minmax, percentile, entropy or mse.")] = "minmax",
    percentile: Annotated[float, typer.Option("--percentile", help="Of --observer percentile.")] = 99.99,
    decode_tokens: Annotated[int, typer.Option("--decode-tokens", help="Greedy tokens after each calibration prompt.")] = 16,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a bundle's base, the edits staying in the graph's float type; parity is proven on what is quantized."""
    from calibration.observers import Observer
    from calibration.settings import settings_for
    from reft_export.calibrate import CalibrationRequest
    from reft_export.quantize import quantize_bundle
    from runtimes.errors import InputError, ParityError

    check_choice("--embeddings", embeddings, tuple(EMBEDDINGS))
    settings = settings_for(
        *scheme_and_bits(scheme, precision),
        method=method,
        block_size=block_size,
        symmetric=symmetric,
        accuracy_level=accuracy_level,
        keep_high=parse_patterns(keep_high or []),
        lm_head=lm_head,
        embeddings=EMBEDDINGS[embeddings],
    )
    request = None
    if calibrate is not None or ranges is not None:
        request = CalibrationRequest(
            data=calibrate,
            ranges=ranges,
            mixture=parse_mixture(mixture),
            observer=Observer(name=observer, percentile=percentile),
            decode_tokens=decode_tokens,
        )
    elif mixture:
        raise InputError("--mixture says what --calibrate runs; pass --calibrate or --ranges with it")
    try:
        with progress() as report:
            result = quantize_bundle(bundle, model, output, settings, calibration=request, force=force, report=report)
    except ParityError as e:
        parity_failed(e, as_json=as_json)
        raise
    show_result(output, result, as_json=as_json)


def scheme_and_bits(scheme: str | None, precision: str | None) -> tuple[str, int | None]:
    """What -p and --scheme ask for together; either may be left out. Raises InputError where they contradict each other."""
    from runtimes.errors import InputError

    check_choice("--precision", precision, tuple(BITS))
    if scheme is None:
        scheme = "fp8" if precision == "fp8" else "weight-only"
    if precision is not None and (precision == "fp8") != (scheme == "fp8"):
        raise InputError(f"-p {precision} and --scheme {scheme} contradict each other; leave one of them out")
    return scheme, None if precision is None else BITS[precision]


def parse_patterns(values: list[str]) -> tuple[str, ...]:
    """``0;31`` and ``*.mlp.down_proj``, from however many --keep-high."""
    return tuple(part.strip() for value in values for part in value.split(";") if part.strip())


def parse_mixture(text: str) -> dict[str, float]:
    """``base=1,pirate=3``; raises InputError."""
    from runtimes.errors import InputError

    mixture: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, equals, share = part.partition("=")
        try:
            if not equals or name in mixture:
                raise ValueError
            mixture[name] = float(share)
        except ValueError:
            raise InputError(f"--mixture {text!r}: {part!r} is not understood; write base=1,NAME=1, each name once") from None
    return mixture
