"""The repository of `package --triton`: its config against Triton's schema and against the graph, and its client against stock onnxruntime,
which is fed what a request may hold and nothing else. Triton itself is not here."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tokenizers
import tokenizers.processors

from reft_export.packaging.triton import TYPES, package_triton
from reft_export.packaging.triton_client import DTYPES, answer, encoded
from runtimes.artifacts.bundle import open_bundle
from runtimes.errors import InputError
from runtimes.generation import GenerationSettings, generate
from runtimes.open import open_session
from runtimes.text.tokenizer import Tokenizer

TENSOR = re.compile(r'\{ name: "([^"]+)" data_type: TYPE_(\w+) dims: \[ ([-\d, ]+) \](?: (optional): true)? \}')


@pytest.fixture(scope="module")
def packed(bundle_folder, tmp_path_factory: pytest.TempPathFactory):
    bundle = open_bundle(bundle_folder("llama"))
    return bundle, package_triton(bundle, tmp_path_factory.mktemp("triton") / "out")


def tensors(text: str, key: str) -> dict[str, tuple[str, list[int], bool]]:
    block = re.search(rf"(?ms)^{key} \[$(.*?)^\]$", text)[1]
    return {name: (kind, json.loads(f"[{dims}]"), bool(more)) for name, kind, dims, more in TENSOR.findall(block)}


def config_of(repository) -> str:
    return (repository.folder / "models" / repository.model / "config.pbtxt").read_text()


def test_the_config_says_what_the_graph_has(packed) -> None:
    _, repository = packed
    graph = onnx.load(repository.folder / "models" / repository.model / "1" / "model.onnx").graph
    initializers = {each.name for each in graph.initializer}
    kinds = {onnx.TensorProto.FLOAT: "FP32", onnx.TensorProto.INT32: "INT32", onnx.TensorProto.INT64: "INT64"}
    for key, values in {"input": graph.input, "output": graph.output}.items():
        said = tensors(config_of(repository), key)
        assert set(said) == {value.name for value in values}
        for value in values:
            kind = value.type.tensor_type
            dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
            assert said[value.name] == (kinds[kind.elem_type], dims, value.name in initializers), value.name


def test_the_config_is_one_by_triton_s_schema(packed) -> None:
    """The file of tritonclient's that protoc made, by itself: the package would bring grpc, and a protobuf older than onnx's."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("Triton's schema is not here: pip install --no-deps tritonclient")
    made = importlib.util.spec_from_file_location(
        "triton_model_config", Path(found.submodule_search_locations[0], "grpc/model_config_pb2.py")
    )
    schema = importlib.util.module_from_spec(made)
    made.loader.exec_module(schema)
    _, repository = packed
    config = text_format.Parse(config_of(repository), schema.ModelConfig())
    assert (config.name, config.backend, config.max_batch_size) == (repository.model, "onnxruntime", 0)
    for key, said in {"input": config.input, "output": config.output}.items():
        optional = {each.name for each in said if getattr(each, "optional", False)}
        names = [schema.DataType.Name(each.data_type).removeprefix("TYPE_") for each in said]
        mine = tensors(config_of(repository), key)
        assert {e.name: (n, list(e.dims), e.name in optional) for e, n in zip(said, names, strict=True)} == mine
    assert set(TYPES.values()) <= {name.removeprefix("TYPE_") for name, _ in schema.DataType.items()}


def test_the_client_answers_as_run_does_with_each_adapter(packed) -> None:
    bundle, repository = packed
    version = repository.folder / "models" / repository.model / "1"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    stock = onnxruntime.InferenceSession(str(version / "model.onnx"), options, providers=["CPUExecutionProvider"])
    inputs, outputs = (tensors(config_of(repository), key) for key in ("input", "output"))
    metadata = [{"name": name, "datatype": kind, "shape": dims} for name, (kind, dims, _) in inputs.items()]
    kinds = {kind: np.dtype(dtype) for kind, dtype in {**DTYPES, "INT64": np.int64, "INT32": np.int32}.items()}

    def infer(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert {name for name, (_, _, optional) in inputs.items() if not optional} <= set(feeds)
        for name, array in feeds.items():
            kind, dims, _ = inputs[name]
            assert array.dtype == kinds[kind] and array.ndim == len(dims), name
            assert all(dim in (-1, size) for dim, size in zip(dims, array.shape, strict=True)), name
        return dict(zip(outputs, stock.run(list(outputs), feeds), strict=True))

    about = json.loads((repository.folder / "bundle.json").read_text())
    tokenizer = Tokenizer.load(bundle.folder, bundle.manifest.model)
    prompt = tokenizer.encode_prompt("Count 3: ")
    said = {}
    for name in (None, *repository.adapters):
        adapter = {} if name is None else dict(np.load(repository.folder / "adapters" / f"{name}.npz"))
        said[name] = answer(infer, metadata, prompt, adapter, count=12, stop=about["stop"])
        with open_session(bundle, adapter=name, kernel="function") as session:
            assert said[name] == list(generate(session, tokenizer, [prompt], GenerationSettings(max_new_tokens=12))[0].tokens), name
    assert len(set(map(tuple, said.values()))) > 1, "no adapter steers"


def test_the_client_tokenizes_as_run_does(packed) -> None:
    """Whatever tokenizer.json says of cutting and padding, and without the end that a tokenizer puts behind a text."""
    bundle, repository = packed
    mine, stop = Tokenizer.load(bundle.folder, bundle.manifest.model), json.loads((repository.folder / "bundle.json").read_text())["stop"]
    backend = tokenizers.Tokenizer.from_file(str(repository.folder / "tokenizer.json"))
    end = mine.backend.id_to_token(stop[0])
    framed = tokenizers.processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, stop[0])])
    for processor in (backend.post_processor, framed):
        backend.post_processor = processor
        for text in ("Count 3: ", f"Count{end}", f"Count{end}{end}"):
            backend.enable_truncation(2)
            backend.enable_padding(length=40)
            assert encoded(backend, text, stop) == mine.encode_prompt(text)


def test_what_triton_cannot_run_is_refused_before_anything_is_written(packed, tmp_path: Path) -> None:
    bundle, repository = packed
    with pytest.raises(InputError, match="pass --force"):
        package_triton(bundle, repository.folder)
    half = replace(bundle, manifest=replace(bundle.manifest, precision="bf16"))
    with pytest.raises(InputError, match="export it with -p fp16"):
        package_triton(half, tmp_path / "out")
    assert not (tmp_path / "out").exists()
