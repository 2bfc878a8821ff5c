"""The generation loop: padded batches, chunked prefill, a small sampler, stop strings and streaming.

A batch is one rectangle of columns. Prompts are padded to the longest one, and every later token is one more column of all rows:
a row's pads stay as columns whose mask is 0 (in a KV cache that is written in place they take no room), and positions count real tokens
only. So a row of a batch computes what it would compute alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from runtimes.edits.positions import marks_of
from runtimes.errors import BundleError, InputError
from runtimes.kv_cache import CachePast
from runtimes.session import DecoderSession, Past, Session, StepOutput, as_decoder
from runtimes.speculation import check_speculation, proposed
from runtimes.text.tokenizer import Detokenizer, Tokenizer, check_token_ids

if TYPE_CHECKING:
    from runtimes.text.grammars import Grammar

PAD = 0
"""Token id under a mask of 0. Any id of the vocabulary will do; a tokenizer's own pad token may lie outside the model's."""


PREFILL_CHUNK = 512
"""Prompt columns per call where nobody says otherwise: attention of a whole prompt takes memory by its square."""
LOGIT_BYTES = 2**27
"""A call whose graph gives logits of every column has fewer of them, where the logits would take more than this: 512 columns of a
vocabulary of 65,536."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    max_new_tokens: int = 128
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 is no limit."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability."""
    repetition_penalty: float = 1.0
    seed: int | None = None
    """With a seed, a prompt's sample does not depend on the other prompts of its batch; None samples afresh."""
    sample: int = 0
    """Which of the seed's samples of a prompt, from 0: the same prompt again can have another one."""
    stop: tuple[str, ...] = ()
    """A text that ends the row; it is cut off."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a row, besides the tokenizer's own."""
    grammar: Grammar | None = None
    """What the text fits, whole or as far as max_new_tokens go; of runtimes/text/grammars.py."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (no limit) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0, at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < float("inf"), "above 0"),
            "seed": (self.seed is None or self.seed >= 0, "0 or more"),
            "sample": (self.sample >= 0, "0 or more"),
            "stop": (all(self.stop), "texts that are not empty"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected {expected}")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """``text`` continues the prompt, without stop string and special tokens; ``tokens`` are all that were sampled, eos included."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    """"stop" (a stop token or text) or "length"."""
    prompt_tokens: int
    proposed: int = 0
    """Tokens that were fed ahead."""
    accepted: int = 0
    """Those of them that were chosen."""


