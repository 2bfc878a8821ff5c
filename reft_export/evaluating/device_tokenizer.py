"""A bundle's tokenizer and chat template as the reader of training data takes them, so that held-out lines are read without
transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtimes.artifacts.artifact import Artifact
from runtimes.text.chat import ChatTemplate
from runtimes.text.tokenizer import Tokenizer


class DeviceTokenizer:
    """What reft_export/training reads of transformers' tokenizers, computed as the device computes it: by runtimes/text."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self.tokenizer, self._template = tokenizer, template

    @classmethod
    def of(cls, artifact: Artifact) -> DeviceTokenizer:
        """Raises BundleError for an artifact without tokenizer files, or with damaged ones."""
        folder = Path(artifact.folder)
        return cls(Tokenizer.load(folder, artifact.manifest.model), ChatTemplate.load(folder))

    @property
    def eos_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def chat_template(self) -> str | None:
        """All of its templates: which keys of a message are read is looked up in here."""
        return None if self._template is None else "\n".join(self._template.templates.values())

    def __call__(
        self,
        text: str,
        pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int | None = None,
        return_token_type_ids: bool = False,
        verbose: bool = False,
    ) -> dict[str, list[int]]:
        """``truncation`` cuts a classifier's text to ``max_length``, from the longer one's end."""
        if not return_token_type_ids and pair is None and not truncation:
            return {"input_ids": self.tokenizer.encode(text, add_special_tokens=add_special_tokens)}
        encoded = self.tokenizer.encode_text(text, pair, most=max_length if truncation else None)
        return {"input_ids": list(encoded.ids), "token_type_ids": list(encoded.types)}

    def num_special_tokens_to_add(self, *, pair: bool) -> int:
        return self.tokenizer.backend.num_special_tokens_to_add(pair)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, tokenize: bool = False, add_generation_prompt: bool = False
    ) -> str:
        assert self._template is not None  # the reader asks for chat_template first
        return self._template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt)
