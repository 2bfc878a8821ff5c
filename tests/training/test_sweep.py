"""Sweeps of a tiny base: killed and resumed, shared by workers, refused; the first pass against finite differences; the front."""

from __future__ import annotations

import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from conftest import WIDTH

from reft_export.base.load import Base
from reft_export.eager.steering import steer
from reft_export.sweeping import study
from reft_export.sweeping.costs import edited_tokens, parameters_of, steering_cost
from reft_export.sweeping.first_pass import FirstPass, LayerFigures, candidates, proposals
from reft_export.sweeping.gains import STEP, _Sums, layer_gains
from reft_export.sweeping.judgement import judged, spearman
from reft_export.sweeping.outcome import SweepResult
from reft_export.sweeping.readability import answers_of, layer_accuracies, ridge_accuracy
from reft_export.sweeping.results import TrialResult, front, ranked
from reft_export.sweeping.settings import Point, SweepSettings
from reft_export.sweeping.study import Study, check_storage, has_ended, point_of, suggested
from reft_export.sweeping.sweep import _Sweep, sweep
from reft_export.training.data import collate, load_data
from reft_export.training.endings import TrainingInterrupted
from reft_export.training.settings import TrainSettings
from reft_export.training.trainer import train
from runtimes.edits.adapter import load_adapter
from runtimes.edits.edit import Site
from runtimes.edits.positions import PositionRule
from runtimes.errors import BackendUnavailable, InputError, ReftError

TRAINING = TrainSettings(eval_fraction=0.25, max_steps=10, batch_size=4, samples=1, probes=2, cache_mb=0)
SETTINGS = SweepSettings(ranks="1,2", positions="l1,prompt", learning_rates="1e-3..1e-1", trials=5, training=TRAINING)


def told(result: SweepResult) -> list[tuple[object, ...]]:
    return [(each.number, each.point, each.ended, each.quality) for each in result.trials]


def point(**changes: object) -> Point:
    return Point(**{"method": "loreft", "layers": "1", "rank": 1, "positions": "l1", "lr": 1e-3, **changes})


