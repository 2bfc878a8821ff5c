"""A conversation whose KV cache is kept: every turn says what all that was said, fed anew, is answered with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_bundle import ADAPTERS, change_manifest, write_toy_bundle

import runtimes.batching
import runtimes.prefixes
from runtimes.artifacts.bundle import Bundle
from runtimes.batch_rows import Ticket
from runtimes.conversation import Conversation
from runtimes.errors import BundleError, InputError
from runtimes.generation import GenerationSettings, generate
from runtimes.ort.session import OrtSession
from runtimes.text.chat import template_for
from runtimes.text.prompts import encode
from runtimes.text.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ m.role[0] }} {{ m.content }} {% endfor %}"
SETTINGS = GenerationSettings(max_new_tokens=4)
TURNS = ("a b", "c d", "e")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows from 8 columns, and prefixes from two tokens on."""
    monkeypatch.setattr(runtimes.batching, "LEAST_CLASS", 8)
    monkeypatch.setattr(runtimes.prefixes, "LEAST", 2)


def bundle_in(folder: Path, *, in_place: bool) -> Bundle:
    bundle = write_toy_bundle(folder, in_place=in_place, adapters=ADAPTERS)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return change_manifest(bundle)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_in(tmp_path_factory.mktemp("conversation") / "bundle", in_place=True)


@pytest.fixture
def conversation(bundle: Bundle) -> Iterator[Conversation]:
    with made(bundle) as opened:
        yield opened


def made(bundle: Bundle, **options: Any) -> Conversation:
    return Conversation(OrtSession(bundle, threads=1), Tokenizer.load(bundle.folder, bundle.manifest.model), settings=SETTINGS, **options)


def anew(bundle: Bundle, messages: list[dict[str, Any]], adapter: str | None, system: str | None = None) -> str:
    """What a session that knows nothing answers."""
    tokenizer = Tokenizer.load(bundle.folder, bundle.manifest.model)
    prompt = encode(messages, tokenizer, template_for(bundle, adapter), system)
    with OrtSession(bundle, threads=1, adapter=adapter) as session:
        return generate(session, tokenizer, [prompt], SETTINGS)[0].text


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_every_turn_is_what_all_of_it_says_anew(adapter: str | None, in_place: bool, bundle: Bundle, tmp_path: Path) -> None:
    at = bundle if in_place else bundle_in(tmp_path / "copied", in_place=False)
    with made(at, system="b") as conversation:
        for turn, text in enumerate(TURNS):
            said = conversation.messages
            pieces: list[str] = []
            answer = conversation.say(text, adapter=adapter, on_text=pieces.append)
            assert answer.text == "".join(pieces) == anew(at, [*said, {"role": "user", "content": text}], adapter, system="b")
            assert conversation.messages[-1] == {"role": "assistant", "content": answer.text}
            if turn and in_place:  # but for what the rule edited at the prompt's end
                edited_end = 0 if adapter is None else 7
                assert conversation.reused >= turn * 4 - edited_end
            if not in_place:
                assert conversation.reused == 0


def test_what_was_said_is_in_the_cache_under_the_same_adapter_alone(conversation: Conversation) -> None:
    first, second = (conversation.say(text) for text in TURNS[:2])
    assert conversation.reused >= first.prompt_tokens, "the base's turn: all of the prompt before it"
    name = next(iter(ADAPTERS))
    conversation.say(TURNS[2], adapter=name)
    assert conversation.reused == 0, "what the base said was said without the edit"
    assert second.prompt_tokens > first.prompt_tokens
    conversation.begin_anew()
    assert conversation.say(TURNS[0]).text == first.text


def test_strength(bundle: Bundle, conversation: Conversation) -> None:
    name = next(iter(ADAPTERS))
    assert conversation.say(TURNS[0], adapter=name, strength=0).text == anew(bundle, [{"role": "user", "content": TURNS[0]}], None)


def test_a_refused_turn_leaves_the_conversation(conversation: Conversation) -> None:
    conversation.say("a")
    said = list(conversation.messages)
    with pytest.raises(BundleError, match="no adapter 'nope'"):
        conversation.say("b", adapter="nope")
    with pytest.raises(InputError, match="do not fit"):
        conversation.say("a b c d e f g " * 20)
    assert conversation.messages == said
    assert conversation.say("b").text


def test_an_interrupted_turn_is_cancelled_and_forgotten(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    tickets: list[Ticket] = []

    def interrupted(ticket: Ticket, timeout: float | None = None) -> Any:
        tickets.append(ticket)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Ticket, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            conversation.say("a b c")
    assert tickets[0].cancelled
    assert conversation.messages == []
    assert conversation.say("a").text == conversation.messages[-1]["content"]


def test_no_template(tmp_path: Path) -> None:
    bare = write_toy_bundle(tmp_path / "bare", in_place=True, adapters=ADAPTERS)
    with made(bare) as conversation, pytest.raises(InputError, match="needs a chat template, which .* does not have"):
        conversation.say("a")
