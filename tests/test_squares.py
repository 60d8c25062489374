"""Sums of squared gradients by a kernel against those of autograd's, in float64."""

import pytest
import torch
from problems import distance
from torch import nn
from torch.func import functional_call, grad, vmap

import mep.kernels
from mep.blocks.layers import layer_of
from mep.continual import fisher_diagonal

pytest.importorskip("numba")
pytestmark = pytest.mark.filterwarnings("error")

# Sums of some hundred products and squares in float32.
SINGLE = 1e-5
CONVOLUTIONS = {
    "plain": (nn.Conv2d(3, 5, 3), 7),
    "one channel": (nn.Conv2d(1, 4, 5, 2, 2), 12),
    "points": (nn.Conv2d(4, 6, 1), 5),
    "uneven": (nn.Conv2d(3, 2, (3, 2), (1, 2), (2, 0)), 9),
    "gaps across": (nn.Conv2d(3, 4, 3, 1, 2, (1, 2)), 8),
    "gaps down": (nn.Conv2d(3, 4, 2, 2, 1, (3, 1)), 8),
    "much padding": (nn.Conv2d(2, 3, 2, 3, 4), 6),
    "without bias": (nn.Conv2d(8, 16, 3, padding=1, bias=False), 10),
}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def truth(layer, a, e):
    """``sum_n g_n^2`` of the weight by autograd, sample by sample, in float64."""
    fixed = {k: p.detach().double() for k, p in layer.named_parameters()}

    def loss(weight, a, e):
        out = functional_call(layer, {**fixed, "weight": weight}, (a.unsqueeze(0),))
        return (out.squeeze(0) * e).sum()

    each = vmap(grad(loss), (None, 0, 0))(fixed["weight"], a.double(), e.double())
    return each.square().sum(0)


def signals(layer, samples, *size):
    a = torch.randn(samples, *size)
    with torch.no_grad():
        return a, torch.randn_like(layer(a))


@pytest.mark.parametrize("samples", [1, 33])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, samples, threads):
    layer, size = CONVOLUTIONS[name]
    a, e = signals(layer, samples, layer.in_channels, size, size)
    found = layer_of(layer).sample_squares(a, e)
    assert distance([found], [truth(layer, a, e)]) < SINGLE


@pytest.mark.parametrize("positions", [(1,), (6,), (2, 3)])
def test_linear_over_positions(positions, threads):
    layer = nn.Linear(5, 7)
    a, e = signals(layer, 40, *positions, 5)
    assert distance([layer_of(layer).sample_squares(a, e)], [truth(layer, a, e)]) < SINGLE


def test_many_samples_are_shared_by_threads(monkeypatch, threads):
    layer, lanes = nn.Conv2d(8, 16, 3, padding=1), []
    a, e = signals(layer, 64, 8, 14, 14)
    plain = mep.kernels.squares.call
    monkeypatch.setattr(mep.kernels.squares, "call", lambda *k: lanes.append(k) or plain(*k))
    found = layer_of(layer).sample_squares(a, e)
    assert len(lanes) == 1
    assert distance([found], [truth(layer, a, e)]) < SINGLE
    assert torch.equal(found, layer_of(layer).sample_squares(a, e))


def test_memory_in_any_order():
    layer = nn.Conv2d(3, 4, 3)
    a, e = signals(layer, 12, 3, 6, 6)
    shuffled = [t.to(memory_format=torch.channels_last) for t in (a, e)]
    found = [layer_of(layer).sample_squares(*pair) for pair in ((a, e), shuffled)]
    assert torch.equal(*found)


def test_what_is_no_number_stays_none():
    layer = nn.Conv2d(1, 2, 2)
    a, e = signals(layer, 4, 1, 3, 3)
    e[2, 1, 0, 0] = torch.inf
    found = layer_of(layer).sample_squares(a, e)
    assert found[0].isfinite().all() and not found[1].isfinite().any()


@pytest.mark.parametrize("reason", ["double", "groups", "eager", "graph"])
def test_other_signals_are_left_to_torch(reason):
    layer = nn.Conv2d(4, 4, 3, groups=2 if reason == "groups" else 1)
    a, e = signals(layer, 4, 4, 5, 5)
    if reason == "double":
        a, e = a.double(), e.double()
    if reason == "graph":
        a.requires_grad_()
    with mep.kernels.eager() if reason == "eager" else torch.enable_grad():
        assert layer_of(layer).sample_squares(a, e) is None


def test_fisher_of_a_net_is_that_of_torch():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(24, 3),
    )  # fmt: skip
    batches = [(torch.randn(10, 1, 8, 8), torch.randint(3, (10,)))]
    found = fisher_diagonal(net, batches)
    with mep.kernels.eager():
        expected = fisher_diagonal(net, batches)
    assert found.keys() == expected.keys() == dict(net.named_parameters()).keys()
    for name, diagonal in found.items():
        assert distance([diagonal], [expected[name]]) < SINGLE
