"""Makes ``fixtures/classifiers``: adapters that the real AdapterHub ``adapters`` saved on a tiny RoBERTa classifier, with its own logits.

Run by hand in an environment of its own; the tests read what it wrote:

    pip install "torch>=2.11,<2.14" transformers==4.57.6 adapters==1.3.0
    python generate_classifiers.py
"""

from __future__ import annotations

import os
from pathlib import Path

import adapters
import numpy as np
import torch
from adapters import AutoAdapterModel, LoReftConfig
from transformers import AutoModelForSequenceClassification, RobertaConfig

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "classifiers"
LABELS = ("sad", "calm", "happy")
PAD = 1
TEXTS = [[0, 40, 50, 60, 70, 80, 90, 2], [0, 41, 52, 2], [0, 33, 2]]
"""The last is shorter than a prefix and a suffix of 2 each: they overlap there."""


def main() -> None:
    os.makedirs(FIXTURES, exist_ok=True)
    os.chdir(FIXTURES)  # AdapterHub records the path its model was loaded from
    torch.manual_seed(0)
    names = dict(enumerate(LABELS))
    config = RobertaConfig(
        vocab_size=120, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=40,
        type_vocab_size=1, id2label=names, label2id={label: i for i, label in names.items()},
    )  # fmt: skip
    base = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    base.save_pretrained("base-roberta-tiny")
    case("static", AutoModelForSequenceClassification, tied_weights=False)
    case("flexible", AutoAdapterModel, tied_weights=True, non_linearity="gelu")


def case(name: str, kind: type, **form: object) -> None:
    model = kind.from_pretrained("base-roberta-tiny", dtype=torch.float32, attn_implementation="eager").eval()
    if name == "static":
        adapters.init(model)
    torch.manual_seed(len(name))
    model.add_adapter("case", config=LoReftConfig(layers=[0, 2], prefix_positions=2, suffix_positions=2, r=2, dropout=0.0, **form))
    if name == "flexible":
        model.add_classification_head("case", num_labels=len(LABELS), id2label=dict(enumerate(LABELS)))
    model.train_adapter("case")
    model.eval()
    width = max(map(len, TEXTS))
    ids = torch.tensor([text + [PAD] * (width - len(text)) for text in TEXTS])
    labels = torch.tensor([2, 0, 1])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0)
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids, attention_mask=(ids != PAD).long()).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = Path(name)
    folder.mkdir(exist_ok=True)
    model.save_adapter(str(folder / "adapter"), "case", with_head=True)
    with torch.no_grad():
        # One text at a time: AdapterHub counts a batch's suffix from its last column, pads included.
        logits = [model(input_ids=torch.tensor([text])).logits[0].numpy() for text in TEXTS]
    np.savez(folder / "io.npz", logits=np.stack(logits), **{f"text{i}": np.array(text) for i, text in enumerate(TEXTS)})


if __name__ == "__main__":
    main()
