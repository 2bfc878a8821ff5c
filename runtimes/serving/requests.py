"""What clients ask, field by field as OpenAI's API spells it. What is not understood is refused, unless it says what holds anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtimes.errors import InputError
from runtimes.generation import GenerationSettings
from runtimes.text.grammars import JSON_OBJECT, Grammar

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "reasoning_effort": (),
    "verbosity": (),
    "prediction": (),
    "audio": (),
    "web_search_options": (),
}
"""OpenAI's fields that this server does not have, with the values that ask for nothing. null does in any of them."""
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""They change no answer."""

Stop = Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=8, fail_fast=True)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class OwnOptions(BaseModel):
    """This server's own. ``edited_tokens``: the answer says which tokens the adapter edits, a stream's first event does."""

    model_config = ConfigDict(extra="forbid", strict=True)

    edited_tokens: bool = False


class JsonSchema(BaseModel):
    """``strict`` changes nothing: every answer fits its schema. ``name`` and ``description`` are the client's own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    content: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    type: str
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _known(self) -> ResponseFormat:
        if self.type not in ("text", "json_object", "json_schema"):
            raise ValueError(f"{self.type[:60]!r} is not supported; text, json_object and json_schema are")
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("the type json_schema and a json_schema belong together; give both, or neither")
        return self

    @property
    def schema_of_answers(self) -> Mapping[str, Any] | None:
        """None: they say what they like."""
        return self.json_schema.content if self.json_schema is not None else JSON_OBJECT if self.type == "json_object" else None


class TextRequest(BaseModel):
    """What both endpoints take. ``top_k``, ``repetition_penalty``, ``strength`` and ``reft`` are not OpenAI's; other servers spell the
    first two so.

    ``strength``: how much of what the adapter adds is added; 1 is the adapter itself.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=300)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = None
    strength: Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1, max_length=256)] | Stop | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    reft: OwnOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, content: Any) -> Any:
        if not isinstance(content, Mapping):
            return content
        kept = {}
        for key, value in content.items():
            if key in cls.model_fields:
                kept[key] = value
            elif key in NEUTRAL:
                if value is not None and not any(
                    value == each and isinstance(value, bool) == isinstance(each, bool) for each in NEUTRAL[key]
                ):
                    raise ValueError(f"{key} is not supported by this server; leave it out")
            elif key not in IGNORED:
                raise ValueError(f"{str(key)[:60]} is not a field that this server knows; leave it out")
        return kept

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> TextRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are of a stream; leave them out, or set stream")
        return self

    @property
    def new_tokens(self) -> int | None:
        """None: as many as may be."""
        return self.max_tokens

    @property
    def best(self) -> int | None:
        """Likeliest tokens to tell with each one; None: no log-probabilities."""
        return None

    @property
    def schema_of_answers(self) -> Mapping[str, Any] | None:
        """None: they say what they like."""
        return None if self.response_format is None else self.response_format.schema_of_answers

    def generation(self, new_tokens: int, sample: int, grammar: Grammar | None = None) -> GenerationSettings:
        """The settings of answer ``sample`` of ``n``. Raises InputError. As OpenAI's, the temperature is 1 unless it is said."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return GenerationSettings(
            max_new_tokens=new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=self.seed,
            sample=sample,
            stop=stop,
            grammar=grammar,
        )


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=256, fail_fast=True)]

    def plain(self) -> dict[str, str]:
        """As chat templates have it: "developer" is what "system" was called before."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(TextRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=512, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _once(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def best(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
DEFAULT_TOKENS = 16
"""Of a completion, as OpenAI's."""


class CompletionRequest(TextRequest):
    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=128, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, max_length=128, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[each for each in self.prompt if isinstance(each, int)]]
        return [each for each in self.prompt if not isinstance(each, int)]

    @property
    def new_tokens(self) -> int | None:
        return DEFAULT_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def best(self) -> int | None:
        return self.logprobs


def adapter_of(model: str) -> str | None:
    """The adapter that a model's name asks for, None for the base: ``base``, NAME or ``base:NAME``. Raises InputError for no name."""
    if model == "base":
        return None
    name = model.removeprefix("base:")
    if not name or name == "base":
        raise InputError(f"model {model!r} names no adapter")
    return name
