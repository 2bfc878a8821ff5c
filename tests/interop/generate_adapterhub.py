"""Makes ``fixtures/adapterhub-generated``: adapters that the real AdapterHub ``adapters`` saved, with its own logits and tokens.

Run by hand in an environment of its own; the tests read what it wrote:

    pip install "torch>=2.11,<2.14" transformers==4.57.6 adapters==1.3.0
    python generate_adapterhub.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import adapters
import numpy as np
import torch
from adapters import DiReftConfig, LoReftConfig, NoReftConfig
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).resolve().parent / "fixtures"
PAD, STRIDE = 0, 3
PROMPTS = [[5, 17, 201, 44, 9, 120, 77, 31], [8, 250, 19, 66, 102], [7, 90, 33]]
"""The last is shorter than a prefix and a suffix of 2 each: they overlap there."""

EITHER = {"layers": [1, 2], "prefix_positions": 2, "suffix_positions": 2, "r": 3, "dropout": 0.0}
CASES = {
    "loreft_untied": LoReftConfig(**EITHER),
    "loreft_tied_gelu": LoReftConfig(**EITHER, tied_weights=True, non_linearity="gelu"),
    "loreft_suffix_only": LoReftConfig(**EITHER | {"prefix_positions": 0, "layers": [3]}),
    "loreft_full_rank": LoReftConfig(**EITHER | {"r": 64, "layers": [1]}, tied_weights=True),
    "noreft_untied_relu": NoReftConfig(**EITHER, non_linearity="relu"),
    "noreft_tied_all": NoReftConfig(**EITHER | {"layers": "all"}, tied_weights=True),
    "direft_untied": DiReftConfig(**EITHER),
    "direft_prefix_swish": DiReftConfig(**EITHER | {"suffix_positions": 0, "dropout": 0.1}, non_linearity="swish"),
}


def main() -> None:
    os.chdir(FIXTURES)  # AdapterHub records the path its model was loaded from
    for name, config in CASES.items():
        torch.manual_seed(len(name))
        model = AutoModelForCausalLM.from_pretrained("base-llama-tiny", dtype=torch.float32, attn_implementation="eager").eval()
        adapters.init(model)
        model.add_adapter("case", config=config)
        width = max(map(len, PROMPTS))
        rows = {
            "single": [PROMPTS[0]],
            "rpad": [p + [PAD] * (width - len(p)) for p in PROMPTS],
            "lpad": [[PAD] * (width - len(p)) + p for p in PROMPTS],
        }
        batches = {k: torch.tensor(v) for k, v in rows.items()}
        ids = batches["rpad"]
        model.train_adapter("case")
        model.eval()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
        for _ in range(6):
            logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        folder = FIXTURES / "adapterhub-generated" / name
        folder.mkdir(parents=True, exist_ok=True)
        model.save_adapter(str(folder / "adapter"), "case", use_safetensors=name.startswith("direft"))
        for head in folder.glob("adapter/*head*"):
            if name != "loreft_untied":  # one head is enough to show that it is compared
                head.unlink()
        arrays = {}
        with torch.no_grad():
            for layout, ids in batches.items():
                mask = (ids != PAD).long()
                arrays[f"{layout}/input_ids"], arrays[f"{layout}/attention_mask"] = ids.numpy(), mask.numpy()
                arrays[f"{layout}/logits"] = model(input_ids=ids, attention_mask=mask).logits[..., ::STRIDE].numpy()
            # Its own generate without a KV cache, in which the suffix is the end of the growing text.
            ids, tokens = batches["single"], []
            for _ in range(8):
                token = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].argmax(-1)
                tokens.append(int(token))
                ids = torch.cat([ids, token[:, None]], 1)
            arrays["single/greedy_tokens_cache0"] = np.array([tokens])
        np.savez_compressed(folder / "io.npz", **arrays)
        (folder / "meta.json").write_text(json.dumps({"subtract_projection": bool(config.subtract_projection)}) + "\n")
        print(name, float(loss.detach()))


if __name__ == "__main__":
    main()
