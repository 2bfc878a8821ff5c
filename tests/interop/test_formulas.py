"""The forms that an import folds to against the formulas as the libraries write them, in float64."""

from __future__ import annotations

import numpy as np
import rounding
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reft_export.importing.assemble import assemble
from reft_export.importing.foreign import ForeignAdapter, ForeignEdit
from reft_export.importing.pyreft.states import CLASSES, read_state
from reft_export.importing.tensors import orthogonal
from runtimes.edits.adapter import BaseModel
from runtimes.edits.edit import Site, activate
from runtimes.edits.positions import PositionRule

SITE = Site(layer=0)
SHAPES = st.tuples(st.integers(1, 5), st.integers(6, 24), st.integers(0, 2**31))
KINDS = st.sampled_from(sorted(CLASSES))
ACTIVATIONS = st.sampled_from(["", "relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid"])


def bound(width: int, rank: int, *, in_sequence: int = 1) -> float:
    """Of an edit whose sums are float64's: what rounding the folded U, A and b to float32 leaves."""
    return 2 * rounding.edit(width, rank, in_sequence=in_sequence)


def base_of(width: int) -> BaseModel:
    return BaseModel(name="base", fingerprint="f" * 64, num_hidden_layers=1, hidden_size=width)


def state_of(kind: str, rank: int, width: int, seed: int, *, bias: bool = True) -> dict[str, torch.Tensor]:
    """A state dict as ``kind`` saves it; its rotations are raw where the class keeps them so."""
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    state = {"embed_dim": torch.tensor(width), "interchange_dim": torch.tensor(width)}
    if kind == "LoreftIntervention":
        return {"weight": random(rank, width), "bias": random(rank), "rotate_layer": torch.linalg.qr(random(width, rank))[0]}
    if kind in ("ConsreftIntervention", "LobireftIntervention"):
        state["learned_source"] = random(rank)
    else:
        state |= {"learned_source.weight": random(rank, width), "learned_source.bias": random(rank)}
    if kind in ("NoreftIntervention", "NodireftIntervention"):
        state["proj_layer.weight"] = random(rank, width)
        if bias:
            state["proj_layer.bias"] = random(rank)
    else:
        original = torch.tril(random(width, rank), -1) - torch.eye(width, rank)
        state["rotate_layer.parametrizations.weight.original"] = original
        state["rotate_layer.parametrizations.weight.0.base"] = torch.linalg.qr(random(width, width))[0]
    return state


