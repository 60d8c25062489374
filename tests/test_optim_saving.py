"""A saved or copied optimizer continues to the last bit."""

import copy
import pickle

import pytest
import torch
from small_training import (
    SAME_RULE,
    backward,
    batch_of,
    distance,
    identical,
    network,
    train,
    weights,
)
from torch.optim import lr_scheduler

import mep


def one_cycle(opt):
    return lr_scheduler.OneCycleLR(opt, max_lr=0.4, total_steps=12)  # cycles the momentum too


def make_run(seed=0):
    model = network(torch.float32, seed)
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.2, momentum=0.9)
    return model, opt


@pytest.mark.parametrize("make", [None, one_cycle], ids=["plain", "scheduled"])
def test_saved_run_continues_bitwise(tmp_path, make):
    batch = batch_of(dtype=torch.float32)

    def advance(opt, schedule):
        for _ in range(5):
            opt.step(x=batch[0], target=batch[1])
            if schedule:
                schedule.step()

    model, opt = make_run()
    schedule = make(opt) if make else None
    advance(opt, schedule)
    parts = {"model": model, "opt": opt} | ({"schedule": schedule} if schedule else {})
    torch.save({k: part.state_dict() for k, part in parts.items()}, tmp_path / "run.pt")
    advance(opt, schedule)

    other, other_opt = make_run(seed=9)
    other_schedule = make(other_opt) if make else None
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["opt"])
    if other_schedule:
        other_schedule.load_state_dict(saved["schedule"])
    assert not identical(weights(other), weights(model))
    advance(other_opt, other_schedule)
    assert identical(weights(other), weights(model))
    assert other_opt.state_dict()["param_groups"] == opt.state_dict()["param_groups"]


def test_state_of_torchs_sgd_can_be_taken_over():
    model, twin, batch = network(), network(), batch_of()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        backward(model, batch)
        sgd.step()
    twin.load_state_dict(model.state_dict())
    opt = mep.EPOptimizer(twin.parameters(), model=twin, mode="backprop", lr=0.7)
    opt.load_state_dict(copy.deepcopy(sgd.state_dict()))
    backward(model, batch)
    sgd.step()
    opt.step(x=batch[0], target=batch[1])
    assert distance(weights(model), weights(twin)) < SAME_RULE


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda opt: pickle.loads(pickle.dumps(opt))}


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched by a scheduler"])
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copy_continues_equally_and_independently(make, patched):
    batch = batch_of(dtype=torch.float32)
    model, opt = make_run()
    if patched:
        lr_scheduler.StepLR(opt, 2)
        assert "step" in vars(opt)  # the scheduler's wrapper, bound to the original
    train(opt, 3, batch)
    opt.skipped, opt.skipped_in_a_row, start = 2, 1, weights(model)
    twin = make(opt)
    assert [id(p) for p in twin.param_groups[0]["params"]] == [
        id(p) for p in twin.model.parameters()
    ]
    assert (twin.skipped, twin.skipped_in_a_row, twin.max_skipped) == (2, 1, opt.max_skipped)
    assert (twin.how.settler, twin.how.stencil) == (opt.how.settler, opt.how.stencil)
    train(twin, 3, batch)
    assert identical(weights(model), start)  # the copy's steps are its own
    train(opt, 3, batch)
    assert identical(weights(model), weights(twin.model))
    assert not identical(weights(model), start)