def generate(
    session: Session,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    settings: GenerationSettings | Sequence[GenerationSettings] = GenerationSettings(),
    *,
    on_text: Callable[[int, str], None] | None = None,
    marks: Sequence[Sequence[int]] | None = None,
    prefill_chunk: int | None = None,
    speculate: int = 0,
) -> list[Generation]:
    """Continues every prompt; ``on_text(row, piece)`` streams, and a row's pieces join to its ``text``.

    A prompt is text, or its token ids. Text is continued as it is; ``runtimes.text.chat`` renders messages by the chat template first.
    ``settings``: one for all prompts, where the same prompt again is another sample of a seed, or one for each.
    ``marks``: which tokens of each prompt an adapter at positions ``marked`` edits, by their numbers (``Tokenizer.encode_marked``).
    ``prefill_chunk``: prompt columns per call, which bounds the memory of a long prompt; None is what ``prefill_columns`` says, 0 feeds
    the prompt at once.
    ``speculate``: tokens at most that a row which runs alone is fed ahead (runtimes/speculation.py); its answer is the same.
    Raises InputError for an empty prompt, where prompt and new tokens exceed the context, for ``speculate`` where the KV cache is not
    written in place, and for a classifier's session; BundleError where logits are not finite.

    Example::

        artifact = open_artifact("pirate-bundle")
        tokenizer = Tokenizer.load(artifact.folder, artifact.manifest.model)
        with open_session(artifact, adapter="pirate") as session:
            answers = generate(session, tokenizer, ["Once upon a time"], GenerationSettings(max_new_tokens=64, temperature=0.7, seed=1))
        print(answers[0].text, answers[0].finish_reason)
    """
    encoded = [tokenizer.encode_prompt(p) if isinstance(p, str) else p for p in prompts]
    model = session.bundle.manifest.model
    encoded = [check_token_ids(prompt, model.vocab_size, f"prompt {i}") for i, prompt in enumerate(encoded)]
    rows: list[Continuation] = []
    if marks is not None and len(marks) != len(encoded):
        raise InputError(f"{len(encoded)} prompts and marks of {len(marks)} are given; give each prompt's, none of one being ()")
    for i, (prompt, own) in enumerate(zip(encoded, _settings_of_each(settings, encoded), strict=True)):
        if len(prompt) + own.max_new_tokens > model.context_length:
            raise InputError(
                f"prompt {i} has {len(prompt)} tokens, which with {own.max_new_tokens} new ones exceed the context of "
                f"{model.name} ({model.context_length}); shorten it, or lower max_new_tokens"
            )
        rows.append(Continuation(i, prompt, tokenizer, own, on_text, None if marks is None else marks[i]))
    decoder = as_decoder(session)
    check_speculation(session.bundle, speculate)
    # A batch is as many columns as its longest prompt and most new tokens: rows that want other counts could not fit together, though
    # each alone does.
    for count in dict.fromkeys(row.settings.max_new_tokens for row in rows):
        alike = [row for row in rows if row.settings.max_new_tokens == count]
        for group in batches([row.prompt for row in alike], padding_of(decoder), chunk=prefill_columns(decoder, prefill_chunk)):
            if speculate and len(group) == 1:
                _generate_ahead(decoder, alike[group[0]], count, prefill_chunk, speculate)
            else:
                _generate_batch(decoder, [alike[i] for i in group], count, prefill_chunk)
    return [row.result() for row in rows]


def _settings_of_each(
    settings: GenerationSettings | Sequence[GenerationSettings], prompts: Sequence[Sequence[int]]
) -> list[GenerationSettings]:
    if not isinstance(settings, GenerationSettings):
        if len(settings) != len(prompts):
            raise InputError(f"{len(prompts)} prompts and {len(settings)} settings are given; give one for all, or one for each")
        return list(settings)
    seen: Counter[tuple[int, ...]] = Counter()
    each = []
    for prompt in map(tuple, prompts):
        each.append(replace(settings, sample=settings.sample + seen[prompt]))
        seen[prompt] += 1
    return each


def _generate_batch(session: DecoderSession, rows: list[Continuation], count: int, prefill_chunk: int | None) -> None:
    marks = [row.marks for row in rows if row.marks is not None]
    batch = DecodeBatch(session, [row.prompt for row in rows], marks=marks or None, new_tokens=count)
    logits = batch.prefill(prefill_chunk)
    for step in range(count):
        for row, row_logits in zip(rows, logits, strict=True):
            if not row.finished:
                row.push(row_logits)
        if step == count - 1 or all(row.finished for row in rows):
            break
        logits = batch.append([None if row.finished else row.tokens[-1] for row in rows])
    for row in rows:
        row.finish("length")


def _generate_ahead(session: DecoderSession, row: Continuation, count: int, prefill_chunk: int | None, most: int) -> None:
    """One row, whose steps are of one token and up to ``most`` proposed ones."""
    batch = DecodeBatch(session, [row.prompt], marks=None if row.marks is None else [row.marks], new_tokens=count)
    row.push(batch.prefill(prefill_chunk)[0])
    while not row.finished and len(row.tokens) < count:
        ahead = proposed([*row.prompt, *row.tokens], min(most, count - len(row.tokens) - 1))  # the last token is said, and not fed
        row.proposed += len(ahead)
        for guess, logits in zip([*ahead, None], batch.append_ahead(row.tokens[-1], ahead), strict=True):
            row.push(logits)
            if row.finished or row.tokens[-1] != guess:
                break
            row.accepted += 1
        batch.keep(len(row.prompt) + len(row.tokens) - 1)
    row.finish("length")


