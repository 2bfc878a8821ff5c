"""Adapters from a contrast: what is read, what is measured of it, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_encoders
import torch

from reft_export.base.load import Base, base_from_memory, load_base, load_without_weights
from reft_export.base.token_rules import stop_tokens
from reft_export.contrasting.activations import read_activations
from reft_export.contrasting.passages import Contrast, Reader
from reft_export.contrasting.separability import FOLDS, chosen_layer, separations
from reft_export.contrasting.settings import SteerSettings
from reft_export.contrasting.steer import plan_steering, steer_adapter
from reft_export.contrasting.strengths import StrengthFigures, chosen_strength
from reft_export.eager.steering import site_module, steered
from runtimes.edits.adapter import load_adapter
from runtimes.edits.edit import STREAMS, Site
from runtimes.errors import InputError

GLAD = [{"prompt": f"How is day {n}?", "completion": f"It is glad{'!' * (n % 3 + 1)}"} for n in range(7)]
SAD = [{"prompt": f"How is day {n * n}?", "completion": f"It is a sad one, {n}."} for n in range(5)]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
SITES = tuple(Site(layer=layer, stream=stream) for layer in range(tiny.LAYERS) for stream in STREAMS)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return load_base(tiny.save_base(tmp_path_factory.mktemp("steer") / "base"), require_tokenizer=True)


def reader(base: Base, template: str = "auto") -> Reader:
    return Reader(tokenizer=base.tokenizer, stop=frozenset(stop_tokens(base)), max_length=tiny.CONTEXT, chat_template=template)


def write(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def hidden(base: Base, tokens: tuple[int, ...]) -> list[np.ndarray]:
    """transformers' own hidden_states of one line without pads: [0] the embedding, [i + 1] behind block i."""
    with torch.no_grad():
        found = base.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    return [each[0].double().numpy() for each in found]


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("read", ["last", "mean", "2"])
def test_the_direction_is_the_difference_of_means_over_hidden_states(base: Base, read: str, tmp_path: Path) -> None:
    """numpy over output_hidden_states, a line at a time. The last block's is not among them: what transformers calls so went through the
    final norm."""
    contrast = reader(base).contrast(GLAD, SAD)
    settings = SteerSettings(read=read, layers="0-1", strength=1.0, samples=0)
    made = steer_adapter(base, GLAD, SAD, tmp_path / "glad", settings)
    for layer in (0, 1):
        sides = []
        for side in (contrast.positive, contrast.negative):
            rows = []
            for passage in side:
                h = hidden(base, passage.example.input_ids)[layer + 1]
                answer = h[passage.example.prompt_length : -1]  # without the end token
                rows.append({"last": answer[-1], "mean": answer.mean(0), "2": answer[-2]}[read])
            sides.append(np.mean(rows, 0))
        expected = sides[0] - sides[1]
        site = Site(layer=layer)
        x = made.adapter.parameters(site, "")
        np.testing.assert_allclose(x["s"] @ x["R"], expected, atol=2e-6 * np.abs(expected).max())
        np.testing.assert_allclose(np.linalg.norm(x["R"].astype(np.float64)), 1, rtol=1e-6)
        (found,) = (each for each in made.separations if each.site == site)
        assert math.isclose(found.norm, np.linalg.norm(expected), rel_tol=1e-5)
    assert load_adapter(tmp_path / "glad").digest == made.adapter.digest


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "gpt_neox"])
def test_one_by_one_equals_batched(family: str) -> None:
    base = base_from_memory(tiny.build(family), tiny.tokenizer())
    passages = reader(base).contrast(GLAD, SAD).both
    assert len({len(p.example.input_ids) for p in passages}) > 3, "lines of one length have no pads"
    for read in ("last", "mean", "3"):
        alone, batched = (read_activations(base, passages, SITES, read, batch_size=size) for size in (1, 5))
        for site in SITES:
            scale = np.abs(alone[site].values).max()
            np.testing.assert_allclose(batched[site].values, alone[site].values, atol=2e-5 * scale, err_msg=str(site))
            assert math.isclose(alone[site].norm, batched[site].norm, rel_tol=1e-4)


