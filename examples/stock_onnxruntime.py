"""A steered bundle in stock onnxruntime, decoded greedily. Nothing of this project is imported.

`python examples/stock_onnxruntime.py [BUNDLE [PROMPT]]`, after examples/train_and_export.py.
"""

import json
import sys
import sysconfig
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

PROMPT = "<s><|user|>Tell me about the bright island.<|assistant|>"  # as the base's chat template renders it
folder, prompt = (*sys.argv[1:], *("examples-out/bundle", PROMPT)[len(sys.argv) - 1 :])
bundle = Path(folder)
stop = json.loads((bundle / "manifest.json").read_text())["model"]["eos_token_ids"]
tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))

# The op library has the fused kernels; without it the ONNX function in the graph carries the edit.
library = Path(sysconfig.get_path("platlib"), "runtimes", "native", "lib", "libreft_ort.so")
options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # onnxruntime warns of initializers that are inputs, too: the banks are, so that adapters swap
if library.is_file():
    options.register_custom_ops_library(str(library))
print(f"edits: {'fused kernels of ' + library.name if library.is_file() else 'ONNX function'}")
session = onnxruntime.InferenceSession(str(bundle / "model.onnx"), options, providers=["CPUExecutionProvider"])
caches = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
names = [o.name for o in session.get_outputs()]


def decode(adapter: Path | None, tokens: list[int], count: int) -> list[int]:
    """Greedy tokens. The first call holds the whole prompt, by which the graph tells the positions to edit."""
    run = onnxruntime.RunOptions()
    if adapter is not None:
        weights = onnxruntime.LoraAdapter()
        weights.Load(str(adapter))
        run.add_active_adapter(weights)
    past = {c.name: np.zeros((1, c.shape[1], 0, c.shape[3]), np.float32) for c in caches}
    answer, new = [], tokens
    while len(answer) < count and (not answer or answer[-1] not in stop):
        seen = len(tokens) + len(answer)
        feeds = {"input_ids": np.array([new]), "attention_mask": np.ones((1, seen), np.int64), **past}
        feeds["position_ids"] = np.arange(seen - len(new), seen)[None]
        outputs = dict(zip(names, session.run(None, feeds, run), strict=True))
        past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
        new = [int(outputs["logits"][0, -1].argmax())]
        answer += new
    return answer


tokens = tokenizer.encode(prompt, add_special_tokens=False).ids
for adapter in (None, *sorted(bundle.glob("adapters/*.onnx_adapter"))):
    print(f"{adapter.stem if adapter else 'base'}: {tokenizer.decode(decode(adapter, tokens, 48))}")
