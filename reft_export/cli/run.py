"""``reft-export run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_export.cli.guard import guarded
from reft_export.cli.options import Kernel, Provider, Threads, check_choice, check_session_options, refuse_given
from reft_export.cli.run_options import RunOptions
from reft_export.console import err, escape

GENERATION = (
    "interactive", "strength", "chat", "system", "stream", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed",
    "stop", "json_schema", "prefill_chunk", "speculate",
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
            "In place of the options a line can have its own `adapter` (a name, or null) and, where text is generated, `strength`, "
            "`system`, `max_new_tokens`, `temperature`, `top_k`, `top_p`, `repetition_penalty`, `seed`, `stop` and `json_schema`.",
        ),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option("--interactive", "-i", help="A conversation, whose KV cache is kept over its turns; /help says its commands."),
    ] = False,
    pair: Annotated[
        list[str] | None, typer.Option("--pair", help="Of a classifier: the second text of a pair; repeat with --prompt.")
    ] = None,
    adapter: Annotated[str | None, typer.Option("--adapter", "-a", help="An adapter of the bundle; default: none, the base.")] = None,
    strength: Annotated[
        float, typer.Option("--strength", help="How much of what an adapter adds is added: 1 is the adapter, 0 the base. In onnxruntime.")
    ] = 1.0,
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
    json_schema: Annotated[
        Path | None, typer.Option("--json-schema", help="A JSON schema that every answer fits, as far as its tokens go.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts of a JSONL file that run together.")] = 8,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(
            "--prefill-chunk", min=0, help="Prompt tokens per call, which bounds the memory of a long prompt; default: 512. 0: all at once."
        ),
    ] = None,
    speculate: Annotated[
        int,
        typer.Option(
            "--speculate",
            min=0,
            help="Prompt lookup: feed up to so many tokens ahead that followed the same words before; of a prompt that runs alone. The "
            "answer is the same, sooner where it repeats its prompt. 0: none.",
        ),
    ] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Hash large files again, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answers as JSONL on stdout.")] = False,
) -> None:
    """Answer prompts with a bundle in onnxruntime or an engine in TensorRT, steered by an adapter or not.

    A classifier says the label of each text, and the probabilities of all labels.
    """
    from reft_export.cli import answer, classify, converse
    from runtimes.artifacts.artifact import not_held
    from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION
    from runtimes.errors import InputError
    from runtimes.open import open_artifact, open_session

    check_session_options(provider, kernel)
    check_choice("--chat", chat, ("auto", "always", "never"))
    if interactive:
        refuse_given(context, ("speculate",), "for answers of one call, and --interactive is a conversation")
        refuse_given(context, ("prompts",), "answers that are known beforehand, and --interactive is a conversation")
    elif bool(prompt) == bool(prompts):
        raise InputError("give either --prompt TEXT (-p) or --prompts FILE.jsonl, or --interactive (-i)")
    options = RunOptions(
        prompt=prompt or [],
        prompts=prompts,
        pair=pair or [],
        adapter=adapter,
        strength=strength,
        chat=chat,
        system=system,
        stream=stream,
        batch_size=batch_size,
        prefill_chunk=prefill_chunk,
        speculate=speculate,
        as_json=bool(prompts) or as_json,
        json_schema=json_schema,
        settings={
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": tuple(stop or ()),
        },
    )
    opened = open_artifact(bundle, verify=verify)
    if adapter is not None:
        opened.adapter(adapter)
        if adapter in opened.manifest.not_held:
            err.print(f"[yellow]note:[/] {escape(not_held(bundle, adapter))}")
    prepare, refused, why = {
        TEXT_GENERATION: ((converse if interactive else answer).prepare, ("pair",), f"a classifier's, and {bundle} generates text"),
        TEXT_CLASSIFICATION: (classify.prepare, GENERATION, f"for text generation, and {bundle} is a classifier"),
    }[opened.manifest.task]
    refuse_given(context, refused, why)
    run_in = prepare(opened, options)
    with open_session(opened, provider=provider, kernel=kernel, threads=threads, adapter=adapter) as session:
        run_in(session)
