"""Steering in eager PyTorch: edits hooked onto the decoder of any Hugging Face family.

The rest of the project is held against this module, so it follows the op's contract to the letter: slots come from
``runtimes.edits.positions.slots``, an edit is computed in float32 and rounded once to the stream's dtype, and a token without
a slot keeps its bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from reft_export.base.classifiers import check_head, with_head
from runtimes.edits.adapter import Adapter
from runtimes.edits.edit import Edit, ScaleBiasEdit, Site
from runtimes.edits.op import bank_of, node_of
from runtimes.edits.positions import Positions, slots
from runtimes.errors import AdapterError, InputError

NO_MARKS = np.zeros((1, 1), bool)
"""Of rows that are not edited anyway."""

EditFn = Callable[[Tensor, Tensor], Tensor]
"""(h [.., D], slot [..]) -> y [.., D]; it must leave h itself alone, since other modules hold the same tensor."""

ACTIVATION_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""runtimes.edits.edit.ACTIVATIONS in torch."""

STREAM_MODULES = {
    "attention_output": ("attention.output.dense", "self_attn", "attn", "attention", "self_attention"),
    "mlp_output": ("output.dense", "mlp", "feed_forward", "block_sparse_moe", "ffn", "fc2"),
}
"""What transformers' families call the module whose output is the stream. OPT has no mlp module: there it is fc2. What BERT calls its
attention and output modules contain the residual Add and the norm behind it: there it is their projections."""

RESIDUAL_INSIDE = {"BloomAttention": "dense", "BloomMLP": "dense_4h_to_h", "MptMLP": "down_proj"}
"""Modules that add the residual stream themselves, and the projection inside whose output is what they add."""


