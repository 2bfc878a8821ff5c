"""``reft-export run``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reft_export.cli.classify import Text, classify, given_texts, read_texts
from reft_export.cli.guard import guarded
from reft_export.cli.options import Kernel, Provider, Threads, check_choice, check_session_options, refuse_given
from reft_export.console import err, escape
from runtimes.text.prompts import SAMPLING, Request, batches_of_alike, encode, in_order, no_template, read_requests

if TYPE_CHECKING:
    from runtimes.artifacts.bundle import Bundle
    from runtimes.generation import Generation, GenerationSettings
    from runtimes.open import Limits
    from runtimes.session import Session
    from runtimes.text.chat import ChatTemplate
    from runtimes.text.tokenizer import Tokenizer

GENERATION = (
    "chat", "system", "stream", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop", "prefill_chunk",
)  # fmt: skip
"""Parameters that mean nothing for a classifier."""


def register(app: typer.Typer) -> None:
    app.command("run")(guarded(run))


def run(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="A bundle or engine folder.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeat for a batch.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="JSONL with a `prompt` or chat `messages` a line, of a classifier `text` and `text_pair`; - is stdin. Answers are JSONL. "
            "In place of the options a line can have its own `adapter` (a name, or null) and, where text is generated, `system`, "
            "`max_new_tokens`, `temperature`, `top_k`, `top_p`, `repetition_penalty`, `seed` and `stop`.",
        ),
    ] = None,
    pair: Annotated[
        list[str] | None, typer.Option("--pair", help="Of a classifier: the second text of a pair; repeat with --prompt.")
    ] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", "-a", help="An adapter of the bundle; default: none, the base.")] = None,
    provider: Provider = None,
    kernel: Kernel = None,
    threads: Threads = None,
    chat: Annotated[
        str, typer.Option("--chat", help="Render prompts through the chat template: auto (as the adapter was trained), always, never.")
    ] = "auto",
    system: Annotated[str | None, typer.Option("--system", help="A system message for the chat template.")] = None,
    stream: Annotated[bool, typer.Option("--stream/--no-stream", help="Print the text as it comes (one prompt only).")] = True,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Only the k likeliest tokens; 0: no limit.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Only the likeliest tokens that together reach this probability.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option("--repetition-penalty", help="1 is none.")] = 1.0,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            help="Makes sampling repeatable: an answer depends on its prompt, settings and seed, not on what runs beside it. The same "
            "prompt again is another sample, unless its line has a `seed` of its own.",
        ),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text that ends the answer; repeat for several.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts of a JSONL file that run together.")] = 8,
    prefill_chunk: Annotated[
        int | None,
        typer.Option("--prefill-chunk", min=1, help="Prompt tokens per call; bounds the memory of a long prompt."),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash large files again, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answers as JSONL on stdout.")] = False,
) -> None:
    """Answer prompts with a bundle in onnxruntime or an engine in TensorRT, steered by an adapter or not.

    A classifier says the label of each text, and the probabilities of all labels.
    """
    from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
    from runtimes.errors import InputError
    from runtimes.generation import GenerationSettings
    from runtimes.open import limits_of, open_artifact, open_session
    from runtimes.text.chat import template_for
    from runtimes.text.tokenizer import Tokenizer

    check_session_options(provider, kernel)
    check_choice("--chat", chat, ("auto", "always", "never"))
    if bool(prompt) == bool(prompts):
        raise InputError("give either --prompt TEXT (-p) or --prompts FILE.jsonl")
    opened = open_artifact(bundle, verify=verify)
    if adapter is not None:
        opened.adapter(adapter)
    if opened.manifest.task == TEXT_CLASSIFICATION:
        refuse_given(context, GENERATION, f"for text generation, and {bundle} is a classifier")
        if prompts and pair:
            raise InputError(f"--pair goes with --prompt; of {prompts}, a line's text_pair is the second text")
        texts = read_texts(prompts) if prompts else given_texts(prompt, pair)
        check_adapters(opened, texts)
        with open_session(opened, provider=provider, kernel=kernel, threads=threads, adapter=adapter) as session:
            classify(session, texts, batch_size=batch_size, as_json=bool(prompts) or as_json)
        return
    refuse_given(context, ("pair",), f"a classifier's, and {bundle} generates text")
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    tokenizer = Tokenizer.load(opened.folder, opened.manifest.model)
    given = [Request(where=f"prompt {i}", messages=[{"role": "user", "content": text}]) for i, text in enumerate(prompt or [], 1)]
    requests = read_requests(prompts) if prompts else given
    check_adapters(opened, requests)
    names = {adapter, *(r.options["adapter"] for r in requests if "adapter" in r.options)}
    templates = {name: template_for(opened, name, chat) for name in names}
    if chat == "always" and None in templates.values():
        raise InputError(f"{bundle} has no chat template; drop --chat always")
    if system and not any(templates.values()):
        raise InputError(f"--system needs a chat template, which {bundle} {no_template(chat)}")
    asks = another_sample_each([_ask(r, settings, adapter, system, tokenizer, templates, chat) for r in requests])
    limits = limits_of(opened)
    for ask in asks:
        ask.check(limits)
    # An engine takes so many rows and columns in one call, whatever was asked for.
    batch_size = min(batch_size, limits.rows or batch_size)
    if limits.columns is not None and max(len(ask.tokens) for ask in asks) > limits.columns:
        prefill_chunk = min(prefill_chunk or limits.columns, limits.columns)
    alone = len(asks) == 1 and not prompts and not as_json

    def show(_: int, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    with open_session(opened, provider=provider, kernel=kernel, threads=threads, adapter=adapter) as session:
        try_adapters(session, asks)
        on_text = show if alone and stream else None
        for index, answer in in_order(answers(session, tokenizer, asks, batch_size, on_text=on_text, prefill_chunk=prefill_chunk)):
            if prompts or as_json:
                record = {"index": index, "adapter": asks[index].adapter, "text": answer.text, "finish_reason": answer.finish_reason}
                record |= {"prompt_tokens": answer.prompt_tokens, "tokens": len(answer.tokens)}
                sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
                sys.stdout.flush()
            elif alone:
                sys.stdout.write("\n" if stream else answer.text + "\n")
            else:
                err.print(f"[dim]--- {escape((prompt or [''])[index])}[/]")
                sys.stdout.write(answer.text + "\n")
                sys.stdout.flush()


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt as it is run; ``own`` names what its line says itself, in place of the options."""

    where: str
    tokens: list[int]
    adapter: str | None
    settings: GenerationSettings
    own: frozenset[str]

    def check(self, limits: Limits) -> None:
        """Raises InputError for no tokens, and for more than fit."""
        from runtimes.errors import InputError

        count = self.settings.max_new_tokens
        if not self.tokens:
            raise InputError(f"{self.where} is empty; a prompt needs at least one token")
        if len(self.tokens) + count > limits.tokens:
            option = "its max_new_tokens" if "max_new_tokens" in self.own else "--max-new-tokens"
            raise InputError(
                f"{self.where}: {len(self.tokens)} tokens and {count} new ones do not fit {limits.reason}; shorten it, or lower {option}"
            )