def in_a_fork(work: Callable[[], object]) -> int:
    """Its exit code, below zero the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(autouse=True)
def _sampled_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampler learns, and trials are pruned, within the few trials here."""
    monkeypatch.setattr(study, "RANDOM_TRIALS", 1)
    monkeypatch.setattr(study, "UNPRUNED_TRIALS", 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What is kept of the sweep that nobody interrupts, made by the first test that asks."""
    return {"folder": tmp_path_factory.mktemp("whole") / "sweep"}


@pytest.fixture
def uninterrupted(whole: dict[str, object], base: Base, data: Path) -> tuple[Path, SweepResult]:
    folder = whole["folder"]
    assert isinstance(folder, Path)
    if "result" not in whole:
        whole["result"] = sweep(base, data, SETTINGS, folder)
    return folder, whole["result"]  # pyright: ignore[reportReturnType]


# --- the sweep ------------------------------------------------------------------------------------


def test_a_sweep_leaves_the_best_adapter_and_its_report(uninterrupted: tuple[Path, SweepResult], base: Base, data: Path, tmp_path) -> None:
    folder, result = uninterrupted
    assert [each.number for each in result.trials] == [1, 2, 3, 4, 5] and result.left == 0
    assert "pruned" in {each.ended for each in result.trials}
    assert result.best == result.front[0] == ranked(result.trials, maximized=False)[0]
    settings = replace(result.best.point.applied(TRAINING), samples=0)
    alone = train(base, data, settings, tmp_path / "alone")
    assert load_adapter(folder / "best").digest == alone.adapter.digest
    assert result.best.quality == alone.kept.eval_loss
    assert result.best.parameters == sum(tensor.size for tensor in alone.adapter.tensors.values())
    kept = {path.name for path in (folder / "trials").iterdir() if not path.name.startswith(".")}
    assert kept == {f"trial-{each.number}" for each in result.front}
    record = json.loads((folder / "report.json").read_text())
    assert record["front"] == [each.number for each in result.front] and record["best"]["number"] == result.best.number
    page = (folder / "report.md").read_text()
    assert "## The front" in page and all((folder / name).is_file() for name in ("layers.png", "front.png", "first_pass.png"))
    assert not [path for path in folder.rglob("*") if path.name.endswith((".partial", ".checkpoints", ".writing"))]


@pytest.mark.slow
def test_killed_twice_it_ends_with_the_same_trials(uninterrupted: tuple[Path, SweepResult], base: Base, data: Path, tmp_path) -> None:
    """Once behind a trial's training and before its figures are told, once within a training."""
    _, want = uninterrupted
    folder, kill = tmp_path / "sweep", lambda: os.kill(os.getpid(), signal.SIGKILL)

    def before_the_end() -> None:
        end = Study.end
        Study.end = lambda self, trial, quality: kill() if trial.user_attrs["number"] == 2 else end(self, trial, quality)
        sweep(base, data, SETTINGS, folder)

    def within_a_training() -> None:
        quality, evaluations = _Sweep._quality, count()
        _Sweep._quality = lambda self, record: kill() if next(evaluations) == 17 else quality(self, record)
        sweep(base, data, SETTINGS, folder)

    assert [in_a_fork(before_the_end), in_a_fork(within_a_training)] == [-signal.SIGKILL] * 2
    assert not (folder / "report.json").exists()
    got = sweep(base, data, SETTINGS, folder)
    assert told(got) == told(want)
    assert load_adapter(folder / "best").digest == load_adapter(uninterrupted[0] / "best").digest
    attempts = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/study.db").get_trials()
    again = [(each.user_attrs["number"], each.params) for each in attempts if not has_ended(each)]
    assert len(again) == 2 and all(
        params == next(t.params for t in attempts if has_ended(t) and t.user_attrs["number"] == n) for n, params in again
    )


@pytest.mark.slow
def test_a_stop_begins_the_trial_again(uninterrupted: tuple[Path, SweepResult], base: Base, data: Path, tmp_path, monkeypatch) -> None:
    _, want = uninterrupted
    with monkeypatch.context() as patch:
        patch.setattr(_Sweep, "_step", lambda self, step, *_: (_ for _ in ()).throw(KeyboardInterrupt) if step == 5 else None)
        with pytest.raises(TrainingInterrupted, match="stopped in trial 1 of 2; the same command goes on"):
            sweep(base, data, replace(SETTINGS, trials=2), tmp_path / "sweep")
    more = sweep(base, data, replace(SETTINGS, trials=2), tmp_path / "sweep")
    assert more.trials[0].quality == want.trials[0].quality
    assert len(sweep(base, data, replace(SETTINGS, trials=3), tmp_path / "sweep").trials) == 3


@pytest.mark.slow
def test_workers_share_the_trials(base: Base, data: Path, tmp_path) -> None:
    folder = tmp_path / "sweep"
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            code = 70
            try:
                sweep(base, data, SETTINGS, folder)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    attempts = optuna.load_study(study_name="sweep", storage=f"sqlite:///{folder}/study.db").get_trials()
    assert sorted(each.user_attrs["number"] for each in attempts) == [1, 2, 3, 4, 5] and all(map(has_ended, attempts))
    assert json.loads((folder / "report.json").read_text())["left"] == 0


def test_a_folder_that_another_worker_makes_meanwhile_is_the_sweeps(tmp_path, monkeypatch) -> None:
    """Whatever is read first, and by a folder that is there, and empty, behind a link."""
    import reft_export.sweeping.folder as module

    checked = module.check_destination

    def meanwhile(output: Path, **given: object) -> None:
        output.mkdir()
        (output / "sweep.json").write_text('{"sweep": "theirs"}')
        checked(output, **given)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(module, "check_destination", meanwhile)
        module.check_folder(tmp_path / "sweep")
    assert module.open_folder(tmp_path / "sweep") == "theirs"

    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    identity = module.open_folder(tmp_path / "link")
    assert [each.name for each in (tmp_path / "empty").iterdir()] == ["sweep.json"] and identity == module.open_folder(tmp_path / "link")


def test_a_training_that_fails_by_itself_is_a_failed_trial(base: Base, data: Path, tmp_path, monkeypatch) -> None:
    import reft_export.sweeping.sweep as module

    def failing(*given: object, **options: object) -> object:
        raise ReftError("the loss is not finite")

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", failing)
        with pytest.raises(ReftError, match="none of 2 trials was complete; the first said: the loss is not finite"):
            sweep(base, data, replace(SETTINGS, trials=2), tmp_path / "sweep")
    result = sweep(base, data, replace(SETTINGS, trials=3), tmp_path / "sweep")
    assert [each.ended for each in result.trials] == ["failed", "failed", "complete"]


def test_what_is_another_sweeps_is_refused(uninterrupted: tuple[Path, SweepResult], base: Base, data: Path, tmp_path) -> None:
    folder, _ = uninterrupted
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("ok", "no"))
    with pytest.raises(InputError, match=r"is of another sweep \(data: '.*', now '.*'\); repeat its command"):
        sweep(base, other, SETTINGS, folder)
    with pytest.raises(InputError, match=r"another sweep \(ranks: '1,2', now '1,3'\)"):
        sweep(base, data, replace(SETTINGS, ranks="1,3"), folder)
    with pytest.raises(InputError, match=r"\(training.seed: 42, now 1\)"):
        sweep(base, data, replace(SETTINGS, training=replace(TRAINING, seed=1)), folder)
    twin = replace(base, info=replace(base.info, fingerprint="another"))
    with pytest.raises(InputError, match=r"another sweep \(base: "):
        sweep(twin, data, SETTINGS, folder)
    with pytest.raises(InputError, match="the study sweep of the storage belongs to another output"):
        sweep(base, data, SETTINGS, tmp_path / "sweep", storage=f"sqlite:///{folder}/study.db")
    with pytest.raises(InputError, match="holds the trials of a study that is not in this storage"):
        sweep(base, data, SETTINGS, folder, storage=f"sqlite:///{tmp_path}/empty.db")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="exists and is no sweep's folder; choose another output$"):
        sweep(base, data, SETTINGS, mine)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "storage 'nonsense' does not answer"),
        ("sqlite:////nowhere/at/all.db", "does not answer as a database for optuna"),
        ("postgresql://me:secret@127.0.0.1:1/x", r"storage postgresql://me:\*\*\*@127.0.0.1:1/x does not answer.*refused"),
    ],
)
def test_a_storage_that_does_not_answer_is_refused(url: str, said: str, base: Base, data: Path, tmp_path) -> None:
    with pytest.raises(InputError, match=said) as e:
        sweep(base, data, SETTINGS, tmp_path / "sweep", storage=url)
    assert not (tmp_path / "sweep").exists()
    assert "\n" not in str(e.value) and "secret" not in str(e.value)


