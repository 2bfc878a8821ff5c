"""Hooks on every family: the right stream, the right tokens, under generate, and gone afterwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import rounding
import torch
from transformers import PreTrainedModel

from reft_export.eager.steering import (
    decoder_layers,
    greedy_tokens,
    low_rank_edit_fn,
    site_module,
    steer,
    steered,
    steerers_of,
    steering_of,
)
from reft_export.tasks.generation import GoldenInputs, eager_greedy, pad_right
from reft_export.training.interventions import Interventions
from runtimes.edits.adapter import Adapter, BaseModel
from runtimes.edits.edit import STREAMS, LowRankEdit, Site
from runtimes.edits.form import one_form
from runtimes.edits.positions import PositionRule, slots
from runtimes.errors import AdapterError, InputError

Tiny = Callable[[str], PreTrainedModel]
WIDTH, LAYERS = 32, 3
PROMPT = torch.tensor([[5, 9, 17, 33, 65, 129, 3], [8, 6, 4, 2, 70, 71, 72]])
EVERYWHERE = PositionRule(everywhere=True)
ROUNDING = 2 * rounding.logits(4 * WIDTH, LAYERS)


def lobireft(site: Site, *, rule: PositionRule = EVERYWHERE, size: float = 1.0) -> Adapter:
    torch.manual_seed(11)
    base = BaseModel(name="tiny", fingerprint="0" * 64, num_hidden_layers=LAYERS, hidden_size=WIDTH)
    trained = Interventions(one_form([site], method="lobireft", rank=2), width=WIDTH)
    with torch.no_grad():
        trained.intervention(str(site)).s.copy_(torch.tensor([size, -2 * size]))
    return trained.to_adapter(base, rule)


def stream(model: PreTrainedModel, layer: int, run: Callable[[], object]) -> torch.Tensor:
    """The output of one block, taken by a hook of the test's own."""
    seen = []
    handle = decoder_layers(model)[layer].register_forward_hook(
        lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())
    )
    run()
    handle.remove()
    return seen[-1]


@torch.no_grad()
def test_block_output_is_edited_in_every_family(family: str, tiny: Tiny) -> None:
    model = tiny(family)
    adapter = lobireft(Site(layer=1))
    R, s = adapter.tensors["1.block_output.R"], adapter.tensors["1.block_output.s"]
    plain = stream(model, 1, lambda: model(PROMPT))
    with steered(model, adapter) as steering:
        edited = stream(model, 1, lambda: model(PROMPT))
        logits = model(PROMPT).logits
    assert steering.slot is None
    want = plain + torch.from_numpy(s @ R)
    rounding.check(edited, want, ROUNDING)
    # The rest of the model runs on the edited stream: feeding it by hand gives the same logits.
    replace = decoder_layers(model)[1].register_forward_hook(lambda m, a, out: (want, *out[1:]) if isinstance(out, tuple) else want)
    by_hand = model(PROMPT).logits
    replace.remove()
    rounding.check(logits, by_hand, ROUNDING)
    assert rounding.distance(logits, model(PROMPT).logits) > 50 * ROUNDING


@torch.no_grad()
def test_every_stream_of_every_family_can_be_steered(family: str, tiny: Tiny) -> None:
    model = tiny(family)
    base = model(PROMPT).logits
    for name in STREAMS:
        with steered(model, lobireft(Site(layer=1, stream=name))):
            assert not torch.equal(model(PROMPT).logits, base), name
        assert torch.equal(model(PROMPT).logits, base), f"{name}: hooks are left behind"


@torch.no_grad()
def test_block_input_is_the_block_before(llama: PreTrainedModel) -> None:
    with steered(llama, lobireft(Site(layer=2, stream="block_input"))):
        through_input = llama(PROMPT).logits
    # The same edit one block earlier, at its output: R and s of another site are drawn from the same seed.
    with steered(llama, lobireft(Site(layer=1))):
        assert torch.equal(llama(PROMPT).logits, through_input)


@torch.no_grad()
@pytest.mark.parametrize("name", ["attention_output", "mlp_output"])
def test_inner_streams_add_to_the_residual_in_llama(llama: PreTrainedModel, name: str) -> None:
    adapter = lobireft(Site(layer=0, stream=name))
    vector = torch.from_numpy(adapter.tensors[f"0.{name}.s"] @ adapter.tensors[f"0.{name}.R"])
    module = site_module(llama, Site(layer=0, stream=name))
    by_hand = module.register_forward_hook(lambda m, a, out: (out[0] + vector, *out[1:]) if isinstance(out, tuple) else out + vector)
    want = llama(PROMPT).logits
    by_hand.remove()
    with steered(llama, adapter):
        rounding.check(llama(PROMPT).logits, want, ROUNDING)


