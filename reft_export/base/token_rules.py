"""What a base decides about tokens: which end an answer, which pads, what begins a prompt, and how many its context holds.

The host's half of rules that a device follows too: what they give is recorded in the manifest, and training reads it here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from reft_export.base.classifiers import context_of as classifier_context
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION
from runtimes.errors import InputError
from runtimes.text.stop_tokens import end_of_turn, stop_token_ids, without_added_end

if TYPE_CHECKING:  # fold runs without torch, whose import takes longer than the fold
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reft_export.base.load import Base

DEFAULT_CONTEXT = 2048
"""Tokens of a decoder whose configuration states no limit (ALiBi): a device must reserve a cache of some size."""

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What families call it: GPT-2 the second, MPT the third."""


def stop_tokens(base: Base) -> tuple[int, ...]:
    """The tokens that end an answer of this base, by the rule of runtimes/text/stop_tokens.py."""
    tokenizer, generation = base.tokenizer, getattr(base.model, "generation_config", None)  # a classifier has none
    special = frozenset[int]() if tokenizer is None else special_token_ids(tokenizer)
    return stop_token_ids(
        generation=getattr(generation, "eos_token_id", None),
        config=getattr(base.model.config.get_text_config(), "eos_token_id", None),
        tokenizer=getattr(tokenizer, "eos_token_id", None),
        end_of_turn=None if tokenizer is None else _end_of_turn(tokenizer, special),
        special=special,
        vocab_size=vocabulary_of(base),
    )


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def _end_of_turn(tokenizer: PreTrainedTokenizerBase, special: frozenset[int]) -> int | None:
    if not tokenizer.chat_template:
        return None

    def render(messages: Any) -> str:
        try:
            return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
        except Exception:  # templates are programs of their own: one that refuses a question and its answer tells no end of them
            return ""

    return end_of_turn(render, lambda text: plain_tokens(tokenizer, text), special)


def plain_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text's own tokens: what a rendered chat template is encoded to, as it writes its special tokens itself."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str, stop: frozenset[int]) -> list[int]:
    """A prompt outside a chat template: the tokenizer's special tokens in front, and no end behind it."""
    framed = tokenizer(text, verbose=False)["input_ids"]
    return without_added_end(framed, plain_tokens(tokenizer, text), stop)


def end_token(tokenizer: PreTrainedTokenizerBase, stop: tuple[int, ...]) -> int:
    """What a completion without an end of its own is ended with: the tokenizer's eos, else the first stop token.

    Raises InputError where there is neither.
    """
    eos: Any = tokenizer.eos_token_id  # transformers types it as it types every special token, of which some are lists
    ends: list[int] = ([] if eos is None else [eos]) + list(stop)
    if not ends:
        raise InputError("the tokenizer has no eos token to end completions with; set eos_token in tokenizer_config.json")
    return ends[0]


def output_rows(model: PreTrainedModel) -> int:
    """The vocabulary: rows of the logits, or of a classifier's embedding."""
    return int((model.get_output_embeddings() or model.get_input_embeddings()).get_parameter("weight").shape[0])


def vocabulary_of(base: Base) -> int:
    return output_rows(base.model)


def pad_token(base: Base) -> int | None:
    """The model's, which RoBERTa's positions are counted by, else the tokenizer's; None where neither is in the vocabulary."""
    known = (base.model.config.get_text_config().pad_token_id, getattr(base.tokenizer, "pad_token_id", None))
    return next((token for token in known if token is not None and 0 <= token < vocabulary_of(base)), None)


def bos_token(base: Base) -> int | None:
    """The tokenizer's, which a device reads from its files first, too; else the model's."""
    known = (getattr(base.tokenizer, "bos_token_id", None), getattr(base.model.config.get_text_config(), "bos_token_id", None))
    return next((token for token in known if token is not None), None)


def context_of(base: Base) -> int:
    """Tokens of the longest input: training teaches nothing beyond it, as a device takes nothing beyond it."""
    return CONTEXTS[base.task](base.model)


def decoder_context(model: PreTrainedModel) -> int:
    return stated_context(model.config.get_text_config().to_dict()) or DEFAULT_CONTEXT


def stated_context(config: Mapping[str, Any], *nearer: str) -> int | None:
    """What a decoder's configuration says of its context, under the keys ``nearer`` first; None where it says nothing.

    Raises InputError for what is no positive integer.
    """
    return whole_number(config, *nearer, *CONTEXT_KEYS)


CONTEXTS = {TEXT_GENERATION: decoder_context, TEXT_CLASSIFICATION: classifier_context}


def whole_number(config: Mapping[str, Any], *keys: str) -> int | None:
    """The first of ``keys`` that ``config`` has a value for; raises InputError where that is no positive integer."""
    for key in keys:
        value = config.get(key)
        if value:
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"{key} is {value!r} in the configuration beside the graph, expected a positive integer; correct the file")
            return value
    return None
