"""Holds a decoder against its golden arrays: logits, greedy tokens, steering, and the KV cache fed in every way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtimes.artifacts.bundle import Artifact
from runtimes.errors import BundleError
from runtimes.generation import call_widths, columns, greedy_tokens, padding_of
from runtimes.parity.figures import NOTHING, Budget, Delta, Figures, Rung, compare, compare_deltas, judge
from runtimes.parity.golden_arrays import Golden, Steering, read_arrays, steering_shown
from runtimes.parity.perplexity import log_likelihoods
from runtimes.parity.retention import Quality, Recorded, quality, recorded
from runtimes.session import DecoderSession


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderGolden(Golden):
    rows: list[np.ndarray]
    """The real tokens of each row."""
    prompt_length: np.ndarray
    positions: np.ndarray
    greedy: np.ndarray
    recorded: Recorded | None
    """Of the completions' tokens; None where they are no probes."""

    @classmethod
    def read(cls, artifact: Artifact, name: str, *, steering: bool = True) -> DecoderGolden:
        arrays, fields = read_arrays(artifact, name, steering=steering)
        return cls(
            rows=[row[real > 0] for row, real in zip(arrays["input_ids"], arrays["attention_mask"], strict=True)],
            prompt_length=arrays["prompt_length"],
            positions=arrays["logit_positions"],
            greedy=arrays["greedy_tokens"],
            recorded=recorded(name, arrays),
            **fields,
        )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """One way to bring the golden tokens into the session."""

    side: str = "none"
    """Where prompts get pads up to one width; continuations follow in the columns after it. "none": a row's continuation directly."""
    pads: int = 0
    """Pads beyond those that make the prompts equally wide."""
    chunk: int | None = None
    """Columns per call; None is all at once."""
    decode: bool = False
    """The prompts in one call, then one column per call."""
    alone: bool = False
    """Every row in a batch of its own."""
    only: int | None = None
    """The row that is run; None is all."""

    def columns(self, lengths: Sequence[int], prompt: Sequence[int]) -> list[np.ndarray]:
        """The column of every token, for rows of ``lengths`` tokens of which the first ``prompt`` are the prompt."""
        width = max(prompt) + self.pads
        places = []
        for tokens, own in zip(lengths, prompt, strict=True):
            place = np.arange(tokens)
            if self.side == "left":
                place = place + width - own
            elif self.side == "right":
                place = np.where(place < own, place, place + width - own)
            places.append(place)
        return places

    def widths(self, total: int, prompt: Sequence[int]) -> list[int]:
        """Columns of each call, ``total`` in all."""
        if self.decode:
            width = max(prompt) + self.pads
            return [width, *[1] * (total - width)]
        return call_widths(total, self.chunk)


def _run(session: DecoderSession, golden: DecoderGolden, layout: _Layout) -> dict[int, np.ndarray]:
    """Logits by golden position; a graph with the last logits only has those of one column per call.

    Every position that the layout has to show is there: NaN, where the session gave no logits for it.
    """
    every = range(len(golden.rows)) if layout.only is None else [layout.only]
    logits: dict[int, np.ndarray] = {}
    for chosen in [[row] for row in every] if layout.alone else [list(every)]:
        logits |= _run_batch(session, golden, layout, chosen)
    return logits


def _run_batch(session: DecoderSession, golden: DecoderGolden, layout: _Layout, chosen: list[int]) -> dict[int, np.ndarray]:
    prompt = golden.prompt_length[chosen]
    places = layout.columns([len(golden.rows[row]) for row in chosen], prompt.tolist())
    total = max(int(place[-1]) + 1 for place in places) + (layout.pads if layout.side == "right" else 0)
    ids = np.zeros((len(chosen), total), np.int64)
    mask = np.zeros_like(ids)
    for i, row in enumerate(chosen):
        ids[i, places[i]], mask[i, places[i]] = golden.rows[row], 1
    wanted = {k: (chosen.index(row), places[chosen.index(row)][c]) for k, (row, c) in enumerate(golden.positions) if row in chosen}
    widths, width = layout.widths(total, prompt.tolist()), golden.logits.shape[1]
    if session.bundle.manifest.logits == "last":
        ends = set((np.cumsum(widths) - 1).tolist())
        wanted = {k: (i, column) for k, (i, column) in wanted.items() if column in ends}
    logits = {k: np.full(width, np.nan, np.float32) for k in wanted}
    for start, output in columns(session, ids, mask, prompt, widths):
        first = max(start, output.past.width - output.logits.shape[1])
        if output.logits.shape[2] != width:
            raise BundleError(
                f"{session.bundle.folder} gives {output.logits.shape[2]} logits a token, its golden arrays hold {width}; export it again"
            )
        for k, (i, column) in wanted.items():
            if first <= column < output.past.width:
                logits[k] = output.logits[i, column - first].copy()
    return logits