# --- where to hook --------------------------------------------------------------------------------


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of blocks: the one outermost ModuleList of the text decoder, or encoder, that has num_hidden_layers entries.

    Raises InputError where there is none, or several.
    """
    count = model.config.get_text_config().num_hidden_layers
    found: dict[str, nn.ModuleList] = {}
    # A model with several towers may have two lists of one length; get_decoder names the text tower where it can.
    scopes = (model.get_decoder(), model) if hasattr(model, "get_decoder") else (model,)
    for scope in scopes:
        for name, module in scope.named_modules() if scope is not None else ():
            nested = any(name.startswith(f"{outer}.") for outer in found)  # for example the experts inside a block
            if isinstance(module, nn.ModuleList) and len(module) == count and not nested:
                found[name] = module
        if found:
            break
    if len(found) != 1:
        raise InputError(
            f"{type(model).__name__} has {len(found)} lists of {count} blocks ({', '.join(found) or 'none'}); exactly "
            "one is needed to steer it"
        )
    return next(iter(found.values()))


def site_module(model: PreTrainedModel, site: Site) -> nn.Module:
    """The module whose input (block_input) or output (every other stream) is the site's stream.

    attention_output and mlp_output are what that module returns, before any norm, scale or residual addition that the
    block applies to it (BERT and its kin, Gemma 2, OLMo 2, GLM 4 and Granite do). An encoder's block_output is what the whole layer
    returns, behind its last norm. Raises InputError for a layer or module that does not exist.
    """
    layers = decoder_layers(model)
    if site.layer >= len(layers):
        raise InputError(f"layer {site.layer} does not exist in this base ({len(layers)} layers, 0 to {len(layers) - 1})")
    block = layers[site.layer]
    if site.stream in ("block_input", "block_output"):
        return block
    for name in STREAM_MODULES[site.stream]:
        with suppress(AttributeError):
            child = block.get_submodule(name)
            return getattr(child, RESIDUAL_INSIDE.get(type(child).__name__, ""), child)
    known = ", ".join(name for name, _ in block.named_children())
    raise InputError(f"site {site}: {type(block).__name__} has no module for {site.stream} (its modules: {known}); use block_output")


# --- hooks ----------------------------------------------------------------------------------------


class Steering:
    """The handle that ``steer`` yields. Its slots live from the start of the model's forward to its end."""

    def __init__(self, model: PreTrainedModel, *, rule: Positions | None, tied: bool) -> None:
        self.rule, self.tied = rule, tied
        self.prompt_length: Tensor | np.ndarray | Sequence[int] | None = None
        """[B], how many of each row's real tokens are prompt; needed when a prompt does not come alone in one call."""
        self.marks: Tensor | np.ndarray | None = None
        """bool [B, P], which tokens of each prompt are marked, by their numbers; needed where the rule is ``marked``."""
        self.subspaces: Tensor | None = None
        """[B], which of several edits each row has, where they share a rule: added to its slots (training in subspaces)."""
        self.sources: Sequence[tuple[int, ...]] = ()
        """Each row's source, the tokens of a prompt, where edits take the hidden states of one (training of interchanges)."""
        self.rows: slice | None = None
        """The rows that are edited, where others of the batch are another adapter's or the base's; None: all of them."""
        self.slot: Tensor | None = None
        """int32 [B, S] during a forward, else None."""
        self._signature = inspect.signature(model.forward)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """No row is edited inside: the base's own forward, bit for bit."""
        before = self.prompt_length, self.marks, self.subspaces, self.rows
        self.prompt_length, self.marks, self.subspaces, self.rows = None, NO_MARKS, None, slice(0, 0)
        try:
            yield
        finally:
            self.prompt_length, self.marks, self.subspaces, self.rows = before

    def before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.slot = None
        call = self._signature.bind_partial(*args, **kwargs).arguments
        tokens = call.get("input_ids")
        tokens = tokens if tokens is not None else call.get("inputs_embeds")
        if tokens is None:
            raise InputError("a steered forward needs input_ids or inputs_embeds")
        batch, width = tokens.shape[:2]
        mask = self._mask(call, batch, width)
        marks = self.marks.cpu().numpy() if isinstance(self.marks, Tensor) else self.marks
        slot = slots(self.rule, mask, width, tied=self.tied, prompt_length=self._prompt_length(batch), marks=marks)
        if self.subspaces is not None:
            slot = np.where(slot >= 0, slot + self.subspaces.cpu().numpy()[:, None], -1).astype(np.int32)
        if self.rows is not None:
            others = np.ones(batch, bool)
            others[self.rows] = False
            slot[others] = -1
        self.slot = torch.from_numpy(slot).to(tokens.device)

    def after_forward(self, *_: Any) -> None:
        self.slot = None

    def edit(self, site: Site, function: EditFn, h: Tensor) -> Tensor:
        if self.slot is None:
            raise InputError(f"site {site} ran outside the steered model's own forward; call the model that was given to steer")
        if h.numel() // h.shape[-1] != self.slot.numel():
            raise InputError(f"site {site}: h {list(h.shape)} does not have one row per token of slots {list(self.slot.shape)}")
        return function(h, self.slot.to(h.device).reshape(h.shape[:-1]))

    @staticmethod
    def _mask(call: Mapping[str, Any], batch: int, width: int) -> np.ndarray:
        """The mask over past and current tokens; all ones where the caller gave none."""
        cache = call.get("past_key_values")
        if cache is None:
            past = 0
        else:
            past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else cache[0][0].shape[-2] if cache else 0
        mask = call.get("attention_mask")
        if mask is None:
            return np.ones((batch, past + width), np.int64)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise InputError("a steered forward needs a 2-D attention_mask [B, past + current]; use a dynamic cache")
        if mask.shape[0] != batch or mask.shape[1] < past + width:
            raise InputError(f"attention_mask {list(mask.shape)} does not cover {past} past and {width} current tokens of {batch} rows")
        return (mask != 0).cpu().numpy().astype(np.int64)

    def _prompt_length(self, batch: int) -> np.ndarray | None:
        if self.prompt_length is None:
            return None
        lengths = self.prompt_length.cpu() if isinstance(self.prompt_length, Tensor) else self.prompt_length
        lengths = np.asarray(lengths, np.int64).reshape(-1)
        if lengths.size not in (1, batch):
            raise InputError(f"prompt_length has {lengths.size} entries, the batch has {batch} rows")
        return lengths


