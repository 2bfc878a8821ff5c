"""Answers of the toy decoder, whose weights are random, fit the schema that they are held to; hostile schemas are refused in time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from toy_bundle import ADAPTERS, VOCABULARY, ToyDecoder, write_toy_bundle

from runtimes.artifacts.bundle import Bundle
from runtimes.bank import AdapterBank
from runtimes.batching import Batcher
from runtimes.errors import InputError
from runtimes.generation import GenerationSettings, generate, probabilities
from runtimes.ort.session import OrtSession
from runtimes.text import grammars as module
from runtimes.text.grammars import JSON_OBJECT, KEPT, Grammar, Grammars
from runtimes.text.tokenizer import Tokenizer

NAMES = (None, *ADAPTERS)
SHORT: dict[str, Mapping[str, Any]] = {
    "pattern": {"type": "string", "pattern": "^[a-f]{3,8}$"},
    "length": {"type": "string", "minLength": 2, "maxLength": 6},
    "integer": {"type": "integer", "minimum": 3, "maximum": 1234},
    "enum": {"enum": ["x", "yy", None, 3, True, "\u00e9\u4f60\U0001f642"]},
    "either": {"anyOf": [{"type": "boolean"}, {"type": "number", "minimum": 0, "maximum": 9, "multipleOf": 0.5}]},
    "reference": {"$defs": {"a": {"const": "a"}}, "anyOf": [{"$ref": "#/$defs/a"}, {"const": "b"}]},
}
"""Whose values are a few tokens, whatever the model likes best."""
RECORD = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "yy", None]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_toy_bundle(tmp_path_factory.mktemp("grammars") / "bundle", in_place=True, adapters=ADAPTERS)


@pytest.fixture(scope="module")
def tokenizer(bundle: Bundle) -> Tokenizer:
    return Tokenizer.load(bundle.folder, bundle.manifest.model)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCABULARY)


@pytest.fixture(scope="module")
def session(bundle: Bundle) -> OrtSession:
    return OrtSession(bundle, threads=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", SHORT)
def test_every_answer_fits_its_schema(session: OrtSession, tokenizer: Tokenizer, grammars: Grammars, kind: str, name: str | None) -> None:
    settings = GenerationSettings(max_new_tokens=40, grammar=grammars.json_schema(SHORT[kind]))
    ways = [{"temperature": 0.0}, {"temperature": 0.0, "repetition_penalty": 1.5}]
    ways += [{"temperature": 2.0, "seed": seed, "top_k": 5, "top_p": 0.9} for seed in range(3)]
    session.set_adapter(name)
    for way in ways:
        answer = generate(session, tokenizer, ["Hi"], replace(settings, **way))[0]
        assert answer.finish_reason == "stop"
        assert jsonschema_rs.is_valid(SHORT[kind], json.loads(answer.text)), answer.text


def test_an_answer_is_whole_or_ends_by_its_length(session: OrtSession, tokenizer: Tokenizer, grammars: Grammars) -> None:
    settings = GenerationSettings(max_new_tokens=50, temperature=1, seed=1, grammar=grammars.json_schema(RECORD))
    for name in NAMES:
        session.set_adapter(name)
        for answer in generate(session, tokenizer, ["Hi"] * 4, settings) + generate(
            session, tokenizer, ["Hi"], replace(settings, temperature=0)
        ):
            assert answer.finish_reason == "stop" and jsonschema_rs.is_valid(RECORD, json.loads(answer.text)), answer.text
        answer = generate(session, tokenizer, ["Hi"], replace(settings, max_new_tokens=4))[0]
        assert answer.finish_reason == "length" and answer.text.startswith('{"a') and len(answer.tokens) == 4


def test_rows_of_a_batch_are_held_each_to_its_own(bundle: Bundle, session: OrtSession, tokenizer: Tokenizer, grammars: Grammars) -> None:
    """With one that is held to none, whose answer is what it would be alone."""
    with Batcher(OrtSession(bundle, threads=1), tokenizer, AdapterBank(bundle), prefix_bytes=0) as batcher:
        asked = []
        for i, name in enumerate(NAMES):
            for kind in (None, *SHORT):
                grammar = None if kind is None else grammars.json_schema(SHORT[kind])
                settings = GenerationSettings(max_new_tokens=12, temperature=i % 2, seed=i, grammar=grammar)
                asked.append((name, kind, settings, batcher.submit("Hi", settings, adapter=name)))
        for name, kind, settings, ticket in asked:
            session.set_adapter(name)
            alone = generate(session, tokenizer, ["Hi"], settings)[0]
            assert ticket.result(30) == alone
            assert kind is None or jsonschema_rs.is_valid(SHORT[kind], json.loads(alone.text))


def test_a_token_is_chosen_among_those_that_may_come(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """The likeliest of them, not the nearest to what the model would say; the text may end once it is whole, and not before."""
    logits = ToyDecoder.random().logits(tokenizer.encode_prompt("Hi"))[-1].astype(np.float32)
    allowed = grammars.json_schema({"enum": [12, 125, 3]}).begin(tokenizer.stop_token_ids)
    digit = {c: tokenizer.encode(c)[0] for c in "1235"}
    masked = allowed.mask(logits)
    assert {int(i) for i in np.flatnonzero(np.isfinite(masked))} == {digit["1"], digit["3"]}
    assert all(masked[i] == logits[i] for i in np.flatnonzero(np.isfinite(masked)))
    np.testing.assert_allclose(probabilities(masked, GenerationSettings(temperature=1.0))[[digit["1"], digit["3"]]].sum(), 1, rtol=1e-12)
    for said, may_end in (("1", False), ("2", True)):
        assert not allowed.ended
        allowed.push(digit[said])
        assert np.isfinite(allowed.mask(logits)[list(tokenizer.stop_token_ids)]).all() == may_end
    allowed.push(digit["5"])
    assert allowed.ended


def fits(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether ``text`` is an answer, or the beginning of one."""
    allowed, free = grammar.begin(tokenizer.stop_token_ids), np.zeros(VOCABULARY, np.float32)
    for token in tokenizer.encode(text, add_special_tokens=False):
        if allowed.ended or not np.isfinite(allowed.mask(free)[token]):
            return False
        allowed.push(token)
    return True


