"""Rules that the host and the device each follow: on the same base both give the same tokens, ends, pads and limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny_encoders
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import GenerationConfig
from typer.testing import CliRunner

from reft_export.base.load import Base, load_base
from reft_export.base.model_record import model_record
from reft_export.base.token_rules import context_of, pad_token, stop_tokens
from reft_export.bundling.files import copy_tokenizer
from reft_export.bundling.genai import write_genai_config
from reft_export.bundling.tokenizer_files import without_indentation
from reft_export.cli.main import app
from reft_export.eager.steering import greedy_tokens
from reft_export.exporting.export import ExportSettings, export_bundle
from reft_export.training.data import collate, load_data
from reft_export.training.generation import greedy_samples
from reft_export.training.settings import TrainSettings, settings_like
from reft_export.training.trainer import train
from runtimes.artifacts.bundle import open_bundle
from runtimes.artifacts.manifest import ModelRecord
from runtimes.errors import InputError
from runtimes.generation import GenerationSettings, generate
from runtimes.ort.session import OrtSession
from runtimes.text.chat import ChatTemplate, template_for
from runtimes.text.prompts import encode
from runtimes.text.tokenizer import Detokenizer, Tokenizer

BOS, EOS, PAD, TURN, END, WORD = range(256, 262)
NAMED, NOTHING = MappingProxyType({"bos_token": "<s>", "eos_token": "</s>"}), MappingProxyType({})
SPECIAL = {"<s>": BOS, "</s>": EOS, "<pad>": PAD, "<|im_start|>": TURN, "<|im_end|>": END}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "none": None,
    "chatml": CHATML,
    "eos": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}",
    "bos": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }} {{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "no end": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    "word": "{% for m in messages %}{{ m['content'] }}<word>{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m['content'] | trim }}<|im_end|>{% endgeneration %}{% endfor %}",
    "no system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
    "json and date": "{{ strftime_now('%Y') }}{% for m in messages %}{{ m | tojson }}{% if loop.last %}{% break %}{% endif %}{% endfor %}"
    """{% if add_generation_prompt %}{{ '{"role": "assistant", "content": "' }}{% endif %}""",
    "named": [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "tools"}],
}
TEXTS = ("Hello there.", "a<word>b", "a <|im_end|> b", " two  spaces ", "é世🙂\n", "ends</s>", "n't do , that .")
USER = {"role": "user", "content": "Hi </s> you"}
CHATS = ([USER], [{"role": "system", "content": "Be brief."}, USER], [USER, {"role": "assistant", "content": "Yes"}, USER])


def byte_level(*, post: Any = None) -> Backend:
    """One token a byte; <word> is an added token that is not special."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | SPECIAL | {"<word>": WORD}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([tokenizers.AddedToken("<word>", normalized=False)])
    if post is not None:
        backend.post_processor = post
    return backend


def sentencepiece_like() -> Backend:
    """Spaces are U+2581, one stands in front, unknown characters are bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(250, 256)), "▁", *"abcdefghijklmnopqrstuvwxyz.H,", "▁t", "he"]
    backend = Backend(models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "t"), ("h", "e")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def added(single: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def make(model_folder: Path, tmp_path: Path):
    """(base, what a device reads of its bundle), by the files that the base's folder holds."""
    number = 0

    def make(
        *,
        backend: Backend | None = None,
        tokenizer: Mapping[str, Any] = NAMED,
        template: Any = None,
        config: Mapping[str, Any] = NOTHING,
        generation: dict[str, Any] | None = None,
        files: Mapping[str, str] = NOTHING,
    ) -> tuple[Base, Device]:
        nonlocal number
        number += 1
        folder = tmp_path / f"base{number}"
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(model_folder / "model.safetensors")
        written = json.loads((model_folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps({k: v for k, v in written.items() if v != "absent"}))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        (backend or byte_level()).save(str(folder / "tokenizer.json"))
        said = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer, **({} if template is None else {"chat_template": template})}
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(content)
        base = load_base(folder)
        return base, Device(base, tmp_path / f"bundle{number}")

    return make


