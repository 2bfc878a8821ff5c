"""What a foreign file says about itself against what is done to it: a contradiction is refused and named, everything else is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from cases import BASE
from safetensors.numpy import save_file
from test_records_beside_weights import CLASSIFIER, FLEXIBLE
from test_refusals import HUB, LOREFT, SAID, damaged, edit_json, refused
from test_vectors import LAYERS, VECTORS, WIDTH, imported_logits, logits_by_hand

from reft_export.importing.foreign import Request
from reft_export.importing.importer import import_adapter
from reft_export.importing.statements import check_kind
from runtimes.edits.edit import Site
from runtimes.errors import AdapterError

EVERYWHERE = Request(positions="all")


def write_gguf(path: Path, *, architecture: str | None = "controlvector", layers: tuple[int, ...] = (1, 3), **said: object) -> Path:
    """A control vector with the keys of ``said``, ``__`` standing for a dot; None leaves out what is written otherwise."""
    said = {"controlvector__model_hint": "llama", "controlvector__layer_count": len(layers), **said}
    writer = gguf.GGUFWriter(path, architecture or "controlvector")
    if architecture is None:
        del writer.kv_data[0]["general.architecture"]
    for key, value in said.items():
        write = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array, bool: writer.add_bool}
        if value is not None:
            write[type(value)](key.replace("__", "."), value)
    for layer in layers:
        writer.add_tensor(f"direction.{layer}", VECTORS[layer])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"architecture": "llama"}, "general.architecture is 'llama', expected 'controlvector'; only control vectors"),
        ({"architecture": "steeringvector"}, "general.architecture is 'steeringvector', expected 'controlvector'"),
        ({"architecture": None}, "general.architecture is 'missing', expected 'controlvector'"),
        ({"controlvector__model_hint": "mistral"}, "controlvector.model_hint is 'mistral', expected llama, as base-llama-tiny is; pass"),
        ({"controlvector__model_hint": "qwen2"}, "controlvector.model_hint is 'qwen2', expected llama"),
        ({"controlvector__model_hint": "phi2"}, "controlvector.model_hint is 'phi2', expected llama"),
        ({"controlvector__model_hint": "no-such-model"}, "controlvector.model_hint is 'no-such-model', expected llama"),
        ({"controlvector__model_hint": "GPT2LMHeadModel"}, "controlvector.model_hint is 'GPT2LMHeadModel', expected llama"),
        ({"controlvector__layer_count": 1}, "controlvector.layer_count is 1, expected 2, the vectors that are stored, to 4, the layers of"),
        ({"controlvector__layer_count": 36}, "controlvector.layer_count is 36, expected 2"),
        ({"controlvector__layer_count": "two"}, "controlvector.layer_count is 'two', expected a number; the file is damaged"),
        ({"glp__mode": "project"}, "glp.mode is 'project', and the import adds vectors: it would do something else"),
        ({"controlvector__operation": "replace"}, "controlvector.operation is 'replace', and the import adds vectors"),
        ({"controlvector__mode": "clamp"}, "controlvector.mode is 'clamp', and the import adds vectors"),
        ({"controlvector__method": "directional_ablation"}, "controlvector.method is 'directional_ablation', and the import adds vectors"),
        ({"general__type": "adapter", "adapter__type": "lora"}, "adapter.type is 'lora', and the import adds vectors"),
        ({"glp__structure": "per-execution-step"}, "glp.structure is 'per-execution-step', and the import adds vectors"),
        ({"glp__hook_point": "ffn_out_pre_residual"}, "glp.hook_point is 'ffn_out_pre_residual', and the import edits block_output"),
        ({"glp__hook_point": "router_logits"}, "glp.hook_point is 'router_logits', which is no stream that can be edited"),
        ({"controlvector__easysteer": '{"version": 1, "component": "attention_heads"}'}, "easysteer.component is 'attention_heads', which"),
        ({"glp__layer_ids_zero_based": "2,4"}, "glp.layer_ids_zero_based is '2,4', and the import edits layer 1, 3; pass"),
        ({"controlvector__layers": [0, 1]}, r"controlvector.layers is \[0, 1\], and the import edits layer 3"),
        ({"glp__alpha_default": 2.5}, "glp.alpha_default is 2.5, a strength that is in no vector; pass --scale 2.5 .* or --scale 1"),
        ({"controlvector__hidden_size": 128}, "controlvector.hidden_size is 128, expected 64, the width of base-llama-tiny"),
        ({"controlvector__positions": "l1"}, "controlvector.positions is l1, and the import edits all; say them with --positions l1"),
    ],
)
def test_gguf_that_says_otherwise(said, match, tmp_path) -> None:
    refused(write_gguf(tmp_path / "v.gguf", **said), tmp_path / "out", Request(), match)


@pytest.mark.parametrize(
    ("said", "notes"),
    [
        ({}, 0),
        ({"controlvector__model_hint": None, "controlvector__layer_count": None}, 0),
        ({"controlvector__model_hint": "unknown"}, 0),
        ({"controlvector__model_hint": "base-llama-tiny"}, 0),
        ({"controlvector__model_hint": "LlamaForCausalLM"}, 0),
        ({"controlvector__model_hint": "someone/A-Model-7B"}, 1),
        ({"controlvector__layer_count": LAYERS}, 0),
        ({"controlvector__layer_count": LAYERS - 1}, 0),
        ({"controlvector__method": "pca_diff", "controlvector__explained_variance_1": 0.5, "controlvector__normalize": False}, 0),
        ({"controlvector__easysteer": '{"version": 1, "component": "hidden_states", "metadata": {"mapping": [["layers", [1]]]}}'}, 0),
        ({"general__name": "gpt2 replaced", "general__author": "project", "general__license": "mit", "general__tags": ["lora", "x"]}, 0),
        ({"glp__mode": "add", "glp__hook_point": "residual_stream_post_layer", "glp__layer_ids_zero_based": "1,3", "glp__rank": 1}, 0),
        ({"general__base_model__0__name": "A Model"}, 1),
    ],
)
def test_gguf_that_says_what_is_done(said, notes, tmp_path) -> None:
    source = write_gguf(tmp_path / "v.gguf", **said)
    result = import_adapter(source, str(BASE), tmp_path / "out", Request(), report=lambda _: None)
    assert result.adapter.sites == (Site(layer=1), Site(layer=3)) and len(result.notes) == notes, result.notes


def test_a_recorded_strength_is_the_users_to_say(base, tmp_path) -> None:
    source = write_gguf(tmp_path / "v.gguf", glp__alpha_default=2.5)
    for scale in (2.5, 1.0):
        found = imported_logits(source, tmp_path / f"at-{scale:g}".replace(".", "-"), base, Request(scale=scale))
        expected = logits_by_hand(base, {Site(layer=n): np.float32(scale) * VECTORS[n] for n in (1, 3)})
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("hint", "base", "fits"),
    [
        ("mistral", "mistral", True),
        ("llama", "mistral", True),
        ("mistral", "llama", False),
        ("llama", "mixtral", True),
        ("phi2", "phi", True),
        ("phi3", "phi", False),
        ("gptneox", "gpt_neox", True),
        ("gemma3", "gemma3_text", True),
        ("gemma2", "gemma3_text", False),
        ("qwen3moe", "qwen3_moe", True),
        ("qwen3", "qwen3_moe", False),
        ("command-r", "cohere", True),
        ("deepseek2", "deepseek_v3", True),
        ("qwen2", "qwen3", False),
    ],
)
def test_a_hint_is_transformers_or_llama_cpps_name(hint, base, fits) -> None:
    """repeng writes config.model_type, llama.cpp its own general.architecture."""
    config = SimpleNamespace(model_type=base)
    config.get_text_config = lambda: config
    outline = SimpleNamespace(model=SimpleNamespace(config=config), info=SimpleNamespace(name="folder"))
    if fits:
        assert check_kind("v.gguf: model_hint", hint, outline) == []
        return
    with pytest.raises(AdapterError, match=f"model_hint is '{hint}', expected .*{base.removesuffix('_text')}"):
        check_kind("v.gguf: model_hint", hint, outline)


SAYINGS = [
    ({"peft_type": "LORA"}, {}, "peft_type is 'LORA', and the import adds vectors"),
    ({"method": "loreft"}, {}, "method is 'loreft', and the import adds vectors"),
    ({"steering.mode": "project"}, {}, "steering.mode is 'project', and the import adds vectors"),
    ({"model_type": "gpt2"}, {}, "model_type is 'gpt2', expected llama"),
    ({"model": "gpt2"}, {}, "model is 'gpt2', expected llama"),
    ({"architectures": '["GPT2LMHeadModel"]'}, {}, "architectures is 'GPT2LMHeadModel', expected llama"),
    ({"n_embd": "768"}, {}, "n_embd is 768, expected 64, the width of base-llama-tiny"),
    ({"num_hidden_layers": "12"}, {}, "num_hidden_layers is 12, expected 1 or 4, the layers of base-llama-tiny"),
    ({"layer": "3"}, {}, "layer is '3', and the import edits layer 2; pass the file's own with --layers"),
    ({"layers": "model.layers[1]"}, {}, r"layers is 'model.layers\[1\]', and the import edits layer 2"),
    ({"layers": "model.layers[2].mlp.down_proj"}, {}, "mlp.down_proj', and the import edits block_output; pass --stream mlp_output"),
    ({"hook_name": "blocks.2.hook_resid_pre"}, {}, "hook_resid_pre', and the import edits block_output; pass --stream block_input"),
    ({"component": "mlp"}, {"stream": "attention_output"}, "component is 'mlp', and the import edits attention_output"),
    ({"coefficient": "4.0"}, {}, "coefficient is 4, a strength that is in no vector; pass --scale 4"),
    ({"positions": "l1"}, {}, "positions is l1, and the import edits all"),
    ({"config": '{"mode": "replace"}'}, {}, "config.mode is 'replace', and the import adds vectors"),
]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(("said", "flags", "match"), SAYINGS)
def test_arrays_that_say_otherwise(said, flags, match, suffix, tmp_path) -> None:
    """In the metadata of a .safetensors, and as texts beside the arrays of an .npz."""
    source = tmp_path / f"v{suffix}"
    write_arrays(source, {"vector": VECTORS[2]}, said)
    refused(source, tmp_path / "out", Request(**({"positions": "all", "layers": "2"} | flags)), match)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize(
    ("said", "flags", "notes"),
    [
        ({"format": "pt", "method": "mean_contrastive", "author": "lora", "dataset_samples": "20000", "normalized": "false"}, {}, 0),
        ({"layer": "2", "model_type": "llama", "hidden_size": "64", "coefficient": "1.0", "component": "residual_stream"}, {}, 0),
        ({"layers": "[1, 2]", "num_layers": "1", "scale": "4"}, {"scale": 4.0}, 0),
        ({"layer": "-2", "positions": "all", "operation": "add", "description": "{not JSON"}, {}, 0),
        ({"layer": "model.layers[2].mlp.down_proj"}, {"stream": "mlp_output"}, 0),
        ({"model": "someone/A-Model-7B"}, {}, 1),
        ({"base_model": "someone/base-llama-tiny"}, {}, 0),
    ],
)
def test_arrays_that_say_what_is_done(said, flags, notes, suffix, tmp_path) -> None:
    source = tmp_path / f"v{suffix}"
    write_arrays(source, {"vector": VECTORS[2]}, said)
    request = Request(**({"positions": "all", "layers": "2"} | flags))
    result = import_adapter(source, str(BASE), tmp_path / "out", request, report=lambda _: None)
    assert [site.layer for site in result.adapter.sites] == [2] and len(result.notes) == notes, result.notes


def write_arrays(path: Path, arrays: dict[str, np.ndarray], said: dict[str, str]) -> None:
    if path.suffix == ".npz":
        np.savez(path, **arrays, **{key: np.array(value) for key, value in said.items()})
    else:
        save_file(arrays, path, metadata=said)


def test_numbers_beside_the_arrays_of_an_npz(tmp_path) -> None:
    """``np.savez(path, vector=.., layer=..)`` is how many scripts save one."""
    source = tmp_path / "v.npz"
    chosen = Request(positions="all", layers="2")
    np.savez(source, vector=VECTORS[2], layer=2, scale=1.0, layers=[2, 3])
    assert import_adapter(source, str(BASE), tmp_path / "out", chosen, report=lambda _: None).adapter.sites == (Site(layer=2),)
    shutil.rmtree(tmp_path / "out")
    for said, match in (
        ({"layer": 1}, "layer is 1, and the import edits layer 2"),
        ({"layers": np.array([0, 3])}, r"layers is \[0, 3\], and the import edits layer 2"),
        ({"scale": 4.0}, "scale is 4, a strength that is in no vector"),
        ({"hidden_size": 63}, "hidden_size is 63, expected 64"),
    ):
        np.savez(source, vector=VECTORS[2], **said)
        refused(source, tmp_path / "out", chosen, match)


@pytest.mark.parametrize(
    ("name", "shape", "match"),
    [
        ("base_model.model.layers.2.lora_A.weight", (1, WIDTH), "'base_model.model.layers.2.lora_A.weight' names a matrix of an adapter"),
        ("lora_B", (LAYERS, WIDTH), "'lora_B' names a matrix of an adapter or a model, which is not added; name it vector"),
        ("rotate_layer", (WIDTH,), "'rotate_layer' names a matrix"),
        ("model.embed_tokens.weight", (LAYERS, WIDTH), "names a matrix"),
        ("model.layers[2].mlp.down_proj", (WIDTH,), "its array is .*down_proj', and the import edits block_output; pass"),
        ("model.layers[1].self_attn", (WIDTH,), r"the name of its array is 'model.layers\[1\].self_attn', and the import edits layer 2"),
    ],
)
def test_the_name_of_an_array_alone(name, shape, match, tmp_path) -> None:
    np.savez(tmp_path / "v.npz", **{name: np.ones(shape, np.float32)})
    refused(tmp_path / "v.npz", tmp_path / "out", Request(positions="all", layers="2"), match)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ({"operation": "add"}, "operation is 'add', and the import scales and shifts"),
        ({"method": "lora"}, "method is 'lora', and the import scales and shifts"),
        ({"strength": "2"}, "strength is 2, and the import scales and shifts with a scale and a bias as they are"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2', expected llama"),
        ({"layer": "0"}, "layer is '0', and the import edits layer 1"),
    ],
)
def test_red_arrays_that_say_otherwise(said, match, tmp_path) -> None:
    arrays = {"1.mlp_output.scale": np.ones(WIDTH, np.float32) * 2, "1.mlp_output.bias": VECTORS[1]}
    save_file(arrays, tmp_path / "r.safetensors", metadata=said)
    refused(tmp_path / "r.safetensors", tmp_path / "out", EVERYWHERE, match)
    save_file(arrays, tmp_path / "r.safetensors", metadata={"method": "RED", "component": "mlp", "author": "x"})
    import_adapter(tmp_path / "r.safetensors", str(BASE), tmp_path / "fits", EVERYWHERE, report=lambda _: None)


def at_top(file: str, **changes: object) -> Callable[[Path], None]:
    """Changes keys beside ``config``, not in it."""
    return lambda folder: (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes)) and None


@pytest.mark.parametrize(
    ("source", "change", "match", "options"),
    [
        (HUB, at_top("adapter_config.json", name="other"), "name is 'other', expected 'reft', which the tensors bear", {}),
        (FLEXIBLE, at_top("head_config.json", model_type="gpt2"), "head_config.json: .* trained on .*, a gpt2", {"model": CLASSIFIER}),
        (FLEXIBLE, edit_json("head_config.json", hidden_size=768), "of width 768, .* has width 32", {"model": CLASSIFIER}),
        (LOREFT, edit_json("config.json", sorted_keys=["layer_1_comp_block_output_unit_pos_nunit_1#0"]), "sorted_keys and repr", {}),
        (LOREFT, edit_json("config.json", model_type="gpt2"), "config.json: model_type is 'gpt2', expected llama", {}),
        (LOREFT, edit_json("config.json", hidden_size=768), "config.json: hidden_size is 768, expected 64, as base-llama-tiny has it", {}),
        (
            LOREFT,
            edit_json("config.json", intervenable_model_type="<class 'transformers.models.gpt2.modeling_gpt2.GPT2LMHeadModel'>"),
            "intervenable_model_type is 'gpt2', expected llama",
            {},
        ),
    ],
)
def test_folders_that_say_otherwise(source, change, match, options, tmp_path) -> None:
    request = SAID if source == LOREFT else Request()
    refused(damaged(tmp_path, source, change), tmp_path / "out", request, match, **options)


def test_a_pyreft_config_that_says_what_is_done(tmp_path) -> None:
    """pyvene's records of the model, and sorted_keys in any order."""
    content = json.loads((LOREFT / "config.json").read_text())
    said = {"intervenable_model_type": "<class 'transformers.models.llama.modeling_llama.LlamaForCausalLM'>", "model_type": "llama"}
    change = edit_json("config.json", **said, hidden_size=64, sorted_keys=content["sorted_keys"][::-1])
    adapter = import_adapter(damaged(tmp_path, LOREFT, change), str(BASE), tmp_path / "out", SAID, report=lambda _: None).adapter
    assert adapter.sites == (Site(layer=1), Site(layer=2))
