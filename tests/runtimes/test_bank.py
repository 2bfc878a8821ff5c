"""Rows of one batch with adapters of their own, out of a bank that loads, evicts, reuses slots and grows meanwhile: each as alone."""

from __future__ import annotations

import builtins
import io
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rounding
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_bundle import ADAPTERS, LAYERS, ROUNDING, VOCABULARY, WIDTH, ToyDecoder, toy_tokenizer, write_toy_bundle

import runtimes.bank
import runtimes.stacked
from runtimes.artifacts.bundle import Bundle
from runtimes.bank import RULE, AdapterBank
from runtimes.edits.adapter import Adapter, save_adapter
from runtimes.edits.edit import Site
from runtimes.edits.methods import METHODS
from runtimes.edits.op import rank_rows
from runtimes.edits.positions import PositionRule
from runtimes.edits.strength import Scaled, Steering, parts_of
from runtimes.errors import AdapterError, InputError, ReftError
from runtimes.generation import GenerationSettings, generate
from runtimes.ort.session import OrtSession
from runtimes.rows import AdapterRows
from runtimes.stacked import Slots
from runtimes.text.tokenizer import Tokenizer

DECODER = ToyDecoder.random()
FIRST = RULE.index("reft.first_slot")


def adapter(
    method: str, positions: str, *, rank: int = 0, tied: bool = True, activation: str = "", layers: Sequence[int] = (0, 1)
) -> Adapter:
    """Of random parameters; RED's scale is around 1."""
    random = np.random.default_rng([rank, len(positions), len(method), *layers])
    spread = 0.2 if METHODS[method].full_rank else 0.3
    tensors = {
        f"{layer}.block_output.{group}{name}": np.asarray((name == "scale") + spread * random.standard_normal(shape), np.float32)
        for layer in layers
        for group in ("",)[: int(tied)] or ("prefix.", "suffix.")
        for name, shape in METHODS[method].shapes(rank, WIDTH).items()
    }
    return replace(
        ADAPTERS["all"], method=method, rank=rank, sites=tuple(Site(layer=layer) for layer in layers),
        positions=PositionRule.parse(positions), tied=tied, activation=activation, tensors=tensors,
    )  # fmt: skip


IN_THE_BUNDLE = {
    **ADAPTERS,
    "noreft": adapter("noreft", "f1+l2", rank=2, tied=False, activation="gelu"),
    "red": adapter("red", "prompt"),
}
IN_FOLDERS = {
    "direft": adapter("direft", "f2+l1", rank=5, tied=False),
    "one-layer": adapter("loreft", "all", rank=7, layers=[1]),
    "wide-noreft": adapter("noreft", "all", rank=3, activation="gelu", layers=[0]),
    "bias-noreft": adapter("noreft", "l2", rank=1, activation="gelu", layers=[1]),
    "plain-noreft": adapter("noreft", "prompt", rank=4),
    "red-ends": adapter("red", "f1+l1", tied=False, layers=[0]),
    "red-all": adapter("red", "all", layers=[1]),
    "first": adapter("loreft", "f1", rank=1, layers=[0]),
}
KNOWN: dict[str | None, Adapter | None] = {None: None, **IN_THE_BUNDLE, **IN_FOLDERS}

steerings: st.SearchStrategy[Steering | None] = st.one_of(
    st.sampled_from(list(KNOWN)),
    st.builds(Scaled, st.sampled_from([name for name in KNOWN if name]), st.sampled_from([0.0, 0.25, 0.5, 1.0])),
)


