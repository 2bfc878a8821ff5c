"""An engine folder made of a bundle for the double of TensorRT: `build` without TensorRT. Its "plan" is the derived graph itself."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tensorrt_double import CudaDouble, TensorRTDouble, write_plan

from graph_passes.external import load_graph
from graph_passes.tensorrt_graph import derive_tensorrt_graph
from reft_export.building.engine_profiles import EngineLimits, engine_profiles
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.engine import Engine, EngineManifest, PluginRecord, open_engine, write_engine_manifest
from runtimes.artifacts.engine_adapter import write_engine_adapter
from runtimes.artifacts.manifest import MANIFEST_FILE, TensorRecord, write_manifest_file
from runtimes.artifacts.ort_adapter_file import read_onnx_adapter
from runtimes.files.hashes import sha256_of
from runtimes.tensorrt import cuda_device
from runtimes.tensorrt import session as tensorrt_session

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
    context: int = 160,
    slots: int = 4,
    rank: int = 8,
    weight_streaming: bool = False,
    perturbed: bool = False,
    columns: bool = True,
) -> Engine:
    """``columns``: steps give out new columns alone, where the bundle's graph takes position_ids.

    ``bfloat16``: an engine of that type made of a float32 bundle. ``perturbed``: one weight is not the bundle's. ``batch`` to
    ``rank``: the largest shapes.
    """
    frozen = None if freeze is None else {} if freeze == "base" else read_onnx_adapter(bundle.adapter(freeze).file)
    columns = columns and any(record.name == "position_ids" for record in bundle.manifest.inputs)
    graph = derive_tensorrt_graph(load_graph(bundle.graph_path), plugin=False, freeze=frozen, new_columns=columns)

    def typed(records: tuple[TensorRecord, ...]) -> tuple[TensorRecord, ...]:
        return tuple(
            TensorRecord(name=r.name, dtype="bfloat16" if bfloat16 and r.dtype == "float" else r.dtype, shape=r.shape) for r in records
        )

    inputs, outputs = typed(graph.inputs), typed(graph.outputs)
    banks = {name for node in bundle.nodes for name in node.bank_names}
    limits = EngineLimits(max_batch=batch, max_sequence=sequence, context=context, max_slots=slots, max_rank=rank)
    profiles = engine_profiles(inputs, banks, limits)
    answers = bundle.adapter_names if freeze is None else tuple(n for n in bundle.adapter_names if n == freeze)
    others = [n for n in ("base", *bundle.adapter_names) if n not in answers and not (n == "base" and freeze in (None, "base"))]
    without = shutil.ignore_patterns("model.onnx*", "*.onnx_adapter", "genai_config.json", *(f"{n}.*" for n in others))
    shutil.copytree(bundle.folder, folder, ignore=without)
    write_manifest_file(folder / MANIFEST_FILE, replace(bundle.manifest, adapters=answers, files={}))
    model = onnx.ModelProto.FromString(ir.to_proto(graph.model).SerializeToString())
    if perturbed:
        head = next(t for t in model.graph.initializer if t.name == "head")
        values = onnx.numpy_helper.to_array(head).copy()
        values[0, 0] += 0.01
        head.CopyFrom(onnx.numpy_helper.from_array(values, "head"))
    (folder / "engine.plan").write_bytes(write_plan(model.SerializeToString(), inputs, outputs, profiles))
    for name in answers:
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
            cache=graph.cache,
            profiles=profiles,
            weight_streaming=weight_streaming,
            build_seconds=0.0,
            rebuild=REBUILD,
        ),
    )
    return open_engine(folder)
