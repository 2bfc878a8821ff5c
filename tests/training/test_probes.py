"""Probes: what training and importing write, what a saved adapter keeps, and what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_encoders
from reseal import reseal

from reft_export.base.load import Base, load_base, save_base
from reft_export.importing.foreign import Request
from reft_export.importing.importer import import_adapter
from reft_export.training.probes import probe_examples
from reft_export.training.settings import TrainSettings
from reft_export.training.trainer import train
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.edits.probes import probes_bytes, read_probes, spread
from runtimes.errors import AdapterError, InputError, ReftError

SETTINGS = TrainSettings(rank=1, layers="0", positions="l1", max_steps=1, batch_size=2, samples=0, seed=7)


def lines(count: int) -> list[dict]:
    return [{"prompt": f"what is {i}?", "completion": f"it is {i}"} for i in range(count)]


def written(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n\n" for record in records))  # empty lines are no examples
    return path


def trained(base: Base, tmp_path: Path, data: object, **changes: object) -> Path:
    train(base, data, replace(SETTINGS, **changes), tmp_path / "adapter", force=True)
    return tmp_path / "adapter"


def test_spread() -> None:
    assert spread(5) == [0, 1, 2, 3, 4] and spread(0) == [] and spread(9, 0) == [] and spread(9, 1) == [0]
    assert spread(9, 3) == [0, 4, 8]
    for count in (32, 33, 63, 64, 1000):
        chosen = spread(count)
        assert len(set(chosen)) == 32 and chosen[0] == 0 and chosen[-1] == count - 1
        assert max(b - a for a, b in zip(chosen, chosen[1:], strict=False)) <= -(-count // 31)


def test_training_keeps_lines_that_were_held_out(base: Base, tmp_path: Path) -> None:
    data = written(tmp_path / "data.jsonl", lines(12))
    adapter = load_adapter(trained(base, tmp_path, data, eval_fraction=0.25))
    assert len(adapter.probes) == 3 and all(probe in lines(12) for probe in adapter.probes)
    everywhere = load_adapter(trained(base, tmp_path, data))
    assert list(everywhere.probes) == lines(12) != list(adapter.probes)
    few = load_adapter(trained(base, tmp_path, [data, data], probes=3))  # the file twice: its lines are not
    assert list(few.probes) == [lines(12)[0], lines(12)[-1]]
    assert load_adapter(trained(base, tmp_path, lines(40))).probes == tuple(lines(40)[i] for i in spread(40))


def test_training_keeps_none_where_none_are_wanted(base: Base, tmp_path: Path) -> None:
    folder = trained(base, tmp_path, lines(4), probes=0)
    assert load_adapter(folder).probes == () and not (folder / "probes.jsonl").exists()
    for count in (-1, 33):
        with pytest.raises(InputError, match=f"probes is {count}; it must be at least 0 and below 33"):
            replace(SETTINGS, probes=count)


def test_they_are_training_data_and_the_tokens_of_it(base: Base, tmp_path: Path) -> None:
    adapter = load_adapter(trained(base, tmp_path, lines(6)))
    assert adapter.training["data"]["chat_template"] is bool(base.tokenizer.chat_template)
    again = load_adapter(trained(base, tmp_path, tmp_path / "adapter" / "probes.jsonl"))
    assert again.probes == adapter.probes and again.digest == adapter.digest
    examples = probe_examples(base, adapter)
    assert base.tokenizer.decode(examples[2].input_ids[: examples[2].prompt_length]).endswith("what is 2?")
    assert examples[2].input_ids[-1] == base.tokenizer.eos_token_id


def test_saving_an_adapter_again_keeps_them(base: Base, tmp_path: Path) -> None:
    folder = trained(base, tmp_path, lines(5))
    adapter = load_adapter(folder)
    save_adapter(adapter, tmp_path / "again")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    save_adapter(replace(adapter, probes=()), tmp_path / "none")
    assert replace(adapter, probes=()).digest == adapter.digest
    assert {path.name for path in (tmp_path / "none").iterdir()} == {"adapter.json", "adapter.safetensors"}


def test_a_classifiers_probes_are_texts_and_labels(tmp_path: Path) -> None:
    encoder = load_base(tiny_encoders.save_base(tmp_path / "base"))
    records = [{"text": f"gentle {i}", "text_pair": "other", "label": i % 3} for i in range(6)]
    adapter = load_adapter(trained(encoder, tmp_path, written(tmp_path / "moods.jsonl", records), positions="f1"))
    assert list(adapter.probes) == records
    assert [example.label for example in probe_examples(encoder, adapter)] == [0, 1, 2, 0, 1, 2]
    with pytest.raises(AdapterError, match="probe 1 has completion, prompt, expected text and label"):
        replace(adapter, probes=tuple(lines(1)))


@pytest.fixture
def base_folder(base: Base, tmp_path: Path) -> Path:
    save_base(base, tmp_path / "base")
    return tmp_path / "base"


def given(adapter: Path, base_folder: Path, output: Path, probes: Path, request: Request = Request()) -> tuple[str, ...]:
    return import_adapter(adapter, str(base_folder), output, request, probes=probes, report=lambda _: None).notes


def test_an_adapter_is_given_others(base_folder: Path, tmp_path: Path) -> None:
    adapter = trained(load_base(base_folder), tmp_path, lines(5))
    notes = given(adapter, base_folder, tmp_path / "new", written(tmp_path / "p.jsonl", lines(40)))
    assert notes == (f"32 of the 40 lines of {tmp_path / 'p.jsonl'} are its probes, spread over the file",)
    new, old = load_adapter(tmp_path / "new"), load_adapter(adapter)
    assert len(new.probes) == 32 and new.digest == old.digest and new.training == old.training
    with pytest.raises(InputError, match="give it other probes with --probes"):
        import_adapter(adapter, str(base_folder), tmp_path / "no", report=lambda _: None)
    with pytest.raises(InputError, match="an adapter of this project, which records its positions; leave --positions out"):
        given(adapter, base_folder, tmp_path / "no", tmp_path / "p.jsonl", Request(positions="f1"))


BAD = {
    "a classifier's": ('{"text": "a", "label": 0}', r"p.jsonl:1: has unknown keys \['label'\]; .* labelled texts are a classifier's"),
    "no completion": ('{"prompt": "a"}', r"p.jsonl:1: lacks \['completion'\]"),
    "an empty completion": ('{"prompt": "a", "completion": " "}', "p.jsonl:1: completion is empty"),
    "not JSON": ("prompt: a", "p.jsonl:1: not JSON"),
    "too long": (json.dumps({"prompt": "a" * 300, "completion": "b"}), "p.jsonl:1: the prompt has 3.. tokens"),
    "nothing": ("\n\n", "p.jsonl has no examples"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_refused(case: str, base_folder: Path, tmp_path: Path) -> None:
    content, match = BAD[case]
    adapter = trained(load_base(base_folder), tmp_path, lines(2))
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(InputError, match=match) as caught:
        given(adapter, base_folder, tmp_path / "new", tmp_path / "p.jsonl")
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()
    assert before == {path.name: path.read_bytes() for path in adapter.iterdir()}
    with pytest.raises(InputError, match="is not a file"):
        given(adapter, base_folder, tmp_path / "new", tmp_path / "absent.jsonl")


def resealed(folder: Path, content: bytes, count: int) -> Path:
    """The file as somebody edits it, with a hash that fits."""
    (folder / "probes.jsonl").write_bytes(content)
    probes = {"count": count, "sha256": hashlib.sha256(content).hexdigest()}
    reseal(folder, lambda config: config.update(probes=probes))
    return folder


def test_a_damaged_file_is_refused(base: Base, tmp_path: Path) -> None:
    folder = trained(base, tmp_path, lines(3))
    whole = (folder / "probes.jsonl").read_bytes()
    assert read_probes(whole, "x") == load_adapter(folder).probes and probes_bytes(load_adapter(folder).probes) == whole
    for content, count, match in (
        (whole, 2, "has 3 lines, expected 2"),
        (b"[1]\n", 1, "probes.jsonl:1 holds a list"),
        (b"{\n", 1, "probes.jsonl:1 is not JSON"),
        (b"\xff\n", 1, "probes.jsonl:1 is not JSON"),
        (b'{"prompt": "a", "prompt": "b", "completion": "c"}\n', 1, "probes.jsonl:1 is not JSON"),
        (whole * 11, 33, "33 probes, expected at most 32"),
        (b'{"prompt": "a"}\n', 1, "probe 1 has prompt, expected prompt and completion, messages, or text"),
    ):
        with pytest.raises(AdapterError, match=match):
            load_adapter(resealed(folder, content, count))
    (folder / "probes.jsonl").write_bytes(whole)
    with pytest.raises(AdapterError, match="does not match its sha256"):
        load_adapter(folder)
    (folder / "probes.jsonl").unlink()
    with pytest.raises(AdapterError, match="probes.jsonl cannot be read"):
        load_adapter(folder)


def test_probes_that_the_tokenizer_refuses_are_said_to_be_the_adapters(base: Base, tmp_path: Path) -> None:
    adapter = replace(load_adapter(trained(base, tmp_path, lines(2))), probes=({"prompt": 3, "completion": "x"},))
    with pytest.raises(ReftError, match=r"probes do not fit this base: data\[0\]: prompt is int.* --probes"):
        probe_examples(base, adapter)
