"""Ranges are those of the edits at work, however often the run was stopped; what does not fit is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration import collect as collect_module
from calibration.activations import from_range
from calibration.collect import expose_inputs, product_inputs
from calibration.collected import Collected, load_collected
from calibration.observers import Observer
from calibration.products import activation_quantization
from calibration.settings import settings_for
from graph_passes.external import load_graph
from reft_export.base.load import load_base, load_tokenizer
from reft_export.eager.banks import bank_steerer
from reft_export.eager.steering import greedy_tokens
from reft_export.quantizing import calibrate as module
from reft_export.quantizing.calibrate import steered_ranges
from reft_export.quantizing.quantize import quantize_bundle
from reft_export.quantizing.settings import CalibrationRequest
from reft_export.training.data import iter_examples
from runtimes.artifacts.bundle import open_bundle
from runtimes.errors import AdapterError, CalibrationError

STATIC = settings_for("static")
QUIET = {"report": lambda _: None}


def collected_at(output: Path) -> Collected:
    return load_collected(output.with_name(f"{output.name}.calibration"))


def ranges_of(source: Path, base: str, output: Path, request: CalibrationRequest):
    return steered_ranges(open_bundle(source), STATIC, base, output, request, lambda _: None)[0]


def eager_ranges(base: str, bundle_path: Path, prompts: Path, names: list[str | None], tokens: int) -> dict[str, tuple[float, float]]:
    """(lowest, highest) input of every linear module, by hooks, over the same prompts and greedy tokens."""
    model, bundle = load_base(base).model, open_bundle(bundle_path)
    seen: dict[str, tuple[float, float]] = {}

    def hook(name: str):
        def see(_, arguments) -> None:
            low, high = seen.get(name, (np.inf, -np.inf))
            seen[name] = (min(low, float(arguments[0].min())), max(high, float(arguments[0].max())))

        return see

    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_pre_hook(hook(f"{name}.weight"))
    ends = bundle.manifest.model.eos_token_ids
    for example in iter_examples(prompts, load_tokenizer(Path(base)), max_length=400):
        ids = torch.tensor([example.input_ids[: example.prompt_length]])
        for name in names:
            if name is None:
                greedy_tokens(model, ids, None, tokens + 1, eos=ends)
            else:
                with bank_steerer(bundle, name)(model) as steering:
                    greedy_tokens(model, ids, None, tokens + 1, steering=steering, eos=ends)
    return seen


def test_ranges_are_those_of_eager_steering(float_bundle, prompts_file, tmp_path) -> None:
    """Every scale in the shipped graph is the one that hooks in the eager model would choose, layer by layer, prefill and decode."""
    source, base = float_bundle()
    request = CalibrationRequest(data=prompts_file, decode_tokens=5)
    quantize_bundle(source, base, tmp_path / "q", settings_for("static", lm_head=True), calibration=request, **QUIET)
    found = activation_quantization(load_graph(tmp_path / "q" / "model.onnx"))
    eager = eager_ranges(base, source, prompts_file, [None, "untied", "prompt-relu"], 5)
    assert found.keys() == eager.keys() and len(found) == 22
    for name, how in found.items():
        expected = from_range("uint8", *eager[name], np.dtype(np.float32), name)
        assert how.scale == pytest.approx(expected.scale, rel=1e-4), name
        assert abs(how.zero_point - expected.zero_point) <= 1, name
    record = open_bundle(tmp_path / "q").manifest.quantization.calibration
    assert record.graph == open_bundle(source).digest and record.ranges == collected_at(tmp_path / "q").digest()
    assert record.prompts == 8 and record.mixture == pytest.approx({"base": 1 / 3, "untied": 1 / 3, "prompt-relu": 1 / 3})


def test_mixture(float_bundle, prompts_file, tmp_path) -> None:
    """A source with no share leaves no trace; base-only ranges are those of the base."""
    source, base = float_bundle()
    request = CalibrationRequest(data=prompts_file, decode_tokens=3, mixture={"base": 1, "untied": 0})
    only = ranges_of(source, base, tmp_path / "a", request)
    assert collected_at(tmp_path / "a").header.sources == ("base",)
    eager = eager_ranges(base, source, prompts_file, [None], 3)
    widest = max(only.values(), key=lambda r: r[1])
    assert any(widest == pytest.approx(r, rel=1e-3) for r in eager.values())
    steered = ranges_of(source, base, tmp_path / "b", CalibrationRequest(data=prompts_file, decode_tokens=3))
    assert sum(steered[name] != only[name] for name in only) > 6
    assert all(low <= only[name][0] + 1e-6 and high >= only[name][1] - 1e-6 for name, (low, high) in steered.items())


def test_an_interrupted_run_goes_on_and_ends_alike(float_bundle, prompts_file, tmp_path, monkeypatch) -> None:
    source, base = float_bundle()
    request = CalibrationRequest(data=prompts_file, decode_tokens=3)
    whole = ranges_of(source, base, tmp_path / "whole", request)
    right, runs = collect_module._run, []

    def interrupted(session, name, prompt, collected) -> int:
        runs.append(name)
        if len(runs) == 11:  # in the middle of the fourth prompt's three sources
            raise KeyboardInterrupt
        return right(session, name, prompt, collected)

    monkeypatch.setattr(collect_module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(collect_module, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ranges_of(source, base, tmp_path / "cut", request)
    assert collected_at(tmp_path / "cut").header.done == 3
    with pytest.raises(CalibrationError, match="ended after 3 of 8 prompts"):
        ranges_of(source, base, tmp_path / "x", CalibrationRequest(ranges=tmp_path / "cut.calibration"))
    again = ranges_of(source, base, tmp_path / "cut", request)
    assert again == whole and collected_at(tmp_path / "cut").digest() == collected_at(tmp_path / "whole").digest()
    assert len(runs) == 11 + 5 * 3, "the prompts that were in are not run again"
    ranges_of(source, base, tmp_path / "cut", request)
    assert len(runs) == 11 + 5 * 3, "a complete file is not collected again"


def test_report(float_bundle, prompts_file, tmp_path) -> None:
    source, base = float_bundle()
    request = CalibrationRequest(data=prompts_file, decode_tokens=3, observer=Observer(name="percentile", percentile=99.9))
    ranges_of(source, base, tmp_path / "r", request)
    content = json.loads((tmp_path / "r.calibration.json").read_text())
    assert content["observer"] == "percentile 99.9" and len(content["activations"]) == 13
    assert {row["layer"] for row in content["activations"]} == {0, 1, 2, None}
    worst = max(content["activations"], key=lambda row: row["clipped_energy"])
    assert worst["clipped_energy"] > 0.01 and 0 < worst["clipped_values"] < 1 and worst["worst_adapter"] in ("untied", "prompt-relu")
    first = next(r for r in content["activations"] if r["read_by"][0] == "model.layers.0.self_attn.q_proj")
    assert first["widening"] == 1 and first["clipped_values"] < 0.01, "nothing is edited before the first block's output"
    assert (tmp_path / "r.calibration.png").stat().st_size > 10_000


def test_stale_ranges_are_refused(float_bundle, prompts_file, tmp_path) -> None:
    source, base = float_bundle()
    ranges_of(source, base, tmp_path / "r", CalibrationRequest(data=prompts_file, decode_tokens=0))
    file = tmp_path / "r.calibration"
    other, other_base = float_bundle("gpt2")
    again = CalibrationRequest(ranges=file)
    with pytest.raises(CalibrationError, match="ranges of another graph .* they are stale"):
        quantize_bundle(other, other_base, tmp_path / "q", STATIC, calibration=again, **QUIET)
    collected = load_collected(file)
    collected.header = type(collected.header)(**{**vars(collected.header), "adapters": {"untied": "0" * 64}})
    collected.save(tmp_path / "changed")
    with pytest.raises(CalibrationError, match="collected with another adapter untied"):
        quantize_bundle(source, base, tmp_path / "q", STATIC, calibration=CalibrationRequest(ranges=tmp_path / "changed"), **QUIET)
    collected.header = type(collected.header)(**{**vars(collected.header), "adapters": {}, "sources": ("base",)})
    collected.histograms = {"base": collected.histograms["base"]}
    collected.save(tmp_path / "base-only")
    request = CalibrationRequest(ranges=tmp_path / "base-only", mixture={"untied": 1})
    with pytest.raises(CalibrationError, match="were not collected with"):
        quantize_bundle(source, base, tmp_path / "q", STATIC, calibration=request, **QUIET)
    assert not (tmp_path / "q").exists()


def test_bad_input_is_refused_before_any_work(float_bundle, prompts_file, tmp_path, monkeypatch) -> None:
    source, base = float_bundle()
    monkeypatch.setattr(module, "collect", lambda *_, **__: pytest.fail("it was run"))
    empty, broken, long = (tmp_path / f"{name}.jsonl" for name in ("empty", "broken", "long"))
    empty.write_text("\n\n")
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    long.write_text(json.dumps({"prompt": "x" * 600, "completion": "b"}) + "\n")

    def refused(message: str, settings=STATIC, *, base: str = base, error=CalibrationError, **request) -> None:
        def attempt() -> None:
            calibration = CalibrationRequest(**request) if request else None
            quantize_bundle(source, base, tmp_path / "q", settings, calibration=calibration, **QUIET)

        with pytest.raises(error, match=message):
            attempt()
        assert not list(tmp_path.glob("q*"))

    refused("pass --calibrate DATA.jsonl")
    refused("empty.jsonl has no examples", data=empty)
    refused("broken.jsonl:2", data=broken)
    refused("long.jsonl:1: the prompt has 600 tokens", data=long)
    refused("is not a file", data=tmp_path / "none.jsonl")
    refused("is not a calibration file", ranges=prompts_file)
    refused("not both", data=prompts_file, ranges=prompts_file)
    refused("--mixture names 'pirate'", data=prompts_file, mixture={"pirate": 1})
    refused("a share is a number from 0 on", data=prompts_file, mixture={"untied": float("nan")})
    refused("every share is 0", data=prompts_file, mixture={"base": 0})
    refused("takes no activation ranges", settings_for("weight-only"), data=prompts_file)
    refused("pass the base it was made from", base=str(float_bundle("gpt2")[1]), error=AdapterError, data=prompts_file)


def test_activations_that_are_not_finite_are_refused(float_bundle, prompts_file, tmp_path, monkeypatch) -> None:
    source, base = float_bundle()
    monkeypatch.setattr("calibration.collect.to_float32", lambda value: value.numpy() * np.float32(np.nan))
    with pytest.raises(CalibrationError, match=r"activation \S+ of base holds values that are not finite"):
        ranges_of(source, base, tmp_path / "n", CalibrationRequest(data=prompts_file))


def test_what_experts_read_is_not_calibrated(float_bundle) -> None:
    """Weights whose inputs stay in float have no range: of a mixture's experts, some get no token at all."""
    graph = load_graph(float_bundle()[0] / "model.onnx")
    name = "model.layers.1.mlp.down_proj.weight"
    read = next(node.inputs[0].name for node in graph.graph if name in [v.name for v in node.inputs if v is not None])
    assert read in product_inputs(graph)
    assert product_inputs(graph, {name}) == tuple(value for value in product_inputs(graph) if value != read)
    expose_inputs(graph, {name})
    assert read not in {value.name for value in graph.graph.outputs}
