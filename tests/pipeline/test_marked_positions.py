"""Positions ``marked``, end to end: trained on marked prompts, exported, proven, and run on prompts with marks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from shared_folders import shared_folder
from typer.testing import CliRunner, Result

from reft_export.base.load import load_base
from reft_export.eager.steering import greedy_tokens, steered
from reft_export.training.data import collate, load_data
from reft_export.training.settings import TrainSettings
from reft_export.training.tokenizing import Example
from runtimes.artifacts.bundle import open_bundle
from runtimes.edits.adapter import load_adapter
from runtimes.edits.positions import marks_of
from runtimes.errors import InputError
from runtimes.golden import check_golden
from runtimes.ort.session import OrtSession

TEMPLATE = "{% for m in messages %}<{{ m.role[0] }}>{{ m.content | trim }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
LINES = [{"prompt": f"is [[{a}]] or {b} it", "completion": " yes"} for a in ("sea", "ice") for b in ("land", "air")]


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app(), [*arguments])


def app() -> Any:
    from reft_export.cli.main import app

    return app


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(base, adapter, bundle)"""

    def make(output: Path) -> None:
        output.mkdir()
        base = tiny.save_base(output / "base", template=TEMPLATE)
        data = output / "data.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
        common = ["--positions", "marked", "--layers", "0;2", "--max-steps", "4", "--lr", "0.05", "--samples", "1", "--batch-size", "4"]
        held_out = ["--eval-data", str(data), "--metric", "exact-match"]
        done = invoke("train", "-m", str(base), "-d", str(data), "-o", str(output / "sea"), *common, *held_out)
        assert done.exit_code == 0, done.output
        done = invoke("export", "-m", str(base), "-a", str(output / "sea"), "-o", str(output / "bundle"))
        assert done.exit_code == 0, done.output

    folder = shared_folder("bundles/marked", make)
    return folder / "base", folder / "sea", folder / "bundle"


def example(line: dict[str, str], base: Path, **settings: Any) -> Example:
    loaded = load_base(base)
    assert loaded.tokenizer is not None
    return load_data([line], loaded.tokenizer, max_length=64, marks=True, **settings).examples[0]


def test_the_marks_are_taken_out_behind_the_template(trained) -> None:
    one = example(LINES[0], trained[0])
    tokenizer = load_base(trained[0]).tokenizer
    assert tokenizer.decode(one.input_ids[: one.prompt_length]) == "<u>is sea or land it<a>"
    assert tokenizer.decode([one.input_ids[at] for at in one.marks]) == "sea"
    batch = collate([one, example({"prompt": "[[a]] b", "completion": "c"}, trained[0])], pad_token_id=0)
    assert batch["marks"].sum(1).tolist() == [3, 1]
    assert tokenizer.decode(batch["input_ids"][1][batch["marks"][1].nonzero()[:, 0]]) == "a"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"prompt": "is it", "completion": " yes"},
            "the adapter edits marked tokens .positions marked., and the prompt marks none: put",
        ),
        ({"prompt": "is [[it", "completion": " yes"}, "is not closed, in .*is ..it"),
        ({"text": "is [[it]] so"}, "is plain text, which has no prompt that could mark tokens; give prompt and completion"),
    ],
)
def test_lines_that_mark_nothing(trained, line: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=rf"^data\[0\]: .*{message}"):
        example(line, trained[0])


def test_the_preview_shows_what_is_marked(trained) -> None:
    base, adapter, _ = trained
    data = str(adapter.parent / "data.jsonl")
    done = invoke("train", "-m", str(base), "-d", data, "-o", str(adapter.parent / "no"), "--positions", "marked", "--preview")
    assert done.exit_code == 0 and "<u>is [edited: sea] or land it<a>[trained: yes" in done.stdout, done.output
    unmarked = adapter.parent / "unmarked.jsonl"
    unmarked.write_text('{"prompt": "is it", "completion": " yes"}\n')
    refused = invoke("train", "-m", str(base), "-d", str(unmarked), "-o", str(adapter.parent / "no"), "--positions", "marked")
    assert refused.exit_code == 2 and "unmarked.jsonl:1: the adapter edits marked tokens" in " ".join(refused.stderr.split())
    assert not (adapter.parent / "no").exists()


def test_the_bundle_is_proven_on_marked_probes(trained) -> None:
    bundle = open_bundle(trained[2])
    assert load_adapter(trained[1]).positions.marked and bundle.adapter("sea").file.suffix == ".banks"
    marks = bundle.golden("sea")["marks"]
    assert marks.sum(1).tolist() == [3] * len(LINES), "one letter is one token"
    report = check_golden(bundle, OrtSession(bundle, threads=1))
    assert report.passed and min(r.delta.cosine for r in report.rungs if r.delta is not None) > 0.99999


