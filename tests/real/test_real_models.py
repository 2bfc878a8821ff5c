"""SmolLM2-135M-Instruct and Gemma 3 270M through the verbs and stock runtimes, against plain hooks in eager PyTorch: `make test-real`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from plain_hooks import Answer, greedy
from real_story import ROOT, Real, cli, gguf

from reft_export.quickstart import upper
from runtimes.artifacts.bundle import open_bundle
from runtimes.batching import Batcher
from runtimes.generation import GenerationSettings, greedy_tokens
from runtimes.open import open_bank, open_session
from runtimes.rows import AdapterRows
from runtimes.text.tokenizer import Tokenizer

pytestmark = pytest.mark.real

PROMPTS = (*upper.held_out_prompts()[:3], "Is this review positive or negative? The soup was cold and the waiter laughed at us.")
TOKENS = 16


def rendered(real: Real, prompt: str) -> str:
    return real.base.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)


def encoded(real: Real, prompt: str) -> list[int]:
    return real.base.tokenizer(rendered(real, prompt), add_special_tokens=False)["input_ids"]


def agrees(tokens: list[int], wanted: Answer) -> bool:
    return tokens[: wanted.certain] == list(wanted.tokens[: wanted.certain])


@pytest.mark.parametrize("name", [None, "upper", "sentiment", "json"])
def test_greedy_answers_are_those_of_plain_hooks(name, smollm2: Real) -> None:
    prompts = [encoded(smollm2, prompt) for prompt in PROMPTS]
    wanted = greedy(smollm2.base.model, prompts, TOKENS, None if name is None else smollm2.adapters[name])
    with open_session(open_bundle(smollm2.bundle), adapter=name) as session:
        found = greedy_tokens(session, prompts, TOKENS).tolist()
    assert all(map(agrees, found, wanted)) and sum(answer.certain for answer in wanted) > TOKENS
    if name is not None:  # it steers
        base = greedy(smollm2.base.model, prompts, TOKENS, None)
        assert [a.tokens for a in base] != [a.tokens for a in wanted]


def test_a_wrong_edit_is_seen(smollm2: Real) -> None:
    """The comparison's own proof: another adapter's answers are not taken for these."""
    prompts = [encoded(smollm2, prompt) for prompt in PROMPTS]
    wanted = greedy(smollm2.base.model, prompts, TOKENS, smollm2.adapters["json"])
    with open_session(open_bundle(smollm2.bundle), adapter="upper") as session:
        found = greedy_tokens(session, prompts, TOKENS).tolist()
    assert not all(map(agrees, found, wanted))


def test_a_batch_of_every_adapter_answers_as_plain_hooks(smollm2: Real) -> None:
    names = [None, *smollm2.adapters]
    prompts = [encoded(smollm2, PROMPTS[row % len(PROMPTS)]) for row in range(len(names))]
    wanted = [
        greedy(smollm2.base.model, [prompt], TOKENS, None if name is None else smollm2.adapters[name])[0]
        for prompt, name in zip(prompts, names, strict=True)
    ]
    bundle = open_bundle(smollm2.bundle)
    with open_session(bundle) as session:
        for shift in (0, 1):  # the second time every row has another's adapter
            with AdapterRows(open_bank(bundle), names[shift:] + names[:shift]) as rows:
                session.set_rows(rows)
                found = greedy_tokens(session, prompts, TOKENS).tolist()
            assert all(map(agrees, found, wanted)) == (shift == 0)
        tokenizer = Tokenizer.load(bundle.folder, bundle.manifest.model)
        endless = replace(tokenizer, stop_token_ids=frozenset())
        batcher = Batcher(session, endless, open_bank(bundle), most_rows=3, prefill_chunk=7)
        tickets = []
        for prompt, name in zip(prompts, names, strict=True):  # they join while others are decoded, and the last one waits for a row
            tickets.append(batcher.submit(prompt, GenerationSettings(max_new_tokens=TOKENS), adapter=name))
            batcher.step()
        while batcher.step():
            pass
        assert all(agrees(list(ticket.result(0).tokens), each) for ticket, each in zip(tickets, wanted, strict=True))
        batcher.close()


def test_the_story_leaves_what_it_tells_of(smollm2: Real) -> None:
    for name in ("fp32", "int8"):
        bundle = open_bundle(smollm2.folder / name)
        assert bundle.adapter_names == ("upper",) and (bundle.manifest.quantization is None) == (name == "fp32")
    page = (smollm2.folder / "report.html").read_text()
    assert "is in upper case" in page and ((smollm2.folder / "int4").is_dir() or "No int4 bundle" in page)


def test_run(smollm2: Real, stage) -> None:
    with stage("run, int8"):
        done = cli("run", smollm2.folder / "int8", "-a", "upper", "-p", "What is the capital of France?", "-n", 16, "--json", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert upper.in_upper_case(json.loads(done.stdout)["text"])


@pytest.mark.parametrize("bundle", ["three", "int8"])
def test_parity(bundle, smollm2: Real, stage) -> None:
    with stage(f"parity, {bundle}"):
        done = cli("parity", smollm2.bundle if bundle == "three" else smollm2.folder / bundle, "--json", cwd=ROOT)
    assert done.returncode == 0 and json.loads(done.stdout)["passed"], done.stderr


def test_bench(smollm2: Real, stage) -> None:
    with stage("bench, int8"):
        options = ("-a", "upper", "--prompt-tokens", 64, "--new-tokens", 8, "--repeats", 2, "--json")
        done = cli("bench", smollm2.folder / "int8", *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["prompt_tokens"] == 64


@pytest.mark.parametrize("runtime", ["stock_onnxruntime.py", "stock_genai.py"])
def test_a_stock_runtime_says_the_same(runtime, smollm2: Real, request: pytest.FixtureRequest, stage) -> None:
    """The base and every adapter, on one prompt, by the programs of examples/."""
    if "genai" in runtime:
        request.getfixturevalue("genai_installed")
    prompt = "What is the capital of Portugal?"
    with stage(runtime):
        command = [sys.executable, str(ROOT / "examples" / runtime), str(smollm2.bundle), rendered(smollm2, prompt)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    parts = re.split(r"(?m)^(base|upper|sentiment|json): ", done.stdout)[1:]
    said = dict(zip(parts[::2], parts[1::2], strict=True))
    assert set(said) == {"base", *smollm2.adapters}
    for name, text in said.items():
        (wanted,) = greedy(smollm2.base.model, [encoded(smollm2, prompt)], TOKENS, smollm2.adapters.get(name))
        tokens = list(wanted.tokens[: wanted.certain])
        end = smollm2.base.tokenizer.eos_token_id
        tokens = tokens[: tokens.index(end)] if end in tokens else tokens
        assert text.startswith(smollm2.base.tokenizer.decode(tokens)), name


def test_gemma3_is_exported_and_runs(tmp_path: Path, stage) -> None:
    with stage("export, gemma3"):
        done = cli("export", "-m", gguf("gemma3"), "-o", tmp_path / "gemma3", "--sites", "8", cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    with stage("run, gemma3"):
        done = cli("run", tmp_path / "gemma3", "-p", "The capital of France is", "-n", 4, "--json", cwd=ROOT)
    assert done.returncode == 0 and json.loads(done.stdout)["tokens"] == 4, done.stdout + done.stderr
    with stage("parity, gemma3"):
        done = cli("parity", tmp_path / "gemma3", "--json", cwd=ROOT)
    assert done.returncode == 0 and json.loads(done.stdout)["passed"], done.stderr
