"""A classifier's task. It is recorded on texts and pairs of texts, an adapter's probes first, and the logits that eager PyTorch gives them.

The arrays are the CLASSIFIER ones of runtimes/artifacts/golden_schema.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from reft_export.base.classifiers import context_of, takes_token_types
from runtimes.artifacts.ort_adapter_file import Tensor
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
from runtimes.errors import InputError
from runtimes.parity.figures import Figures, compare
from runtimes.session import Session, as_classifier
from runtimes.text.encoded_text import EncodedText, padded, rows_of

if TYPE_CHECKING:  # what the task refuses is said before torch is loaded
    import onnx_ir as ir
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reft_export.base.load import Base
    from reft_export.eager.steering import Steerer, Steering

TEXTS = (
    "Hello!",
    "The film was a delight.",
    "I would not watch it again, not even for money.",
    "The old house at the end of the road had been empty for years.",
    "A man is playing a guitar.",
    "What is the capital of France?",
    "The council met on Monday; nobody was there.",
    "It rains.",
)
"""Each alone and in a pair with every other: so many that one text between two labels does not decide a top-1 agreement of 0.98."""
RANDOM_LENGTHS = range(3, 35)
"""Of the texts of a base without a tokenizer."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifierInputs:
    """Right-padded texts, int64 [B, S]. ``targets`` [B]: of an adapter with probes their labels, -1 behind them."""

    input_ids: np.ndarray
    attention_mask: np.ndarray
    token_type_ids: np.ndarray
    targets: np.ndarray | None = None
    task: ClassVar[str] = TEXT_CLASSIFICATION

    @property
    def likelihoods(self) -> bool:
        return False

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def for_adapters(self, model: PreTrainedModel) -> ClassifierInputs:
        return self

    def said(self, model: PreTrainedModel, steerer: Steerer | None = None) -> dict[str, np.ndarray]:
        return {"logits": self.logits(model, steerer)}

    def differs(self, model: PreTrainedModel, steerer: Steerer | None, said: Mapping[str, np.ndarray]) -> Figures:
        """Of what the model says now, against what was ``said``."""
        return compare(self.logits(model, steerer), said["logits"])

    def logits(self, model: PreTrainedModel, steerer: Steerer | None = None) -> np.ndarray:
        """Logits [B, labels] float32, in one padded batch."""
        import torch

        from reft_export.eager.steering import steering_of

        tensors = (torch.from_numpy(x) for x in (self.input_ids, self.attention_mask, self.token_type_ids))
        with torch.no_grad(), steering_of(model, steerer):
            return model(**model_inputs(model, *tensors)).logits.float().cpu().numpy()

    def rows(self) -> Iterator[ClassifierRow]:
        for number, real in enumerate(self.attention_mask > 0):
            yield ClassifierRow(number=number, ids=self.input_ids[number][real][None], types=self.token_type_ids[number][real][None])


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassifierRow:
    """One text or pair, int64 [1, S]."""

    number: int
    ids: np.ndarray
    types: np.ndarray

    def run(self, session: Session) -> tuple[np.ndarray, Mapping[str, Tensor]]:
        output = as_classifier(session).classify(self.ids, np.ones_like(self.ids), self.types)
        return output.logits, output.outputs

    def eager(self, model: PreTrainedModel, steering: Steering | None) -> torch.Tensor:
        import torch

        ids = torch.from_numpy(self.ids)
        if steering is not None:
            steering.prompt_length = [ids.shape[1]]
        return model(**model_inputs(model, ids, torch.ones_like(ids), torch.from_numpy(self.types))).logits


