"""The options that make training faster or smaller: whole runs with each give what runs without them give."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from reft_export.base.load import Base, base_from_memory
from reft_export.eager.steering import steer
from reft_export.training import way_choice
from reft_export.training.batches import LengthGrouped
from reft_export.training.counted import CountedHead
from reft_export.training.data import Examples, load_data
from reft_export.training.endings import TrainingInterrupted
from reft_export.training.frozen_layers import LayerStore, frozen_layers
from reft_export.training.frozen_prefix import PrefixStore
from reft_export.training.interventions import Interventions
from reft_export.training.real_tokens import on_real_tokens
from reft_export.training.recomputed import recomputed_blocks
from reft_export.training.reference import rows_of
from reft_export.training.settings import TrainSettings
from reft_export.training.trainer import TrainResult, train
from reft_export.training.ways import Batch, Way, Ways, difference
from runtimes.edits.edit import STREAMS, Site
from runtimes.edits.form import one_form
from runtimes.edits.methods import METHODS
from runtimes.edits.positions import PositionRule
from runtimes.errors import InputError

SETTINGS = TrainSettings(rank=2, layers="0;2", positions="l2", lr=5e-3, epochs=3, batch_size=4, samples=0, seed=7)


def close(one: TrainResult, other: TrainResult, tolerance: float = 1e-4) -> bool:
    """Losses of all steps, and what was learned; AdamW turns a gradient near 0 either way, so parameters are held as a whole."""
    losses = [[record.loss for record in each.history] for each in (one, other)]
    apart = sum(float(np.square(value - other.adapter.tensors[name]).sum()) for name, value in one.adapter.tensors.items())
    whole = sum(float(np.square(value).sum()) for value in one.adapter.tensors.values())
    return np.allclose(*losses, rtol=tolerance, atol=0) and apart <= tolerance**2 * whole


def stop_at(step: int) -> Any:
    def on_step(at: int, total: int, loss: float, eval_loss: float | None) -> None:
        if at == step:
            raise KeyboardInterrupt

    return on_step


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(way_choice, "difference", lambda *_: "nothing")


def test_a_run_behind_the_prefixes_is_the_plain_run(base: Base, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all prefixes kept, with some, with none, and with held-out examples."""
    settings = replace(SETTINGS, eval_fraction=0.2)
    phases: list[str] = []
    fast = train(base, data, settings, tmp_path / "fast", on_phase=phases.append)
    assert "computing the unedited tokens of 12 prompts" in phases
    assert "those of 5 prompts once, kept" in fast.notes[0], "different ones"
    assert "what the layer below the first edit put out is computed once of 12 examples" in fast.notes[1]
    with monkeypatch.context() as patch:
        patch.setattr(PrefixStore, "token_bytes", lambda *_: 30_000)
        few = train(base, data, replace(settings, cache_mb=1), tmp_path / "few")
    assert "those of 2 prompts once" in few.notes[0]
    none = train(base, data, replace(settings, cache_mb=0), tmp_path / "none")
    once = train(base, data, replace(SETTINGS, epochs=1), tmp_path / "once")
    assert "once, kept" not in none.notes[0] + once.notes[0]
    plain(monkeypatch)
    slow = train(base, data, settings, tmp_path / "slow")
    assert slow.notes == ("every logit is computed: on the counted tokens alone, the head gave nothing",)
    assert all(close(slow, each) for each in (fast, few, none))
    assert not close(slow, train(base, data, replace(settings, lr=5.1e-3), tmp_path / "other")), "the comparison can fail"


@pytest.mark.parametrize("computed_again", [False, True])
def test_a_run_behind_the_kept_layers_is_the_plain_run(
    base: Base, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed_again: bool
) -> None:
    """At positions that no token stands before: with all examples kept, with some, with none; 1e-6 of every loss."""
    settings = replace(SETTINGS, positions="f2+l2", layers="1;2", eval_fraction=0.2, gradient_checkpointing=computed_again)
    fast = train(base, data, settings, tmp_path / "fast")
    assert fast.notes[0].startswith("what the 2 layers below the first edit put out is computed once of 12 examples, kept in ")
    with monkeypatch.context() as patch:
        patch.setattr(LayerStore, "token_bytes", lambda *_: 10_000)
        few = train(base, data, replace(settings, cache_mb=1), tmp_path / "few")
    assert "once of 5 examples" in few.notes[0]
    none = train(base, data, replace(settings, cache_mb=0), tmp_path / "none")
    once = train(base, data, replace(settings, epochs=1), tmp_path / "once")
    assert not none.notes + once.notes
    plain(monkeypatch)
    slow = train(base, data, settings, tmp_path / "slow")
    for each in (fast, few, none):
        assert close(slow, each)
        assert np.allclose([record.loss for record in each.history[:3]], [record.loss for record in slow.history[:3]], rtol=1e-6, atol=0)


