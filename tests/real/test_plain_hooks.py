"""The reference of the tests on real models, itself held against the product's steering on a tiny base."""

from __future__ import annotations

import pytest
import tiny
from plain_hooks import greedy

from reft_export.base.load import load_base
from reft_export.eager.steering import steerers_of
from reft_export.tasks.generation import eager_greedy, golden_inputs
from runtimes.edits.adapter import save_adapter

PROMPTS = [[5, 9, 40, 7, 8, 11, 3], [1, 2, 3], [90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 100]]


@pytest.mark.parametrize("positions", ["f2+l2", "l1", "f3", "all"])
def test_greedy_answers_are_those_of_the_steering(positions, tmp_path) -> None:
    base = load_base(tiny.save_base(tmp_path / "base", "llama"))
    adapter = tiny.random_adapter(base.info, layers=(0, 2), positions=positions)
    save_adapter(adapter, tmp_path / "adapter")
    inputs = golden_inputs(base.model, PROMPTS, max_tokens=8)
    for folder, steerer in ((None, None), (tmp_path / "adapter", steerers_of({"a": adapter})["a"])):
        wanted = eager_greedy(base.model, {"it": (inputs, steerer)}, max_tokens=8)["it"]
        found = greedy(base.model, PROMPTS, 8, folder)
        assert all(list(f.tokens[: f.certain]) == w[: f.certain].tolist() for f, w in zip(found, wanted, strict=True))
        assert sum(f.certain for f in found) > 12
