"""What a line of ``run --prompts`` says of its own answer: it is answered as a run of its own would be, or refused with file and line."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from toy_bundle import ADAPTERS, ToyDecoder, change_manifest, toy_tokenizer, write_toy_bundle
from toy_engine import install_doubles, write_toy_engine
from typer.testing import CliRunner, Result

from reft_export.cli.main import app
from reft_export.evaluation.checker import load_task
from runtimes.artifacts.bundle import Bundle
from runtimes.generation import GenerationSettings, generate
from runtimes.ort.session import OrtSession
from runtimes.text.prompts import batches_of_alike, in_order
from runtimes.text.tokenizer import Tokenizer

DECODER = ToyDecoder.random()
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
USERS_ONLY = "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% endif %}{% endfor %}<assistant>"
LINES: list[dict[str, Any]] = [
    {"prompt": "The fox", "adapter": "ends"},
    {"prompt": "The fox", "adapter": None},
    {"prompt": "The fox"},
    {"prompt": "Hi", "max_new_tokens": 3, "adapter": "all"},
    {"prompt": "a lazy dog", "temperature": 1.5, "seed": 7, "adapter": "ends"},
    {"prompt": "a lazy dog", "temperature": 1.5, "seed": 7, "adapter": "ends"},
    {"prompt": "a lazy dog", "temperature": 2, "top_k": 20, "top_p": 0.9, "seed": 8},
    {"prompt": "Hi", "repetition_penalty": 1e6, "max_new_tokens": 12},
    {"prompt": "The fox", "adapter": "ends", "strength": 0.5},
    {"prompt": "Hi", "adapter": "all", "strength": 0},
    {"prompt": "Hi", "adapter": "all", "strength": 1},
    {"prompt": "a lazy dog jumps over", "temperature": 1.5, "stop": ["e", "o"], "seed": 3},
    {"prompt": "quick", "stop": "e", "temperature": 4.0, "seed": 4, "max_new_tokens": 20, "adapter": "prompt"},
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_template(write_toy_bundle(tmp_path_factory.mktemp("toy") / "chat"), TURNS)


def with_template(bundle: Bundle, template: str) -> Bundle:
    (bundle.folder / "chat_template.jinja").write_text(template)
    return change_manifest(bundle)


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def records(*arguments: object) -> list[dict[str, Any]]:
    done = cli(*arguments)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def refused(result: Result, match: str, code: int = 2) -> None:
    assert result.exit_code == code and result.stdout == "", result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(match, lines[0]), result.stderr


def options_of(line: dict[str, Any], adapter: str | None) -> list[str]:
    """The line as the options of a run of its own; ``adapter`` where it names none."""
    named = line.get("adapter", adapter)
    options = [] if named is None else ["-a", named]
    for key, value in line.items():
        if key not in ("prompt", "adapter"):
            for each in value if isinstance(value, list) else [value]:
                options += [f"--{key.replace('_', '-')}", str(each)]
    return ["-p", line["prompt"], *options]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("adapter", [None, "prompt"])
def test_every_line_is_answered_as_alone(bundle: Bundle, adapter: str | None, batch_size: int, tmp_path: Path) -> None:
    order = list(range(len(LINES)))
    random.Random(batch_size).shuffle(order)
    lines = [LINES[i] for i in order]
    common = ["-n", 8, *([] if adapter is None else ["-a", adapter])]
    got = records("run", bundle.folder, "--prompts", write(tmp_path / "x.jsonl", lines), "--batch-size", batch_size, *common)
    assert [r["index"] for r in got] == list(range(len(lines)))
    assert [r["adapter"] for r in got] == [line.get("adapter", adapter) for line in lines]
    tokenizer = Tokenizer.load(bundle.folder, bundle.manifest.model)
    for line, record in zip(lines, got, strict=True):
        count = [] if "max_new_tokens" in line else ["-n", "8"]
        (alone,) = records("run", bundle.folder, "--json", *options_of(line, adapter), *count)
        assert {**record, "index": 0} == alone, line
        if {*line} <= {"prompt", "adapter", "max_new_tokens"}:
            ids = toy_tokenizer().encode(line["prompt"]).ids
            tokens = DECODER.greedy(ids, line.get("max_new_tokens", 8), ADAPTERS.get(line.get("adapter", adapter)))
            assert record["text"] == tokenizer.decode(tokens), line


@pytest.mark.parametrize("form", ["copied", "in place", "no position_ids"])
@pytest.mark.parametrize("strength", [0.5, 0.0, -1.0])
def test_a_strength(tmp_path: Path, form: str, strength: float) -> None:
    """Of whatever adapter a line has, in batches of any lengths."""
    bundle = write_toy_bundle(tmp_path / "b", in_place=form == "in place", position_ids=form != "no position_ids")
    lines = [{"prompt": p, "adapter": a} for p in ("The fox", "Hi", "a lazy dog", "Hi") for a in ("ends", None, "all")]
    got = records("run", bundle.folder, "--prompts", write(tmp_path / "x.jsonl", lines), "-n", 6, "--strength", strength)
    tokenizer = Tokenizer.load(bundle.folder, bundle.manifest.model)
    for line, record in zip(lines, got, strict=True):
        want = DECODER.greedy(toy_tokenizer().encode(line["prompt"]).ids, 6, ADAPTERS.get(line["adapter"]), strength)
        assert record["text"] == tokenizer.decode(want), (line, record)
        assert record.get("strength") == (strength if line["adapter"] else None)


def test_a_strength_of_each_line(bundle: Bundle, tmp_path: Path) -> None:
    """In place of the command's; a line without an adapter has none."""
    lines = [{"prompt": "The fox", "adapter": a, **s} for a in ("ends", "all", None) for s in ({}, {"strength": 0.5}, {"strength": 1})]
    lines = [line for line in lines if line["adapter"] or "strength" not in line]
    got = records("run", bundle.folder, "--prompts", write(tmp_path / "x.jsonl", lines), "-n", 6, "--strength", -1)
    tokenizer = Tokenizer.load(bundle.folder, bundle.manifest.model)
    for line, record in zip(lines, got, strict=True):
        strength = line.get("strength", -1)
        want = DECODER.greedy(toy_tokenizer().encode("The fox").ids, 6, ADAPTERS.get(line["adapter"]), strength)
        assert record["text"] == tokenizer.decode(want), (line, record)
        assert record.get("strength", 1) == (strength if line["adapter"] else 1)


