"""Parquet files and Hugging Face's data sets are read as the JSON lines that they hold, and refused in one line where they are damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from reft_export.training.data import load_data
from reft_export.training.sources import Source, check_source
from runtimes.errors import BackendUnavailable, InputError

datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
CHAT = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
RECORDS: list[dict[str, Any]] = [
    {"prompt": "ab", "completion": "cd"},
    {"instruction": "say", "input": "x", "output": "y"},
    {"text": "a few words"},
    {"messages": CHAT},
]


@pytest.fixture
def rows() -> Any:
    """One column a key, null where a row has none, as a table of mixed forms has."""
    keys = {key: None for record in RECORDS for key in record}
    return datasets.Dataset.from_list([keys | record for record in RECORDS])


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line.raw) for line in Source(path).lines()]


def test_rows_are_the_lines_that_they_hold(tmp_path: Path, rows: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    parquet, folder, jsonl = tmp_path / "d.parquet", tmp_path / "saved", tmp_path / "d.jsonl"
    rows.to_parquet(str(parquet))
    rows.save_to_disk(str(folder))
    jsonl.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert lines_of(parquet) == lines_of(folder) == RECORDS
    mixed = load_data([jsonl, parquet, folder], tokenizer, max_length=64)
    first, second, third = (mixed.examples[start : start + 4] for start in (0, 4, 8))
    assert [e.input_ids for e in first] == [e.input_ids for e in second] == [e.input_ids for e in third]
    assert [e.where for e in mixed.examples[3:5]] == [f"{jsonl}:4", f"{parquet}[0]"]
    assert [each.file for each in mixed.files] == ["d.jsonl", "d.parquet", "saved"]
    assert mixed.files[1].sha256 == mixed.files[2].sha256 == load_data(RECORDS, tokenizer, max_length=64).files[0].sha256


def test_refusals(tmp_path: Path, rows: Any, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet, folder = tmp_path / "d.parquet", tmp_path / "saved"
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(folder))
    with pytest.raises(InputError, match=r"saved holds several splits; name one of them: .*saved/test, .*saved/train$"):
        check_source(folder)
    assert lines_of(folder / "train") == RECORDS
    next((folder / "train").glob("*.arrow")).write_bytes(b"not arrow")
    parquet.write_bytes(b"PAR1 not parquet")
    (tmp_path / "empty").mkdir()
    for path, said in (
        (folder / "train", "train is no data set that can be read: "),
        (parquet, "d.parquet is no Parquet file that can be read: "),
        (tmp_path / "empty", "empty is a folder without state.json, which save_to_disk of datasets writes"),
        (tmp_path / "no.parquet", "no.parquet is not a file; training data is a JSONL or Parquet file"),
    ):
        with pytest.raises(InputError) as refused:
            lines_of(path)
        assert said in str(refused.value) and "\n" not in str(refused.value)
    datasets.Dataset.from_list([{"prompt": "a", "answer": "b"}]).to_parquet(str(parquet))
    with pytest.raises(InputError, match=r"d.parquet\[0\]: lacks \['completion'\] and has unknown keys \['answer'\]; expected"):
        load_data(parquet, tokenizer, max_length=64)
    monkeypatch.setattr("reft_export.training.sources.find_spec", lambda name: None)
    for path, library in ((parquet, "pyarrow"), (folder / "test", "datasets")):
        with pytest.raises(
            BackendUnavailable, match=rf"needs {library} to be read; pip install 'reft-export\[data\]', or save it as JSONL"
        ):
            check_source(path)
