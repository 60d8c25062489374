"""Memory used again from step to step."""

import pytest
import torch
from torch import nn

import mep
from mep.blocks.buffers import Buffers, give, take


def test_buffers_come_back_and_other_shapes_go():
    buffers, like = Buffers(), torch.zeros(2, 3)
    with buffers.lend():
        first = take(like)
        take(like, (5,))
    with buffers.lend():
        assert take(like) is first
    assert [key[0] for key in buffers._idle] == [like.shape]


def test_given_buffer_is_lent_again_at_once():
    with Buffers().lend():
        first = take(torch.zeros(4))
        assert take(torch.zeros(4)) is not first
        give(first)
        assert take(torch.zeros(4)) is first
    assert take(torch.zeros(4)) is None  # outside, torch allocates


@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_skipped_update_moves_no_running_statistic(mode):
    """The loss is finite; a gradient is not, which is known only after the contrast."""
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    opt = mep.EPOptimizer(model.parameters(), model=model, mode=mode)
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    opt._update, update = (
        lambda gradients, usable: update({0: torch.tensor(torch.inf)}),
        opt._update,
    )
    opt.step(x=x, target=y)
    assert opt.skipped == 1 and torch.equal(model[0].running_mean, torch.zeros(4))


def test_settling_options_without_a_model_are_refused():
    with pytest.raises(ValueError, match="without `model` nothing settles: drop beta, settler"):
        mep.EPOptimizer(nn.Linear(2, 2).parameters(), settler=mep.Sweep(), beta=0.1)
