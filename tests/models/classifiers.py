"""Tiny random encoder classifiers of every family, made from configs, and tokenizers that frame a text as theirs do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from models.bases import WIDTH
from runtimes.errors import InputError

CLASSIFIERS: dict[str, dict[str, object]] = {
    "bert": {"type_vocab_size": 2},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "electra": {"type_vocab_size": 2, "embedding_size": 32},
    "distilbert": {"dim": WIDTH, "hidden_dim": 128, "n_heads": 4},
}
DECODERS: dict[str, dict[str, object]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "phi3"), {"num_key_value_heads": 2}),
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
}
"""What each family's config needs beside what most share."""
ROUTE = "dynamo"
"""The one exporter that takes classifiers; ``export`` refuses the others by name."""
LABELS = ("sad", "calm", "happy")
CLS, PAD, SEP = 0, 1, 2
FIRST_BYTE = 3
VOCABULARY, POSITIONS = FIRST_BYTE + 256, 66


def build_classifier(
    family: str, *, layers: int = 2, labels: tuple[str, ...] = LABELS, overrides: Mapping[str, object] = {}
) -> PreTrainedModel:
    """A random classifier whose logits depend on its text: weights five times their initial scale, norms and biases not trivial.

    Raises InputError for a family that is not in the list.
    """
    if family not in CLASSIFIERS | DECODERS:
        raise InputError(f"classifier {family!r} is not in the list; it has {', '.join(CLASSIFIERS | DECODERS)}")
    shared: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": CLS,
        "pad_token_id": PAD,
        "eos_token_id": SEP,
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    if family == "distilbert":  # names width and heads in its own way, and takes no second name for them
        shared["n_layers"] = layers
    else:
        shared |= {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**shared, **(CLASSIFIERS | DECODERS)[family], **overrides})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def framing_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token a byte, framed: <s> a </s>, and a pair <s> a </s> b </s> (BERT, with types 0 and 1) or <s> a </s> </s> b </s>."""
    vocabulary = {c: i + FIRST_BYTE for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<s>": CLS, "<pad>": PAD, "</s>": SEP}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pair = "<s> $A </s> $B:1 </s>:1" if family in ("bert", "electra") else "<s> $A </s> </s> $B </s>"
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair=pair, special_tokens=[("<s>", CLS), ("</s>", SEP)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>", pad_token="<pad>"
    )


def save_classifier(
    folder: Path, family: str, *, layers: int = 2, labels: tuple[str, ...] = LABELS, overrides: Mapping[str, object] = {}
) -> Path:
    """A classifier's folder as a user has one."""
    build_classifier(family, layers=layers, labels=labels, overrides=overrides).save_pretrained(folder)
    framing_tokenizer(family).save_pretrained(folder)
    return folder
