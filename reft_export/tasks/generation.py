"""A decoder's task. It is recorded on prompts, the base's greedy continuation of them, and that of every adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from jinja2.exceptions import TemplateError

from reft_export.base.token_rules import decoder_context, output_rows
from runtimes.artifacts.ort_adapter_file import Tensor
from runtimes.artifacts.task_names import TEXT_GENERATION
from runtimes.session import Session, as_decoder

if TYPE_CHECKING:  # what the task refuses is said before torch is loaded
    import onnx_ir as ir
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reft_export.base.load import Base
    from reft_export.eager.steering import Steerer, Steering

GREEDY_TOKENS = 64
NAMES_AT_ONCE = 8
"""Base and adapters that are decoded in one batch."""
CONTINUATION = 12
"""How many tokens of the continuation stand in input_ids, so that the decode steps are compared too."""
LOGIT_BYTES = 16 * 2**20
"""Logits are recorded at positions up to this size a name: a 150k vocabulary makes 600 KB a position."""

TEXTS = (
    "Hello!",
    "Tell me a story about a small boat and the sea.",
    "What is the best way to learn how to cook a simple meal at home?",
    "The old house at the end of the road had been empty for years, and yet a light was on.",
)


@dataclass(frozen=True, kw_only=True)
class GoldenInputs:
    """Right-padded prompts with the base's continuation; the same for the base and every adapter."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    prompt_length: np.ndarray
    logit_positions: np.ndarray
    task: ClassVar[str] = TEXT_GENERATION

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return dict(vars(self))

    def logits(self, model: PreTrainedModel, steerer: Steerer | None = None) -> np.ndarray:
        """Logits [K, V] float32 at ``logit_positions``, from one full forward."""
        import torch

        from reft_export.eager.steering import steering_of

        mask = torch.from_numpy(self.attention_mask)
        device = next(model.parameters()).device
        with torch.no_grad(), steering_of(model, steerer) as handle:
            if handle is not None:
                handle.prompt_length = self.prompt_length
            logits = model(
                input_ids=torch.from_numpy(self.input_ids).to(device),
                attention_mask=mask.to(device),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
                use_cache=False,
            ).logits
        rows, columns = torch.from_numpy(self.logit_positions).to(device).unbind(1)
        return logits[rows, columns].float().cpu().numpy()

    def answers(self, model: PreTrainedModel, steerers: Mapping[str, Steerer | None]) -> dict[str, dict[str, np.ndarray]]:
        return {name: {"greedy_tokens": tokens} for name, tokens in eager_greedy(model, self, steerers).items()}

    def rows(self) -> Iterator[PromptRow]:
        for number, real in enumerate(self.attention_mask > 0):
            yield PromptRow(number=number, ids=self.input_ids[number][real][None], prompt_length=int(self.prompt_length[number]))


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptRow:
    """One prompt and its continuation, int64 [1, S]."""

    number: int
    ids: np.ndarray
    prompt_length: int

    def run(self, session: Session) -> tuple[np.ndarray, Mapping[str, Tensor]]:
        output = as_decoder(session).step(self.ids, np.ones_like(self.ids), prompt_length=np.array([self.prompt_length]))
        return output.logits[0], output.outputs

    def eager(self, model: PreTrainedModel, steering: Steering | None) -> torch.Tensor:
        import torch

        ids = torch.from_numpy(self.ids)
        if steering is not None:
            steering.prompt_length = [self.prompt_length]
        return model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False).logits[0]


class Generation:
    """Rows are in tasks/task.py."""

    name = TEXT_GENERATION
    recorded = "logits, greedy tokens"
    decodes, swaps_head = True, False
    no_genai = ""

    def inputs(self, base: Base) -> GoldenInputs:
        return golden_inputs(base.model, golden_prompts(base.model, base.tokenizer))

    def stored_inputs(self, arrays: Mapping[str, np.ndarray]) -> GoldenInputs:
        return GoldenInputs(**{field.name: arrays[field.name] for field in fields(GoldenInputs)})

    def check_settings(self, base: str, *, exporter: str, logits: str) -> None:
        """Every exporter makes decoders, with all logits or the last."""

    def logits_shape(self, logits: str) -> str:
        return f"logits {logits}"

    def padding(self, graph: ir.Graph) -> str:
        from graph_passes.cache_shapes import ATTENTION

        return "none" if any(node.op_type == ATTENTION for node in graph) else "left"

    def kv_cache(self, graph: ir.Graph) -> str:
        from graph_passes.cache_shapes import writes_in_place

        return "in-place" if writes_in_place(graph) else "appended"