def test_space_ends_and_a_schema_has_no_say_in_it(tokenizer: Tokenizer, grammars: Grammars) -> None:
    """Where a model may say any number of line breaks it says them until its tokens are used up: SmolLM2 does, steered."""
    own = {"item_separator": "!", "key_separator": "?", "whitespace_flexible": True, "whitespace_pattern": " +", "lenient": True}
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {"type": "object"}},
        "required": ["a"],
    }
    for each in (schema, {**schema, "x-guidance": own}, JSON_OBJECT):
        grammar = grammars.json_schema(each)
        for text in ('{"a": [1, 2], "b": {"x": 3, "y": []}}', '{"a":[1,2],"b":{"x":3}}'):
            assert fits(grammar, tokenizer, text)
        for text in (
            " {",
            '{ "a"',
            '{"a" :',
            '{"a":  1',
            '{"a":[ 1',
            '{"a":[1 ',
            '{"a":[1,  2',
            '{"a":[1,\n2',
            '{"a":[]}\n',
            '{"a"?',
            '{"a":[1!',
        ):
            assert not fits(grammar, tokenizer, text), text
    with pytest.raises(InputError, match="oneOf"):
        grammars.json_schema({"oneOf": [{"type": "object"}, {"minProperties": 1}], "x-guidance": {"coerce_one_of": True}})
    with pytest.raises(InputError, match="Unimplemented keys"):
        grammars.json_schema({"not": {}, "x-guidance": {"lenient": True}})


def _nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def _chain(length: int) -> dict[str, Any]:
    links = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(length)}
    return {"$defs": {**links, f"d{length}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


HOSTILE: dict[str, tuple[Any, str]] = {
    "never ends": ({"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(1, 60)]}, "takes more than"),
    "a long chain": (_chain(1100), "ends its compiler"),
    "many values": ({"enum": [f"v{i}" for i in range(20_000)]}, "at most 65,536"),
    "nested": (_nested(400), "cannot be read"),
    "nested beyond Python's stack": (_nested(3000), "cannot be read"),
    "itself": ({"$ref": "#"}, "no value fits it"),
    "nothing": ({"type": "integer", "minimum": 3, "maximum": 2}, "no answer can be held"),
    "a file": ({"$ref": "file:///etc/passwd"}, "not present in a registry"),
    "another machine": ({"$ref": "http://127.0.0.1:1/x"}, "not present in a registry"),
    "what is not known": ({"not": {"type": "string"}}, "Unimplemented keys"),
    "a number that is none": ({"const": float("nan")}, "cannot be read"),
    "no schema": ("object", "cannot be read"),
    "brackets": ({"type": "string", "pattern": "(" * 3000 + "a" + ")" * 3000}, "no answer can be held"),
    "half a character": ({"const": "\ud800"}, "cannot be read"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_schemas_are_refused(grammars: Grammars, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 1)
    schema, said = HOSTILE[case]
    with pytest.raises(InputError, match=said) as caught:
        grammars.json_schema(schema)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    start = time.perf_counter()
    with pytest.raises(InputError):  # as it was
        grammars.json_schema(schema)
    assert case != "never ends" or time.perf_counter() - start < module.SECONDS


def test_each_is_compiled_once_and_the_last_ones_are_kept(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(module, "_try", tried.append)
    fresh = Grammars(tokenizer, VOCABULARY)
    first = fresh.json_schema(JSON_OBJECT)
    assert fresh.json_schema(dict(JSON_OBJECT)) is first and len(tried) == 1
    for i in range(KEPT):
        fresh.json_schema({"const": i})
    assert fresh.json_schema(JSON_OBJECT) is not first
    assert len(fresh._known) == KEPT


def test_only_a_grammar_needs_the_library(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(RECORD), encoding="utf-8")
    code = (
        "import sys; sys.modules['llguidance'] = None\n"
        "from reft_export.cli.main import main\n"
        f"sys.argv = ['reft-export', 'run', {str(bundle.folder)!r}, '-p', 'Hi', '-n', '3', *sys.argv[1:]]\nmain()"
    )
    for options, status, said in (((), 0, ""), (("--json-schema", str(tmp_path / "schema.json")), 4, "reft-export[grammar]")):
        done = subprocess.run([sys.executable, "-c", code, *options], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == status and said in done.stderr and len(done.stderr.splitlines()) == bool(said), done.stderr
