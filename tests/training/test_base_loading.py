"""Loading a base, what is refused, and the fingerprint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_encoders
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from reft_export.base.fingerprint import fingerprint, memory_fingerprint
from reft_export.base.load import base_from_memory, load_base, outline_base
from runtimes.errors import BackendUnavailable, InputError


@pytest.fixture
def folder(tmp_path: Path, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Path:
    target = tmp_path / "tiny-llama"
    llama.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "removed"}))


def edit_weights(folder: Path, name: str, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_loads_what_was_saved(folder: Path, llama: PreTrainedModel) -> None:
    base = load_base(str(folder))
    assert (base.info.name, base.info.num_hidden_layers, base.info.hidden_size) == ("tiny-llama", 3, 32)
    assert base.folder == folder and not base.model.training and base.tokenizer.eos_token == "</s>"
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, llama(ids).logits)
    assert not any(p.requires_grad for p in base.model.parameters())


def test_fingerprint_is_of_the_stored_bytes_only(folder: Path) -> None:
    """Another dtype on load, and what a release of transformers writes beside the architecture, change nothing."""
    digest = fingerprint(folder)
    assert load_base(folder).info.fingerprint == load_base(folder, dtype="bfloat16").info.fingerprint == digest
    edit_config(folder, transformers_version="9.9", torch_dtype="float16", dtype="removed", use_cache=False)
    edit_config(folder, a_key_of_tomorrow=None)
    assert fingerprint(folder) == digest


def test_fingerprint_sees_architecture_names_shapes_dtypes_and_values(folder: Path) -> None:
    seen = {fingerprint(folder)}
    pristine = folder.with_name("pristine")
    shutil.copytree(folder, pristine)
    name = "model.layers.1.mlp.up_proj.weight"

    def after(change) -> str:
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)
        change()
        return fingerprint(folder)

    changes = [
        lambda: edit_config(folder, rms_norm_eps=1e-3),
        lambda: edit_config(folder, num_key_value_heads=4),
        lambda: edit_weights(folder, name, lambda w: w * (1 + 1e-6)),
        lambda: edit_weights(folder, name, lambda w: w.bfloat16()),
        lambda: edit_weights(folder, name, lambda w: w.reshape(32, 64).contiguous()),
        lambda: edit_weights(folder, "model.norm.weight", lambda w: w + 0.01),
        lambda: rename(folder, name, name + "2"),
    ]
    for change in changes:
        digest = after(change)
        assert digest not in seen
        seen.add(digest)
    assert after(lambda: None) in seen


PEFT = {"peft_type": "LORA", "base_model_name_or_path": "someone/else", "r": 4, "target_modules": ["q_proj"]}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def with_lora(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(4, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_other_head(folder: Path) -> None:
    """config.json ties the head to the embedding; the checkpoint has one of its own."""
    edit_config(folder, tie_word_embeddings=True)
    edit_weights(folder, "lm_head.weight", lambda w: w + 1)


def in_two_configs(folder: Path) -> None:
    shutil.copy(folder / "config.json", folder / "config.4.0.0.json")
    edit_config(folder, configuration_files=["config.json", "config.4.0.0.json"])


def other_weights(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    edit_config(folder, transformers_weights="other.safetensors")


def bare_adapter(folder: Path) -> None:
    """As peft saves one: transformers would load the base that it names."""
    write_json(folder / "adapter_config.json", PEFT)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").unlink()


def rename(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[new] = tensors.pop(old)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_sharding_does_not_change_the_fingerprint(folder: Path, llama: PreTrainedModel, tmp_path: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    names = sorted(whole)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    shutil.copy(folder / "config.json", sharded)
    for file, keys in shards.items():
        save_file({k: whole[k] for k in keys}, sharded / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: file for file, keys in shards.items() for k in keys}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_base(sharded).info.fingerprint == fingerprint(folder)
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="lacks 1 of 2 weight files, first .*00002-of-00002"):
        load_base(sharded)


def test_bin_checkpoint(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    base = load_base(folder)
    assert base.info.fingerprint == fingerprint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(InputError, match="pytorch_model.bin is damaged"):
        load_base(folder)


def test_model_in_memory(llama: PreTrainedModel) -> None:
    base = base_from_memory(llama, name="made here")
    assert base.info.fingerprint == memory_fingerprint(llama) and base.folder is None and base.tokenizer is None
    assert not base.model.training and not any(parameter.requires_grad for parameter in base.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "encoder"])
def test_a_model_in_memory_is_the_base_that_it_was_loaded_from(family: str, tmp_path: Path) -> None:
    """Tied heads are in its state twice, and experts joined: all that its records say is what its folder says."""
    folder = tmp_path / "its-name"
    tiny_encoders.save_base(folder) if family == "encoder" else tiny.save_base(folder, family)
    auto = AutoModelForSequenceClassification if family == "encoder" else AutoModelForCausalLM
    base, stored = base_from_memory(auto.from_pretrained(folder)), load_base(folder)
    assert (base.info, base.task) == (stored.info, stored.task)
    with torch.no_grad():
        next(base.model.parameters())[0] += 1
    assert base_from_memory(base.model).info.fingerprint != stored.info.fingerprint


def test_what_no_base_in_memory_can_be() -> None:
    def refused(match: str, model: Any) -> None:
        with pytest.raises(InputError, match=match) as caught:
            base_from_memory(model)
        assert "\n" not in str(caught.value)

    refused("this is a Linear; load it with from_pretrained", torch.nn.Linear(2, 2))
    with torch.device("meta"):
        refused(r"no values for model.embed_tokens.weight \(torch's meta device\)", LlamaForCausalLM(tiny.build("llama").config))
    for change, match in (
        (lambda m: m.config.update({"quantization_config": {"quant_method": "bitsandbytes"}}), "is quantized; load the float model"),
        (lambda m: m.register_parameter("x", torch.nn.Parameter(torch.ones(2, dtype=torch.int8), False)), "holds x as torch.int8"),
        (lambda m: m.model.layers[0].register_module("lora_A", torch.nn.Linear(2, 2)), "has a LoRA that is not merged"),
        (lambda m: m.model.norm.weight.data.fill_(torch.inf), "model.norm.weight holds values that are not finite"),
    ):
        model = tiny.build("llama")
        change(model)
        refused(match, model)
    refused("LlamaModel in memory has no head that gives logits", tiny.build("llama").model)
    refused("without a classification head", tiny_encoders.build().base_model)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def scramble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(np.arange(200, dtype=np.uint8).tobytes())


REFUSALS = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json holds a JSON list, expected an object"),
    "no model type": (lambda f: edit_config(f, model_type="removed"), "lacks model_type"),
    "unknown model type": (
        lambda f: edit_config(f, model_type="martian"),
        "model type 'martian' is unknown to transform",
    ),
    "custom code": (
        lambda f: edit_config(f, model_type="martian", auto_map={"AutoConfig": "x.Y"}),
        "code shipped inside model folders is not run",
    ),
    "not a decoder": (lambda f: edit_config(f, model_type="vit"), "vit is not a decoder language model"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
    "cut weights": (cut, "model.safetensors is damaged or cut short"),
    "not safetensors": (scramble, "model.safetensors is damaged or cut short"),
    "a lacking parameter": (
        lambda f: rename(f, "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up.weight"),
        "the checkpoint lacks 1 parameters, first model.layers.2.mlp.up_proj.weight",
    ),
    "other shapes": (lambda f: edit_config(f, vocab_size=100), "cannot be loaded"),
    "a LoRA beside it": (lambda f: write_json(f / "adapter_config.json", PEFT), "merge_and_unload()"),
    "a LoRA alone": (bare_adapter, "merge_and_unload()"),
    "a LoRA in it": (with_lora, "merge_and_unload()"),
    "a head of its own that is tied": (with_other_head, "ties lm_head.weight to the embedding, and the checkpoint stores another"),
    "another config by release": (in_two_configs, "lists config.4.0.0.json, which some releases of transformers read in its place"),
    "other weights by name": (other_weights, "transformers_weights names other.safetensors in place of model.safetensors"),
    "a distributed checkpoint": (
        lambda f: shutil.copy(f / "model.safetensors", f / "shard-00000-model-00001-of-00001.safetensors"),
        "holds a distributed checkpoint",
    ),
    "quantized": (
        lambda f: edit_config(f, quantization_config={"quant_method": "bitsandbytes", "bits": 4}),
        "and `reft-export train --base BUNDLE` trains on",
    ),
    "quantized by nothing known": (lambda f: edit_config(f, quantization_config={"bits": 4}), "is quantized (by a method that"),
    "fused by one release": (lambda f: edit_config(f, fusion_config={"patch_embeddings": True}), "fusion_config changes the model"),
    "code on the hub": (
        lambda f: edit_config(f, _attn_implementation="kernels-community/flash-attn"),
        "_attn_implementation names kernels-community/flash-attn, code on the Hugging Face hub",
    ),
    "another tokenizer by release": (
        lambda f: write_json(f / "tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.4.0.0.json", "tokenizer.json"]}),
        "lists tokenizer.4.0.0.json, which some releases of transformers read in place of tokenizer.json",
    ),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "the tokenizer cannot be loaded"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_folders_say_why_in_one_line(folder: Path, case: str) -> None:
    damage, message = REFUSALS[case]
    damage(folder)
    with pytest.raises(InputError) as error:
        load_base(folder)
    assert message in str(error.value) and str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["a LoRA beside it", "a LoRA in it", "quantized", "a head of its own that is tied"])
def test_outlines_are_refused_alike(folder: Path, case: str) -> None:
    damage, message = REFUSALS[case]
    damage(folder)
    with pytest.raises(InputError) as error:
        outline_base(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_transformers_5_writes_loads_here_or_is_refused(folder: Path) -> None:
    """Its tokenizer class is new to transformers 4, and so is its place for the rotary settings."""
    import transformers

    edit_config(folder, rope_theta="removed", rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "TokenizersBackend"}))
    assert load_base(folder).tokenizer("ab")["input_ids"] == load_base(folder).tokenizer("ab").input_ids
    edit_config(folder, rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    if transformers.__version__.startswith("4."):
        with pytest.raises(InputError, match="would ignore its rope_theta 1000000.0"):
            load_base(folder)
    else:
        assert load_base(folder).model.config.rope_parameters["rope_theta"] == 1e6


def test_missing_tokenizer_only_where_it_is_needed(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    assert load_base(folder).tokenizer is None
    with pytest.raises(InputError, match="has no tokenizer"):
        load_base(folder, require_tokenizer=True)


@pytest.mark.parametrize("written", [b'{"a": ', b"[1]", b"\xff{}"])
def test_a_damaged_tokenizer_config_is_refused(folder: Path, written: bytes) -> None:
    (folder / "tokenizer_config.json").write_bytes(written)
    with pytest.raises(InputError, match="tokenizer_config.json (is not JSON|holds a JSON list)"):
        load_base(folder)


def test_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="someone/a-model is not a folder here, and cannot be had from the Hugging Face hub"):
        load_base("someone/a-model")
    with pytest.raises(InputError, match="not a folder, nor the form of a Hugging Face id"):
        load_base("/no/such/folder")
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(InputError, match="model.onnx is a file; a base is given by its folder"):
        load_base(tmp_path / "model.onnx")


def test_refused_arguments(folder: Path) -> None:
    with pytest.raises(InputError, match="dtype 'int4' is unknown"):
        load_base(folder, dtype="int4")
    with pytest.raises(InputError, match="device 'quantum' is unknown"):
        load_base(folder, device="quantum")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="torch finds no CUDA GPU here"):
            load_base(folder, device="cuda")
