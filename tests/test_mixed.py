"""Steps under autocast: settled in bfloat16, learned in float32."""

import contextlib
import copy

import pytest
import torch
from problems import CLASSES, MODELS, distance, flat, tanh_mlp
from torch import nn

import mep
from mep.contrast.mixed import twin_of
from mep.optim.flat import FlatSteps

# Eight bits, and a finite nudge: as for models that are bfloat16 altogether.
COARSE = 0.3
BF16 = torch.autocast("cpu", torch.bfloat16)


def problem(name):
    torch.manual_seed(0)
    make, make_x = MODELS[name]
    model, x = make().float(), make_x()
    return model, x.float() if x.is_floating_point() else x, torch.randint(0, CLASSES, (len(x),))


def small():
    torch.manual_seed(0)
    return tanh_mlp([5, 16, 16, CLASSES])


def batch():
    return torch.randn(12, 5), torch.randint(0, CLASSES, (12,))


def exact_gradients(model, x, y):
    twin, wide = copy.deepcopy(model).double(), x.double() if x.is_floating_point() else x
    nn.functional.cross_entropy(twin(wide), y).backward()
    return [p.grad for p in twin.parameters()]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_gradients_are_the_weights_own(name):
    model, x, y = problem(name)
    truth = exact_gradients(model, x, y)
    with BF16:
        found = mep.estimate(model, x, y)
    assert found.converged and found.residual.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert distance([p.grad.double() for p in model.parameters()], truth) < COARSE


@pytest.mark.parametrize(
    # Muon divides by singular values, and blows up the rounding of small ones.
    ("update", "allowed"),
    [(mep.SGD(), 0.01), (mep.Route(mep.Muon(ns_dtype=None)), 0.3)],
    ids=["dense", "as factors"],
)
def test_step_is_taken_by_these_gradients(update, allowed):
    x, y = batch()
    model, twin = small(), small()
    options = {"lr": 0.1, "update": update}
    opt = mep.EPOptimizer(model.parameters(), model=model, **options)
    other = mep.EPOptimizer(twin.parameters(), model=twin, **options)
    with BF16:
        opt.step(x=x, target=y)
        mep.estimate(twin, x, y)
        other.step()
    before, found, truth = (flat(m.parameters()).detach() for m in (small(), model, twin))
    assert found.dtype == torch.float32 and opt.last.residual.dtype == torch.bfloat16
    # One has been rounded to eight bits, the other may not have been formed.
    assert (found - truth).norm() < allowed * (truth - before).norm()


def test_digits_of_the_weights_are_kept():
    """Steps that bfloat16 would round away add up in the masters, and the twin follows them."""
    model, (x, y) = small(), batch()
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=1e-3)
    start = flat(model.parameters()).detach().clone()
    with BF16:
        first = float(opt.step(x=x, target=y))
        after_one = flat(model.parameters()).detach().clone()
        for _ in range(300):
            last = float(opt.step(x=x, target=y))
    assert (start.bfloat16() == after_one.bfloat16()).double().mean() > 0.9
    assert (start == after_one).double().mean() < 0.1 and last < first - 0.03


def test_running_statistics_are_those_of_float32():
    model, x, y = problem("batch norm")
    twin = copy.deepcopy(model)
    twin(x)
    with BF16:
        mep.estimate(model, x, y)
    for ours, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.allclose(ours.double(), theirs.double(), atol=0.01, rtol=0.02)
    # Buffers may be replaced, as by a way to another type and back; the twin follows.
    model.double().float()
    before = [b.clone() for b in model.buffers()]
    with BF16:
        mep.estimate(model, x + 3, y)
    assert all(not torch.equal(b, old) for b, old in zip(model.buffers(), before, strict=True))


def test_other_buffers_keep_their_digits():
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("by", torch.linspace(0.1, 0.9, 16))
            self.register_buffer("steps", torch.tensor(2**24 + 1))

        def forward(self, s):
            self.steps += 1
            return s + self.by

    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(5, 16), Shift(), nn.Linear(16, CLASSES)), batch()
    with BF16:
        assert mep.estimate(model, x, y).converged
    assert torch.equal(model[1].by, torch.linspace(0.1, 0.9, 16))
    assert int(model[1].steps) == 2**24 + 2