class Device:
    """The tokenizer's side of a bundle, made as ``export`` makes it."""

    def __init__(self, base: Base, folder: Path) -> None:
        folder.mkdir()
        copy_tokenizer(base.folder, base.tokenizer, folder)
        self.folder, self.model = folder, model_record(base)
        self.tokenizer = Tokenizer.load(folder, self.model)
        self.template = ChatTemplate.load(folder)


def examples(base: Base, tmp_path: Path, *lines: dict[str, Any], chat: str = "auto", length: int = 400):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_data(path, base.tokenizer, max_length=length, chat_template=chat, stop_tokens=stop_tokens(base)).examples


# --- where an answer ends -------------------------------------------------------------------------

UNNAMED = {"bos_token": "<s>"}
NO_EOS = {"eos_token_id": None}
STOPS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "tokenizer only": ({"tokenizer": NAMED, "config": NO_EOS}, (EOS,)),
    "tokenizer beside another": ({"tokenizer": NAMED, "config": {"eos_token_id": END}}, (END, EOS)),
    "tokenizer beside the generation config's": ({"tokenizer": NAMED, "config": NO_EOS, "generation": {"eos_token_id": 5}}, (5, EOS)),
    "config only": ({"tokenizer": UNNAMED, "config": {"eos_token_id": 6}}, (6,)),
    "generation config only": ({"tokenizer": UNNAMED, "config": NO_EOS, "generation": {"eos_token_id": 7}}, (7,)),
    "lists": ({"tokenizer": NAMED, "config": {"eos_token_id": [END]}, "generation": {"eos_token_id": [6, 5]}}, (6, 5, EOS, END)),
    "config's list": ({"tokenizer": NAMED, "config": {"eos_token_id": [END, 5]}}, (END, 5, EOS)),
    "a word as the default": ({"tokenizer": NAMED, "config": {"eos_token_id": 2}, "generation": {"eos_token_id": END}}, (END, EOS)),
    "another end of turn": ({"tokenizer": NAMED, "template": CHATML}, (EOS, END)),
    "an end of turn that is a word": ({"tokenizer": NAMED, "template": TEMPLATES["word"]}, (EOS,)),
    "white space before the end": ({"tokenizer": NAMED, "template": TEMPLATES["bos"]}, (EOS,)),
    "no end of turn": ({"tokenizer": NAMED, "template": TEMPLATES["no end"]}, (EOS,)),
    "a template that refuses": ({"tokenizer": NAMED, "template": "{{ raise_exception('no') }}"}, (EOS,)),
    "outside the vocabulary": ({"tokenizer": NAMED, "config": {"eos_token_id": [-1, 320, EOS]}}, (EOS,)),
    "none at all": ({"tokenizer": UNNAMED, "config": NO_EOS}, ()),
}


@pytest.mark.parametrize("case", STOPS)
def test_training_and_device_stop_at_the_same_tokens(make, tmp_path: Path, case: str) -> None:
    options, expected = STOPS[case]
    base, device = make(**options)
    assert stop_tokens(base) == device.model.eos_token_ids == expected
    assert device.tokenizer.stop_token_ids == set(expected)
    lines = {"prompt": "ab", "completion": "cd"}
    if "refuses" in case:
        return
    if not expected:
        with pytest.raises(InputError, match="no eos token to end completions with"):
            examples(base, tmp_path, lines)
        return
    (example,) = examples(base, tmp_path, lines)
    completion = example.input_ids[example.prompt_length :]
    # What training teaches as the end stops the device, and nothing before it does.
    assert [token in device.tokenizer.stop_token_ids for token in completion] == [False] * (len(completion) - 1) + [True]


