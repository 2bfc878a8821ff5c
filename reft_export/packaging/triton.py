"""A bundle as a model repository of NVIDIA Triton, for its onnxruntime backend; a request brings the tensors of the adapter it wants.

    client.py, README.md           what asks the server, of numpy and tokenizers (``triton_client.py``); what is what
    tokenizer.json, bundle.json    the bundle's; its name here, the tokens that end an answer, what a token of the cache takes
    adapters/<name>.npz            every bank and the position rule of an adapter, by the graph's names
    models/<name>/config.pbtxt     the graph's inputs and outputs, as onnxruntime tells them
    models/<name>/1/               model.onnx and its weights

Banks and rules are initializers that a feed overrides: optional inputs, which Triton has where max_batch_size is 0; a request without them
is answered by the base. The KV cache is the client's. Triton's own state of a sequence begins with one column where a graph says any number
(core, sequence_state.cc), and a prompt begins with none.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtimes.artifacts.artifact import Artifact
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.listed_files import BANKS
from runtimes.artifacts.manifest import DATA_FILE, GRAPH_FILE
from runtimes.errors import InputError
from runtimes.files.folders import atomic_folder, check_destination
from runtimes.kv_cache import stated_bytes_per_token

TYPES = {"float": "FP32", "float16": "FP16", "int64": "INT64", "int32": "INT32", "int8": "INT8", "uint8": "UINT8"}
"""onnxruntime's element types as Triton calls them."""
UNLIKE = {"qdq-int4": "products of another accuracy", "fp8": "a graph that does not load"}
"""Schemes whose graphs need an option of onnxruntime's session, which the backend does not hand on; what there would be without it."""
README = """\
# {name}

    docker run --rm -p8000:8000 -v "$PWD/models:/models" nvcr.io/nvidia/tritonserver:VERSION-py3 tritonserver --model-repository=/models
    pip install 'tritonclient[http]' tokenizers
    python client.py "{prompt}" {adapter}

The prompt is continued as it is: of a chat model it is what its template renders. A request names its adapter by bringing its tensors,
adapters/NAME.npz; without them the base answers. The KV cache travels with the requests: {cache:,} bytes a token of context, to the server
and back at every step.
"""


class Node(Protocol):
    """An input or output as onnxruntime tells it (NodeArg)."""

    @property
    def name(self) -> str: ...

    @property
    def type(self) -> str: ...

    @property
    def shape(self) -> list[object]: ...


@dataclass(frozen=True, kw_only=True)
class Repository:
    folder: Path
    model: str
    adapters: tuple[str, ...]
    left_out: tuple[str, ...]
    """Adapters whose slots no graph computes: who hands them in has to be this project's own runtime."""


def package_triton(artifact: Artifact, output: Path, *, force: bool = False) -> Repository:
    """Writes the model repository and its client into the folder ``output``, whole or not at all.

    Raises InputError for an engine, for a classifier, for bfloat16 and for the schemes of UNLIKE; BackendUnavailable and GraphError for
    a graph that onnxruntime does not load here.
    """
    from runtimes.ort.session import OpenGraph

    if not isinstance(artifact, Bundle):
        raise InputError(f"{artifact.folder} is an engine, and this repository is of graphs for onnxruntime; give it the bundle")
    _check(artifact)
    check_destination(output, force=force, inputs=[artifact.folder])
    name = re.sub(r"[^A-Za-z0-9._-]", "-", artifact.folder.resolve().name) or "model"
    with OpenGraph(artifact, kernel="function") as graph:  # Triton has no op library: the function in the graph carries the edit
        inputs, optional, outputs = graph.nodes()
    packed = tuple(each for each in artifact.adapter_names if artifact.adapter_file(each).suffix == f".{BANKS}")
    model = artifact.manifest.model
    cache = stated_bytes_per_token(artifact.manifest.inputs)
    with atomic_folder(output, force=force) as work:
        version = work / "models" / name / "1"
        version.mkdir(parents=True)
        for file in (GRAPH_FILE, DATA_FILE):
            if (artifact.folder / file).is_file():
                shutil.copyfile((artifact.folder / file).resolve(), version / file)
        (version.parent / "config.pbtxt").write_text(config(name, inputs, optional, outputs), encoding="utf-8")
        (work / "adapters").mkdir()
        for adapter in packed:
            tensors: dict[str, Any] = {**artifact.adapter_tensors(adapter)}  # numpy 2's savez has an option among them, 1's has not
            np.savez(work / "adapters" / f"{adapter}.npz", **tensors)
        if (artifact.folder / "tokenizer.json").is_file():
            shutil.copyfile((artifact.folder / "tokenizer.json").resolve(), work / "tokenizer.json")
        about = {"model": name, "stop": list(model.eos_token_ids), "cache_bytes_per_token": cache}
        (work / "bundle.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        client = resources.files("reft_export.packaging") / "triton_client.py"
        (work / "client.py").write_text(client.read_text(encoding="utf-8"), encoding="utf-8")
        readme = README.format(name=name, prompt="Once upon a time", adapter=next(iter(packed), ""), cache=cache)
        (work / "README.md").write_text(readme, encoding="utf-8")
    left_out = tuple(each for each in artifact.adapter_names if each not in packed)
    return Repository(folder=output, model=name, adapters=packed, left_out=left_out)


def config(name: str, inputs: Iterable[Node], optional: Iterable[Node], outputs: Iterable[Node]) -> str:
    """config.pbtxt, a ModelConfig of Triton's model_config.proto: every tensor with all its dimensions, -1 where any number will do."""
    given = [*(_tensor(node) for node in inputs), *(_tensor(node, " optional: true") for node in optional)]
    lists = {"input": given, "output": [_tensor(node) for node in outputs]}
    head = f'name: "{name}"\nbackend: "onnxruntime"\nmax_batch_size: 0\ninstance_group [ {{ kind: KIND_CPU count: 1 }} ]\n'
    return head + "".join(f"{key} [\n  {{}}\n]\n".format(",\n  ".join(tensors)) for key, tensors in lists.items())


def _tensor(node: Node, more: str = "") -> str:
    dims = ", ".join(str(dim) if isinstance(dim, int) else "-1" for dim in node.shape)
    element = TYPES[node.type.removeprefix("tensor(").removesuffix(")")]
    return f'{{ name: "{node.name}" data_type: TYPE_{element} dims: [ {dims} ]{more} }}'


def _check(bundle: Bundle) -> None:
    manifest = bundle.manifest
    if manifest.head:
        raise InputError(f"{bundle.folder} is a classifier; a repository is made of decoders")
    if manifest.precision == "bf16":
        raise InputError(f"{bundle.folder} is of bfloat16, which numpy's files cannot hold; export it with -p fp16")
    scheme = None if manifest.quantization is None else manifest.quantization.scheme
    if scheme in UNLIKE:
        raise InputError(
            f"{bundle.folder} is quantized by {scheme}, which without an option that Triton's backend does not take is {UNLIKE[scheme]}; "
            "quantize with --scheme weight-only"
        )