def test_strengths_that_cannot_be(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = ["-p", "Hi", "-n", 2]
    refused(cli("run", bundle.folder, *one, "--strength", 0.5), r"--strength 0.5 is an adapter's, and none steers; name one with --adapter")
    refused(cli("run", bundle.folder, *one, "-a", "all", "--strength", "nan"), "the strength of all is nan, expected a finite number")
    refused(
        cli("run", bundle.folder, *one, "-a", "all", "--strength", "1e300"), r"strength 1e\+300 takes all beyond float32 at 0.block_output"
    )
    install_doubles(monkeypatch, "tensorrt-rtx")
    engine = write_toy_engine(bundle, tmp_path / "e", target="tensorrt-rtx")
    refused(
        cli("run", engine.folder, *one, "-a", "all", "--strength", 0.5), r"--strength 0.5: .* is an engine, .* make a bank of the bundle"
    )
    for folder, line, match in (
        (bundle.folder, {"strength": 0.5}, r"x.jsonl:2: strength is an adapter's, and none steers this line"),
        (bundle.folder, {"adapter": None, "strength": 1}, r"x.jsonl:2: strength is an adapter's"),
        (bundle.folder, {"adapter": "all", "strength": "1"}, r'x.jsonl:2: strength is "1", expected a number'),
        (bundle.folder, {"adapter": "all", "strength": 1e300}, r"x.jsonl:2: .*takes all beyond float32"),
        (engine.folder, {"adapter": "all", "strength": 0.5}, r"x.jsonl:2: strength 0.5: .* is an engine"),
    ):
        lines = write(tmp_path / "x.jsonl", [{"prompt": "a"}, {"prompt": "Hi", **line}])
        refused(cli("run", folder, "--prompts", lines, "-n", 2), match)


def test_the_same_lines_on_an_engine(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, columns and contexts are those it was built for: lines of other lengths and counts fit, each alone as together."""
    install_doubles(monkeypatch, "tensorrt-rtx")
    engine = write_toy_engine(bundle, tmp_path / "e", target="tensorrt-rtx", batch=3, sequence=16, context=32)
    long = {"prompt": "a lazy dog jumps over the quick brown fox"}
    length = len(toy_tokenizer().encode(long["prompt"]).ids)
    taken = [line for line in LINES if line.get("strength", 1) == 1]
    lines = write(tmp_path / "x.jsonl", [*taken, long | {"max_new_tokens": 32 - length}, {"prompt": "a", "max_new_tokens": 31}])
    both = [records("run", where, "--prompts", lines, "-n", 8) for where in (bundle.folder, engine.folder)]
    assert both[0] == both[1]
    frozen = write_toy_engine(bundle, tmp_path / "f", target="tensorrt-rtx", freeze="ends")
    named = write(tmp_path / "named.jsonl", [{"prompt": "Hi", "adapter": "ends"}])
    assert records("run", frozen.folder, "--prompts", named, "-n", 4) == records("run", bundle.folder, "--prompts", named, "-n", 4)
    other = write(tmp_path / "other.jsonl", [{"prompt": "Hi", "adapter": "ends"}, {"prompt": "Hi", "adapter": None}])
    refused(cli("run", frozen.folder, "--prompts", other, "-n", 4), r"other.jsonl:2: .* never runs without an adapter")


def test_samples_do_not_depend_on_the_batch(bundle: Bundle, tmp_path: Path) -> None:
    """The same prompt again is another sample of the command's seed, in whichever batch it runs; a line's own seed
    is that of the line alone."""
    lines = write(tmp_path / "x.jsonl", [{"prompt": "The fox"}, {"prompt": "Hi", "adapter": "ends"}, *[{"prompt": "The fox"}] * 3])
    sampled = ["-n", 8, "--temperature", 2, "--seed", 5]
    got = [[r["text"] for r in records("run", bundle.folder, "--prompts", lines, "--batch-size", size, *sampled)] for size in (1, 2, 16)]
    assert got[0] == got[1] == got[2]
    assert len({got[0][i] for i in (0, 2, 3, 4)}) == 4
    own = write(tmp_path / "own.jsonl", [{"prompt": "The fox"}, {"prompt": "The fox", "seed": 5}, {"prompt": "The fox", "seed": 6}])
    first, second, third = (r["text"] for r in records("run", bundle.folder, "--prompts", own, *sampled))
    assert first == second == got[0][0] != third


def test_settings_of_each_row(bundle: Bundle) -> None:
    session, tokenizer = OrtSession(bundle, threads=1), Tokenizer.load(bundle.folder, bundle.manifest.model)
    prompts = ["The fox", "Hi", "a lazy dog"]
    each = [
        GenerationSettings(max_new_tokens=4),
        GenerationSettings(max_new_tokens=9, temperature=2.0, seed=1),
        GenerationSettings(max_new_tokens=4, temperature=2.0, seed=1, sample=2, stop=("e",)),
    ]
    together = generate(session, tokenizer, prompts, each)
    assert together == [generate(session, tokenizer, [p], [s])[0] for p, s in zip(prompts, each, strict=True)]
    assert [g.finish_reason for g in together[:2]] == ["length", "length"] and [len(g.tokens) for g in together[:2]] == [4, 9]
    with pytest.raises(Exception, match="3 prompts and 2 settings are given"):
        generate(session, tokenizer, prompts, each[:2])


def test_a_system_message_of_its_own(chat: Bundle, tmp_path: Path) -> None:
    lines = [{"prompt": "Hi"}, {"prompt": "Hi", "system": "be kind"}, {"prompt": "Hi", "system": None}]
    lines += [{"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "Hi"}], "system": None}]
    got = records("run", chat.folder, "--prompts", write(tmp_path / "x.jsonl", lines), "-n", 6, "--system", "quick")
    single = ("run", chat.folder, "-p", "Hi", "-n", 6, "--json")
    wanted = [records(*single, *system)[0] for system in (["--system", "quick"], ["--system", "be kind"], [])]
    assert [r | {"index": 0} for r in got] == [*wanted, wanted[1]]
    assert len({r["prompt_tokens"] for r in wanted}) == 3


MESSAGE = {"role": "user", "content": "Hi"}
REFUSED = {
    "unknown key": (
        {"prompt": "x", "temprature": 1},
        r"has unknown keys \['temprature'\]; known are \['adapter', 'json_schema', 'max_new_tokens'",
    ),
    "id": ({"prompt": "x", "id": 3}, r"has unknown keys \['id'\]"),
    "tools": ({"messages": [MESSAGE], "tools": []}, r"has unknown keys \['tools'\]"),
    "completion": ({"prompt": "x", "completion": "y"}, "completion is a training line's, which answers it already"),
    "text": ({"text": "x"}, "text is a classifier's"),
    "both": ({"prompt": "x", "messages": [MESSAGE]}, "has messages and a prompt, of which one would not be read"),
    "key twice": ('{"prompt": "x", "prompt": "y"}', "key 'prompt' is given twice"),
    "adapter": ({"prompt": "x", "adapter": "nope"}, "has no adapter 'nope'; it has: ends, prompt, all"),
    "adapter type": ({"prompt": "x", "adapter": 5}, "adapter is 5, expected an adapter's name, or null for the base"),
    "adapter list": ({"prompt": "x", "adapter": ["ends", "all"]}, r'adapter is \["ends", "all"\], expected an adapter\'s name'),
    "tokens": ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
    "schema": ({"prompt": "x", "json_schema": "object"}, 'json_schema is "object", expected a JSON schema, or null for none'),
    "no whole number": ({"prompt": "x", "max_new_tokens": 1.5}, "max_new_tokens is 1.5, expected a whole number"),
    "true": ({"prompt": "x", "max_new_tokens": True}, "max_new_tokens is true, expected a whole number"),
    "null": ({"prompt": "x", "temperature": None}, "temperature is null, expected a number"),
    "text for a number": ({"prompt": "x", "temperature": "hot"}, 'temperature is "hot", expected a number'),
    "temperature": ({"prompt": "x", "temperature": -1}, r"temperature is -1, expected 0 \(greedy\) or more"),
    "infinite": ('{"prompt": "x", "temperature": 1e999}', "temperature is inf, expected 0"),
    "not a number": ('{"prompt": "x", "repetition_penalty": NaN}', "repetition_penalty is nan, expected above 0"),
    "no float": ('{"prompt": "x", "temperature": 1' + "0" * 400 + "}", "temperature is 10+, expected a number"),
    "top_k": ({"prompt": "x", "top_k": -3}, r"top_k is -3, expected 0 \(no limit\) or more"),
    "top_p": ({"prompt": "x", "top_p": 0}, "top_p is 0, expected above 0"),
    "seed": ({"prompt": "x", "seed": -1}, "seed is -1, expected 0 or more"),
    "stop": ({"prompt": "x", "stop": [""]}, r"stop is \('',\), expected texts that are not empty"),
    "stop type": ({"prompt": "x", "stop": [1]}, r"stop is \[1\], expected a text, or a list of texts"),
    "system type": ({"prompt": "x", "system": 1}, "system is 1, expected a text, or null for none"),
    "system": ({"prompt": "x", "system": "be kind"}, "a system message needs a chat template"),
    "does not fit": ({"prompt": "x", "max_new_tokens": 64}, "64 new ones do not fit .* lower its max_new_tokens"),
    "tool calls": ({"messages": [{**MESSAGE, "tool_calls": []}]}, "message 0 must have exactly the keys .*, got .*'tool_calls'"),
    "name": ({"messages": [{**MESSAGE, "name": "Eve"}]}, "message 0 must have exactly the keys"),
    "no content": ({"messages": [MESSAGE, {"role": "assistant"}]}, r"message 1 must have exactly the keys .*, got \['role'\]"),
    "content in parts": ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content of message 0 is list, expected a str"),
    "no user": ({"messages": [{"role": "system", "content": "x"}]}, "a message of the system needs a chat template"),
    "turns": ({"messages": [MESSAGE, MESSAGE]}, "a conversation of several messages needs a chat template"),
    "no object": ([1], "expected .*prompt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_line_costs_one_line_before_any_answer(bundle: Bundle, case: str, tmp_path: Path) -> None:
    line, match = REFUSED[case]
    path = write(tmp_path / "x.jsonl", [{"prompt": "fine"}, "", line])
    refused(cli("run", bundle.folder, "--prompts", path, "-n", 4), f"x.jsonl:3: .*{match}")


def test_messages_that_no_template_would_show(chat: Bundle, tmp_path: Path) -> None:
    own = {"messages": [{"role": "system", "content": "a"}, MESSAGE]}
    two = write(tmp_path / "two.jsonl", [{"prompt": "fine"}, own])
    assert cli("run", chat.folder, "--prompts", two, "-n", 4).exit_code == 0
    refused(cli("run", chat.folder, "--prompts", two, "-n", 4, "--system", "b"), "two.jsonl:2: there are two system messages")
    both = write(two, [{**own, "system": "b"}])
    refused(cli("run", chat.folder, "--prompts", both, "-n", 4), "two.jsonl:1: there are two system messages")
    silent = with_template(write_toy_bundle(tmp_path / "silent"), USERS_ONLY)
    refused(cli("run", silent.folder, "-p", "Hi", "--system", "b", "-n", 4), "leaves out message 0 .of the system., 'b'")
    turns = {"messages": [MESSAGE, {"role": "assistant", "content": "yes"}, MESSAGE]}
    refused(cli("run", silent.folder, "--prompts", write(two, [turns]), "-n", 4), "two.jsonl:1: .*leaves out message 1 .of the assistant.")
    assert cli("run", silent.folder, "-p", "Hi", "-n", 4).exit_code == 0


def test_answers_that_fit_a_schema(bundle: Bundle, tmp_path: Path) -> None:
    """The option's, or the line's own, or none."""
    own, given = {"type": "string", "pattern": "^[a-f]{3,8}$"}, {"type": "integer", "minimum": 3, "maximum": 99}
    file = write(tmp_path / "schema.json", [given])
    lines = [
        {"prompt": "Hi", "adapter": name, **more} for name in (None, "all") for more in ({}, {"json_schema": own}, {"json_schema": None})
    ]
    answers = records("run", bundle.folder, "--prompts", write(tmp_path / "x.jsonl", lines), "-n", 12, "--json-schema", file)
    free = records("run", bundle.folder, "--prompts", write(tmp_path / "y.jsonl", [lines[2], lines[5]]), "-n", 12)
    for i, answer in enumerate(answers):
        if i % 3 == 2:
            assert answer["text"] == free[i // 3]["text"]
            continue
        assert answer["finish_reason"] == "stop" and jsonschema_rs.is_valid((given, own)[i % 3], json.loads(answer["text"]))
    assert cli("run", bundle.folder, "-p", "Hi", "-n", 12, "--json-schema", file).stdout.strip() == answers[0]["text"]
    refused(
        cli("run", bundle.folder, "-p", "Hi", "--json-schema", write(file, [{"not": {}}])), "schema.json: no answer can be held to this"
    )
    refused(cli("run", bundle.folder, "-p", "Hi", "--json-schema", write(file, ["{"])), "schema.json")
    refused(cli("run", bundle.folder, "-p", "Hi", "--json-schema", tmp_path / "none.json"), "none.json")
    bad = write(tmp_path / "x.jsonl", [{"prompt": "fine"}, {"prompt": "Hi", "json_schema": {"not": {}}}])
    refused(cli("run", bundle.folder, "--prompts", bad, "-n", 4), "x.jsonl:2: no answer can be held")


def test_a_checkers_prompts_are_training_lines(tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text("def judge(prompt, answer):\n    return True\n")
    turns = {"messages": [MESSAGE, {"role": "assistant", "content": "b"}]}
    data = write(tmp_path / "x.jsonl", [{"prompt": "a", "completion": "b"}, turns])
    assert [m for _, m in load_task(f"{judge}:judge", data).prompts] == [({"role": "user", "content": "a"},), (MESSAGE,)]
    for line in ({"prompt": "a", "temperature": 1}, {"prompt": "a", "adapter": "x"}):
        with pytest.raises(Exception, match=r"x.jsonl:1: has unknown keys \['(temperature|adapter)'\]; known are \['completion'"):
            load_task(f"{judge}:judge", write(data, [line]))


def test_batches_of_alike_come_back_in_order() -> None:
    keys = ["a", "b", "a", "a", "b", "c", "a"]
    batches = batches_of_alike(keys, 2)
    assert batches == [[0, 2], [1, 4], [3, 6], [5]]
    assert list(in_order((i, keys[i]) for batch in batches for i in batch)) == list(enumerate(keys))
    held = in_order(iter([(1, "b"), (0, "a"), (2, "c")]))
    assert [next(held) for _ in range(3)] == [(0, "a"), (1, "b"), (2, "c")]
