"""Chat messages to one prompt, by the checkpoint's own Jinja template, with the same result as transformers' apply_chat_template.

Templates come from downloaded checkpoints: they run in a sandbox with a budget (template_sandbox.py), and see nothing but
plain JSON data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from runtimes.artifacts.artifact import Artifact
from runtimes.artifacts.listed_files import TEMPLATE_FOLDER
from runtimes.errors import BundleError, InputError
from runtimes.files.records import read_regular
from runtimes.text.stop_tokens import end_of_turn
from runtimes.text.template_sandbox import Sandbox, budget
from runtimes.text.tokenizer import CONFIG_FILE, Tokenizer, read_tokenizer_config, special_tokens

TEMPLATE_FILE = "chat_template.jinja"
MOST = 1_000_000
"""Characters of a template."""
LONGEST = 300
"""Characters of an error that a template words."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """``templates`` by name; a checkpoint with one template calls it "default"."""

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]

    @classmethod
    def load(cls, folder: Path | str) -> ChatTemplate | None:
        """The template of chat_template.jinja, else of tokenizer_config.json; None where the checkpoint has none."""
        folder = Path(folder)
        config = read_tokenizer_config(folder)
        templates = _templates_of(config.get("chat_template"), folder / CONFIG_FILE)
        files = {"default": folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).is_file() else {}
        files |= {path.stem: path for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))}
        if files:  # as in transformers: template files replace the config's template, whatever their names
            templates = {name: _read(path) for name, path in files.items()}
        return cls(templates=templates, special_tokens=special_tokens(config)) if templates else None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation; encode it with ``add_special_tokens=False``.

        ``template`` is a name; by default "tool_use" where tools are given and there is one, else "default". ``variables`` are
        further values that the template reads, for example ``enable_thinking``. Raises InputError where the template refuses.
        """
        if not messages or not all(isinstance(m, Mapping) for m in messages):
            raise InputError('a chat needs a list of messages, each an object like {"role": "user", "content": "..."}')
        name = template or ("tool_use" if tools is not None and "tool_use" in self.templates else "default")
        if name not in self.templates:
            raise InputError(f"there is no chat template {name!r}; this tokenizer has: {', '.join(sorted(self.templates))}")
        values = {
            **self.special_tokens,
            **(variables or {}),
            # Many templates print None, or fail on it, where they handle an absent key.
            "messages": [{k: v for k, v in m.items() if v is not None} for m in messages],
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            with budget():
                return _compiled(name, self.templates[name]).render(**_plain(values))
        except (BundleError, InputError):
            raise
        except Exception as e:  # of any class: a template divides by zero, recurses, or overflows
            raise InputError(f"chat template {name!r} refuses these messages: {_in_short(e)}") from None

    def end_of_turn(self, tokenizer: Tokenizer) -> int | None:
        """The special token that the template ends an assistant's message with, if any."""

        def render(messages: Sequence[Mapping[str, str]]) -> str:
            try:
                return self.render(messages, add_generation_prompt=False)
            except (InputError, BundleError):  # a template that refuses a question and its answer tells no end of them
                return ""

        return end_of_turn(render, lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.special_token_ids)


def template_for(artifact: Artifact, adapter: str | None, chat: str = "auto") -> ChatTemplate | None:
    """The template that prompts go through; None where they are read as they are.

    ``chat``: always, never, or auto: as the adapter's training data did, which its record says; the base, and an adapter that does not
    say, through the template where there is one.
    """
    if chat == "never":
        return None
    training = {} if adapter is None else artifact.adapter_record(adapter).training
    return None if chat == "auto" and trained_without_template(training) else ChatTemplate.load(artifact.folder)


def trained_without_template(training: Mapping[str, Any]) -> bool:
    """Whether an adapter's record says that its prompts went through no chat template."""
    data = training.get("data")
    return isinstance(data, Mapping) and data.get("chat_template") is False


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` .. ``{% endgeneration %}`` marks assistant text for training masks; here its body renders as it is."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A scope of its own, as transformers' call block has: what is set inside does not leak.
        return [jinja2.nodes.Scope(body).set_lineno(line)]


def _compiled(name: str, template: str) -> jinja2.Template:
    if len(template) > MOST:
        raise BundleError(f"chat template {name!r} has {len(template)} characters; {MOST} at most are read")
    try:
        return _compile(template)
    except jinja2.TemplateSyntaxError as e:
        raise BundleError(f"chat template {name!r} cannot be read: {_in_short(e.message or e)} (line {e.lineno})") from None
    except Exception as e:  # RecursionError, MemoryError and SyntaxError of Python's own parser among them
        raise BundleError(f"chat template {name!r} cannot be read: {_in_short(e)}") from None


@lru_cache(maxsize=32)
def _compile(template: str) -> jinja2.Template:
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols], tojson=_tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _in_short(said: object) -> str:
    text = " ".join(str(said).split()) or type(said).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}.."


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own tojson escapes <, > and & for HTML, which a model has never seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _plain(value: Any) -> Any:
    """JSON types only: the sandbox does not know which methods of other objects are dangerous."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    raise InputError(f"chat messages hold JSON values only, got a {type(value).__name__}")


def _templates_of(value: Any, path: Path) -> dict[str, str]:
    """tokenizer_config.json stores one template, or a list of ``{"name", "template"}``."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list):
        value = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}
    if not isinstance(value, dict) or not all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        raise BundleError(f"{path}: chat_template is neither a template nor a list of named ones; copy the bundle again")
    return value


def _read(path: Path) -> str:
    try:
        return read_regular(path).decode()
    except (OSError, UnicodeDecodeError) as e:
        raise BundleError(f"{path} cannot be read: {e}; copy the bundle again") from None