def rotation_of(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """rotate_layer.weight [d, r] as torch itself makes it from the saved tensors."""
    if "rotate_layer" in state:
        return state["rotate_layer"].double()
    raw = "rotate_layer.parametrizations.weight"
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(torch.linalg.qr(torch.randn_like(state[f"{raw}.original"]))[0])
    torch.nn.utils.parametrizations.orthogonal(holder)
    holder.load_state_dict({name.removeprefix("rotate_layer."): value for name, value in state.items() if name.startswith(raw)})
    return holder.weight.detach().double()


def pyreft_forward(kind: str, state: dict[str, torch.Tensor], h: torch.Tensor, activation: str) -> torch.Tensor:
    """The forward of each class of pyreft/interventions.py, line by line; h [t, d] in float64."""

    def act(z: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(activate(z.numpy(), activation))

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        flat = "learned_source." if name == "learned_source" and "weight" in state else ""
        weight, bias = (state.get(f"{'' if flat else name + '.'}{part}") for part in ("weight", "bias"))
        return x @ weight.double().T + (0 if bias is None else bias.double())

    if kind == "LoreftIntervention":
        R = rotation_of(state)
        return h + torch.matmul(act(linear(h, "learned_source")) - h @ R, R.T)
    if kind == "NoreftIntervention":
        return h + torch.matmul(act(linear(h, "learned_source")) - linear(h, "proj_layer"), state["proj_layer.weight"].double())
    if kind == "DireftIntervention":
        return h + torch.matmul(act(linear(h, "learned_source")), rotation_of(state).T)
    if kind == "NodireftIntervention":
        return h + torch.matmul(act(linear(h, "learned_source")), state["proj_layer.weight"].double())
    source, R = state["learned_source"].double(), rotation_of(state)
    return h + torch.matmul(source - (h @ R if kind == "ConsreftIntervention" else 0), R.T)


def imported(edits: tuple[tuple[ForeignEdit, ...], ...], width: int, activation: str = "", *, other: tuple = ()):
    """The folded edits of one site, of an adapter that holds ``other`` edits as well."""
    placed = {SITE: edits} | ({Site(layer=0, stream="mlp_output"): other} if other else {})
    tied = len(edits) == 1
    rule = PositionRule(first=1, last=1)
    foreign = ForeignAdapter(format="pyreft", edits=placed, positions=rule, tied=tied, activation=activation)
    return assemble(foreign, base_of(width)).edits()[SITE]


@given(KINDS, SHAPES, ACTIVATIONS, st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_class_is_its_forward(kind, shape, activation, bias) -> None:
    rank, width, seed = shape
    state = state_of(kind, rank, width, seed, bias=bias)
    if CLASSES[kind] in ("consreft", "lobireft"):
        activation = ""
    h = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (edit,) = imported(((read_state("x", kind, state),),), width, activation)
    rounding.check(edit.apply(h.numpy()), pyreft_forward(kind, state, h, activation), bound(width, rank))


@given(KINDS, KINDS, SHAPES, st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_two_at_a_site_act_in_sequence(first, second, shape, rank) -> None:
    """Of any two classes and ranks; and the suffix that has one alone is padded without effect."""
    other, width, seed = shape
    states = [state_of(first, rank, width, seed), state_of(second, other, width, seed + 1)]
    edits = tuple(read_state(f"{i}", kind, state) for i, (kind, state) in enumerate(zip((first, second), states, strict=True)))
    h = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    once = pyreft_forward(first, states[0], h, "")
    twice = pyreft_forward(second, states[1], once, "")
    prefix, suffix = imported((edits, edits[:1]), width)
    rounding.check(prefix.apply(h.numpy()), twice, bound(width, max(rank, other), in_sequence=2))
    rounding.check(suffix.apply(h.numpy()), once, bound(width, other))


@given(SHAPES, st.integers(1, 5), ACTIVATIONS)
@settings(max_examples=40, deadline=None)
def test_mixed_classes_and_ranks_keep_their_edits(shape, rank, activation) -> None:
    """Loreft beside Noreft of another rank, with an activation too; and a slot without an edit leaves h alone, to the bit."""
    other, width, seed = shape
    loreft, noreft = state_of("LoreftIntervention", rank, width, seed), state_of("NoreftIntervention", other, width, seed)
    edit = read_state("a", "LoreftIntervention", loreft)
    others = ((read_state("b", "NoreftIntervention", noreft),), ())
    prefix, suffix = imported(((edit,), ()), width, activation, other=others)
    h = torch.randn(3, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = pyreft_forward("LoreftIntervention", loreft, h, activation).numpy()
    rounding.check(prefix.apply(h.numpy()), expected, bound(width, rank))
    assert np.array_equal(suffix.apply(h.numpy()), h.numpy())


@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_raw_parametrization_is_torchs(rank, more, seed) -> None:
    """Tall, wide and square; a diagonal that training moved is cut to zero, as torch cuts it."""
    torch.manual_seed(seed)
    width = rank + more - 1
    for shape in ((width, rank), (rank, width)):
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.nn.init.orthogonal_(torch.empty(*shape)))
        torch.nn.utils.parametrizations.orthogonal(layer)
        stored = layer.parametrizations.weight
        with torch.no_grad():
            stored.original += 0.3 * torch.randn(*shape).tril(-1) if shape[0] >= shape[1] else 0.3 * torch.randn(*shape).triu(1)
            if seed % 2:
                stored.original.diagonal()[:1] *= 0.99
        found = orthogonal(stored.original.detach().numpy(), stored[0].base.numpy())
        assert np.array_equal(found, layer.weight.detach().numpy())


@given(SHAPES, st.integers(0, 3), st.integers(1, 3), st.integers(1, 8), ACTIVATIONS, st.booleans())
@settings(max_examples=60, deadline=None)
def test_adapterhub_overlaps(shape, prefix, suffix, length, activation, subtract) -> None:
    """ReftModule.forward over one row: both units from the original h, the suffix scattered last."""
    from runtimes.edits.positions import slots

    rank, width, seed = shape
    g = np.random.default_rng(seed)
    units = [{n: g.standard_normal((rank, width) if n != "b" else rank).astype(np.float32) for n in "WPb"} for _ in range(2)]
    h = g.standard_normal((length, width))

    def unit(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
        source = activate(x @ p["W"].T.astype(np.float64) + p["b"], activation)
        return x + (source - x @ p["P"].T * subtract) @ p["P"]

    expected = h.copy()
    front = min(prefix, length)
    back = min(suffix, length)
    adapted = unit(h[:front], units[0]), unit(h[length - back :], units[1])
    expected[:front] = adapted[0]
    expected[length - back :] = adapted[1]

    method = "noreft" if subtract else "direft"
    names = {"P": "P", "W": "W", "b": "b"} if subtract else {"P": "W2", "W": "W1", "b": "b"}
    tied = prefix == 0
    edits = []
    for p in units[1:] if tied else units:
        parameters = {names[n]: v for n, v in p.items()} | ({"p": np.zeros(rank, np.float32)} if subtract else {})
        edits.append((ForeignEdit(name="u", method=method, parameters=parameters),))
    rule = PositionRule(first=prefix, last=suffix, truncate=False)
    foreign = ForeignAdapter(format="adapterhub", edits={SITE: tuple(edits)}, positions=rule, tied=tied, activation=activation)
    folded = assemble(foreign, base_of(width)).edits()[SITE]
    slot = slots(rule, np.ones((1, length)), length, tied=tied)[0]
    found = np.stack([h[t] if s < 0 else folded[s].apply(h[t]) for t, s in enumerate(slot)])
    rounding.check(found, expected, bound(width, rank))
