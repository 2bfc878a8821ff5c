"""Where the base of a verb that runs it in eager PyTorch lies: its options, and how it gets there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from reft_export.base.load import Base
    from reft_export.console import Progress
    from reft_export.training.settings import TrainSettings
    from runtimes.artifacts.bundle import Bundle

Dtype = Annotated[str, typer.Option("--dtype", help="The base's: auto (bfloat16 on a GPU), float32, bfloat16, float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda.")]


def load_placed(
    model: str, bundle: Bundle | None, settings: TrainSettings, report: Progress, *, weights: bool, accept_base: bool
) -> tuple[Base, str | None]:
    """(the base, on the bundle's weights where there is one; the bundle's digest). Without ``weights`` only everything that they are not
    needed for; with ``accept_base`` a base of equal weights will do."""
    from reft_export.base.load import load_base, load_without_weights
    from reft_export.base.origin import described

    report(f"loading {described(model)}")
    dtype, device = settings.placement()
    if bundle is None:
        return (load_base if weights else load_without_weights)(model, dtype=dtype, device=device, require_tokenizer=True), None
    from reft_export.parity.ladder import made_from
    from reft_export.quantizing.refit import load_on_bundle

    digest = bundle.digest
    return load_on_bundle(made_from(bundle, model) if accept_base else bundle, model, device=device, weights=weights), digest
