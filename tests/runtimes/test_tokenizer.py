"""Tokenizer and streaming detokenizer against tokenizers and transformers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from toy_bundle import TEXTS, toy_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from runtimes.artifacts.manifest import ModelRecord
from runtimes.errors import BundleError, InputError
from runtimes.text import tried
from runtimes.text.tokenizer import Detokenizer, Tokenizer, check_token_ids

MODEL = {
    "name": "toy",
    "model_type": "toy",
    "fingerprint": "0",
    "vocab_size": 300,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "context_length": 64,
}


def sentencepiece_like(metaspace: bool) -> tokenizers.Tokenizer:
    """As converted Llama tokenizers are: spaces are U+2581, unknown characters fall back to bytes, the first space is stripped."""
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzTN.,é", "▁▁", "he", "▁t", "▁the", "qu", "ck"]
    merges = [("▁", "▁"), ("h", "e"), ("▁", "t"), ("▁t", "he"), ("q", "u"), ("c", "k")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


BACKENDS = {
    "byte-level": toy_tokenizer(),
    "replace-strip": sentencepiece_like(True),
    "metaspace": sentencepiece_like(False),
}


def wrap(backend: tokenizers.Tokenizer) -> Tokenizer:
    special = frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special)
    return Tokenizer(
        backend=backend, bos_token_id=0, eos_token_id=1, pad_token_id=None, stop_token_ids=frozenset({1}), special_token_ids=special
    )


def save(folder: Path, backend: tokenizers.Tokenizer | None = None, **files: object) -> Path:
    (backend or toy_tokenizer()).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


TEXT = st.text(st.sampled_from("the quick.,é世界🙂 \n") | st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=40)


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=150, deadline=None)
@example(prompt="", text="000\U00010000\x80\U00010000 ", cut=14, special=set())
@given(prompt=TEXT, text=TEXT, cut=st.integers(0, 60), special=st.sets(st.integers(0, 60), max_size=3))
def test_pieces_join_to_the_decoded_text(name: str, prompt: str, text: str, cut: int, special: set[int]) -> None:
    tokenizer = wrap(BACKENDS[name])
    ids = tokenizer.encode(prompt + text, add_special_tokens=False)
    ids = [i for position, token in enumerate(ids) for i in ([0, token] if position in special else [token])]
    context, tokens = ids[:cut], ids[cut:]
    head = tokenizer.decode(context)
    if head.endswith("\ufffd"):
        return  # the prompt was cut inside a character
    stream = Detokenizer(tokenizer, context)
    pieces = [*(stream.push(t) for t in tokens), stream.finish()]
    assert head + "".join(pieces) == tokenizer.decode(ids)
    assert not any(p.endswith("\ufffd") for p in pieces[:-1])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 290), max_size=30))
def test_any_byte_level_tokens_stream_to_what_they_decode_to(ids: list[int]) -> None:
    tokenizer = wrap(BACKENDS["byte-level"])
    stream = Detokenizer(tokenizer)
    assert "".join([*(stream.push(i) for i in ids), stream.finish()]) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_comes_in_one_piece() -> None:
    tokenizer = wrap(BACKENDS["byte-level"])
    ids = tokenizer.encode("🙂!")
    assert len(ids) == 5
    stream = Detokenizer(tokenizer)
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂", "!"]


def test_a_continuation_keeps_its_leading_space() -> None:
    tokenizer = wrap(BACKENDS["replace-strip"])
    tokens = [tokenizer.backend.token_to_id("▁the")]
    assert tokenizer.decode(tokens) == "the"
    assert Detokenizer(tokenizer, tokenizer.encode("on")).push(tokens[0]) == " the"


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
        {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False}},
    ],
)
@pytest.mark.parametrize("own_template", [False, True])
def test_special_tokens_are_added_as_transformers_adds_them(tmp_path: Path, config: dict, own_template: bool) -> None:
    backend = toy_tokenizer()
    if own_template:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", **config}
    save(tmp_path, backend, tokenizer_config=config)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference(text)["input_ids"]
        assert tokenizer.encode(text, add_special_tokens=False) == reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(reference(text)["input_ids"], skip_special_tokens=True)


def test_a_saved_tokenizer_that_pads_and_truncates_does_neither_here(tmp_path: Path) -> None:
    backend = toy_tokenizer()
    backend.enable_padding(length=40)
    backend.enable_truncation(5)
    tokenizer = Tokenizer.load(save(tmp_path, backend))
    assert tokenizer.encode(TEXTS[1]) == PreTrainedTokenizerFast(tokenizer_object=toy_tokenizer())(TEXTS[1])["input_ids"]


@pytest.mark.parametrize(
    ("files", "manifest_eos", "expected"),
    [
        ({"generation_config": {"eos_token_id": 7}}, (), {7}),
        ({"generation_config": {"eos_token_id": [7, 8]}}, (9,), {7, 8, 9}),
        ({"tokenizer_config": {"eos_token": "</s>"}}, (), {1}),
        ({"tokenizer_config": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": 7}}, (), {1, 7}),
        ({"special_tokens_map": {"eos_token": "</s>"}}, (), {1}),
        ({}, (), set()),
    ],
)
def test_stop_tokens(tmp_path: Path, files: dict, manifest_eos: tuple[int, ...], expected: set[int]) -> None:
    tokenizer = Tokenizer.load(save(tmp_path, **files), ModelRecord(**MODEL, eos_token_ids=manifest_eos))
    assert tokenizer.stop_token_ids == expected


def test_the_manifest_fills_in_what_the_files_do_not_say(tmp_path: Path) -> None:
    record = ModelRecord(**MODEL, bos_token_id=5, pad_token_id=6, eos_token_ids=(7,))
    tokenizer = Tokenizer.load(save(tmp_path), record)
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (5, 6, 7)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[]", "expected an object"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x'"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    save(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(BundleError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_token_ids_are_checked() -> None:
    assert check_token_ids([0, 9], 10, "prompt 0") == [0, 9]
    for ids in ([], [10], [-1]):
        with pytest.raises(InputError, match="prompt 0"):
            check_token_ids(ids, 10, "prompt 0")


def test_a_tokenizer_is_tried_in_another_process_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runs = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: runs.append(a) or run(*a, **k))
    for folder in ("one", "one", "two"):  # the third is another file of the same content
        (tmp_path / folder).mkdir(exist_ok=True)
        if not (tmp_path / folder / "tokenizer.json").exists():
            toy_tokenizer().save(str(tmp_path / folder / "tokenizer.json"))
        Tokenizer.load(tmp_path / folder)
    assert len(runs) == 1
    content = json.loads((tmp_path / "two" / "tokenizer.json").read_text())
    content["model"]["vocab"] = {}
    (tmp_path / "two" / "tokenizer.json").write_text(json.dumps(content))
    for _ in range(2):  # what was refused is not remembered
        with pytest.raises(BundleError, match="tokenizer.json cannot be read by tokenizers: .*; copy the bundle again"):
            Tokenizer.load(tmp_path / "two")
    assert len(runs) == 3


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.abort()", "it ends its reader with SIGABRT"),
        ("while True: pass", r"takes more than \d s to be read"),
        ("bytearray(1 << 40)", "MemoryError"),
    ],
)
def test_a_tokenizer_that_ends_its_reader(code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tried, "CODE", code)
    monkeypatch.setattr(tried, "SECONDS", 1.0)
    toy_tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BundleError, match=said):
        Tokenizer.load(tmp_path)
