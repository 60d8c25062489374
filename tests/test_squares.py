"""Sums of squared gradients by a kernel against those of autograd's, in float64."""

import contextlib
import dataclasses

import pytest
import torch
from problems import distance
from torch import nn
from torch.func import functional_call, grad, vmap

import mep.kernels
from mep.blocks.layers import layer_of
from mep.continual import fisher_diagonal
from mep.kernels import native, sample_squares

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.skipif(
        not mep.kernels.available() or native() is None, reason="nothing to compile, or to call"
    ),
]

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


@pytest.fixture(params=[1, 2, 3])
def threads(request, monkeypatch):
    """A team of so many, however little there is to do."""
    monkeypatch.setattr("mep.kernels.team._LEAST_WORK", 1)
    monkeypatch.setattr("mep.kernels.team._LEAST_ROWS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """The jobs that compiled loops are called with."""
    from mep.kernels import squares

    found, plain = [], squares.call
    monkeypatch.setattr(squares, "call", lambda *job: found.append(job) or plain(*job))
    return found


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


@pytest.mark.skipif(native() is None or native().parallel is None, reason="no threads to call")
@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_samples_are_shared_by_threads(monkeypatch, threads, kind):
    library, teams = native(), []
    noted = lambda *job: teams.append(job[2]) or library.parallel(*job)  # noqa: E731
    own = dataclasses.replace(library, parallel=noted)
    monkeypatch.setattr(mep.kernels, "native", lambda: own)
    layer, size = (nn.Linear(5, 7), (6, 5)) if kind == "linear" else (nn.Conv2d(2, 3, 3), (2, 6, 6))
    a, e = signals(layer, 31, *size)
    found = layer_of(layer).sample_squares(a, e)
    assert teams == ([threads] if threads > 1 else [])
    assert distance([found], [truth(layer, a, e)]) < SINGLE


def test_memory_in_any_order():
    layer = nn.Conv2d(3, 4, 3)
    a, e = signals(layer, 12, 3, 6, 6)
    shuffled = [t.to(memory_format=torch.channels_last) for t in (a, e)]
    found = [layer_of(layer).sample_squares(*pair) for pair in ((a, e), shuffled)]
    assert torch.equal(*found)


def test_an_infinite_error_stays_with_its_output():
    layer = nn.Conv2d(1, 2, 2)
    a, e = signals(layer, 4, 1, 3, 3)
    e[2, 1, 0, 0] = torch.inf
    found = layer_of(layer).sample_squares(a, e)
    assert found[0].isfinite().all() and not found[1].isfinite().any()


@pytest.mark.parametrize("reason", ["double", "groups", "eager", "graph", "large"])
def test_other_signals_are_left_to_torch(monkeypatch, reason):
    layer = nn.Conv2d(4, 4, 3, groups=2 if reason == "groups" else 1)
    a, e = signals(layer, 4, 4, 5, 5)
    if reason == "double":
        a, e = a.double(), e.double()
    if reason == "graph":
        a.requires_grad_()
    if reason == "large":
        monkeypatch.setattr(mep.kernels, "_MOST_SQUARES", 100)
    with mep.kernels.eager() if reason == "eager" else contextlib.nullcontext():
        assert layer_of(layer).sample_squares(a, e) is None


@pytest.mark.parametrize(
    ("a", "e"),
    [
        ((4, 3, 2), (2, 3, 4)),  # samples
        ((4, 3, 2), (4, 5, 4)),  # positions
        ((4, 3, 0), (4, 3, 4)),  # no inputs
        ((0, 3, 2), (0, 3, 4)),  # no samples
        ((3, 2), (3, 4)),
    ],
)
def test_shapes_that_do_not_go_together_are_not_read(a, e):
    assert sample_squares(torch.ones(a), torch.ones(e)) is None


@pytest.mark.parametrize("e", [(4, 3, 3, 3), (4, 5, 3), (3, 5, 3, 3)])
def test_errors_of_another_convolution_are_not_read(e):
    assert sample_squares(torch.ones(4, 2, 5, 5), torch.ones(e), nn.Conv2d(2, 5, 3)) is None


class Positions(nn.Module):
    """A net whose second layer works at three positions."""

    def __init__(self):
        super().__init__()
        self.cut, self.each, self.join = nn.Unflatten(1, (3, 4)), nn.Linear(4, 5), nn.Flatten()
        self.tanh, self.out = nn.Tanh(), nn.Linear(15, 3)

    def forward(self, x):
        return self.out(self.join(self.tanh(self.each(self.cut(x)))))


NETS = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1), nn.Tanh(), nn.Conv2d(4, 6, 3), nn.Tanh(), nn.Flatten(),
            nn.Linear(24, 3),
        ),
        (1, 8, 8), 2,
    ),
    "positions": (Positions, (12,), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_fisher_of_a_net_is_that_of_torch(calls, name):
    make, size, layers = NETS[name]
    net = make()
    batches = [(torch.randn(10, *size), torch.randint(3, (10,)))]
    found = fisher_diagonal(net, batches)
    assert len(calls) == 3 * layers, "one for each of three outputs"
    with mep.kernels.eager():
        expected = fisher_diagonal(net, batches)
    assert len(calls) == 3 * layers
    assert found.keys() == expected.keys() == dict(net.named_parameters()).keys()
    for key, diagonal in found.items():
        assert distance([diagonal], [expected[key]]) < SINGLE
