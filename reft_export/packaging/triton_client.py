"""Asks a Triton server that serves this folder's models: python client.py PROMPT [ADAPTER [URL]]. Greedy, one row.

numpy alone but for the tokenizer and the connection; ``answer`` is to be read and taken.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"FP32": np.float32, "FP16": np.float16, "INT8": np.int8}
Infer = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
"""A request: the model's inputs by name to its outputs."""


def answer(
    infer: Infer,
    inputs: Sequence[Mapping[str, Any]],
    tokens: Sequence[int],
    adapter: Mapping[str, np.ndarray],
    *,
    count: int = 64,
    stop: Collection[int] = (),
) -> list[int]:
    """At most ``count`` greedy tokens after ``tokens``.

    ``inputs``: name, datatype and shape of each, as Triton's metadata has them. ``adapter``: its tensors; none is the base. The first
    request holds the whole prompt, by which the graph tells which tokens to edit; a later one holds a token, and the cache that came back.
    """
    names = {each["name"] for each in inputs}
    caches = [each for each in inputs if each["name"].startswith("past_key_values.")]
    past = {c["name"]: np.zeros((1, int(c["shape"][1]), 0, int(c["shape"][3])), DTYPES[c["datatype"]]) for c in caches}
    said: list[int] = []
    new = list(tokens)
    while len(said) < count and not (said and said[-1] in stop):
        seen = len(tokens) + len(said)
        feeds = {"input_ids": np.array([new], np.int64), "attention_mask": np.ones((1, seen), np.int64), **past, **adapter}
        if "position_ids" in names:
            feeds["position_ids"] = np.arange(seen - len(new), seen, dtype=np.int64)[None]
        if "reft.first_logit" in names:  # logits of the last column alone
            feeds["reft.first_logit"] = np.array([len(new) - 1], np.int64)
        outputs = infer(feeds)
        past = {name: outputs[name.replace("past_key_values", "present", 1)] for name in past}
        new = [int(outputs["logits"][0, -1].argmax())]
        said += new
    return said


def encoded(tokenizer: Any, prompt: str, stop: Collection[int]) -> list[int]:
    """The whole prompt's tokens, whatever a tokenizer.json says of cutting and padding, and without an end that it puts behind them."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    framed, plain = (tokenizer.encode(prompt, add_special_tokens=special).ids for special in (True, False))
    rest = framed[:-1]
    added = bool(framed) and framed[-1] in stop and rest[len(rest) - len(plain) :] == plain  # not the text's own
    return rest if added else framed


def main(prompt: str, adapter: str = "", url: str = "localhost:8000") -> None:
    from tokenizers import Tokenizer

    triton: Any = import_module("tritonclient.http")
    folder = Path(__file__).parent
    about = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    client = triton.InferenceServerClient(url)

    def infer(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        given = []
        for name, array in feeds.items():
            given.append(triton.InferInput(name, list(array.shape), triton.np_to_triton_dtype(array.dtype)))
            given[-1].set_data_from_numpy(array)
        result = client.infer(about["model"], given)
        return {each["name"]: result.as_numpy(each["name"]) for each in result.get_response()["outputs"]}

    tensors = dict(np.load(folder / "adapters" / f"{adapter}.npz")) if adapter else {}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    metadata = client.get_model_metadata(about["model"])
    print(tokenizer.decode(answer(infer, metadata["inputs"], encoded(tokenizer, prompt, about["stop"]), tensors, stop=about["stop"])))


if __name__ == "__main__":
    main(*sys.argv[1:])
