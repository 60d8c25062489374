"""Every option changes the result; a settling that diverges changes nothing."""

import contextlib
import copy
import inspect

import pytest
import torch
from problems import CLASSES, tanh_mlp
from small_training import batch_of, distance, identical, network, train, weights
from torch import nn

import mep
from mep.blocks.closed import ClosedBlock
from mep.blocks.local import LocalBlock
from mep.kernels import eager


def after_three_steps(**options):
    model = network()
    train(mep.EPOptimizer(model.parameters(), model=model, **{"lr": 0.1} | options), 3, batch_of())
    return weights(model)


OPTIONS = {
    "mode": {"mode": "backprop"},
    "lr": {"lr": 0.2},
    "momentum": {"momentum": 0.9},
    "weight_decay": {"weight_decay": 0.1},
    "nesterov": {"nesterov": True},
    "update": {"update": mep.SGD(decoupled=True)},
    "constraint": {"constraint": mep.SpectralNorm(0.1)},
    "clip_norm": {"clip_norm": 1e-2},
    "cost": {"cost": "mse"},
    "energy": {"energy": mep.PredictionError(output=mep.KL())},
    "settler": {"settler": mep.Limit()},
    "stencil": {"stencil": mep.centered},
    "beta": {"beta": mep.AutoBeta(0.5)},
    "blockwise": {"blockwise": True, "settler": mep.Sweep(1), "update": mep.Normalised()},
    "settle_steps": {"settle_steps": 7},
    "settle_lr": {"settle_lr": 0.1},
}
BASE = {"nesterov": {"momentum": 0.9}, "update": {"momentum": 0.9, "weight_decay": 0.1}}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_alone_changes_the_result(name):
    base = BASE.get(name, {})
    changed, reference = after_three_steps(**base, **OPTIONS[name]), after_three_steps(**base)
    # Far above rounding (1e-15), far below a step (1e-2).
    assert distance(changed, reference) > 1e-9


def test_no_option_is_missing_from_the_table():
    elsewhere = {"self", "params", "model", "gradient_method", "max_skipped"}
    elsewhere |= {"memory_budget", "state_dtype"}  # the same result: tests/test_streaming.py
    elsewhere |= {"penalty", "ewc_lambda"}  # from the second task on: tests/test_continual.py
    assert set(inspect.signature(mep.EPOptimizer.__init__).parameters) == set(OPTIONS) | elsewhere


def test_gradient_method_changes_the_path_and_not_the_result(monkeypatch):
    ran = []
    for kind in (ClosedBlock, LocalBlock):
        original = kind.signals

        def noting(self, *args, original=original):
            ran.append(self.kind)
            return original(self, *args)

        monkeypatch.setattr(kind, "signals", noting)
    analytic, by_closed = after_three_steps(gradient_method="analytic"), set(ran)
    ran.clear()
    autograd, by_local = after_three_steps(gradient_method="autograd"), set(ran)
    assert (by_closed, by_local) == ({"closed form"}, {"local autograd"})
    # The local path subtracts predictions in float64: d / beta keeps about 10 digits.
    assert distance(analytic, autograd) < 1e-9


def test_settle_steps_and_settle_lr_select_gradient_settling():
    chosen = after_three_steps(settle_steps=4, settle_lr=0.3)
    named = after_three_steps(settler=mep.GradientDescent(max_steps=4, lr=0.3))
    assert identical(chosen, named)


@pytest.mark.parametrize("option", [{"settle_steps": 3}, {"settle_lr": 0.1}])
def test_settler_and_settle_options_together_are_an_error(option):
    model = network()
    with pytest.raises(ValueError, match=r"settle_steps.*settle_lr.*settler=.*GradientDescent"):
        mep.EPOptimizer(model.parameters(), model=model, settler=mep.Sweep(), **option)


@pytest.mark.parametrize(
    "name", ["energy", "settler", "stencil", "beta", "settle_steps", "settle_lr", "gradient_method"]
)
def test_backprop_refuses_what_only_settling_uses(name):
    option = (OPTIONS | {"gradient_method": {"gradient_method": "autograd"}})[name]
    model = network()
    with pytest.raises(ValueError, match=f"mode='backprop' does not settle: drop {name}$"):
        mep.EPOptimizer(model.parameters(), model=model, mode="backprop", **option)


# --- divergence ----------------------------------------------------------------------------------


BAD = torch.full((4, 4), 1e38), torch.tensor([0, 1, 2, 0])  # finite, but the logits overflow
GOOD = batch_of(4, torch.float32)