def padding_of(session: DecoderSession) -> str:
    """Where the pads of rows of unequal length stand in a batch: "left", "right", or "none" (such rows do not share one).

    With pads on the left a row's tokens stay in consecutive columns: right for sliding windows, which count columns, and for graphs that
    return the last column's logits only. A graph without position_ids counts columns itself, or compacts rows by their token count, and
    pads would move its positions; GroupQueryAttention does so whether it is told positions or not, which the manifest says. A cache that
    is written in place has no pads: its session takes them on the right.
    """
    if session.writes_in_place:
        return "right"
    return session.bundle.manifest.padding if session.takes_position_ids else "none"


def prefill_columns(session: DecoderSession, chunk: int | None = None) -> int | None:
    """Prompt columns per call: ``chunk``; by default (None) PREFILL_CHUNK, or as many as an engine was built for; for 0 None: all at once.

    Raises InputError for a negative number.
    """
    if chunk is not None and chunk < 0:
        raise InputError(f"prefill chunk is {chunk}, expected at least 1 column per call, or 0 for the prompt at once")
    if chunk is not None:
        return chunk or None
    if (columns := session.bundle.limits.columns) is not None:
        return columns
    if session.cuts_logits:
        return PREFILL_CHUNK
    return max(1, min(PREFILL_CHUNK, LOGIT_BYTES // (4 * session.bundle.manifest.model.vocab_size)))


def batches(prompts: Sequence[Sequence[int]], padding: str, *, chunk: int | None = None) -> list[list[int]]:
    """Row numbers of each batch: one batch, or without padding one per prompt length.

    Without padding a prompt that is fed in several calls of ``chunk`` columns is alone: onnxruntime's GroupQueryAttention takes several
    new tokens after a past for one row only. (Where the cache is written in place, the session feeds such rows one by one.)
    """
    if padding != "none":
        return [list(range(len(prompts)))] if prompts else []
    alone = [[row] for row, prompt in enumerate(prompts) if chunk is not None and len(prompt) > chunk]
    short = [row for row in range(len(prompts)) if [row] not in alone]
    lengths = sorted({len(prompts[row]) for row in short})
    return [[row for row in short if len(prompts[row]) == n] for n in lengths] + alone


def columns(
    session: DecoderSession,
    ids: np.ndarray,
    mask: np.ndarray,
    prompt_length: np.ndarray,
    widths: Sequence[int],
    *,
    marks: np.ndarray | None = None,
    last_logits: int | None = None,
    capacity: int | None = None,
) -> Iterator[tuple[int, StepOutput]]:
    """Feeds ids [B, S] in consecutive calls of ``widths`` columns; yields (columns before, StepOutput) of each call.

    ``last_logits``: logits of each call's last so many columns only. What nobody reads need not leave the device. ``capacity``: tokens
    of a row in the end, by default those that ``mask`` holds.
    """
    past, start = None, 0
    capacity = int(np.sum(mask, 1).max()) if capacity is None else capacity
    for width in widths:
        stop = start + width
        output = session.step(
            ids[:, start:stop],
            mask[:, :stop],
            past=past,
            prompt_length=prompt_length,
            marks=marks,
            last_logits=last_logits,
            capacity=capacity,
        )
        yield start, output
        past, start = output.past, stop


def call_widths(total: int, chunk: int | None) -> list[int]:
    """Columns of each call that feeds ``total`` of them, ``chunk`` at once or all."""
    size = chunk or total
    return [min(size, total - start) for start in range(0, total, size)]


class DecodeBatch:
    """Prompts decoded together, one column per call after the prefill. Both calls return the next token's logits, [B, V].

    ``marks``: as of ``generate``. ``new_tokens``: how many will follow a prompt, where the caller knows: a cache that is written in place
    is then allocated once.
    """

    def __init__(
        self,
        session: DecoderSession,
        prompts: Sequence[Sequence[int]],
        *,
        marks: Sequence[Sequence[int]] | None = None,
        new_tokens: int = 1,
    ) -> None:
        self._session = session
        self._marks = None if marks is None else marks_of(marks)
        self.prompt_length = np.array([len(p) for p in prompts], np.int64)
        width = int(self.prompt_length.max())
        self._capacity = width + new_tokens - 1  # the last token is said, and not fed
        self._ids = np.full((len(prompts), width), PAD, np.int64)
        self._mask = np.zeros((len(prompts), width), np.int64)
        self._ends = np.full(len(prompts), width) if padding_of(session) != "right" else self.prompt_length
        for row, (prompt, end) in enumerate(zip(prompts, self._ends, strict=True)):
            self._ids[row, end - len(prompt) : end], self._mask[row, end - len(prompt) : end] = prompt, 1
        self._past: Past | None = None

    def prefill(self, chunk: int | None = None) -> np.ndarray:
        """``chunk``: as of ``generate``."""
        widths = call_widths(self._ids.shape[1], prefill_columns(self._session, chunk))
        logits: np.ndarray | None = None
        fed = columns(
            self._session, self._ids, self._mask, self.prompt_length, widths, marks=self._marks, last_logits=1, capacity=self._capacity
        )
        for start, output in fed:
            self._past = output.past
            if logits is None:
                logits = np.zeros((len(self._ids), output.logits.shape[2]), np.float32)
            ended = (self._ends > start) & (self._ends <= output.past.width)
            logits[ended] = output.logits[ended, -1]
        assert logits is not None
        return logits

    def append(self, tokens: Sequence[int | None]) -> np.ndarray:
        """One more column; None is a row that has ended: a pad, with mask 0."""
        column = np.array([[PAD if t is None else t] for t in tokens], np.int64)
        live = np.array([[t is not None] for t in tokens], np.int64)
        self._mask = np.concatenate([self._mask, live], 1)
        output = self._session.step(column, self._mask, past=self._past, last_logits=1)
        self._past = output.past
        return output.logits[:, -1]

    def append_ahead(self, token: int, ahead: Sequence[int]) -> np.ndarray:
        """Logits [1 + n, V] behind the next token of the only row, and behind each of n more; ``keep`` says how many stay."""
        ids = np.array([[token, *ahead]], np.int64)
        self._mask = np.concatenate([self._mask, np.ones_like(ids)], 1)
        output = self._session.step(ids, self._mask, past=self._past, last_logits=ids.shape[1])
        self._past = output.past
        return output.logits[0]

    def keep(self, columns: int) -> None:
        """Takes back what the row was fed behind its first ``columns`` tokens, of a cache that is written in place."""
        assert isinstance(self._past, CachePast)
        self._past = self._past.first(columns)
        self._mask = self._past.mask


def greedy_tokens(
    session: DecoderSession, prompts: Sequence[Sequence[int]], count: int, *, marks: Sequence[Sequence[int]] | None = None
) -> np.ndarray:
    """[B, count]: the likeliest continuation of each prompt, going on after eos. ``marks``: as of ``generate``."""
    tokens = np.zeros((len(prompts), count), np.int64)
    for group in batches(prompts, padding_of(session), chunk=prefill_columns(session)):
        own = None if marks is None else [marks[i] for i in group]
        batch = DecodeBatch(session, [prompts[i] for i in group], marks=own, new_tokens=count)
        logits = batch.prefill()
        for step in range(count):
            tokens[group, step] = logits.argmax(1)
            if step < count - 1:
                logits = batch.append(list(tokens[group, step]))
    return tokens


def probabilities(logits: np.ndarray, settings: GenerationSettings, seen: Sequence[int] = ()) -> np.ndarray:
    """softmax(logits [V] / temperature) over the tokens that top_k and top_p leave; float64 [V].

    ``seen`` tokens have positive logits divided and negative ones multiplied by the repetition penalty first. The order is that of
    transformers: penalty, temperature, top_k, top_p. Raises BundleError for logits that are not numbers.
    """
    scores = penalized(logits, settings, seen)
    with np.errstate(over="ignore"):  # a temperature near 0 leaves the likeliest token alone
        scores = (scores - scores.max()) / settings.temperature
    if settings.top_k and settings.top_k < scores.size:
        scores = np.where(scores < np.partition(scores, -settings.top_k)[-settings.top_k], -np.inf, scores)
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    if settings.top_p < 1:
        order = np.argsort(-weights, kind="stable")
        # The token that crosses top_p still belongs to the set, and so does the likeliest one.
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= settings.top_p]] = 0
        weights /= weights.sum()
    return weights


