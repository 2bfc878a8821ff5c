"""Does the steering still do its task? A checker says so, answer by answer.

A checker is a function of the user's, given as ``module:function`` or ``path/to/file.py:function``:

    def talks_like_a_pirate(prompt: str, answer: str) -> bool        or a float from 0 (failed) to 1 (done)

The success rate is its mean over the prompts of a JSONL file, each answered greedily by the bundle in onnxruntime. A line is a training
line or its prompt alone: a ``prompt``, or ``messages``, of which an assistant's last one is left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.artifacts.bundle import Bundle
from runtimes.errors import InputError
from runtimes.generation import Generation, GenerationSettings, generate
from runtimes.session import Session
from runtimes.text.chat import template_for
from runtimes.text.prompts import encode, read_prompts
from runtimes.text.tokenizer import Tokenizer

ANSWERS_AT_ONCE = 16
"""Rows of one batch: all prompts at once would need a KV cache for all."""

Check = Callable[[str, str], Any]


@dataclass(frozen=True, kw_only=True)
class CheckedTask:
    """Prompts, and the function that judges an answer to one of them."""

    name: str
    check: Check
    prompts: tuple[tuple[str, tuple[dict[str, Any], ...]], ...]
    """(file and line, conversation)."""
    max_new_tokens: int = 64

    def answer(self, bundle: Bundle, session: Session, on_answers: Callable[[int, int], None] = lambda done, of: None) -> list[Generation]:
        """The greedy answers of the session's active adapter, or the base. Raises InputError for a prompt that does not fit."""
        tokenizer = Tokenizer.load(bundle.folder, bundle.manifest.model)
        encoded = self.encoded(bundle, tokenizer, session.adapter)
        settings = GenerationSettings(max_new_tokens=self.max_new_tokens)
        answers: list[Generation] = []
        for start in range(0, len(encoded), ANSWERS_AT_ONCE):
            answers += generate(session, tokenizer, encoded[start : start + ANSWERS_AT_ONCE], settings)
            on_answers(len(answers), len(encoded))
        return answers

    def encoded(self, bundle: Bundle, tokenizer: Tokenizer, adapter: str | None) -> list[list[int]]:
        """Every prompt's tokens, as ``run`` makes them for ``adapter``; raises InputError for one that leaves no room for an answer."""
        template, context = template_for(bundle, adapter), bundle.manifest.model.context_length
        rows = []
        for where, messages in self.prompts:
            tokens = encode(list(messages), tokenizer, template, None)
            if not tokens or len(tokens) + self.max_new_tokens > context:
                raise InputError(
                    f"{where}: {len(tokens)} tokens and {self.max_new_tokens} new ones do not fit the context of "
                    f"{bundle.manifest.model.name} ({context}); shorten it, or lower --checker-tokens"
                )
            rows.append(tokens)
        return rows

    def success(self, answers: Sequence[str]) -> float:
        """Mean score of the answers, one per prompt. Raises InputError where the checker raises, or returns no score."""
        scores = [self._score(m, answer, where) for (where, m), answer in zip(self.prompts, answers, strict=True)]
        return math.fsum(scores) / len(scores)

    def _score(self, messages: Sequence[dict[str, Any]], answer: str, where: str) -> float:
        try:
            with redirect_stdout(sys.stderr):
                score = self.check(str(messages[-1]["content"]), answer)
        except (Exception, SystemExit) as e:  # the function is the user's: anything can come out of it
            said = f"{type(e).__name__}: {e}"
            raise InputError(f"checker {self.name} raised {said} for the prompt of {where} and answer {answer[:60]!r}; correct it") from e
        try:
            value = float(score)
        except (TypeError, ValueError):
            value = math.nan
        if isinstance(score, str) or not 0 <= value <= 1:
            raise InputError(
                f"checker {self.name} returned {score!r} for the prompt of {where}; expected True, False, or a number from 0 to 1"
            )
        return value


def load_task(checker: str, prompts: Path, *, max_new_tokens: int = 64) -> CheckedTask:
    """The function and the prompts, both tried: the checker is asked once, about an empty answer. Raises InputError."""
    task = CheckedTask(
        name=checker,
        check=load_function(checker),
        prompts=tuple((where, _without_answer(messages, where)) for where, messages in read_prompts(prompts)),
        max_new_tokens=max_new_tokens,
    )
    where, messages = task.prompts[0]
    task._score(messages, "", where)
    return task


def _without_answer(messages: list[dict[str, Any]], where: str) -> tuple[dict[str, Any], ...]:
    kept = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not kept:
        raise InputError(f"{where}: holds an assistant's answer and nothing that asks for one")
    return tuple(kept)


def load_function(spec: str, *, option: str = "--checker") -> Check:
    """``module:function`` with the working directory on the path, as servers load applications; or a .py file's."""
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise InputError(f"{option} {spec!r} is not module:function or file.py:function")
    try:
        with redirect_stdout(sys.stderr):  # ours is for the result alone
            module = _load_file(Path(place)) if place.endswith(".py") else _import_here(place)
    except (Exception, SystemExit) as e:  # importing runs the user's code
        raise InputError(f"{option} {spec}: {place} cannot be imported ({type(e).__name__}: {e})") from e
    function = getattr(module, name, None)
    if not callable(function):
        has = "has no" if function is None else f"holds a {type(function).__name__}, not a function, as"
        raise InputError(f"{option} {spec}: {place} {has} {name}")
    return function


def _import_here(module: str) -> Any:
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    finally:
        if added:
            sys.path.remove(here)


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
