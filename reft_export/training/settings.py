"""What one training run is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from reft_export.training.edits import LayerEdits, edits_of_forms, forms_of_edits, parse_layers, parse_streams, rules_of_edits
from reft_export.training.forms import AUTO, FORMS
from reft_export.training.rendering import TRAIN_ON
from runtimes.edits.adapter import Adapter
from runtimes.edits.edit import ACTIVATIONS, STREAMS, Site
from runtimes.edits.form import EditForm, one_form
from runtimes.edits.methods import METHODS, activated_methods
from runtimes.edits.positions import PositionRule
from runtimes.edits.probes import MOST
from runtimes.errors import InputError

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""Learning-rate schedules after the warm-up, as transformers calls them."""

SEEDS = 2**32
"""Of numpy's generator, which transformers seeds too."""

NOT_COMPARED = ("resume", "device", "samples", "probes", "keep", "report_to")
"""Settings that do not decide how the parameters move."""
OF_EDITS = ("method", "rank", "layers", "streams", "activation")
"""Settings that ``edits`` are in place of."""
CHAT_TEMPLATE = ("auto", "always", "never")
KEEP = ("best", "last")
INITS = ("pyreft", "identity")
LOSS, ACCURACY, EXACT_MATCH = METRICS = ("loss", "accuracy", "exact-match")
"""What held-out examples are measured by; or a function of the user's, as ``file.py:function``."""


SUBSPACES = "subspaces"
"""The key of an adapter's training record: [first row, the one behind the last] by name."""

SFT, DPO, ORPO, INTERCHANGE = OBJECTIVES = ("sft", "dpo", "orpo", "interchange")
"""What a decoder is trained by: completions, pairs of a chosen and a rejected one, or interchanges of a prompt with a source."""
ROTATION = "consreft"
"""The method that an interchange trains the R of, and whose s a source gives."""

