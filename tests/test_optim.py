"""EPOptimizer is a true torch optimizer: the rule, schedulers, hooks, groups, closures."""

import pytest
import torch
from small_training import (
    SAME_RULE,
    SAME_SUM,
    backward,
    batch_of,
    distance,
    identical,
    network,
    train,
    weights,
)
from torch import nn
from torch.optim import lr_scheduler

import mep

RULES = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "weight decay": {"lr": 0.1, "weight_decay": 0.01},
    "all": {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
}


@pytest.mark.parametrize("route", ["grad", "step"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rule_is_torchs_sgd(rule, route):
    ours, theirs, batch = network(), network(), batch_of()
    mode = {"model": ours, "mode": "backprop"} if route == "step" else {}
    opt = mep.EPOptimizer(ours.parameters(), **mode, **rule)
    sgd = torch.optim.SGD(theirs.parameters(), **rule)
    for _ in range(50):
        if route == "step":
            opt.step(x=batch[0], target=batch[1])
        else:
            backward(ours, batch)
            opt.step()
        backward(theirs, batch)
        sgd.step()
    assert distance(weights(ours), weights(theirs)) < SAME_RULE
    assert distance(weights(ours), weights(network())) > 1e-2  # it did train


SCHEDULERS = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3, 0.5),
    # cycles the momentum too
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, max_lr=0.4, total_steps=12),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, 0.1, total_iters=4), lr_scheduler.ExponentialLR(opt, 0.8)],
        milestones=[4],
    ),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_act_as_on_torchs_sgd(make):
    rule = {"lr": 0.2, "momentum": 0.9}
    ours, theirs, fixed, batch = network(), network(), network(), batch_of()
    opt = mep.EPOptimizer(ours.parameters(), model=ours, mode="backprop", **rule)
    sgd = torch.optim.SGD(theirs.parameters(), **rule)
    schedules = make(opt), make(sgd)
    for _ in range(10):
        opt.step(x=batch[0], target=batch[1])
        backward(theirs, batch)
        sgd.step()
        for schedule in schedules:
            schedule.step()
        assert opt.param_groups[0]["lr"] == sgd.param_groups[0]["lr"]
        assert opt.param_groups[0]["momentum"] == sgd.param_groups[0]["momentum"]
    assert distance(weights(ours), weights(theirs)) < SAME_RULE
    train(mep.EPOptimizer(fixed.parameters(), model=fixed, mode="backprop", **rule), 10, batch)
    assert distance(weights(ours), weights(fixed)) > 1e-3  # the schedule made a difference


def test_step_hooks_run_before_and_after_the_update():
    model, batch, seen = network(), batch_of(), []
    opt = mep.EPOptimizer(model.parameters(), model=model)
    start = weights(model)
    opt.register_step_pre_hook(lambda o, a, kw: seen.append((o, set(kw), weights(model))))
    opt.register_step_post_hook(lambda o, a, kw: seen.append((o, set(kw), weights(model))))
    opt.step(x=batch[0], target=batch[1])
    assert [(o is opt, names) for o, names, _ in seen] == [(True, {"x", "target"})] * 2
    assert identical(seen[0][2], start)
    assert identical(seen[1][2], weights(model)) and not identical(seen[1][2], start)


def test_clipping_between_estimate_and_step():
    model, batch = network(), batch_of()
    opt, start = mep.EPOptimizer(model.parameters(), lr=0.5), weights(model)
    mep.estimate(model, *batch)
    before = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    opt.step()
    moved = [p - q for p, q in zip(weights(model), start, strict=True)]
    assert before > 0.02
    assert float(nn.utils.get_total_norm(moved)) == pytest.approx(0.5 * 0.01, rel=1e-3)


def accumulated(middle, cuts):
    """Gradients from micro-batches, each weighed by its share of the samples."""
    model, (x, y) = network(middle=middle), batch_of(12)
    for lo, hi in cuts:
        # A fixed beta and sweep count: "auto" looks at each micro-batch by itself.
        how = {"beta": 0.01, "settler": mep.Sweep(max_sweeps=3, tol=None)}
        mep.estimate(model, x[lo:hi], y[lo:hi], weight=(hi - lo) / 12, **how)
    return [p.grad for p in model.parameters()]


