"""What the manifest says of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reft_export.base.token_rules import bos_token, context_of, pad_token, stop_tokens, vocabulary_of
from runtimes.artifacts.manifest import ModelRecord

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from reft_export.base.load import Base


def model_record(base: Base) -> ModelRecord:
    config = base.model.config.get_text_config()
    return ModelRecord(
        name=base.info.name,
        model_type=config.model_type,
        fingerprint=base.info.fingerprint,
        vocab_size=vocabulary_of(base),
        hidden_size=base.info.hidden_size,
        num_hidden_layers=base.info.num_hidden_layers,
        context_length=context_of(base),
        num_attention_heads=config.num_attention_heads,
        bos_token_id=bos_token(base),
        eos_token_ids=stop_tokens(base),
        pad_token_id=pad_token(base),
        sliding_window=_window(config),
        parts=base.info.parts,
    )


def _window(config: PretrainedConfig) -> int | None:
    # GPT-Neo's local layers.
    return getattr(config, "sliding_window", None) or (config.window_size if config.model_type == "gpt_neo" else None)
