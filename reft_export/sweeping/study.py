"""The study: optuna's storage of the trials, whose it is, and how a trial begins and ends there.

A trial of the sweep is a number from 1 to its count of trials. It is done when one of optuna's trials that carries this number is complete
or pruned, or failed by itself; optuna's own numbers grow with every attempt. So a number that a killed worker left is begun again with the
parameters that it had, and everything after it goes on as if nothing had happened: the sampler is seeded by the number, and sees what
ended before it.
"""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.pruners import MedianPruner
from optuna.samplers import PartialFixedSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from reft_export.sweeping.settings import Point, Space
from reft_export.training.settings import differing
from runtimes.edits.methods import METHODS
from runtimes.errors import BackendUnavailable, InputError

SWEEP, NUMBER, FAILED = "sweep", "number", "failed"
"""User attributes: of the study what it is of; of a trial its number, and why it failed by itself."""
RANDOM_TRIALS = 8
"""Before the sampler learns from those that ended."""
UNPRUNED_TRIALS = 5
"""Complete ones, before a trial is ended early: the first are proposals, and a median of those would end all that is not one."""
UNPRUNED_SHARE = 0.3
"""Of a trial's steps, before which it is not ended: the learning rate still rises."""
LEAST_FOR_IMPORTANCES = 8
"""Complete trials: shares of fewer are noise."""
ANSWER_SECONDS, LOCKED_SECONDS = 10, 60
PORTS = {"postgresql": 5432, "mysql": 3306, "mariadb": 3306}

optuna.logging.set_verbosity(optuna.logging.WARNING)


@contextmanager
def storage_errors(url: str, *more: type[Exception]) -> Iterator[None]:
    """What a database, or ``more``, raises inside becomes one line that names it, without its password."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, *more) as e:
        said, shown = " ".join(str(e).split())[:200], _shown(url)
        raise InputError(f"storage {shown} does not answer as a database for optuna: {said}; check the URL, or leave it out") from None


def _options(url: str) -> dict[str, Any]:
    """What to connect with, where the host answers."""
    parsed = make_url(url)
    if parsed.host:  # drivers wait minutes for a host that says nothing
        port = parsed.port or PORTS.get(parsed.get_backend_name(), 0)
        socket.create_connection((parsed.host, port), timeout=ANSWER_SECONDS).close()
    return {"connect_args": {"timeout": LOCKED_SECONDS}} if parsed.get_backend_name() == "sqlite" else {}


def check_storage(url: str) -> None:
    """Before anything is loaded or written. Raises InputError for a storage that does not answer, BackendUnavailable without its driver."""
    with storage_errors(url, OSError):
        try:
            create_engine(url, **_options(url)).connect().close()
        except ModuleNotFoundError as e:
            raise BackendUnavailable(f"storage {_shown(url)} needs the Python package {e.name}; pip install {e.name}") from None


def _shown(url: str) -> str:
    """Without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return repr(url)


class Study:
    """One sweep's trials. Raises InputError for a storage that does not answer."""

    def __init__(self, url: str, name: str, *, maximized: bool, seed: int, steps: int) -> None:
        self._seed = seed
        with storage_errors(url, OSError, RuntimeError):
            storage = RDBStorage(url, engine_kwargs=_options(url))
            direction = "maximize" if maximized else "minimize"
            pruner = MedianPruner(n_startup_trials=UNPRUNED_TRIALS, n_warmup_steps=int(UNPRUNED_SHARE * steps))
            self.study = optuna.create_study(storage=storage, study_name=name, direction=direction, pruner=pruner, load_if_exists=True)

    @property
    def sweep(self) -> Mapping[str, Any] | None:
        """What the study is of; None of a new one."""
        return self.study.user_attrs.get(SWEEP)

    def begin(self, sweep: Mapping[str, Any]) -> None:
        self.study.set_user_attr(SWEEP, dict(sweep))

    def check(self, asked: Mapping[str, Any], where: str) -> None:
        """Raises InputError where the study is of another base, data, space or training than ``asked``."""
        kept = dict((self.sweep or {}).get("asked", {}))
        if changes := differing(_flat(asked), _flat(kept)):
            raise InputError(
                f"{where} is of another sweep ({'; '.join(changes[:3])}{'; ..' if changes[3:] else ''}); "
                "repeat its command, or choose another output"
            )

    def attempts(self, number: int | None = None) -> list[FrozenTrial]:
        """Optuna's trials of a number, or of all, in their order."""
        found = [each for each in self.study.get_trials(deepcopy=False) if NUMBER in each.user_attrs]
        return found if number is None else [each for each in found if each.user_attrs[NUMBER] == number]

    def ended(self, number: int) -> FrozenTrial | None:
        """How the trial ended by itself; None where it has not yet."""
        return next((each for each in self.attempts(number) if has_ended(each)), None)

    def start(self, number: int, space: Space, proposed: Point | None) -> tuple[optuna.Trial, Point]:
        """Begins a number that the caller has claimed; attempts that are still running are those of dead workers, and failed from then on.

        Its choices are those of the last attempt, else what was proposed, else the sampler's.
        """
        fixed = {} if proposed is None else {name: value for name, value in asdict(proposed).items() if (name, value) != ("rank", 0)}
        for attempt in self.attempts(number):
            fixed |= attempt.params
            if attempt.state == TrialState.RUNNING:
                self.study.tell(attempt.number, state=TrialState.FAIL)
        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            self.study.sampler = PartialFixedSampler(fixed, TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS))
        trial = self.study.ask()
        trial.set_user_attr(NUMBER, number)
        return trial, suggested(trial, space)

    def importances(self) -> dict[str, float]:
        """Of the choices for the quality, summing to 1, by PED-ANOVA, which needs no other package. Empty of few trials."""
        if len(self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < LEAST_FOR_IMPORTANCES:
            return {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return optuna.importance.get_param_importances(self.study, evaluator=PedAnovaImportanceEvaluator())
        except (ValueError, RuntimeError):  # all are alike
            return {}

    def end(self, trial: optuna.Trial, quality: float) -> None:
        self.study.tell(trial, quality)

    def prune(self, trial: optuna.Trial) -> None:
        self.study.tell(trial, state=TrialState.PRUNED)

    def fail(self, trial: optuna.Trial, said: str = "") -> None:
        """``said``: why it failed by itself; without it the number is begun again."""
        if said:
            trial.set_user_attr(FAILED, said)
        self.study.tell(trial, state=TrialState.FAIL)


def has_ended(trial: FrozenTrial) -> bool:
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) or (trial.state == TrialState.FAIL and FAILED in trial.user_attrs)


def suggested(trial: optuna.Trial, space: Space) -> Point:
    """A point of the space, as the study's sampler chooses it."""
    method = trial.suggest_categorical("method", space.methods)
    layers = trial.suggest_categorical("layers", space.layers)
    rank = 0 if METHODS[method].full_rank else trial.suggest_categorical("rank", space.ranks)
    positions = trial.suggest_categorical("positions", space.positions)
    lr = trial.suggest_float("lr", *space.rates, log=True) if space.log else trial.suggest_categorical("lr", space.rates)
    return Point(method=method, layers=layers, rank=rank, positions=positions, lr=lr)


def point_of(trial: FrozenTrial) -> Point:
    return Point(**{"rank": 0, **trial.params})


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"training": {"seed": 1}}`` as ``{"training.seed": 1}``."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