@pytest.mark.parametrize("case", STOPS)
def test_genai_config_has_the_manifests_stop_tokens(make, tmp_path: Path, case: str) -> None:
    import onnx_ir as ir

    options, expected = STOPS[case]
    _, device = make(**options)
    key = ir.Value(name="past_key_values.0.key", shape=ir.Shape(["batch", 2, "past", 16]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Model(ir.Graph([key], [], nodes=[], opset_imports={"": 20}), ir_version=10)
    assert write_genai_config(device.folder, graph, device.model, slots="graph", logits="all") == "supported"
    written = json.loads((device.folder / "genai_config.json").read_text())["model"]
    assert written["eos_token_id"] == (expected[0] if len(expected) == 1 else list(expected))
    assert written["pad_token_id"] == device.model.pad_token_id == PAD and written["bos_token_id"] == BOS


def test_a_manifest_that_holds_the_generation_configs_only(make) -> None:
    """As bundles were written before: what the tokenizer's file says is added."""
    _, device = make(tokenizer=NAMED, config=NO_EOS, generation={"eos_token_id": END})
    old = replace(device.model, eos_token_ids=(END,))
    assert Tokenizer.load(device.folder, old).stop_token_ids == {END, EOS}
    assert Tokenizer.load(device.folder).stop_token_ids == {END, EOS}


def test_the_end_of_turn_that_a_device_finds_is_the_hosts(make) -> None:
    """``fold`` reads it without transformers."""
    for name, template in TEMPLATES.items():
        base, device = make(template=template, config=NO_EOS, tokenizer=UNNAMED)
        found = None if device.template is None else device.template.end_of_turn(device.tokenizer)
        assert stop_tokens(base) == (() if found is None else (found,)), name


def test_an_answer_that_ends_at_once(make) -> None:
    """The first greedy token is the stop token: both sides give out no text, and the token itself."""
    base, _ = make(config=NO_EOS)
    ids = torch.tensor([base.tokenizer("ab")["input_ids"]])
    ((first,),) = greedy_tokens(base.model, ids, None, 1)
    base, device = make(generation={"eos_token_id": first})
    assert first in device.tokenizer.stop_token_ids
    assert greedy_tokens(base.model, ids, None, 5, eos=stop_tokens(base)) == [[first]]
    example = type("Example", (), {"input_ids": tuple(ids[0].tolist()), "prompt_length": 2, "marks": (), "source": ()})
    (sample,) = greedy_samples(base, [example])
    assert sample.text == "" and sample.prompt == "ab"


# --- what a prompt is -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("post", [None, "<s> $A", "$A </s>", "<s> $A </s>"], ids=["bare", "bos", "eos", "both"])
def test_prompts_are_the_same_tokens(make, tmp_path: Path, name: str, post: str | None) -> None:
    base, device = make(backend=byte_level(post=None if post is None else added(post)), template=TEMPLATES[name])
    assert (device.template is None) == (TEMPLATES[name] is None)
    for text in TEXTS:
        lines = {"prompt": text, "completion": "x"}
        for chat in ("auto", "never"):
            (example,) = examples(base, tmp_path, lines, chat=chat)
            template = device.template if chat == "auto" else None
            asked = encode([{"role": "user", "content": text}], device.tokenizer, template, None)
            assert list(example.input_ids[: example.prompt_length]) == asked
            assert asked.count(BOS) <= 1
            assert template is not None or asked[-1:] != [EOS] or text.endswith("</s>")


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "none"])
def test_conversations_are_the_same_tokens(make, tmp_path: Path, name: str) -> None:
    base, device = make(template=TEMPLATES[name], backend=byte_level(post=added("<s> $A")))
    for chat in CHATS:
        line = {"messages": [*chat, {"role": "assistant", "content": "Fine."}]}
        if name == "no system" and chat[0]["role"] == "system":
            with pytest.raises(InputError, match="no system"):
                examples(base, tmp_path, line)
            with pytest.raises(InputError, match="no system"):
                encode(chat, device.tokenizer, device.template, None)
            continue
        (example,) = examples(base, tmp_path, line)
        assert list(example.input_ids[: example.prompt_length]) == encode(chat, device.tokenizer, device.template, None)
        if chat[0]["role"] == "system":
            system, rest = chat[0]["content"], list(chat[1:])
            assert encode(rest, device.tokenizer, device.template, system) == encode(chat, device.tokenizer, device.template, None)
        for generation in (True, False):
            theirs = base.tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=generation)
            assert device.template.render(chat, add_generation_prompt=generation) == theirs