def test_streams_are_those_that_edits_act_on(base: Base) -> None:
    """Read at a stream, and recorded by a hook of its module, are the same."""
    passages = reader(base).contrast(GLAD, SAD).positive[:1]
    seen: dict[Site, torch.Tensor] = {}
    hooks = []
    for site in SITES:
        if site.stream == "block_input":
            continue
        hooks.append(
            site_module(base.model, site).register_forward_hook(
                lambda m, a, o, site=site: seen.__setitem__(site, o[0] if isinstance(o, tuple) else o)
            )
        )
    read = read_activations(base, passages, SITES, "last", batch_size=1)
    for hook in hooks:
        hook.remove()
    for site, h in seen.items():
        h = h.reshape(-1, h.shape[-1])
        np.testing.assert_array_equal(read[site].values[0], h[passages[0].stop - 1].double().numpy())
    before = hidden(base, passages[0].example.input_ids)
    for layer in range(tiny.LAYERS):
        np.testing.assert_allclose(read[Site(layer=layer, stream="block_input")].values[0], before[layer][passages[0].stop - 1], atol=1e-6)


def test_every_form_of_line(tmp_path: Path) -> None:
    """Prompts end where an answer begins, texts go as they are, completions without their end token."""
    base = load_base(tiny.save_base(tmp_path / "base", template=TEMPLATE), require_tokenizer=True)
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}
    lines = [
        {"prompt": "Hi"},
        {"messages": [user]},
        {"prompt": "Hi", "completion": "Yo"},
        {"messages": [user, answer]},
        {"text": "Hi"},
    ]

    def said(contrast: Contrast) -> list[tuple[str, str]]:
        return [
            (base.tokenizer.decode(p.example.input_ids), base.tokenizer.decode(p.example.input_ids[p.start : p.stop]))
            for p in contrast.positive
        ]

    found = said(reader(base).contrast(lines, SAD))
    prompt = "<user>Hi</s><assistant>"
    assert [whole for whole, _ in found[:2]] == [prompt, prompt]
    assert all(whole.startswith(prompt + "Yo") and read == "Yo" for whole, read in found[2:4])
    assert found[4][0].endswith("Hi") and "<user>" not in found[4][0]
    assert reader(base).contrast(lines, SAD).templated and not reader(base, "never").contrast([lines[0], lines[4]], SAD).templated
    assert said(reader(base, "never").contrast([lines[0]] * 2, SAD))[0][0].endswith("Hi")


def test_the_first_token_is_not_read(base: Base) -> None:
    (passage, _) = reader(base).contrast([{"text": "abc"}] * 2, SAD).positive
    assert (passage.start, passage.stop) == (1, len(passage.example.input_ids)) and passage.at("mean")[0] == 1
    (short, _) = reader(base).contrast([{"text": "a"}] * 2, SAD).positive
    assert len(short.example.input_ids) > 1 or (short.start, short.stop) == (0, 1)


def test_one_file_of_pairs_is_the_two_files(base: Base, tmp_path: Path) -> None:
    pairs = [{"prompt": a["prompt"], "positive": a["completion"], "negative": "No."} for a in GLAD]
    other = [{"prompt": a["prompt"], "completion": "No."} for a in GLAD]
    objects = [{"positive": a, "negative": b} for a, b in zip(GLAD, other, strict=True)]
    settings = SteerSettings(layers="1", strength=1.0, samples=0)
    apart = steer_adapter(base, GLAD, other, tmp_path / "apart", settings)
    for name, lines in (("pairs", pairs), ("objects", objects)):
        together = steer_adapter(base, write(tmp_path / f"{name}.jsonl", lines), None, tmp_path / name, settings)
        assert together.adapter.digest == apart.adapter.digest
    assert load_adapter(tmp_path / "pairs").training["data"]["files"][0]["side"] == "pairs"
    texts = reader(base).contrast([{"positive": "yes yes", "negative": "no"}] * 2, None)
    assert not any(passage.answered for passage in texts.both)


# --- what is made of it ---------------------------------------------------------------------------


