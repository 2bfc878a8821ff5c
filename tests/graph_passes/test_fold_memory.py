"""``fold`` holds no weights in memory, and no deep-learning framework."""

from __future__ import annotations

import subprocess
import sys

import onnx_ir as ir
import pytest
from small_decoders import WIDTH, small_decoder

FOLD_SCRIPT = """
import sys
from reft_export.cli.main import app
from runtimes.bench import peak_memory
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end
print(peak_memory())  # not getrusage, which counts the pytest process that this one was forked from
"""


@pytest.mark.slow
def test_folding_reads_no_weights(tmp_path) -> None:
    """0.4 GB in the graph, less than 0.3 GB in all for `fold`, Python and its packages included: weights go from file to file.

    2.3 GB take the same 0.13 GB (docs/benchmarks.md).
    """
    rows = 400_000_000 // (4 * WIDTH)
    model = small_decoder()
    table = next(node for node in model.graph if node.op_type == "Gather").inputs[0]
    (tmp_path / "graph").mkdir()
    with (tmp_path / "graph" / "decoder.data").open("wb") as file:
        file.write(table.const_value.tobytes())  # rows of zeros alone would be a decoder that says one thing of all tokens
        file.truncate(rows * WIDTH * 4)
    table.shape = ir.Shape([rows, WIDTH])
    table.const_value = ir.ExternalTensor(
        "decoder.data", 0, rows * WIDTH * 4, table.dtype, shape=table.shape, name=table.name, base_dir=tmp_path / "graph"
    )
    ir.save(model, tmp_path / "graph" / "decoder.onnx")
    command = [sys.executable, "-c", FOLD_SCRIPT, "fold", str(tmp_path / "graph"), "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size >= 400_000_000
    peak = int(done.stdout.split()[-1])
    assert peak < 0.3e9, f"{peak / 1e9:.2f} GB"
