"""Answers that fit a JSON schema: which tokens may come next, by llguidance over the bundle's own tokenizer.

    grammars = Grammars(tokenizer, model.vocab_size)                # the extra `grammar`; a second or more for a large vocabulary
    grammar = grammars.json_schema({"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]})
    generate(session, tokenizer, prompts, GenerationSettings(grammar=grammar))

A schema may be a stranger's: it is compiled in a process of its own first, with a limit on time and memory, as some end the process that
compiles them, or never end. What a step of a compiled one takes is limited by llguidance's own count of work (LIMITS).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.errors import BackendUnavailable, InputError
from runtimes.text.tokenizer import Tokenizer
from runtimes.text.tried import ONE_THREAD

if TYPE_CHECKING:
    from llguidance import LLMatcher

MISSING = "llguidance is not installed; pip install 'reft-export[grammar]'"
JSON_OBJECT: Mapping[str, Any] = {"type": "object"}
"""Any object."""
MOST_BYTES = 64 << 10
"""Of a schema."""
LIMITS: Mapping[str, Any] = {
    "max_items_in_row": 1000,
    "initial_lexer_fuel": 500_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""Of a step some 10 ms, of a grammar 40 MB at most."""
OPTIONS: Mapping[str, Any] = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "lenient": False,
    "coerce_one_of": False,
}
"""A blank behind a comma and a colon, or none: some models that may say any number of spaces say them until their tokens are used up. What
llguidance does not know is refused, and a schema has no say in it."""
KEPT = 64
"""Grammars that were asked for last, and schemas that were refused."""

CODE = """
import json
import sys
import threading
sys.path = [folder for folder in sys.path if folder]  # not the folder that the user is in
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]), int(sys.argv[2])))
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[3]), int(sys.argv[3])))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except (ImportError, OSError, ValueError):
    pass
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
class Bytes:
    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [*(bytes([i]) for i in range(256)), b"<end>"]
    def __call__(self, text):
        return list(text if isinstance(text, bytes) else text.encode())
def compile():
    limits = LLParserLimits(**json.loads(sys.argv[1]))
    matcher = LLMatcher(LLTokenizer(TokenizerWrapper(Bytes())), sys.stdin.read(), log_level=0, limits=limits)
    compiled = not matcher.is_error()
    if compiled:
        matcher.compute_bitmask()
    if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
        print("no value fits it" if compiled else matcher.get_error())
threading.stack_size(2 << 20)  # less than whoever compiles it again has
thread = threading.Thread(target=compile)
thread.start()
thread.join()
"""
SECONDS = 3
"""Of a processor, for one schema."""
WAIT = 30.0
"""Seconds of the clock, on a machine that has other work."""
MEMORY = 1 << 30
"""Bytes of address space."""


class Grammars:
    """Compiles schemas for one tokenizer, each once. From any thread; what it compiles keeps the thread that asks, and no other.

    ``vocab_size``: of the model, whose logits are masked. Raises BackendUnavailable without llguidance, InputError for a tokenizer whose
    tokens it does not understand.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise BackendUnavailable(MISSING) from None
        self._stop, self._vocab_size = tokenizer.stop_token_ids, vocab_size
        size = max(vocab_size, tokenizer.backend.get_vocab_size(with_added_tokens=True))
        eos = tokenizer.eos_token_id
        try:
            self._tokens = LLTokenizer(tokenizer.backend.to_str(), n_vocab=size, eos_token=min(self._stop, default=eos))
        except Exception as e:  # the library raises what its parts do
            raise InputError(f"llguidance cannot read this tokenizer ({_line(str(e))}), and no schema holds its answers") from None
        self._known: OrderedDict[str, Grammar | str] = OrderedDict()
        self._lock = Lock()

    def json_schema(self, schema: Any) -> Grammar:
        """Raises InputError for one that is too large or takes too long, nothing fits, or that asks for what llguidance does not know."""
        source = source_of(schema)
        found = self.known(source)
        if found is None:
            try:
                found = self._compiled(source)
            except InputError as e:
                found = str(e)
            with self._lock:
                self._known[source] = found
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
        if isinstance(found, str):
            raise InputError(found)
        return found

    def known(self, source: str) -> Grammar | str | None:
        """What ``source`` was compiled to, or why it was refused; None: nobody asked lately."""
        with self._lock:
            if source in self._known:
                self._known.move_to_end(source)
            return self._known.get(source)

    def _compiled(self, source: str) -> Grammar:
        from llguidance import LLMatcher, LLParserLimits

        try:
            text = LLMatcher.grammar_from_json_schema(source, overrides=dict(OPTIONS))  # pyright: ignore[reportArgumentType]
        except ValueError as e:
            raise InputError(f"the JSON schema cannot be read: {_line(str(e))}") from None
        _try(text)
        matcher = LLMatcher(self._tokens, text, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise InputError(_refused(matcher.get_error()))
        return Grammar(matcher, self._vocab_size)


class Grammar:
    """A compiled grammar, of any number of answers."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def begin(self, stop_token_ids: Iterable[int]) -> AllowedTokens:
        """One answer; ``stop_token_ids`` end it, and may come once it is whole."""
        stop = [i for i in stop_token_ids if 0 <= i < self._vocab_size]
        return AllowedTokens(self._matcher.deep_copy(), self._vocab_size, stop)