def test_where_templates_lie(make) -> None:
    for files in (
        {"chat_template.jinja": CHATML},
        {"chat_template.jinja": CHATML, "additional_chat_templates/tool_use.jinja": "tools"},
        {"additional_chat_templates/default.jinja": CHATML},
        {"additional_chat_templates/other.jinja": "other"},
    ):
        for template in (None, "config's own", [{"name": "default", "template": "config's own"}]):
            base, device = make(files=files, template=template)
            theirs = base.tokenizer.chat_template
            assert device.template.templates == ({"default": theirs} if isinstance(theirs, str) else theirs)


CONFIGS: dict[str, dict[str, Any]] = {
    "add_bos_token": {"add_bos_token": True},
    "add_no_bos_token": {"add_bos_token": False},
    "add_eos_token": {"add_bos_token": True, "add_eos_token": True},
    "split special tokens": {"split_special_tokens": True},
    "clean up": {"clean_up_tokenization_spaces": True},
    "prefix space": {"add_prefix_space": True},
    "class": {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True},
    "class that adds": {"tokenizer_class": "GPT2TokenizerFast", "add_bos_token": True},
    "class that normalizes": {"tokenizer_class": "Qwen2TokenizerFast"},
    "class with special tokens of its own": {"tokenizer_class": "GemmaTokenizerFast", "eos_token": None},
    "added in the config": {"added_tokens_decoder": {"262": {"content": "Hello", "special": True}}},
    "word made special": {"eos_token": "<word>"},
    "words made special": {"additional_special_tokens": ["<word>"]},
    "a special token with a name": {"extra_special_tokens": {"image_token": "<word>"}},
    "truncates": {"model_max_length": 4, "padding_side": "right", "truncation_side": "left"},
}


GEMMA = "class with special tokens of its own"
"""It needs a vocabulary with an unknown token."""


@pytest.mark.parametrize(
    ("case", "kind"), [(c, k) for c in CONFIGS for k in ("byte", "sentencepiece", "truncating") if c != GEMMA or k == "sentencepiece"]
)
def test_a_tokenizers_configuration_is_read_the_same(make, tmp_path: Path, case: str, kind: str) -> None:
    """transformers may rebuild a tokenizer by its class's name; the bundle holds what came out of it."""
    backend = sentencepiece_like() if kind == "sentencepiece" else byte_level()
    if kind == "truncating":
        backend.enable_truncation(3)
        backend.enable_padding(length=9)
    template = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}{{ unk_token }}{{ image_token }}"
    base, device = make(backend=backend, tokenizer={**NAMED, **CONFIGS[case]}, template=template)
    for text in TEXTS:
        for special in (True, False):
            ids = base.tokenizer(text, add_special_tokens=special)["input_ids"]
            assert device.tokenizer.encode(text, add_special_tokens=special) == ids
            # Without cleaning up, as training's samples are shown: a stream cannot take back a space.
            for skip in (True, False):
                theirs = base.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert device.tokenizer.decode(ids, skip_special_tokens=skip) == theirs
        stream = Detokenizer(device.tokenizer)
        plain = device.tokenizer.encode(text, add_special_tokens=False)
        assert "".join([*map(stream.push, plain), stream.finish()]) == device.tokenizer.decode(plain)
    chat = [{"role": "user", "content": "x"}]
    assert device.template.render(chat) == base.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert device.tokenizer.eos_token_id == base.tokenizer.eos_token_id or base.tokenizer.eos_token_id is None