def _ask(
    request: Request,
    settings: GenerationSettings,
    adapter: str | None,
    system: str | None,
    tokenizer: Tokenizer,
    templates: Mapping[str | None, ChatTemplate | None],
    chat: str,
) -> Ask:
    """What a line says goes before what the options say. Raises InputError with the line."""
    from runtimes.errors import InputError

    own = request.options
    chosen = own.get("adapter", adapter)
    try:
        return Ask(
            where=request.where,
            tokens=encode(request.messages, tokenizer, templates[chosen], own.get("system", system), chat),
            adapter=chosen,
            settings=replace(settings, **_sampling(own)),
            own=frozenset(own),
        )
    except InputError as e:
        raise InputError(f"{request.where}: {e}") from None


def _sampling(own: Mapping[str, Any]) -> dict[str, Any]:
    """A line's own settings of generation as GenerationSettings has them."""
    changes = {key: own[key] for key in SAMPLING if key in own}
    if "stop" in changes:
        changes["stop"] = (changes["stop"],) if isinstance(changes["stop"], str) else tuple(changes["stop"])
    return changes


def another_sample_each(asks: Sequence[Ask]) -> list[Ask]:
    """The same prompt with the same settings again is another sample of the seed, in whichever batch it runs; a line's own seed means
    the answer that the line has alone."""
    seen: Counter[Any] = Counter()
    numbered = []
    for ask in asks:
        if "seed" not in ask.own:
            same = (ask.adapter, ask.settings, tuple(ask.tokens))
            ask = replace(ask, settings=replace(ask.settings, sample=seen[same]))
            seen[same] += 1
        numbered.append(ask)
    return numbered


def check_adapters(opened: Bundle, lines: Sequence[Request | Text]) -> None:
    """Raises BundleError with the line for an adapter of its own that is not in the bundle."""
    from runtimes.errors import BundleError

    for line in lines:
        if (name := line.options.get("adapter")) is not None:
            try:
                opened.adapter(name)
            except BundleError as e:
                raise BundleError(f"{line.where}: {e}") from None


def try_adapters(session: Session, asks: Sequence[Ask]) -> None:
    """Every adapter once, before the first answer: an engine may not take one. Raises InputError, with the line that names it."""
    from runtimes.errors import InputError

    for ask in {ask.adapter: ask for ask in reversed(asks)}.values():
        try:
            session.set_adapter(ask.adapter)
        except InputError as e:
            raise InputError(f"{ask.where}: {e}" if "adapter" in ask.own else str(e)) from None


def answers(
    session: Session,
    tokenizer: Tokenizer,
    asks: Sequence[Ask],
    batch_size: int,
    *,
    on_text: Callable[[int, str], None] | None,
    prefill_chunk: int | None,
) -> Iterator[tuple[int, Generation]]:
    """(number, answer) of every prompt, in batches of one adapter and one count of new tokens."""
    from runtimes.generation import generate

    for batch in batches_of_alike([(ask.adapter, ask.settings.max_new_tokens) for ask in asks], batch_size):
        part = [asks[i] for i in batch]
        session.set_adapter(part[0].adapter)
        each = [ask.settings for ask in part]
        yield from zip(
            batch,
            generate(session, tokenizer, [ask.tokens for ask in part], each, on_text=on_text, prefill_chunk=prefill_chunk),
            strict=True,
        )
