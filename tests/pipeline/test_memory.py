"""A 1B-parameter decoder exports and folds in under 8 GB."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from pathlib import Path
from transformers import AutoConfig, AutoModelForCausalLM
from graph_passes.external import write_graph
from graph_passes.fold import fold_graph
from reft_export.base import load_base
from reft_export.exporters.dynamo import export_dynamo
from runtimes.edit import Site
from runtimes.op import EditNode

if sys.argv[1] == "make":
    config = AutoConfig.for_model(
        "llama", vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=20, num_attention_heads=16,
        num_key_value_heads=8, tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    print(sum(p.numel() for p in model.parameters()))
    model = model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.normal_(0, 0.02)
    model.save_pretrained(sys.argv[2])
else:
    base = load_base(sys.argv[2])
    exported = export_dynamo(base.model)
    fold_graph(exported.model, [EditNode(site=Site(layer=i)) for i in range(20)])
    write_graph(exported.model, Path(sys.argv[3]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_one_billion_parameters(tmp_path) -> None:
    def run(*arguments: object) -> int:
        done = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout.split()[-1])

    assert run("make", tmp_path / "base") > 1.0e9
    peak = run("export", tmp_path / "base", tmp_path / "graph")
    assert (tmp_path / "graph" / "model.onnx.data").stat().st_size > 4.0e9
    assert peak < 8e9, f"{peak / 1e9:.2f} GB"
