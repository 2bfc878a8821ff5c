"""A bundle or an engine as a model of EleutherAI's lm-evaluation-harness (``lm_eval``), whose tasks then run on it.

    python -m reft_export.lm_eval run --model reft-export --model_args bundle=BUNDLE,adapter=NAME --tasks ...

Contexts, windows and answers are cut as ``lm_eval``'s own ``hf`` model cuts them (lm_eval/models/huggingface.py of 0.4.13), so that a
float bundle's figures are those of its base there. To an adapter the context is the prompt: positions are counted by it, whatever follows
is the answer. In a window of ``loglikelihood_rolling`` that is the one token in front of what is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
from tqdm import tqdm  # pyright: ignore[reportMissingModuleSource]

from runtimes.errors import InputError
from runtimes.generation import GenerationSettings, generate
from runtimes.open import open_artifact, open_session
from runtimes.parity.perplexity import log_softmax, predictions
from runtimes.text.chat import ChatTemplate
from runtimes.text.tokenizer import Tokenizer

MODEL_NAME = "reft-export"
AUTO_ROWS = 16
"""Of a batch of ``batch_size=auto``."""
SAMPLING = {"top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repetition_penalty", "seed": "seed"}
"""What a task may say of its answers beside until, max_gen_toks, do_sample and temperature."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""((context, continuation), their tokens)."""


@register_model(MODEL_NAME)
class BundleLM(TemplateLM):
    """``--model reft-export``. Raises what ``open_artifact`` and ``open_session`` raise, and InputError for what a task asks that no
    session does."""

    def __init__(
        self,
        bundle: str,
        adapter: str | None = None,
        *,
        provider: str | None = None,
        kernel: str | None = None,
        threads: int | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
    ) -> None:
        """``adapter``: None is the base. ``batch_size``: prompts that are answered together; likelihoods are taken one by one. ``device``:
        lm_eval's, cuda unless somebody says otherwise, is not read: ``provider`` says where a bundle runs."""
        super().__init__()
        artifact = open_artifact(bundle)
        self._session = open_session(artifact, provider=provider, kernel=kernel, threads=threads, adapter=adapter)
        self._text = Tokenizer.load(artifact.folder, artifact.manifest.model)
        # A begin that the tokenizer's own files do not name is none to lm_eval.
        self._bos = Tokenizer.load(artifact.folder).bos_token_id
        self._template = ChatTemplate.load(artifact.folder)
        self._context = min(max_length or artifact.limits.tokens, artifact.limits.tokens)
        self._most = max_gen_toks
        rows = AUTO_ROWS if str(batch_size).startswith("auto") else int(batch_size)
        self._rows = min(rows, max_batch_size or rows, artifact.limits.rows or rows)

    @property
    def eot_token_id(self) -> int:
        """Of the tokenizer: the one that ends a text."""
        if self._text.eos_token_id is None:
            raise InputError(f"{self._session.bundle.folder} has no token that ends a text, which lm_eval needs")
        return self._text.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._bos is None else self._bos

    @property
    def max_length(self) -> int:
        return self._context

    @property
    def max_gen_toks(self) -> int:
        return self._most

    @property
    def tokenizer_name(self) -> str:
        return str(self._session.bundle.folder).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """For the record of a run; "" without one."""
        if not chat_template or self._template is None:
            return ""
        return self._template.templates["default" if chat_template is True else chat_template]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Raises InputError for a bundle without a template, and for what its template refuses."""
        if self._template is None:
            raise InputError(f"{self._session.bundle.folder} has no chat template; leave --apply_chat_template out")
        return self._template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            beginning = self._text.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not has_bos_prefix(string, beginning)
        return self._text.encode(string, add_special_tokens=add_special_tokens)

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._text.decode(tokens, skip_special_tokens=skip_special_tokens)

    def _loglikelihood_tokens(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p, whether it is the greedy answer) of every continuation. Those that differ in their last token alone share a forward."""
        alike: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            tokens = [*context, *continuation][-(self.max_length + 1) :]
            alike.setdefault((tuple(tokens[:-1]), len(tokens) - len(continuation)), []).append(number)
        found: dict[int, tuple[float, bool]] = {}
        for (fed, prompt), numbers in tqdm(alike.items(), disable=disable_tqdm, desc="Running loglikelihood requests"):
            last = requests[numbers[0]][2][-1]
            said = [log_softmax(logits) for _, logits in predictions(self._session, [*fed, last], prompt)]
            for number in numbers:
                strings, _, continuation = requests[number]
                pairs = list(zip(continuation, said, strict=True))
                greedy = all(int(np.argmax(row)) == token for token, row in pairs)
                found[number] = (sum(float(row[token]) for token, row in pairs), greedy)
                if strings is not None:
                    self.cache_hook.add_partial("loglikelihood", strings, found[number])
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts: windows of the context, every token scored once, the first one behind the begin."""
        texts: list[float] = []
        for request in tqdm(requests, disable=disable_tqdm, desc="Running loglikelihood_rolling requests"):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            scored = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows], disable_tqdm=True)
            texts.append(sum(value for value, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), texts[-1])
        return texts

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut where the first of the task's ``until`` begins. Prompts of one kind and like length are answered together."""
        asked = [request.args for request in requests]
        order = sorted(range(len(asked)), key=lambda number: (repr(asked[number][1]), len(asked[number][0]), number))
        answers = [""] * len(asked)
        with tqdm(total=len(order), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            while order:
                kind = asked[order[0]][1]
                batch = [number for number in order[: self._rows] if asked[number][1] == kind]
                order = order[len(batch) :]
                for number, text in zip(batch, self._answers([asked[number][0] for number in batch], kind), strict=True):
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", asked[number], text)
                bar.update(len(batch))
        return answers

    def _answers(self, contexts: Sequence[str], kind: dict[str, Any]) -> list[str]:
        said = dict(normalize_gen_kwargs(kind, self._most))
        ends = self.tok_decode([self.eot_token_id], skip_special_tokens=False)
        until, most = handle_stop_sequences(said.pop("until", None), eos=ends), int(said.pop("max_gen_toks"))
        samples, temperature = said.pop("do_sample"), float(said.pop("temperature", 0) or 0)
        if unknown := sorted(set(said) - set(SAMPLING)):
            raise InputError(f"a task's generation_kwargs have {unknown}, which no session has; known: {', '.join(SAMPLING)}")
        if most >= self.max_length:
            raise InputError(
                f"a task asks for {most} new tokens, which leave none of {self.max_length} for its prompts; lower max_gen_toks"
            )
        settings = GenerationSettings(
            max_new_tokens=most,
            temperature=(temperature or 1.0) if samples else 0.0,
            stop=tuple(text for text in until if text),
            stop_token_ids=(self.eot_token_id,),
            **{SAMPLING[name]: value for name, value in said.items()},
        )
        prompts = [self.tok_encode(context)[-(self.max_length - most) :] for context in contexts]
        given = generate(self._session, self._text, prompts, settings)
        return [postprocess_generated_text(self.tok_decode(each.tokens), until, None) for each in given]
