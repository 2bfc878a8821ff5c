"""A few steps by which a graph that was just written shows that it runs, and that a decoder reads its cache."""

from __future__ import annotations

import numpy as np

from runtimes.artifacts.bundle import Bundle
from runtimes.edits.positions import every_other
from runtimes.errors import GraphError
from runtimes.session import ClassifierSession, DecoderSession


def decoder_steps(bundle: Bundle, session: DecoderSession) -> None:
    """A prefill and a decode step of the base, twice with other prompts, and a prefill with every adapter."""
    first, second = (_decoded(bundle, session, prompt) for prompt in _prompts(bundle))
    if np.array_equal(first, second):
        raise GraphError(
            f"{bundle.graph_path}: a decode step says the same to the bit whatever came before it, so its cache is not read; export the "
            "decoder again with its cache (text-generation-with-past)"
        )
    for name in bundle.adapter_names:
        session.set_adapter(name)
        prompt = next(iter(_prompts(bundle)))
        said = session.step(prompt, np.ones_like(prompt), marks=every_other([prompt.shape[1]]))
        _check_step(bundle, said.logits, prompt.shape[1])


def classifier_steps(bundle: Bundle, session: ClassifierSession) -> None:
    """Two texts, by the base and by every adapter."""
    for name in (None, *bundle.adapter_names):
        session.set_adapter(name)
        for text in _prompts(bundle):
            _check(bundle, session.classify(text, np.ones_like(text)).logits, (1, len(bundle.manifest.labels)))


def _prompts(bundle: Bundle) -> tuple[np.ndarray, np.ndarray]:
    """Two of two tokens each [1, 2], far apart in the vocabulary: neighbours may be reserved tokens that were never trained."""
    tokens = bundle.manifest.model.vocab_size
    return np.array([[1 % tokens, tokens // 2]]), np.array([[tokens // 4, tokens // 3]])


def _decoded(bundle: Bundle, session: DecoderSession, prompt: np.ndarray) -> np.ndarray:
    """Logits [1, V] of one token after ``prompt``."""
    prefill = session.step(prompt, np.ones_like(prompt))
    _check_step(bundle, prefill.logits, prompt.shape[1])
    token = np.array([[2 * bundle.manifest.model.vocab_size // 5]])
    decode = session.step(token, np.ones((1, prompt.shape[1] + 1), np.int64), past=prefill.past)
    _check_step(bundle, decode.logits, 1)
    return decode.logits[:, -1]


def _check_step(bundle: Bundle, logits: np.ndarray, tokens: int) -> None:
    columns = 1 if bundle.manifest.logits == "last" else tokens
    _check(bundle, logits, (1, columns, bundle.manifest.model.vocab_size))


def _check(bundle: Bundle, logits: np.ndarray, shape: tuple[int, ...]) -> None:
    if logits.shape != shape:
        raise GraphError(
            f"{bundle.graph_path}: logits are {list(logits.shape)}, expected {list(shape)}; the graph is damaged: export it again"
        )
    if not np.isfinite(logits).all():
        raise GraphError(
            f"{bundle.graph_path}: logits are not finite in {bundle.manifest.precision}; export the graph again, in float32 where a half "
            "precision overflows"
        )
