"""Memory used again from step to step."""

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import mep
from mep.blocks.buffers import Buffers, give, made_again, take
from mep.blocks.closed import ClosedBlock, Point
from mep.blocks.dense import DensePoint


def test_buffers_come_back_and_other_shapes_go():
    buffers, like = Buffers(), torch.zeros(2, 3)
    with buffers.lend():
        first = take(like)
        take(like, (5,))
    with buffers.lend():
        assert take(like) is first
    assert [key[0] for key in buffers._shelves] == [like.shape]


def test_given_buffer_is_lent_again_at_once():
    with Buffers().lend():
        first = take(torch.zeros(4))
        assert take(torch.zeros(4)) is not first
        give(first)
        assert take(torch.zeros(4)) is first
    assert take(torch.zeros(4)) is None  # outside, torch allocates


def test_memory_of_the_step_before_is_free_when_it_is_asked_for_again():
    """Of operations that write into no buffer: the tensor made last time lives until then."""
    buffers, alive = Buffers(), []

    def step(key):
        def make():
            alive.append(sum(ref() is not None for ref in refs))
            return torch.zeros(3)

        with buffers.lend():
            for _ in range(2):
                refs.append(weakref.ref(made_again(key, make)))

    refs: list[weakref.ref] = []
    step("one")
    step("one")
    assert alive == [0, 1, 1, 1]  # one of them is gone before each
    step("other")  # of another shape: nothing is freed for it, and what was is at the end
    assert alive[4:] == [2, 3] and sum(ref() is not None for ref in refs) == 2
    buffers.clear()
    assert not any(ref() is not None for ref in refs)


@torch.no_grad()
def test_convolutions_are_made_again():
    convolutions = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU()
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(27, 2))
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.1, settler=mep.Sweep(1, tol=1.0))
    x, y = torch.randn(4, 1, 7, 7), torch.tensor([0, 1, 1, 0])
    opt.step(x=x, target=y)
    made = [t for each in opt._buffers._made_before.values() for t in each]
    # Two free ones, an error sent down, a displacement sent up.
    assert [tuple(t.shape) for t in made] == [(4, 3, 5, 5), *[(4, 3, 3, 3)] * 2, (4, 3, 5, 5)]


@torch.no_grad()
def everything(block, s, d, e):
    """All that settling and contrast ask of a block, at two displaced points in turn."""
    f, point = block.predict(s)
    found = [f]
    for factor in (1, -2):
        moved_by = factor * d
        delta, moved = block.difference(point, moved_by)
        product = block.product(moved, e)
        found += [delta, product, block.pull(moved, product)]
        found += [signal.form() for signal in block.signals(moved, e, 0.3)]
        found += block.advance(point, moved_by, product, product)[::2]
        found += block.advance(point, moved_by.clone(), product, product, 0.3)[::2]
        if block.box is not None:
            inner = block.inner(moved, product)
            found += [inner, *block.at_rest(s, moved_by, inner)]
    return found, point


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("lent", [True, False])
def test_dense_block_is_its_reference(activation, bias, lent):
    model = nn.Sequential(nn.Linear(5, 6), activation(), nn.Linear(6, 4, bias=bias)).double()
    block = mep.trace(model).blocks[1]
    slow_block = ClosedBlock(block.name, block.modules, block.operations, block.layer)
    s, d = torch.randn(2, 7, 6, dtype=torch.float64)
    e = torch.randn(7, 4, dtype=torch.float64)
    reference, slow = everything(slow_block, s, d, e)
    with Buffers().lend() if lent else nullcontext():
        found, fast = everything(block, s, d, e)
    assert type(fast) is DensePoint and type(slow) is Point
    for one, other in zip(found, reference, strict=True):
        # The same sums in another kernel, at worst: one rounding of numbers of size 1.
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_skipped_update_moves_no_running_statistic(mode):
    """The loss is finite; a gradient is not, which is known only after the contrast."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    opt = mep.EPOptimizer(model.parameters(), model=model, mode=mode)
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    update = opt._update

    def overflow(gradients, *rest):
        gradients.put(model[1].weight, torch.tensor(torch.inf))
        return update(gradients, *rest)

    opt._update = overflow
    opt.step(x=x, target=y)
    assert opt.skipped == 1 and torch.equal(model[0].running_mean, torch.zeros(4))


def test_settling_options_without_a_model_are_refused():
    with pytest.raises(ValueError, match="without `model` nothing settles: drop beta, settler"):
        mep.EPOptimizer(nn.Linear(2, 2).parameters(), settler=mep.Sweep(), beta=0.1)