def test_model_is_followed():
    """Weights that were changed, frozen, replaced; dropout that was switched off."""
    model, (x, y) = nn.Sequential(nn.Linear(5, 9), nn.Dropout(0.5), nn.Linear(9, CLASSES)), batch()

    def twin():
        with BF16, mep.contrast.mixed.mixed(x):
            return twin_of(model)

    first = twin()
    assert twin() is first and {p.dtype for p in first.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    model[2].bias.requires_grad_(False)
    assert twin() is first and bool((first.model[0].weight == 0.5).all())
    assert not first.model[2].bias.requires_grad
    model.eval()
    assert not twin().model[1].training
    model[0].weight = nn.Parameter(torch.ones(9, 5))
    assert bool((twin().model[0].weight == 1).all())
    with BF16:
        mep.estimate(model, x, y)
    assert model[2].bias.grad is None and model[0].weight.grad is not None


def test_nothing_changes_without_autocast(monkeypatch):
    model, (x, y) = small(), batch()
    taken = []
    original = FlatSteps.take
    monkeypatch.setattr(FlatSteps, "take", lambda *a: taken.append(1) or original(*a))
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.1)
    opt.step(x=x, target=y)
    assert taken and opt.last.residual.dtype == torch.float32
    with BF16:
        opt.step(x=x, target=y)
        with pytest.raises(ValueError, match="does not fit"):
            opt.step(x=x[:, :3], target=y)
        assert torch.is_autocast_enabled("cpu")
    assert len(taken) == 1
    model.double()
    with BF16:
        mep.estimate(model, x.double(), y)
    assert model[0].weight.grad.dtype == torch.float64


def test_backprop_is_torch_s_own():
    model, (x, y) = small(), batch()
    twin = copy.deepcopy(model)
    opt = mep.EPOptimizer(model.parameters(), model=model, mode="backprop", lr=0.1)
    other = torch.optim.SGD(twin.parameters(), lr=0.1)
    with BF16:
        opt.step(x=x, target=y)
        nn.functional.cross_entropy(twin(x), y).backward()
    other.step()
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_several_steps_in_one_context(mode):
    """Autocast keeps copies of weights as long as it lasts, but not of those that have moved."""
    x, y = batch()
    losses = []
    for whole in (True, False):
        model, seen = small(), []
        opt = mep.EPOptimizer(model.parameters(), model=model, mode=mode, lr=0.5)
        with BF16 if whole else contextlib.nullcontext():
            for _ in range(5):
                with contextlib.nullcontext() if whole else BF16:
                    seen.append(float(opt.step(x=x, target=y)))
                    seen.append(float(model(x).detach().sum()))
        losses.append(seen)
    assert losses[0] == losses[1] and losses[0][8] < losses[0][0]


