"""The figures of many adapters beside llama.cpp: the LoRA files that it is given, how rounds become a table, and what stops a run."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from evidence.lora_gguf import write_lora
from evidence.many_adapters_bench import Round, Worker, hold_equal, hold_others, table

ANSWERS = ((1, 2, 3, 4), (5, 6, 7, 8))


def _base(path: Path) -> gguf.GGUFReader:
    writer = gguf.GGUFWriter(path, "llama")
    for name, shape in {"attn_q": (12, 8), "attn_k": (4, 8), "attn_v": (4, 8)}.items():
        for layer in range(2):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(path)


def test_a_lora_file_holds_both_halves_of_every_weight_as_llama_cpp_names_them(tmp_path: Path) -> None:
    base = _base(tmp_path / "base.gguf")
    first, again, other = (
        gguf.GGUFReader(write_lora(tmp_path / f"{name}.gguf", base, rank=3, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    keys = {key: first.fields[key].contents() for key in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")}
    assert keys == {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 3}
    expected = {}
    for layer in range(2):
        for name, high in (("attn_q", 12), ("attn_v", 4)):
            expected |= {f"blk.{layer}.{name}.weight.lora_a": (3, 8), f"blk.{layer}.{name}.weight.lora_b": (high, 3)}
    tensors = [{tensor.name: np.asarray(tensor.data) for tensor in reader.tensors} for reader in (first, again, other)]
    assert {name: values.shape for name, values in tensors[0].items()} == expected
    assert all(values.dtype == np.float32 and values.any() for values in tensors[0].values())
    for name, values in tensors[0].items():
        assert np.array_equal(values, tensors[1][name]) and not np.array_equal(values, tensors[2][name])


def _round(seconds: float, *steps: float) -> Round:
    return Round(seconds=seconds, steps=steps, answers=ANSWERS)


def test_a_line_is_of_medians_and_its_ratio_of_each_rounds_own() -> None:
    one = [_round(1.0, 10.0, 12.0), _round(2.0, 11.0), _round(4.0, 30.0)]
    two = [_round(4.0, 5.0, 5.5), _round(4.0, 6.0), _round(4.0, 4.0)]
    assert table({"all": one, "each": two}, {"all": 2, "each": 1}) == [
        "| all | 4 (2 to 8) | 1.00 | 11.5 | 12 |",
        "| each | 2 (2 to 2) | 2.00 | 5.2 | 10 |",
    ]


def test_answers_that_are_not_what_they_should_be_stop_the_run() -> None:
    one, other = _round(1.0), Round(seconds=1.0, steps=(), answers=(ANSWERS[0], (5, 6, 7, 9)))
    hold_equal("one and one", one, one)
    with pytest.raises(SystemExit, match=r"one and other: the answers of requests \[1\] differ"):
        hold_equal("one and other", one, other)
    with pytest.raises(SystemExit, match=r"one and other: the answers of requests \[0\] are the same"):
        hold_others("one and other", one, other)
    hold_others("one and none", one, Round(seconds=1.0, steps=(), answers=((), ())))


def test_a_process_that_ends_is_said_to_have(tmp_path: Path) -> None:
    worker = Worker(["cat"])
    worker.write("a line")
    assert worker.read() == "a line\n"
    worker.close()
    ended = Worker(["false"])
    with pytest.raises(SystemExit, match="false ended with 1 before it answered"):
        ended.read()
    ended.close()
