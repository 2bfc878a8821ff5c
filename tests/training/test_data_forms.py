"""The forms of training data: what each is read as, which tokens are trained, and what a template cannot render."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from reft_export.base.load import base_from_memory
from reft_export.eager.steering import steered
from reft_export.training.data import TrainingData, forms_of, load_data
from reft_export.training.forms import read_record
from reft_export.training.settings import TrainSettings
from reft_export.training.tokenizing import IGNORED, Example
from reft_export.training.trainer import train
from runtimes.edits.adapter import load_adapter
from runtimes.errors import InputError

EOS = 257
TURNS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = TURNS.replace("{{ m['content'] }}", "{{ m['content'] if loop.last or m['role'] == 'user' else '..' }}")
ENDS_ONCE = TURNS.replace("{% if m['role'] == 'assistant' %}", "{% if m['role'] == 'assistant' and loop.last %}")
UNPROMPTED = TURNS.replace("{% if add_generation_prompt %}<assistant>{% endif %}", "")
INST = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"


def chat(*turns: str) -> dict[str, Any]:
    return {"messages": [dict(zip(("role", "content"), turn.split(":"), strict=True)) for turn in turns]}


def load(records: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, template: str | None = TURNS, **options: Any) -> TrainingData:
    tokenizer.chat_template = template
    return load_data(records, tokenizer, **{"max_length": 200, **options})


def text_of(tokenizer: PreTrainedTokenizerFast, example: Example) -> list[str]:
    return [tokenizer.decode(list(example.input_ids[start:end])) for start, end in example.trained]


def prompt_of(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    return tokenizer.decode(list(example.input_ids[: example.prompt_length]))


def test_every_form_is_recognised_by_its_keys(tokenizer: PreTrainedTokenizerFast) -> None:
    pair, text = {"prompt": "u", "completion": "a"}, {"text": "some words"}
    forms = {
        "prompt-completion": pair,
        "messages": chat("user:u", "assistant:a"),
        "text": text,
        "alpaca": {"instruction": "u", "input": "", "output": "a"},
        "sharegpt": {"id": 7, "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
    }
    data = load(list(forms.values()), tokenizer)
    assert forms_of(data.examples) == dict.fromkeys(forms, 1) and data.templated
    asked = {example.input_ids for example in data.examples if example.form != "text"}
    assert len(asked) == 1, "one question and its answer, in four forms"
    assert not load([text], tokenizer).templated
    with_input = {"instruction": "u", "input": "v", "output": "a", "system": "s"}
    assert read_record(with_input, "x")[1] == chat("system:s", "user:u\n\nv", "assistant:a")
    assert read_record({**pair, "id": 3}, "x", "prompt-completion") == ("prompt-completion", pair)
    for form, record in forms.items():
        normal = read_record(record, "x")[1]
        assert read_record(normal, "x")[1] == normal, "what a probe holds is read again"
        with pytest.raises(
            InputError, match=f"unknown keys ..score..; expected {form} lines like .*; --format {form} leaves other keys unread"
        ):
            read_record({**record, "score": 1}, "x")


def test_plain_text_is_trained_but_for_its_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    even, odd = load([{"text": "abcdefg"}, {"text": "abcdef"}], tokenizer).examples
    assert even.input_ids[-1] == EOS and even.prompt_length == 4 and odd.prompt_length == 4, "half, rounded up"
    assert even.labels == (IGNORED, *even.input_ids[1:]) and even.trained_tokens == 7
    (cut,) = load([{"text": "abcdefg"}], tokenizer, max_length=4).examples
    assert cut.truncated and cut.prompt_length == 2 and EOS not in cut.input_ids
    with pytest.raises(InputError, match=r"data\[0\]: the text has one token"):
        load([{"text": "a"}], tokenizer, max_length=1)


def test_every_answer_is_trained_where_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    line = chat("system:s", "user:u", "assistant:old", "user:v", "assistant:new")
    (last,), (both,) = (load([line], tokenizer, train_on=which).examples for which in ("last", "all"))
    assert last.input_ids == both.input_ids, "the same conversation"
    assert text_of(tokenizer, last) == ["new</s>"] and text_of(tokenizer, both) == ["old</s>", "new</s>"]
    assert prompt_of(tokenizer, both) == "<system>s<user>u<assistant>", "what positions see ends at the first trained answer"
    assert prompt_of(tokenizer, last).endswith("old</s>\n<user>v<assistant>")
    assert [i for i, label in enumerate(both.labels) if label != IGNORED] == [i for a, b in both.trained for i in range(a, b)]
    (cut,) = load([line], tokenizer, train_on="all", max_length=len(both.input_ids) - 5).examples
    assert text_of(tokenizer, cut) == ["old</s>"] and cut.truncated
    (single,) = load([chat("user:u", "assistant:a")], tokenizer, train_on="all").examples
    assert single.spans == () and text_of(tokenizer, single) == ["a</s>"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (FORGETFUL, "renders the answer in message 1 otherwise where it stands alone"),
        (ENDS_ONCE, "renders the answer in message 1 otherwise where it stands alone"),
        (TURNS.replace("%}<assistant>{", "%}<assistant><think>{"), "opens the answer in message 1 otherwise"),
    ],
)
def test_templates_whose_beginnings_are_not_the_wholes(tokenizer: PreTrainedTokenizerFast, template: str, said: str) -> None:
    line = chat("user:u", "assistant:old", "user:v", "assistant:new")
    with pytest.raises(InputError, match=rf"data\[0\]: the tokenizer's chat template {said}.*; pass --train-on last"):
        load([line], tokenizer, template, train_on="all")
    (example,) = load([line], tokenizer, template).examples
    assert text_of(tokenizer, example) == ["new</s>"]


def test_what_a_template_would_leave_out(tokenizer: PreTrainedTokenizerFast) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    line = chat("user:u", "assistant:", "tool:3", "assistant:three")
    line["messages"][1] = {"role": "assistant", "content": None, "tool_calls": [call]}
    (example,) = load([line | {"tools": [call]}], tokenizer, CALLS, train_on="all").examples
    assert text_of(tokenizer, example) == [json.dumps([call]) + "</s>", "three</s>"]
    assert prompt_of(tokenizer, example) == json.dumps([call]) + "<user>u<assistant>"
    for record, template, said in (
        (line, TURNS, "message 1 has tool_calls, which the tokenizer's chat template does not read"),
        (chat("user:u", "assistant:a") | {"tools": [call]}, TURNS, "has tools, which the tokenizer's chat template does not read"),
        (
            chat("system:be kind", "user:u", "assistant:a"),
            INST.replace("{% else", "{% elif m.role == 'system' %}{% else"),
            "leaves out message 0",
        ),
        (chat("user:u", "assistant:a"), UNPROMPTED, "has no generation prompt: it writes '<assistant>' before an answer"),
        (chat("assistant:a", "user:u", "assistant:b"), TURNS, "the first message is the assistant's"),
        ({"conversations": [{"from": "cat", "value": "u"}]}, TURNS, "turn 0 is from 'cat'; known: human, user, gpt"),
        ({"conversations": [{"from": "gpt", "value": "u", "weight": 0}]}, TURNS, "turn 0 must have exactly the keys from and value"),
        ({"instruction": "u", "out": "a"}, TURNS, "lacks ['output'] and has unknown keys ['out']; expected alpaca lines like"),
        ({"text": "u", "label": 1}, TURNS, "has unknown keys ['label']; expected text lines like"),
    ):
        with pytest.raises(InputError) as refused:
            load([record], tokenizer, template, train_on="all")
        assert str(refused.value).startswith("data[0]: ") and said in str(refused.value)
    (plain,) = load([chat("user:u", "assistant:a")], tokenizer, INST).examples
    assert text_of(tokenizer, plain) == [" a</s>"], "a template that needs no generation prompt"


def test_templates_that_trim_and_parts_that_join(tokenizer: PreTrainedTokenizerFast) -> None:
    trims = TURNS.replace("m['content'] }}", "m['content'] | trim }}")
    (example,) = load([chat("user:u", "assistant:  a b ", "user:v", "assistant: c")], tokenizer, trims, train_on="all").examples
    assert text_of(tokenizer, example) == ["a b</s>", "c</s>"]
    with pytest.raises(InputError, match="format 'csv' is unknown"):
        TrainSettings(format="csv")


@pytest.mark.parametrize("positions", ["f2+l2", "all"])
def test_the_loss_is_on_what_is_trained(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, positions: str) -> None:
    """A run's last held-out loss is transformers' own of the labels, under the saved adapter; and texts are probes as they are."""
    tokenizer.chat_template = TURNS
    base = base_from_memory(llama, tokenizer, name="tiny-llama")
    turns = ("user:what is {}?", "assistant:it is {}", "user:and then?", "assistant:more than {}")
    chats = [chat(*(turn.format(i) for turn in turns)) for i in range(4)]
    records = [*chats, *({"text": f"this is the text of {i}"} for i in range(4))]
    settings = TrainSettings(
        rank=2, layers="0;2", positions=positions, max_steps=2, batch_size=4, samples=0, eval_fraction=0.5, train_on="all", keep="last"
    )
    result = train(base, records, settings, tmp_path / "a")
    adapter = load_adapter(tmp_path / "a")
    assert all(probe in records for probe in adapter.probes) and {len(probe) for probe in adapter.probes} == {1}
    held_out = {record["text"] if "text" in record else record["messages"][0]["content"] for record in adapter.probes}
    examples = load_data(records, tokenizer, max_length=256, train_on="all").examples
    total, tokens = 0.0, 0
    for record, example in zip(records, examples, strict=True):
        if (record["text"] if "text" in record else record["messages"][0]["content"]) in held_out:
            with steered(llama, adapter) as steering, torch.no_grad():
                steering.prompt_length = [example.prompt_length]
                loss = llama(torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss
            total, tokens = total + float(loss) * example.trained_tokens, tokens + example.trained_tokens
    assert result.history[-1].eval_loss == pytest.approx(total / tokens, rel=1e-4)
