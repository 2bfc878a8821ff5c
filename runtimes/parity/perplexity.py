"""Perplexity of a text under a session: what quantization cost the base, and the steered model, in one number.

    exp( - 1/n  sum over scored tokens t of  log p(token t | the window's tokens before t) )

Windows of 2 h tokens start every h tokens; the first half of each is context and the second half is scored, so every token from the
h-th on is scored once, with h to 2 h - 1 tokens before it. h = 256, or less where the model's context or the text is shorter. Where the
tokenizer begins a text with its bos token, every window begins with it, beside its 2 h tokens, and it is never scored.

The first half is also the window's prompt: an adapter edits it by its own rule (for example its first and last tokens), as it would
edit a prompt whose answer is the second half. Base and steered perplexity are so taken over the same tokens with the same context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from runtimes.edits.positions import marks_of
from runtimes.errors import BundleError, InputError
from runtimes.generation import call_widths, columns
from runtimes.session import Session, as_decoder
from runtimes.text.tokenizer import Tokenizer

HALF_WINDOW = 256


def perplexity(session: Session, tokenizer: Tokenizer, text: str) -> float:
    """The module's formula for the session's active adapter, or the base. Raises InputError for a text of fewer than two tokens."""
    tokens = tokenizer.encode(text)
    lead = tokens[:1] if tokens and tokens[0] == tokenizer.bos_token_id else []
    tokens = tokens[len(lead) :]
    if len(tokens) < 2:
        raise InputError(f"perplexity needs a text of two tokens or more, this one has {len(tokens)}")
    model = session.bundle.manifest.model
    half = min(HALF_WINDOW, (model.context_length - 1) // 2, len(tokens) // 2)
    if half < 1:
        raise InputError(f"perplexity needs a context of three tokens or more, {model.name} has {model.context_length}")
    total, count = 0.0, 0
    for start in range(0, len(tokens) - half, half):
        window = [*lead, *tokens[start : start + 2 * half]]
        scored = log_likelihoods(session, window, len(lead) + half)
        total, count = total + math.fsum(scored), count + len(scored)
    return math.exp(-total / count)


def log_likelihoods(session: Session, window: Sequence[int], prompt: int, marks: Sequence[int] | None = None) -> list[float]:
    """log p of each token of the window from column ``prompt`` on, given those before it, in nats; under the session's active adapter.
    ``marks``: as of ``generate``, of the window's prompt."""
    return [float(log_softmax(logits)[token]) for token, logits in predictions(session, window, prompt, marks)]


def agreement(session: Session, tokens: Sequence[int], prompt: int) -> tuple[int, int]:
    """(hits, tokens): how many of the tokens behind the first ``prompt`` are what the session would say after all those before them."""
    said = [int(logits.argmax()) == token for token, logits in predictions(session, tokens, prompt)]
    return sum(said), len(said)


def predictions(
    session: Session, tokens: Sequence[int], prompt: int, marks: Sequence[int] | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(token, logits [V] for its place) of every token behind the first ``prompt``, in one forward where the bundle allows it, and the
    engine was built for as many columns."""
    ids = np.array([tokens[:-1]], np.int64)
    width = ids.shape[1]
    # A bundle with the last logits only says one column's per call; of any other, those of the prompt are not read.
    only_last = session.bundle.manifest.logits == "last"
    parts, last = ([prompt, *[1] * (width - prompt)], None) if only_last else ([width], max(width - prompt, 0) + 1)
    widths = [each for part in parts for each in call_widths(part, session.bundle.limits.columns)]
    marked = None if marks is None else marks_of([marks])
    fed = columns(as_decoder(session), ids, np.ones_like(ids), np.array([prompt], np.int64), widths, marks=marked, last_logits=last)
    for _, output in fed:
        first = output.past.width - output.logits.shape[1]
        for column in range(max(first, prompt - 1), output.past.width):
            row = output.logits[0, column - first]
            if not np.isfinite(row).all():
                raise BundleError("the model's logits are not finite; check the bundle with `reft-export parity`")
            yield tokens[column + 1], row


def log_softmax(row: np.ndarray) -> np.ndarray:
    """x - log sum exp x of a row of logits [V], in float64."""
    x = np.asarray(row, np.float64)
    x = x - x.max()
    return x - math.log(np.exp(x).sum())
