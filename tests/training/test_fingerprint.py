"""The fingerprint: what leaves it alone, what changes it, what a difference is called, and the former version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_encoders
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reseal import reseal
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from reft_export.base.adapters import check_fit
from reft_export.base.config import canonical_config
from reft_export.base.fingerprint import fingerprint, identify
from reft_export.base.load import Base, base_from_memory, load_base, outline_base
from reft_export.base.model_folder import fingerprint_v1, memory_fingerprint_v1
from reft_export.base.stored import SAMPLE_VALUES, SAMPLES
from runtimes.artifacts.task_names import TEXT_GENERATION
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.edits.same_base import grouped, separate, tensor_differences
from runtimes.errors import AdapterError

FIXTURE = Path(__file__).parents[1] / "interop" / "fixtures" / "base-llama-tiny"
FIXTURE_V1 = "2f4e2597f3c65187ecd08752a6817e3203d780e8311e86d0b2fb47738a6e04cc"
"""As the releases before fingerprints had a version recorded it."""
FIXTURE_V2 = "v2_70b39a8bd3bf28ae18ee65bb89578cf558e882e7b7ca3e9d8345718d6ad8bf4f"
"""By transformers 4.57 and 5.23 alike: another value makes every adapter there is one for another base."""

UP = "model.layers.1.mlp.up_proj.weight"
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its values fit in bfloat16, its embedding is tied."""
    return _rounded(tiny.save_base(tmp_path_factory.mktemp("bases") / "tiny", tie_word_embeddings=True), torch.bfloat16)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def _rounded(folder: Path, dtype: torch.dtype) -> Path:
    edit_weights(folder, lambda weights: {name: value.to(dtype).float() for name, value in weights.items()})
    return folder


def edit_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    weights = change(load_file(folder / "model.safetensors"))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "removed"}))


def one(change: Callable[[torch.Tensor], torch.Tensor], name: str = UP) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda weights: weights | {name: change(weights[name])})


def in_dtype(dtype: torch.dtype) -> Callable[[Path], None]:
    return lambda folder: edit_weights(folder, lambda weights: {name: value.to(dtype) for name, value in weights.items()})


