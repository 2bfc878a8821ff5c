"""Makes ``fixtures/pyreft-generated``: adapters that the real pyreft trained and saved, with its own logits and tokens.

Run by hand in an environment of its own; the tests read what it wrote:

    pip install "torch>=2.11,<2.14" transformers==4.45.1 accelerate datasets matplotlib numpy
    pip install --no-deps pyreft==0.1.0 pyvene==0.1.8
    python generate_pyreft.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyreft
import torch
from pyreft.dataset import get_intervention_locations
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).parent / "fixtures"
PAD, STRIDE = 0, 3
PROMPTS = [[5, 17, 201, 44, 9, 120, 77, 31], [8, 250, 19, 66, 102], [7, 90, 33]]
COMPLETION = [61, 150, 12]

BLOCK = [(1, "block_output"), (2, "block_output")]
SINGLE = {"sites": BLOCK, "rank": 4, "positions": "f2+l2", "share_weights": True, "act_fn": None}
CASES = {
    "direft": SINGLE | {"classes": "Direft"},
    "direft_relu_untied": SINGLE | {"classes": "Direft", "act_fn": "relu", "sites": BLOCK * 2, "share_weights": False},
    "nodireft_bias_silu": SINGLE | {"classes": "Nodireft", "add_bias": True, "act_fn": "silu"},
    "noreft_tanh": SINGLE | {"classes": "Noreft", "act_fn": "tanh", "positions": "f1+l3"},
    "noreft_bias_untied": SINGLE | {"classes": "Noreft", "add_bias": True, "sites": BLOCK * 2, "share_weights": False},
    "consreft": SINGLE | {"classes": "Consreft", "rank": 3},
    "consreft_untied": SINGLE | {"classes": "Consreft", "sites": BLOCK * 2, "share_weights": False, "positions": "f1+l2"},
    "lobireft": SINGLE | {"classes": "Lobireft", "rank": 2, "positions": "l1"},
    "loreft_mlp_output": SINGLE | {"sites": [(0, "mlp_output"), (3, "mlp_output")]},
    "loreft_attention_output": SINGLE | {"sites": [(1, "attention_output"), (2, "attention_output")], "positions": "f3"},
    "loreft_block_input": SINGLE | {"sites": [(0, "block_input"), (2, "block_input")], "rank": 2, "positions": "f1+l1"},
    "loreft_every_stream": SINGLE
    | {"sites": [(1, "block_input"), (1, "attention_output"), (1, "mlp_output"), (1, "block_output")], "rank": 2, "positions": "l2"},
    "loreft_paths": SINGLE
    | {
        "sites": [
            (0, "model.layers[1].mlp.output"),
            (0, "model.layers[3].output"),
            (0, "model.layers[2].self_attn.output"),
            (0, "model.layers[2].input"),
            (0, "model.layers[0].mlp.down_proj.output"),
        ]
    },
    "loreft_gelu_new_untied": SINGLE | {"act_fn": "gelu_new", "sites": BLOCK * 2, "share_weights": False},
    "loreft_bf16": SINGLE | {"bf16": True},
    "loreft_one_a_site_untied": SINGLE | {"share_weights": False},
    "loreft_two_a_site": SINGLE | {"sites": BLOCK * 2},
    "loreft_two_a_site_last": SINGLE | {"sites": BLOCK * 2, "share_weights": False, "positions": "l1"},
    "mixed_ranks_and_classes": SINGLE | {"classes": ["Loreft", "Noreft"], "ranks": [4, 2]},
    "mixed_forms": SINGLE | {"classes": ["Nodireft", "Consreft"], "ranks": [1, 3]},
    "mixed_ranks_gelu": SINGLE | {"classes": ["Loreft", "Noreft"], "ranks": [3, 2], "act_fn": "gelu"},
    "loreft_full_rank": SINGLE | {"classes": "Consreft", "rank": 64, "sites": BLOCK[:1]},
}


def locations(case: dict, lengths: list[int], shift: list[int], n: int) -> list:
    """unit_locations [interventions][batch][positions]: each row's own, moved by what stands before its first token."""
    rows = []
    for length, offset in zip(lengths, shift, strict=True):
        options = {"positions": case["positions"], "share_weights": case["share_weights"], "num_interventions": n}
        where = get_intervention_locations(last_position=length, **options)
        # pad_mode "first" writes -1 for what a short prompt has no token for: the token before the first, which the caller masks.
        rows.append([[p + offset for p in w] for w in where])
    return [[rows[b][i] for b in range(len(lengths))] for i in range(n)]