def test_a_storage_without_its_driver_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="oracle:///x needs the Python package .*; pip install"):
        check_storage("oracle:///x")


def test_a_number_is_begun_again_with_its_parameters_whatever_ended_meanwhile(tmp_path) -> None:
    """As where one of several workers is killed: the others go on."""
    space = replace(SETTINGS.space, layers=("0", "1", "2", "all"))
    made = Study(f"sqlite:///{tmp_path}/s.db", "x", maximized=False, seed=1, steps=10)
    begun = {number: made.start(number, space, None) for number in (1, 2, 3)}
    made.end(begun[1][0], 0.5)
    made.end(begun[2][0], 0.1)
    again = Study(f"sqlite:///{tmp_path}/s.db", "x", maximized=False, seed=1, steps=10)
    assert again.start(3, space, point())[1] == begun[3][1] != again.start(4, space, None)[1]
    assert again.ended(3) is None and len(again.attempts(3)) == 2


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": "4,,5"}, "a candidate is empty"),
        ({"layers": "4,4"}, "given twice"),
        ({"layers": "auto,4"}, "stand alone"),
        ({"layers": "4+5"}, "layers '4\\+5' are not understood"),
        ({"ranks": "0"}, "rank '0' is not understood"),
        ({"methods": "lora"}, "method 'lora' is unknown"),
        ({"positions": "l1,x"}, "positions 'x' are not understood"),
        ({"learning_rates": "1e-2..1e-4"}, "runs backwards"),
        ({"learning_rates": "-1"}, "learning rate '-1'"),
        ({"trials": 0}, "trials is 0"),
    ],
)
def test_candidates_that_mean_nothing_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        SweepSettings(**changes)