def golden_prompts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """A few prompts of different lengths, one of them very short; random tokens for a base without tokenizer."""
    config = model.config.get_text_config()
    room = decoder_context(model) - GREEDY_TOKENS - 1
    if tokenizer is None:
        generator = np.random.default_rng(0)
        prompts = [generator.integers(0, config.vocab_size, n).tolist() for n in (3, 8, 13, 21)]
    elif tokenizer.chat_template:
        prompts = [_chat(tokenizer, text) for text in TEXTS]
    else:
        prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    return [prompt[: max(room, 1)] for prompt in prompts]


def _chat(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        rendered = str(tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True))
    except TemplateError:  # a template that wants more than a user's message; any tokens will do here
        return tokenizer(text)["input_ids"]
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def golden_inputs(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, max_tokens: int = GREEDY_TOKENS) -> GoldenInputs:
    """Pads the prompts and appends the base's own greedy continuation."""
    continuation = _greedy(model, prompts, min(CONTINUATION, max_tokens))
    rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, continuation.tolist(), strict=True)]
    ids, mask = pad_right(rows)
    real = np.argwhere(mask == 1)
    keep = max(8, LOGIT_BYTES // (4 * output_rows(model)))
    if len(real) > keep:
        real = _spread(real, [len(p) for p in prompts], keep)
    return GoldenInputs(
        input_ids=ids, attention_mask=mask, prompt_length=np.array([len(p) for p in prompts], np.int64), logit_positions=real
    )


def _spread(real: np.ndarray, prompts: Sequence[int], keep: int) -> np.ndarray:
    """About ``keep`` of the positions ``real``, [K, 2]: every prompt's first and last one and every row's last one, which show an edit of
    the last layer there, and evenly spread others."""
    rows, columns = real.T
    last = np.append(rows[1:] != rows[:-1], True)
    ends = np.flatnonzero((columns == 0) | (columns == np.asarray(prompts)[rows] - 1) | last)
    others = np.linspace(0, len(real) - 1, max(keep - len(ends), 2)).round().astype(int)
    return real[np.union1d(ends, others)]


def pad_right(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, mask), int64 [B, longest row]; pads are token 0 with mask 0."""
    width = max(map(len, rows))
    ids = np.zeros((len(rows), width), np.int64)
    mask = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def eager_greedy(
    model: PreTrainedModel, inputs: GoldenInputs, steerers: Mapping[str, Steerer | None], *, max_tokens: int = GREEDY_TOKENS
) -> dict[str, np.ndarray]:
    """By name the greedy continuation [B, G] of every prompt; end tokens are ignored, so that every row has G tokens to compare.

    A step reads every weight, however many rows it is for: the rows of NAMES_AT_ONCE names go together, each name's edits on its own.
    """
    from reft_export.eager.steering import steering_of

    prompts = [row[:length].tolist() for row, length in zip(inputs.input_ids, inputs.prompt_length, strict=True)]
    found: dict[str, np.ndarray] = {}
    for start in range(0, len(steerers), NAMES_AT_ONCE):
        names = list(steerers)[start : start + NAMES_AT_ONCE]
        with ExitStack() as steered:
            for number, name in enumerate(names):
                if (handle := steered.enter_context(steering_of(model, steerers[name]))) is not None:
                    handle.rows = slice(number * len(prompts), (number + 1) * len(prompts))
            tokens = _greedy(model, prompts * len(names), max_tokens)
        found |= zip(names, np.split(tokens, len(names)), strict=True)
    return found


def _greedy(model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int) -> np.ndarray:
    import torch

    from reft_export.eager.steering import greedy_tokens

    # Pads stand on the left: a sliding window counts columns, so pads between a prompt and its answer would fill it.
    ids, mask = (np.fliplr(x) for x in pad_right([row[::-1] for row in prompts]))
    tokens = greedy_tokens(model, torch.from_numpy(ids.copy()), torch.from_numpy(mask.copy()), count)
    return np.asarray(tokens, np.int64)
