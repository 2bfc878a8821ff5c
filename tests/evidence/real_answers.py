"""Greedy answers of a float32 bundle of SmolLM2 and its adapters against plain hooks in eager PyTorch, for as many prompts as are asked.

    PYTHONPATH=tests:tests/real python -m evidence.real_answers MODEL BUNDLE [ADAPTER/]... [--prompts 50] [--tokens 24]

``BUNDLE`` holds the adapters under their folders' names; 50 prompts of the base and three adapters are 200 answers. One line for every
answer that differs although its two best logits differed by more than 1e-3, and the counts.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from plain_hooks import MARGIN, greedy

from reft_export.base.load import load_base
from reft_export.quickstart import upper
from runtimes.artifacts.bundle import open_bundle
from runtimes.generation import greedy_tokens
from runtimes.open import open_session


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("adapters", nargs="*", type=Path)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=24)
    asked = parser.parse_args()
    texts = (*upper.held_out_prompts(), *(example["prompt"] for example in upper.training_examples()))[: asked.prompts]
    base = load_base(asked.model, require_tokenizer=True)
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = [
        base.tokenizer(base.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), add_special_tokens=False)[
            "input_ids"
        ]
        for chat in chats
    ]
    answers = wrong = cut = 0
    with open_session(open_bundle(asked.bundle)) as session:
        for folder in (None, *asked.adapters):
            name = None if folder is None else folder.resolve().name
            session.set_adapter(name)
            for text, prompt in zip(texts, prompts, strict=True):
                (wanted,) = greedy(base.model, [prompt], asked.tokens, folder)
                found = greedy_tokens(session, [prompt], asked.tokens)[0].tolist()
                answers, cut = answers + 1, cut + (wanted.certain < asked.tokens)
                if found[: wanted.certain] != list(wanted.tokens[: wanted.certain]):
                    wrong += 1
                    print(f"{name or 'base'}: {text!r}: {found} against {list(wanted.tokens)}", flush=True)
            print(f"{name or 'base'}: {answers} answers so far, {wrong} differ, {cut} compared up to a margin of {MARGIN:g}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
