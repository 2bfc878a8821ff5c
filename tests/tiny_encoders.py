"""Tiny random encoder classifiers made from configs, and tokenizers that frame a text as theirs do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from tiny import LAYERS, WIDTH
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from reft_export.classifiers import head_parameters

FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")
LABELS = ("sad", "calm", "happy")
CLS, PAD, SEP = 0, 1, 2
FIRST_BYTE = 3
VOCABULARY, POSITIONS = 3 + 256, 66
_SPECIFIC: dict[str, dict[str, object]] = {
    "bert": {"type_vocab_size": 2},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "electra": {"type_vocab_size": 2, "embedding_size": 32},
    "distilbert": {"dim": WIDTH, "hidden_dim": 128, "n_layers": LAYERS, "n_heads": 4},
}


def build(family: str = "roberta", *, labels: tuple[str, ...] = LABELS, **overrides: object) -> PreTrainedModel:
    """A random classifier whose logits depend on its text: large weights, norms and biases not trivial."""
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": CLS,
        "pad_token_id": PAD,
        "eos_token_id": SEP,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if family == "distilbert":
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            del shared[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**shared, **_SPECIFIC[family], **overrides})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def tokenizer(family: str = "roberta") -> PreTrainedTokenizerFast:
    """One token a byte, framed: <s> a </s>, and a pair <s> a </s> b </s> (BERT, with types 0 and 1) or <s> a </s> </s> b </s>."""
    vocabulary = {c: i + FIRST_BYTE for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<s>": CLS, "<pad>": PAD, "</s>": SEP}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pair = "<s> $A </s> $B:1 </s>:1" if family in ("bert", "electra") else "<s> $A </s> </s> $B </s>"
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=pair, special_tokens=[("<s>", CLS), ("</s>", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", pad_token="<pad>"
    )


def save_base(folder: Path, family: str = "roberta", **overrides: object) -> Path:
    """A classifier's folder as a user has one."""
    build(family, **overrides).save_pretrained(folder)
    tokenizer(family).save_pretrained(folder)
    return folder


def random_head(model: PreTrainedModel, seed: int = 0) -> dict[str, np.ndarray]:
    """Another head than the model's own, by parameter name, float32."""
    generator = np.random.default_rng(seed)
    return {
        name: np.asarray(parameter.detach().numpy() + 0.2 * generator.standard_normal(parameter.shape), np.float32)
        for name, parameter in head_parameters(model).items()
    }