ODD = ("  \n\t {", '"\n   "', "\\\n", "a\r\n \u2028 b")


def test_files_that_are_read_the_same_are_copied_byte_for_byte(make) -> None:
    """But for tokenizer.json's indentation: what stands in its strings, spaces and escaped line breaks too, is the base's."""
    content = json.loads(byte_level(post=added("<s> $A")).to_str())
    content["added_tokens"] += [{**content["added_tokens"][0], "id": WORD + 1 + i, "content": text} for i, text in enumerate(ODD)]
    written = json.dumps(content, indent=7)  # as nobody's serializer would
    base, device = make(template=CHATML, generation={"eos_token_id": END}, files={"tokenizer.json": written})
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert (device.folder / name).read_bytes() == (base.folder / name).read_bytes()
    shipped = (device.folder / "tokenizer.json").read_bytes()
    assert shipped == written.replace("\n", "").replace(" " * 7, "").encode() and json.loads(shipped) == content
    for text in (*ODD, *(f"a{odd}b" for odd in ODD)):
        assert device.tokenizer.encode(text) == base.tokenizer(text)["input_ids"]


VALUES = st.recursive(
    st.none() | st.text() | st.floats(allow_nan=False), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10
)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_indentation_is_no_part_of_json(value) -> None:
    for written in (json.dumps(value, indent="\t"), json.dumps(value, indent=3, ensure_ascii=False).replace("\n", "\r\n")):
        shipped = without_indentation(written.encode("utf-8", "surrogatepass"))
        assert json.loads(shipped.decode("utf-8", "surrogatepass")) == value and b"\n" not in shipped


@pytest.mark.parametrize(
    ("chat", "trained", "templated"),
    [("auto", True, True), ("auto", False, False), ("auto", None, True), ("always", False, True), ("never", True, False)],
)
def test_prompts_reach_an_adapter_as_in_its_training(make, tmp_path: Path, chat: str, trained: bool | None, templated: bool) -> None:
    """train --chat-template never: the device leaves the template out, too, unless it is told otherwise."""
    _, device = make(template=CHATML)
    training = {} if trained is None else {"data": {"chat_template": trained}}
    bundle = SimpleNamespace(folder=device.folder, adapter_record=lambda name: SimpleNamespace(training=training))
    assert (template_for(bundle, "a", chat) is not None) == templated
    assert (template_for(bundle, None, chat) is None) == (chat == "never")


# --- pads, limits ---------------------------------------------------------------------------------

PADS: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "none": ({}, {"pad_token_id": None}, None),
    "eos": ({"pad_token": "</s>"}, {"pad_token_id": None}, EOS),
    "the config's eos": ({}, {"pad_token_id": EOS}, EOS),
    "0": ({}, {"pad_token_id": 0}, 0),
    "two": ({"pad_token": "<pad>"}, {"pad_token_id": 0}, 0),
    "outside": ({"pad_token": "<pad>"}, {"pad_token_id": -1}, PAD),
}


@pytest.mark.parametrize("case", PADS)
def test_pads_are_the_same_and_change_nothing(make, tmp_path: Path, case: str) -> None:
    tokenizer, config, expected = PADS[case]
    base, device = make(tokenizer={**NAMED, **tokenizer}, config=config)
    assert pad_token(base) == device.model.pad_token_id == device.tokenizer.pad_token_id == expected
    rows = examples(base, tmp_path, {"prompt": "ab", "completion": "c"}, {"prompt": "abcdef", "completion": "gh"})
    batch = collate(rows, pad_token_id=0 if expected is None else expected)
    # A pad that is the end token is no token of the completion: the end is learned once, and pads never.
    assert (batch["labels"][0] != -100).sum() == 2 and batch["labels"][0][batch["attention_mask"][0] == 0].eq(-100).all()
    with torch.no_grad():
        padded = base.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, : len(rows[0].input_ids)]
        alone = base.model(input_ids=torch.tensor([rows[0].input_ids])).logits[0]
    assert (padded - alone).abs().max() <= 2e-5 * alone.abs().max()


