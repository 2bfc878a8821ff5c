"""The torch modules against the numpy oracle, and what keeps R orthonormal."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from reft_export.eager.steering import edit_fn, low_rank_edit_fn
from reft_export.training.interventions import Intervention, Interventions, OrthonormalRows
from runtimes.edits.adapter import BaseModel
from runtimes.edits.edit import ACTIVATIONS, LowRankEdit, Site
from runtimes.edits.form import EditForm, one_form
from runtimes.edits.methods import METHODS, fold_parameters
from runtimes.edits.positions import PositionRule
from runtimes.errors import AdapterError, ReftError

RANK, WIDTH = 3, 16
SITE = Site(layer=0)
BASE = BaseModel(name="tiny", fingerprint="0" * 64, num_hidden_layers=4, hidden_size=WIDTH)
CASES = [(m, a) for m in METHODS for a in (ACTIVATIONS if METHODS[m].activated else ("",))]


def close(got: np.ndarray, want: np.ndarray, tolerance: float) -> bool:
    return float(np.abs(got - want).max()) <= tolerance * max(1.0, float(np.abs(want).max()))


@torch.no_grad()
def _disturb(module: torch.nn.Module) -> None:
    """Away from initial values: RED's edit nothing."""
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, dtype=parameter.dtype))


@pytest.mark.parametrize(("method", "activation"), CASES)
def test_module_equals_the_folded_edit_in_float64(method: str, activation: str) -> None:
    torch.manual_seed(1)
    module = Intervention(one_form([SITE], method=method, rank=RANK, activation=activation)[SITE], WIDTH).double()
    _disturb(module)
    h = torch.randn(50, WIDTH, dtype=torch.float64)
    edit = fold_parameters(method, {k: v.detach().numpy() for k, v in module.parameters_of().items()}, activation)
    got, want = (h + module(h)).detach().numpy(), edit.apply(h.numpy())
    assert close(got, want, 1e-12)
    # The comparison can fail: a change of one part in a thousand in one parameter is far outside the tolerance.
    name = "bias" if method == "red" else "b"
    faulty = replace(edit, **{name: getattr(edit, name) + 1e-3}).apply(h.numpy())
    assert not close(got, faulty, 1e-5)


@pytest.mark.parametrize(("method", "activation"), CASES)
def test_adapter_carries_the_module(method: str, activation: str) -> None:
    """float32 module -> adapter tensors -> folded edit with float32 sums, each against the float64 oracle."""
    torch.manual_seed(2)
    sites = (Site(layer=1), Site(layer=3, stream="mlp_output"))
    trained = Interventions(one_form(sites, method=method, rank=RANK, activation=activation), width=WIDTH, tied=False)
    _disturb(trained)
    adapter = trained.to_adapter(BASE, PositionRule(first=2, last=2))
    h, slot = torch.randn(2, 5, WIDTH), torch.tensor([[0, -1, 1, 0, -1], [-1, 0, 7, 1, 1]])
    for site in sites:
        edits = adapter.edits()[site]
        want = h.numpy().astype(np.float64)
        for number, edit in enumerate(edits):
            want = np.where((slot.numpy() == number)[..., None], edit.apply(h.numpy()), want)
        live, folded = trained.edits()[site](h, slot), edit_fn(edits, torch.float32, "cpu")(h, slot)
        for got in (live.detach(), folded):
            assert close(got.numpy(), want, 2e-6)
            untouched = (slot != 0) & (slot != 1)
            assert torch.equal(got[untouched], h[untouched])


def test_bfloat16_stream_is_edited_in_float32_and_rounded_once() -> None:
    torch.manual_seed(3)
    edit = LowRankEdit(U=np.random.randn(2, WIDTH), A=np.random.randn(2, WIDTH), b=np.random.randn(2))
    h = torch.randn(64, WIDTH).bfloat16()
    y = low_rank_edit_fn([edit], torch.bfloat16, "cpu")(h, torch.zeros(64, dtype=torch.int32))
    rounded = LowRankEdit(**{n: torch.from_numpy(getattr(edit, n)).bfloat16().double().numpy() for n in ("U", "A", "b")})
    want = torch.from_numpy(rounded.apply(h.double().numpy())).bfloat16()
    assert y.dtype == torch.bfloat16
    # Double rounding against single rounding may differ in the last place, rarely.
    assert (y == want).float().mean() > 0.99


def test_rows_stay_orthonormal_and_weight_decay_leaves_r_alone() -> None:
    torch.manual_seed(4)
    rows = OrthonormalRows(8, 64)
    before = rows().detach()
    assert torch.allclose(before @ before.T, torch.eye(8), atol=1e-5)
    optimiser = torch.optim.AdamW(rows.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2000):
        rows.V.grad = torch.zeros_like(rows.V)
        optimiser.step()
    assert rows.V.norm() < 0.2 * OrthonormalRows.LENGTH * 8**0.5, "weight decay did act"
    assert torch.allclose(rows(), before, atol=1e-5), "and R did not move"