def _layouts(session: DecoderSession, golden: DecoderGolden) -> dict[str, _Layout]:
    """Every way that the session's graph takes, by what its rung is called; the first one feeds the tokens as they stand."""
    padding = padding_of(session)
    alone = padding != "left"
    only_last = session.bundle.manifest.logits == "last"
    # In place several rows share calls of one column, and a first one that is right padded; chunks of them are fed row by row.
    layouts = {
        "token by token" if only_last else "full forward": _Layout(chunk=1 if only_last else None, alone=alone),
        "prefill and decode": _Layout(side="right" if padding == "right" else "left", decode=True, alone=padding == "none"),
        "chunked prefill": _Layout(side="left", chunk=-(-int(golden.prompt_length.max()) // 3), alone=alone),
        "single rows": _Layout(alone=True, decode=padding == "right"),
    }
    if padding == "right" and session.bundle.manifest.quantization is not None:
        # One row shows it: without quantized activations a call unpacks every weight anew, and each row takes a call a token.
        layouts["single rows"] = replace(layouts["single rows"], only=int(np.argmax(golden.prompt_length)))
    if padding == "left":
        layouts["left padding"] = _Layout(side="left", pads=2, decode=only_last)
        right = _Layout(side="right", pads=2, chunk=1 if only_last else None)
        window = session.bundle.manifest.model.sliding_window
        width = max(map(len, golden.rows)) + int(golden.prompt_length.max() - golden.prompt_length.min()) + right.pads
        if window is None or width <= window:  # a window counts columns: pads between prompt and answer would fill it
            layouts["right padding"] = right
    return layouts


def check_decoder(session: DecoderSession, golden: DecoderGolden, budget: Budget) -> list[Rung]:
    """All rungs of the base or of one adapter; the first one also takes greedy tokens and steering."""
    session.set_adapter(golden.adapter)
    rungs: list[Rung] = []
    for name, layout in _layouts(session, golden).items():
        logits = _run(session, golden, layout)
        found = sorted(logits)
        figures = compare(_stacked(logits, found), golden.logits[found]) if found else NOTHING
        given = sum(not np.isnan(row).all() for row in logits.values())
        expected = len(golden.logits) if layout.only is None else len(found)
        note = "" if given == expected else f"{given} of {expected} positions have logits"
        delta, unmoved = None, ""
        if not rungs:
            differs = _greedy_difference(session, golden)
            if golden.steering is not None:
                delta, unmoved = steering_shown(session, golden.name, _delta(session, golden, golden.steering, logits, layout))
            figures, note = replace(figures, greedy_equal=not differs), differs or unmoved or note
        widened = golden.widened(budget, compared=len(found))
        rungs.append(judge(f"{golden.name}: {name}", "eager", figures, widened, delta=delta, note=note))
    return rungs


def _greedy_difference(session: DecoderSession, golden: DecoderGolden) -> str:
    """Where the session's greedy tokens leave the golden ones; empty where they do not."""
    prompts = [row[:n].tolist() for row, n in zip(golden.rows, golden.prompt_length, strict=True)]
    tokens = greedy_tokens(session, prompts, golden.greedy.shape[1])
    differs = np.argwhere((tokens != golden.greedy) & (golden.greedy >= 0))
    return f"greedy tokens differ from row {differs[0][0]}, token {differs[0][1]} on" if len(differs) else ""


def _delta(session: DecoderSession, golden: DecoderGolden, steering: Steering, steered: dict[int, np.ndarray], layout: _Layout) -> Delta:
    session.set_adapter(None)
    base = _run(session, golden, layout)
    session.set_adapter(golden.name)
    found = sorted(steered)
    return compare_deltas(_stacked(steered, found), _stacked(base, found), steering[0][found], steering[1][found])


def _stacked(logits: dict[int, np.ndarray], positions: list[int]) -> np.ndarray:
    return np.stack([logits[k] for k in positions])


def decoder_figures(session: DecoderSession, golden: DecoderGolden) -> tuple[Figures, Delta]:
    """What ``runtimes.golden.steering_figures`` says, of a decoder."""
    steering, layout = golden.stored_steering(), next(iter(_layouts(session, golden).values()))
    session.set_adapter(golden.name)
    logits = _run(session, golden, layout)
    found = sorted(logits)
    return compare(_stacked(logits, found), steering[0][found]), _delta(session, golden, steering, logits, layout)


def decoder_quality(session: DecoderSession, golden: DecoderGolden) -> Quality | None:
    """What is left of ``golden``'s name on its completions; None where no likelihood of them was recorded."""
    if golden.recorded is None:
        return None
    session.set_adapter(golden.adapter)
    pairs = zip(golden.rows, golden.prompt_length, strict=True)
    here = np.concatenate([log_likelihoods(session, row.tolist(), int(prompt)) for row, prompt in pairs])
    return quality(golden.name, here, golden.recorded)
