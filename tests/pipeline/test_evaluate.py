"""``evaluate``: a float bundle counts as eager PyTorch does, figures against computations of their own, and what is refused."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from typer.testing import CliRunner

from reft_export.base.load import load_base
from reft_export.cli.main import app
from reft_export.eager.steering import greedy_tokens, steered
from reft_export.evaluating.device_tokenizer import DeviceTokenizer
from reft_export.evaluating.evaluate import Table, artifacts_by_name, evaluate, read_for
from reft_export.evaluating.evaluation import evaluation_of
from reft_export.evaluating.held_out import chat_template_of
from reft_export.evaluating.intervals import bootstrap, wilson
from reft_export.evaluating.report import likelihood_columns, page
from reft_export.evaluating.settings import EvaluationSettings
from reft_export.training.data import load_data
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import load_adapter
from runtimes.errors import InputError
from runtimes.text.chat import ChatTemplate
from runtimes.text.tokenizer import Tokenizer

NAMES = ("untied", "prompt-relu")
WORDS = (" yes", " no")
CHECKER = "def even(answer, record):\n    return len(answer) % 2 == 0 and record['prompt'] != 'nobody'\n"


@pytest.fixture(scope="module")
def table(float_bundle, adapter_folders) -> Table:
    """The tiny base and two adapters, in eager PyTorch and as a float bundle."""
    bundle, model = float_bundle()
    adapters = {folder.name: load_adapter(folder) for folder in adapter_folders("llama", NAMES)}
    return Table(base=load_base(model), adapters=adapters, artifacts=artifacts_by_name([(bundle, open_bundle(bundle))]))


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of unequal length, answered with one of two words, and one cut to nothing but a byte."""
    path = tmp_path_factory.mktemp("held") / "held.jsonl"
    records = [{"prompt": "What is " + "very " * (n % 4) + f"{n}?", "completion": WORDS[n % 2]} for n in range(9)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    path.with_name("judge.py").write_text(CHECKER)
    return path


@pytest.fixture(scope="module")
def found(table, lines):
    judge = f"{lines.with_name('judge.py')}:even"
    settings = EvaluationSettings(metrics=("exact-match", "accuracy", judge), batch_size=4, max_new_tokens=6)
    return evaluate([lines], table, settings)


def test_a_float_bundle_counts_as_eager_does(found) -> None:
    eager, bundle = found.measured[:3], found.measured[3:]
    assert [each.who.adapter for each in eager] == [None, *NAMES] and [each.who.adapter for each in bundle] == [None, *NAMES]
    by_name = {each.who.adapter: each for each in bundle}
    assert len({each.answers for each in eager}) == 3, "the adapters change nothing"
    for one in eager:
        other = by_name[one.who.adapter]
        assert one.answers == other.answers and one.chosen == other.chosen and one.new_tokens == other.new_tokens
        assert {name: right.tolist() for name, right in one.right.items()} == {name: r.tolist() for name, r in other.right.items()}
        np.testing.assert_allclose(np.concatenate(other.likelihoods), np.concatenate(one.likelihoods), atol=1e-3)
        rows = [row for row in found.rows if row.who.adapter == one.who.adapter]
        assert [share.interval for share in rows[0].shares.values()] == [share.interval for share in rows[1].shares.values()]
    question = found.held_out.questions[0]
    assert [found.held_out.right("exact-match", question, text) for text in ("yes\n", "Yes", "no")] == [True, False, False]
    judged = {name: share for name, share in found.rows[0].shares.items() if name.endswith(":even")}
    assert 0 < next(iter(judged.values())).right < 9, "a checker that is always or never content shows nothing"


@pytest.mark.parametrize("name", [None, "untied"])
def test_figures_are_the_models_own(name, table, found, lines) -> None:
    """Each line alone: its loss, its likelier word, and its greedy answer."""
    base, row = table.base, next(each for each in found.measured if each.who.adapter == name)
    for line, example in enumerate(load_data(lines, base.tokenizer, max_length=64).examples):
        prompt = torch.tensor([example.input_ids[: example.prompt_length]])

        def loss(ids, labels, length=example.prompt_length) -> float:
            if name is None:
                return float(base.model(ids, labels=labels).loss)
            with steered(base.model, table.adapters[name]) as steering:
                steering.prompt_length = [length]
                return float(base.model(ids, labels=labels).loss)

        with torch.no_grad():
            own = loss(torch.tensor([example.input_ids]), torch.tensor([example.labels])) * example.trained_tokens
            assert row.losses[line] == pytest.approx(own, rel=1e-4)
            scores = []
            for word in WORDS:
                other = load_data([{"prompt": json.loads(lines.read_text().split("\n")[line])["prompt"], "completion": word}], base.tokenizer, max_length=64).examples[0]  # fmt: skip  # noqa: E501
                scores.append(loss(torch.tensor([other.input_ids]), torch.tensor([other.labels])) * other.trained_tokens)
            assert row.right["accuracy"][line] == (WORDS[scores.index(min(scores))] == WORDS[line % 2])
        if name is None:
            said = greedy_tokens(base.model, prompt, None, 6, eos=tiny.EOS)[0]
        else:
            with steered(base.model, table.adapters[name]) as steering:
                said = greedy_tokens(base.model, prompt, None, 6, steering=steering, eos=tiny.EOS)[0]
        assert row.answers[line] == base.tokenizer.decode([token for token in said if token != tiny.EOS], skip_special_tokens=True)


def test_differences_are_from_the_first_row_line_by_line(found) -> None:
    first, measured = found.rows[0], found.measured
    assert first.loss_difference is None
    for row, own in zip(found.rows[1:], measured[1:], strict=True):
        assert row.loss_difference.value == pytest.approx(row.loss.value - first.loss.value)
        assert row.loss_difference.low <= row.loss_difference.value <= row.loss_difference.high
        for name, share in row.shares.items():
            assert share.difference.value == pytest.approx(np.mean(own.right[name]) - np.mean(measured[0].right[name]))
    told = dict(likelihood_columns(found))["vs first"]
    assert told[0] == "" and all(re.fullmatch(r"([+-]\d+\.\d\d) \[[+-]\d+\.\d\d, [+-]\d+\.\d\d\]", each) for each in told[1:]), told
    same = found.rows[3]
    assert same.who.adapter is None and max(abs(same.loss_difference.low), abs(same.loss_difference.high)) < 1e-3, "it is not paired"


def test_retention_is_of_the_float32_models_in_the_table(found) -> None:
    """(NLL base - NLL here) / (NLL base - NLL steered), with the weights of a bundle that lost half of what the edit gave."""
    base, steered_row, quantized = found.measured[0], found.measured[1], found.measured[4]
    gained = replace(steered_row, likelihoods=tuple(each + 1.0 for each in base.likelihoods))
    half = replace(quantized, who=replace(quantized.who, exact=False, adapter="untied"), likelihoods=tuple(each + 0.5 for each in base.likelihoods))  # fmt: skip  # noqa: E501
    assert [row.retention for row in evaluation_of(found.held_out, [base, gained, half]).rows] == [None, None, pytest.approx(0.5)]
    assert evaluation_of(found.held_out, [base, half]).rows[1].retention is None
    other = replace(half, who=replace(half.who, model="another"))
    assert evaluation_of(found.held_out, [base, gained, other]).rows[2].retention is None
    weak = replace(gained, likelihoods=tuple(each + 0.01 for each in base.likelihoods))
    assert evaluation_of(found.held_out, [base, weak, half]).rows[2].retention is None, "an edit that gives next to nothing"


def test_intervals() -> None:
    assert wilson(8, 10).low == pytest.approx(0.49016, abs=1e-5) and wilson(8, 10).high == pytest.approx(0.94331, abs=1e-5)
    assert (wilson(0, 7).low, wilson(7, 7).high) == (0, 1) and wilson(0, 7).high > 0.3
    generator = np.random.default_rng(1)
    first, noise = generator.standard_normal(400), 0.1 * generator.standard_normal(400)
    paired = bootstrap(first + 0.5 + noise - first)
    assert paired == bootstrap(first + 0.5 + noise - first), "the seed is fixed"
    assert paired.low < 0.5 + noise.mean() < paired.high
    assert paired.high - paired.low == pytest.approx(2 * 1.96 * 0.1 / math.sqrt(400), rel=0.15)
    assert bootstrap(np.zeros(3)).low == bootstrap(np.zeros(3)).high == 0
    uneven = bootstrap(np.array([2.0, 30.0]), np.array([2.0, 10.0]))
    assert uneven.value == pytest.approx(32 / 12) and (uneven.low, uneven.high) == (1, 3), "tokens weigh, not lines"


def test_text_is_scored_behind_its_first_half(table, tmp_path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a longer line of text than none"}\n')
    bare = replace(table, adapters={}, artifacts={})
    measured = evaluate([path], bare).measured[0]
    assert measured.right == {} and measured.answers == ()
    ids = [*table.base.tokenizer("a longer line of text than none")["input_ids"], tiny.EOS]
    labels = [-100 if n < (len(ids) + 1) // 2 else token for n, token in enumerate(ids)]
    loss = float(table.base.model(torch.tensor([ids]), labels=torch.tensor([labels])).loss)
    assert evaluate([path], bare).rows[0].loss.value == pytest.approx(loss, rel=1e-5)
    with pytest.raises(InputError, match="text.jsonl:1 is plain text"):
        evaluate([path], bare, EvaluationSettings(metrics=("accuracy",)))


TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"  # noqa: E501


def test_a_device_reads_lines_as_transformers_does(tmp_path) -> None:
    fast = tiny.tokenizer(TEMPLATE)
    fast.save_pretrained(tmp_path)
    device = DeviceTokenizer(Tokenizer.load(tmp_path), ChatTemplate.load(tmp_path))
    records = [
        {"prompt": "Größe?", "completion": "naïve 🙂"},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho"},
            ]
        },
        {"text": "no template here"},
    ]
    for template in ("auto", "never"):
        chosen = records if template == "auto" else [records[0], records[2]]
        read = [load_data(chosen, each, max_length=99, chat_template=template, stop_tokens=(tiny.EOS,)) for each in (fast, device)]
        assert read[0] == read[1] and read[0].templated == (template == "auto")


def test_every_row_answers_the_same_prompts(table, lines, tmp_path) -> None:
    without, through = {"data": {"chat_template": False}}, {"data": {"chat_template": True}}
    assert chat_template_of("auto", {}) == chat_template_of("auto", {"a": through, "b": {}}) == "auto"
    assert chat_template_of("auto", {"a": without}) == "never" and chat_template_of("always", {"a": without}) == "always"
    with pytest.raises(InputError, match="adapter b was trained without the chat template and adapter a through it"):
        chat_template_of("auto", {"adapter a": through, "adapter b": without})
    other = replace(table.base, tokenizer=tiny.tokenizer(TEMPLATE))
    with pytest.raises(InputError, match=r"held.jsonl:1 is \d+ tokens to .* and \d+ to .*, which differ from token 0 on"):
        read_for([lines], replace(table, base=other), EvaluationSettings())


def run(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_the_report(float_bundle, lines, tmp_path) -> None:
    bundle, _ = float_bundle()
    judge = f"{lines.with_name('judge.py')}:even"
    output = tmp_path / "report"
    done = run(bundle, "-d", lines, "--metric", judge, "--limit", 5, "--max-new-tokens", 4, "-o", output, "--json")
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((output / "evaluation.json").read_text())
    assert {path.name for path in output.iterdir()} == {"report.md", "evaluation.json", "evaluation.png", "answers.jsonl"}
    assert [(row["artifact"], row["adapter"]) for row in record["rows"]] == [(bundle.name, name) for name in (None, *NAMES)]
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == record["lines"] == 5 and answers[0]["expected"] == WORDS[0] and "What is" in answers[0]["prompt"]
    for at, row in enumerate(record["rows"]):
        said = [each["rows"][at] for each in answers]
        assert row["metrics"][judge]["right"] == sum(each[judge] for each in said)
        assert row["nll"]["value"] == pytest.approx(sum(e["nll"] for e in said) / sum(e["tokens"] for e in said))
        assert (row["nll"]["difference"] is None) == (at == 0)

    kept = (output / "evaluation.json").read_bytes()
    assert run(bundle, "-d", lines, "-o", output).exit_code == 2
    lines.with_name("broken.py").write_text("def even(answer, record):\n    return 1 / len(answer) if not answer else 2\n")
    done = run(bundle, "-d", lines, "--metric", f"{lines.with_name('broken.py')}:even", "-o", output, "--force")
    assert done.exit_code == 2 and "raised ZeroDivisionError" in done.stderr and (output / "evaluation.json").read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["report"], "something half-written is left"
    assert run(bundle, "-d", lines, "--metric", "loss", "-o", output, "--force").exit_code == 0
    assert json.loads((output / "evaluation.json").read_text())["rows"][0]["metrics"] == {}


def test_a_models_text_is_not_rendered(found) -> None:
    sly = replace(found.measured[0], answers=("<script>|`*#</script>",) * 9)
    made = evaluation_of(found.held_out, [found.measured[0], sly])
    record = [{"line": "x:1", "prompt": "p", "expected": "e", "rows": [{"artifact": "a", "adapter": None, "answer": sly.answers[0]}]}]
    text = page(made, record * 9, picture=False)
    assert "<script>" not in text and "&lt;script&gt;&#124;\\`\\*\\#" in text
    assert made.differing == list(range(9)) and made.repeats


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "nothing to evaluate"),
        (("-a", "LINES"), "name the base with -m"),
        (("BUNDLE", "--dtype", "float16"), "--dtype is eager PyTorch's"),
        (("-m", "BASE", "--provider", "cpu"), "--provider is a bundle's"),
        (("BUNDLE", "--metric", "rouge"), "--metric 'rouge' is unknown"),
        (("BUNDLE", "--metric", "loss", "--metric", "loss"), "given twice"),
        (("BUNDLE", "BUNDLE"), "/llama is named twice; name each once"),
        (("BUNDLE", "-d", "LINES"), "held.jsonl is named twice, and its lines would count twice; name each once"),
        (("BUNDLE", "--limit", "1", "--metric", "accuracy"), "chooses among the data's distinct answers"),
        (("BUNDLE", "--max-length", "100000"), "shortest context in the table ends at"),
        (("BUNDLE", "--batch-size", "0"), "--batch-size is 0"),
        (("BUNDLE", "-o", "HOLDS"), "holds the input"),
        (("BASE",), "is not a bundle"),
    ],
)
def test_refusals(arguments, match, float_bundle, lines, capsys) -> None:
    bundle, model = float_bundle()
    places = {"BUNDLE": bundle, "BASE": model, "LINES": lines, "HOLDS": lines.parent}
    done = run("-d", lines, *(places.get(each, each) for each in arguments))
    assert done.exit_code == 2 and done.stdout == "", done.output
    assert match in done.stderr and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr
