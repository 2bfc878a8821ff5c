"""``reft-export run``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from reft_export.cli.classify import classify, given_texts, read_texts
from reft_export.cli.console import err, escape, guarded
from reft_export.cli.options import Kernel, Provider, Threads, check_choice, check_session_options, refuse_given
from reft_export.cli.prompt_lines import read_lines

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
            help="JSONL with a `prompt` or chat `messages` a line, of a classifier `text` and `text_pair`; - is stdin. Answers are JSONL.",
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
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None,
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
    from runtimes.chat import template_for
    from runtimes.device_session import limits_of, open_artifact, open_session
    from runtimes.errors import InputError
    from runtimes.generate import GenerationSettings, generate
    from runtimes.tasks import TEXT_CLASSIFICATION
    from runtimes.tokenizer import Tokenizer

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
    template = template_for(opened, adapter, chat)
    if chat == "always" and template is None:
        raise InputError(f"{bundle} has no chat template; drop --chat always")
    if system and template is None:
        raise InputError(f"--system needs a chat template, which {bundle} {no_template(chat)}")
    given = [(f"prompt {i}", [{"role": "user", "content": text}]) for i, text in enumerate(prompt or [], 1)]
    conversations = read_prompts(prompts) if prompts else given
    encoded = [encode(c, tokenizer, template, system) for _, c in conversations]
    limits = limits_of(opened)
    for (where, _), tokens in zip(conversations, encoded, strict=True):
        if not tokens or len(tokens) + max_new_tokens > limits.tokens:
            raise InputError(
                f"{where}: {len(tokens)} tokens and {max_new_tokens} new ones do not fit {limits.reason}; shorten it, or lower "
                "--max-new-tokens"
                if tokens
                else f"{where} is empty; a prompt needs at least one token"
            )
    # An engine takes so many rows and columns in one call, whatever was asked for.
    batch_size = min(batch_size, limits.rows or batch_size)
    if limits.columns is not None and max(map(len, encoded)) > limits.columns:
        prefill_chunk = min(prefill_chunk or limits.columns, limits.columns)
    alone = len(encoded) == 1 and not prompts and not as_json

    def show(_: int, piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    with open_session(opened, provider=provider, kernel=kernel, threads=threads, adapter=adapter) as session:
        session.set_adapter(adapter)  # an engine with a frozen adapter starts with that one
        for first in range(0, len(encoded), batch_size):
            part = encoded[first : first + batch_size]
            on_text = show if alone and stream else None
            answers = generate(session, tokenizer, part, settings, on_text=on_text, prefill_chunk=prefill_chunk)
            for index, answer in enumerate(answers, first):
                if prompts or as_json:
                    record = {"index": index, "adapter": adapter, "text": answer.text, "finish_reason": answer.finish_reason}
                    record |= {"prompt_tokens": answer.prompt_tokens, "tokens": len(answer.tokens)}
                    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
                    sys.stdout.flush()
                elif alone:
                    sys.stdout.write("\n" if stream else answer.text + "\n")
                else:
                    err.print(f"[dim]--- {escape((prompt or [''])[index])}[/]")
                    sys.stdout.write(answer.text + "\n")
                    sys.stdout.flush()


def no_template(chat: str) -> str:
    """Why prompts go through no chat template."""
    return "was told not to use" if chat == "never" else "does not have, or its adapter was trained without (--chat always renders it)"


def encode(messages: list[dict[str, Any]], tokenizer, template, system: str | None) -> list[int]:
    """A conversation through the chat template, or without one its only message as plain text."""
    from runtimes.errors import InputError

    if template is None:
        if len(messages) != 1:
            raise InputError(f"a conversation of several messages needs a chat template, which this bundle {no_template('auto')}")
        if not isinstance(messages[0]["content"], str):
            raise InputError("a message's content is not text, and this bundle has no chat template that could render it")
        return tokenizer.encode_prompt(messages[0]["content"])
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    return tokenizer.encode(template.render(messages), add_special_tokens=False)


def read_prompts(path: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """(file and line, conversation) of a JSONL file; raises InputError with the line's number."""
    from runtimes.errors import InputError

    conversations = []
    for where, value in read_lines(path):
        if isinstance(value, dict) and isinstance(value.get("prompt"), str) and value["prompt"]:
            conversations.append((where, [{"role": "user", "content": value["prompt"]}]))
        elif isinstance(value, dict) and isinstance(value.get("messages"), list) and value["messages"]:
            conversations.append((where, _checked_messages(value["messages"], where)))
        else:
            raise InputError(f'{where}: expected {{"prompt": "..."}} or {{"messages": [...]}}')
    return conversations


def _checked_messages(messages: list[Any], where: str) -> list[dict[str, Any]]:
    from runtimes.errors import InputError

    for message in messages:
        if not (isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message):
            raise InputError(f'{where}: a message is {{"role": "...", "content": "..."}}, got {str(message)[:60]}')
    return messages
