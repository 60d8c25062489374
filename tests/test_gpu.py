"""Kernels for a GPU against the eager passes, in Triton's interpreter where there is no GPU."""

import pytest
import torch
from problems import flat
from test_flat import Case, net, optimizer
from torch import nn

import mep
import mep.kernels
from mep.blocks import passes
from mep.blocks.activations import of_module
from mep.blocks.elementwise import Elementwise
from mep.blocks.passes import Passes
from mep.optim.flat import FlatSteps

gpu = pytest.importorskip("mep.kernels.gpu")  # interpreted, if tests/conftest.py says so
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Roundings of 1e-7 through up to five layers and back, and 4e-7 of the kernels' own tanh.
SINGLE = 5e-6
ACTIVATIONS = {"tanh": nn.Tanh(), "relu": nn.ReLU()}
# Width, outputs, samples, layers: nothing a multiple of a tile, all of it, and one layer alone.
SHAPES = [(20, 7, 37, 5), (32, 32, 16, 3), (8, 3, 5, 1), (5, 11, 17, 2)]


class Blocks(list):
    """What the eager passes ask of blocks."""

    class Block:
        def __init__(self, weight, bias):
            self.weight, self.bias, self.transpose = weight, bias, weight.t()


def walk(loops, depth, n, last, batch, biases):
    """All that a free phase, a descent and a climb leave behind."""
    torch.manual_seed(1)

    def rooms(*widths):
        return [torch.zeros(batch, width, device=DEVICE) for width in widths]

    s = [torch.randn(batch, n).to(DEVICE), *rooms(*[n] * (depth - 1))]
    y, p, e, new, above = (rooms(*[n] * depth) for _ in range(5))
    norm = [torch.zeros(batch, device=DEVICE) for _ in range(depth)]
    f, above = [*s[1:], *rooms(last)], [*above[1:], *rooms(last)]
    top, d = torch.randn(batch, last).to(DEVICE), 0.1 * torch.randn(batch, n).to(DEVICE)
    if isinstance(loops, Passes):
        loops.free(s, y, f)
        squares = loops.descend(s, y, top, p, e)
    else:
        loops.free(s, y, f, biases)
        squares = loops.descend(y, top, p, e)
    loops.climb(s, y, d, 0.05, p, e, rooms(n)[0], new, norm, above)
    return [float(squares), *f, *y, *p, *e, *new, *norm, *above]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_passes_are_the_eager_ones(name, shape):
    n, last, batch, depth = shape
    torch.manual_seed(0)
    sizes = [*[n] * (depth - 1), last]
    weights = [(torch.randn(m, n) / n**0.5).to(DEVICE) for m in sizes]
    biases = [torch.randn(m).to(DEVICE) if k % 2 == 0 else None for k, m in enumerate(sizes)]
    blocks = [Blocks.Block(*pair) for pair in zip(weights, biases, strict=True)]
    truth = walk(Passes(blocks, Elementwise(of_module(ACTIVATIONS[name]))), depth, n, last, batch,
                 biases)  # fmt: skip
    found = walk(gpu.GpuLoops(name == "tanh", weights), depth, n, last, batch, biases)
    assert found[0] == pytest.approx(truth[0], rel=SINGLE)
    for ours, theirs in zip(found[1:], truth[1:], strict=True):
        assert (ours - theirs).norm() <= SINGLE * theirs.norm()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_nudge_of_any_size_keeps_its_digits(name):
    """From 1e-30 to far beyond the next kink, relative to float64."""
    torch.manual_seed(0)
    batch, n = 7, 20
    weight = torch.eye(n, device=DEVICE)
    s = torch.randn(batch, n).to(DEVICE)
    y, p, e, new, norm = *(torch.zeros_like(s) for _ in range(4)), torch.zeros(batch).to(DEVICE)
    loops = gpu.GpuLoops(name == "tanh", [weight])
    for size in (1e-30, 1e-6, 1.0, 30.0):
        d, above = size * torch.randn(batch, n).to(DEVICE), torch.zeros_like(s)
        loops.free([s], [y], [torch.zeros_like(s)], [None])
        loops.climb([s], [y], d, 0.0, [p], [e], torch.zeros_like(s), [new], [norm], [above])
        wide, moved = s.double(), d.double()
        if name == "tanh":
            truth = torch.tanh(moved) * (1 - torch.tanh(wide) * torch.tanh(wide + moved))
        else:
            truth = torch.maximum(moved + wide.clamp(max=0), -wide.clamp(min=0))
        # tanh is good to 4e-7, a slope to twice that; beyond a kink, a state to its rounding.
        bound = 2e-6 * truth.abs() + 1e-6 * torch.tanh(moved.abs()) + (2e-7 if size > 0.1 else 0)
        assert ((above - truth).abs() <= bound).all()


@pytest.mark.parametrize("settler", [mep.Sweep(1, tol=1.0), mep.Sweep(3, tol=1e-6)], ids=str)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_steps_by_them_are_the_reference_s(activation, settler, monkeypatch):
    """Several updates of a net, most of whose layers are one run; by one sweep, and by three."""
    monkeypatch.setattr(FlatSteps, "take", lambda *_: None)
    found, taken = [], []
    for fused in (True, False):

        def loops(name, weights, fused=fused):
            taken.append(fused)
            return gpu.GpuLoops(name == "tanh", weights) if fused else None

        monkeypatch.setattr(passes, "loops_of", loops)
        torch.manual_seed(0)
        model = net(activation=activation).to(DEVICE)
        opt = optimizer(Case(options={"settler": settler, "beta": 0.2}), model)
        x, y = torch.randn(6, 5).to(DEVICE), torch.randint(0, 4, (6,)).to(DEVICE)
        for _ in range(2):
            opt.step(x=x, target=y)
        found.append(flat(model.parameters()).detach())
    assert {*taken} == {True, False}
    assert (found[0] - found[1]).norm() <= 2e-5 * found[1].norm()


@pytest.mark.parametrize(
    ("why", "activation", "weights"),
    [
        ("wide", "tanh", [torch.zeros(129, 129)]),
        ("other activation", "gelu", [torch.zeros(8, 8)]),
        ("other dtype", "tanh", [torch.zeros(8, 8, dtype=torch.float64)]),
        ("strides", "tanh", [torch.zeros(8, 8).t()[:4]]),
    ],
)
def test_what_has_no_kernel_is_left_to_the_eager_passes(why, activation, weights):
    assert mep.kernels._gpu_loops_of(activation, weights) is None
    with mep.kernels.eager():
        assert mep.kernels._gpu_loops_of("tanh", [torch.zeros(8, 8)]) is None
    assert isinstance(mep.kernels._gpu_loops_of("tanh", [torch.zeros(8, 8)]), gpu.GpuLoops)
