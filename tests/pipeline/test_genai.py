"""Stock onnxruntime-genai opens our folders and swaps our adapters, with the same tokens as our own session."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiers import slow_and_long

from runtimes.artifacts.bundle import Bundle, open_bundle
from runtimes.generation import greedy_tokens
from runtimes.ort.session import OrtSession

SCRIPT = """
import json, sys, numpy as np, onnxruntime_genai as og
folder, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(folder)
adapters = og.Adapters(model)
answers = {}
for name in (None, *sys.argv[4:]):
    if name:
        adapters.load(f"{folder}/adapters/{name}.onnx_adapter", name)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + count, do_sample=False)
    generator = og.Generator(model, parameters)
    if name:
        generator.set_active_adapter(adapters, name)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    answers[name or "base"] = [int(t) for t in generator.get_sequence(0)][len(prompt):]
print(json.dumps(answers))
"""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("genai") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    install = [folder / "bin" / "python", "-m", "pip", "-q", "install", "onnxruntime==1.31.1", "onnxruntime-genai==0.18.0", "numpy"]
    subprocess.run([str(part) for part in install], check=True, capture_output=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("family", slow_and_long(FAMILIES, "llama", "qwen3", "gemma2", "phi3"))
def test_stock_genai_steers(family, python, bundle_folder) -> None:
    answers = check_stock_genai(open_bundle(bundle_folder(family)), python)
    assert len({tuple(a) for a in answers.values()}) > 1


def check_stock_genai(bundle: Bundle, python: Path) -> dict[str, list[int]]:
    """The tokens that onnxruntime-genai generates for the base and every adapter, which are those of our own session."""
    assert bundle.manifest.genai == "supported"
    prompt = np.random.default_rng(1).integers(0, 250, 9).tolist()
    command = [str(python), "-c", SCRIPT, str(bundle.folder), json.dumps(prompt), "16", *bundle.adapter_names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    session = OrtSession(bundle, threads=1)
    for name in (None, *bundle.adapter_names):
        session.set_adapter(name)
        ours = greedy_tokens(session, [prompt], 16)[0].tolist()
        theirs = answers[name or "base"]
        # genai stops at an end token; ours goes on.
        assert theirs == ours[: len(theirs)] and theirs, name
    return answers