@pytest.fixture(scope="module", params=["in place", "copied"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("banks") / "bundle"
    return write_toy_bundle(folder, in_place=request.param == "in place", adapters=IN_THE_BUNDLE)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for name, made in IN_FOLDERS.items():
        save_adapter(made, root / name)
    return root


@pytest.fixture(scope="module", params=["fused", "function"])
def session(request: pytest.FixtureRequest, bundle: Bundle) -> OrtSession:
    return OrtSession(bundle, threads=1, kernel=request.param)


@pytest.fixture(scope="module")
def small_bank(bundle: Bundle, folders: Path) -> AdapterBank:
    """Shared by all examples: what one leaves in it the next one finds. A few adapters fit."""
    bank = AdapterBank(bundle, max_bytes=11_000)
    bank.scan(folders)
    return bank


def sized(folder: Path, made: Adapter) -> Path:
    save_adapter(made, folder)
    return folder


def feed(session: OrtSession, tokens: list[list[int]], prompts: Sequence[int], widths: Sequence[int]) -> list[np.ndarray]:
    """[S, V] of every row, prompts right-padded, in calls of ``widths`` columns and then token by token; the last call's rows in step."""
    width, batch = max(prompts), len(tokens)
    steps = min(len(row) - prompt for row, prompt in zip(tokens, prompts, strict=True))
    ids, mask = np.zeros((2, batch, width + steps), np.int64)
    for row, (each, prompt) in enumerate(zip(tokens, prompts, strict=True)):
        ids[row, :prompt], mask[row, :prompt] = each[:prompt], 1
        ids[row, width:], mask[row, width:] = each[prompt : prompt + steps], 1
    found, past, start = np.zeros((batch, width + steps, VOCABULARY), np.float32), None, 0
    for size in [*widths, *[1] * (width + steps)]:
        stop = min(start + size, width if start < width else width + steps)
        if start < stop:
            out = session.step(ids[:, start:stop], mask[:, :stop], past=past, prompt_length=np.array(prompts))
            found[:, start:stop], past, start = out.logits, out.past, stop
    return [found[row, mask[row] > 0] for row in range(batch)]


def check_rows(
    session: OrtSession, names: Sequence[Steering | None], tokens: list[list[int]], prompts: Sequence[int], widths: Sequence[int]
) -> None:
    for row, found in enumerate(feed(session, tokens, prompts, widths)):
        name, strength = (None, 1.0) if (steering := names[row]) is None else parts_of(steering)
        want = DECODER.logits(tokens[row][: len(found)], KNOWN[name], prompts[row], strength)
        rounding.check(found, want, ROUNDING, f"row {row} of {list(names)}")


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_every_row_is_as_alone(session: OrtSession, small_bank: AdapterBank, data: st.DataObject) -> None:
    """Of any mixture of forms, ranks and positions; B = S is as frequent as all others together."""
    batch = data.draw(st.integers(1, 5))
    names = data.draw(st.lists(steerings, min_size=batch, max_size=batch))
    longest = data.draw(st.one_of(st.just(batch), st.integers(1, 7)))
    prompts = [longest, *data.draw(st.lists(st.integers(1, longest), min_size=batch - 1, max_size=batch - 1))]
    steps = data.draw(st.integers(0, 2))
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    tokens = [random.integers(0, VOCABULARY, prompt + steps).tolist() for prompt in prompts]
    widths = data.draw(st.sampled_from([[longest], [2] * longest, [batch] * longest, [1]]))
    try:
        rows = AdapterRows(small_bank, names)
    except InputError as error:
        if "does not fit in the bank" in str(error):
            return
        raise
    with rows:
        session.set_rows(rows)
        check_rows(session, names, tokens, prompts, widths)
        assert small_bank.memory.banks <= small_bank.max_bytes


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_rows_that_come_go_and_change(session: OrtSession, small_bank: AdapterBank, data: st.DataObject) -> None:
    with AdapterRows(small_bank) as rows:
        session.set_rows(rows)
        names: list[Steering | None] = []
        changes = st.tuples(st.sampled_from(["append", "append", "set", "remove"]), steerings, st.integers(-8, 7))
        # All at once: what fits depends on what an earlier example left in the bank.
        for change, name, place in data.draw(st.lists(changes, min_size=1, max_size=8)):
            at = place % len(names) - (len(names) if place < 0 else 0) if names else 0
            try:
                if change == "append" or not names:
                    rows.append(name)
                    names.append(name)
                elif change == "set":
                    rows[at] = name
                    names[at] = name
                else:
                    rows.remove(at)
                    names[at] = names[-1]
                    names.pop()
            except InputError as error:
                if "does not fit in the bank" not in str(error):
                    raise
            assert rows.names == tuple(names) and {parts_of(each)[0] for each in names if each} <= set(small_bank.resident)
            if names:
                tokens = [[7 * (row + 1) + column for column in range(4)] for row in range(len(names))]
                check_rows(session, names, tokens, [3] * len(names), [3])


@pytest.mark.parametrize("fault", ["first slot", "halves", "rules of other rows", "stale slots", "strength"])
def test_a_planted_fault_is_seen(session: OrtSession, folders: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "first slot":
        right = PositionRule.tensors
        monkeypatch.setattr(PositionRule, "tensors", lambda self, *, tied, first_slot=0: right(self, tied=tied, first_slot=first_slot + 1))
    elif fault == "halves":
        monkeypatch.setattr(runtimes.stacked, "rank_rows", lambda rank, padded, activated: rank_rows(rank, padded, "all"))
    elif fault == "strength":
        monkeypatch.setattr(runtimes.bank, "scaled_banks", lambda node, arrays, strength, adapter: tuple(arrays))
    elif fault == "rules of other rows":
        right_rules = AdapterRows.rules
        monkeypatch.setattr(AdapterRows, "rules", lambda self, rows: np.roll(right_rules(self, rows), 1, axis=1))
    else:
        right_write = runtimes.stacked.StackedNode.write
        monkeypatch.setattr(runtimes.stacked.StackedNode, "write", lambda self, slots, e: right_write(self, slots, e) if e else None)
    bank = AdapterBank(session.bundle)
    bank.scan(folders)
    names = ["bias-noreft", Scaled("wide-noreft", 0.5), "noreft", None, Scaled("one-layer", -1.0)]
    with AdapterRows(bank, ["ends", "red", "direft"]):
        pass
    for name in ("ends", "direft"):
        bank.evict(name)
    tokens = [[11, 40, 7, 99, 120 + row, 5] for row in range(5)]
    with AdapterRows(bank, names) as rows:
        session.set_rows(rows)
        with pytest.raises(AssertionError):
            check_rows(session, names, tokens, [5] * 5, [5])


def test_strengths(bundle: Bundle, session: OrtSession) -> None:
    """Slots of their own, none for strength 1; the base at 0; idle ones go, in the order of their last use."""
    bank = AdapterBank(bundle)
    tokens = [[11, 40, 7, 99, 5 + row, 5] for row in range(3)]
    with AdapterRows(bank, ["red", Scaled("red", 1.0), Scaled("red", 0.0)]) as rows:
        assert bank.live_rows("red") == 3 and (rows.rules(range(1)) == rows.rules(range(1, 2))).all()
        session.set_rows(rows)
        check_rows(session, ["red", "red", None], tokens, [5] * 3, [5])
        rows[2] = Scaled("red", -0.5)
        check_rows(session, rows.names, tokens, [5] * 3, [5])
        with pytest.raises(InputError, match="adapter red steers 3 live rows"):
            bank.evict("red")
        three = bank.memory.adapters
        for strength in range(2, 2 + 2 * runtimes.bank.IDLE_STRENGTHS):
            rows[1] = Scaled("red", float(strength))
        assert bank.memory.adapters == three * (3 + runtimes.bank.IDLE_STRENGTHS) // 3
    bank.evict("red")
    assert not bank.resident and not bank.memory.adapters
    for strength, message in {
        float("nan"): "the strength of red is nan, expected a finite number",
        float("inf"): "is inf, expected",
        1e39: "strength 1e.39 takes red beyond float32 at 0.block_output; lower it",
    }.items():
        with pytest.raises(InputError, match=message):
            AdapterRows(bank, [Scaled("red", strength)])
    assert not bank.resident


def test_slots_are_reused_and_banks_stay_where_they_are(bundle: Bundle, folders: Path) -> None:
    bank = AdapterBank(bundle)
    bank.scan(folders)
    for name in ("ends", "all", "prompt", "one-layer"):
        bank.load(name)
    before = bank.stacked
    bank.evict("ends")
    bank.load("first")
    assert bank.stacked.version == before.version and bank.stacked.writes > before.writes
    assert bank.stacked.arrays is before.arrays
    with AdapterRows(bank, ["all", "first"]) as rows:
        assert rows.rules(range(2))[FIRST].tolist() == [2, 0]
    bank.load("direft")  # two slots do not fit in the gap of one
    assert bank.stacked.version == before.version + 1
    assert bank.resident == ("prompt", "one-layer", "all", "first", "direft")


def test_memory(bundle: Bundle, tmp_path: Path) -> None:
    bank = AdapterBank(bundle)
    unused = {name: array.nbytes for name, array in bank.stacked.arrays.items()}
    assert (bank.memory.banks, bank.memory.factor) == (0, 1.0)
    for seed in range(100):
        bank.add(sized(tmp_path / f"a{seed}", adapter("loreft", "all", rank=2, layers=[1])))
    each = 4 * (2 * 2 * WIDTH + 2)
    assert bank.memory.adapters == 100 * each and 1.0 <= bank.memory.factor <= 1.07
    assert all(array.nbytes == unused[name] for name, array in bank.stacked.arrays.items() if not name.startswith("reft.1.block_output."))
    bank.load("ends")  # rank 2, two slots, and nobody else's node
    assert bank.memory.banks - bank.memory.adapters <= each * (100 + 100 // 16 + 2) + 3 * each


def test_what_was_used_longest_ago_goes_first(bundle: Bundle) -> None:
    size = 4 * LAYERS * (2 * WIDTH + 1)
    bank = AdapterBank(bundle, max_bytes=size * 6)  # "all" of one slot of rank 1; "ends" of two of rank 2
    bank.load("all")
    bank.load("ends")
    assert bank.resident == ("all", "ends") and bank.memory.banks == size * 6
    bank.load("all")
    bank.load("prompt")  # rank 3: room for two slots of it
    assert bank.resident == ("all", "prompt")
    with AdapterRows(bank, ["all", "prompt"]):
        with pytest.raises(InputError, match=r"adapter ends does not fit in the bank: .* max_bytes is 1,584; 2 adapters of live rows"):
            bank.load("ends")
        assert bank.resident == ("all", "prompt")
        with pytest.raises(InputError, match="adapter all steers 1 live row; release those first"):
            bank.evict("all")
    bank.load("ends")
    assert bank.resident == ("ends",)


def test_a_refused_load_evicts_nothing(bundle: Bundle, session: OrtSession) -> None:
    bank = AdapterBank(bundle, max_bytes=3_000)
    names = ["all", "prompt"]
    bank.load("red")
    with AdapterRows(bank, names) as rows:
        resident = bank.resident
        with pytest.raises(InputError, match="does not fit"):
            bank.load("noreft")
        assert bank.resident == resident == ("red", *names)
        session.set_rows(rows)
        check_rows(session, names, [[5, 6, 7], [8, 9, 10]], [2, 2], [2])
    with AdapterRows(bank, ["red", "red"]) as rows:
        session.set_rows(rows)
        check_rows(session, ["red", "red"], [[5, 6, 7], [8, 9, 10]], [2, 2], [2])


def test_sessions_share_a_bank_while_another_thread_loads(bundle: Bundle, folders: Path) -> None:
    bank = AdapterBank(bundle)
    bank.scan(folders)
    done, failed = threading.Event(), []

    def churn() -> None:
        try:
            while not done.is_set():
                for name in IN_FOLDERS:
                    bank.load(name)
                for name in IN_FOLDERS:
                    if name != "direft":
                        bank.evict(name)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=churn)
    with OrtSession(bundle, threads=1) as one, OrtSession(bundle, threads=1) as two:
        pairs = [(one, ["ends", "direft", None]), (two, ["noreft", "red", "all"])]
        made = [AdapterRows(bank, names) for _, names in pairs]
        for (each, _), rows in zip(pairs, made, strict=True):
            each.set_rows(rows)
        thread.start()
        try:
            for _ in range(20):
                for each, names in pairs:
                    check_rows(each, names, [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14]], [3, 3, 3], [3])
        finally:
            done.set()
            thread.join()
    assert not failed


def test_rows_and_one_adapter_in_turn(session: OrtSession) -> None:
    bank = AdapterBank(session.bundle)
    tokens, prompts = [[5, 17, 40, 9], [8, 2, 50, 3]], [3, 3]
    with AdapterRows(bank, ["ends", "red"]) as rows:
        session.set_rows(rows)
        assert session.adapter is None and session.rows is rows
        check_rows(session, rows.names, tokens, prompts, [3])
        for name in (None, "prompt", None):
            session.set_adapter(name)
            assert session.rows is None
            check_rows(session, [name, name], tokens, prompts, [3])
        session.set_rows(rows)
        check_rows(session, rows.names, tokens, prompts, [3])


def test_generate(bundle: Bundle) -> None:
    tokenizer = toy_tokenizer()
    prompts = ["The fox", "Hi", "a lazy dog"]
    names = ["ends", None, "all"]
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    if bundle.manifest.kv_cache == "appended":
        prompts, ids = prompts[:1] * 3, ids[:1] * 3
    with OrtSession(bundle, threads=1) as session, AdapterRows(AdapterBank(bundle), names) as rows:
        session.set_rows(rows)
        answers = generate(session, Tokenizer.load(bundle.folder, bundle.manifest.model), prompts, GenerationSettings(max_new_tokens=6))
    for answer, prompt, name in zip(answers, ids, names, strict=True):
        want = DECODER.greedy(prompt, 6, KNOWN[name])
        assert list(answer.tokens) == want[: len(answer.tokens)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bank_holds_what_the_bundle_ships(tmp_path: Path, precision: str) -> None:
    """To the bit, in the graph's type, whatever it was stacked with."""
    bundle = write_toy_bundle(tmp_path / "b", adapters=IN_THE_BUNDLE, precision=precision)
    bank = AdapterBank(bundle)
    for name in bundle.adapter_names:
        bank.load(name)
    arrays = bank.stacked.arrays
    for name in bundle.adapter_names:
        stored = bundle.adapter_tensors(name)
        with AdapterRows(bank, [name]) as rows:
            first = int(rows.rules(range(1))[FIRST, 0])
        for node in bundle.nodes:
            for bank_name, kind in zip(node.bank_names, node.spec.banks, strict=True):
                want = stored[bank_name]
                here = arrays[bank_name][first : first + len(KNOWN[name].groups)]
                if "r" in kind.axes:
                    here = here[:, rank_rows(want.shape[1], here.shape[1], node.activated)]
                assert here.dtype == want.dtype
                np.testing.assert_array_equal(here, np.broadcast_to(want, here.shape) if len(here) else here)


def test_ten_thousand_are_listed_and_none_is_opened(bundle: Bundle, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(10_000):
        at = tmp_path / "many" / f"a{number}"
        at.mkdir(parents=True)
        for file in ("adapter.json", "adapter.safetensors"):
            os.link(folders / "first" / file, at / file)
    (tmp_path / "many" / "notes").mkdir()
    bank = AdapterBank(bundle)
    opened: list[object] = []
    with monkeypatch.context() as patch:
        for module, function in ((io, "open"), (builtins, "open"), (os, "open")):
            patch.setattr(module, function, lambda path, *_, **__: opened.append(path))
        listed = bank.scan(tmp_path / "many")
    assert not opened
    size = sum((folders / "first" / file).stat().st_size for file in ("adapter.json", "adapter.safetensors"))
    assert len(listed) == 10_000 and {each.size for each in listed} == {size}
    assert len(bank.names) == 10_000 + len(IN_THE_BUNDLE) and not bank.resident
    bank.load("a77")
    shutil.rmtree(tmp_path / "many" / "a77")
    shutil.rmtree(tmp_path / "many" / "a78")
    monkeypatch.chdir(tmp_path)
    assert len(bank.scan("many")) == 9_998
    assert "a77" in bank.names and "a78" not in bank.names
    bank.remove("a77")
    assert "a77" not in bank.names and not bank.resident


@given(data=st.data())
def test_runs_of_slots_never_meet(data: st.DataObject) -> None:
    slots, taken = Slots(), []
    for _ in range(data.draw(st.integers(1, 40))):
        if taken and data.draw(st.booleans()):
            slots.give_back(taken.pop(data.draw(st.integers(0, len(taken) - 1))))
        else:
            count = data.draw(st.integers(1, 2))
            run = slots.first_fit(count)
            used = {slot for each in taken for slot in each}
            free = next(at for at in range(max(used, default=-1) + 2) if not used & set(range(at, at + count)))
            assert run == range(free, free + count), "the first that fits"
            slots.take(run)
            taken.append(run)


def damaged(folder: Path, root: Path) -> Path:
    """A copy with one bit of its tensors turned."""
    shutil.copytree(folder, root / "damaged")
    file = root / "damaged" / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    return root / "damaged"


def test_refusals(bundle: Bundle, session: OrtSession, folders: Path, tmp_path: Path) -> None:
    bank = AdapterBank(bundle)
    bank.scan(folders)
    base = ADAPTERS["all"].base
    other = sized(tmp_path / "other", replace(ADAPTERS["all"], base=replace(base, fingerprint="1" * 64)))
    deeper = sized(tmp_path / "deeper", replace(ADAPTERS["all"], base=replace(base, num_hidden_layers=5)))
    node = sized(tmp_path / "node", adapter("noreft", "all", rank=1, activation="relu"))
    twin = sized(tmp_path / "all", ADAPTERS["all"])
    (tmp_path / "bad" / "a b").mkdir(parents=True)
    for file in ("adapter.json", "adapter.safetensors"):
        shutil.copy(folders / "first" / file, tmp_path / "bad" / "a b" / file)
    foreign = write_toy_bundle(tmp_path / "foreign", decoder=ToyDecoder.random(5))
    rows = AdapterRows(bank, ["all", None])
    session.set_rows(rows)
    released = AdapterRows(bank, ["all"])
    released.release()
    one, two = np.ones((1, 2), np.int64), np.ones((2, 2), np.int64)

    def step_released() -> None:
        session.set_rows(released)
        session.step(one, one)

    refusals: dict[str, tuple[type[ReftError], Callable[[], object]]] = {
        "no adapter 'nobody' is listed; known: ends, prompt, all, noreft, red, ": (InputError, lambda: bank.load("nobody")),
        "adapter red is not resident; load it first": (InputError, lambda: bank.evict("red")),
        "was trained on toy .fingerprint 111111111111.*use the base it was trained on": (AdapterError, lambda: bank.add(other)),
        "has 2 layers, width 16": (AdapterError, lambda: bank.add(deeper)),
        "has no edit node reft.0.block_output.relu": (AdapterError, lambda: bank.add(node)),
        "does not match its sha256": (AdapterError, lambda: bank.add(damaged(folders / "first", tmp_path))),
        "two adapters are called all: .*rename one's folder": (InputError, lambda: bank.add(twin)),
        "is not an adapter folder": (AdapterError, lambda: bank.add(tmp_path)),
        "adapter name '../x' cannot be used": (AdapterError, lambda: bank.add(other, "../x")),
        "adapter name 'a b' cannot be used": (AdapterError, lambda: bank.scan(tmp_path / "bad")),
        "cannot be listed": (InputError, lambda: bank.scan(tmp_path / "nowhere")),
        "adapter red is the bundle's own; take it out with": (InputError, lambda: bank.remove("red")),
        "max_bytes is 0": (InputError, lambda: AdapterBank(bundle, max_bytes=0)),
        "adapter all alone takes 264 bytes of the bank, and max_bytes is 9; allow more": (
            InputError,
            lambda: AdapterBank(bundle, max_bytes=9).load("all"),
        ),
        "the batch has 1 row, and adapters are set for 2": (InputError, lambda: session.step(one, one)),
        "the rows are of a bank of": (InputError, lambda: OrtSession(foreign, threads=1).set_rows(rows)),
        "these rows were released": (InputError, step_released),
        "rows were released, and their adapters may be gone": (InputError, lambda: released.append("all")),
    }
    for message, (kind, refused) in refusals.items():
        with pytest.raises(kind, match=message) as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert bank.resident == ("all",), "what was refused left nothing"
    assert {"other", "deeper", "node", "damaged"}.isdisjoint(bank.names)
    session.set_rows(rows)
    session.step(two, two)


def test_version_1_cannot_mix(tmp_path: Path) -> None:
    old = write_toy_bundle(tmp_path / "old", one_rule=True)
    with pytest.raises(InputError, match="is of version 1, and all rows of a batch share one adapter; export the bundle again"):
        AdapterBank(old)


def test_an_adapter_that_is_added_again_is_read_again(bundle: Bundle, tmp_path: Path) -> None:
    """Its files may be others, and of the same size."""
    bank, folder = AdapterBank(bundle), tmp_path / "mine"
    save_adapter(adapter("loreft", "all", rank=1), folder)
    bank.add(folder)
    before = bank.load_number("mine")
    with AdapterRows(bank, ["mine"]), pytest.raises(InputError, match="steers 1 live row"):
        bank.add(folder)
    bank.add(folder)
    assert bank.load_number("mine") != before