def test_cost_is_taken_in_full_precision():
    """Loss and targets keep their digits."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(4, 5)
    target = torch.tensor([[257.25, 301.5]]).expand(4, 2)
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.0, cost="mse")
    with BF16:
        loss = opt.step(x=x, target=target)
        output = mep.settle(model, x, target, cost="mse").configuration.free[-1]
    exact = 0.5 * (output.double() - target).square().sum(1).mean()
    assert loss.dtype == torch.float32 and abs(loss / exact - 1) < 1e-4


def test_hooks_are_the_model_s():
    """Those that were replaced between two steps, too."""
    model, (x, y), calls = small(), batch(), []
    for name in "ab":
        handle = model[2].register_forward_hook(lambda *_, name=name: calls.append(name))
        with BF16:
            mep.estimate(model, x, y)
        handle.remove()
    assert calls[0] == "a" and calls[-1] == "b" and calls == sorted(calls)


def test_tensors_that_are_shared_stay_shared():
    class Masked(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("mask", mask)

        def forward(self, x):
            return self.layer(x) * self.mask

    class Twice(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.one, self.two = Masked(mask), Masked(mask)
            self.two.layer.weight = self.one.layer.weight

        def forward(self, x):
            return x + self.two(torch.tanh(self.one(x)))

    torch.manual_seed(0)
    mask, (x, y) = torch.linspace(0.1, 1, 8), batch()
    model = nn.Sequential(nn.Linear(5, 8), Twice(mask), nn.Linear(8, CLASSES))
    with BF16:
        assert mep.estimate(model, x, y).converged
        model[2].bias = None
        assert mep.estimate(model, x, y).converged
        with mep.contrast.mixed.mixed(x):
            twin = twin_of(model).model[1]
    assert twin.one.mask is twin.two.mask and twin.one.layer.weight is twin.two.layer.weight
    assert twin.one.mask.dtype == torch.bfloat16 and model[1].one.mask is mask


def test_settle_shows_what_a_step_does():
    model, (x, y) = small(), batch()
    with BF16:
        found, step = mep.settle(model, x, y), mep.estimate(model, x, y)
    assert torch.equal(found.residual, step.residual)
    with torch.autocast("cpu", torch.float16), pytest.raises(TypeError, match="bfloat16"):
        mep.settle(model, x, y)


@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_curvature_of_a_task_is_in_full_precision(mode):
    found, task = [], [batch()]
    for autocast in (True, False):
        model = small()
        options = {"mode": mode, "lr": 0.1, "penalty": mep.EWC(1.0)}
        opt = mep.EPOptimizer(model.parameters(), model=model, **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            opt.consolidate(task)
        found.append([t for p in model.parameters() for t in opt.state[p].values()])
    assert found[0]
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["ep", "backprop"])
@pytest.mark.parametrize(
    "options",
    [{"penalty": mep.SynapticIntelligence(0.1)}, {"update": mep.Route(mep.Natural())}],
    ids=["intelligence", "natural"],
)
def test_what_watches_every_step_works(mode, options):
    model = small()
    opt = mep.EPOptimizer(model.parameters(), model=model, mode=mode, lr=0.01, **options)
    with BF16:
        for _ in range(3):
            opt.step(x=(each := batch())[0], target=each[1])
    values = [v for p in model.parameters() for v in (p, *opt.state[p].values())]
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    assert {t.dtype for t in tensors} <= {torch.float32, torch.float64}
    assert all(bool(t.isfinite().all()) for t in tensors) and opt.skipped == 0


def test_fisher_is_in_full_precision():
    model, each = small(), [batch()]
    truth = mep.continual.fisher_diagonal(model, each)
    with BF16:
        found = mep.continual.fisher_diagonal(model, each)
    assert all(torch.equal(found[name], truth[name]) for name in truth)


def test_diagnosis_compares_with_full_precision():
    model, (x, y) = small(), batch()
    with BF16:
        found = mep.diagnose(model, x, y)
    assert found.dtype == "bfloat16" and found.regime == "finite nudge"
    assert 0.99 < found.cosine < 1 - 1e-7 and found.displacement_ratio > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blockwise": True, "settler": mep.Sweep(1)}, "blockwise=True.*model.bfloat16"),
        ({"memory_budget": "1MB", "settler": mep.Sweep(1)}, "memory_budget.*model.bfloat16"),
        ({"settler": mep.Sweep(feedback="random")}, "feedback='random'.*model.bfloat16"),
    ],
)
def test_what_it_does_not_reach_is_refused(options, message):
    model, (x, y) = small().bfloat16(), batch()
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.1, **options)
    with BF16:  # as the message says
        opt.step(x=x.bfloat16(), target=y)
    model = small()
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.1, **options)
    before = flat(model.parameters()).detach().clone()
    with BF16, pytest.raises(ValueError, match=message):
        opt.step(x=x, target=y)
    assert torch.equal(flat(model.parameters()), before)


def test_float16_is_refused():
    model, (x, y) = small(), batch()
    with torch.autocast("cpu", torch.float16), pytest.raises(TypeError, match="bfloat16"):
        mep.estimate(model, x, y)
    assert model[0].weight.grad is None
