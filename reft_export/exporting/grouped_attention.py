"""Attention as com.microsoft::GroupQueryAttention, whose KV cache can be written in place, put in while the decoder is traced.

transformers hands queries, keys and values of every layer to a function that is looked up by name, and makes masks by another of the
same name. Here both are ours: the cache hands the new keys and values on instead of appending them, and the function becomes one
operator that appends them and attends. What that operator cannot say is told before anything is traced, by running the decoder with
the operator's own formula in the function's place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from graph_passes.accessors import name_of
from graph_passes.cache_shapes import ATTENTION, PAST_KEY
from reft_export.eager.attention import attention_renamed

IMPLEMENTATION = "reft_export_grouped_query"
"""What a config calls the attention while the decoder is probed and traced."""
HARMLESS = frozenset(
    {"cache_position", "dropout", "is_causal", "output_attentions", "output_hidden_states", "output_router_logits", "position_ids",
     "return_dict", "scaling", "sliding_window", "softcap", "use_cache"}
)  # fmt: skip
"""Arguments of an attention function that the operator has, or that change nothing it computes; ``is_causal`` is false beside a mask."""
PROMPTS, STEPS = (21, 6), 2
"""Tokens of the two rows that the decoder is probed with, and how many decode steps follow them."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-2}
"""Largest logit error of the probe relative to the largest logit: another order of summing, and far below what another mask does."""


class NotGroupedError(Exception):
    """Why a decoder's attention is not what GroupQueryAttention computes, as a clause."""


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """Attributes of one layer's operator: softmax(c tanh(s q K^T / c)) V over the row's last ``window`` tokens, c the soft cap."""

    scale: float
    window: int = -1
    """-1: every token before."""
    softcap: float = 0.0
    """0: none."""


class UngrownLayer(DynamicLayer):
    """Keys and values [B, H, P, D] of the tokens before; those of the step's tokens are handed on, not appended."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, length: int | torch.SymInt) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.past = (keys, values)
        self.present: Sequence[torch.Tensor] = ()
        self.dtype, self.device = keys.dtype, keys.device
        self.length = length
        self.new: tuple[torch.Tensor, torch.Tensor] | None = None
        self.attended = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self.new is not None:
            raise NotGroupedError("layers share a cache")
        self.new = (key_states, value_states)
        return self.new

    def get_seq_length(self, *args: Any) -> Any:
        """Columns of the mask without the step's: a buffer that is written in place is longer than what it holds."""
        return self.length


class GroupedCache(Cache):
    """One step's cache: where the decoder runs, the operator's formula; where it is traced, the operator.

    ``known``: every layer's attributes where a probe has found them; without, they are found.
    """

    def __init__(
        self, past: Sequence[torch.Tensor], mask: torch.Tensor, step: int | torch.SymInt, known: Sequence[LayerAttention] = ()
    ) -> None:
        self.total = mask.shape[1]
        pairs = zip(past[::2], past[1::2], strict=True)
        self.grouped = [UngrownLayer(keys, values, self.total - step) for keys, values in pairs]
        super().__init__(layers=list(self.grouped))
        self.known = known
        self.found: list[LayerAttention | None] = [None] * len(self.grouped)
        self.masks: list[tuple[torch.Tensor, int]] = []
        """Those that were made, each with its window."""
        self.lengths = (mask.sum(1) - 1).to(torch.int32)
        self.total_tensor = torch.full((), self.total, dtype=torch.int32)

    def window_of(self, mask: torch.Tensor | None) -> int:
        window = next((window for made, window in self.masks if made is mask), None)
        if window is None:
            raise NotGroupedError("its attention takes a mask of the family's own")
        return window

    @property
    def presents(self) -> list[torch.Tensor]:
        if any(layer.attended != 1 for layer in self.grouped):
            raise NotGroupedError("its attention does not go through transformers' attention interface in every layer")
        return [tensor for layer in self.grouped for tensor in layer.present]


_ACTIVE: ContextVar[GroupedCache] = ContextVar("grouped cache")


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model's attention and masks are this module's; steps then take a ``GroupedCache``."""
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _make_mask)
    with attention_renamed(model, lambda _: IMPLEMENTATION):
        yield


def grouped_step(model: PreTrainedModel, cache: GroupedCache, **inputs: Any) -> torch.Tensor:
    """The logits of one forward; the cache then has ``presents``."""
    token = _ACTIVE.set(cache)
    try:
        return model(past_key_values=cache, use_cache=True, **inputs).logits
    finally:
        _ACTIVE.reset(token)


def _make_mask(*arguments: Any, mask_function: Any = None, config: Any = None, **others: Any) -> torch.Tensor:
    """Stands for the mask that ``mask_function`` describes; padding is told to the operator by the row's count of tokens."""
    cache = _ACTIVE.get()
    mask = torch.zeros((), dtype=torch.bool)
    if not cache.known:
        context = getattr(config, "max_position_embeddings", None)
        cache.masks.append((mask, _window(mask_function, getattr(config, "sliding_window", None), context or 0)))
    return mask


