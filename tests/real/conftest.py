"""Real models: one story of SmolLM2 for every test, and a bundle of it with three adapters, two of them added."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from real_story import Real, cli, gguf

from reft_export.adding.add import add_adapter
from reft_export.base.load import load_base
from reft_export.quickstart import upper
from reft_export.training.settings import TrainSettings
from reft_export.training.trainer import train

HERE = Path(__file__).parent
SENTIMENT = TrainSettings(rank=1, layers="10", positions="l1", lr=4e-3, max_steps=16, batch_size=4, samples=0, seed=1)
AS_JSON = TrainSettings(rank=8, layers="4;18", positions="all", lr=2e-3, max_steps=16, batch_size=4, samples=0, seed=2)


@pytest.fixture(scope="session")
def stage(request: pytest.FixtureRequest):
    """Says what a stage took, whatever is captured: the figures are what one looks for where the time is short."""
    manager = request.config.pluginmanager.getplugin("capturemanager")

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        with manager.global_and_fixture_disabled():
            print(f"\n{name}: {time.monotonic() - started:.1f} s", flush=True)

    return timed


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory, stage) -> Real:
    model, folder = gguf("smollm2"), tmp_path_factory.mktemp("smollm2")
    with stage("quickstart --model smollm2"):
        told = cli("quickstart", "--model", model, "-o", folder / "story", cwd=folder)
    assert told.returncode == 0, told.stderr[-3000:]
    (folder / "story" / "stages.txt").write_text(told.stderr)
    base, adapters = load_base(str(model), require_tokenizer=True), {"upper": folder / "story" / "upper"}
    data = {"sentiment": HERE / "sentiment.jsonl", "json": folder / "json.jsonl"}
    lines = ({"prompt": e["prompt"], "completion": json.dumps({"answer": e["completion"].capitalize()})} for e in upper.training_examples())
    data["json"].write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, settings in (("sentiment", SENTIMENT), ("json", AS_JSON)):
        with stage(f"training {name}, {settings.max_steps} steps"):
            train(base, data[name], settings, folder / name)
        adapters[name] = folder / name
    with stage("adding two adapters, held against eager"):
        added = add_adapter(
            folder / "story" / "fp32",
            [adapters["sentiment"], adapters["json"]],
            model=str(model),
            output=folder / "three",
            report=lambda _: None,
        )
    assert added.parity is not None and added.parity.passed
    return Real(model=model, base=base, folder=folder / "story", bundle=folder / "three", adapters=adapters)
