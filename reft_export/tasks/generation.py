"""A decoder's task. It is recorded on prompts with their completions (an adapter's probes, or texts and what the base makes of them) and on
greedy continuations of a few."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jinja2.exceptions import TemplateError

from reft_export.base.token_rules import decoder_context, output_rows
from reft_export.tasks.passages import passage_rows
from runtimes.artifacts.ort_adapter_file import Tensor
from runtimes.artifacts.task_names import TEXT_GENERATION
from runtimes.edits.positions import every_other, marks_of
from runtimes.edits.probes import spread
from runtimes.parity.figures import Figures
from runtimes.parity.sampled_logits import SampledLogits, compare_sampled
from runtimes.session import Session, as_decoder
from runtimes.tasks.generation import sampled

if TYPE_CHECKING:  # what the task refuses is said before torch is loaded
    import onnx_ir as ir
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reft_export.base.load import Base
    from reft_export.eager.steering import Steerer, Steering

Arrays = dict[str, np.ndarray]
GREEDY_TOKENS = 64
CONTINUED = 4
"""Rows that are continued greedily and fed in every way; TEXTS are as many."""
ROWS_AT_ONCE = 32
"""That are decoded greedily in one batch, of base and adapters together."""
CONTINUATION = 12
"""How many tokens of a completion the rows that are fed in every way have: so many decode steps are compared, too."""
COMPLETION, PROBE_TOKENS = 64, 4096
"""Tokens of a probe's completion whose log-probabilities are recorded, and of all probes: a task of long prompts has fewer rows."""
POSITIONS = 128
"""At which logits are recorded: so many that one token that two right graphs disagree on does not decide a top-1 agreement of 0.98."""
POSITION_BYTES = 2**26
"""Of their logits over a whole vocabulary, while they are recorded."""
FILE_BYTES = 1.55e6
"""Of a file's sampled logits and their columns, packed: with all else it stays below 2 MB."""
COLUMN_BYTES, LOGIT_BYTES = 2.0, 3.8
"""Of one ascending column number and one logit, packed."""
BEST = 8
"""Likeliest tokens that are recorded at a position."""
BATCH_ROWS, BATCH_BYTES = 8, 2**28
"""Of one forward: rows, and logits that are asked of it."""