def test_ablation_leaves_nothing_of_the_direction(base: Base, tmp_path: Path) -> None:
    """v . h = 0 behind every block and at every token, prompt and generated."""
    made = steer_adapter(base, GLAD, SAD, tmp_path / "less", SteerSettings(method="ablate", from_layer=1))
    assert made.adapter.method == "consreft" and made.adapter.sites == tuple(Site(layer=n) for n in range(tiny.LAYERS))
    v = made.adapter.parameters(Site(layer=0), "")["R"][0].astype(np.float64)
    (source,) = (each for each in made.separations if each.site.layer == 1)
    np.testing.assert_allclose(v, source.difference / source.norm, atol=1e-7)
    assert np.array_equal(v, made.adapter.parameters(Site(layer=2), "")["R"][0])
    seen: list[torch.Tensor] = []
    ids = torch.tensor([[5, 9, 40, 77, 12]])
    with torch.no_grad(), steered(base.model, made.adapter):
        # Behind the edits' own hooks.
        hooks = [
            site_module(base.model, site).register_forward_hook(lambda m, a, o: seen.append(o[0] if isinstance(o, tuple) else o))
            for site in made.adapter.sites
        ]
        base.model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        for hook in hooks:
            hook.remove()
    assert len(seen) == 3 * tiny.LAYERS
    for h in seen:
        h = h.double().numpy().reshape(-1, len(v))
        assert np.abs(h @ v).max() < 2e-6 * np.linalg.norm(h, axis=1).max()


def test_ablation_as_the_paper_does_it(base: Base, tmp_path: Path) -> None:
    """Out of what a block gets, and of what its attention and MLP write: then nothing of it is left behind the block either."""
    settings = SteerSettings(method="ablate", from_layer=0, streams="block_input;attention_output;mlp_output", samples=0)
    made = steer_adapter(base, GLAD, SAD, tmp_path / "less", settings)
    assert len(made.adapter.sites) == 3 * tiny.LAYERS
    behind = [Site(layer=layer) for layer in range(tiny.LAYERS)]
    passages = reader(base).contrast(GLAD, SAD).both
    v = made.adapter.parameters(made.adapter.sites[0], "")["R"][0].astype(np.float64)
    plain = read_activations(base, passages, behind, "last", batch_size=4)
    with steered(base.model, made.adapter):
        left = read_activations(base, passages, behind, "last", batch_size=4)
    for site in behind:
        assert np.abs(left[site].values @ v).max() < 5e-6 * left[site].norm < np.abs(plain[site].values @ v).max()


def test_addition_moves_the_stream_by_the_strength(base: Base, tmp_path: Path) -> None:
    behind = Site(layer=2, stream="block_input")
    passages = reader(base).contrast(GLAD, SAD).both
    made = steer_adapter(base, GLAD, SAD, tmp_path / "glad", SteerSettings(layers="1", strength=-2.5, samples=0))
    plain = read_activations(base, passages, [behind], "last", batch_size=4)[behind].values
    with steered(base.model, made.adapter):
        moved = read_activations(base, passages, [behind], "last", batch_size=4)[behind].values
    expected = -2.5 * made.separations[0].difference
    np.testing.assert_allclose(moved - plain, np.broadcast_to(expected, plain.shape), atol=1e-5 * np.abs(plain).max())


def test_defaults_edit_one_layer_that_the_lines_choose(base: Base, tmp_path: Path) -> None:
    made = steer_adapter(base, GLAD, SAD, tmp_path / "glad", SteerSettings())
    assert made.adapter.sites == (Site(layer=made.layer),) and made.read == "mean"
    assert [each.site for each in made.separations] == [Site(layer=n) for n in range(tiny.LAYERS)]
    record = load_adapter(tmp_path / "glad").training
    assert record["data"]["positive"] == 7 and record["data"]["negative"] == 5 and record["layer"] == made.layer
    assert record["settings"]["strength"] == made.strength and len(record["figures"]["sites"]) == tiny.LAYERS
    assert {f["side"] for f in record["data"]["files"]} == {"positive", "negative"}
    assert made.adapter.probes == tuple(GLAD)
    assert len(made.samples_before) == len(made.samples_after) == 3
    assert made.samples_before[0].prompt == made.samples_after[0].prompt == "How is day 0?"
    again = steer_adapter(base, GLAD, SAD, tmp_path / "again", SteerSettings())
    assert again.adapter.digest == made.adapter.digest and again.strengths == made.strengths
    less = steer_adapter(base, GLAD, SAD, tmp_path / "less", SteerSettings(method="ablate", samples=1))
    assert less.adapter.probes == tuple(SAD), "what is left without the direction"
    prompts = [{"prompt": each["prompt"]} for each in GLAD]
    bare = steer_adapter(base, prompts, SAD, tmp_path / "bare", SteerSettings(samples=0))
    assert bare.read == "last" and bare.adapter.probes == () and bare.strengths[0].positive is None