RULES = [PositionRule.parse(p) for p in ("f2+l2", "f3", "l1", "prompt", "all")]


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right", "none"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_slots_under_generate_are_the_rules(llama: PreTrainedModel, rule: PositionRule, padding: str) -> None:
    """Every forward that generate makes gets the slots that the oracle gives for its mask."""
    ids, mask = PROMPT.clone(), torch.ones_like(PROMPT)
    if padding != "none":
        mask[1, :3] = 0
        if padding == "right":
            mask = mask.flip(1)
    lengths = mask.sum(1)
    seen: list[np.ndarray] = []

    def spy(h: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        seen.append(slot.numpy().copy())
        return h

    for prompt_length in (None, lengths):
        seen.clear()
        with steer(llama, {Site(layer=0): spy}, rule=rule, tied=False) as steering:
            steering.prompt_length = prompt_length
            options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 258}
            llama.generate(ids, attention_mask=mask, **options)
        assert [s.shape[1] for s in seen] == [7, 1, 1, 1]
        grown = mask.numpy()
        for slot in seen:
            want = slots(rule, grown, slot.shape[1], tied=False, prompt_length=lengths.numpy())
            assert np.array_equal(slot, want)
            grown = np.concatenate([grown, np.ones((2, 1), grown.dtype)], 1)
        # And against the rule in words, for the prefill: rank p of L real tokens.
        for row in range(2):
            real = [int(seen[0][row, c]) for c in range(7) if mask[row, c]]
            n = len(real)
            f, last = min(rule.first, n // 2), min(rule.last, n // 2)
            spelled = [1 if p >= n - last else 0 if p < f or rule.prompt or rule.everywhere else -1 for p in range(n)]
            assert real == spelled
            assert all(int(seen[0][row, c]) == -1 for c in range(7) if not mask[row, c])


@torch.no_grad()
def test_cache_and_padding_do_not_change_what_is_edited(llama: PreTrainedModel) -> None:
    """Prefill and decode with a cache, chunked prefill, and padded batches against one full forward of each row."""
    adapter = lobireft(Site(layer=1), rule=PositionRule(first=2, last=2))
    whole = torch.tensor([[5, 9, 17, 33, 65, 129, 3, 40, 41, 42]])
    with steered(llama, adapter) as steering:
        steering.prompt_length = [7]
        full = llama(whole).logits
        first = llama(whole[:, :3], use_cache=True)
        second = llama(whole[:, 3:8], past_key_values=first.past_key_values, use_cache=True)
        third = llama(whole[:, 8:], past_key_values=second.past_key_values)
        chunked = torch.cat([first.logits, second.logits, third.logits], 1)
        rounding.check(chunked, full, ROUNDING)

        steering.prompt_length = [7, 4]
        short = torch.tensor([[70, 71, 72, 73]])
        ids = torch.cat([whole[:, :7], torch.cat([torch.full((1, 3), 258), short], 1)])
        mask = (ids != 258).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        batch = llama(ids, attention_mask=mask, position_ids=positions).logits
        steering.prompt_length = None
        rounding.check(batch[1, 3:], llama(short).logits[0], ROUNDING)


def test_prompt_without_prompt_length_is_the_first_call_alone(llama: PreTrainedModel) -> None:
    seen = []

    def spy(h: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        seen.append(slot.clone())
        return h

    with steer(llama, {Site(layer=0): spy}, rule=PositionRule(last=1), tied=True), torch.no_grad():
        out = llama(PROMPT, use_cache=True)
        llama(PROMPT[:, :2], past_key_values=out.past_key_values)
    assert seen[0].tolist() == [[-1] * 6 + [0]] * 2 and seen[1].tolist() == [[-1, -1]] * 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "falcon"])
def test_greedy_tokens_equal_generate(tiny: Tiny, name: str) -> None:
    model = tiny(name)
    adapter = lobireft(Site(layer=1), rule=PositionRule(first=2, last=2), size=3.0)
    mask = torch.ones_like(PROMPT)
    mask[1, :3] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 258}
    base = model.generate(PROMPT, attention_mask=mask, **options)[:, 7:].tolist()
    with steered(model, adapter) as steering:
        want = model.generate(PROMPT, attention_mask=mask, **options)[:, 7:].tolist()
        assert greedy_tokens(model, PROMPT, mask, 8, steering=steering) == want
        # Right padding, and each row alone, say the same.
        right = torch.stack([PROMPT[0], torch.cat([PROMPT[1, 3:], torch.full((3,), 258)])])
        assert greedy_tokens(model, right, mask.flip(1), 8, steering=steering) == want
        assert greedy_tokens(model, PROMPT[1:, 3:], None, 8) == want[1:]
    assert greedy_tokens(model, PROMPT, mask, 8) == base
    assert want != base


