"""Perplexity, checkers, and the report over them: every figure against a computation of its own."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.weights import WeightError
from reft_export.base.load import load_base
from reft_export.eager.banks import bank_steerer
from reft_export.evaluation.checker import CheckedTask, load_task
from reft_export.evaluation.quantization_report import Measurements, Yardsticks, read_text, write_reports
from reft_export.exporting.export import ExportSettings, export_bundle
from runtimes.artifacts.bundle import open_bundle
from runtimes.errors import InputError
from runtimes.ort.session import OrtSession
from runtimes.parity.perplexity import agreement, perplexity
from runtimes.text.tokenizer import Tokenizer

TEXT = "It was the best of times, it was the worst of times. " * 14
"""728 tokens of one byte: three windows of 510 every 255 in a context of 512."""


def eager_perplexity(bundle, model: str, adapter: str | None, tokens: list[int], half: int) -> float:
    """The formula of runtimes/parity/perplexity.py, window by window in eager PyTorch."""
    base, losses = load_base(model), []
    for start in range(0, len(tokens) - half, half):
        window = torch.tensor([tokens[start : start + 2 * half]])
        if adapter is None:
            logits = base.model(window).logits
        else:
            with bank_steerer(bundle, adapter)(base.model) as steering:
                steering.prompt_length = np.array([half])
                logits = base.model(window).logits
        log_p = torch.log_softmax(logits[0].double(), -1)
        losses += [-float(log_p[i - 1, window[0, i]]) for i in range(half, window.shape[1])]
    assert len(losses) == len(tokens) - half
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("adapter", [None, "tied", "untied"])
def test_perplexity(adapter, bundle_folder, base_folder) -> None:
    bundle = open_bundle(bundle_folder("llama"))
    tokenizer, session = Tokenizer.load(bundle.folder, bundle.manifest.model), OrtSession(bundle, adapter=adapter)
    found = perplexity(session, tokenizer, TEXT)
    expected = eager_perplexity(bundle, str(base_folder("llama")), adapter, tokenizer.encode(TEXT), 255)
    assert found == pytest.approx(expected, rel=1e-4)
    short = tokenizer.encode("abcdefg")
    assert perplexity(session, tokenizer, "abcdefg") == pytest.approx(
        eager_perplexity(bundle, str(base_folder("llama")), adapter, short, 3), rel=1e-4
    )
    with pytest.raises(InputError, match="two tokens or more, this one has 1"):
        perplexity(session, tokenizer, "a")


def test_last_logits_only_give_the_same_figures(bundle_folder, base_folder, adapter_folders, tmp_path) -> None:
    model = str(base_folder("llama"))
    export_bundle(model, adapter_folders("llama", ("tied",)), tmp_path / "last", ExportSettings(logits="last"), report=lambda _: None)
    for name, text in (("tied", "a short text, read token by token"),):
        both = []
        for folder in (bundle_folder("llama"), tmp_path / "last"):
            bundle = open_bundle(folder)
            session, tokenizer = OrtSession(bundle, adapter=name), Tokenizer.load(folder, bundle.manifest.model)
            both.append((perplexity(session, tokenizer, text), agreement(session, tokenizer.encode(text), 5)))
        assert both[0][0] == pytest.approx(both[1][0], rel=1e-5) and both[0][1] == both[1][1]


def test_agreement_counts_the_sessions_own_choices(bundle_folder) -> None:
    from runtimes.generation import greedy_tokens

    session = OrtSession(open_bundle(bundle_folder("llama")), adapter="tied")
    prompt = [60, 61, 62, 63]
    said = greedy_tokens(session, [prompt], 6)[0].tolist()
    assert agreement(session, [*prompt, *said], 4) == (6, 6)
    assert agreement(session, [*prompt, *said[:-1], (said[-1] + 1) % 250], 4) == (5, 6)


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "not the model's"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in ({"prompt": "a"}, {"prompt": "b", "completion": "x"}, {"messages": chat})))
    return path


def judged(tmp_path, body: str) -> str:
    (tmp_path / "judge.py").write_text(f"def judge(prompt, answer):\n    {body}\n")
    return f"{tmp_path / 'judge.py'}:judge"


def test_checker(tmp_path, prompts) -> None:
    task = load_task(judged(tmp_path, "return {'a': True, 'b': 0.25, 'c': 0}[prompt]"), prompts)
    assert [messages[-1]["content"] for _, messages in task.prompts] == ["a", "b", "c"], "an assistant's last message is no prompt"
    assert task.success(["", "", ""]) == pytest.approx(1.25 / 3)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "returned None for the prompt of .*prompts.jsonl:1; expected True, False"),
        ("return float('nan')", "returned nan"),
        ("return 1.5", "returned 1.5"),
        ("return '1'", "returned '1'"),
        ("return 1 / 0", "raised ZeroDivisionError: division by zero for the prompt of .*prompts.jsonl:1"),
    ],
)
def test_checker_that_is_no_judge_is_refused_before_any_work(tmp_path, prompts, body, message) -> None:
    with pytest.raises(InputError, match=message):
        load_task(judged(tmp_path, body), prompts)


def test_checker_that_fails_later_is_one_line(tmp_path, prompts) -> None:
    task = load_task(judged(tmp_path, "return answer.index('x') >= 0 if answer else 0"), prompts)
    with pytest.raises(InputError, match=r"raised ValueError: substring not found for the prompt of .*:2 and answer 'zz'; correct it"):
        task.success(["x", "zz", "x"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("judge", "is not module:function or file.py:function"),
        ("no_such_module:f", "no_such_module cannot be imported .ModuleNotFoundError"),
        ("json:nothing", "json has no nothing"),
        ("math:pi", "math holds a float, not a function, as pi"),
        ("missing.py:f", "missing.py cannot be imported .FileNotFoundError"),
    ],
)
def test_checker_that_cannot_be_loaded(spec, message, prompts) -> None:
    with pytest.raises(InputError, match=message):
        load_task(spec, prompts)


def test_prompts_that_do_not_fit(bundle_folder, tmp_path) -> None:
    bundle = open_bundle(bundle_folder("llama"))
    long = CheckedTask(name="j", check=lambda p, a: 1, prompts=(("f:7", ({"role": "user", "content": "x" * 500},)),), max_new_tokens=64)
    with pytest.raises(InputError, match="f:7: 500 tokens and 64 new ones do not fit the context of llama .512.; .* --checker-tokens"):
        long.answer(bundle, OrtSession(bundle))
    for content, message in ((b" \n", "holds no text"), (b"caf\xe9", "cannot be read as UTF-8")):
        (tmp_path / "text.txt").write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_text(tmp_path / "text.txt")


def test_report(bundle_folder, tmp_path) -> None:
    task = CheckedTask(
        name="short:answers", check=lambda p, a: len(a) < 99, prompts=(("f:1", ({"role": "user", "content": "hello"},)),), max_new_tokens=4
    )
    figures = Measurements(Yardsticks(text="some text to be read", task=task))
    for name in ("fp32", "int4"):
        figures.add(name, open_bundle(bundle_folder("llama", name)))
    report = figures.report(tmp_path / "q", weights=(WeightError(name="w", relative=0.1, bytes_before=8, bytes_after=1),))
    assert len(report.rows()) == 12 and all(len(row) == len(report.HEADER) for row in report.rows())
    exact, quantized = report.variants
    assert exact.size > 2.5 * quantized.size
    for s in exact.steering:
        assert s.delta.cosine > 0.99999 and s.agreement is None and s.success == 1.0
    assert all(s.delta.cosine < 0.9999 and 0 <= s.agreement <= 1 and s.figures.kl > 0 for s in quantized.steering)
    written, picture = write_reports(report, tmp_path / "q")
    content = json.loads(written.read_text())
    assert [v["name"] for v in content["variants"]] == ["fp32", "int4"] and content["weights"][0]["relative"] == 0.1
    assert picture.read_bytes().startswith(b"\x89PNG")
