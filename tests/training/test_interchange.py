"""Interchange interventions: the formula, a variable that is known to lie in one direction, what a fixed source makes an adapter, and what
is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from models.bases import build_base, byte_tokenizer
from test_data_forms import TURNS
from test_training_run import files, stop_at
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from reft_export.base.load import Base, base_from_memory
from reft_export.cli.main import app
from reft_export.eager.steering import steer, steered
from reft_export.exporting.export import export_bundle
from reft_export.exporting.settings import ExportSettings
from reft_export.training.edits import LayerEdits
from reft_export.training.endings import TrainingInterrupted
from reft_export.training.interchange import Interchange, adapter_of_source
from reft_export.training.interchange_data import load_interchanges
from reft_export.training.interventions import Intervention, Interventions
from reft_export.training.settings import TrainSettings, settings_like
from reft_export.training.source_states import SourceStates
from reft_export.training.trainer import TrainResult, train
from runtimes.edits.adapter import load_adapter, save_adapter
from runtimes.edits.edit import Site
from runtimes.edits.form import EditForm
from runtimes.edits.positions import RuleSets
from runtimes.errors import InputError

SETTINGS = TrainSettings(
    objective="interchange", method="consreft", rank=2, layers="0;2", positions="l1", lr=2e-2, max_steps=6, batch_size=4, samples=0, seed=7
)
LINES = [{"prompt": f"say {a}", "source": f"say {b}", "completion": b} for a in "abcd" for b in "abcd" if a != b]
PLANTED = replace(SETTINGS, rank=1, layers="0", lr=5e-2, max_steps=40, eval_fraction=0.3)
SIGNS = {f"{n}": 1.0 if n % 2 else -1.0 for n in range(8)}
"""The variable's value of each prompt."""


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@torch.no_grad()
def planted(direction: torch.Tensor) -> PreTrainedModel:
    """The last token's variable lies in ``direction`` of every stream, amid as much of other things; the head says A where it is 1, and B
    where it is -1."""
    model = build_base("llama", layers=2)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            parameter.zero_()
        if "norm" in name:
            parameter.fill_(1.0)
    table = model.get_parameter("model.embed_tokens.weight")
    other = torch.randn(table.shape, generator=torch.Generator().manual_seed(3))
    table.copy_(0.3 * (other - (other @ direction)[:, None] * direction))
    head = model.get_parameter("lm_head.weight")
    for character, sign in SIGNS.items():
        table[ord(character) - ord("!")] += sign * direction  # the tokenizer's numbers begin with the printable characters
    head[ord("A") - ord("!")], head[ord("B") - ord("!")] = 4 * direction, -4 * direction
    return model


def planted_base() -> tuple[Base, torch.Tensor]:
    direction = torch.nn.functional.normalize(torch.sin(torch.arange(tiny.WIDTH) * 1.7), dim=0)
    return base_from_memory(planted(direction), byte_tokenizer()), direction


def planted_lines() -> list[dict[str, str]]:
    differing = [(a, b) for a in SIGNS for b in SIGNS if SIGNS[a] != SIGNS[b]]
    return [{"prompt": f"say {a}", "source": f"say {b}", "completion": "A" if SIGNS[b] > 0 else "B"} for a, b in differing]


def tokens(base: Base, text: str) -> list[int]:
    assert base.tokenizer is not None
    return list(base.tokenizer(text).input_ids)


def accuracies(result: TrainResult) -> tuple[float, float]:
    """The IIA that the run tells, of the base and interchanged."""
    (note,) = [note for note in result.notes if note.startswith("interchange accuracy")]
    before, after = (float(each.strip("%")) / 100 for each in note.split(": ")[1].split(" to "))
    return before, after


def exchanged_logits(base: Base, made: Interventions, rule: Any, tied: bool, ids: torch.Tensor, source: tuple[int, ...]) -> torch.Tensor:
    states = SourceStates(base, made.sites, rule, tied=tied)
    states.read([source], 1)
    exchange = Interchange(made, states)
    with torch.no_grad(), steer(base.model, exchange.edits(), rule=rule, tied=tied) as steering:
        exchange.steering, steering.sources = steering, [source] * len(ids)
        return base.model(input_ids=ids).logits