def penalized(logits: np.ndarray, settings: GenerationSettings, seen: Sequence[int]) -> np.ndarray:
    scores = np.asarray(logits, np.float64)
    check_finite(scores.max())
    if settings.repetition_penalty != 1 and len(seen):
        scores, index = scores.copy(), np.unique(seen)
        with np.errstate(over="ignore"):  # of a penalty near 0 the largest number is what is left
            factors = np.where(scores[index] > 0, 1 / np.float64(settings.repetition_penalty), settings.repetition_penalty)
            scores[index] = np.minimum(scores[index] * factors, np.finfo(np.float64).max)
    return scores


def check_finite(largest: float) -> None:
    """Raises BundleError where the largest of a token's logits is no number: NaN is larger than all."""
    if not np.isfinite(largest):
        raise BundleError("the model's logits are not finite; check the bundle with `reft-export parity`")


class StopFilter:
    """Holds back text that may be the start of a stop string, and cuts it off when it is one.

    The stop string that ends first wins, the longest of those: the result does not depend on how the text was split.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        text = self._held + piece
        found = [(text.find(s) + len(s), text.find(s)) for s in self._stop if s in text]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        text, self._held = self._held, ""
        return text


class Continuation:
    """One prompt while it is continued."""

    def __init__(
        self,
        number: int,
        prompt: list[int],
        tokenizer: Tokenizer,
        settings: GenerationSettings,
        on_text: Callable[[int, str], None] | None,
        marks: Sequence[int] | None = None,
    ) -> None:
        self.prompt, self.marks = prompt, marks
        self.tokens: list[int] = []
        self.finished = ""
        self.proposed = self.accepted = 0
        self._number = number
        self.settings = settings
        self._stop_ids = tokenizer.stop_token_ids | set(settings.stop_token_ids)
        self._allowed = None if settings.grammar is None else settings.grammar.begin(self._stop_ids)
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._filter = StopFilter(settings.stop)
        self._on_text = on_text
        self._pieces: list[str] = []

    @cached_property
    def _random(self) -> np.random.Generator:
        """Asked for by rows that sample: numpy imports it late."""
        settings = self.settings
        return np.random.default_rng(None if settings.seed is None else [settings.seed, settings.sample, *self.prompt])

    def push(self, logits: np.ndarray) -> None:
        """Chooses the next token and gives out the text it completes."""
        token = self._choose(logits if self._allowed is None else self._allowed.mask(logits))
        self.tokens.append(token)
        if token in self._stop_ids:
            self.finish("stop")
            return
        self._give(self._filter.push(self._detokenizer.push(token)))
        if self._filter.stopped:
            self.finished = "stop"
        elif self._allowed is not None:
            self._allowed.push(token)
            if self._allowed.ended:
                self.finish("stop")

    def finish(self, reason: str) -> None:
        """Ends the row, once; held-back text is given out, as it turned out to be no stop string."""
        if self.finished:
            return
        self.finished = reason
        self._give(self._filter.push(self._detokenizer.finish()))
        if self._filter.stopped:
            self.finished = "stop"
        self._give(self._filter.finish())

    def result(self) -> Generation:
        return Generation(
            text="".join(self._pieces),
            tokens=tuple(self.tokens),
            finish_reason=self.finished,
            prompt_tokens=len(self.prompt),
            proposed=self.proposed,
            accepted=self.accepted,
        )

    def _choose(self, logits: np.ndarray) -> int:
        if self.settings.temperature == 0 and self.settings.repetition_penalty == 1:
            best = int(logits.argmax())  # of a NaN, where there is one
            check_finite(logits[best])
            return best
        seen = [*self.prompt, *self.tokens]
        if self.settings.temperature == 0:
            return int(penalized(logits, self.settings, seen).argmax())
        cumulative = np.cumsum(probabilities(logits, self.settings, seen))
        return int(np.searchsorted(cumulative / cumulative[-1], self._random.random(), side="right"))

    def _give(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            if self._on_text is not None:
                self._on_text(self._number, text)