class Classification:
    """Rows are in tasks/task.py."""

    name = TEXT_CLASSIFICATION
    recorded = "logits"
    decodes, swaps_head = False, True
    no_genai = "onnxruntime-genai generates text, and a classifier is no decoder"

    def inputs(self, base: Base) -> ClassifierInputs:
        return classifier_inputs(base.model, base.tokenizer)

    def with_likelihoods(self, base: Base, inputs: ClassifierInputs) -> ClassifierInputs:
        return inputs

    def probe_inputs(self, model: PreTrainedModel, examples: Sequence[Any], of_base: ClassifierInputs) -> ClassifierInputs:
        """The adapter's texts, and behind them as many of the base's as make one wrong label in all no more than in the base's alone."""
        texts = rows_of(of_base.input_ids, of_base.attention_mask, of_base.token_type_ids)
        rows = [*(each.text for each in examples), *texts[len(examples) :]]
        inputs = padded(rows, model.config.pad_token_id or 0)
        targets = np.array([*(each.label for each in examples), *[-1] * (len(rows) - len(examples))], np.int64)
        return ClassifierInputs(**dict(zip(INPUTS, inputs, strict=True)), targets=targets)

    def stored_inputs(self, arrays: Mapping[str, np.ndarray]) -> ClassifierInputs:
        return ClassifierInputs(**{field.name: arrays[field.name] for field in fields(ClassifierInputs) if field.name in arrays})

    def answers(self, model: PreTrainedModel, asked: Mapping[str, tuple[ClassifierInputs, Steerer | None]]) -> dict[str, Arrays]:
        return {name: {} for name in asked}

    def check_settings(self, base: str, *, exporter: str, logits: str) -> None:
        if (exporter, logits) != ("dynamo", "all"):
            what = "--logits last" if logits != "all" else f"--exporter {exporter}"
            raise InputError(f"{base} is a classifier, which {what} is not for; leave it out (dynamo, one row of logits a text)")

    def logits_shape(self, logits: str) -> str:
        return "logits one row a text"

    def kv_cache(self, graph: ir.Graph) -> str:
        return "none"

    def padding(self, graph: ir.Graph) -> str:
        return "right"


def classifier_inputs(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> ClassifierInputs:
    """TEXTS as the tokenizer frames them, cut to the context; random tokens for a base without tokenizer."""
    room, pad = context_of(model), model.config.pad_token_id or 0
    if tokenizer is None:
        generator = np.random.default_rng(0)
        allowed = np.setdiff1d(np.arange(model.config.vocab_size), [pad])  # a pad token is no token to RoBERTa's positions
        rows = [tuple(generator.choice(allowed, min(n, room)).tolist()) for n in RANDOM_LENGTHS]
        texts = [EncodedText(ids=row, types=(0,) * len(row)) for row in rows]
    else:
        pairs = [(text, pair) for text in TEXTS for pair in (None, *TEXTS) if pair != text]
        texts = [encode(tokenizer, text, pair, room, "the base's context")[0] for text, pair in pairs]
    return ClassifierInputs(**dict(zip(INPUTS, padded(texts, pad), strict=True)))


def encode(tokenizer: PreTrainedTokenizerBase, text: str, pair: str | None, max_length: int, where: str) -> tuple[EncodedText, bool]:
    """(the text or pair with its special tokens, cut to ``max_length`` from the longer one's end; whether it was cut).

    Raises InputError, naming ``where``, for a length that leaves no token of a text, and for texts without any.
    """
    texts, special = (1 if pair is None else 2), tokenizer.num_special_tokens_to_add(pair=pair is not None)
    if max_length < special + texts:  # the tokenizer would cut to special tokens alone, or leave the text whole and say nothing
        raise InputError(
            f"{where}: at most {max_length} tokens leave no room for {'the text' if pair is None else 'both texts'}: special tokens "
            f"alone are {special}; allow {special + texts} or more (--max-length)"
        )
    whole = tokenizer(text, pair, verbose=False)["input_ids"]
    encoded = tokenizer(text, pair, truncation=True, max_length=max_length, return_token_type_ids=True, verbose=False)
    ids = tuple(encoded["input_ids"])
    if not special < len(ids) <= max_length:
        wrong = f"is {len(ids)} tokens, and {max_length} at most are asked for" if len(ids) > special else "has no token of its own"
        raise InputError(f"{where}: the text {wrong} (special tokens alone are {special}); correct the line")
    return EncodedText(ids=ids, types=tuple(encoded["token_type_ids"])), len(whole) > len(ids)


def model_inputs(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> dict:
    """The keywords of a classifier's forward, on its device."""
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    if takes_token_types(model):
        given["token_type_ids"] = token_type_ids
    return {name: tensor.to(model.device) for name, tensor in given.items()}