def test_unequal_micro_batches_add_up_to_the_batch():
    whole, parts = accumulated(nn.Tanh, [(0, 12)]), accumulated(nn.Tanh, [(0, 5), (5, 12)])
    assert distance(whole, parts) < SAME_SUM


def test_micro_batches_of_a_batch_norm_model_do_not_add_up():
    """Every micro-batch has statistics of its own; no weight can repair that."""

    def norm():
        return nn.Sequential(nn.BatchNorm1d(8), nn.Tanh())

    whole, parts = accumulated(norm, [(0, 12)]), accumulated(norm, [(0, 5), (5, 12)])
    assert distance(whole, parts) > 1e-4


def test_loss_falls():
    model, batch = network(), batch_of(40)
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.3, momentum=0.9)
    first = train(opt, 1, batch)
    assert train(opt, 60, batch) < 0.3 * first
    assert opt.last.converged and opt.skipped == 0


def test_added_group_is_trained_from_then_on():
    model, batch = network(), batch_of()
    opt = mep.EPOptimizer(model[:4].parameters(), model=model, lr=0.1)
    head = weights(model[4])
    train(opt, 2, batch)
    assert identical(weights(model[4]), head)
    opt.add_param_group({"params": model[4].parameters(), "lr": 0.3})
    train(opt, 1, batch)
    assert not identical(weights(model[4]), head)
    assert (opt.param_groups[1]["lr"], opt.param_groups[1]["lr_scale"]) == (0.3, 1.0)


@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_only_own_groups_and_unfrozen_parameters_move(mode):
    model, batch = network(), batch_of()
    model[2].weight.requires_grad_(False)
    opt = mep.EPOptimizer(model[2:].parameters(), model=model, mode=mode, weight_decay=0.1)
    names = [name for name, _ in model.named_parameters()]
    before = weights(model)
    train(opt, 2, batch)
    moved = [n for n, p, q in zip(names, before, weights(model), strict=True) if not p.equal(q)]
    assert moved == ["2.bias", "4.weight", "4.bias"]


def test_estimate_gives_frozen_parameters_no_grad():
    model, batch = network(), batch_of()
    model[0].requires_grad_(False)
    mep.estimate(model, *batch)
    assert [p.grad is None for p in model.parameters()] == [True] * 2 + [False] * 4