@contextmanager
def steer(model: PreTrainedModel, edits: Mapping[Site, EditFn], *, rule: Positions | None, tied: bool) -> Iterator[Steering]:
    """Applies ``edits`` in every forward of ``model`` inside the ``with``, at the tokens that ``rule`` picks.

    Slots are computed once per forward from attention_mask (all ones over past and current tokens where there is none)
    and the handle's ``prompt_length``. Works under ``generate`` with a dynamic KV cache, and for left- and right-padded
    batches. Every hook is removed at the end, after exceptions too.

    Raises InputError for sites that the model does not have, before anything is hooked.
    """
    modules = {site: site_module(model, site) for site in edits}
    steering = Steering(model, rule=rule, tied=tied)
    handles = []
    try:
        handles.append(model.register_forward_pre_hook(steering.before_forward, with_kwargs=True))
        handles.append(model.register_forward_hook(steering.after_forward, always_call=True))
        for site, function in edits.items():
            edit = partial(steering.edit, site, function)
            if site.stream == "block_input":
                handles.append(modules[site].register_forward_pre_hook(partial(_edit_input, edit), with_kwargs=True))
            else:
                handles.append(modules[site].register_forward_hook(partial(_edit_output, edit)))
        yield steering
    finally:
        for handle in handles:
            handle.remove()


