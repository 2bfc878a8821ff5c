"""The task's own metric: what it counts, what it decides, and what has none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reft_export.base.load import Base
from reft_export.eager.steering import greedy_tokens, steered
from reft_export.training.checkpoints import StepRecord, best_step, stale_evaluations
from reft_export.training.counted import CountedHead
from reft_export.training.data import Examples, load_data
from reft_export.training.endings import TrainingInterrupted
from reft_export.training.metrics import answer_metric, log_likelihoods
from reft_export.training.settings import TrainSettings
from reft_export.training.trainer import train
from reft_export.training.ways import Ways
from runtimes.edits.adapter import load_adapter
from runtimes.edits.positions import PositionRule
from runtimes.errors import InputError

SETTINGS = TrainSettings(rank=4, layers="0;2", positions="all", lr=5e-2, epochs=10, batch_size=4, samples=0, seed=7)
WORDS = (" yes", " no!")
RECORDS = [{"prompt": f"is {n} {'even' if n % 2 else 'odd'}?", "completion": WORDS[n % 2]} for n in range(12)]
HELD = [{"prompt": f"is {n} {'even' if n % 2 else 'odd'}?", "completion": WORDS[n % 2]} for n in range(20, 26)]


def test_the_best_step_is_of_the_metric_then_of_the_loss() -> None:
    figures = [(1.0, 0.5), (0.2, 0.4), (0.9, 0.5), (0.8, 0.1)]
    history = [StepRecord(step=n, loss=1, lr=1, eval_loss=loss, metric=metric) for n, (loss, metric) in enumerate(figures, 1)]
    best = best_step(history)
    assert best is history[2] and stale_evaluations(history) == 1
    assert best_step([replace(record, metric=None) for record in history]) is not best


def test_likelihoods_are_the_models_own(base: Base) -> None:
    adapter_rows = [((1, 2, 3, 4, 5), (6, 7)), ((9, 8, 7), (5, 4, 3, 2))]
    with steered(base.model, load_random(base)) as steering:
        ways = Ways(head=CountedHead(base.model), steering=steering, rule=PositionRule.parse("f1+l1"))
        found = log_likelihoods(ways.counted, adapter_rows, base.model.device)
        for value, (prompt, answer) in zip(found, adapter_rows, strict=True):
            steering.prompt_length = [len(prompt)]
            logits = base.model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
            expected = sum(float(logits[len(prompt) - 1 + n, token]) for n, token in enumerate(answer))
            assert value == pytest.approx(expected, rel=1e-4)


def load_random(base: Base) -> Any:
    import tiny

    return tiny.random_adapter(base.info, positions="f1+l1")


@pytest.mark.parametrize("positions", ["all", "l2"])
def test_a_run_says_what_its_adapter_does(base: Base, positions: str, tmp_path: Path) -> None:
    """The saved adapter's share of right answers, counted here once more one row at a time; and the held-out lines are its probes."""
    result = train(base, RECORDS, replace(SETTINGS, metric="accuracy", epochs=4, positions=positions), tmp_path / "choice", eval_data=HELD)
    adapter, right = load_adapter(tmp_path / "choice"), 0
    assert adapter.training["kept_metric"] == result.kept.metric and list(adapter.probes) == HELD
    assert adapter.training["data"]["held_out"] == 6 == result.statistics.held_out and len(adapter.training["data"]["eval_files"]) == 1
    for record in HELD:
        pairs = [{**record, "completion": word} for word in WORDS]
        scores = {}
        for example in load_data(pairs, base.tokenizer, max_length=64).examples:
            with steered(base.model, adapter) as steering, torch.no_grad():
                steering.prompt_length = [example.prompt_length]
                loss = base.model(torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss
            scores[example.line] = -float(loss) * example.trained_tokens
        right += WORDS[max(scores, key=scores.__getitem__) - 1] == record["completion"]
    assert result.kept.metric == pytest.approx(right / 6)

    same = [{**record, "completion": " ok"} for record in RECORDS]
    result = train(base, same, replace(SETTINGS, metric="exact-match"), tmp_path / "exact", eval_data=same[:4])
    example = load_data(same[:1], base.tokenizer, max_length=64).examples[0]
    with steered(base.model, load_adapter(tmp_path / "exact")):
        (answer,) = greedy_tokens(base.model, torch.tensor([example.input_ids[: example.prompt_length]]), None, 4, eos=257)
    assert result.kept.metric == 1.0 and tuple(answer) == example.input_ids[example.prompt_length :]
    first = next(record for record in result.history if record.metric is not None)
    assert first.metric == 0.0, "else this shows nothing"


def test_a_function_of_the_users_judges(base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text(
        "print('read')\ndef even(answer, record):\n    return '2' in record['prompt'] and answer is not None\n"
        "def boom(answer, record):\n    raise KeyError('x')\ndef number(answer, record):\n    return 0.5\n"
        "def leave(answer, record):\n    raise SystemExit(3)\ndef loud(answer, record):\n    print('loud')\n    return [1]\n"
    )
    settings = replace(SETTINGS, epochs=1, metric=f"{judge}:even")
    result = train(base, RECORDS, settings, tmp_path / "a", eval_data=HELD)
    assert result.kept.metric == 1.0, "every held-out prompt has a 2"
    refused = {"boom": "raised KeyError: 'x' for data", "number": "returned 0.5 for data", "none": "has no none"}
    for name, said in {**refused, "leave": "raised SystemExit: 3 for data", "loud": r"returned \[1\] for data"}.items():
        with pytest.raises(InputError, match=said):
            train(base, RECORDS, replace(settings, metric=f"{judge}:{name}"), tmp_path / "b", eval_data=HELD)
    told = capsys.readouterr()
    assert told.out == "" and told.err == 6 * "read\n" + "loud\n"


def test_patience_ends_a_run_and_a_killed_one_stays_ended(base: Base, tmp_path: Path) -> None:
    contrary = [{"prompt": record["prompt"], "completion": "QXZ"} for record in RECORDS]  # no byte of an answer
    settings = replace(SETTINGS, epochs=20, patience=2, schedule="constant")
    result = train(base, RECORDS, settings, tmp_path / "whole", eval_data=contrary)
    evaluated = [record for record in result.history if record.eval_loss is not None]
    assert len(result.history) < 60 and result.kept is evaluated[-3], "two evaluations after the best"

    def kill(step: int, total: int, loss: float, eval_loss: float | None) -> None:
        seen.append(step)
        if seen.count(len(result.history)) == 2:  # told twice: after the step and after its evaluation
            raise KeyboardInterrupt

    seen: list[int] = []
    with pytest.raises(TrainingInterrupted):
        train(base, RECORDS, settings, tmp_path / "killed", eval_data=contrary, on_step=kill)
    again = train(base, RECORDS, replace(settings, resume=True), tmp_path / "killed", eval_data=contrary)
    assert again.kept == result.kept
    one, other = ((tmp_path / name / "adapter.safetensors").read_bytes() for name in ("whole", "killed"))
    assert one == other


def test_refusals(base: Base, tmp_path: Path) -> None:
    def refused(said: str, data: Any = RECORDS, **options: Any) -> None:
        held = options.pop("eval_data", None)
        with pytest.raises(InputError, match=said):
            train(base, data, replace(SETTINGS, **options), tmp_path / "a", eval_data=held)
        assert list(tmp_path.iterdir()) == []

    refused("metric accuracy is of held-out examples, and there are none; give eval_data, or eval_fraction", metric="accuracy")
    refused("patience is of held-out examples", patience=3)
    refused("eval_data is in place of eval_fraction", eval_data=HELD, eval_fraction=0.5)
    refused("eval_data has no examples", eval_data=[])
    refused(r"data\[0\] is text, and what is trained on is prompt-completion", eval_data=[{"text": "some words here"}])
    refused(r"data\[1\]: lacks", eval_data=[HELD[0], {"prompt": "a"}])
    refused(r"data\[0\]: the prompt has 1 token", eval_data=[{"prompt": "a", "completion": "b"}], positions="l1")
    many = [{"prompt": f"say {n}", "completion": f"it is {n}"} for n in range(21)]
    refused("2 to 20 of them, and there are 21; use exact-match", data=many, metric="accuracy", eval_fraction=0.2)
    texts = [{"text": f"the text of {n}"} for n in range(4)]
    refused(r"metric accuracy is of answers, and data\[.\] is plain text", data=texts, metric="accuracy", eval_fraction=0.5)
    with pytest.raises(InputError, match="metric 'bleu' is unknown; known: loss, accuracy, exact-match, or file.py:function"):
        replace(SETTINGS, metric="bleu")


def test_a_classifiers_metric_is_its_accuracy(tmp_path: Path) -> None:
    import tiny_encoders

    from reft_export.base.load import load_base

    encoder = load_base(tiny_encoders.save_base(tmp_path / "base"))
    records = [{"text": f"gentle {i}", "label": i % 3} for i in range(9)]
    settings = replace(SETTINGS, positions="f1", epochs=2, metric="accuracy", eval_fraction=0.4, lr=1e-2)
    result = train(encoder, records, settings, tmp_path / "a")
    assert result.accuracy is not None and result.accuracy.after == result.kept.metric
    with pytest.raises(InputError, match="metric exact-match is of answers, and .* is a classifier; use accuracy"):
        train(encoder, records, replace(settings, metric="exact-match"), tmp_path / "b")


def test_choices_are_of_all_the_data(base: Base) -> None:
    training, held_out = (list(load_data(each, base.tokenizer, max_length=64).examples) for each in (RECORDS, HELD[:1]))
    metric = answer_metric("accuracy", base, Examples(training=training, held_out=held_out), HELD[:1], 4)
    assert metric is not None and len(metric.choices) == 2 and json.dumps(metric.questions[0].where) == '"data[0]"'
