"""What a device does differently by task: one row for each task that a manifest can store.

The session, the golden arrays, what is left of the steering, the bench, and the first steps of a graph that was just written depend on
whether tokens are generated or texts classified. Each row imports its own side of that when it is asked: a session needs no parity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from runtimes.artifacts.artifact import Artifact
from runtimes.artifacts.bundle import Bundle
from runtimes.artifacts.task_names import TEXT_CLASSIFICATION, TEXT_GENERATION
from runtimes.session import Session, as_classifier, as_decoder

if TYPE_CHECKING:
    from runtimes.bench import BenchResult, BenchSettings, ClassifierBench
    from runtimes.ort.classifier import OrtClassifier
    from runtimes.ort.session import OrtSession
    from runtimes.parity.figures import Budget, Delta, Figures, Rung
    from runtimes.parity.retention import Quality

OnRun = Callable[[int, int], None]


class Task(ABC):
    own_inputs: frozenset[str]
    """What its sessions feed a graph besides tokens, mask and slots."""
    not_in_bench: tuple[str, ...]
    """The fields of BenchSettings that mean nothing for it."""

    @abstractmethod
    def ort_session(self) -> type[OrtSession] | type[OrtClassifier]:
        """The session of its bundles."""

    @abstractmethod
    def check_golden(self, artifact: Artifact, session: Session, name: str, budget: Budget, *, steering: bool) -> list[Rung]:
        """All rungs of the base or of one adapter; with ``steering`` the first one also takes that, of an adapter."""

    @abstractmethod
    def quality(self, artifact: Artifact, session: Session, name: str) -> Quality | None:
        """What quantization left of the base or of one adapter; None where nothing to measure it on was recorded. Leaves the session on
        ``name``."""

    @abstractmethod
    def steering_figures(self, artifact: Artifact, session: Session, name: str) -> tuple[Figures, Delta]:
        """What ``runtimes.golden.steering_figures`` says."""

    @abstractmethod
    def bench(
        self, artifact: Artifact, sessions: Callable[[], Session], wanted: BenchSettings, on_run: OnRun
    ) -> BenchResult | ClassifierBench:
        """Base and adapters in turn, in the one session that ``sessions`` opens; ``on_run(done, total)`` reports progress."""

    @abstractmethod
    def take_steps(self, bundle: Bundle, session: Session) -> None:
        """The steps of ``runtimes.first_steps``; raises GraphError for answers that are none."""


class Generation(Task):
    """Tokens, and a KV cache, to the logits of the next token."""

    own_inputs = frozenset({"position_ids"})
    not_in_bench = ()

    def ort_session(self) -> type[OrtSession]:
        from runtimes.ort.session import OrtSession

        return OrtSession

    def check_golden(self, artifact: Artifact, session: Session, name: str, budget: Budget, *, steering: bool) -> list[Rung]:
        from runtimes.tasks.generation import DecoderGolden, check_decoder

        return check_decoder(as_decoder(session), DecoderGolden.read(artifact, name, steering=steering), budget)

    def quality(self, artifact: Artifact, session: Session, name: str) -> Quality | None:
        from runtimes.tasks.generation import DecoderGolden, decoder_quality

        return decoder_quality(as_decoder(session), DecoderGolden.read(artifact, name))

    def steering_figures(self, artifact: Artifact, session: Session, name: str) -> tuple[Figures, Delta]:
        from runtimes.tasks.generation import DecoderGolden, decoder_figures

        return decoder_figures(as_decoder(session), DecoderGolden.read(artifact, name))

    def bench(self, artifact: Artifact, sessions: Callable[[], Session], wanted: BenchSettings, on_run: OnRun) -> BenchResult:
        from runtimes.bench import BASE, bench, fitting_tokens

        given, frozen = wanted.prompt_tokens, artifact.frozen
        return bench(
            sessions,
            prompt_tokens=fitting_tokens(artifact.limits, wanted.new_tokens) if given is None else given,
            new_tokens=wanted.new_tokens,
            repeats=wanted.repeats,
            adapters=wanted.adapters if frozen is None or wanted.adapters else [],
            base=frozen or BASE,  # a frozen adapter is all that its engine runs
            on_run=on_run,
        )

    def take_steps(self, bundle: Bundle, session: Session) -> None:
        from runtimes.tasks.first_steps import decoder_steps

        decoder_steps(bundle, as_decoder(session))


class Classification(Task):
    """A text, or a pair of texts, to the logits of its labels."""

    own_inputs = frozenset({"token_type_ids"})
    not_in_bench = ("new_tokens",)

    def ort_session(self) -> type[OrtClassifier]:
        from runtimes.ort.classifier import OrtClassifier

        return OrtClassifier

    def check_golden(self, artifact: Artifact, session: Session, name: str, budget: Budget, *, steering: bool) -> list[Rung]:
        from runtimes.tasks.classification import ClassifierGolden, check_classifier

        return check_classifier(as_classifier(session), ClassifierGolden.read(artifact, name, steering=steering), budget)

    def quality(self, artifact: Artifact, session: Session, name: str) -> Quality | None:
        from runtimes.tasks.classification import ClassifierGolden, classifier_quality

        return classifier_quality(as_classifier(session), ClassifierGolden.read(artifact, name))

    def steering_figures(self, artifact: Artifact, session: Session, name: str) -> tuple[Figures, Delta]:
        from runtimes.tasks.classification import ClassifierGolden, classifier_figures

        return classifier_figures(as_classifier(session), ClassifierGolden.read(artifact, name))

    def bench(self, artifact: Artifact, sessions: Callable[[], Session], wanted: BenchSettings, on_run: OnRun) -> ClassifierBench:
        from runtimes.bench import bench_classifier, fitting_tokens

        tokens = fitting_tokens(artifact.limits, 0) if wanted.prompt_tokens is None else wanted.prompt_tokens
        return bench_classifier(sessions, tokens=tokens, repeats=wanted.repeats, adapters=wanted.adapters, on_run=on_run)

    def take_steps(self, bundle: Bundle, session: Session) -> None:
        from runtimes.tasks.first_steps import classifier_steps

        classifier_steps(bundle, as_classifier(session))


TASKS: dict[str, Task] = {TEXT_GENERATION: Generation(), TEXT_CLASSIFICATION: Classification()}
"""By the name that a manifest stores."""


def task_of(artifact: Artifact) -> Task:
    return TASKS[artifact.manifest.task]
