"""Initialisers: what they promise holds at any depth."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import mep
from mep.init import identity_, looks_linear_, orthogonal_, scaled_residual_

EXACT = 1e-12  # float64, some hundred products of orthogonal matrices


def jacobian(model, x):
    return torch.autograd.functional.jacobian(lambda v: model(v[None])[0].flatten(), x)


def relu_chain(*widths):
    layers = [nn.Linear(a, b).double() for a, b in pairwise(widths)]
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1])


@pytest.mark.parametrize("depth", [2, 3, 60])
def test_looks_linear_is_an_orthogonal_map(depth):
    model = looks_linear_(relu_chain(6, *[12] * (depth - 1), 6))
    x = torch.randn(9, 6).double()
    y, origin = model(x), model(torch.zeros(1, 6).double())
    assert not origin.any()
    torch.testing.assert_close(model(-x), -y, rtol=0, atol=EXACT)  # linear, ReLUs and all
    torch.testing.assert_close(model(x + x.roll(1, 0)), y + y.roll(1, 0), rtol=0, atol=EXACT)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=EXACT, atol=0)


def test_looks_linear_blocks_have_norm_two_inside_and_root_two_outside():
    model = looks_linear_(relu_chain(6, 12, 12, 6))
    norms = [torch.linalg.matrix_norm(m.weight, 2).item() for m in model if hasattr(m, "weight")]
    assert norms == pytest.approx([2**0.5, 2.0, 2**0.5])


def test_looks_linear_follows_its_generator():
    one, other, third = (
        looks_linear_(relu_chain(4, 8, 2), generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(one[0].weight, other[0].weight)
    assert not torch.equal(one[0].weight, third[0].weight)


@pytest.mark.parametrize(
    ("kernel", "options"),
    [(3, {"padding": 1}), (5, {"padding": "same"}), ((1, 3), {"padding": (0, 1)}),
     (3, {"padding": 2, "dilation": 2}), (3, {"padding": 1, "groups": 2})],
)  # fmt: skip
def test_dirac_kernels_keep_their_input(kernel, options):
    conv = identity_(nn.Conv2d(4, 4, kernel, **options).double())
    x = torch.randn(2, 4, 6, 6).double()
    torch.testing.assert_close(conv(x), x, rtol=0, atol=0)


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(2, 3), nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, stride=2),
     nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 2)],
    ids=str,
)  # fmt: skip
def test_layers_that_cannot_keep_their_input_are_left_alone(layer):
    model = nn.Sequential(layer, nn.Linear(3, 3))
    before = layer.weight.clone()
    identity_(model)
    assert torch.equal(layer.weight, before)
    with pytest.raises(ValueError, match="no square Linear layer, and no Conv2d"):
        identity_(layer)


def test_deep_cnn_begins_as_its_ends_and_trains():
    torch.manual_seed(0)
    model = mep.models.deep_cnn(20, 4, 1, 8, 3)
    x, y = torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2] * 2)
    short = nn.Sequential(model[0], *model[-3:])
    torch.testing.assert_close(model(x), short(x), rtol=0, atol=0)
    groups = mep.param_groups(model, 0.1)
    opt = mep.EPOptimizer(groups, model=model, lr=0.1, memory_budget="1MB")
    losses = [float(opt.step(x=x, target=y)) for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]
    assert len(mep.trace(model)) == 20


def test_residual_net_is_near_isometric_and_trains():
    torch.manual_seed(0)
    model = mep.models.deep_mlp(30, 16, 8, 3, residual=True).double()
    body = model[2:-2]
    found = torch.linalg.svdvals(jacobian(body, torch.randn(16).double()))
    # Of 28 branches with slope 0 or 1, scaled by 28^-1/2: a factor of a few, not e^28.
    assert found.min() > 0.05 and found.max() < 20
    x, y = torch.randn(6, 8).double(), torch.tensor([0, 1, 2] * 2)
    opt = mep.EPOptimizer(mep.param_groups(model, 0.1), model=model, lr=0.1)
    losses = [float(opt.step(x=x, target=y)) for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("gain", [0.0, 0.5, 1.0])
def test_scaled_branches_add_the_variance_of_one(gain):
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(25)]
    orthogonal_(nn.ModuleList(branches))
    scaled_residual_(branches, gain)
    for branch in branches:
        norms = [torch.linalg.matrix_norm(branch[k].weight, 2).item() for k in (0, 2)]
        assert norms == pytest.approx([1.0, gain / 5], abs=1e-6)
        assert not branch[2].bias.any()


BAD = {
    "one layer": (lambda: looks_linear_(nn.Linear(2, 2)), "two Linear layers at least"),
    "odd": (lambda: looks_linear_(relu_chain(2, 3, 2)), r"must be even.*\[3\]"),
    "no branch": (lambda: scaled_residual_([]), "`branches` is empty"),
    "no weight": (lambda: scaled_residual_([nn.ReLU()]), "branch 0 has no Linear or Conv2d"),
    "gain": (lambda: scaled_residual_([nn.Linear(1, 1)], -1.0), "`gain` must be >= 0"),
    "depth": (lambda: mep.models.deep_cnn(1), "`depth` must be >= 2"),
    "size": (lambda: mep.models.deep_mlp(5, 0, residual=True), "sizes must be >= 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