def test_separation_is_judged_on_lines_it_was_not_measured_on() -> None:
    """Noise of many dimensions is told apart perfectly by its own means, and by chance when held out."""
    from reft_export.contrasting.activations import Activations

    noise = np.random.default_rng(0)
    site = Site(layer=0)
    blind = noise.normal(size=(80, 400))
    (found,) = separations({site: Activations(values=blind, norm=20.0)}, 40)
    assert 0.25 < found.accuracy < 0.75 and abs(found.margin) < 1
    within = (blind - blind.mean(0)) @ found.difference
    assert (within[:40] > 0).all() and (within[40:] < 0).all()
    (apart,) = separations({site: Activations(values=blind + 3 * np.repeat([[1.0], [-1.0]], 40, 0) * np.eye(400)[0], norm=20.0)}, 40)
    assert apart.accuracy > 0.95 and apart.margin > 3 and math.isclose(apart.share, apart.norm / 20)
    (few,) = separations({site: Activations(values=blind[[0, 1, 60, 61]], norm=20.0)}, 2)
    assert 0 <= few.accuracy <= 1 and FOLDS > 2


def test_the_best_layer_is_none_of_the_first_or_last() -> None:
    from reft_export.contrasting.separability import Separation

    def found(*figures: tuple[float, float]) -> list[Separation]:
        return [
            Separation(site=Site(layer=n), difference=np.ones(2), accuracy=accuracy, margin=margin, lines=40, residual_norm=1.0)
            for n, (accuracy, margin) in enumerate(figures)
        ]

    rising = [(1.0, 99.0), (1.0, 99.0), (0.8, 9.0), (1.0, 4.9), (1.0, 5.0), (1.0, 5.5), (1.0, 10.0), (1.0, 7.0), (1.0, 99.0), (1.0, 99.0)]
    assert chosen_layer(found(*rising), 10) == 4
    close = [(1.0, 9.0), (1.0, 9.0), (0.9, 9.0), (0.9, 9.0), (0.94, 5.0), (0.95, 9.0), (0.95, 9.0), (0.8, 2.0), (1.0, 9.0), (1.0, 9.0)]
    assert chosen_layer(found(*close), 10) == 4, "of 40 lines 0.94 is as good as 0.95"
    assert chosen_layer(found((1.0, 1.0)), 1) == 0


def test_a_strength_is_as_large_as_the_text_bears() -> None:
    def figures(*rows: tuple[float, float | None, float]) -> list[StrengthFigures]:
        return [StrengthFigures(strength=s, positive=p, negative=p, own=own) for s, p, own in rows]

    assert chosen_strength(figures((0, 3.0, 1.0), (0.5, 2.8, 1.1), (1, 3.08, 3.0), (2, 3.3, 4.0), (4, 3.0, 9.0))) == 1
    assert chosen_strength(figures((0, None, 1.0), (0.5, None, 1.1), (1, None, 1.9), (2, None, 2.1))) == 1
    assert chosen_strength(figures((0, 3.0, 1.0), (0.5, 9.0, 1.1), (1, 3.0, 3.0))) == 0.5


def test_bfloat16(tmp_path: Path) -> None:
    base = load_base(tiny.save_base(tmp_path / "base"), dtype="bfloat16", require_tokenizer=True)
    made = steer_adapter(base, GLAD, SAD, tmp_path / "glad", SteerSettings(samples=1))
    assert made.adapter.dtype == "bfloat16" and all(tensor.dtype == np.float32 for tensor in made.adapter.tensors.values())


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "push"}, "method 'push' is unknown; known: add, ablate"),
        ({"read": "first"}, "read 'first' is not understood"),
        ({"read": "0"}, "read '0' is not understood"),
        ({"strength": math.nan}, "expected a finite number other than 0"),
        ({"strength": 0.0}, "expected a finite number other than 0"),
        ({"method": "ablate", "strength": 2.0}, "strength does not apply to ablate"),
        ({"from_layer": 3}, "from_layer is ablate's"),
        ({"positions": "x3"}, "positions 'x3' are not understood"),
        ({"streams": "residual"}, "stream 'residual' is unknown"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"probes": 33}, "probes is 33; it must be at most 32"),
    ],
)
def test_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        SteerSettings(**settings)