class TwoBiases(nn.Module):
    """Autograd hands both biases the very same tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.a, self.b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.layer(x) + (self.a + self.b)


def test_every_parameter_has_a_grad_of_its_own():
    model, batch = TwoBiases().double(), batch_of()
    for _ in range(2):
        mep.estimate(model, *batch, settler=mep.Limit())
    twice = [p.grad / 2 for p in model.parameters()]
    backward(model, batch)
    assert distance(twice, [p.grad for p in model.parameters()]) < SAME_SUM


@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_all_parameters_frozen_is_no_error(mode):
    model, batch = network().requires_grad_(False), batch_of()
    opt, before = mep.EPOptimizer(model.parameters(), model=model, mode=mode), weights(model)
    assert torch.isfinite(train(opt, 1, batch))
    assert identical(weights(model), before)


def test_groups_have_their_own_lr_and_lr_scale():
    ours, theirs, batch = network(), network(), batch_of()
    first, last = {"lr": 0.1, "lr_scale": 0.5}, {"lr": 0.2}
    opt = mep.EPOptimizer(
        [{"params": ours[0].parameters(), **first}, {"params": ours[2:].parameters(), **last}],
        model=ours,
        mode="backprop",
    )
    sgd = torch.optim.SGD(
        [
            {"params": theirs[0].parameters(), "lr": 0.05},
            {"params": theirs[2:].parameters(), **last},
        ]
    )
    train(opt, 1, batch)
    backward(theirs, batch)
    sgd.step()
    assert distance(weights(ours), weights(theirs)) < SAME_SUM


@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_step_on_a_batch_leaves_grad_alone(mode):
    model, clean, batch = network(), network(), batch_of()
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    for m in (model, clean):
        train(mep.EPOptimizer(m.parameters(), model=m, mode=mode), 2, batch)
    assert all(bool((p.grad == 7.0).all()) for p in model.parameters())
    assert all(p.grad is None for p in clean.parameters())
    assert identical(weights(model), weights(clean))


@pytest.mark.parametrize("settler", [mep.Sweep(), mep.Limit(), mep.GradientDescent()], ids=repr)
def test_later_steps_leave_earlier_results_alone(settler):
    """Whatever memory a step reuses, what it returned belongs to the caller."""
    model = network()
    opt = mep.EPOptimizer(model.parameters(), model=model, settler=settler)
    loss, found = train(opt, 1, batch_of(seed=1)), opt.last
    kept = [t.clone() for t in (loss, found.loss, found.residual, found.balance.nudge)]
    train(opt, 3, batch_of(seed=2))
    assert found is not opt.last
    assert identical([loss, found.loss, found.residual, found.balance.nudge], kept)


def test_refused_batch_leaves_no_trace_in_the_next_step():
    clean, model, (x, y) = network(), network(), batch_of()
    opts = [mep.EPOptimizer(m.parameters(), model=m, momentum=0.9) for m in (clean, model)]
    for opt in opts:
        train(opt, 2, (x, y))
    with pytest.raises(ValueError, match="`target`"):
        opts[1].step(x=x, target=y + 9)
    for opt in opts:
        train(opt, 2, (x, y))
    assert identical(weights(clean), weights(model))


def test_param_groups_carry_the_depth_rule():
    model = mep.models.deep_mlp(5, width=4, in_features=4, out_features=3).double()
    outer, hidden = mep.param_groups(model, 0.1)
    assert (outer["lr_scale"], hidden["lr_scale"]) == (1.0, 1 / 5)
    assert {outer["lr"], hidden["lr"]} == {0.1}
    linear = [m for m in model if isinstance(m, nn.Linear)]
    ends = {id(p) for m in (linear[0], linear[-1]) for p in m.parameters()}
    assert {id(p) for p in outer["params"]} == ends
    every = [id(p) for g in (outer, hidden) for p in g["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters())


def test_depth_rule_shrinks_the_hidden_updates_alone():
    moved = {}
    for depth_scale in (True, False):
        model = mep.models.deep_mlp(5, width=4, in_features=4, out_features=3).double()
        nn.utils.vector_to_parameters(
            torch.linspace(-0.5, 0.5, sum(p.numel() for p in model.parameters())).double(),
            model.parameters(),
        )
        before = weights(model)
        groups = mep.param_groups(model, 0.1, depth_scale=depth_scale)
        train(mep.EPOptimizer(groups, model=model), 1, batch_of())
        moved[depth_scale] = [q - p for p, q in zip(before, weights(model), strict=True)]
    for k, (scaled, full) in enumerate(zip(moved[True], moved[False], strict=True)):
        factor = 1.0 if k in (0, 1, 8, 9) else 1 / 5
        torch.testing.assert_close(scaled, factor * full, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("depth", [1, 2])
def test_param_groups_of_short_chains_are_one_group(depth):
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(depth)])
    (group,) = mep.param_groups(model, 0.1)
    assert group["lr_scale"] == 1.0
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


def test_bfloat16_trains():
    model, (x, y) = network(torch.bfloat16), batch_of(40, torch.float32)
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.1, momentum=0.9)
    batch = x.bfloat16(), y
    first = float(train(opt, 1, batch))
    assert float(train(opt, 60, batch)) < 0.7 * first
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_float16_is_refused(mode):
    model, (x, y) = network(torch.float16), batch_of(dtype=torch.float32)
    opt, before = mep.EPOptimizer(model.parameters(), model=model, mode=mode), weights(model)
    with pytest.raises(TypeError, match=r"float16 .* use bfloat16"):
        opt.step(x=x.half(), target=y)
    assert identical(weights(model), before)


@pytest.mark.parametrize("source", ["backprop", "estimate"])
def test_closure_is_run_with_gradients_and_its_loss_returned(source):
    ours, theirs, batch = network(), network(), batch_of()

    def closure():
        ours.zero_grad()
        if source == "estimate":
            return mep.estimate(ours, *batch, settler=mep.Limit()).loss
        loss = nn.functional.cross_entropy(ours(batch[0]), batch[1])
        loss.backward()
        return loss

    start = float(nn.functional.cross_entropy(ours(batch[0]), batch[1]).detach())
    with torch.no_grad():
        loss = mep.EPOptimizer(ours.parameters(), lr=0.1).step(closure)
    backward(theirs, batch)
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    assert distance(weights(ours), weights(theirs)) < SAME_SUM
    assert float(loss.detach()) == pytest.approx(start)
