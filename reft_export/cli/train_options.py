"""The options of ``reft-export train``, in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from reft_export.cli.options import AcceptBase, text_or_file
from reft_export.cli.placement import Device, Dtype


@dataclass(frozen=True, kw_only=True)
class Form:
    """What an adapter is. With --start it is the started one's."""

    method: Annotated[str, typer.Option("--method", help="loreft, noreft, direft, consreft, lobireft; red: scale and bias.")] = "loreft"
    rank: Annotated[int, typer.Option("--rank", help="Rank of the edit; red has none.")] = 4
    subspaces: Annotated[
        str, typer.Option("--subspaces", help="Parts of the rank, pirate:4;polite:4: each line names the subspace that edits it.")
    ] = ""
    layers: Annotated[str, typer.Option("--layers", help="all, 8-16, 3;9;18.")] = "all"
    streams: Annotated[str, typer.Option("--stream", help="block_output, block_input, attention_output, mlp_output; several with ;.")] = (
        "block_output"
    )
    positions: Annotated[
        str,
        typer.Option(
            "--positions",
            help="f7+l7: first 7 and last 7 prompt tokens; f3; l1; prompt: all of it; all: decode too; 1,3,-2 by number; every3; "
            "marked: between [[ and ]].",
        ),
    ] = "f7+l7"
    tied: Annotated[bool, typer.Option("--tied/--untied", help="One edit for prefix and suffix positions, or one each.")] = True
    activation: Annotated[str, typer.Option("--activation", help="relu, gelu, gelu_tanh, silu, tanh, sigmoid; default none.")] = ""
    dropout: Annotated[float, typer.Option("--dropout", help="On the edit, while training.")] = 0.0


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Edits that differ from layer to layer, in place of --method, --rank, --layers, --stream and --activation."""

    edit: Annotated[
        list[str] | None,
        typer.Option(
            "--edit",
            help='The edit of some layers, "LAYERS: METHOD", and behind it where wanted rN, activation, positions and stream, as in "4-10: '
            'loreft r4" or "18: red all". Repeat for others; in place of --method, --rank, --layers, --stream and --activation.',
        ),
    ] = None
    recipe: Annotated[Path | None, typer.Option("--recipe", help="A YAML or JSON file of such edits.")] = None


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How its parameters move, but for how fast."""

    init: Annotated[str, typer.Option("--init", help="pyreft: its random values; identity: nothing is edited at first.")] = "pyreft"
    schedule: Annotated[str, typer.Option("--schedule", help="linear, cosine or constant, after the warm-up.")] = "linear"
    warmup: Annotated[float, typer.Option("--warmup", help="Share of the steps over which the rate rises.")] = 0.1
    epochs: Annotated[int, typer.Option("--epochs", help="Passes over the data.")] = 6
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Optimizer steps, in place of epochs.")] = None
    batch_size: Annotated[int, typer.Option("--batch-size", help="Examples a batch.")] = 8
    gradient_accumulation: Annotated[int, typer.Option("--gradient-accumulation", help="Batches an optimizer step.")] = 1
    weight_decay: Annotated[float, typer.Option("--weight-decay", help="AdamW's; R stays orthonormal whatever it is.")] = 0.0


