"""An engine folder made of a bundle for the double of TensorRT: `build` without TensorRT. Its "plan" is the derived graph itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tensorrt_double import CudaDouble, TensorRTDouble, write_plan

from graph_passes.external import load_graph
from graph_passes.tensorrt_graph import derive_tensorrt_graph
from runtimes import cuda_device, tensorrt_session
from runtimes.bundle import Bundle, TensorRecord
from runtimes.engine import Engine, EngineManifest, PluginRecord, Profile, ShapeRange, open_engine, write_engine_manifest
from runtimes.engine_adapter import write_engine_adapter
from runtimes.hashes import sha256_of
from runtimes.ort_adapter_file import read_onnx_adapter

VERSIONS = {"tensorrt": "10.3.0", "tensorrt-rtx": "1.7.1.116"}
GPU = "8.7"
REBUILD = "reft-export build BUNDLE -o ENGINE"


def install_doubles(
    monkeypatch: pytest.MonkeyPatch, target: str = "tensorrt", *, capacity: int = 1 << 30
) -> tuple[CudaDouble, TensorRTDouble]:
    cuda = CudaDouble(capacity=capacity)
    tensorrt = TensorRTDouble(cuda, target, VERSIONS[target])
    monkeypatch.setattr(cuda_device, "load_cuda", lambda: cuda)
    monkeypatch.setattr(tensorrt_session, "load_tensorrt", lambda target: tensorrt)
    monkeypatch.setattr(tensorrt_session, "present_compute_capability", lambda: GPU)
    return cuda, tensorrt


def ranges(name: str, shape: tuple[object, ...], *, batch: int, sequence: int, past: int, slots: int, rank: int) -> ShapeRange | None:
    """What a profile takes for an input, whose dimensions of names vary."""
    if all(isinstance(dim, int) for dim in shape):
        return None
    if name.endswith((".U", ".A", ".b")):
        names = {0: (1, slots), 1: (1, rank)}
    elif name.startswith("past_key_values."):
        names = {0: (1, batch), 2: (0, past)}
    else:
        names = {0: (1, batch), 1: (1, past + sequence if name == "attention_mask" else sequence)}
    low = tuple(dim if isinstance(dim, int) else names[axis][0] for axis, dim in enumerate(shape))
    high = tuple(dim if isinstance(dim, int) else names[axis][1] for axis, dim in enumerate(shape))
    return ShapeRange(min=low, opt=high, max=high)


def write_toy_engine(
    bundle: Bundle,
    folder: Path,
    *,
    target: str = "tensorrt",
    plugin: bool = False,
    freeze: str | None = None,
    bfloat16: bool = False,
    batch: int = 4,
    sequence: int = 64,
    past: int = 160,
    slots: int = 4,
    rank: int = 8,
    weight_streaming: bool = False,
) -> Engine:
    """``bfloat16``: an engine of that type made of a float32 bundle. The others are the largest shapes."""
    frozen = None if freeze is None else {} if freeze == "base" else read_onnx_adapter(bundle.adapter(freeze).file)
    graph = derive_tensorrt_graph(load_graph(bundle.graph_path), plugin=False, freeze=frozen)

    def typed(records: tuple[TensorRecord, ...]) -> tuple[TensorRecord, ...]:
        return tuple(
            TensorRecord(name=r.name, dtype="bfloat16" if bfloat16 and r.dtype == "float" else r.dtype, shape=r.shape) for r in records
        )

    inputs, outputs = typed(graph.inputs), typed(graph.outputs)
    profiles = []
    for name, columns in (("prefill", sequence), ("decode", 1)):
        found = {r.name: ranges(r.name, r.shape, batch=batch, sequence=columns, past=past, slots=slots, rank=rank) for r in inputs}
        profiles.append(Profile(name=name, shapes={n: shapes for n, shapes in found.items() if shapes is not None}))
    without = shutil.ignore_patterns("model.onnx*", "*.onnx_adapter", "genai_config.json")
    shutil.copytree(bundle.folder, folder, ignore=without)
    model = onnx.ModelProto.FromString(ir.to_proto(graph.model).SerializeToString())
    (folder / "engine.plan").write_bytes(write_plan(model.SerializeToString(), inputs, outputs, tuple(profiles)))
    for name in bundle.adapter_names:
        tensors = {} if freeze else read_onnx_adapter(bundle.adapter(name).file)
        if bfloat16:
            tensors = {n: t.astype(ml_dtypes.bfloat16) if t.dtype == np.float32 else t for n, t in tensors.items()}
        write_engine_adapter(folder / "adapters" / f"{name}.safetensors", tensors)
    record = None
    if plugin:
        (folder / "lib").mkdir()
        (folder / "lib" / "libreft_trt.so").write_bytes(b"a double")
        record = PluginRecord(file="libreft_trt.so", sha256=sha256_of(folder / "lib" / "libreft_trt.so"))
    write_engine_manifest(
        folder,
        EngineManifest(
            created_by="tests",
            target=target,
            tensorrt_version=VERSIONS[target],
            compute_capabilities=(GPU,),
            plugin=record,
            bundle_digest=bundle.digest,
            graph_digest="0" * 64,
            frozen=freeze,
            inputs=inputs,
            outputs=outputs,
            profiles=tuple(profiles),
            weight_streaming=weight_streaming,
            build_seconds=0.0,
            rebuild=REBUILD,
        ),
    )
    return open_engine(folder)