def test_an_end_token_inside_a_prompt_ends_nothing(make, tmp_path: Path) -> None:
    base, device = make(template=CHATML)
    (example,) = examples(base, tmp_path, {"prompt": "a</s>b<|im_end|>", "completion": "c</s>d"})
    prompt = example.input_ids[: example.prompt_length]
    assert EOS in prompt and prompt.count(END) == 2
    assert list(prompt) == encode([{"role": "user", "content": "a</s>b<|im_end|>"}], device.tokenizer, device.template, None)
    assert example.input_ids[-1] == END and EOS in example.input_ids[example.prompt_length : -1]


@pytest.mark.parametrize(
    ("family", "overrides", "expected"),
    [
        ("llama", {}, tiny.CONTEXT),
        ("gpt2", {}, tiny.CONTEXT),
        ("mpt", {}, tiny.CONTEXT),
        ("mpt", {"max_seq_len": 96}, 96),
        ("bloom", {"max_position_embeddings": None}, 2048),
    ],
)
def test_the_context_is_the_same(tmp_path: Path, family: str, overrides: dict, expected: int) -> None:
    from reft_export.base.token_rules import DEFAULT_CONTEXT
    from reft_export.folding.graph_record import stated_config as _config
    from reft_export.folding.graph_record import stated_context as _context

    base = load_base(tiny.save_base(tmp_path / family, family, **overrides))
    stated = _context(_config(base.folder))
    assert context_of(base) == model_record(base).context_length == (stated or DEFAULT_CONTEXT) == expected


def test_prompts_that_do_not_fit_are_refused_on_both_sides(make, tmp_path: Path) -> None:
    base, device = make(config={"max_position_embeddings": 16})
    record: ModelRecord = device.model
    assert record.context_length == 16
    fits, full = "a" * 15, "a" * 16
    assert len(examples(base, tmp_path, {"prompt": fits, "completion": "b"}, length=16)) == 1
    with pytest.raises(InputError, match="the prompt has 16 tokens, which leaves none of 16"):
        examples(base, tmp_path, {"prompt": full, "completion": "b"}, length=16)
    session = SimpleNamespace(bundle=SimpleNamespace(manifest=SimpleNamespace(model=record)))
    with pytest.raises(InputError, match="has 16 tokens, which with 1 new ones exceed the context"):
        generate(session, device.tokenizer, [full], GenerationSettings(max_new_tokens=1))


def test_a_tokenizer_with_more_tokens_than_the_model(make, tmp_path: Path) -> None:
    from runtimes.text.tokenizer import check_token_ids

    backend = byte_level()
    backend.add_special_tokens([f"<extra{i}>" for i in range(80)])
    base, device = make(backend=backend)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a<extra79>", "completion": "b"}) + "\n")
    with pytest.raises(InputError, match=r"data.jsonl:1: token id 341 is outside the model's vocabulary of 320"):
        train(base, path, TrainSettings(max_steps=1), tmp_path / "adapter")
    with pytest.raises(InputError, match="token id 341, outside the model's vocabulary of 320"):
        check_token_ids(device.tokenizer.encode("a<extra79>"), device.model.vocab_size, "the prompt")


def test_generation_config_of_transformers_itself(make) -> None:
    """Where generation_config.json is missing transformers makes one of config.json; what it stops at, we stop at."""
    base, device = make(config={"eos_token_id": [EOS, 65]})
    assert isinstance(base.model.generation_config, GenerationConfig)
    assert set(base.model.generation_config.eos_token_id) <= device.tokenizer.stop_token_ids