@torch.no_grad()
def test_greedy_tokens_end_with_eos(llama: PreTrainedModel) -> None:
    free = greedy_tokens(llama, PROMPT, None, 6)
    stopped = greedy_tokens(llama, PROMPT, None, 6, eos={free[0][2]})
    assert stopped[0] == free[0][: free[0].index(free[0][2]) + 1]
    assert stopped[1] == (free[1][: free[1].index(free[0][2]) + 1] if free[0][2] in free[1] else free[1])


def test_hooks_are_removed_after_an_exception(llama: PreTrainedModel) -> None:
    def boom(h: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("boom")

    count = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules())
    with pytest.raises(RuntimeError, match="boom"), steer(llama, {Site(layer=0): boom}, rule=EVERYWHERE, tied=True):
        llama(PROMPT)
    with pytest.raises(InputError), steer(llama, {Site(layer=0): boom, Site(layer=9): boom}, rule=None, tied=True):
        pass
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llama.modules()) == count


@torch.no_grad()
def test_no_rule_and_zero_edit_are_the_base_to_the_bit(llama: PreTrainedModel) -> None:
    zero = LowRankEdit(U=np.zeros((2, WIDTH)), A=np.ones((2, WIDTH)), b=np.ones(2))
    one = LowRankEdit(U=np.ones((2, WIDTH)), A=np.ones((2, WIDTH)), b=np.ones(2))
    base = llama(PROMPT).logits
    for edit, rule in ((zero, EVERYWHERE), (one, None)):
        function = low_rank_edit_fn([edit], torch.float32, "cpu")
        with steer(llama, {Site(layer=1): function}, rule=rule, tied=True):
            assert torch.equal(llama(PROMPT).logits, base)


def test_refused_forwards_and_adapters(llama: PreTrainedModel) -> None:
    with steered(llama, lobireft(Site(layer=1))) as steering, torch.no_grad():
        with pytest.raises(InputError, match="2-D attention_mask"):
            llama(PROMPT, attention_mask=torch.ones(2, 1, 7, 7))
        out = llama(PROMPT, use_cache=True)
        with pytest.raises(InputError, match="does not cover 7 past and 1 current"):
            llama(PROMPT[:, :1], attention_mask=torch.ones(2, 1), past_key_values=out.past_key_values)
        with pytest.raises(InputError, match="outside the steered model's own forward"):
            llama.model(PROMPT)
        steering.prompt_length = [1, 2, 3]
        with pytest.raises(InputError, match="prompt_length has 3 entries, the batch has 2 rows"):
            llama(PROMPT)
    torch.manual_seed(0)
    other = BaseModel(name="other", fingerprint="0" * 64, num_hidden_layers=LAYERS, hidden_size=64)
    wide = Interventions(one_form([Site(layer=0)], method="direft", rank=1), width=64).to_adapter(other, EVERYWHERE)
    message = "trained on other .3 layers, width 64.; this base has 3 layers, width 32"
    with pytest.raises(AdapterError, match=message), steered(llama, wide):
        pass
    with pytest.raises(InputError, match="layer 3 does not exist in this base .3 layers, 0 to 2."):
        site_module(llama, Site(layer=3))


def test_base_and_adapters_are_decoded_in_one_batch_as_alone(llama) -> None:
    """Prefix and suffix, all positions, and the base, whose prompts differ in length: each name's rows are its own."""
    ids, mask = pad_right([[5, 9, 17, 33, 65], [8, 6], [70, 71, 72, 12]])
    inputs = GoldenInputs(
        input_ids=ids,
        attention_mask=mask,
        prompt_length=mask.sum(1),
        logit_positions=np.zeros((1, 2), np.int64),
        logit_columns=np.zeros((1, 1), np.int64),
        continued=3,
    )
    fewer = replace(inputs, input_ids=ids[::2], attention_mask=mask[::2], prompt_length=mask.sum(1)[::2], continued=1)
    ends, everywhere = PositionRule(first=1, last=1), EVERYWHERE
    adapters = {"ends": lobireft(Site(layer=0), rule=ends, size=3), "all": lobireft(Site(layer=1), rule=everywhere, size=3)}
    steerers = {"base": None, **steerers_of(adapters)}
    rows = {name: fewer if name == "ends" else inputs for name in steerers}
    together = eager_greedy(llama, {name: (rows[name], steerer) for name, steerer in steerers.items()}, max_tokens=12)
    assert len({together[name].tobytes() for name in steerers}) == 3
    for name, steerer in steerers.items():
        np.testing.assert_array_equal(together[name], eager_greedy(llama, {name: (rows[name], steerer)}, max_tokens=12)[name])
        for row, length in enumerate(rows[name].prompt_length[: rows[name].continued]):
            prompt = torch.from_numpy(ids[row : row + 1, :length])
            with steering_of(llama, steerer) as handle:
                assert greedy_tokens(llama, prompt, None, 12, steering=handle) == [together[name][row].tolist()]