def fragile(mode="ep", max_skipped=2):
    """Linear layers let a large input through; a running statistic must not keep it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # without the first layer's own statistics, which would tame the input
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    opt = mep.EPOptimizer(
        model.parameters(), model=model, mode=mode, momentum=0.9, max_skipped=max_skipped
    )
    train(opt, 1, GOOD)
    return model, opt


def everything(model, opt):
    buffers = [opt.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    return [*(t.clone() for t in model.state_dict().values()), *buffers]


def test_beta_too_large_is_skipped_with_a_remedy_and_raises_after_enough():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)], nn.Linear(4, 3))
    opt = mep.EPOptimizer(
        model.parameters(), model=model, beta=1e6, settle_steps=10, cost="mse", max_skipped=2
    )
    before = weights(model)
    for count in (1, 2):
        with pytest.warns(UserWarning, match=r"beta=1000000.0 is too strong.*beta='auto'.*Sweep"):
            assert torch.isfinite(train(opt, 1, GOOD))
        assert (opt.last.status, opt.skipped, opt.skipped_in_a_row) == ("diverged", count, count)
    with (
        pytest.warns(UserWarning, match="no gradient was written"),
        pytest.raises(RuntimeError, match=r"3 updates in a row.*`lr` or `beta`.*mep\.init"),
    ):
        train(opt, 1, GOOD)
    assert identical(weights(model), before)


@pytest.mark.filterwarnings("ignore:settling diverged")
@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_skipped_update_leaves_everything_bitwise(mode):
    model, opt = fragile(mode)
    before = everything(model, opt)
    train(opt, 2, BAD)
    assert opt.skipped == 2
    assert identical(everything(model, opt), before)


def test_gradient_that_overflows_is_not_taken():
    """Loss and residuals are finite; the sum over the batch, before the mean, is not."""
    model = nn.Sequential(nn.Linear(4, 3))
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=1e-3)
    nn.init.constant_(model[0].weight, 0.1)
    opt.step(x=torch.full((64, 4), 2e37), target=torch.zeros(64, dtype=torch.long))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:settling diverged")
@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_good_step_resets_the_count_in_a_row(mode):
    model, opt = fragile(mode)
    train(opt, 2, BAD)
    before = weights(model)
    train(opt, 1, GOOD)
    assert not identical(weights(model), before)
    train(opt, 2, BAD)
    assert (opt.skipped, opt.skipped_in_a_row) == (4, 2)
    with pytest.raises(RuntimeError, match="3 updates in a row"):
        train(opt, 1, BAD)


@pytest.mark.filterwarnings("ignore:settling diverged")
def test_counts_survive_state_dict():
    _, opt = fragile()
    train(opt, 2, BAD)
    _, other = fragile()
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert (other.skipped, other.skipped_in_a_row) == (2, 2)
    with pytest.raises(RuntimeError, match="3 updates in a row"):
        train(other, 1, BAD)


@pytest.mark.filterwarnings("ignore:settling diverged")
def test_max_skipped_zero_raises_at_the_first():
    _, opt = fragile(max_skipped=0)
    with pytest.raises(RuntimeError, match="1 updates in a row"):
        train(opt, 1, BAD)


# --- a nudge that gives way ----------------------------------------------------------------------


def curved(**options):
    """Steps that one sweep does not settle at this strength, nor at half of it."""
    torch.manual_seed(0)
    model = tanh_mlp([6, 8, 8, CLASSES], gain=1.5)
    beta = mep.AutoBeta(0.4, **options)
    opt = mep.EPOptimizer(
        model.parameters(), model=model, lr=0.0, beta=beta, settler=mep.Sweep(1, tol=0.02)
    )
    x, y = torch.randn(16, 6), torch.randint(0, CLASSES, (16,))
    gain = mep.diagnose(model, x, y, beta=1e-3).c / 1e-3
    found = []
    for _ in range(12):
        opt.step(x=x, target=y)
        found.append((opt.last.beta * gain, opt.last.status))
    return found, opt


@pytest.mark.parametrize("compiled", [True, False])
def test_nudge_backs_off_until_sweeps_settle(compiled, caplog):
    with caplog.at_level("INFO", "mep"), contextlib.nullcontext() if compiled else eager():
        found, opt = curved(back_off=True)
    statuses = [status for _, status in found]
    first = statuses.index("converged")
    assert 1 < first < 6 and set(statuses[:first]) == {"not settled"}
    expected = [0.4]
    for status in statuses[:-1]:
        expected.append(min(0.4, expected[-1] * (1.1 if status == "converged" else 0.5)))
    assert [c for c, _ in found] == pytest.approx(expected, rel=1e-4)
    assert len([r for r in caplog.records if "eased to" in r.message]) == 12 - statuses.count(
        "converged"
    )
    assert copy.deepcopy(opt).easing == opt.easing
    found, opt = curved()
    assert {status for _, status in found} == {"not settled"} and opt.easing.factor == 1.0


def test_backing_off_is_for_sweeps():
    model = tanh_mlp([6, 8, CLASSES])
    with pytest.raises(ValueError, match=r"back_off=True.*more steps"):
        mep.EPOptimizer(
            model.parameters(), model=model, beta=mep.AutoBeta(back_off=True), settle_steps=30
        )