def test_r_is_gram_schmidt_of_v_with_positive_diagonal() -> None:
    """R = chol(V V^T)^-1 V, the continuous choice of signs: R is V itself, but for its length, where V's rows are orthogonal."""
    torch.manual_seed(9)
    rows = OrthonormalRows(4, 32).double()
    assert torch.allclose(rows(), rows.V / OrthonormalRows.LENGTH, atol=1e-11)
    with torch.no_grad():
        rows.V.copy_(torch.randn(4, 32))
    want = torch.linalg.solve_triangular(torch.linalg.cholesky(rows.V @ rows.V.T), rows.V, upper=False)
    assert torch.allclose(rows(), want, atol=1e-11)


def test_torchs_parametrization_is_what_weight_decay_breaks() -> None:
    """The planted fault of the test above: the same optimiser on torch's orthogonal parametrization moves R."""
    torch.manual_seed(4)
    layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(64, 8, bias=False))
    before = layer.weight.detach().clone()
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(20):
        for parameter in layer.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
    assert not torch.allclose(layer.weight, before, atol=1e-5)


@pytest.mark.parametrize("method", ["loreft", "consreft", "lobireft"])
def test_r_is_orthonormal_after_training_with_weight_decay(method: str) -> None:
    torch.manual_seed(5)
    module = Intervention(EditForm(method=method, rank=4), 32)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1)
    h, target = torch.randn(16, 32), torch.randn(16, 32)
    start = module.parameters_of()["R"].detach()
    for _ in range(500):
        optimiser.zero_grad()
        ((h + module(h) - target) ** 2).mean().backward()
        optimiser.step()
    R = module.parameters_of()["R"].detach()
    assert torch.allclose(R @ R.T, torch.eye(4), atol=1e-5)
    assert not torch.allclose(R, start, atol=1e-2), "R was trained"


def test_red_starts_as_the_identity_and_is_not_decayed() -> None:
    """Scale 1 and bias 0, whatever rank is given; weight decay leaves both where they are, and training does not."""
    trained = Interventions(one_form([Site(layer=0)], method="red", rank=7), width=WIDTH)
    assert [form.rank for form in trained.forms.values()] == [0] and [tuple(p.shape) for p in trained.parameters()] == [(WIDTH,), (WIDTH,)]
    h, slot = torch.randn(3, WIDTH), torch.zeros(3, dtype=torch.int32)
    edit = trained.edits()[Site(layer=0)]
    assert torch.equal(edit(h, slot), h)
    decayed, plain = trained.parameter_groups(0.1)
    assert not decayed["params"] and len(plain["params"]) == 2 and plain["weight_decay"] == 0
    optimiser = torch.optim.SGD(trained.parameters(), lr=0.1)
    edit(h, slot).square().sum().backward()
    scale = trained.intervention("0.block_output").scale
    assert torch.allclose(scale.grad, 2 * (h * h).sum(0))
    optimiser.step()
    assert not torch.equal(edit(h, slot), h)


def test_dropout_acts_on_the_edit_alone_and_only_in_training() -> None:
    torch.manual_seed(6)
    module = Intervention(EditForm(method="loreft", rank=RANK), WIDTH, dropout=0.5)
    h = torch.randn(40, WIDTH)
    whole = module.eval()(h)
    dropped = module.train()(h)
    kept = dropped != 0
    assert torch.equal(module.eval()(h), whole)
    assert 0.3 < kept.float().mean() < 0.7
    assert torch.allclose(dropped[kept], 2 * whole[kept])


def test_gradients_reach_every_parameter_and_only_edited_rows() -> None:
    torch.manual_seed(7)
    trained = Interventions(one_form([Site(layer=0)], method="noreft", rank=RANK), width=WIDTH)
    h = torch.randn(1, 4, WIDTH, requires_grad=True)
    trained.edits()[Site(layer=0)](h, torch.tensor([[-1, 0, -1, 0]])).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.parameters())
    assert torch.equal(h.grad[0, 0], torch.ones(WIDTH)) and not torch.equal(h.grad[0, 1], torch.ones(WIDTH))


def test_start_from_an_adapter_gives_it_back() -> None:
    torch.manual_seed(8)
    forms = one_form([Site(layer=2)], method="loreft", rank=RANK)
    rule = PositionRule(first=1, last=1)
    adapter = Interventions(forms, width=WIDTH, tied=False).to_adapter(BASE, rule)
    again = Interventions(forms, width=WIDTH, tied=False)
    again.start_from(adapter)
    for name, value in again.to_adapter(BASE, rule).tensors.items():
        assert np.allclose(value, adapter.tensors[name], atol=1e-6)
    for other, tied, message in (
        (one_form(forms, method="loreft", rank=2), False, "its form is loreft, rank 3, the settings say loreft, rank 2"),
        (forms, True, "its tied is False, the settings say True"),
        (one_form([Site(layer=1)], method="loreft", rank=RANK), False, "its sites is 2.block_output, the settings say 1.block_output"),
    ):
        with pytest.raises(AdapterError, match=message):
            Interventions(other, width=WIDTH, tied=tied).start_from(adapter)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method 'magic' is unknown"),
        ({"rank": WIDTH + 1}, f"use 1 to its width {WIDTH}"),
        ({"activation": "swish"}, "activation 'swish' is unknown"),
        ({"method": "lobireft", "activation": "relu"}, "lobireft has no learned source for relu to act on"),
    ],
)
def test_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ReftError, match=message):
        Interventions(one_form([Site(layer=0)], **{"method": "loreft", "rank": 2, **options}), width=WIDTH)