class AllowedTokens:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, stop: list[int]) -> None:
        self._matcher, self._vocab_size, self._stop = matcher, vocab_size, stop

    @property
    def ended(self) -> bool:
        """Whether the answer is whole, and nothing can follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """logits [V], with -inf for every token that cannot come next. Raises InputError where that takes too much work to tell."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.zeros(self._vocab_size, bool)
        told = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        allowed[: len(told)] = told
        allowed[self._stop] = self._matcher.is_accepting()
        if self._matcher.is_error() or not allowed.any():
            raise InputError(f"the answer cannot be held to its JSON schema any further: {self._reason()}; ask for a simpler one")
        return np.where(allowed, logits, -np.inf)

    def push(self, token: int) -> None:
        """``token`` was chosen, which does not end the answer. Raises InputError as ``mask`` does."""
        if not self._matcher.consume_token(token):
            raise InputError(f"the answer cannot be held to its JSON schema any further: {self._reason()}; ask for a simpler one")

    def _reason(self) -> str:
        return _line(self._matcher.get_error()) or str(self._matcher.stop_reason())


def source_of(schema: Any) -> str:
    """A schema's text. Raises InputError for one that is no JSON, or too large."""
    if isinstance(schema, Mapping):  # llguidance takes options out of a schema
        schema = {key: value for key, value in schema.items() if key != "x-guidance"}
    try:
        text = json.dumps(schema, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"the JSON schema cannot be read: {_line(str(e))}") from None
    if len(text) > MOST_BYTES:
        raise InputError(f"the JSON schema has {len(text):,} bytes, at most {MOST_BYTES:,} are taken; ask for a simpler one")
    return text


def _try(grammar: str) -> None:
    """Raises InputError, in one line, for a grammar that does not compile, ends its compiler, or takes too long or too much memory."""
    command = [sys.executable, "-c", CODE, json.dumps(dict(LIMITS)), str(SECONDS), str(MEMORY)]
    try:
        done = subprocess.run(
            command, input=grammar, capture_output=True, text=True, errors="replace", check=False, timeout=WAIT, env=os.environ | ONE_THREAD
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"the JSON schema takes more than {WAIT:g} s to compile; ask for a simpler one") from None
    if done.returncode in (-int(getattr(signal, name, 0)) for name in ("SIGXCPU", "SIGKILL")):
        raise InputError(f"the JSON schema takes more than {SECONDS} s to compile; ask for a simpler one")
    if done.returncode:
        raise InputError("the JSON schema ends its compiler, or needs too much memory; ask for a simpler one")
    if said := done.stdout.strip():
        raise InputError(_refused(said))


def _refused(reason: str) -> str:
    return f"no answer can be held to this JSON schema: {_line(reason)}; change it there, or ask for a simpler one"


def _line(text: str) -> str:
    said = " ".join(text.split()).removesuffix("<non-verbose/>").strip()
    return said if len(said) <= 200 else f"{said[:200]}.."
