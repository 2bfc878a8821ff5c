"""Holds ``export --format pyreft`` against the real pyreft. Run by hand, in the environment of generate_pyreft.py:

    python check_in_pyreft.py FOLDER         FOLDER/<case>: the export of the imported pyreft-generated/<case>

Twice: the exported state dicts in interventions built as those that were trained, against the logits that pyreft recorded; and the
exported folder through ``ReftModel.load``, against the same of the folder that pyreft wrote. (load makes learned sources in bfloat16,
for both alike; it cannot build Noreft and Nodireft, which want add_bias.)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyreft
import torch
from generate_pyreft import CASES, FIXTURES, STRIDE, build, layouts, locations
from transformers import AutoModelForCausalLM


def logits_of(reft: pyreft.ReftModel, case: dict, layout: str) -> np.ndarray:
    ids, mask, lengths, shift = layouts()[layout]
    where = {"sources->base": (None, locations(case, lengths, shift, len(case["sites"])))}
    with torch.no_grad():
        logits = reft({"input_ids": ids, "attention_mask": mask}, unit_locations=where)[1].logits[..., ::STRIDE]
    return logits.numpy()[mask.numpy() == 1]


def loaded(folder: Path, model: torch.nn.Module) -> pyreft.ReftModel:
    reft = pyreft.ReftModel.load(str(folder), model)
    for intervention in reft.interventions.values():
        intervention.float()
    return reft


def main() -> None:
    worst = 0.0
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        case = CASES[folder.name] | {"add_bias": json.loads((folder / "reft_export.json").read_text())["add_bias"] or False}
        original = FIXTURES / "pyreft-generated" / folder.name
        options = {"torch_dtype": torch.float32, "attn_implementation": "eager"}
        model = AutoModelForCausalLM.from_pretrained(FIXTURES / "base-llama-tiny", **options).eval()
        reft = build(case, model)
        for key, intervention in reft.interventions.items():
            intervention.load_state_dict(torch.load(folder / f"intkey_{key}.bin", weights_only=True))
        loads = case.get("classes", "Loreft") not in ("Noreft", "Nodireft")
        for layout, (_, mask, *_) in layouts().items():
            expected = np.load(original / "io.npz")[f"{layout}/logits"][mask.numpy() == 1]
            figures = [float(np.abs(logits_of(reft, case, layout) - expected).max())]
            if loads:
                pair = [logits_of(loaded(f, model), case, layout) for f in (folder, original / "adapter")]
                figures.append(float(np.abs(pair[0] - pair[1]).max()))
            worst = max(worst, *figures)
            print(f"{folder.name:32} {layout:10} state dicts {figures[0]:.1e}" + (f"   load {figures[1]:.1e}" if loads else ""))
    print(f"worst {worst:.1e}")


if __name__ == "__main__":
    main()