def layouts() -> dict[str, tuple[torch.Tensor, torch.Tensor, list[int], list[int]]]:
    """name: (input_ids, attention_mask, prompt lengths, columns before the first token). Every prompt has a pad before it."""
    lengths, width = list(map(len, PROMPTS)), max(map(len, PROMPTS))
    made = {"single": ([[PAD, *PROMPTS[0]]], [1], [lengths[0]])}
    made["lpad"] = ([[PAD] * (width + 1 - n) + p for p, n in zip(PROMPTS, lengths, strict=True)], [width + 1 - n for n in lengths], lengths)
    with_completion = [[PAD, *p, *COMPLETION, *[PAD] * (width - n)] for p, n in zip(PROMPTS, lengths, strict=True)]
    made["sink_rpad"] = (with_completion, [1] * 3, lengths)
    result = {}
    for name, (rows, shift, prompt) in made.items():
        ids = torch.tensor(rows)
        result[name] = (ids, (ids != PAD).long(), prompt, shift)
    return result


def build(case: dict, model) -> pyreft.ReftModel:
    torch.manual_seed(sum(map(ord, repr(sorted(case.items())))))
    representations = []
    for i, (layer, component) in enumerate(case["sites"]):
        classes = case.get("classes", "Loreft")
        kind = getattr(pyreft, f"{classes if isinstance(classes, str) else classes[i % len(classes)]}Intervention")
        rank = case["ranks"][i % len(case["ranks"])] if "ranks" in case else case["rank"]
        intervention = kind(
            embed_dim=64,
            low_rank_dimension=rank,
            dtype=torch.float32,
            act_fn=case["act_fn"],
            add_bias=case.get("add_bias", False),
        )
        representations.append({"layer": layer, "component": component, "low_rank_dimension": rank, "intervention": intervention})
    return pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))


def main() -> None:
    for name, case in CASES.items():
        model = AutoModelForCausalLM.from_pretrained(FIXTURES / "base-llama-tiny", torch_dtype=torch.float32, attn_implementation="eager")
        model.eval()
        reft = build(case, model)
        n = len(case["sites"])

        def forward(batch, reft=reft, case=case, n=n):
            ids, mask, lengths, shift = batch
            where = {"sources->base": (None, locations(case, lengths, shift, n))}
            return reft({"input_ids": ids, "attention_mask": mask}, unit_locations=where)[1].logits

        batches = layouts()
        ids, mask, *_ = batches["sink_rpad"]
        parameters = [p for v in reft.interventions.values() for p in v.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.0)
        for _ in range(6):
            logits = forward(batches["sink_rpad"])
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if case.get("bf16"):
            for intervention in reft.interventions.values():
                intervention.learned_source.to(torch.bfloat16)
        folder = FIXTURES / "pyreft-generated" / name
        reft.save(str(folder / "adapter"))
        if case.get("bf16"):  # the arithmetic in float32, of the values as they were saved
            for intervention in reft.interventions.values():
                intervention.learned_source.to(torch.float32)
        arrays = {}
        with torch.no_grad():
            for layout, batch in batches.items():
                ids, mask, lengths, shift = batch
                arrays[f"{layout}/input_ids"], arrays[f"{layout}/attention_mask"] = ids.numpy(), mask.numpy()
                arrays[f"{layout}/prompt_len"] = np.array(lengths)
                arrays[f"{layout}/logits"] = forward(batch)[..., ::STRIDE].numpy()
                if layout == "sink_rpad":
                    continue
                where = {"sources->base": (None, locations(case, lengths, shift, n))}
                options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
                inputs = {"input_ids": ids, "attention_mask": mask}
                _, out = reft.generate(inputs, unit_locations=where, intervene_on_prompt=True, **options)
                arrays[f"{layout}/greedy_tokens"] = out[:, ids.shape[1] :].numpy()
        np.savez_compressed(folder / "io.npz", **arrays)
        meta = {k: case[k] for k in ("positions", "share_weights", "act_fn")}
        (folder / "meta.json").write_text(json.dumps(meta | {"classes": case.get("classes", "Loreft")}, indent=1) + "\n")
        print(name, float(loss.detach()))


if __name__ == "__main__":
    main()