def _edit_input(
    edit: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (edit(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}


def _edit_output(edit: Callable[[Tensor], Tensor], module: nn.Module, args: Any, output: Any) -> Any:
    # Families, and releases of transformers, differ in whether a module returns (h, ...) or h alone.
    return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)


# --- edits ----------------------------------------------------------------------------------------


def edit_rows(h: Tensor, slot: Tensor, edits: Sequence[Callable[[Tensor], Tensor] | None]) -> Tensor:
    """y[t] = edits[slot[t]](h[t]); a slot outside [0, len(edits)), or of None, passes h[t] through, bit for bit.

    h: [.., D]; slot: [..]. An edit takes and returns float32 rows [t, D] (float64 where h is); y has h's dtype.
    """
    rows, index = h.reshape(-1, h.shape[-1]), slot.reshape(-1)
    for number, edit in enumerate(edits):
        at = (index == number).nonzero().squeeze(1)
        if len(at) and edit is not None:
            x = rows.index_select(0, at).to(torch.promote_types(h.dtype, torch.float32))
            rows = rows.index_copy(0, at, edit(x).to(h.dtype))
    return rows.view(h.shape)


def edit_fn(edits: Sequence[Edit], dtype: torch.dtype, device: torch.device | str) -> EditFn:
    """The edits of one node, one per slot, as its op computes them in a stream of ``dtype``."""
    return (scale_bias_edit_fn if isinstance(edits[0], ScaleBiasEdit) else low_rank_edit_fn)(edits, dtype, device)


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model embeds its tokens."""
    return next(model.get_input_embeddings().parameters()).device


def low_rank_edit_fn(edits: Sequence[Edit], dtype: torch.dtype, device: torch.device | str) -> EditFn:
    """y = h + U^T act(A h + b), one edit per slot, as the op computes it.

    U, A, b are rounded once to ``dtype``, the stream's; sums are in float32 (float64 only for a float64 stream).
    """
    node = node_of(Site(layer=0), edits[0])
    U, A, b = _computing_bank(edits, dtype, device)
    active = U.shape[1] // 2 if node.activated == "first_half" else U.shape[1]
    act = ACTIVATION_FUNCTIONS[node.activation]

    def apply(slot: int, x: Tensor) -> Tensor:
        z = x @ A[slot].T + b[slot]
        if node.activation:
            z = torch.cat([act(z[:, :active]), z[:, active:]], dim=1)
        return x + z @ U[slot]

    return partial(edit_rows, edits=[partial(apply, slot) for slot in range(len(edits))])


def scale_bias_edit_fn(edits: Sequence[Edit], dtype: torch.dtype, device: torch.device | str) -> EditFn:
    """y = scale * h + bias, one edit per slot, as the op computes it: rounded to ``dtype`` as ``low_rank_edit_fn`` rounds."""
    scale, bias = _computing_bank(edits, dtype, device)

    def apply(slot: int, x: Tensor) -> Tensor:
        return scale[slot] * x + bias[slot]

    return partial(edit_rows, edits=[partial(apply, slot) for slot in range(len(edits))])


def _computing_bank(edits: Sequence[Edit], dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """The bank as a stream of ``dtype`` has it, widened to what the op computes in."""
    wide = np.float64 if torch.promote_types(dtype, torch.float32) == torch.float64 else np.float32
    return [torch.from_numpy(x.astype(wide)).to(device) for x in bank_of(edits, _numpy_dtype(dtype))]


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    if dtype == torch.bfloat16:
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(str(dtype).removeprefix("torch."))


@contextmanager
def steered(model: PreTrainedModel, adapter: Adapter) -> Iterator[Steering]:
    """``model`` with a trained adapter's folded edits, and with its classification head where it has one, switched on.

    Raises AdapterError for an adapter of another depth, width or head. The fingerprint is the caller's to compare: a model in
    memory may rightly differ from its checkpoint, for example by dequantized weights.

    The model takes input_ids [B, S] and attention_mask [B, S] as ever. The first forward of a generation holds the whole prompt, by which
    positions are counted, unless ``prompt_length`` [B] of the Steering that is yielded says where each row's prompt ends.

    Example::

        base, adapter = load_base("base"), load_adapter(Path("pirate"))
        with steered(base.model, adapter):
            logits = base.model(input_ids=ids, attention_mask=mask).logits  # [B, S, V], steered
    """
    config = model.config.get_text_config()
    has, needs = (
        (config.num_hidden_layers, config.hidden_size),
        (adapter.base.num_hidden_layers, adapter.base.hidden_size),
    )
    if has != needs:
        raise AdapterError(
            f"the adapter was trained on {adapter.base.name} ({needs[0]} layers, width {needs[1]}); this base has "
            f"{has[0]} layers, width {has[1]}; use the base it was trained on"
        )
    check_head(adapter, model)
    edits = {site: edit_fn(each, model.dtype, device_of(model)) for site, each in adapter.edits().items()}
    with with_head(model, adapter.head), steer(model, edits, rule=adapter.where, tied=adapter.tied) as steering:
        yield steering


# --- greedy decoding ------------------------------------------------------------------------------


@torch.no_grad()
def greedy_tokens(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    n: int,
    *,
    steering: Steering | None = None,
    prompt_length: Tensor | Sequence[int] | None = None,
    marks: np.ndarray | None = None,
    eos: int | Collection[int] | None = None,
) -> list[list[int]]:
    """At most ``n`` greedy tokens of each row, with a KV cache; a row ends with its first ``eos`` token.

    input_ids, attention_mask: [B, S], padded on either side. ``prompt_length`` [B] and ``marks`` are set on ``steering`` while this
    runs; the former is needed only where input_ids hold more than the prompt. Right-padded rows of a model with sliding-window
    attention keep pads inside the window once it is full, so pad those on the left.
    """
    ends = set() if eos is None else {eos} if isinstance(eos, int) else set(eos)
    mask = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
    batch, width = input_ids.shape
    accepted = inspect.signature(model.forward).parameters
    columns = torch.arange(width, device=mask.device)
    last, length = (mask * columns).argmax(1), mask.sum(1)
    before = (steering.prompt_length, steering.marks) if steering else (None, None)
    if steering:
        steering.prompt_length, steering.marks = prompt_length, marks

    def call(tokens: Tensor, positions: Tensor, **more: Any) -> Any:
        more |= {"position_ids": positions} if "position_ids" in accepted else {}
        return model(input_ids=tokens, attention_mask=mask, use_cache=True, **more)

    try:
        # Only the columns that hold some row's last token are needed: prompts are long and vocabularies large.
        keep = {"logits_to_keep": width - int(last.min())} if "logits_to_keep" in accepted else {}
        out = call(input_ids, (mask.cumsum(1) - 1).clamp(min=0), **keep)
        token = out.logits[torch.arange(batch, device=mask.device), last - width].argmax(-1)
        rows: list[list[int]] = [[] for _ in range(batch)]
        for step in range(n):
            for row, value in zip(rows, token.tolist(), strict=True):
                if not (row and row[-1] in ends):
                    row.append(value)
            if step + 1 == n or all(row[-1] in ends for row in rows):
                break
            mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
            out = call(token[:, None], (length + step)[:, None], past_key_values=out.past_key_values)
            token = out.logits[:, -1].argmax(-1)
        return rows
    finally:
        if steering:
            steering.prompt_length, steering.marks = before


Steerer = Callable[[PreTrainedModel], AbstractContextManager[Steering]]
"""Switches an adapter's edits on in an eager model: one of ``steerers_of``, or ``bank_steerer`` of a bundle."""


def steerers_of(adapters: Mapping[str, Adapter]) -> dict[str, Steerer]:
    return {name: partial(steered, adapter=adapter) for name, adapter in adapters.items()}


def steering_of(model: PreTrainedModel, steerer: Steerer | None) -> AbstractContextManager[Steering | None]:
    """The steerer's own context, or one that does nothing."""
    return nullcontext() if steerer is None else steerer(model)