def in_shards(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(sorted(whole))}
    for file in set(files.values()):
        save_file({name: whole[name] for name, of in files.items() if of == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def as_bin(folder: Path) -> None:
    """As .bin checkpoints are: the tied head is in them, too."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


def with_head(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})


def of_the_bare_model(folder: Path) -> None:
    edit_weights(folder, lambda weights: {name.removeprefix("model."): value for name, value in weights.items()})


def with_tables(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})


SAME: dict[str, Callable[[Path], None]] = {
    "pad": lambda folder: edit_config(folder, pad_token_id=3),
    "no pad": lambda folder: edit_config(folder, pad_token_id="removed"),
    "eos": lambda folder: edit_config(folder, eos_token_id=[5, 7]),
    "bos": lambda folder: edit_config(folder, bos_token_id=7),
    "run": lambda folder: edit_config(folder, use_cache=False, attention_dropout=0.1, dtype="float16", transformers_version="9.9"),
    "made": lambda folder: edit_config(folder, initializer_range=0.5, _name_or_path="elsewhere", architectures=["LlamaForCausalLM"]),
    "samples": lambda folder: edit_config(folder, temperature=0.3, do_sample=True),
    "a key's default": lambda folder: edit_config(folder, attention_bias="removed", mlp_bias="removed", head_dim="removed"),
    "shards": in_shards,
    "bfloat16": in_dtype(torch.bfloat16),
    "float64": in_dtype(torch.float64),
    ".bin": as_bin,
    "a stored head that is tied": with_head,
    "names of the bare model": of_the_bare_model,
    "tables of older releases": with_tables,
}


@pytest.mark.parametrize("case", SAME)
def test_what_computes_the_same_has_one_fingerprint(folder: Path, original: Path, case: str) -> None:
    SAME[case](folder)
    assert fingerprint(folder) == fingerprint(original)
    if case != "a stored head that is tied":  # which a config that does not tie it means
        return
    edit_config(folder, tie_word_embeddings=False)
    assert fingerprint(folder) != fingerprint(original)


OTHER: dict[str, tuple[Callable[[Path], None], str]] = {
    "rope_theta": (
        lambda f: edit_config(f, rope_theta=99.0, rope_parameters="removed"),
        "config.json's rope_parameters.rope_theta is 99, expected 10000",
    ),
    "rope scaling": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "linear", "factor": 2.0}, rope_theta=1e4, rope_parameters="removed"),
        "rope_parameters.factor is 2, expected the family's default, rope_parameters.rope_type is linear, expected the family's default",
    ),
    "norm": (lambda f: edit_config(f, rms_norm_eps=1e-3), "config.json's rms_norm_eps is 0.001, expected"),
    "heads": (lambda f: edit_config(f, num_key_value_heads=4), "num_key_value_heads is 4, expected 2"),
    "one value": (one(lambda w: w * (1 + 1e-6)), f"it has other values in {UP}"),
    "rounded": (in_dtype(torch.float16), "it has other values in"),
    "another shape": (one(lambda w: w.reshape(w.shape[::-1])), f"it has other values in {UP}"),
    "another name": (
        lambda f: edit_weights(f, lambda w: {n.replace("layers.1.mlp.up", "layers.1.mlp.upper"): v for n, v in w.items()}),
        "it lacks layers.1.mlp.up_proj.weight; it also stores layers.1.mlp.upper_proj.weight",
    ),
    "both": (
        lambda f: (one(lambda w: -w)(f), edit_config(f, hidden_act="gelu")),
        "; config.json's hidden_act is gelu, expected the family's default",
    ),
}
CONFIG_ALONE = ("rope_theta", "rope scaling", "norm", "heads")


@pytest.mark.parametrize("case", OTHER)
def test_what_computes_something_else_is_named(folder: Path, original: Path, case: str) -> None:
    adapter = tiny.random_adapter(outline_base(original).info)
    if case == "rounded":  # values that fit in bfloat16 alone
        one(lambda w: w * 2.0**-30)(folder)
    change, said = OTHER[case]
    change(folder)
    found = identify(folder)
    assert found.fingerprint != fingerprint(original)
    base = Base(
        model=load_base(original).model,
        tokenizer=None,
        info=replace(adapter.base, name="other", fingerprint=found.fingerprint, parts=found.parts),
        task=TEXT_GENERATION,
        folder=folder,
    )
    said = said.replace("model.layers", "layers")  # without the prefix that some checkpoints lack
    with pytest.raises(AdapterError) as error:
        check_fit("style", adapter, base)
    assert said in str(error.value) and "\n" not in str(error.value)
    # Equal weights, and nothing else, are offered and taken.
    assert ("--accept-base" in str(error.value)) == (case in CONFIG_ALONE)
    if case in CONFIG_ALONE:
        check_fit("style", adapter, base, accept_base=True)
    else:
        with pytest.raises(AdapterError, match="pass the base it was trained on$"):
            check_fit("style", adapter, base, accept_base=True)


def test_the_pad_counts_where_positions_are_numbered_from_it(tmp_path: Path) -> None:
    encoder = tiny_encoders.save_base(tmp_path / "roberta", "roberta")
    before = fingerprint(encoder)
    edit_config(encoder, eos_token_id=3)
    assert fingerprint(encoder) == before
    edit_config(encoder, pad_token_id=7)
    assert fingerprint(encoder) != before
    for kind, counts in (("xglm", True), ("llama", False)):  # decoders
        pads = [canonical_config({"model_type": kind, "pad_token_id": pad}, "config.json") for pad in (5, 7)]
        assert (pads[0] != pads[1]) == counts, kind


RELEASES = {
    "llama3": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 8.0}},
        {"rope_parameters": {"rope_theta": 500000, "rope_type": "linear", "factor": 8}},
    ),
    "gemma3_text": (
        {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None},
        {
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            },
            "tie_word_embeddings": True,
        },
    ),
    "stablelm": (
        {"rope_theta": 10000, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    "qwen3_moe": ({"num_experts": 3, "rope_theta": 1e4}, {"num_local_experts": 3, "rope_parameters": {"rope_theta": 1e4}}),
    "bert": ({"position_embedding_type": "absolute"}, {}),
}
"""config.json as transformers 4 and 5 write it, by family."""


@pytest.mark.parametrize("family", RELEASES)
def test_both_releases_spell_one_config(family: str) -> None:
    kind = "llama" if family == "llama3" else family
    older, newer = (canonical_config({"model_type": kind, "hidden_size": 64, **keys}, "config.json") for keys in RELEASES[family])
    assert older == newer and older["model_type"] == kind


def test_every_sampled_value_counts(folder: Path) -> None:
    """Both ends and the blocks between them; a tensor that is short enough, whole."""
    before, count = fingerprint(folder), SAMPLES * SAMPLE_VALUES
    for name, size in (("model.norm.weight", 64), ("model.embed_tokens.weight", None)):
        whole = load_file(folder / "model.safetensors")[name].numel()
        assert (whole == size) if size else whole > count
        for place in (0, whole - 1, *(range(0, size, 7) if size else (SAMPLE_VALUES - 1,))):

            def changed(w: torch.Tensor, place: int = place) -> torch.Tensor:
                w = w.clone()
                w.view(-1)[place] += 1
                return w

            one(changed, name)(folder)
            assert fingerprint(folder) != before
            one(lambda w, place=place: w - torch.nn.functional.one_hot(torch.tensor(place), w.numel()).view(w.shape), name)(folder)
            assert fingerprint(folder) == before


@settings(max_examples=100)
@given(st.dictionaries(st.from_regex(r"(a|b|l)(\.(0|1|2|3|x)){0,3}", fullmatch=True), st.text("0123456789abcdef", min_size=8, max_size=8)))
def test_grouped_tensors_come_apart_again(digests: dict[str, str]) -> None:
    assert separate(grouped(digests)) == digests
    assert tensor_differences(grouped(digests), grouped({})) == ([] if not digests else tensor_differences(grouped(digests), {}))


def test_thirty_layers_take_a_line_for_each_kind_of_weight() -> None:
    digests = {f"layers.{i}.{part}.weight": f"{i:08x}" for i in range(30) for part in ("q", "k")} | {"layers.2.extra.weight": "f" * 8}
    assert list(grouped(digests)) == ["layers.2.extra.weight", "layers.[30].k.weight", "layers.[30].q.weight"]


# --- the former version ---------------------------------------------------------------------------


def former(folder: Path, adapter: Path) -> None:
    """Writes the adapter as it was written before fingerprints had a version."""
    fingerprint = {"fingerprint": fingerprint_v1(folder)}
    reseal(adapter, lambda config: (config["base"].update(fingerprint), config["base"].pop("parts")))


def test_fingerprints_are_what_they_were() -> None:
    assert fingerprint_v1(FIXTURE) == FIXTURE_V1
    assert fingerprint(FIXTURE) == FIXTURE_V2


def test_adapters_with_the_former_fingerprint_are_recognised(folder: Path, tmp_path: Path) -> None:
    save_adapter(tiny.random_adapter(outline_base(folder).info), tmp_path / "style")
    former(folder, tmp_path / "style")
    adapter, base = load_adapter(tmp_path / "style"), load_base(folder)
    assert adapter.base.parts is None
    check_fit("style", adapter, base)
    one(lambda w: -w)(folder)
    with pytest.raises(AdapterError, match=r"\(fingerprint [0-9a-f]{12}\), this base is tiny \(v2_\w{9}\); pass the base it was .*on$"):
        check_fit("style", adapter, load_base(folder), accept_base=True)


def test_models_in_memory_have_both(llama: PreTrainedModel) -> None:
    base = base_from_memory(llama, name="made here")
    adapter = tiny.random_adapter(replace(base.info, fingerprint=memory_fingerprint_v1(llama), parts=None))
    check_fit("style", adapter, base)
    check_fit("style", tiny.random_adapter(base.info), base)


def test_an_adapter_carries_what_it_needs_to_tell(folder: Path, tmp_path: Path) -> None:
    info = outline_base(folder).info
    save_adapter(tiny.random_adapter(info), tmp_path / "style")
    assert load_adapter(tmp_path / "style").base == info == load_base(folder).info
    written = json.loads((tmp_path / "style" / "adapter.json").read_text())["base"]["parts"]
    assert written == asdict(info.parts) and np.isin(["model_type", "rope_parameters"], list(written["config"])).all()
