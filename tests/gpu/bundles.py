"""A bundle of the built-in base with an adapter, run where its target is, against the golden arrays that eager PyTorch wrote on the CPU.

    python -m gpu.bundles tensorrt-rtx LIBRARIES SM FOLDER [--dry]      an engine with the plugin, built for this GPU
    python -m gpu.bundles onnxruntime-gpu LIBRARIES SM FOLDER [--dry]   onnxruntime's CUDA provider with the op library

LIBRARIES: the folder of the op library and the plugin; SM: the GPU's compute capability without its dot. Writes FOLDER/result.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.adapters import random_adapter

from reft_export import build_engine, check_parity, export_bundle, load_base
from reft_export.building.settings import BuildSettings
from reft_export.exporting.settings import ExportSettings
from reft_export.quickstart import base_path
from runtimes import native_library
from runtimes.edits.adapter import save_adapter
from runtimes.edits.edit import Site
from runtimes.errors import ReftError
from runtimes.tensorrt.builder import compute_capability_names
from runtimes.tensorrt.library import load_tensorrt, tensorrt_version

RESULT = "result.json"
PRECISION = {"tensorrt-rtx": "fp16", "onnxruntime-gpu": "fp16"}
TARGET = {"tensorrt-rtx": "tensorrt", "onnxruntime-gpu": "onnxruntime"}


def run(stage: str, libraries: Path, sm: str, folder: Path, *, dry: bool) -> dict[str, Any]:
    """What parity saw, rung by rung; of a dry form, what was made before; or why this GPU is none of the target's.

    Raises ReftError where one of the steps refuses.
    """
    capability = f"{sm[:-1]}.{sm[-1]}"
    if stage == "tensorrt-rtx":
        trt = load_tensorrt(stage)
        if capability not in (known := compute_capability_names(trt)):
            return {
                "unsupported": f"TensorRT-RTX {tensorrt_version(trt)} builds for compute capability {', '.join(known)}, not {capability}"
            }
    # The libraries of this GPU, wherever the package that is imported looks for its own; this process does nothing else.
    native_library._find = lambda name: found if (found := libraries / name).is_file() else None
    base = load_base(base_path(), require_tokenizer=True)
    sites = tuple(Site(layer=layer, stream="block_output") for layer in range(base.info.num_hidden_layers))
    save_adapter(random_adapter(base.info, sites), folder / "adapter")
    export_bundle(base_path(), [folder / "adapter"], folder / "bundle", ExportSettings(precision=PRECISION[stage], target=TARGET[stage]))
    artifact, provider, told = folder / "bundle", None if stage == "tensorrt-rtx" else "cuda", {"made": ["bundle"]}
    if stage == "tensorrt-rtx":
        artifact = folder / "engine"
        settings = BuildSettings(target=stage, compute_capabilities=(capability,), plugin=libraries / native_library.plugin_name())
        outcome = build_engine(folder / "bundle", artifact, settings)
        told |= {"made": ["bundle", "engine"], "tensorrt": outcome.engine.tensorrt_version, "build_seconds": outcome.result.seconds}
    if not dry:
        report = check_parity(artifact, provider=provider)
        told |= {"passed": report.passed, "rungs": json.loads(report.to_json())["rungs"]}
    return told


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stage", choices=tuple(PRECISION))
    parser.add_argument("libraries", type=Path)
    parser.add_argument("sm")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry", action="store_true", help="everything up to the first step on the GPU")
    options = parser.parse_args(arguments)
    try:
        told = run(options.stage, options.libraries.absolute(), options.sm, options.folder, dry=options.dry)
    except ReftError as error:
        told = {"refused": str(error)}
    (options.folder / RESULT).write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    main()
