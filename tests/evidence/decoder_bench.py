"""What steering costs a whole decoder: a random Llama of 134M parameters in int4, base against steered, fused against function.

    PYTHONPATH=tests python -m evidence.decoder_bench [--repeats 9] [--processes 2]

reproduces the last table of docs/benchmarks.md.

The model is random, so only its speed means anything. Base and steered runs alternate in one process; ratios are medians over pairs.
onnxruntime's decode has slow and fast modes from process to process, so only figures of one process are compared, and there are several.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

LAYERS, WIDTH, RANK = 12, 768, 4
ADAPTERS = {"prompt-only": "f7+l7", "everywhere": "all"}


def make(folder: Path) -> None:
    """A float32 bundle of the random decoder with LoReFT adapters on every block output, in ``folder``/bundle."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from reft_export.base.load import load_base
    from reft_export.exporting.export import ExportSettings, export_bundle
    from runtimes.edits.adapter import Adapter, save_adapter
    from runtimes.edits.edit import Site
    from runtimes.edits.positions import PositionRule

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=32000,
        hidden_size=WIDTH,
        intermediate_size=2048,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=2048,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    info = load_base(folder / "base").info
    generator = np.random.default_rng(0)
    tensors = {}
    for layer in range(LAYERS):
        tensors[f"{layer}.block_output.R"] = np.ascontiguousarray(np.linalg.qr(generator.standard_normal((WIDTH, RANK)))[0].T, np.float32)
        tensors[f"{layer}.block_output.W"] = (generator.standard_normal((RANK, WIDTH)) * WIDTH**-0.5).astype(np.float32)
        tensors[f"{layer}.block_output.b"] = generator.standard_normal(RANK).astype(np.float32)
    for name, positions in ADAPTERS.items():
        adapter = Adapter(
            method="loreft",
            rank=RANK,
            sites=tuple(Site(layer=layer) for layer in range(LAYERS)),
            positions=PositionRule.parse(positions),
            tied=True,
            base=info,
            tensors=tensors,
        )
        save_adapter(adapter, folder / name)
    export_bundle(str(folder / "base"), [folder / name for name in ADAPTERS], folder / "bundle", ExportSettings(), report=lambda _: None)


def measure(folder: Path, kernel: str, repeats: int) -> None:
    """One process: quantizes the bundle's graph to int4 and prints a row per adapter."""
    from calibration.quantize import quantize_graph
    from calibration.settings import QuantizationSettings
    from reft_export.parity.ladder import variant
    from runtimes.artifacts.bundle import open_bundle
    from runtimes.bench import bench
    from runtimes.ort.session import OrtSession

    with variant(open_bundle(folder / "bundle"), lambda graph: quantize_graph(graph, QuantizationSettings())) as bundle:
        result = bench(lambda: OrtSession(bundle, threads=1, kernel=kernel), prompt_tokens=256, new_tokens=48, repeats=repeats)
    for m in result.measurements[1:]:
        base = result.measurements[0]
        minima = f"{m.ttft_min / base.ttft_min:.3f} | {m.decode_min / base.decode_min:.3f}"
        print(f"| {kernel} | {m.name} | {m.ttft_ratio:.3f} | {m.decode_ratio:.3f} | {minima} | {base.decode_min:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "KERNEL"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(Path(arguments.measure[0]), arguments.measure[1], arguments.repeats)
        return
    print("| kernel | adapter | prefill 256, median ratio | decode, median ratio | prefill, minima | decode, minima | base ms/token |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        for kernel in ("fused", "function") * arguments.processes:
            command = [sys.executable, "-m", "evidence.decoder_bench", "--measure", folder, kernel, "--repeats", str(arguments.repeats)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