NO_REPORT, *_ = REPORTS = ("none", "tensorboard", "wandb", "mlflow")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A training run, by default as in the ReFT paper where it says so. Raises InputError for values out of range."""

    method: str = "loreft"
    rank: int = 4
    """Of the low-rank methods. RED has none, and 0 whatever is given."""
    layers: str = "all"
    """``all``, or layers and inclusive ranges separated by ``;`` or ``,``: ``8-16``, ``3;9;18``, ``0-3;8``."""
    streams: str = "block_output"
    """One or several of runtimes.edits.edit.STREAMS, separated by ``;`` or ``,``; every layer is edited at each of them."""
    positions: str = "f7+l7"
    tied: bool = True
    """One intervention for prefix and suffix positions, or one for each."""
    activation: str = ""
    dropout: float = 0.0
    edits: tuple[LayerEdits, ...] = ()
    """Edits that differ from layer to layer, in place of method, rank, layers, streams and activation."""
    subspaces: str = ""
    """Parts of the rank, ``name:rank`` each, separated by ``;``: an example names one, and is edited by its rows alone. ``rank`` is the sum
    of theirs."""
    init: str = "pyreft"
    """Where the parameters start: pyreft's random values, or identity, which edits nothing: the first step is the base."""

    lr: float = 9e-4
    schedule: str = "linear"
    warmup: float = 0.1
    """Share of all steps over which the learning rate rises from 0."""
    epochs: int = 6
    max_steps: int | None = None
    """Optimiser steps, in place of epochs."""
    batch_size: int = 8
    gradient_accumulation: int = 1
    """Batches per optimiser step; every completion token of the step has the same weight, whatever its batch."""
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    group_by_length: bool = False
    """Batches of examples of like length, which pads less; drawn by the seed, others than without."""
    gradient_checkpointing: bool = False
    """Each layer is computed again in the backward pass in place of being kept: less memory, a longer step."""

    objective: str = SFT
    """Of a decoder: sft, completions; dpo or orpo, pairs of a chosen and a rejected one (reft_export/training/preference.py has the
    formulas); interchange, of consreft (reft_export/training/interchange.py)."""
    beta: float = 0.1
    """Of dpo, the strength of the tie to the base; of orpo, the weight of the odds ratio."""
    distill_system: str = ""
    """A system prompt: KL(base with it || steered base without it) is lowered, in place of the cross entropy of completions."""
    max_new_tokens: int = 256
    """Of an answer that the base with the system prompt gives to a line without one."""
    kl_weight: float = 0.0
    """Of KL(base || steered) at the completions' tokens, which is added to the loss."""

    eval_fraction: float = 0.0
    """Share of the examples held out of training; their loss is taken ten times per run."""
    metric: str = "loss"
    """Of held-out examples, beside their loss: accuracy, exact-match, or ``file.py:function`` (reft_export/training/questions.py)."""
    keep: str = "best"
    """Which step's parameters are saved: of those whose held-out loss was taken the one with the best metric, of equals the lowest loss;
    or the last. The last without held-out examples."""
    patience: int | None = None
    """End after so many evaluations without a better one; None: never before the last step."""
    max_length: int | None = None
    """Tokens per example, prompt and completion; None: the base's context."""
    chat_template: str = "auto"
    """Whether prompt/completion lines are rendered through the tokenizer's chat template; auto: where there is one."""
    format: str = "auto"
    """Of a decoder's lines (reft_export/training/forms.py); auto: every line's own, by its keys."""
    train_on: str = "last"
    """Which of a conversation's answers are trained: the last, or all of them."""
    samples: int = 3
    """Prompts that are answered before and after training; 0 for none."""
    probes: int = MOST
    """Lines of the data, held-out ones where there are any, that the adapter carries: what it is measured on from then on."""
    seed: int = 42
    dtype: str = "auto"
    """The base's: float32, bfloat16 or float16; auto: bfloat16 on CUDA, else float32."""
    device: str = "auto"
    cache_mb: int = 2048
    """Memory, in MB, for what the layers below the first edit put out, and all layers of tokens before it, from epoch to epoch; 0: none."""
    cache_dtype: str = "auto"
    """That memory's: auto, the base's; or float16, which holds twice as much and rounds it."""
    report_to: str = "none"
    """Where every step's loss and rate, and every evaluation, are sent as well: tensorboard, wandb or mlflow."""
    resume: bool = False
    """Go on from the last checkpoint of an interrupted run with the same settings, data and base."""

    def __post_init__(self) -> None:
        _one_of("method", self.method, tuple(METHODS))
        _one_of("schedule", self.schedule, tuple(SCHEDULES))
        _one_of("chat_template", self.chat_template, CHAT_TEMPLATE)
        _one_of("format", self.format, (AUTO, *FORMS))
        _one_of("train_on", self.train_on, TRAIN_ON)
        _one_of("keep", self.keep, KEEP)
        _one_of("report_to", self.report_to, REPORTS)
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _one_of("device", self.device, ("auto", "cpu", "cuda"))
        _one_of("cache_dtype", self.cache_dtype, ("auto", "float32", "bfloat16", "float16"))
        _one_of("activation", self.activation, ACTIVATIONS)
        if self.activation and not METHODS[self.method].activated:
            raise InputError(f"{self.method} has no place for an activation; methods that have: {', '.join(activated_methods())}")
        self._check_edits()
        self._check_subspaces()
        _one_of("init", self.init, INITS)
        if self.init == "identity":
            for edit in self.edits or (self,):
                _check_identity(edit.method, edit.activation)
        if METHODS[self.method].full_rank:
            object.__setattr__(self, "rank", 0)
        else:
            _in_range("rank", self.rank, 1)
        for name in ("epochs", "batch_size", "gradient_accumulation", "max_new_tokens"):
            _in_range(name, getattr(self, name), 1)
        if self.metric not in METRICS and ".py:" not in self.metric:
            raise InputError(f"metric {self.metric!r} is unknown; known: {', '.join(METRICS)}, or file.py:function")
        for name in ("max_steps", "max_length", "patience"):
            if getattr(self, name) is not None:
                _in_range(name, getattr(self, name), 1)
        if self.distill_system and not self.distill_system.strip():
            raise InputError("distill_system is empty; give the system prompt that is to be learned")
        for name in ("lr", "weight_decay", "max_gradient_norm", "samples", "cache_mb", "kl_weight", "beta"):
            _in_range(name, getattr(self, name), 0)
        _in_range("seed", self.seed, 0, below=SEEDS)
        _in_range("probes", self.probes, 0, below=MOST + 1)
        for name in ("dropout", "warmup", "eval_fraction"):
            _in_range(name, getattr(self, name), 0, below=1)
        _one_of("objective", self.objective, OBJECTIVES)
        if self.objective != SFT:
            _check_completions(self)
        if self.objective == INTERCHANGE:
            _check_interchange(self)
            object.__setattr__(self, "probes", 0)  # a line's answer needs its own source, which an adapter does not have
        said = [PositionRule.parse(text) for text in (self.positions, *self.all_positions)]
        if not self.tied and not any(rule.first and rule.last for rule in said[1:]):
            raise InputError(f"untied interventions need a prefix and a suffix (f<n>+l<n>); positions are {'; '.join(self.all_positions)}")
        parse_streams(self.streams)

    def _check_edits(self) -> None:
        """Raises InputError for what are no edits, and for edits beside what they are in place of."""
        object.__setattr__(self, "edits", tuple(self.edits))
        if strange := [each for each in self.edits if not isinstance(each, LayerEdits)]:
            raise InputError(f"edits has {strange[0]!r}, expected LayerEdits; LayerEdits.parse reads a text")
        given = [field.name for field in fields(self) if field.name in OF_EDITS and getattr(self, field.name) != field.default]
        if self.edits and given:
            raise InputError(f"{' and '.join(given)} beside edits, which say it each for themselves; leave one of the two out")

    def _check_subspaces(self) -> None:
        """Raises InputError for what are no subspaces, and for what goes without them; ``rank`` becomes the sum of theirs."""
        if not self.subspaces:
            return
        plain = {"edits": (), "tied": True, "metric": LOSS, "objective": SFT, "distill_system": ""}
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise InputError(f"{name} does not go with subspaces, of which every example is edited in one; leave one of the two out")
        if METHODS[self.method].full_rank:
            raise InputError(f"{self.method} is of full rank, and has no rows that subspaces could share out; use loreft")
        object.__setattr__(self, "rank", sum(map(len, self.subspace_rows.values())))
        object.__setattr__(self, "samples", 0)  # those of the whole edit, which no example has seen
        object.__setattr__(self, "probes", 0)

    @property
    def subspace_rows(self) -> dict[str, range]:
        """Of each subspace its rows of R, by name. Raises InputError."""
        found, start = dict[str, range](), 0
        for piece in filter(None, self.subspaces.split(";")):
            match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]{0,99}):([1-9]\d{0,4})", piece)
            if match is None or match[1] in found:
                why = "named twice" if match else "not understood"
                raise InputError(f"subspaces {self.subspaces!r}: {piece!r} is {why}; use different names and ranks, like pirate:4;polite:4")
            found[match[1]] = range(start, start := start + int(match[2]))
        return found

    @property
    def rule(self) -> PositionRule:
        return PositionRule.parse(self.positions)

    def forms(self, num_hidden_layers: int) -> dict[Site, EditForm]:
        """What is trained at every site."""
        if self.edits:
            return forms_of_edits(self.edits, num_hidden_layers)
        layers, streams = parse_layers(self.layers, num_hidden_layers), parse_streams(self.streams)
        sites = (Site(layer=layer, stream=stream) for layer in layers for stream in streams)
        return one_form(sites, method=self.method, rank=self.rank, activation=self.activation)

    def rules(self, num_hidden_layers: int) -> dict[Site, PositionRule]:
        """The positions of every site."""
        if self.edits:
            return rules_of_edits(self.edits, num_hidden_layers, self.rule)
        return dict.fromkeys(self.forms(num_hidden_layers), self.rule)

    @property
    def all_positions(self) -> tuple[str, ...]:
        """Of all edits, each once."""
        said = [self.positions if edit.positions is None else edit.positions for edit in self.edits]
        return tuple(dict.fromkeys(said or [self.positions]))

    @property
    def marks(self) -> bool:
        """Whether prompts mark the tokens that are edited."""
        return any(PositionRule.parse(text).marked for text in self.all_positions)

    def sites(self, num_hidden_layers: int) -> tuple[Site, ...]:
        return tuple(self.forms(num_hidden_layers))

    def described(self) -> str:
        """What is trained where, in words."""
        if self.edits:
            return "; ".join(map(str, self.edits))
        return f"{EditForm(method=self.method, rank=self.rank, activation=self.activation)}, layers {self.layers}"

    def placement(self) -> tuple[str, str]:
        """(dtype, device) to load the base with, ``auto`` decided for this machine."""
        import torch

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = self.dtype
        if dtype == "auto":
            dtype = "bfloat16" if device == "cuda" else "float32"
        return dtype, device

    def record(self) -> dict[str, Any]:
        """The settings that decide how the parameters move, as they are written into the adapter and compared on resume."""
        left_out = {*NOT_COMPARED, *(OF_EDITS if self.edits else ("edits",)), *(() if self.subspaces else ("subspaces",))}
        every = asdict(self) | {"edits": list(map(str, self.edits))}
        return {name: value for name, value in every.items() if name not in left_out}