def test_what_the_base_or_the_data_cannot_do_is_refused_before_anything_is_trained(base: Base, data: Path, tmp_path, monkeypatch) -> None:
    for changes, said in (
        ({"layers": "0,7"}, "layer 7 does not exist"),
        ({"ranks": "33"}, "rank 33 does not fit this base"),
        ({"training": replace(TRAINING, eval_fraction=0.0)}, "told apart by held-out examples"),
    ):
        with pytest.raises(InputError, match=said):
            sweep(base, data, replace(SETTINGS, **changes), tmp_path / "sweep")
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="one process trains a trial, and this is one of 2"):
        sweep(base, data, SETTINGS, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_costs_are_those_of_the_form(base: Base, data: Path) -> None:
    examples = load_data(data, base.tokenizer, max_length=256).examples
    assert edited_tokens("l1", examples) == 1 and edited_tokens("all", examples) == np.mean([len(each.input_ids) for each in examples])
    assert parameters_of(point(rank=2, layers="0;1"), TRAINING, 32, 3) == 2 * (2 * 2 * 32 + 2)
    assert parameters_of(point(method="red", rank=0), TRAINING, 32, 3) == 64
    assert steering_cost(point(rank=2, layers="all"), TRAINING, 32, 3, 1.5) == 1.5 * 3 * 2 * 2 * 32
    assert steering_cost(point(method="red", rank=0), TRAINING, 32, 3, 1.0) == 32


# --- the first pass -------------------------------------------------------------------------------


def test_gains_are_the_slopes_of_the_loss(base: Base, data: Path) -> None:
    """Of one line in every fold, whose direction is then its own gradient: by central differences, a channel at a time, in float64."""
    example = load_data(data, base.tokenizer, max_length=256).examples[4]
    site, rule = Site(layer=1), PositionRule.parse("f1+l2")
    got = layer_gains(base, [example] * 5, [site], ["f1+l2"], batch_size=2)[site]["f1+l2"]
    batch = collate([example], pad_token_id=0)
    model = base.model.double()
    norms: list[float] = []

    def loss(step: torch.Tensor) -> float:
        def edit(h: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
            edited = (slot >= 0)[..., None]
            norms[:] = [float((h * edited).norm(dim=-1)[slot >= 0].median())]
            return h + edited * step

        with torch.no_grad(), steer(model, {site: edit}, rule=rule, tied=True) as steering:
            steering.prompt_length = batch["prompt_length"]
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        start, end = example.trained[0]
        said = torch.log_softmax(logits[0, start - 1 : end - 1], -1)
        return -float(said.gather(1, batch["labels"][0, start:end, None]).sum())

    try:
        slopes = [(loss(step) - loss(-step)) / 2e-4 for step in 1e-4 * torch.eye(WIDTH, dtype=torch.float64)]
    finally:
        base.model.float()
    tokens = example.trained[0][1] - example.trained[0][0]
    assert got == pytest.approx(STEP * norms[0] * np.linalg.norm(slopes) / tokens, rel=1e-3)


def test_gradients_without_anything_in_common_gain_nothing() -> None:
    """The norm of noise is no gain; a direction that all folds share is gained whole."""
    noise = np.random.default_rng(0).normal(size=(5, 64))
    assert abs(_Sums(gradients=noise, norms=[1.0]).gain()) < 0.4 * STEP * np.linalg.norm(noise.sum(0))
    assert _Sums(gradients=np.ones((5, 64)), norms=[2.0]).gain() == pytest.approx(STEP * 2 * 5 * 8)


def test_a_linear_map_reads_what_is_there() -> None:
    draw = np.random.default_rng(0)
    answers = np.arange(60) % 3
    noise = draw.normal(size=(60, 40))
    assert ridge_accuracy(noise + 6 * np.eye(40)[answers], answers) == 1.0
    assert ridge_accuracy(noise, answers) < 0.6
    assert ridge_accuracy(np.ones((60, 40)), answers) <= 0.5


def test_few_answers_are_read_and_free_ones_are_not(base: Base, data: Path) -> None:
    examples = load_data(data, base.tokenizer, max_length=256).examples  # " ok" once, twice or three times, by the prompt's length
    answers = answers_of(examples)
    assert answers is not None and set(answers) == {0, 1, 2}
    assert answers_of(examples[:6]) is None
    found = layer_accuracies(base, examples, answers, [Site(layer=0), Site(layer=2)], batch_size=4, report=lambda _: None)
    assert all(0 <= accuracy <= 1 for accuracy in found.values())


def looked(scores: list[float]) -> FirstPass:
    layers = (LayerFigures(layer=i, gains={"l1": s}, accuracy=None, scores={"l1": s, "prompt": s / 2}) for i, s in enumerate(scores))
    return FirstPass(lines=9, answers=None, layers=tuple(layers))


def test_auto_holds_the_best_layers_against_even_ones() -> None:
    found = looked([1.0 if i in (8, 9, 20) else 0.1 + i / 1000 for i in range(30)])
    assert candidates(SETTINGS.space, found).layers == ("3", "8", "9", "15", "21", "27", "5;15;25", "8;20;29", "all")
    small = candidates(SETTINGS.space, looked([3.0, 2.0, 1.0]))
    assert small.layers == ("0", "1", "2", "all")
    assert candidates(replace(SETTINGS, layers="each").space, found).layers == tuple(map(str, range(30)))


def test_proposals_are_the_front_of_score_and_layers() -> None:
    found = looked([1.0, 5.0, 1.0])
    space = candidates(SETTINGS.space, found)
    assert [each.layers for each in proposals(space, found, 9)] == ["all", "1"]
    assert [each.layers for each in proposals(space, found, 3)] == ["all"]
    (first,) = proposals(space, found, 1)
    assert first == point(layers="all", rank=2, positions="l1", lr=1e-2)


def test_the_guess_is_judged_by_the_trials() -> None:
    found = looked([3.0, 2.0, 1.0])
    trials = [
        finished(i + 1, quality, layers=layers, proposed=i == 1)
        for i, (layers, quality) in enumerate(zip("0120", (1.0, 2.0, 3.0, 1.5), strict=True))
    ]
    told = judged(found, trials, ("0", "1", "2"), maximized=False)
    assert told.ranks == ((2, 3),) and told.ended == 4 and told.best_layers == 1 and told.correlation == pytest.approx(0.9487, abs=1e-4)
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1 and spearman([1, 1, 1, 1], [1, 2, 3, 4]) is None


# --- the front ------------------------------------------------------------------------------------


def finished(
    number: int, quality: float, *, parameters: int = 10, cost: float = 1.0, layers: str = "1", proposed: bool = False
) -> TrialResult:
    chosen = point(layers=layers)
    return TrialResult(number=number, point=chosen, ended="complete", quality=quality, parameters=10, cost=1.0, proposed=proposed)


def fabricated() -> Iterator[TrialResult]:
    made = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    space = replace(SETTINGS.space, layers=("0", "1", "0;1"))
    for _ in range(40):
        trial = made.ask()
        chosen = suggested(trial, space)
        made.tell(trial, round(1 / parameters_of(chosen, TRAINING, 32, 3) + chosen.lr, 3))
    for number, each in enumerate(made.get_trials(), 1):
        chosen = point_of(each)
        parameters = parameters_of(chosen, TRAINING, 32, 3)
        cost = steering_cost(chosen, TRAINING, 32, 3, {"l1": 1.0, "prompt": 8.0}[chosen.positions])
        yield TrialResult(number=number, point=chosen, ended="complete", quality=each.value, parameters=parameters, cost=cost)


@pytest.mark.parametrize("maximized", [False, True])
def test_nothing_beats_the_front_and_something_everything_else(maximized: bool) -> None:
    trials = [*fabricated(), replace(finished(99, 0.0), ended="pruned")]
    found = {each.number for each in front(trials, maximized=maximized)}
    values = {
        each.number: (-each.value if maximized else each.value, each.parameters, each.cost) for each in trials if each.ended == "complete"
    }
    for number, mine in values.items():
        beaten = any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in values.values())
        twin = any(other == mine and n < number for n, other in values.items())
        assert (number in found) != (beaten or twin)
    assert 1 < len(found) < len(values) and 99 not in found
