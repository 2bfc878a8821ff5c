"""Evaluates a base, its adapters, bundles and engines on one file of held-out lines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from reft_export.evaluating.device_tokenizer import DeviceTokenizer
from reft_export.evaluating.evaluation import Evaluation, evaluation_of
from reft_export.evaluating.held_out import HeldOut, chat_template_of, check_asked, check_same_tokens, read_held_out
from reft_export.evaluating.held_out_texts import HeldOutTexts, check_same_texts, read_texts
from reft_export.evaluating.measure import Measured, measure, measure_texts
from reft_export.evaluating.settings import EvaluationSettings
from reft_export.evaluating.subjects import (
    EAGER,
    EagerClassifier,
    EagerSubject,
    SessionClassifier,
    SessionSubject,
    Subject,
    TextSubject,
    Who,
)
from runtimes.artifacts.artifact import Artifact
from runtimes.artifacts.golden_schema import BASE_GOLDEN
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION
from runtimes.edits.adapter import Adapter
from runtimes.edits.positions import Positions, needs_marks
from runtimes.errors import InputError
from runtimes.files.folders import name_of
from runtimes.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # a bundle alone is evaluated without torch
    from transformers import PreTrainedTokenizerBase

    from reft_export.base.load import Base
    from reft_export.eager.steering import Steering

Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """As of ``runtimes.open_session``."""

    provider: str | None = None
    kernel: str | None = None
    threads: int | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """What is evaluated, in this order: the base and its adapters in eager PyTorch, then every artifact's base and adapters."""

    base: Base | None
    adapters: Mapping[str, Adapter]
    artifacts: Mapping[str, Artifact]
    """By name."""

    def __post_init__(self) -> None:
        """Raises InputError for a table of nothing, for classifiers beside decoders, and for classifiers of other labels."""
        if self.base is None and not self.artifacts:
            raise InputError("there is nothing to evaluate; name a bundle, or a base with -m")
        (first, (task, labels)), *others = self._tasks.items()
        for name, (its, own) in others:
            if its != task:
                classifier, decoder = (first, name) if task == TEXT_CLASSIFICATION else (name, first)
                raise InputError(f"{classifier} is a classifier and {decoder} a decoder, which take other lines; evaluate them apart")
            if own != labels:
                raise InputError(f"{name} has the labels {', '.join(own)}, and {first} {', '.join(labels)}; evaluate them apart")

    @property
    def _tasks(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """(task, labels) by what a model is called in messages."""
        own = {} if self.base is None else {f"{self.base.info.name} in {EAGER} PyTorch": (self.base.task, self.base.info.labels)}
        return own | {name: (artifact.manifest.task, artifact.manifest.labels) for name, artifact in self.artifacts.items()}

    @property
    def classifies(self) -> bool:
        return any(task == TEXT_CLASSIFICATION for task, _ in self._tasks.values())

    @property
    def labels(self) -> tuple[str, ...]:
        """Of a classifier, in the order of its logits."""
        return next(iter(self._tasks.values()))[1]

    @property
    def context(self) -> int:
        """Of the shortest."""
        from reft_export.base.token_rules import context_of

        contexts = [artifact.limits.tokens for artifact in self.artifacts.values()]
        return min([*contexts, *([] if self.base is None else [context_of(self.base)])])

    def rows(self, asked: int) -> int:
        """Of a batch, that every artifact takes."""
        return min([asked, *(each.limits.rows for each in self.artifacts.values() if each.limits.rows is not None)])

    def positions(self) -> dict[str, Positions]:
        """Of every adapter, by what it is called in messages."""
        own: dict[str, Positions] = {f"adapter {name}": adapter.where for name, adapter in self.adapters.items()}
        stored = {
            f"{where}'s adapter {name}": artifact.adapter_record(name).where
            for where, artifact in self.artifacts.items()
            for name in artifact.adapter_names
        }
        return {**own, **stored}

    def training(self) -> dict[str, Mapping[str, object]]:
        """What every adapter records of its training, by what it is called in messages."""
        own = {f"adapter {name}": adapter.training for name, adapter in self.adapters.items()}
        stored = {
            f"{where}'s adapter {name}": artifact.adapter_record(name).training
            for where, artifact in self.artifacts.items()
            for name in artifact.adapter_names
        }
        return {**own, **stored}


def artifacts_by_name(artifacts: Sequence[tuple[Path, Artifact]]) -> dict[str, Artifact]:
    """By their folders' names; by their paths where two are called alike, or as eager PyTorch's row is."""
    names = [name_of(path) for path, _ in artifacts]
    keys = [str(path) if names.count(name) > 1 or name == EAGER else name for name, (path, _) in zip(names, artifacts, strict=True)]
    if twice := [key for at, key in enumerate(keys) if key in keys[:at]]:
        raise InputError(f"{twice[0]} is named twice; name each once")
    return {key: artifact for key, (_, artifact) in zip(keys, artifacts, strict=True)}


def evaluate(
    data: Sequence[Path],
    table: Table,
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    options: SessionOptions = SessionOptions(),
    report: Report = lambda _: None,
) -> Evaluation:
    """Every row of the table on the same tokens.

    Raises InputError for lines that cannot be asked, and where a tokenizer or a chat template reads them otherwise than the first one.
    """
    for who, where in table.positions().items():
        if needs_marks(where):
            raise InputError(f"{who} is at positions {where}, and marks are not read here; ask it with `reft-export run`, or leave it out")
    report("reading the data")
    held_out = read_for(data, table, settings)
    batch, context = table.rows(settings.batch_size), table.context

    def measured(subject: Subject | TextSubject) -> Measured:
        if isinstance(held_out, HeldOutTexts):
            assert isinstance(subject, EagerClassifier | SessionClassifier)
            return measure_texts(subject, held_out, batch_size=batch, report=report)
        assert isinstance(subject, EagerSubject | SessionSubject)
        return measure(subject, held_out, batch_size=batch, context=context, report=report)

    # One at a time: a subject is ready to run until the next one is asked for.
    return evaluation_of(held_out, [measured(each) for each in chain(_eager(table), _sessions(table, options))])


def read_for(data: Sequence[Path], table: Table, settings: EvaluationSettings) -> HeldOut | HeldOutTexts:
    """The lines as the first model of the table reads them, and every other does; InputError where one does not."""
    check_asked(data, settings, table.context)
    return _texts_for(data, table, settings) if table.classifies else _questions_for(data, table, settings)


def _texts_for(data: Sequence[Path], table: Table, settings: EvaluationSettings) -> HeldOutTexts:
    readers: dict[str, PreTrainedTokenizerBase | DeviceTokenizer] = {}
    if table.base is not None:
        from reft_export.training.objective import tokenizer_of

        readers[f"{table.base.info.name} in {EAGER} PyTorch"] = tokenizer_of(table.base)
    readers |= {name: DeviceTokenizer.of(artifact) for name, artifact in table.artifacts.items()}
    read = [
        (who, read_texts(data, reader, settings, who=who, labels=table.labels, context=table.context)) for who, reader in readers.items()
    ]
    first, texts = read[0]
    for who, others in read[1:]:
        check_same_texts(texts, first, others, who)
    return texts


def _questions_for(data: Sequence[Path], table: Table, settings: EvaluationSettings) -> HeldOut:
    template = chat_template_of(settings.chat_template, table.training())
    read: list[tuple[str, HeldOut]] = []

    def add(who: str, tokenizer: PreTrainedTokenizerBase | DeviceTokenizer, stop_tokens: Collection[int]) -> None:
        lines = read_held_out(data, tokenizer, settings, stop_tokens=stop_tokens, context=table.context, chat_template=template)
        read.append((who, lines))

    if table.base is not None:
        from reft_export.base.token_rules import stop_tokens
        from reft_export.training.objective import tokenizer_of

        add(f"{table.base.info.name} in {EAGER} PyTorch", tokenizer_of(table.base), stop_tokens(table.base))
    for name, artifact in table.artifacts.items():
        tokenizer = DeviceTokenizer.of(artifact)
        add(name, tokenizer, tokenizer.tokenizer.stop_token_ids)
    first, lines = read[0]
    for who, others in read[1:]:
        check_same_tokens(lines, first, others, who)
    return lines


def _eager(table: Table) -> Iterator[EagerSubject | EagerClassifier]:
    """Each while its edits, and its head, are on; the base first, under none."""
    base = table.base
    if base is None:
        return
    from reft_export.eager.steering import steer, steered

    def who(adapter: str | None) -> Who:
        return Who(artifact=EAGER, precision=base.dtype, adapter=adapter, model=base.info.fingerprint, exact=base.dtype == "float32")

    def subject(name: str | None, steering: Steering) -> EagerSubject | EagerClassifier:
        return EagerClassifier(who=who(name), base=base) if table.classifies else EagerSubject(who=who(name), base=base, steering=steering)

    with steer(base.model, {}, rule=None, tied=True) as steering:
        yield subject(None, steering)
    for name, adapter in table.adapters.items():
        with steered(base.model, adapter) as steering:
            yield subject(name, steering)


def _sessions(table: Table, options: SessionOptions) -> Iterator[SessionSubject | SessionClassifier]:
    """One session an artifact, the base first; of an engine that an adapter is frozen into, that alone."""
    from reft_export.evaluation.quantization_report import variant_name
    from runtimes.open import open_session

    for name, artifact in table.artifacts.items():
        tokenizer, manifest = Tokenizer.load(artifact.folder, artifact.manifest.model), artifact.manifest
        with open_session(artifact, provider=options.provider, kernel=options.kernel, threads=options.threads) as session:
            for adapter in _runnable(artifact):
                session.set_adapter(adapter)
                who = Who(
                    artifact=name,
                    precision=variant_name(artifact),
                    adapter=adapter,
                    model=manifest.model.fingerprint,
                    exact=manifest.precision == "fp32" and manifest.quantization is None,
                )
                if table.classifies:
                    yield SessionClassifier(who=who, session=session)
                else:
                    yield SessionSubject(who=who, session=session, tokenizer=tokenizer)


def _runnable(artifact: Artifact) -> tuple[str | None, ...]:
    if artifact.frozen is not None:
        return (None if artifact.frozen == BASE_GOLDEN else artifact.frozen,)
    return (None, *artifact.adapter_names)
