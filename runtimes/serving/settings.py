"""What a server is told: what it takes, how much of it, and from whom."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runtimes.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits of one server, its keys, and the folder that uploads go to. Raises InputError for numbers that limit nothing or all."""

    adapters: Path | None = None
    """Adapters' folders beside the bundle's own; None: none, and no uploads."""
    api_keys: tuple[str, ...] = ()
    """Any of them opens /v1; none given: it is open."""
    admin_token: str | None = None
    """Opens all that the keys open, and changes of adapters; None: nobody changes them."""
    max_body: int = 1 << 20
    """Bytes of a request."""
    max_upload: int = 64 << 20
    """Bytes of an adapter's files together."""
    max_prompt_tokens: int | None = None
    """None: what the context leaves."""
    max_new_tokens: int = 1024
    """Of one choice; what a request that names no number gets, too."""
    max_choices: int = 8
    """Answers of one request: prompts times ``n``."""
    concurrency: int = 256
    """Requests for text that are answered or wait at once."""
    request_seconds: float = 300.0
    backlog: int = 256
    """Tokens that a stream's reader may be behind; then its request ends."""
    schemas: bool = True
    """Whether answers may be held to JSON schemas, for which the tokenizer is read once more."""
    grace_seconds: float = 30.0
    """What running requests have left once the server is told to stop."""

    def __post_init__(self) -> None:
        numbers = ("max_body", "max_upload", "max_prompt_tokens", "max_new_tokens", "max_choices", "concurrency", "backlog")
        for name in numbers:
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")
        if not 0 < self.request_seconds < float("inf") or not 0 <= self.grace_seconds < float("inf"):
            raise InputError(
                f"request_seconds is {self.request_seconds} and grace_seconds {self.grace_seconds}, expected above 0, and 0 or more"
            )
        for token in (*self.api_keys, *(() if self.admin_token is None else (self.admin_token,))):
            if not token or not token.isascii() or not token.isprintable() or " " in token:
                raise InputError("an API key or the admin token is empty, or holds more than ASCII letters, digits and signs; give another")


@dataclass(frozen=True, kw_only=True)
class BatchSettings:
    """What a process that answers is opened with; numbers as of Batcher and AdapterBank, the last three as of ``open_session``."""

    rows: int = 16
    queue: int = 256
    cache_bytes: int | None = None
    prefix_bytes: int | None = None
    bank_bytes: int | None = None
    prefill_chunk: int | None = None
    speculate: int = 0
    threads: int | None = None
    kernel: str | None = None
    verify: bool = False


class Keys:
    """Tells whether a bearer's token is a known one, in a time that says nothing of how alike they are."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self._digests = [_digest(token) for token in tokens]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __contains__(self, token: str) -> bool:
        given, found = _digest(token), False
        for digest in self._digests:  # every one, whichever it is
            found |= hmac.compare_digest(given, digest)
        return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
