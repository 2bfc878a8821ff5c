"""The host's room: training, adapter import, export, quantization, parity and the CLI. Importing the package alone stays cheap.

    from pathlib import Path
    from reft_export import export_bundle, load_base, train
    from reft_export.exporting.settings import ExportSettings
    from reft_export.training.settings import TrainSettings

    train(load_base("base"), Path("pirate.jsonl"), TrainSettings(layers="8-16"), Path("pirate"))
    export_bundle("base", [Path("pirate")], Path("pirate-bundle"), ExportSettings(precision="int8"))

Each name is imported when it is first asked for. The bundle is run by the functions of ``runtimes``.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_export.adding.add import add_adapter, remove_adapter
    from reft_export.base.load import load_base
    from reft_export.building.build import build_engine
    from reft_export.composing.compose import compose_adapters
    from reft_export.contrasting.steer import steer_adapter
    from reft_export.eager.steering import steered
    from reft_export.exporting.export import export_bundle
    from reft_export.folding.fold import fold_bundle
    from reft_export.importing.importer import import_adapter
    from reft_export.parity.check import check_parity
    from reft_export.quantizing.quantize import quantize_bundle
    from reft_export.sweeping.sweep import sweep
    from reft_export.training.steered_model import get_steered_model
    from reft_export.training.trainer import train

__all__ = [
    "add_adapter",
    "build_engine",
    "check_parity",
    "compose_adapters",
    "export_bundle",
    "fold_bundle",
    "get_steered_model",
    "import_adapter",
    "load_base",
    "quantize_bundle",
    "remove_adapter",
    "steer_adapter",
    "steered",
    "sweep",
    "train",
]

_HOMES = {
    "add_adapter": "reft_export.adding.add",
    "build_engine": "reft_export.building.build",
    "check_parity": "reft_export.parity.check",
    "compose_adapters": "reft_export.composing.compose",
    "export_bundle": "reft_export.exporting.export",
    "fold_bundle": "reft_export.folding.fold",
    "get_steered_model": "reft_export.training.steered_model",
    "import_adapter": "reft_export.importing.importer",
    "load_base": "reft_export.base.load",
    "quantize_bundle": "reft_export.quantizing.quantize",
    "remove_adapter": "reft_export.adding.add",
    "steer_adapter": "reft_export.contrasting.steer",
    "steered": "reft_export.eager.steering",
    "sweep": "reft_export.sweeping.sweep",
    "train": "reft_export.training.trainer",
}
"""No submodule may have one of these names: its import would put the module in the function's place."""

if not TYPE_CHECKING:  # a type checker reads the imports above; with __getattr__ it would take every other name for one, too

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