@pytest.mark.parametrize(
    ("positive", "negative", "settings", "said"),
    [
        ([], SAD, {}, "there is no training data"),
        (GLAD[:1], SAD, {}, "data has 1 line of the positive side, expected at least 2"),
        (GLAD, SAD[:1], {}, "data has 1 line of the negative side"),
        (GLAD, GLAD, {}, "the same mean over both sides at .* the lines hold no contrast there"),
        (GLAD, None, {}, r"data\[0\]: lacks positive; a file alone holds both sides"),
        ([{"positive": "a", "negative": "b"}] * 2, SAD, {}, "holds both sides, and so does its file"),
        ([{"positive": "a"}] * 2, None, {}, r"data\[0\]: lacks negative"),
        ([{"positive": "a", "negative": 3}] * 2, None, {}, r"data\[0\]: negative is int, expected a text"),
        ([{"positive": "a", "negative": "b", "label": 1}] * 2, None, {}, r"has unknown keys \['label'\]"),
        ([{"text": "a", "label": 1}] * 2, SAD, {}, r"data\[0\]: has unknown keys \['label'\]; expected text lines like"),
        ([{"text": " "}] * 2, SAD, {}, r"data\[0\]: text is empty"),
        ([{"prompt": 3}] * 2, SAD, {}, r"data\[0\]: prompt is int, expected a string"),
        (GLAD, SAD, {"layers": "1-9"}, "layer 9 does not exist in this base"),
        (GLAD, SAD, {"method": "ablate", "from_layer": 7}, "layer 7 does not exist in this base"),
        (GLAD, SAD, {"max_length": 10**6}, "max_length is 1000000; the context of"),
        (GLAD, SAD, {"read": "500"}, r"data\[0\]: .* tokens can be read, and read is 500"),
        (GLAD, SAD, {"strength": 1e39, "layers": "1"}, "is beyond float32; lower it"),
    ],
)
def test_lines_are_refused_and_nothing_is_written(base: Base, positive, negative, settings, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        steer_adapter(base, positive, negative, tmp_path / "a", SteerSettings(**settings))
    assert not list(tmp_path.iterdir())


def test_a_base_that_overflows_is_refused(tmp_path: Path) -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(InputError, match=r"1\.block_output is not finite in float32"):
        steer_adapter(base_from_memory(model, tiny.tokenizer()), GLAD, SAD, tmp_path / "a", SteerSettings())


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    classifier = load_base(tiny_encoders.save_base(tmp_path / "base", "bert"), require_tokenizer=True)
    with pytest.raises(InputError, match="base is a classifier, and steer measures what a decoder says"):
        steer_adapter(classifier, GLAD, SAD, tmp_path / "a", SteerSettings())


def test_an_output_that_is_there_stays(base: Base, tmp_path: Path) -> None:
    settings = SteerSettings(layers="1", strength=1.0, samples=0)
    steer_adapter(base, GLAD, SAD, tmp_path / "a", settings)
    before = (tmp_path / "a" / "adapter.json").read_bytes()
    with pytest.raises(InputError, match="exists; choose another output or pass --force"):
        steer_adapter(base, SAD, GLAD, tmp_path / "a", settings)
    with pytest.raises(InputError, match="the lines hold no contrast"):
        steer_adapter(base, GLAD, GLAD, tmp_path / "a", settings, force=True)
    assert (tmp_path / "a" / "adapter.json").read_bytes() == before
    steer_adapter(base, SAD, GLAD, tmp_path / "a", settings, force=True)
    assert (tmp_path / "a" / "adapter.json").read_bytes() != before


def test_what_needs_no_weights_is_checked_without_them(tmp_path: Path) -> None:
    folder = tiny.save_base(tmp_path / "base")
    skeleton = load_without_weights(folder, require_tokenizer=True)
    plan = plan_steering(skeleton, GLAD, SAD, tmp_path / "a", SteerSettings())
    assert plan.read == "mean" and len(plan.candidates) == tiny.LAYERS
    with pytest.raises(InputError, match="layer 9 does not exist"):
        plan_steering(skeleton, GLAD, SAD, tmp_path / "a", SteerSettings(layers="9"))
