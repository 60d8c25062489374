"""Fused blocks on maps against their reference, the closed form operation by operation."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import mep
import mep.kernels
from mep.blocks import ClosedBlock
from mep.blocks.fused import FusedBlock, FusedPoint
from mep.kernels.library import native

# Kernels differ from torch's own activations by 4e-7 of the value, and products of some hundred
# terms by as many roundings; float64 has no kernels.
CLOSE = {torch.float32: 2e-5, torch.float64: 1e-13}
MODELS = {
    "relu, conv": lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3)),
    "tanh, strided": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3, stride=2, groups=2)
    ),
    "relu, flatten, linear": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 5)
    ),
    "tanh, no bias": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3, bias=False)
    ),
    "relu, unflatten": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(128, 12), nn.ReLU(), nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 2)
    ),
}
LAYOUTS = {
    "first": lambda t: t,
    "last": lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "none": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
}


def pair(name, dtype):
    """A fused block, the same as a closed one, and a state below it."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    chain = mep.trace(model)
    block = chain.blocks[1]
    assert type(block) is FusedBlock
    closed = ClosedBlock(block.name, block.modules, block.operations, block.layer)
    with torch.no_grad():
        return block, closed, chain.blocks[0].predict(torch.randn(5, 2, 8, 8, dtype=dtype))[0]


def answers(block, s, d, e, below):
    """All that is asked of a block on a step."""
    with torch.no_grad():
        f, point = block.predict(s)
        product = block.product(point, e)
        delta, moved, norm = block.advance(point, d, product, below)
        later = d.sub(below, alpha=0.3)  # whose share of the error is yet to come
        found = [later, *block.advance(point, later, product, below, 0.3)[::2]]
        again, at = block.difference(point, d)
        found += [f, product, block.pull(point, product), delta, norm, block.pull(moved, product)]
        found += [again, block.pull(at, product)]
        torch.testing.assert_close(later, d)
        below_it, square = block.pull_and_square(point, product)
        found += [below_it, torch.as_tensor(square, dtype=s.dtype)]
        found += [signal.form() for signal in block.signals(moved, e, 0.5)]
        inner = block.inner(point, product)
        return point, found + ([] if inner is None else [inner])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_the_closed_form(name, dtype, layout):
    block, closed, s = pair(name, dtype)
    with torch.no_grad():
        e = torch.randn_like(block.predict(s)[0])
    d, below = 0.1 * torch.randn_like(s), torch.randn_like(s)
    point, found = answers(block, *map(LAYOUTS[layout], (s, d, e, below)))
    _, truth = answers(closed, s, d, e, below)
    assert isinstance(point, FusedPoint) == (layout != "none")
    for ours, theirs in zip(found, truth, strict=True):
        assert (ours - theirs).norm() <= CLOSE[dtype] * theirs.norm()


def test_displacements_of_another_layout_are_taken_as_they_are():
    block, closed, s = pair("relu, conv", torch.float64)
    d, below = torch.randn_like(s), torch.randn_like(s)
    with torch.no_grad():
        e = torch.randn_like(block.predict(s)[0])
    mixed = (s, LAYOUTS["last"](d), LAYOUTS["last"](e), LAYOUTS["none"](below))
    for ours, theirs in zip(
        answers(block, *mixed)[1], answers(closed, s, d, e, below)[1], strict=True
    ):
        assert (ours - theirs).norm() <= CLOSE[torch.float64] * theirs.norm()


@pytest.mark.parametrize(
    "front",
    [[nn.GELU()], [nn.ReLU(), nn.AvgPool2d(2)], [nn.AvgPool2d(2), nn.ReLU()], []],
    ids=["reads its input", "pooled after", "pooled before", "nothing"],
)
def test_other_blocks_are_closed_forms(front):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), *front, nn.Conv2d(3, 4, 2))
    assert type(mep.trace(model).blocks[1]) is ClosedBlock


def test_graphs_go_through_the_closed_form():
    block, _, s = pair("relu, conv", torch.float64)
    s = s.clone().requires_grad_()
    f, point = block.predict(s)
    f.sum().backward()
    assert not isinstance(point, FusedPoint) and s.grad is not None


def test_a_step_of_a_convolutional_net_is_the_closed_form_s(monkeypatch):
    """EP step by step, with a kernel between two convolutions and without."""
    found = []
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(FusedBlock, "fits", staticmethod(lambda *_: False))
        torch.manual_seed(0)
        model = mep.models.deep_cnn(4, 4, 1, 12)
        opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.1, momentum=0.9)
        x, y = torch.randn(8, 1, 12, 12), torch.randint(10, (8,))
        for _ in range(3):
            opt.step(x=x, target=y)
        kinds = {type(block) for block in mep.trace(model).blocks}
        assert (FusedBlock in kinds) == fused
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


# --- large tensors -------------------------------------------------------------------------------


@pytest.mark.skipif(
    not mep.kernels.available() or native() is None or native().parallel is None,
    reason="no threads to call",
)
@pytest.mark.parametrize("name", ["tanh", "relu"])
@pytest.mark.parametrize("threads", [2, 3])
def test_large_tensors_are_spread_over_threads(name, threads):
    """The same numbers, and several threads at work.

    To a rounding: what is compiled once for itself and once into a loop may end its rows otherwise.
    """
    from mep.kernels import cpu
    from mep.kernels.spread import spread

    library, teams = native(), []
    noted = lambda *a: teams.append(a[2]) or library.parallel(*a)  # noqa: E731
    own = replace(library, parallel=noted)
    kernels = spread(cpu.kernels(name), own)
    torch.manual_seed(0)
    s, bias, d, p, e = (torch.randn(51, 3501) for _ in range(5))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            y, pulled, change, y_new = (torch.zeros_like(s) for _ in range(4))
            at, moved, norm = s.clone(), d.clone(), torch.zeros(51)
            kernels.activate(at.data_ptr(), bias[0].data_ptr(), y.data_ptr(), *s.shape)
            square = kernels.pull(y.data_ptr(), p.data_ptr(), pulled.data_ptr(), *s.shape)
            kernels.move(*(t.data_ptr() for t in (at, y, d, change, y_new)), *s.shape)
            first = [t.clone() for t in (at, y, pulled, change, y_new)]
            kernels.nudge(
                at.data_ptr(), y.data_ptr(), moved.data_ptr(), 0.3,
                *(t.data_ptr() for t in (p, e, change, y_new, norm)), *s.shape,
            )  # fmt: skip
            found.append((square, [*first, moved, change, y_new, norm]))
    finally:
        torch.set_num_threads(before)
    assert teams == [threads] * 4  # none of them while there was one thread
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, several in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, several, rtol=1e-6, atol=2e-7)