TEXTS = (
    "Hello!",
    "Tell me a story about a small boat and the sea.",
    "What is the best way to learn how to cook a simple meal at home?",
    "The old house at the end of the road had been empty for years, and yet a light was on.",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class GoldenInputs:
    """Right-padded prompts with their completions: the base's continuations, and of a quantized one passages; or an adapter's probes."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    prompt_length: np.ndarray
    logit_positions: np.ndarray
    logit_columns: np.ndarray
    marks: np.ndarray | None = None
    """[B, S], 1 where a prompt marks a token that an adapter at positions ``marked`` edits."""
    continued: int
    """The first rows, which are continued and fed in every way."""
    likelihoods: bool = False
    """Whether the log-probabilities of the completions are recorded: of probes, and of a base with passages."""
    task: ClassVar[str] = TEXT_GENERATION

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: value for name, value in vars(self).items() if name not in ("continued", "likelihoods") and value is not None}

    def for_adapters(self, model: PreTrainedModel) -> GoldenInputs:
        """The rows that are continued, for adapters without probes, whose files hold the logits of several models."""
        columns = _columns(len(self.logit_positions), output_rows(model), ADAPTER_LOGITS)
        return replace(self._with_rows(self._tokens()[: self.continued], self.prompt_length[: self.continued]), logit_columns=columns)

    def marking(self) -> GoldenInputs:
        """With marks, for an adapter that needs some and has no probes."""
        return self.with_marks(every_other(self.prompt_length.tolist()))

    def with_marks(self, marks: np.ndarray) -> GoldenInputs:
        """``marks`` bool [B, P], P <= S."""
        return replace(self, marks=np.pad(marks, [(0, 0), (0, self.input_ids.shape[1] - marks.shape[1])]).astype(np.int64))

    def marked(self, rows: slice | Sequence[int]) -> np.ndarray | None:
        """bool, the marks of these rows."""
        return None if self.marks is None else self.marks[rows] > 0

    def with_passages(self, passages: Sequence[Sequence[int]]) -> GoldenInputs:
        """Each of ``passages`` [S] in a row behind the others, all but its first token being what is predicted: the base's likelihood is
        recorded on them, and on its continuations."""
        rows = [*self._tokens(), *passages]
        return replace(self._with_rows(rows, np.append(self.prompt_length, [1] * len(passages))), likelihoods=True)

    def _tokens(self) -> list[list[int]]:
        return [row[real > 0].tolist() for row, real in zip(self.input_ids, self.attention_mask, strict=True)]

    def _with_rows(self, rows: Sequence[Sequence[int]], prompt_length: np.ndarray) -> GoldenInputs:
        ids, mask = pad_right(rows)
        return replace(self, input_ids=ids, attention_mask=mask, prompt_length=prompt_length, likelihoods=False)

    def said(self, model: PreTrainedModel, steerer: Steerer | None = None) -> dict[str, np.ndarray]:
        """What golden_schema's DECODER says of one model: logits, best_tokens, best_logits, logsumexp; and the completions'
        log_probabilities where those are recorded."""
        found, tokens = self._read(model, steerer, completions=self.likelihoods)
        said = {
            "logits": found.logits,
            "best_tokens": found.tokens,
            "best_logits": found.at_tokens,
            "logsumexp": found.logsumexp,
        }
        return said | ({"log_probabilities": tokens} if self.likelihoods else {})

    def differs(self, model: PreTrainedModel, steerer: Steerer | None, said: Mapping[str, np.ndarray]) -> Figures:
        """Of what the model says now, against what was ``said``."""
        reference = sampled({**self.arrays, **said})
        return compare_sampled(self._read(model, steerer, completions=False, tokens=reference.tokens)[0], reference)

    def _read(
        self, model: PreTrainedModel, steerer: Steerer | None, *, completions: bool, tokens: np.ndarray | None = None
    ) -> tuple[SampledLogits, np.ndarray]:
        """(logits at every position, at the likeliest tokens or those given; log-probabilities of the completions, empty without)."""
        import torch

        count = len(self.logit_positions)
        shape = (count, min(BEST, output_rows(model))) if tokens is None else tokens.shape
        found = SampledLogits(
            columns=self.logit_columns,
            logits=np.zeros(self.logit_columns.shape, np.float32),
            tokens=np.zeros(shape, np.int64) if tokens is None else tokens,
            at_tokens=np.zeros(shape, np.float32),
            logsumexp=np.zeros(count),
            best=np.zeros(count, np.int64),
        )
        places = {(row, column): k for k, (row, column) in enumerate(self.logit_positions.tolist())}
        lengths = self.attention_mask.sum(1).tolist()
        behind = [
            (row, column)
            for row, (prompt, length) in enumerate(zip(self.prompt_length.tolist(), lengths, strict=True))
            for column in range(prompt - 1, length - 1)
        ]
        spoken = {place: t for t, place in enumerate(behind)} if completions else {}
        said = np.zeros(len(spoken), np.float32)
        for (row, column), values, total in _logits_at(model, self, sorted({*places, *spoken}), steerer):
            if (k := places.get((row, column))) is not None:
                found.logits[k], found.logsumexp[k] = values[torch.from_numpy(self.logit_columns[k])], total
                if tokens is None:
                    found.at_tokens[k], found.tokens[k] = values.topk(shape[1])
                else:
                    found.at_tokens[k] = values[torch.from_numpy(tokens[k])]
                found.best[k] = values.argmax()
            if (t := spoken.get((row, column))) is not None:
                said[t] = float(values[self.input_ids[row, column + 1]]) - total
        return found, said

    def rows(self) -> Iterator[PromptRow]:
        rows, columns = self.logit_positions.T
        for number in range(self.continued):
            prompt = int(self.prompt_length[number])
            length = max(int(columns[rows == number].max(initial=0)) + 1, prompt)
            marks = self.marked([number])
            yield PromptRow(number=number, ids=self.input_ids[number, :length][None], prompt_length=prompt, marks=marks)

    @property
    def prompts(self) -> list[list[int]]:
        """Those that are continued."""
        return [row[:n].tolist() for row, n in zip(self.input_ids[: self.continued], self.prompt_length, strict=False)]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptRow:
    """One prompt and its continuation, int64 [1, S]."""

    number: int
    ids: np.ndarray
    prompt_length: int
    marks: np.ndarray | None = None

    def run(self, session: Session) -> tuple[np.ndarray, Mapping[str, Tensor]]:
        prompt = np.array([self.prompt_length])
        output = as_decoder(session).step(self.ids, np.ones_like(self.ids), prompt_length=prompt, marks=self.marks)
        return output.logits[0], output.outputs

    def eager(self, model: PreTrainedModel, steering: Steering | None) -> torch.Tensor:
        import torch

        ids = torch.from_numpy(self.ids)
        if steering is not None:
            steering.prompt_length, steering.marks = [self.prompt_length], self.marks
        return model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None], use_cache=False).logits[0]


class Generation:
    """Rows are in tasks/task.py."""

    name = TEXT_GENERATION
    recorded = "logits, greedy tokens"
    decodes, swaps_head = True, False
    no_genai = ""

    def inputs(self, base: Base) -> GoldenInputs:
        return golden_inputs(base.model, golden_prompts(base.model, base.tokenizer))

    def with_likelihoods(self, base: Base, inputs: GoldenInputs) -> GoldenInputs:
        passages = [] if inputs.likelihoods else passage_rows(base.tokenizer, decoder_context(base.model))
        return inputs.with_passages(passages) if passages else inputs

    def probe_inputs(self, model: PreTrainedModel, examples: Sequence[Any], of_base: GoldenInputs) -> GoldenInputs:
        return probe_inputs(model, [(each.input_ids, each.prompt_length) for each in examples], [each.marks for each in examples])

    def stored_inputs(self, arrays: Mapping[str, np.ndarray]) -> GoldenInputs:
        names = [field.name for field in fields(GoldenInputs) if field.name in arrays]
        stored = {name: arrays[name] for name in names}
        return GoldenInputs(**stored, continued=len(arrays["greedy_tokens"]), likelihoods="log_probabilities" in arrays)

    def answers(self, model: PreTrainedModel, asked: Mapping[str, tuple[GoldenInputs, Steerer | None]]) -> dict[str, Arrays]:
        return {name: {"greedy_tokens": tokens} for name, tokens in eager_greedy(model, asked).items()}

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
    return _inputs(model, rows, list(map(len, prompts)), len(rows), BASE_LOGITS, likelihoods=False)


def probe_inputs(
    model: PreTrainedModel, probes: Sequence[tuple[Sequence[int], int]], marks: Sequence[Sequence[int]] | None = None
) -> GoldenInputs:
    """Rows of an adapter's probes, (tokens, how many of them are the prompt), all of which fit the model's context; ``marks``: the numbers
    of those that each prompt marks.

    First come CONTINUED that are fed in every way, of different lengths and among the shorter half; then the others, as many as
    PROBE_TOKENS hold. Completions are cut to COMPLETION.
    """
    rows = [(list(tokens[: prompt + COMPLETION]), prompt) for tokens, prompt in probes]
    by_length = sorted(range(len(rows)), key=lambda row: (rows[row][1], len(rows[row][0]), row))
    shorter = by_length[: max(CONTINUED, -(-len(rows) // 2))]
    first = [shorter[index] for index in spread(len(shorter), CONTINUED)]
    room, kept = PROBE_TOKENS - sum(len(rows[row][0]) for row in first), []
    for row in range(len(rows)):
        if row not in first and len(rows[row][0]) <= room:
            kept, room = [*kept, row], room - len(rows[row][0])
    chosen = [*first, *kept]
    tokens, prompts = [rows[row][0] for row in chosen], [rows[row][1] for row in chosen]
    inputs = _inputs(model, tokens, prompts, len(first), ADAPTER_LOGITS, likelihoods=True)
    if marks is None or not any(marks):
        return inputs
    return inputs.with_marks(marks_of([marks[row] for row in chosen]))


def _inputs(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], prompts: Sequence[int], continued: int, models: int, *, likelihoods: bool
) -> GoldenInputs:
    """``models``: of how many the file will hold logits."""
    ids, mask = pad_right(rows)
    fed = np.minimum(mask.sum(1)[:continued], np.array(prompts[:continued]) + CONTINUATION)
    real = np.argwhere(np.arange(int(fed.max())) < fed[:, None])
    keep = min(POSITIONS, max(16, POSITION_BYTES // (4 * output_rows(model))))
    if len(real) > keep:
        real = _spread(real, prompts, keep)
    return GoldenInputs(
        input_ids=ids,
        attention_mask=mask,
        prompt_length=np.array(prompts, np.int64),
        logit_positions=real,
        logit_columns=_columns(len(real), output_rows(model), models),
        continued=continued,
        likelihoods=likelihoods,
    )


BASE_LOGITS, ADAPTER_LOGITS = 1, 4
"""Of how many models a file holds logits: the base's of one, an adapter's of itself and the base, as shipped and in float32."""


def _columns(positions: int, vocabulary: int, models: int) -> np.ndarray:
    """The columns [K, C] of the vocabulary that are recorded: dealt to one position after the other in one seeded order, so that none comes
    again before all have come, and as many as FILE_BYTES hold."""
    count = min(vocabulary, max(64, int(FILE_BYTES / (COLUMN_BYTES + LOGIT_BYTES * models)) // positions))
    order = np.random.default_rng(0).permutation(vocabulary)
    return np.sort(order[np.arange(positions * count).reshape(positions, count) % vocabulary], 1).astype(np.int64)


def _spread(real: np.ndarray, prompts: Sequence[int], keep: int) -> np.ndarray:
    """About ``keep`` of the positions ``real``, [K, 2]: every prompt's first and last one and every row's last one, which show an edit of
    the last layer there, and evenly spread others."""
    rows, columns = real.T
    last = np.append(rows[1:] != rows[:-1], True)
    ends = np.flatnonzero((columns == 0) | (columns == np.asarray(prompts)[rows] - 1) | last)
    others = np.linspace(0, len(real) - 1, max(keep - len(ends), 2)).round().astype(int)
    return real[np.union1d(ends, others)]


def _logits_at(
    model: PreTrainedModel, inputs: GoldenInputs, places: Sequence[tuple[int, int]], steerer: Steerer | None
) -> Iterator[tuple[tuple[int, int], torch.Tensor, float]]:
    """(place, its logits [V] float32 on the CPU, their logsumexp in float64) of every (row, column) of ``places``, in some order.

    Rows of like lengths share a forward, and the vocabulary's matrix is multiplied at ``places`` alone: all columns of a real vocabulary
    are gigabytes.
    """
    import torch

    from reft_export.eager.steering import steering_of

    by_row: dict[int, list[int]] = {}
    for row, column in places:
        by_row.setdefault(row, []).append(column)
    device, width = next(model.parameters()).device, 4 * output_rows(model)
    with torch.no_grad(), steering_of(model, steerer) as handle:
        for batch in _batches(by_row, width):
            total = max(by_row[row][-1] for row in batch) + 1
            ids, mask = (torch.from_numpy(x[batch, :total]) for x in (inputs.input_ids, inputs.attention_mask))
            if handle is not None:
                handle.prompt_length, handle.marks = inputs.prompt_length[batch], inputs.marked(batch)
            where = [(i, column) for i, row in enumerate(batch) for column in by_row[row]]
            index = tuple(torch.tensor(axis, device=device) for axis in zip(*where, strict=True))
            with _head_at(model, ids.shape, index) as narrowed:
                logits = model(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
                    use_cache=False,
                ).logits
            logits = (logits[0] if narrowed else logits[index]).float().cpu()
            for start in range(0, len(where), BATCH_ROWS):
                part = logits[start : start + BATCH_ROWS]
                for place, values, total_of in zip(where[start:], part, part.double().logsumexp(1).tolist(), strict=False):
                    yield (batch[place[0]], place[1]), values, total_of


def _batches(by_row: Mapping[int, Sequence[int]], width: int) -> Iterator[list[int]]:
    """Rows of one forward each: up to BATCH_ROWS of like lengths, whose logits of ``width`` bytes a place fit BATCH_BYTES."""
    batch: list[int] = []
    for row in sorted(by_row, key=lambda row: by_row[row][-1]):
        places = sum(len(by_row[each]) for each in (*batch, row))
        if batch and (len(batch) == BATCH_ROWS or places * width > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@contextmanager
def _head_at(model: PreTrainedModel, shape: torch.Size, index: tuple[torch.Tensor, ...]) -> Iterator[list[bool]]:
    """The output embedding multiplies the hidden states [B, S, D] of ``index`` alone, as [1, N, D]. The list is empty until it did."""
    narrowed: list[bool] = []

    def narrow(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if not arguments or arguments[0].shape[:2] != shape or arguments[0].dim() != 3:
            return None
        narrowed.append(True)
        return (arguments[0][index][None], *arguments[1:])

    head = model.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(narrow)
    try:
        yield narrowed
    finally:
        if handle is not None:
            handle.remove()


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
    model: PreTrainedModel, asked: Mapping[str, tuple[GoldenInputs, Steerer | None]], *, max_tokens: int = GREEDY_TOKENS
) -> dict[str, np.ndarray]:
    """By name the greedy continuation [R, G] of its prompts; end tokens are ignored, so that every row has G tokens to compare.

    A step reads every weight, however many rows it is for: up to ROWS_AT_ONCE go together, each name's edits on its own.
    """
    from reft_export.eager.steering import steering_of

    longest = max(len(prompt) for inputs, _ in asked.values() for prompt in inputs.prompts)
    count = max(1, min(max_tokens, decoder_context(model) - longest))
    found: dict[str, np.ndarray] = {}
    for names in _together(asked):
        with ExitStack() as steered:
            prompts: list[list[int]] = []
            places: dict[str, slice] = {}
            total = sum(asked[name][0].continued for name in names)
            for name in names:
                inputs, steerer = asked[name]
                places[name] = slice(len(prompts), len(prompts) + inputs.continued)
                prompts += inputs.prompts
                if (handle := steered.enter_context(steering_of(model, steerer))) is not None:
                    handle.rows = places[name]
                    handle.marks = _among(total, places[name], inputs.marked(slice(inputs.continued)))
            tokens = _greedy(model, prompts, count)
        found |= {name: tokens[place] for name, place in places.items()}
    return found


def _among(total: int, place: slice, marks: np.ndarray | None) -> np.ndarray | None:
    """The marks [n, S] of the rows ``place`` among ``total`` rows."""
    if marks is None:
        return None
    every = np.zeros((total, marks.shape[1]), bool)
    every[place] = marks
    return every


def _together(asked: Mapping[str, tuple[GoldenInputs, Steerer | None]]) -> Iterator[list[str]]:
    names: list[str] = []
    for name in asked:
        if names and sum(asked[each][0].continued for each in (*names, name)) > ROWS_AT_ONCE:
            yield names
            names = []
        names.append(name)
    yield names


def _greedy(model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int) -> np.ndarray:
    import torch

    from reft_export.eager.steering import greedy_tokens

    # Pads stand on the left: a sliding window counts columns, so pads between a prompt and its answer would fill it.
    ids, mask = (np.fliplr(x) for x in pad_right([row[::-1] for row in prompts]))
    tokens = greedy_tokens(model, torch.from_numpy(ids.copy()), torch.from_numpy(mask.copy()), count)
    return np.asarray(tokens, np.int64)
