"""Answers in the shapes of OpenAI's API, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from runtimes.serving.edited import text_behind
from runtimes.serving.flight import Ask, Chosen, Piece
from runtimes.serving.requests import ChatRequest, TextRequest
from runtimes.text.tokenizer import REPLACEMENT, Tokenizer


class Shape(ABC):
    """Words the answers to one request."""

    prefix = ""
    kind = ""
    chunk_kind = ""

    def __init__(self, request: TextRequest, asks: Sequence[Ask], tokenizer: Tokenizer, fingerprint: str) -> None:
        self._tokenizer, self._best = tokenizer, request.best
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
            "system_fingerprint": fingerprint,
        }
        self._last = [ask.prompt[-1] for ask in asks]
        """Of each answer, the token before the next one."""
        self._each = request.n or 1
        edited = [ask.edited.content() for ask in asks[:: self._each] if ask.edited is not None]
        self._extension: dict[str, Any] = {"reft": {"edited_tokens": edited}} if edited else {}
        """Of this server's own, where it was asked for."""
        self.prompt_tokens = sum(len(ask.prompt) for ask in asks) // self._each
        self.completion_tokens = 0
        self._reused = 0
        self.tells_usage = request.stream_options is not None and request.stream_options.include_usage

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens that were fed and sampled, the one that ends an answer among them; a prompt counts once, whatever n, and of what was in
        the cache already the mean."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._reused // self._each},
        }

    def whole(self, ends: Sequence[Piece]) -> dict[str, Any]:
        """``ends``: the last piece of each answer, which holds all of it."""
        choices = [self._choice(piece) for piece in sorted(ends, key=lambda piece: piece.index)]
        self._count(ends)
        return {**self._head, "object": self.kind, "choices": choices, "usage": self.usage, **self._extension}

    def opening(self, count: int) -> list[dict[str, Any]]:
        """What a stream of so many answers begins with."""
        return [{**self._head, "object": self.chunk_kind, "choices": [], **self._extension}] if self._extension else []

    def chunks(self, piece: Piece) -> list[dict[str, Any]]:
        """What a stream shows of a piece."""
        self._count([piece])
        return [self._chunk(each) for each in self._parts(piece)]

    def closing(self) -> dict[str, Any]:
        """What a stream that tells its usage ends with."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": self.usage}

    def _count(self, pieces: Sequence[Piece]) -> None:
        self.completion_tokens += sum(len(piece.end.tokens) for piece in pieces if piece.end is not None)
        self._reused += sum(piece.reused for piece in pieces)

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": [choice], **({"usage": None} if self.tells_usage else {})}

    @abstractmethod
    def _choice(self, piece: Piece) -> dict[str, Any]: ...

    @abstractmethod
    def _parts(self, piece: Piece) -> list[dict[str, Any]]: ...

    def _words(self, index: int, each: Chosen) -> tuple[str, list[tuple[str, float]]]:
        """(the token's text, the likeliest ones' texts and log-probabilities), as they read behind the token before them."""
        before = self._last[index]
        self._last[index] = each.token
        texts = [text_behind(self._tokenizer, before, token) for token in (each.token, *(token for token, _ in each.best))]
        return texts[0], [(text, logprob) for text, (_, logprob) in zip(texts[1:], each.best, strict=True)]


class ChatShape(Shape):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, count: int) -> list[dict[str, Any]]:
        start = {"role": "assistant", "content": ""}
        first = [self._chunk({"index": i, "delta": start, "logprobs": None, "finish_reason": None}) for i in range(count)]
        return super().opening(count) + first

    def _choice(self, piece: Piece) -> dict[str, Any]:
        assert piece.end is not None
        message = {"role": "assistant", "content": piece.end.text, "refusal": None}
        return {"index": piece.index, "message": message, "logprobs": self._logprobs(piece), "finish_reason": piece.end.finish_reason}

    def _parts(self, piece: Piece) -> list[dict[str, Any]]:
        parts = []
        if piece.text or piece.chosen:
            delta = {"content": piece.text}
            parts.append({"index": piece.index, "delta": delta, "logprobs": self._logprobs(piece), "finish_reason": None})
        if piece.end is not None:
            parts.append({"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": piece.end.finish_reason})
        return parts

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._best is None:
            return None
        content = []
        for each in piece.chosen:
            text, best = self._words(piece.index, each)
            content.append({**_token(text, each.logprob), "top_logprobs": [_token(*likely) for likely in best]})
        return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    """Bytes that are no character by themselves are not told."""
    return {"token": text, "logprob": logprob, "bytes": None if REPLACEMENT in text else list(text.encode())}


class CompletionShape(Shape):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, request: TextRequest, asks: Sequence[Ask], tokenizer: Tokenizer, fingerprint: str) -> None:
        super().__init__(request, asks, tokenizer, fingerprint)
        self._offsets = [0] * len(asks)

    def _choice(self, piece: Piece) -> dict[str, Any]:
        assert piece.end is not None
        return self._part(piece, piece.end.text, piece.end.finish_reason)

    def _parts(self, piece: Piece) -> list[dict[str, Any]]:
        if not (piece.text or piece.chosen or piece.end):
            return []
        return [self._part(piece, piece.text, None if piece.end is None else piece.end.finish_reason)]

    def _part(self, piece: Piece, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": piece.index, "text": text, "logprobs": self._logprobs(piece), "finish_reason": reason}

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._best is None:
            return None
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in piece.chosen:
            text, best = self._words(piece.index, each)
            told["tokens"].append(text)
            told["token_logprobs"].append(each.logprob)
            told["top_logprobs"].append(dict(reversed(best)))  # of two that read alike the likelier
            told["text_offset"].append(self._offsets[piece.index])
            self._offsets[piece.index] += len(text)
        return told


def shape_of(request: TextRequest, asks: Sequence[Ask], tokenizer: Tokenizer, fingerprint: str) -> Shape:
    kind = ChatShape if isinstance(request, ChatRequest) else CompletionShape
    return kind(request, asks, tokenizer, fingerprint)
