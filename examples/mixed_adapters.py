"""Every adapter of a bundle, and the base, in one batch of stock onnxruntime: a row each. Nothing of this project is imported.

`python examples/mixed_adapters.py [BUNDLE [PROMPT]]`, after examples/train_and_export.py.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

PROMPT = "<s><|user|>Tell me about the bright island.<|assistant|>"  # as the base's chat template renders it
folder, prompt = (*sys.argv[1:], *("examples-out/bundle", PROMPT)[len(sys.argv) - 1 :])
files = sorted(Path(folder).glob("adapters/*.onnx_adapter"))
read = [onnxruntime.AdapterFormat.read_adapter(str(file)) for file in files]  # kept: its values lie in its own memory
adapters = [{name: value.numpy() for name, value in each.get_parameters().items()} for each in read]
rules = [name for name, value in adapters[0].items() if value.ndim == 1]  # the numbers of an adapter's position rule
banks = [name for name in adapters[0] if name not in rules]  # the parameters of its N edits: [N, r, D], [N, r], or RED's [N, D]
edits = [max(len(adapter[name]) for name in banks) for adapter in adapters]

feeds = {name: np.array([0, *(adapter[name][0] for adapter in adapters)]) for name in rules}  # row 0 edits nothing: the base
feeds["reft.first_slot"] = np.cumsum([0, 0, *edits[:-1]])  # where a row's edits begin in the stacked banks
for name in banks:  # (NoReFT with an activation: of one rank only, as its halves cannot be filled up at their end)
    rank = max(adapter[name].shape[1] for adapter in adapters)
    # A node that an adapter does not edit has one edit there, of nothing.
    parts = [adapter[name].repeat(n // len(adapter[name]), 0) for n, adapter in zip(edits, adapters, strict=True)]
    feeds[name] = np.concatenate([np.pad(x, [(0, 0), (0, rank - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]) for x in parts])

options = onnxruntime.SessionOptions()
options.log_severity_level = 3  # onnxruntime warns of initializers that are inputs, too: the banks are, so that adapters swap
session = onnxruntime.InferenceSession(str(Path(folder, "model.onnx")), options, providers=["CPUExecutionProvider"])
caches = [i for i in session.get_inputs() if i.name.startswith("past_key_values.")]
names, rows = [o.name for o in session.get_outputs()], 1 + len(files)
tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
ids = np.tile(tokenizer.encode(prompt, add_special_tokens=False).ids, (rows, 1))
past, new = {c.name: np.zeros((rows, c.shape[1], 0, c.shape[3]), np.float32) for c in caches}, ids
for _ in range(24):
    positions = np.tile(np.arange(ids.shape[1] - new.shape[1], ids.shape[1]), (rows, 1))
    inputs = {"input_ids": new, "attention_mask": np.ones_like(ids), "position_ids": positions, **past, **feeds}
    outputs = dict(zip(names, session.run(None, inputs), strict=True))
    past = {name: outputs[name.replace("past_key_values", "present")] for name in past}
    new = outputs["logits"][:, -1:].argmax(2)
    ids = np.concatenate([ids, new], 1)
for name, row in zip(["base", *(file.stem for file in files)], ids, strict=True):
    print(f"{name}: {tokenizer.decode(row[-24:].tolist())}")