def test_an_interchange_is_the_papers_formula() -> None:
    """b + R^T (R s - R b) in float64, and so pyvene's LowRankRotatedSpaceIntervention, whose weight [D, r] is R^T."""
    torch.manual_seed(0)
    module = Intervention(EditForm(method="consreft", rank=5), 48)
    b, s = torch.randn(7, 48), torch.randn(7, 48)
    R = module.parameters_of()["R"].detach().double().numpy()
    assert np.allclose(R @ R.T, np.eye(5), atol=1e-6)
    want = b.double().numpy() + (s.double().numpy() @ R.T - b.double().numpy() @ R.T) @ R
    got = module.interchanged(b, s)
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=0, atol=1e-5)
    assert np.allclose(got.detach().numpy() @ R.T, s.numpy() @ R.T, atol=1e-5), "what R reads is the source's"
    torch.testing.assert_close(module.interchanged(b, b), b, rtol=0, atol=1e-6)
    got.square().sum().backward()
    assert module.get_parameter("R.V").grad is not None and module.get_parameter("s").grad is None


def test_a_planted_variable_is_found(tmp_path: Path) -> None:
    base, direction = planted_base()
    found = train(base, planted_lines(), replace(PLANTED, metric="accuracy"), tmp_path / "found")
    assert accuracies(found) == (0.0, 1.0) and found.kept.metric == 1.0
    R = torch.from_numpy(found.adapter.tensors["0.block_output.R"])
    assert float((R @ direction).abs()) > 0.85, "a random one has 0.125 in the mean"
    random = train(base, planted_lines(), replace(PLANTED, lr=0.0, max_steps=1, metric="exact-match"), tmp_path / "random")
    assert accuracies(random)[1] < 0.2 and random.kept.metric == accuracies(random)[1], "a random direction moves no variable"


def test_a_source_sets_the_variable_of_every_prompt(tmp_path: Path) -> None:
    base, _ = planted_base()
    rotation = train(base, planted_lines(), PLANTED, tmp_path / "found").adapter
    for source, answer in (("say 3", "A"), ("say 4", "B")):
        with steered(base.model, adapter_of_source(base, rotation, source)), torch.no_grad():
            ids = torch.tensor([tokens(base, f"say {character}") for character in SIGNS])
            said = base.model(input_ids=ids).logits[:, -1].argmax(-1).tolist()
            assert said == tokens(base, answer) * len(SIGNS)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"positions": "f1+l1", "tied": False},
        {"positions": "-2"},
        {"layers": "1", "streams": "block_input;attention_output;mlp_output"},
    ],
)
def test_an_adapter_of_a_source_is_the_interchange_with_it(form: dict[str, Any], base: Base, tmp_path: Path) -> None:
    settings = replace(SETTINGS, **form)
    rotation = train(base, LINES, settings, tmp_path / "r").adapter
    assert not rotation.probes and rotation.method == "consreft" and rotation.training["s"] == "mean of R h over 12 sources"
    made = adapter_of_source(base, rotation, "say what?")
    assert all(np.array_equal(value, rotation.tensors[name]) for name, value in made.tensors.items() if name.endswith(".R"))
    assert (made.training["source"], made.training["rotation"]) == ("say what?", rotation.digest)
    trained = Interventions(rotation.site_forms, width=base.info.hidden_size, tied=settings.tied)
    trained.start_from(rotation)
    ids, source = torch.tensor([tokens(base, "tell me")]), tuple(tokens(base, "say what?"))
    want = exchanged_logits(base, trained, settings.rule, settings.tied, ids, source)
    with torch.no_grad():
        plain = base.model(input_ids=ids).logits
        with steered(base.model, made):
            got = base.model(input_ids=ids).logits
        with steered(base.model, rotation):
            mean = base.model(input_ids=ids).logits
    scale = float(plain.abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * scale)
    assert float((got - plain).abs().max()) > 1e-2 * scale and float((got - mean).abs().max()) > 1e-3 * scale


