"""The script behind docs/quantization-quality.md makes bundles of every kind of scheme, and measures the graph that ships."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from evidence import quality, review_text
from models.bases import save_base

from reft_export.base.load import load_base
from reft_export.exporting.export import ExportSettings, export_bundle

TEXTS = [
    f"{name} went to the {place} and told us {what} about it."
    for name in ("Ann", "Bob")
    for place in ("sea", "fair")
    for what in ("all", "naught")
]
ROWS = ("fp32", "int8", "int4 32", "int4 32 + int8, 102 MB", "static", "fp8")


@pytest.mark.slow
def test_rows_are_measured_on_the_bundles_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base, bundle, out = tmp_path / "base", tmp_path / "fp32", tmp_path / "out"
    save_base(base, "llama")
    export_bundle(str(base), [], bundle, ExportSettings())
    monkeypatch.setattr(review_text, "sentences", lambda _, count: (TEXTS * (1 + count // len(TEXTS)))[:count])
    arguments = ["make", str(bundle), str(base), str(out), "--sentences", "8", *(word for row in ROWS for word in ("--only", row))]
    quality.main(arguments)
    rows = quality.kept(out)
    assert tuple(sorted(rows)) == tuple(sorted(ROWS))
    loaded, nats, tokens = load_base(str(base), require_tokenizer=True), 0.0, 0
    for row in quality.token_rows(bundle, tmp_path, 8):
        ids = torch.tensor([row])
        with torch.no_grad():
            said = torch.log_softmax(loaded.model(ids).logits[0, :-1].double(), -1)
        nats, tokens = nats - float(said.gather(1, ids[0, 1:, None]).sum()), tokens + len(row) - 1
    assert rows["fp32"].tokens == tokens
    assert math.isclose(rows["fp32"].nats, nats / tokens, rel_tol=1e-5)
    assert rows["int4 32"].bytes < rows["int4 32 + int8, 102 MB"].bytes < rows["fp32"].bytes
    assert rows["fp8"].decode_ms is None and rows["static"].decode_ms is not None
    assert math.isclose(rows["int8"].nats, rows["fp32"].nats, rel_tol=0.02)
    capsys.readouterr()
    quality.main(arguments)
    assert capsys.readouterr().out == "", "a row that is there is not measured again"
    assert {path.name for path in out.iterdir()} == {"rows.jsonl", "calibration.jsonl", "sensitivities-32.json"}
