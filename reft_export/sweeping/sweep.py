"""``reft-export sweep``: many short trainings of one base on one data set, each of another form, and the best of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_export.base.load import Base
from reft_export.console import count
from reft_export.sweeping.costs import parameters_of, steering_cost
from reft_export.sweeping.first_pass import FirstPass, candidates, proposals
from reft_export.sweeping.folder import BEST, STUDY_FILE, TRIALS, check_folder, claim, open_folder, trial_folder, waiting_claim
from reft_export.sweeping.judgement import judged
from reft_export.sweeping.outcome import SweepResult
from reft_export.sweeping.prepared import Prepared, prepare_sweep
from reft_export.sweeping.report import write_report
from reft_export.sweeping.results import TrialResult, front, ranked
from reft_export.sweeping.settings import Point, Space, SweepSettings
from reft_export.sweeping.study import FAILED, Study, check_storage, point_of, storage_errors
from reft_export.training.checkpoints import StepRecord, discard, working_folder
from reft_export.training.endings import TrainingInterrupted
from reft_export.training.footprint import steps_of
from reft_export.training.objective import Phase
from reft_export.training.preparation import Preparation
from reft_export.training.sources import Data
from reft_export.training.trainer import frozen, train
from runtimes.edits.adapter import Adapter, load_adapter, save_adapter
from runtimes.errors import InputError, ReftError
from runtimes.files.claims import remove
from runtimes.files.folders import disk_is_full
from runtimes.files.records import from_json, to_json


def sweep(
    base: Base | PreTrainedModel,
    data: Data,
    settings: SweepSettings,
    output: Path,
    *,
    eval_data: Data | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trained_on: str | None = None,
    storage: str | None = None,
    report: Phase = lambda _: None,
) -> SweepResult:
    """Searches layers, ranks, positions, methods and learning rates by short trainings, and leaves the best adapter in ``output/best``.

    ``base``: a decoder from ``load_base``, or a transformers model in memory, which comes with its ``tokenizer``. ``data``,
    ``eval_data``: as ``train`` takes them; the held-out examples decide. ``trained_on``: digest of the bundle whose weights the base
    carries. ``storage``: URL of a database for optuna; by default ``output/study.db``.

    First the layers are looked at without training (reft_export/sweeping/first_pass.py), and what they propose is tried first; then
    optuna's TPE sampler chooses. A trial that is worse than the median at the same step is ended early. The study is of one objective,
    the quality, as pruning needs; parameters and steering cost follow from a trial's form, and with them the front of ``SweepResult``.

    The same call again goes on where it was, killed or not, and one worker at a time ends with the same trials; several calls at once, in
    processes of their own with one ``output``, share the trials. ``settings.trials`` may be raised.

    Raises InputError for settings, data, outputs and storages that cannot be used, and for a study of another base, data or space;
    TrainingInterrupted on Ctrl-C; ReftError where no trial was complete.

    Example::

        base = load_base("base", require_tokenizer=True)
        settings = SweepSettings(ranks="1,4", trials=12, training=TrainSettings(eval_fraction=0.2, max_steps=40))
        result = sweep(base, Path("pirate.jsonl"), settings, Path("pirate-sweep"))
        print(result.best, result.front)
    """
    check_folder(output)
    if storage is not None:
        check_storage(storage)
    prepared = prepare_sweep(base, data, settings, output, eval_data=eval_data, tokenizer=tokenizer, trained_on=trained_on, report=report)
    return run_sweep(prepared, output, storage=storage, report=report)


def run_sweep(prepared: Prepared, output: Path, *, storage: str | None = None, report: Phase = lambda _: None) -> SweepResult:
    """``sweep`` after its checks."""
    run = _Sweep(prepared, output, storage, report)
    with storage_errors(run.url):
        run.work()
        return run.finish()


class _Sweep:
    """One worker's part of a sweep."""

    def __init__(self, prepared: Prepared, output: Path, storage: str | None, report: Phase) -> None:
        self.prepared, self.settings, self.output, self.report = prepared, prepared.settings, output.absolute(), report
        self.name = output.name if storage else "sweep"
        self.url = storage or f"sqlite:///{self.output / STUDY_FILE}"
        with waiting_claim(self.output, self._wait):
            identity = open_folder(self.output)
            steps = steps_of(prepared.ready.examples.training, self.settings.training)
            self.study = Study(self.url, self.name, maximized=self.settings.maximized, seed=self.settings.training.seed, steps=steps)
            if self.study.sweep is None and any((self.output / name).exists() for name in (TRIALS, BEST)):
                raise InputError(
                    f"{output} holds the trials of a study that is not in this storage; name its own, or choose another output"
                )
            kept = self.study.sweep or self._begin(identity)
            self.study.check(prepared.asked, f"{output}" if storage is None else f"study {self.name} of the storage")
            if kept["folder"] != identity:
                raise InputError(f"the study {self.name} of the storage belongs to another output than {output}; workers share one folder")
        self.first_pass = from_json(FirstPass, kept["first_pass"])
        self.space = from_json(Space, kept["space"])
        self.proposed = from_json(tuple[Point, ...], kept["proposed"])

    def _wait(self) -> None:
        count(self.report, "waiting for another worker of the sweep", 0, 1)

    def _begin(self, identity: str) -> Mapping[str, Any]:
        found = self.prepared.first_pass(self.report)
        space = candidates(self.settings.space, found)
        first = proposals(space, found, self.settings.trials)
        made = {"folder": identity, "asked": self.prepared.asked, "first_pass": found, "space": space, "proposed": first}
        kept = to_json(made)
        self.study.begin(kept)
        return kept

    def work(self) -> None:
        """Trains every trial that has not ended and that nobody else trains; those of workers that were killed meanwhile, too."""
        while any(self._worked(number) for number in range(1, self.settings.trials + 1)):
            pass

    def _worked(self, number: int) -> bool:
        if self.study.ended(number) is not None:
            return False
        with claim(trial_folder(self.output, number)) as mine:
            if not mine or self.study.ended(number) is not None:
                return False
            self._train(number)
            self._keep_front()
            return True

    def _train(self, number: int) -> None:
        trial, point = self.study.start(number, self.space, self._proposal(number))
        self.report(f"trial {number} of {self.settings.trials}: {point}")

        def evaluated(record: StepRecord) -> None:
            trial.report(self._quality(record), record.step)
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            quality = self._trained(point, trial_folder(self.output, number), evaluated)
        except optuna.TrialPruned:
            self.study.prune(trial)
        except BaseException as e:
            by_itself = isinstance(e, ReftError) and not isinstance(e, (InputError, TrainingInterrupted)) and not disk_is_full(e)
            self.study.fail(trial, str(e) if by_itself else "")
            if isinstance(e, (KeyboardInterrupt, TrainingInterrupted)):
                raise TrainingInterrupted(
                    f"stopped in trial {number} of {self.settings.trials}; the same command goes on with it"
                ) from None
            if not by_itself:
                raise
        else:
            self.study.end(trial, quality)
        finally:
            discard(working_folder(trial_folder(self.output, number)))

    def _trained(self, point: Point, folder: Path, evaluated: Callable[[StepRecord], None] | None = None) -> float:
        """Trains a point into ``folder``; the quality of what was kept."""
        result = train(
            self.prepared.base,
            self.prepared.data,
            point.applied(self.settings.training),
            folder,
            eval_data=self.prepared.eval_data,
            force=True,
            trained_on=self.prepared.trained_on,
            on_ready=self._check_unchanged,
            on_step=self._step,
            on_evaluation=evaluated,
        )
        return self._quality(result.kept)

    def _step(self, step: int, total: int, loss: float, eval_loss: float | None) -> None:
        held_out = "" if eval_loss is None else f", held out {eval_loss:.3f}"
        count(self.report, f"step {step}/{total}, loss {loss:.3f}{held_out}", step, total)

    def _check_unchanged(self, ready: Preparation) -> None:
        for name in ("data", "eval_data"):
            if ready.run.get(name) != self.prepared.asked.get(name):
                raise InputError(f"{name} has changed since the sweep began; its trials would be of different data: put it back")

    def _quality(self, record: StepRecord) -> float:
        value = record.metric if self.settings.maximized else record.eval_loss
        assert value is not None, "a step that is evaluated has both"
        return value

    def _proposal(self, number: int) -> Point | None:
        return self.proposed[number - 1] if number <= len(self.proposed) else None

    def results(self) -> list[TrialResult]:
        found = []
        for number in range(1, self.settings.trials + 1):
            ended = self.study.ended(number)
            if ended is None:
                continue
            point, info, training = point_of(ended), self.prepared.base.info, self.settings.training
            form = (point, training, info.hidden_size, info.num_hidden_layers)
            state = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned"}.get(ended.state, "failed")
            found.append(
                TrialResult(
                    number=number,
                    point=point,
                    ended=state,  # pyright: ignore[reportArgumentType]
                    quality=ended.value,
                    parameters=parameters_of(*form),
                    cost=steering_cost(*form, self.prepared.edited[point.positions]),
                    proposed=self._proposal(number) is not None,
                    said=ended.user_attrs.get(FAILED, ""),
                )
            )
        return found

    def _keep_front(self) -> None:
        """Removes the adapters of trials that another beats: none of them comes back."""
        trials = self.results()
        kept = {each.number for each in front(trials, maximized=self.settings.maximized)}
        for each in trials:
            if each.number not in kept:
                remove(trial_folder(self.output, each.number))

    def finish(self) -> SweepResult:
        """The report and the best adapter in their places, unless other workers are not done."""
        trials = self.results()
        maximized, left = self.settings.maximized, self.settings.trials - len(trials)
        order = ranked(trials, maximized=maximized)
        result = SweepResult(
            trials=tuple(trials),
            front=tuple(front(trials, maximized=maximized)),
            best=order[0] if order else None,
            first_pass=self.first_pass,
            space=self.space,
            judgement=judged(self.first_pass, trials, self.space.layers, maximized=maximized),
            left=left,
            importances=self.study.importances(),
        )
        if left:
            return result
        if result.best is None:
            said = next((each.said for each in trials if each.said), "all were pruned")
            raise ReftError(f"none of {len(trials)} trials was complete; the first said: {said}")
        with waiting_claim(self.output, self._wait):
            adapter = self._placed(result.best)
            ready = self.prepared.ready
            with frozen(ready.base.model):
                before, after = (ready.objective.samples(ready.examples, self.report, each) for each in (None, adapter))
            result = replace(result, samples_before=before, samples_after=after)
            write_report(result, self.prepared, self.output)
        return result

    def _placed(self, best: TrialResult) -> Adapter:
        """The best adapter, in its place."""
        folder, place = trial_folder(self.output, best.number), self.output / BEST
        if not folder.is_dir():  # somebody removed it: the same point gives the same adapter
            self._trained(best.point, folder)
        adapter = load_adapter(folder)
        if not place.is_dir() or load_adapter(place).digest != adapter.digest:
            save_adapter(adapter, place, force=True)
        return adapter
