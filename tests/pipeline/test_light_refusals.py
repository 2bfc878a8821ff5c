"""What is refused before any work is refused without the frameworks that the work needs, whose import takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir

PROGRAM = """
import json, sys
from reft_export.cli.main import app
for words, heavy in json.loads(sys.argv[1]):
    try:
        app(words)
    except SystemExit as e:
        assert e.code in (2, 4), (words, e.code)
    found = set(heavy) & set(sys.modules)
    assert not found, (words, found)
"""
HEAVY = ["torch", "transformers", "onnxruntime"]


def test_refusals_need_no_framework(bundle_folder, base_folder, tmp_path: Path) -> None:
    """All in one process: what one refusal brought in would be seen at the next."""
    base, taken = str(base_folder("llama")), tmp_path / "taken"
    taken.mkdir()
    (taken / "own.txt").touch()
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="no decoder")
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "no-decoder.onnx")
    bundle, quantized, to = (str(bundle_folder("llama")), str(bundle_folder("llama", "int4")), ["-o", str(tmp_path / "o")])
    refused = [
        ["quantize", str(tmp_path / "missing"), "-m", base, *to],
        ["quantize", bundle, "-m", base, "-o", str(taken)],
        ["quantize", quantized, "-m", base, *to],
        ["quantize", bundle, "-m", base, "--scheme", "static", *to],
        ["quantize", bundle, "-m", base, "--refit", str(data), *to],
        ["quantize", quantized, "-m", base, "-a", str(tmp_path / "missing"), *to],
        ["train", "-m", base, "-d", str(tmp_path / "missing.jsonl"), *to],
        ["import", str(taken), "-m", base, *to],
        ["import", str(tmp_path / "missing"), "-m", base, *to],
        ["fold", str(tmp_path / "missing.onnx"), *to],
        ["fold", str(tmp_path / "no-decoder.onnx"), "-m", base, *to],
        ["build", str(tmp_path / "missing"), "--target", "tensorrt", *to],
        ["build", bundle, "--target", "tensorrt", "--freeze", "nobody", "--dry-run", *to],
    ]
    reads_adapters = HEAVY[:2]  # onnxruntime's own files, which onnxruntime reads
    steps = [(words, reads_adapters if words[0] == "build" else HEAVY) for words in refused]
    done = subprocess.run([sys.executable, "-c", PROGRAM, json.dumps(steps)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stderr.count("error: ") == len(refused), done.stderr