def test_sites_of_several_rules_each_take_their_own_tokens(base: Base, tmp_path: Path) -> None:
    edits = (LayerEdits.parse("0: consreft r2 f1"), LayerEdits.parse("2: consreft r3 l1"))
    settings = replace(SETTINGS, method="loreft", rank=4, layers="all", edits=edits)
    result = train(base, LINES, settings, tmp_path / "r")
    rule = result.adapter.where
    assert isinstance(rule, RuleSets) and result.history[-1].loss < result.history[0].loss
    made = adapter_of_source(base, result.adapter, "be it so")
    ids = tokens(base, "be it so")
    seen: dict[Site, torch.Tensor] = {}

    def take(site: Site, h: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        seen[site] = h[0]
        return h

    with torch.no_grad(), steer(base.model, {site: partial(take, site) for site in made.sites}, rule=rule, tied=True):
        base.model(input_ids=torch.tensor([ids]))
    for site, token in ((Site(layer=0), 0), (Site(layer=2), -1)):
        R = made.tensors[f"{site}.R"]
        np.testing.assert_allclose(made.tensors[f"{site}.s"], R @ seen[site][token].numpy(), rtol=0, atol=1e-4)


def test_several_tokens_of_a_slot_share_the_mean(base: Base, tmp_path: Path) -> None:
    result = train(base, LINES, replace(SETTINGS, positions="prompt"), tmp_path / "r")
    assert "an adapter has one s for all the edited tokens of a slot" in result.notes[-1]
    assert "one s" not in " ".join(train(base, LINES, SETTINGS, tmp_path / "one").notes)


def test_a_run_goes_on_where_it_ended(base: Base, tmp_path: Path) -> None:
    whole = train(base, LINES, SETTINGS, tmp_path / "whole")
    assert any("tokens stand before the first edited one" in note for note in whole.notes), "the faster way was taken"
    with pytest.raises(TrainingInterrupted):
        train(base, LINES, SETTINGS, tmp_path / "a", on_step=stop_at(4))
    train(base, LINES, replace(SETTINGS, resume=True), tmp_path / "a")
    assert files(tmp_path / "a") == files(tmp_path / "whole")
    further = settings_like(whole.adapter, objective="interchange", max_steps=2, samples=0)
    assert train(base, LINES, further, tmp_path / "b", start=whole.adapter).adapter.training["start"] == whole.adapter.digest


def test_recomputed_blocks_take_the_same_steps(base: Base, tmp_path: Path) -> None:
    settings = replace(SETTINGS, streams="attention_output", positions="f1")
    plain, again = (
        train(base, LINES, replace(settings, gradient_checkpointing=each), tmp_path / f"{each}").history for each in (False, True)
    )
    assert [record.loss for record in again] == pytest.approx([record.loss for record in plain], rel=1e-5)


def test_a_completion_has_no_end(tokenizer: PreTrainedTokenizerFast) -> None:
    (plain,) = load_interchanges([LINES[0] | {"variable": "x"}], tokenizer, max_length=64, stop_tokens=(257,)).examples
    tokenizer.chat_template = TURNS
    (told,) = load_interchanges(LINES[:1], tokenizer, max_length=64, stop_tokens=(257,)).examples
    for example, prompt, source in ((plain, "say a", "say b"), (told, "<user>say a<assistant>", "<user>say b<assistant>")):
        assert tokenizer.decode(list(example.source)) == source
        assert tokenizer.decode(list(example.input_ids[: example.prompt_length])) == prompt
        assert tokenizer.decode(list(example.input_ids[example.prompt_length :])) == "b"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "say a", "completion": "b"}, r"lacks \['source'\]; expected lines like"),
        (LINES[0] | {"source": " "}, "source is empty"),
        (LINES[0] | {"source": 3}, "source is int"),
        (LINES[0] | {"source": "s" * 300}, "source: the prompt has 300 tokens"),
    ],
)
def test_a_line_is_refused(line: dict[str, Any], said: str, base: Base, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"data\[1\](, )?:? ?{said}"):
        train(base, [LINES[1], line], SETTINGS, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_what_is_refused(base: Base, tmp_path: Path) -> None:
    uneven = LINES[0] | {"source": "say something longer"}
    for positions, said in (
        ("prompt", r"data\[0\]: positions prompt edit 5 of the prompt's 5 tokens and 20 of the source's 20"),
        ("f7+l7", r"positions f7\+l7 edit 4 of the prompt's 5 tokens and 14 of the source's 20, .* use positions l1"),
    ):
        with pytest.raises(InputError, match=said):
            train(base, [uneven], replace(SETTINGS, positions=positions), tmp_path / "a")
    train(base, [uneven], replace(SETTINGS, max_steps=1), tmp_path / "fine")
    with pytest.raises(InputError, match=r"data\[0\]: the source has 1 token\(s\), and positions l1 edit none of them"):
        train(base, [LINES[0] | {"source": "s"}], SETTINGS, tmp_path / "a")
    for change, said in (
        ({"method": "loreft"}, "objective interchange trains the R of consreft, and method is loreft; use method consreft"),
        ({"positions": "all"}, "positions all go on behind the prompt, and a source has no such tokens"),
        ({"positions": "marked"}, "positions marked are what a prompt marks"),
        ({"kl_weight": 0.5}, "kl_weight is of completions, and objective interchange is of prompts and their sources"),
        ({"distill_system": "Be brief."}, "distill_system is of completions"),
        ({"subspaces": "a:2"}, "objective does not go with subspaces"),
    ):
        with pytest.raises(InputError, match=said):
            replace(SETTINGS, **change)
    with pytest.raises(InputError, match=r"has unknown keys \['source'\]; .*; sources are of train --objective interchange"):
        train(base, LINES, replace(SETTINGS, objective="sft"), tmp_path / "a")
    other = tiny.random_adapter(base.info)
    with pytest.raises(InputError, match="the adapter is of loreft, and a rotation is a consreft of"):
        adapter_of_source(base, other, "say a")
    with pytest.raises(InputError, match="the source has 1 token"):
        adapter_of_source(base, load_adapter(tmp_path / "fine"), "s")


def test_the_command_trains_and_sets(tmp_path: Path) -> None:
    tiny.save_base(tmp_path / "base")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    options = (
        "train",
        "-m",
        tmp_path / "base",
        "-d",
        tmp_path / "data.jsonl",
        "--objective",
        "interchange",
        "--layers",
        1,
        "--max-steps",
        2,
    )
    done = invoke(*options, "-o", tmp_path / "das", "--samples", 1)
    said = " ".join(done.stdout.split())
    assert done.exit_code == 0 and "say a <- say b" in said and "interchange accuracy of 12 training pairs" in said, done.output
    rotation = load_adapter(tmp_path / "das")
    assert (rotation.method, str(rotation.positions)) == ("consreft", "l1")
    for more, message in (
        (("--method", "loreft"), "method is loreft"),
        (("--probes", 3), "--probes is for answers"),
        (("--beta", 1), "--beta is of"),
    ):
        refused = invoke(*options, "-o", tmp_path / "no", *more)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split()), refused.output
    setting = ("steer", "-m", tmp_path / "base", "-o", tmp_path / "b", "--rotation", tmp_path / "das")
    for arguments, message in (
        (setting, "--rotation and --source go together"),
        ((*setting, "--source", "say b", "--strength", 2), "--strength is of a contrast"),
        ((*setting, "--source", "say b", "--dry-run"), "--dry-run is of a contrast"),
        ((*setting, tmp_path / "data.jsonl", "--source", "say b"), "positive is of a contrast"),
        (setting[:5], "steer needs the JSONL of the side to steer to; or --rotation with --source"),
    ):
        refused = invoke(*arguments)
        assert refused.exit_code == 2 and message in " ".join(refused.stderr.split()) and not (tmp_path / "b").exists(), refused.output
    save_adapter(replace(rotation, trained_on="a" * 64), tmp_path / "of-a-bundle")
    refused = invoke(*setting[:-1], tmp_path / "of-a-bundle", "--source", "say b")
    assert refused.exit_code == 2 and not (tmp_path / "b").exists(), refused.output
    message = "was trained on the weights of a bundle (aaaaaaaaaaaa), where its source has to be read, too; give --base as train had it"
    assert message in " ".join(refused.stderr.split())
    done = invoke(*setting, "--source", "say b")
    assert done.exit_code == 0 and "is set to its value in 'say b'" in " ".join(done.stdout.split()), done.output
    assert load_adapter(tmp_path / "b").training["source"] == "say b"


@pytest.mark.slow
def test_an_adapter_of_a_source_exports_and_holds(tmp_path: Path) -> None:
    from reft_export import load_base

    folder = tiny.save_base(tmp_path / "base")
    base = load_base(folder, require_tokenizer=True)
    rotation = train(base, LINES, SETTINGS, tmp_path / "das").adapter
    save_adapter(adapter_of_source(base, rotation, "say b"), tmp_path / "b")
    export_bundle(str(folder), [tmp_path / "das", tmp_path / "b"], tmp_path / "bundle", ExportSettings(), report=lambda _: None)
    done = invoke("parity", tmp_path / "bundle")
    assert done.exit_code == 0, done.output