# --- classifiers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_classifiers_texts_are_the_same_tokens(tmp_path: Path, family: str) -> None:
    """Framed alike; what training would cut, and says so, a device refuses."""
    from reft_export.training.labelled_data import load_labelled

    base = load_base(tiny_encoders.save_base(tmp_path / family, family))
    device = Device(base, tmp_path / "bundle")
    pairs = [(a, b) for a in ("Hello there.", "é世 <s> x") for b in (None, "and more", "a" * 20)]
    lines = [{"text": a, "label": 0, **({} if b is None else {"text_pair": b})} for a, b in pairs]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"text": "a" * 1000, "label": 1}]))
    context = device.model.context_length
    *fitting, cut = load_labelled(path, base.tokenizer, base.info.labels, max_length=context).examples
    assert [e.text for e in fitting] == [device.tokenizer.encode_text(a, b) for a, b in pairs]
    assert cut.truncated and len(cut.text) == context < len(device.tokenizer.encode_text("a" * 1000))
    assert pad_token(base) == base.model.config.pad_token_id == device.model.pad_token_id


# --- end to end -----------------------------------------------------------------------------------


@pytest.fixture
def both(make, tmp_path: Path):
    """(bundle folder, results of training): of a base whose turns end in a token that no config names, an adapter of chats and one of
    plain prompts."""
    base, _ = make(template=CHATML, config=NO_EOS, generation={"eos_token_id": EOS})
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "completion": "ok"}) + "\n" for p in ("ab", "cd", "ef", "gh")))
    settings = TrainSettings(
        layers="2", rank=16, positions="all", lr=0.01, max_steps=80, batch_size=4, samples=2, dtype="float32", device="cpu"
    )
    chats = train(base, data, settings, tmp_path / "chats")
    plain = train(base, data, replace(settings, max_steps=1, samples=0, chat_template="never"), tmp_path / "plain")
    export_bundle(str(base.folder), [tmp_path / "chats", tmp_path / "plain"], tmp_path / "out", ExportSettings(), report=lambda _: None)
    return tmp_path / "out", chats, plain


@pytest.mark.slow
def test_what_training_teaches_is_what_the_bundle_does(both, tmp_path: Path) -> None:
    """The answer's end stops the device, though only the chat template knows it; and prompts reach each adapter as in its training."""
    folder, chats, plain = both
    bundle = open_bundle(folder)
    assert bundle.manifest.model.eos_token_ids == (EOS, END)
    assert json.loads((folder / "genai_config.json").read_text())["model"]["eos_token_id"] == [EOS, END]
    tokenizer, template = Tokenizer.load(folder, bundle.manifest.model), template_for(bundle, "chats")
    prompts = [encode([{"role": "user", "content": text}], tokenizer, template, None) for text in ("ab", "cd")]
    session = OrtSession(bundle, adapter="chats", threads=1)
    answers = generate(session, tokenizer, prompts, GenerationSettings(max_new_tokens=12))
    assert [(a.text, a.finish_reason, a.tokens[-1]) for a in answers] == [("ok", "stop", END)] * 2
    assert [sample.text for sample in chats.samples_after] == ["ok"] * 2 != [sample.text for sample in chats.samples_before]

    def tokens(*options: str) -> int:
        done = CliRunner().invoke(app, ["run", str(folder), "-p", "ab", "-n", "1", "--json", *options])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)["prompt_tokens"]

    bare, templated = len("ab"), len("user\nab\nassistant\n") + 3
    assert tokens("-a", "plain") == bare == tokens("-a", "plain", "--chat", "never") == tokens("--chat", "never")
    assert tokens() == templated == tokens("-a", "chats") == tokens("-a", "plain", "--chat", "always")
    assert settings_like(plain.adapter).chat_template == "never" and settings_like(chats.adapter).chat_template == "auto"
    lines = tmp_path / "chat.jsonl"
    lines.write_text(json.dumps({"messages": [USER, {"role": "assistant", "content": "x"}, USER]}) + "\n")
    refused = CliRunner().invoke(app, ["run", str(folder), "--prompts", str(lines), "-a", "plain"])
    assert refused.exit_code == 2 and "its adapter was trained without (--chat always renders it)" in " ".join(refused.output.split())
