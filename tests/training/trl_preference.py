"""What trl's trainers say of three pairs on a steered base: ``python trl_preference.py`` writes trl_preference.json; trl is needed for that
alone, and test_preference.py reads the file. Weights are sines, so that no random generator decides them."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from models.bases import build_base, byte_tokenizer
from tiny import random_adapter
from torch import Tensor
from transformers import PreTrainedModel

from reft_export.base.load import Base, base_from_memory
from reft_export.eager.steering import steered
from runtimes.edits.adapter import Adapter

FIGURES = Path(__file__).with_suffix(".json")
BETAS = (0.1, 0.7)
PAIRS = [  # each prompt with the start token that the orpo trainer sets before it
    {"prompt": "<s>what is it?", "chosen": " a fox", "rejected": " no"},
    {"prompt": "<s>who?", "chosen": " me", "rejected": " somebody else"},
    {"prompt": "<s>why not", "chosen": " x", "rejected": " yy"},
]


@torch.no_grad()
def sine_model() -> PreTrainedModel:
    model = build_base("llama", layers=2)
    for shift, (name, parameter) in enumerate(sorted(model.named_parameters())):
        parameter.copy_((1.0 if "norm" in name else 0.0) + 0.2 * sines(parameter.shape, shift))
    return model


def sines(shape: Iterable[int], shift: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float64) * (1.7 + 0.13 * shift) ** 2).float().reshape(tuple(shape))


def sine_adapter(base: Base) -> Adapter:
    """Of RED, at every token: two vectors a site."""
    made = random_adapter(base.info, method="red", rank=0, positions="all", layers=(0, 1))
    tensors = {
        name: (0.3 * sines(each.shape, k) + ("scale" in name)).numpy() for k, (name, each) in enumerate(sorted(made.tensors.items()))
    }
    return replace(made, tensors=tensors)


def main() -> None:
    import trl
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, tokenizer = sine_model(), byte_tokenizer()
    plain, base = copy.deepcopy(model), base_from_memory(model, tokenizer)
    figures: dict[str, Any] = {"trl": trl.__version__}
    with steered(model, sine_adapter(base)):
        for beta in BETAS:
            shared: dict[str, Any] = {
                "output_dir": tempfile.mkdtemp(), "beta": beta, "per_device_train_batch_size": len(PAIRS), "report_to": "none",
                "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_length": 64,
            }  # fmt: skip
            data: dict[str, Any] = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": tokenizer}
            dpo = DPOTrainer(model=model, ref_model=plain, args=DPOConfig(**shared), **data)
            orpo = ORPOTrainer(model=model, args=ORPOConfig(**shared), **data)
            model.eval()
            with torch.no_grad():
                loss = dpo.compute_loss(model, next(iter(dpo.get_train_dataloader())))
                _, told = orpo.get_batch_loss_metrics(model, next(iter(orpo.get_train_dataloader())))
            figures[str(beta)] = {
                "dpo": float(loss),
                "orpo_log_odds_ratio": told["log_odds_ratio"],
                "orpo_mean_logps": [told["logps/chosen"], told["logps/rejected"]],
            }
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
