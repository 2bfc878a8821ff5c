"""``PYTHONPATH=tests python -m evidence.bank_rounding BUNDLE ADAPTER PROBES.jsonl``: what is left of an adapter whose banks lose bits, and
what widening them would cost.

Banks are rounded where they lie, to float16 and to int8 with a scale for each row of D, and the bundle's graph computes with what came of
it. Over the logits of an answer's tokens: delta cosine of steered minus base, against the adapter's own; the largest difference over the
largest logit; how often the likeliest token is the same. Times are of the processor, as ratios: of one thread, the least of five.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from runtimes.bank import AdapterBank
from runtimes.generation import DecodeBatch
from runtimes.open import open_artifact, open_bank, open_session
from runtimes.parity.figures import compare_deltas
from runtimes.rows import AdapterRows
from runtimes.session import DecoderSession, as_decoder
from runtimes.text.chat import template_for
from runtimes.text.prompts import encode
from runtimes.text.tokenizer import Tokenizer

PROBES, ANSWER = 12, 16
RESIDENT = 10_000


def int8(bank: np.ndarray) -> np.ndarray:
    scale = np.abs(bank).max(-1, keepdims=True) / 127
    return np.round(bank / np.where(scale == 0, 1, scale)) * scale


ROUNDED: dict[str, Callable[[np.ndarray], np.ndarray]] = {"float16": lambda bank: bank.astype(np.float16), "int8": int8}


def logits(session: DecoderSession, rows: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """[tokens, V] of every answer's tokens."""
    return np.concatenate(list(_logits(session, rows)))


def _logits(session: DecoderSession, rows: list[tuple[list[int], list[int]]]) -> Iterator[np.ndarray]:
    for prompt, answer in rows:
        ids = np.array([[*prompt, *answer]], np.int64)
        yield session.step(ids, np.ones_like(ids), prompt_length=np.array([len(prompt)])).logits[0, len(prompt) - 1 :].astype(np.float64)


def least(do: Callable[[], object]) -> float:
    found = []
    for _ in range(5):
        start = time.process_time()
        do()
        found.append(time.process_time() - start)
    return min(found)


def load_again(bank: AdapterBank, name: str) -> None:
    bank.evict(name)
    bank.load(name)


def main(folder: str, name: str, probes: str) -> None:
    bundle = open_artifact(folder)
    tokenizer, template = Tokenizer.load(bundle.folder, bundle.manifest.model), template_for(bundle, name, "auto")
    lines = [json.loads(line) for line in Path(probes).read_text(encoding="utf-8").splitlines()[:PROBES]]
    asked = [encode([{"role": "user", "content": line["prompt"]}], tokenizer, template, None, "auto") for line in lines]
    rows = [(ids, tokenizer.encode_prompt(line["completion"])[:ANSWER]) for ids, line in zip(asked, lines, strict=True)]
    bank = open_bank(bundle)
    with open_session(bundle, threads=1) as opened:
        session = as_decoder(opened)
        base = logits(session, rows)
        batch = DecodeBatch(session, [rows[0][0]], new_tokens=8)
        batch.prefill()
        decode = least(lambda: batch.append([rows[0][0][0]]))
        with AdapterRows(bank, [name]) as adapters:
            session.set_rows(adapters)
            steered = logits(session, rows)
            arrays = bank.stacked.arrays
            kept = {bank_name: array.copy() for bank_name, array in arrays.items()}
            for dtype, rounded in ROUNDED.items():
                for bank_name, array in arrays.items():
                    array[...] = rounded(kept[bank_name])
                now = logits(session, rows)
                cosine = compare_deltas(now, base, steered, base).cosine
                largest, same = np.abs(now - steered).max() / np.abs(steered).max(), (now.argmax(1) == steered.argmax(1)).mean()
                print(f"{dtype}: 1 - delta cosine {1 - cosine:.1e}, largest {largest:.1e}, same likeliest {same:.4f} of {len(now)}")
    one = [array[:1].astype(np.float16) for array in kept.values()]
    all_of_one = np.zeros((RESIDENT, *one[0].shape[1:]), np.float16) + np.float16(1)
    widened = least(lambda: all_of_one.astype(np.float32)) * sum(array.nbytes for array in one) / one[0].nbytes
    single = least(lambda: [array.astype(np.float32) for array in one])
    bank.load(name)
    read = least(lambda: load_again(bank, name))
    print(f"widening the banks of {RESIDENT} adapters: {widened / decode:.2f} decode steps; of one: {single / read:.4f} of a load")
    print(f"an adapter of {name}'s size: {bank.memory.adapters / 1e3:.1f} kB")


if __name__ == "__main__":
    main(*sys.argv[1:])