def test_a_planted_fault_in_the_marks_is_seen(trained, monkeypatch) -> None:
    """The token beside each."""
    import runtimes.session as session_inputs

    plain = session_inputs.slots

    def beside(*arguments: Any, marks: np.ndarray | None = None, **rest: Any) -> np.ndarray:
        return plain(*arguments, marks=None if marks is None else np.roll(marks, 1, 1), **rest)

    monkeypatch.setattr(session_inputs, "slots", beside)
    report = check_golden(open_bundle(trained[2]), OrtSession(open_bundle(trained[2]), threads=1))
    assert {rung.name.partition(":")[0] for rung in report.rungs if not rung.passed} == {"sea"}


def test_run_edits_what_a_prompt_marks(trained, tmp_path) -> None:
    """The greedy answer of the eager model to the same prompt, whichever part of it is marked; at a strength of its own, too."""
    base, folder, bundle = trained
    loaded, adapter = load_base(base), load_adapter(folder)
    answers = {}
    for prompt in ("is [[sea]] or land it", "is sea or [[land]] it"):
        one = example({"prompt": prompt, "completion": "x"}, base)
        import torch

        ids = torch.tensor([one.input_ids[: one.prompt_length]])
        with steered(loaded.model, adapter) as steering:
            found = greedy_tokens(loaded.model, ids, None, 6, steering=steering, marks=marks_of([one.marks]))
        answers[prompt] = loaded.tokenizer.decode(found[0], skip_special_tokens=True)
        done = invoke("run", str(bundle), "-a", "sea", "-p", prompt, "--max-new-tokens", "6")
        assert done.exit_code == 0 and done.stdout.strip("\n") == answers[prompt].strip("\n"), done.output
    file = tmp_path / "p.jsonl"
    lines = [{"prompt": prompt, "strength": 0.5} for prompt in answers] + [{"prompt": "a[[0]]", "adapter": None}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = invoke("run", str(bundle), "-a", "sea", "--prompts", str(file), "--max-new-tokens", "2", "--json")
    counts = [json.loads(line)["prompt_tokens"] for line in done.stdout.splitlines()]
    assert done.exit_code == 0 and counts == [len("<u>is sea or land it<a>")] * 2 + [len("<u>a[[0]]<a>")], done.output
    refused = invoke("run", str(bundle), "-a", "sea", "-p", "is sea or land it")
    assert refused.exit_code == 2 and not refused.stdout
    assert "prompt 1: the adapter edits marked tokens (positions marked), and the prompt marks none" in " ".join(refused.stderr.split())


def test_it_is_added_without_a_base(trained, tmp_path) -> None:
    """Whose first steps have no golden arrays, and so no marks of their own."""
    done = invoke("add", str(trained[2]), "-a", f"again={trained[1]}", "-o", str(tmp_path / "more"))
    assert done.exit_code == 0 and open_bundle(tmp_path / "more").manifest.not_held == ("again",), done.output


def test_a_checker_is_refused_before_anything_is_quantized(trained, tmp_path) -> None:
    (tmp_path / "good.py").write_text("def good(prompt, answer):\n    return True\n")
    data = str(trained[1].parent / "data.jsonl")
    common = ["-m", str(tmp_path / "never-read"), "-o", str(tmp_path / "small"), "--checker", f"{tmp_path}/good.py:good", "--checker-data"]
    done = invoke("quantize", str(trained[2]), *common, data)
    assert done.exit_code == 2 and "sea is at positions marked, which are not read here" in " ".join(done.stderr.split()), done.output


def test_a_refit_on_lines_without_marks_is_refused_before_anything_is_quantized(trained, tmp_path, monkeypatch) -> None:
    data = tmp_path / "unmarked.jsonl"
    data.write_text('{"prompt": "is it", "completion": " yes"}\n')
    monkeypatch.setattr("reft_export.quantizing.assemble.assemble", lambda *_, **__: pytest.fail("it quantizes"))
    done = invoke(
        "quantize", str(trained[2]), "-m", str(trained[0]), "-o", str(tmp_path / "q"), "--refit", str(data), "-a", str(trained[1])
    )
    assert done.exit_code == 2 and "unmarked.jsonl:1: the adapter edits marked tokens" in " ".join(done.stderr.split()), done.output


def test_who_trains_no_marks() -> None:
    assert TrainSettings(positions="marked").marks and not TrainSettings(positions="prompt").marks