@dataclass(frozen=True, kw_only=True)
class Optimization(Steps):
    """How its parameters move."""

    lr: Annotated[float, typer.Option("--lr", help="Learning rate.")] = 9e-4


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What a decoder is trained for."""

    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            help="sft: completions; dpo, orpo: pairs, of lines with chosen and rejected answers to a prompt; interchange: the rotation of "
            "distributed alignment search, of lines with prompt, source and completion. Its --method is consreft, its --positions l1 "
            "unless given.",
        ),
    ] = "sft"
    beta: Annotated[float, typer.Option("--beta", help="Of dpo, the tie to the base; of orpo, the weight of the odds ratio.")] = 0.1
    distill_system: Annotated[
        str | None,
        typer.Option(
            "--distill-system",
            help="A system prompt, or a file of one: learn what the base says with it, without it. Lines without an answer are answered "
            "by the base first.",
        ),
    ] = None
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Of such an answer.")] = 256
    kl_weight: Annotated[
        float, typer.Option("--kl-weight", help="Of KL(base || steered) at the completions' tokens, added to the loss: stay near the base.")
    ] = 0.0

    def settings(self) -> dict[str, Any]:
        """Those of TrainSettings, with the file's content. Raises InputError for a file that is none."""
        return {
            **vars(self),
            "distill_system": "" if self.distill_system is None else text_or_file(self.distill_system, "--distill-system"),
        }


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What is made of the data."""

    eval_fraction: Annotated[float, typer.Option("--eval-fraction", help="Share of the examples held out.")] = 0.0
    metric: Annotated[
        str,
        typer.Option(
            "--metric",
            help="Of held-out examples, beside their loss: accuracy, exact-match, or FILE.py:FUNCTION, which is run and says of an answer "
            "and its line whether it is right.",
        ),
    ] = "loss"
    keep: Annotated[
        str,
        typer.Option("--keep", help="The adapter that is saved: best, by --metric on the held-out examples where there are any; or last."),
    ] = "best"
    patience: Annotated[int | None, typer.Option("--patience", help="End after so many evaluations without a better one.")] = None
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens per example; default: the base's context.")] = None
    chat_template: Annotated[str, typer.Option("--chat-template", help="For prompt/completion lines: auto, always, never.")] = "auto"
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="Of a decoder's lines: prompt-completion, messages, text, alpaca, sharegpt; auto: by their keys. A form that is named "
            "leaves other keys unread.",
        ),
    ] = "auto"
    train_on: Annotated[str, typer.Option("--train-on", help="Of a conversation's answers: last, or all.")] = "last"
    samples: Annotated[int, typer.Option("--samples", help="Prompts answered before and after.")] = 3
    probes: Annotated[
        int, typer.Option("--probes", help="Lines that the adapter carries, to be measured on: held-out ones, if any. 0 to 32.")
    ] = 32


@dataclass(frozen=True, kw_only=True)
class Computing:
    """Where and how a run is computed."""

    seed: Annotated[int, typer.Option("--seed")] = 42
    dtype: Dtype = "auto"
    device: Device = "auto"
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Batches of examples of like length: fewer pads, and another order.")
    ] = False
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute layers again in place of keeping them: less memory, more time.")
    ] = False
    cache_mb: Annotated[
        int, typer.Option("--cache-mb", help="MB for what is computed once: layers below the first edit, tokens before it; 0: none.")
    ] = 2048
    cache_dtype: Annotated[
        str, typer.Option("--cache-dtype", help="Of that: auto (the base's), float32, bfloat16, float16; a narrower one rounds.")
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class Run(Computing):
    """The run itself."""

    report_to: Annotated[
        str, typer.Option("--report-to", help="Figures as they come: none, tensorboard (to OUTPUT.tensorboard), wandb, mlflow.")
    ] = "none"
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of an interrupted run.")] = False


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What the run starts from, beside base and data."""

    eval_data: Annotated[Path | None, typer.Option("--eval-data", help="Held-out examples of their own, in place of --eval-fraction.")] = (
        None
    )
    base_bundle: Annotated[
        Path | None, typer.Option("--base", help="A quantized bundle of the base: train on the exact weights that it ships.")
    ] = None
    start: Annotated[
        Path | None, typer.Option("--start", help="An adapter to go on from, as of export's -a; the form of the edit is that adapter's.")
    ] = None
    head: Annotated[
        bool | None,
        typer.Option("--head/--no-head", help="Of a classifier: train its head with the edit, as the paper does. Default: --head."),
    ] = None
    orthogonal_to: Annotated[
        list[Path] | None,
        typer.Option(
            "--orthogonal-to",
            help="An adapter folder that the new adapter shall not interfere with: it writes nothing that this one writes or reads, and "
            "reads nothing that it writes. Repeat for several; NAME=FOLDER names one.",
        ),
    ] = None
    accept_base: AcceptBase = False