def settings_like(adapter: Adapter, **changes: Any) -> TrainSettings:
    """Settings of a run that goes on with ``adapter``: of its form, with ``changes`` to anything."""
    layers = sorted({site.layer for site in adapter.sites})
    streams = [stream for stream in STREAMS if any(site.stream == stream for site in adapter.sites)]
    alike = not (adapter.forms or adapter.rules) and len(adapter.sites) == len(layers) * len(streams)
    form: dict[str, Any] = {"edits": edits_of_forms(adapter.site_forms, adapter.site_rules if adapter.rules else None)}
    if alike:
        form = {
            "method": adapter.method,
            "rank": adapter.rank,
            "layers": ";".join(map(str, layers)),
            "streams": ";".join(streams),
            "activation": adapter.activation,
        }
    data = adapter.training.get("data")
    plain = isinstance(data, Mapping) and data.get("chat_template") is False
    form |= {
        "positions": str(adapter.positions),
        "tied": adapter.tied,
        "dropout": adapter.dropout,
        "chat_template": "never" if plain else "auto",
    }
    return TrainSettings(**{**form, **changes})


def differing(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """``name: theirs, now mine`` for every entry in which two records differ."""
    names = sorted({*mine, *other})
    return [f"{n}: {other.get(n)!r}, now {mine.get(n)!r}" for n in names if mine.get(n) != other.get(n)]


def _check_completions(settings: TrainSettings) -> None:
    """Raises InputError for settings of completions that mean nothing of another objective."""
    plain = {"distill_system": "", "kl_weight": 0.0, "train_on": "last", "format": AUTO}
    what = "of prompts and their sources" if settings.objective == INTERCHANGE else "of pairs of them"
    for name, value in plain.items():
        if getattr(settings, name) != value:
            raise InputError(f"{name} is of completions, and objective {settings.objective} is {what}; leave one of the two out")


def _check_interchange(settings: TrainSettings) -> None:
    """Raises InputError for edits that read nothing of a source, and for positions that a source has no tokens at."""
    if other := [edit.method for edit in settings.edits or (settings,) if edit.method != ROTATION]:
        raise InputError(f"objective interchange trains the R of {ROTATION}, and method is {other[0]}; use method {ROTATION}")
    for text in settings.all_positions:
        if text in ("all", "marked"):
            why = "go on behind the prompt" if text == "all" else "are what a prompt marks"
            raise InputError(f"positions {text} {why}, and a source has no such tokens; use l1, or others of the prompt")


def _check_identity(method: str, activation: str) -> None:
    if METHODS[method].no_edit_start is None:
        known = ", ".join(name for name, each in METHODS.items() if each.no_edit_start is not None)
        raise InputError(f"init identity: {method} has no values that edit nothing and can be trained; methods that have: {known}")
    if activation and not METHODS[method].no_edit_activated:
        raise InputError(f"init identity: {method} with {activation} edits at any start, act(R h) being another than R h; leave one out")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name} {value!r} is unknown; known: {', '.join(filter(None, known))}")


def _in_range(name: str, value: float, least: float, *, below: float = float("inf")) -> None:
    if not least <= value < below:
        limit = f"at least {least}" + (f" and below {below}" if below != float("inf") else "")
        raise InputError(f"{name} is {value}; it must be {limit}")