def test_what_is_kept_is_not_computed_again(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of prefixes nor of layers, and the blocks below the first edit are not entered."""
    from test_ways import LENGTHS, batch_of, interventions_of

    llama.requires_grad_(False)
    made, batch, entered, computed = interventions_of(llama, sites=(Site(layer=1),)), batch_of(LENGTHS), list[int](), list[int]()
    for number, block in enumerate(llama.model.layers):
        block.mlp.register_forward_pre_hook(lambda module, args, number=number: entered.append(number))
    with steer(llama, made.edits(), rule=PositionRule.parse("f1+l1"), tied=True) as steering:
        store = LayerStore(llama, steering, frozen_layers(made.sites), dtype=torch.float32, pad_token_id=0)
        rows = [(tokens, 0) for tokens, _ in rows_of(batch)]
        store.keep(rows, limit=10**6, group=2)
        assert entered == [0, 1] * 3, "a token's bytes, and two groups: no layer above"
        entered.clear()
        Ways(head=CountedHead(llama), steering=steering, rule=PositionRule.parse("f1+l1"), layers=store).counted(batch)
        assert entered == [2]
        prefixes = PrefixStore(CountedHead(llama), steering, dtype=torch.float32, pad_token_id=0)
        for each in (store, prefixes):
            real = each.compute
            monkeypatch.setattr(each, "compute", lambda keys, real=real: computed.append(len(keys)) or real(keys))
        prefixes.keep([(1, 2), (3, 4)], limit=10**6, group=8)
        assert computed == [1, 2]
        prefixes.keep([(3, 4), (1, 2)], limit=10**6, group=8)
        store.keep(rows, limit=10**6, group=8)
        assert computed == [1, 2]
        prefixes.keep([(1, 2), (5, 6)], limit=10**6, group=8)
        assert computed == [1, 2, 1, 1] and len(prefixes) == 3
        prefixes.found([(7, 8), (1, 2), (7, 8)])
        assert computed == [1, 2, 1, 1, 1], "equal ones that are not kept"


def test_another_answer_behind_a_kept_prefix_is_no_whole_row(llama: PreTrainedModel) -> None:
    """Accuracy asks for each of the data's answers, and what the layers put out is kept of the example's own."""
    from test_ways import batch_of, interventions_of

    llama.requires_grad_(False)
    rule, widths = PositionRule.parse("l1"), list[int]()
    made, batch, other = interventions_of(llama, sites=(Site(layer=1),)), batch_of(((9, 3), (9, 3))), batch_of(((9, 3), (9, 3)), seed=1)
    other = replace(other, input_ids=torch.cat([batch.input_ids[:, :9], other.input_ids[:, 9:]], dim=1))
    with steer(llama, made.edits(), rule=rule, tied=True) as steering:
        layers = LayerStore(llama, steering, 2, dtype=torch.float32, pad_token_id=0)
        prefixes = PrefixStore(CountedHead(llama), steering, dtype=torch.float32, pad_token_id=0)
        layers.keep([(tokens, 8) for tokens, _ in rows_of(batch)], limit=10**6, group=2)
        prefixes.keep([tokens[:8] for tokens, _ in rows_of(batch)], limit=10**6, group=2)
        ways = Ways(head=CountedHead(llama), steering=steering, rule=rule, layers=layers)
        hook = llama.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
        assert torch.allclose(ways.behind_prefix(prefixes)(batch), ways.plain(batch), rtol=1e-5, atol=1e-6)
        assert widths == [12], "of the plain way"
        widths.clear()
        assert torch.allclose(ways.behind_prefix(prefixes)(other), ways.plain(other), rtol=1e-5, atol=1e-6)
        assert widths == [4, 12]
        hook.remove()


def test_pads_are_not_computed(llama: PreTrainedModel) -> None:
    from test_ways import LENGTHS, batch_of

    batch, tokens = batch_of(LENGTHS), dict[str, set[int]]()
    llama.requires_grad_(False)
    for name, module in llama.model.layers.named_modules():
        if name.endswith("act_fn"):
            module.register_forward_pre_hook(lambda module, args, name=name: tokens.setdefault(name, set()).add(args[0].shape[:-1].numel()))
    before = [module.forward for module in llama.model.layers.modules()]
    with steer(llama, {}, rule=PositionRule(last=1), tied=True) as steering, on_real_tokens(llama) as real:
        ways = Ways(head=CountedHead(llama), steering=steering, rule=PositionRule(last=1), real=real)
        tokens.clear()  # whether a network computes each token by itself was tried
        ways.counted(batch)
        assert set.union(*tokens.values()) == {int(batch.attention_mask.sum())}
        tokens.clear()
        ways.plain(batch)
        assert set.union(*tokens.values()) == {batch.input_ids.numel()}
    assert [module.forward for module in llama.model.layers.modules()] == before


class Shifted(torch.nn.Module):
    """A feed-forward network that looks at the token before, as RWKV's does."""

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(h, (0, 0, 1, -1))


def test_a_network_that_mixes_tokens_sees_all_of_them(llama: PreTrainedModel) -> None:
    from test_ways import LENGTHS, batch_of

    batch = batch_of(LENGTHS)
    llama = copy.deepcopy(llama).requires_grad_(False)  # the session's stays as it is
    llama.model.layers[1].mlp = Shifted()
    with steer(llama, {}, rule=PositionRule(last=1), tied=True) as steering, on_real_tokens(llama) as real, torch.no_grad():
        ways = Ways(head=CountedHead(llama), steering=steering, rule=PositionRule(last=1), real=real)
        assert torch.allclose(ways.counted(batch), ways.plain(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fault", ["another example's", "rounded", "late"])
def test_kept_layers_that_are_wrong_are_not_used(
    base: Base, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    right = LayerStore.found

    def wrong(self: LayerStore, rows: Any) -> list[torch.Tensor]:
        found = right(self, rows)
        if fault == "another example's":
            return [torch.nn.functional.pad(found[1], (0, 0, 0, len(found[0]) - len(found[1]))), found[0][: len(found[1])]]
        return [each.to(torch.float8_e4m3fn).float() if fault == "rounded" else each.roll(1, dims=0) for each in found]

    monkeypatch.setattr(LayerStore, "found", wrong)
    (note,) = train(base, data, replace(SETTINGS, positions="f2+l2", epochs=2), tmp_path / "a").notes
    assert "every layer is computed in every step" in note and ("a loss of" in note or "gradients that are off" in note)


def test_a_store_that_mixes_examples_up_would_be_seen(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_ways import batch_of, check, interventions_of

    def mixed(self: LayerStore, keys: Any, **_: Any) -> None:
        states = dict(zip(keys, self.compute(keys), strict=True))
        self._kept = dict(zip(keys, reversed([states[key] for key in keys]), strict=True))

    llama.requires_grad_(False)
    arguments: tuple[Any, ...] = (llama, PositionRule.parse("f1+l1"), batch_of(((9, 3), (10, 2))), interventions_of(llama))
    check(*arguments, kept=2)
    monkeypatch.setattr(LayerStore, "keep", mixed)
    with pytest.raises(AssertionError, match="layers"):
        check(*arguments, kept=2)


FROM_ABOVE = {"positions": "f2+l2", "layers": "1;2"}
"""No token stands before the edited ones, and layers do."""


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_mb": 0},
        {},
        {"group_by_length": True},
        {"init": "identity", "gradient_checkpointing": True},
        FROM_ABOVE,
        {**FROM_ABOVE, "gradient_checkpointing": True, "group_by_length": True, "cache_dtype": "float16"},
        {**FROM_ABOVE, "kl_weight": 0.5},
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(base: Base, data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = replace(SETTINGS, dropout=0.2, eval_fraction=0.1, **changes)
    whole = train(base, data, settings, tmp_path / "whole")
    with pytest.raises(TrainingInterrupted):
        train(base, data, settings, tmp_path / "resumed", on_step=stop_at(5))
    resumed = train(base, data, replace(settings, resume=True), tmp_path / "resumed")
    assert resumed.history == whole.history
    assert all((resumed.adapter.tensors[name] == value).all() for name, value in whole.adapter.tensors.items())
    again = train(base, data, settings, tmp_path / "again")
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == (tmp_path / "whole" / "adapter.safetensors").read_bytes()
    assert again.history == whole.history


def test_the_store_keeps_to_its_limit_and_in_the_order_of_the_examples(llama: PreTrainedModel) -> None:
    prefixes = [(1, 2, 3), (4, 5), (1, 2, 3), (6, 7, 8, 9), (8,)]
    with steer(llama, {}, rule=PositionRule(last=1), tied=True) as steering:
        store = PrefixStore(CountedHead(llama), steering, dtype=torch.float32, pad_token_id=0)
        token = store.token_bytes((1,))
        assert token == 2 * 3 * 2 * 8 * 4, "keys and values, layers, heads, width, bytes"
        for limit, kept in ((0, 0), (2 * token, 0), (3 * token, 1), (8 * token, 2), (9 * token, 3), (10 * token, 4)):
            store = PrefixStore(CountedHead(llama), steering, dtype=torch.float32, pad_token_id=0)
            store.keep(prefixes, limit=limit, group=2)
            assert len(store) == kept and store.size <= limit
        half = PrefixStore(CountedHead(llama), steering, dtype=torch.float16, pad_token_id=0)
        half.keep(prefixes, limit=10 * token, group=2)
        assert half.size == store.size / 2


def test_examples_of_like_length_share_batches() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 100, 203)]
    sampler = LengthGrouped(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(203)) and first == list(LengthGrouped(lengths, 8, seed=3))
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == list(range(203))
    assert list(LengthGrouped(lengths, 8, seed=4)) != first

    def pads(order: list[int]) -> int:
        batches = [[lengths[i] for i in order[at : at + 8]] for at in range(0, len(order), 8)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert pads(first) < 0.3 * pads(list(range(203)))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("positions", ["l2", "f2+l2"])
def test_blocks_computed_again_give_the_same_gradients(tiny: Any, stream: str, positions: str) -> None:
    """And keep less; edits inside a block are computed again with it."""
    from test_ways import LENGTHS, batch_of, interventions_of, measured

    model, rule, batch = tiny("qwen3").requires_grad_(False), PositionRule.parse(positions), batch_of(LENGTHS)
    made = interventions_of(model, sites=(Site(layer=0, stream=stream), Site(layer=1, stream=stream)))
    with steer(model, made.edits(), rule=rule, tied=True) as steering:
        ways = Ways(head=CountedHead(model), steering=steering, rule=rule)
        store = PrefixStore(ways.head, steering, dtype=torch.float32, pad_token_id=0)
        way = ways.behind_prefix(store) if positions == "l2" else ways.counted
        loss, gradients = measured(way, batch, made)
        before = [block.forward for block in model.model.layers]
        kept: list[int] = []
        for recomputed in (False, True):
            sizes: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
                if recomputed:
                    with recomputed_blocks(model, steering):
                        got, found = measured(way, batch, made)
                        assert torch.equal(got, loss) and torch.equal(found, gradients)
                else:
                    measured(way, batch, made)
            kept.append(sum(sizes))
        assert kept[1] < kept[0]
        assert [block.forward for block in model.model.layers] == before


def test_nothing_below_the_first_edited_layer_is_kept_for_a_gradient(llama: PreTrainedModel) -> None:
    from test_ways import LENGTHS, batch_of, interventions_of

    llama.requires_grad_(False)
    made, rule, inputs = interventions_of(llama, sites=(Site(layer=1),)), PositionRule(last=1), []
    hooks = [layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].requires_grad)) for layer in llama.model.layers]
    try:
        with steer(llama, made.edits(), rule=rule, tied=True) as steering:
            Ways(head=CountedHead(llama), steering=steering, rule=rule).counted(batch_of(LENGTHS))
    finally:
        for hook in hooks:
            hook.remove()
    assert inputs == [False, False, True]


IDENTITIES = [
    (m, a) for m, each in METHODS.items() if each.no_edit_start for a in (("", "gelu", "sigmoid") if each.no_edit_activated else ("",))
]


@pytest.mark.parametrize(("method", "activation"), IDENTITIES)
def test_a_run_from_identity_starts_as_the_base_and_learns(base: Base, data: Path, tmp_path: Path, method: str, activation: str) -> None:
    settings = replace(SETTINGS, method=method, rank=2, activation=activation, init="identity", lr=5e-2, warmup=0.0, epochs=4)
    result = train(base, data, settings, tmp_path / "a")
    plain = train(base, data, replace(settings, init="pyreft", lr=0.0, method="red", activation=""), tmp_path / "red")
    assert abs(result.history[0].loss - plain.history[0].loss) < 1e-5, "RED starts as the base"
    assert result.history[-1].loss < 0.95 * result.history[0].loss
    made = Interventions(one_form([Site(layer=0)], method=method, rank=2, activation=activation), width=16)
    made.start_without_edit()
    h = torch.randn(5, 16)
    module = made.intervention("0.block_output")
    assert module(h).abs().max() < 1e-6
    (module(h) * torch.randn(5, 16)).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in made.parameters())


def test_methods_without_such_a_start_are_refused() -> None:
    with pytest.raises(InputError, match="init identity: consreft has no values .* loreft, noreft, direft, lobireft, red"):
        replace(SETTINGS, method="consreft", init="identity")
    with pytest.raises(InputError, match="init identity: loreft with gelu edits at any start"):
        replace(SETTINGS, activation="gelu", init="identity")
    with pytest.raises(InputError, match="init 'zero' is unknown; known: pyreft, identity"):
        replace(SETTINGS, init="zero")


def test_what_is_planned_of_prefixes(tokenizer: PreTrainedTokenizerFast, data: Path) -> None:
    read = load_data(data, tokenizer, max_length=200)
    examples = Examples(training=list(read.examples), held_out=[])

    def plan(**changes: Any) -> way_choice.PrefixPlan:
        settings = replace(SETTINGS, **changes)
        return way_choice.plan_prefixes(settings.rule, examples, settings)

    assert plan().splits and plan().kept
    assert plan(epochs=1).splits and not plan(epochs=1).kept
    assert not plan(max_steps=5).kept and plan(max_steps=6).kept
    assert not plan(cache_mb=0).kept
    assert not any(plan(positions=positions).splits for positions in ("f1", "f2+l2", "prompt", "all"))
    short = max(example.prompt_length for example in examples.training)
    assert plan(positions=f"l{short}").splits, "an end gets at most half of a prompt"


@pytest.mark.parametrize(("family", "changes", "behind"), [("mamba", {}, False), ("gemma3_text", {"sliding_window": 4}, True)])
def test_a_family_is_tried_and_not_looked_up(family: str, changes: dict[str, Any], behind: bool) -> None:
    """A recurrent state is no cache of keys and values; windows that are shorter than a prompt are."""
    from test_ways import batch_of, interventions_of

    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, **shape, num_key_value_heads=2, head_dim=8, pad_token_id=258, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    batch, made, said = batch_of(((14, 3), (25, 5))), interventions_of(model), difference_of
    with steer(model, made.edits(), rule=PositionRule(last=2), tied=True) as steering:
        ways = Ways(head=CountedHead(model), steering=steering, rule=PositionRule(last=2))
        store = PrefixStore(ways.head, steering, dtype=torch.float32, pad_token_id=0)
        assert said(ways.counted, ways, batch, made) is None
        assert (said(ways.behind_prefix(store), ways, batch, made) is None) == behind


def difference_of(way: Way, ways: Ways, batch: Batch, made: Interventions) -> str | None:
    return difference(way, ways.plain, batch, list(made.parameters()), torch.float32)


@pytest.mark.parametrize("fault", ["mask", "states"])
def test_a_way_that_gives_something_else_is_not_taken(
    base: Base, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    right = PrefixStore.cache_of

    def wrong(self: PrefixStore, prefixes: Any) -> Any:
        cache, mask = right(self, prefixes)
        if fault == "mask":
            mask[:, 0] = 1 - mask[:, 0]  # one token of the longest row is not seen, and a pad of the others is
        else:
            layer: Any = cache.layers[1]
            layer.keys = layer.keys.roll(1, dims=-2)
        return cache, mask

    monkeypatch.setattr(PrefixStore, "cache_of", wrong)
    result = train(base, data, replace(SETTINGS, epochs=2), tmp_path / "a")
    note, layers = result.notes
    assert "the layer below the first edit" in layers
    assert "every token is computed in every step" in note and ("a loss of" in note or "gradients that are off" in note)


def test_a_bfloat16_base_is_trained_behind_its_prefixes(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, data: Path, tmp_path: Path
) -> None:
    rounded = copy.deepcopy(llama).bfloat16()
    settings = replace(SETTINGS, epochs=6, lr=2e-2, gradient_checkpointing=True)
    result = train(base_from_memory(rounded, tokenizer, name="tiny-llama"), data, settings, tmp_path / "a")
    assert "computed without a graph" in result.notes[0] and "below the first edit put out is computed once" in result.notes[1]
    other = replace(settings, positions="f2+l2", layers="1;2")
    above = train(base_from_memory(rounded, tokenizer, name="tiny-llama"), data, other, tmp_path / "b")
    assert "the 2 layers below" in above.notes[0] and above.history[-1].loss < 0.97 * above.history[0].loss
    assert result.history[-1].loss < 0.97 * result.history[0].loss and result.adapter.dtype == "bfloat16"