def _window(allows: Any, window: int | None, context: int) -> int:
    """-1 for a causal mask, ``window`` for one that slides over so many tokens; told by the keys that some queries are allowed."""
    last = max(context, 2 * (window or 8))
    around = () if window is None else range(max(window - 2, 0), window + 3)
    queries = torch.tensor(sorted({0, 1, *around, last // 2, last}))[:, None]
    keys = torch.arange(last + 2)[None]
    zero = torch.zeros(1, 1, dtype=torch.long)
    for size in (None, window) if window else (None,):
        expected = (keys <= queries) & (keys > queries - (size or last + 2))
        try:
            found = torch.as_tensor(allows(zero, zero, queries, keys))
        except (AttributeError, IndexError, RuntimeError, TypeError):  # a mask that depends on the row's own values
            break
        if torch.equal(found.expand_as(expected), expected):
            return -1 if size is None else size
    raise NotGroupedError("its mask is neither causal nor a sliding window")


def _attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **more: Any
) -> tuple[torch.Tensor, None]:
    """query [B, Hq, S, D], key and value [B, H, S, D] of the step's tokens to attention [B, S, Hq, D]."""
    cache = _ACTIVE.get()
    handed = ((i, layer.new) for i, layer in enumerate(cache.grouped) if layer.new is not None)
    index = next((i for i, new in handed if new[0] is key and new[1] is value), None)
    if index is None:
        raise NotGroupedError("its attention changes keys or values after they are cached")
    layer = cache.grouped[index]
    layer.attended += 1
    if cache.known:
        output, layer.present = _operator(cache, layer, query, key, value, cache.known[index])
        return output, None
    _check_heads(query, key, value)
    cache.found[index] = attributes = _attributes(cache, query, attention_mask, more)
    output, layer.present = _formula(cache, layer, query, key, value, attributes)
    return output, None


def _check_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if key.shape[-1] != value.shape[-1]:
        raise NotGroupedError(f"its keys are {key.shape[-1]} wide and its values {value.shape[-1]}")
    if key.shape[-1] % 8:
        raise NotGroupedError(f"its heads are {key.shape[-1]} wide, no multiple of 8")
    if key.shape[:3] != value.shape[:3] or query.shape[1] % key.shape[1] or query.shape[2:] != key.shape[2:]:
        raise NotGroupedError(f"its queries {tuple(query.shape)} do not go with its keys {tuple(key.shape)}")


def _attributes(cache: GroupedCache, query: torch.Tensor, mask: torch.Tensor | None, options: dict[str, Any]) -> LayerAttention:
    unknown = sorted(name for name, value in options.items() if name not in HARMLESS and value is not None)
    if unknown:
        raise NotGroupedError(f"its attention takes {', '.join(unknown)}")
    scale = options.get("scaling")
    return LayerAttention(
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        window=cache.window_of(mask),
        softcap=float(options.get("softcap") or 0.0),
    )


def _formula(
    cache: GroupedCache, layer: UngrownLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attributes: LayerAttention
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """What the operator computes, row by row; a row's past are the first tokens of its cache, as many as its mask counts."""
    step, groups = query.shape[2], query.shape[1] // key.shape[1]
    output = query.new_zeros(query.shape[0], step, query.shape[1], query.shape[3])
    presents = [past.new_zeros(*past.shape[:2], cache.total, past.shape[3]) for past in layer.past]
    for row, last in enumerate(cache.lengths.tolist()):
        count = last + 1
        past = 0 if cache.total == step else count - step
        for present, old, new in zip(presents, layer.past, (key, value), strict=True):
            present[row, :, :count] = torch.cat([old[row, :, :past], new[row]], dim=1)[:, :count]
        keys, values = (present[row, :, :count].repeat_interleave(groups, 0) for present in presents)
        scores = (query[row].float() @ keys.float().mT) * attributes.scale
        if attributes.softcap:
            scores = torch.tanh(scores / attributes.softcap) * attributes.softcap
        at, tokens = torch.arange(past, past + step)[:, None], torch.arange(count)[None]
        allowed = (tokens <= at) & ((tokens > at - attributes.window) | (attributes.window < 0))
        weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)
        output[row] = (weights @ values.float()).to(query.dtype).transpose(0, 1)
    return output, presents


def _operator(
    cache: GroupedCache, layer: UngrownLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attributes: LayerAttention
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    batch, heads, step, width = query.shape
    flat = [tensor.transpose(1, 2).reshape(batch, step, tensor.shape[1] * width) for tensor in (query, key, value)]
    options: dict[str, Any] = {"num_heads": heads, "kv_num_heads": key.shape[1], "scale": attributes.scale}
    options["local_window_size"] = attributes.window
    if attributes.softcap:
        options["softcap"] = attributes.softcap
    present = (batch, key.shape[1], cache.total, width)
    output, *presents = torch.onnx.ops.symbolic_multi_out(
        f"com.microsoft::{ATTENTION}",
        [*flat, *layer.past, cache.lengths, cache.total_tensor],
        options,
        dtypes=(query.dtype,) * 3,
        shapes=(flat[0].shape, present, present),
        version=1,
    )
    return output.view(batch, step, heads, width), presents


@dataclass(kw_only=True)
class _Rows:
    """Rows of unequal length: right-padded at first, then with a row's past first, its new tokens last, and zeros between."""

    tokens: torch.Tensor
    lengths: torch.Tensor
    steps: int = 0

    @classmethod
    def random(cls, vocabulary: int) -> _Rows:
        generator = torch.Generator().manual_seed(0)
        shape = (len(PROMPTS), max(PROMPTS) + STEPS)
        return cls(tokens=torch.randint(0, vocabulary, shape, generator=generator), lengths=torch.tensor(PROMPTS))

    def prompt(self) -> dict[str, torch.Tensor]:
        width = int(self.lengths.max())
        columns = torch.arange(width)[None]
        mask = (columns < self.lengths[:, None]).long()
        return {"input_ids": self.tokens[:, :width], "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def step(self) -> dict[str, torch.Tensor]:
        """One token for each row."""
        at = self.lengths + self.steps
        self.steps += 1
        width = int(at.max())
        mask = torch.cat([torch.arange(width)[None] < at[:, None], torch.ones(len(at), 1, dtype=torch.bool)], dim=1)
        return {"input_ids": self.tokens.gather(1, at[:, None]), "attention_mask": mask.long(), "position_ids": at[:, None]}


def probe(model: PreTrainedModel, caches: Sequence[torch.Tensor], *, takes_positions: bool) -> list[LayerAttention]:
    """Every layer's attributes; raises NotGroupedError where GroupQueryAttention does not compute what the decoder does.

    Two rows of unequal length are run by the operator's formula, a prefill and decode steps, and compared with each row alone by the
    decoder's own attention. ``caches``: key and value of every layer, [.., heads, .., width].
    """
    rows = _Rows.random(min(model.config.get_text_config().vocab_size, 100))
    dtype = next(model.parameters()).dtype
    if dtype not in TOLERANCE:
        raise NotGroupedError(f"no CPU shows what it computes in {str(dtype).removeprefix('torch.')}")
    past = [torch.zeros(len(PROMPTS), cache.shape[1], 0, cache.shape[3], dtype=dtype) for cache in caches]
    logits: list[list[torch.Tensor]] = [[] for _ in PROMPTS]
    found: list[LayerAttention | None] = []
    with torch.no_grad(), grouped_attention(model):
        for inputs in (rows.prompt(), *(rows.step() for _ in range(STEPS))):
            if not takes_positions:
                del inputs["position_ids"]
            mask, step = inputs["attention_mask"], inputs["input_ids"].shape[1]
            cache = GroupedCache(past, mask, step)
            said = _run(model, cache, inputs)
            past, found = cache.presents, cache.found
            for row, length in enumerate(PROMPTS):
                logits[row].append(said[row, : length if step > 1 else 1])
    _compare(model, rows.tokens, [torch.cat(parts) for parts in logits], TOLERANCE[dtype])
    return [attributes for attributes in found if attributes is not None]


def _run(model: PreTrainedModel, cache: GroupedCache, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    try:
        return grouped_step(model, cache, **inputs)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:  # of its own cache or mask
        raise NotGroupedError(f"its own code does not run with another attention: {' '.join(str(e).split())[:120]}") from e


def _compare(model: PreTrainedModel, tokens: torch.Tensor, logits: Sequence[torch.Tensor], tolerance: float) -> None:
    with torch.no_grad():
        for row, found in enumerate(logits):
            expected = model(input_ids=tokens[row : row + 1, : len(found)], use_cache=False).logits[0].float()
            error = float((found.float() - expected).abs().max() / expected.abs().max())
            if not error <= tolerance:
                raise NotGroupedError(f"its attention computes something else (relative logit error {error:.1g})")


def check_in_place(graph: ir.Graph, past_names: Sequence[str]) -> None:
    """Raises NotGroupedError where a cache is read by anything but its own operator: a buffer is longer than what it holds."""
    inputs = {name_of(value): value for value in graph.inputs}
    presents = {name_of(value): value for value in graph.outputs}
    for index, name in enumerate(past_names):
        present = presents[name.replace("past_key_values", "present")]
        node = present.producer()
        uses = [(use.node, use.idx) for use in inputs[name].uses()]
        if node is None or node.op_type != ATTENTION or uses != [(node, PAST_KEY + index % 2)]:
            raise NotGroupedError(f"{name} is read by others than its attention")
