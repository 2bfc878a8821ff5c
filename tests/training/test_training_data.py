"""The JSONL reader: what the model sees, where the loss is, and every error with its line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from reft_export.training.data import TrainingData, collate, load_data, split
from reft_export.training.tokenizing import IGNORED
from runtimes.errors import InputError

EOS, PAD = 257, 258
TURNS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}</s>\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
REASONING = TURNS.replace("{% if add_generation_prompt %}<assistant>", "{% if add_generation_prompt %}<assistant><think>")
STRICT = "{{ raise_exception('roles must alternate') }}"
PAIR = {"prompt": "ab", "completion": "cd"}


def ids(text: str, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def load(path: Path, tokenizer: PreTrainedTokenizerFast, **options: object) -> TrainingData:
    return load_data(path, tokenizer, **{"max_length": 64, **options})


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.chat_template = TURNS
    return tokenizer


def test_plain_pairs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "d.jsonl", PAIR, "", {"prompt": "ab", "completion": "cd</s>"})
    data = load(path, tokenizer)
    first, third = data.examples
    assert first.input_ids == (*ids("abcd", tokenizer), EOS) == third.input_ids
    assert first.prompt_length == 2 and first.labels == (IGNORED, IGNORED, *ids("cd", tokenizer), EOS)
    assert (first.line, third.line) == (1, 3) and not data.templated and data.truncated_lines == ()


def test_special_tokens_of_the_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """bos in front as at inference; an eos that the tokenizer adds itself neither ends the prompt nor is doubled."""
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", EOS)])
    (example,) = load(write(tmp_path / "d.jsonl", PAIR), tokenizer).examples
    assert example.input_ids == (256, *ids("abcd", tokenizer), EOS) and example.prompt_length == 3


def test_pairs_go_through_the_template_unless_told_not_to(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "d.jsonl", PAIR)
    for mode in ("auto", "always"):
        data = load(path, chat, chat_template=mode)
        (example,) = data.examples
        prompt = ids("<user>ab<assistant>", chat)
        # The template ended the answer with eos; the line feed behind it is not trained on, and eos is not doubled.
        assert data.templated and example.input_ids == (*prompt, *ids("cd", chat), EOS)
        assert example.prompt_length == len(prompt)
    data = load(path, chat, chat_template="never")
    assert not data.templated and data.examples[0].input_ids == (*ids("abcd", chat), EOS)


def test_messages_train_the_last_answer_only(tmp_path: Path, chat: PreTrainedTokenizerFast) -> None:
    turns = [("system", "s"), ("user", "u"), ("assistant", "old"), ("user", "v"), ("assistant", "new")]
    path = write(tmp_path / "d.jsonl", {"messages": [{"role": r, "content": c} for r, c in turns]})
    (example,) = load(path, chat).examples
    prompt = ids("<system>s<user>u<assistant>old</s>\n<user>v<assistant>", chat)
    assert example.input_ids == (*prompt, *ids("new", chat), EOS)
    assert example.labels == (IGNORED,) * len(prompt) + (*ids("new", chat), EOS)


def test_template_whose_generation_prompt_is_no_prefix(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = REASONING
    (example,) = load(write(tmp_path / "d.jsonl", PAIR), tokenizer).examples
    assert example.input_ids == (*ids("<user>ab<assistant><think>cd", tokenizer), EOS)


def test_end_tokens_beside_eos(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    end = tokenizer.convert_tokens_to_ids("!")
    path = write(tmp_path / "d.jsonl", {"prompt": "a", "completion": "b!\n </s>"}, {"prompt": "a", "completion": "b!c"})
    first, second = load(path, tokenizer, stop_tokens=[end]).examples
    assert first.input_ids == ids("ab!", tokenizer) and second.input_ids == (*ids("ab!c", tokenizer), EOS)


def test_truncation_is_told(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "d.jsonl", PAIR, {"prompt": "ab", "completion": "cdefgh"})
    data = load(path, tokenizer, max_length=5)
    assert data.truncated_lines == (f"{path}:2",) and data.examples[1].input_ids == ids("abcde", tokenizer)
    assert not data.examples[0].truncated


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n" + json.dumps(PAIR).encode())
    assert [e.line for e in load(path, tokenizer).examples] == [1, 3]


def chat_line(*messages: object) -> dict[str, object]:
    return {"messages": list(messages)}


USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
REFUSED = {
    "broken": ('{"prompt": "a", ', "not JSON"),
    "array": ([1], "holds a list, expected a JSON object"),
    "unknown key": ({**PAIR, "id": 3}, "has unknown keys ['id']"),
    "missing key": ({"prompt": "a"}, "lacks ['completion']"),
    "both": ({"promt": "a", "completion": "b"}, "lacks ['prompt'] and has unknown keys ['promt']"),
    "key twice": ('{"prompt": "a", "completion": "b", "completion": "c"}', "key 'completion' is given twice"),
    "role twice": ('{"messages": [{"role": "user", "role": "system", "content": "u"}]}', "key 'role' is given twice"),
    "both forms": ({**PAIR, "messages": []}, "has unknown keys ['completion', 'prompt']"),
    "not text": ({"prompt": 3, "completion": "b"}, "prompt is int, expected a string"),
    "empty prompt": ({"prompt": " ", "completion": "b"}, "prompt is empty"),
    "empty completion": ({"prompt": "a", "completion": ""}, "completion is empty"),
    "half a surrogate": ('{"prompt": "a\\ud83d", "completion": "b"}', "half of a surrogate pair"),
    "long prompt": ({"prompt": "a" * 64, "completion": "b"}, "the prompt has 64 tokens, which leaves none of 64"),
    "no template": (chat_line(USER, ANSWER), "messages need a chat template, and the tokenizer has none"),
    "one message": (chat_line(ANSWER), "a list of at least one message and the assistant's answer"),
    "no list": ({"messages": "hi"}, "a list of at least one message"),
    "message keys": (chat_line({**USER, "weight": 1}, ANSWER), "message 0 must have the keys role and content, and may have name"),
    "no object": (chat_line("u", ANSWER), "message 0 must have the keys role and content, and may have name"),
    "last is the user's": (chat_line(USER, ANSWER, USER), "the last message is the user's"),
    "empty answer": (chat_line(USER, {"role": "assistant", "content": ""}), "content of message 1 is empty"),
    "content in parts": (chat_line({"role": "user", "content": []}, ANSWER), "content of message 0 is list"),
    "many digits": ('{"prompt": ' + "1" * 5000 + "}", "not JSON that can be read"),
    "too deep": ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_every_bad_line_is_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, case: str) -> None:
    line, message = REFUSED[case]
    path = write(tmp_path / "data.jsonl", PAIR, PAIR, line, PAIR)
    with pytest.raises(InputError) as error:
        load(path, tokenizer)
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_several_files_are_one_behind_the_other(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    one = write(tmp_path / "one.jsonl", PAIR)
    two = write(tmp_path / "two.jsonl", "", {"prompt": "x", "completion": "yz"})
    both = write(tmp_path / "both.jsonl", PAIR, "", {"prompt": "x", "completion": "yz"})
    data, whole = load_data([one, two], tokenizer, max_length=64), load(both, tokenizer)
    assert [e.input_ids for e in data.examples] == [e.input_ids for e in whole.examples]
    assert [e.where for e in data.examples] == [f"{one}:1", f"{two}:2"]
    assert [f.file for f in data.files] == ["one.jsonl", "two.jsonl"]
    assert [f.sha256 for f in data.files] == [hashlib.sha256(p.read_bytes()).hexdigest() for p in (one, two)]
    turned = load_data([two, one], tokenizer, max_length=64)
    digests = [d.digest for d in (data, turned, load(one, tokenizer), load(two, tokenizer))]
    assert len(set(digests)) == 4 and digests[2] == data.files[0].sha256
    for bad, said in (("{", "two.jsonl:1: not JSON"), ("", "two.jsonl has no examples")):
        write(two, bad)
        with pytest.raises(InputError, match=said):
            load_data([one, two], tokenizer, max_length=64)
    with pytest.raises(InputError, match="there is no training data"):
        load_data([], tokenizer, max_length=64)


def test_other_refusals(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(InputError, match="data.jsonl:2: byte 13 is not UTF-8"):
        load(path, tokenizer)
    for empty in ("", "\n \n"):
        path.write_text(empty)
        with pytest.raises(InputError, match="data.jsonl has no examples"):
            load(path, tokenizer)
    with pytest.raises(InputError, match="no.jsonl is not a file"):
        load(tmp_path / "no.jsonl", tokenizer)
    write(path, PAIR)
    with pytest.raises(InputError, match="chat_template is 'always', and the tokenizer has no chat template"):
        load(path, tokenizer, chat_template="always")
    write(path, PAIR, chat_line(USER, ANSWER))
    tokenizer.chat_template = TURNS
    with pytest.raises(InputError, match="data.jsonl:2: messages need a chat template, and chat_template is 'never'"):
        load(path, tokenizer, chat_template="never")
    tokenizer.chat_template = STRICT
    with pytest.raises(InputError, match="data.jsonl:1: the tokenizer's chat template refuses .* roles must alternate"):
        load(path, tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no eos token"):
        load(path, tokenizer)


def test_split_is_seeded_and_complete(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = load(write(tmp_path / "d.jsonl", *[PAIR] * 20), tokenizer).examples
    training, held_out = split(examples, 0.2, seed=1)
    assert len(held_out) == 4 and sorted([*training, *held_out], key=lambda e: e.line) == list(examples)
    assert split(examples, 0.2, seed=1) == (training, held_out) != split(examples, 0.2, seed=2)
    assert split(examples, 0.0, seed=1) == (list(examples), [])
    assert len(split(examples, 0.001, seed=1)[1]) == 1
    with pytest.raises(InputError, match="leaves none to train on"):
        split(examples[:1], 0.5, seed=1)


def test_collate_pads_on_the_right(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "d.jsonl", PAIR, {"prompt": "a", "completion": "b"})
    batch = collate(load(path, tokenizer).examples, pad_token_id=PAD)
    a, b, c, d = ids("abcd", tokenizer)
    assert batch["input_ids"].tolist() == [[a, b, c, d, EOS], [a, b, EOS, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, c, d, EOS], [-100, b, EOS, -100, -100]]
    assert batch["prompt_length"].tolist() == [2, 1]
