"""Bad input gets an error that names the argument and the remedy, before anything changes."""

import math

import pytest
import torch
from torch import nn

import mep

NAN, INF = float("nan"), float("inf")


def network():
    """BatchNorm in train mode: the buffers tell whether a forward pass left a trace."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])


def trained(**options):
    """A model with gradients, moved statistics and an optimizer with momentum."""
    model = network()
    opt = mep.EPOptimizer(model.parameters(), model=model, momentum=0.9, **options)
    opt.step(x=batch()[0], target=labels_or_values(options))
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    return model, opt


def labels_or_values(options):
    return torch.zeros(6, 3) if options.get("cost") == "mse" else batch()[1]


def snapshot(model, opt):
    """Everything that must be as it was, as a flat list."""
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
    tensors += [opt.state[p]["momentum_buffer"] for p in opt.state]
    numbers = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    sizes = [len(g["params"]) for g in opt.param_groups]
    return [t.clone() for t in tensors], [numbers, sizes, opt.skipped, opt.skipped_in_a_row]


def assert_unchanged(before, model, opt):
    tensors, numbers = snapshot(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before[0], strict=True))
    assert numbers == before[1]


# --- batches -------------------------------------------------------------------------------------


def spoiled(value):
    x = batch()[0].clone()
    x[2, 1] = value
    return x


X, Y = batch()
FINITE = r"`x` holds NaN or infinite values; clean the data"
# name: (x, error, message)
INPUTS = {
    "nan": (spoiled(NAN), ValueError, FINITE),
    "inf": (spoiled(INF), ValueError, FINITE),
    "feature size": (torch.ones(6, 5), ValueError, r"`x` of shape \(6, 5\).*block `0`.*4, 8"),
    "no features": (torch.ones(6), ValueError, r"`x` of shape \(6,\) does not fit.*block `0`"),
    "float64": (X.double(), TypeError, r"`x` has dtype torch.float64.*pass x.to\(torch.float32\)"),
    "int": (torch.ones(6, 4, dtype=torch.long), TypeError, r"`x` has dtype.*pass x.float\(\)"),
    "bool": (X > 0, TypeError, r"`x` has dtype torch.bool.*pass x.float\(\)"),
    "device": (X.to("meta"), ValueError, r"`x` is on meta and the model on cpu; move"),
    "empty": (X[:0], ValueError, r"`x` is empty \(shape \(0, 4\)\); pass at least one sample"),
    "not a tensor": (X.tolist(), TypeError, r"`x` must be a Tensor, got list"),
}
RANGE = r"`target` must hold classes in \[0, 3\), got values from "
# name: (target, cost, error, message)
TARGETS = {
    "out of range": (Y + 1, "cross_entropy", ValueError, RANGE + "1 to 3"),
    "negative": (Y - 1, "cross_entropy", ValueError, RANGE + "-1 to 1"),
    "shape": (Y[:5], "cross_entropy", ValueError, r"`target` must have shape \(6,\).*got \(5,\)"),
    "one-hot": (torch.eye(3)[Y].long(), "cross_entropy", ValueError, r"`target` must have shape"),
    "float": (Y.float(), "cross_entropy", TypeError, r"`target` must.*pass target.long\(\).*mse"),
    "bool": (Y > 0, "cross_entropy", TypeError, r"`target` must.*torch.bool; pass target.long"),
    "device": (Y.to("meta"), "cross_entropy", ValueError, r"`target` is on meta.*move the target"),
    "not a tensor": (Y.tolist(), "cross_entropy", TypeError, r"`target` must be a Tensor, got lis"),
    "mse out of range": (Y + 1, "mse", ValueError, RANGE + "1 to 3"),
    "mse negative": (Y - 1, "mse", ValueError, RANGE + "-1 to 1"),
    "mse shape": (torch.ones(6, 4), "mse", ValueError, r"`target` must have .*\(6, 3\).*\(6, 4\)"),
    "mse nan": (torch.full((6, 3), NAN), "mse", ValueError, r"`target` holds NaN.*clean"),
    "mse bool": (Y > 0, "mse", TypeError, r"`target` must hold real.*pass target.to\(torch.fl"),
    "mse complex": (torch.ones(6, 3) + 0j, "mse", TypeError, r"`target` must hold real values"),
    "mse device": (torch.ones(6, 3).to("meta"), "mse", ValueError, r"`target` is on meta.*move"),
}
ROUTES = ["estimate", "step", "backprop"]


def take(route, model, opt, x, target, cost):
    if route == "estimate":
        mep.estimate(model, x, target, cost=cost)
    else:
        opt.step(x=x, target=target)


def prepared(route, cost="cross_entropy"):
    return trained(mode="backprop" if route == "backprop" else "ep", cost=cost)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("x", "error", "message"), INPUTS.values(), ids=INPUTS)
def test_bad_input_is_refused_and_changes_nothing(x, error, message, route):
    if route == "backprop" and "block" in message:
        # Any model may be trained by backprop; the shape is then torch's to refuse.
        error, message = RuntimeError, "mat1|size mismatch"
    model, opt = prepared(route)
    before = snapshot(model, opt)
    with pytest.raises(error, match=message):
        take(route, model, opt, x, Y, "cross_entropy")
    assert_unchanged(before, model, opt)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("target", "cost", "error", "message"), TARGETS.values(), ids=TARGETS)
def test_bad_target_is_refused_and_changes_nothing(target, cost, error, message, route):
    model, opt = prepared(route, cost)
    before = snapshot(model, opt)
    with pytest.raises(error, match=message):
        take(route, model, opt, X, target, cost)
    assert_unchanged(before, model, opt)


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
def test_outputs_without_units_are_refused(cost):
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match=rf"cost '{cost}' needs outputs \(B, .*got \(6,\)"):
        mep.estimate(model, X, Y, cost=cost)


@pytest.mark.parametrize("route", ROUTES)
def test_a_good_batch_does_change_what_the_tests_above_watch(route):
    model, opt = prepared(route)
    (before, _) = snapshot(model, opt)
    take(route, model, opt, X, Y, "cross_entropy")
    after, _ = snapshot(model, opt)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # The running mean, the fourth entry of the state dict after the two layers' parameters.
    assert not torch.equal(before[4], after[4])


# name: (arguments of step, error, message)
CALLS = {
    "x without target": ({"x": X}, ValueError, "give both `x` and `target`"),
    "target without x": ({"target": Y}, ValueError, "give both `x` and `target`"),
    "closure with x": (
        {"closure": lambda: 0.0, "x": X, "target": Y},
        ValueError,
        "`target`, and no closure with them",
    ),
    "x by position": ({"closure": X}, TypeError, r"`closure` must be a function.*step\(x=\.\.\."),
}


@pytest.mark.parametrize(("arguments", "error", "message"), CALLS.values(), ids=CALLS)
def test_bad_call_of_step_changes_nothing(arguments, error, message):
    model, opt = trained()
    before = snapshot(model, opt)
    with pytest.raises(error, match=message):
        opt.step(**arguments)
    assert_unchanged(before, model, opt)


@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_batch_without_model_is_refused(mode):
    model = network()
    opt = mep.EPOptimizer(model.parameters(), mode=mode)
    before = [t.clone() for t in model.state_dict().values()]
    with pytest.raises(ValueError, match=r"`step\(x=, target=\)` needs EPOptimizer\(.*model=model"):
        opt.step(x=X, target=Y)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))
    assert opt.state == {} and all(p.grad is None for p in model.parameters())


# --- models and parameters -----------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, y):
        return self.layer(x + y)


MODELS = {
    "two inputs": (TwoInputs, mep.TraceError, r"forward takes 2 inputs \(x, y\); pass one tensor"),
    "no parameters": (nn.Tanh, mep.TraceError, "it has no parameters"),
    "no module": (lambda: len, TypeError, r"`model` must be an nn.Module, got builtin"),
}


@pytest.mark.parametrize("route", ["estimate", "construct"])
@pytest.mark.parametrize(("make", "error", "message"), MODELS.values(), ids=MODELS)
def test_model_that_cannot_be_cut_is_refused(make, error, message, route):
    model = make()
    own = list(model.parameters()) if isinstance(model, nn.Module) else []
    params = own or [nn.Parameter(torch.zeros(1))]
    if route == "construct" and isinstance(model, nn.Module) and not own:
        message, error = "1 of 1 parameters do not belong", ValueError  # met first
    before = [p.detach().clone() for p in params]
    with pytest.raises(error, match=message):
        if route == "estimate":
            mep.estimate(model, X, Y)
        else:
            mep.EPOptimizer(params, model=model)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(params, before, strict=True))


FOREIGN = r"1 of 2 parameters do not belong to `model`; pass model.parameters\(\)"


def test_foreign_parameter_is_refused_at_construction():
    model = network()
    with pytest.raises(ValueError, match=FOREIGN):
        mep.EPOptimizer([model[0].weight, nn.Parameter(torch.zeros(1))], model=model)


# name: (what is wrong with the group, error, message)
GROUPS = {
    "foreign": ({"params": [nn.Parameter(torch.zeros(2)) for _ in "ab"]}, ValueError, "2 of 2"),
    "lr": ({"lr": -1.0}, ValueError, "`lr` must be a finite number >= 0, got -1.0"),
    "lr_scale": ({"lr_scale": NAN}, ValueError, "`lr_scale` must be a finite number >= 0, got nan"),
    "momentum": ({"momentum": 1.0}, ValueError, r"`momentum` must be in \[0, 1\), got 1.0"),
    "set": ({"params": {nn.Parameter(torch.zeros(1))}}, TypeError, "`params` must be a list"),
}


@pytest.mark.parametrize(("group", "error", "message"), GROUPS.values(), ids=GROUPS)
def test_bad_group_is_not_added(group, error, message):
    model = network()
    opt = mep.EPOptimizer(model[0].parameters(), model=model)
    with pytest.raises(error, match=message):
        opt.add_param_group({"params": model[3].parameters()} | group)
    assert [len(g["params"]) for g in opt.param_groups] == [2]


# --- options -------------------------------------------------------------------------------------

NUMBER = r"` must be a finite number >= 0, got "
# Options of the optimizer alone: (options, error, message).
OWN = {
    "lr < 0": ({"lr": -0.1}, ValueError, "`lr" + NUMBER + "-0.1"),
    "lr nan": ({"lr": NAN}, ValueError, "`lr" + NUMBER + "nan"),
    "lr inf": ({"lr": INF}, ValueError, "`lr" + NUMBER + "inf"),
    "momentum 1": ({"momentum": 1.0}, ValueError, r"`momentum` must be in \[0, 1\), got 1.0"),
    "momentum < 0": ({"momentum": -0.1}, ValueError, r"`momentum` must be in \[0, 1\), got -0.1"),
    "momentum nan": ({"momentum": NAN}, ValueError, r"`momentum` must be in \[0, 1\), got nan"),
    "decay < 0": ({"weight_decay": -1.0}, ValueError, "`weight_decay" + NUMBER + "-1.0"),
    "nesterov": ({"nesterov": True}, ValueError, "`nesterov=True` needs `momentum` > 0"),
    "mode": ({"mode": "bp"}, ValueError, "`mode` must be 'ep' or 'backprop', got 'bp'"),
    "max_skipped": (
        {"max_skipped": -1},
        ValueError,
        "`max_skipped` must be a whole number >= 0, got -1",
    ),
    "settle_steps": (
        {"settle_steps": 0},
        ValueError,
        r"max_steps=...\)` must be a whole number >= 1, got 0",
    ),
    "settle_lr": (
        {"settle_lr": -1.0},
        ValueError,
        r"\(lr=...\)` must be a finite number > 0, got -1.0",
    ),
}
STRENGTH = "`beta` must be a finite number > 0, got "
# Options that mep.estimate takes as well.
SHARED = {
    "beta 0": ({"beta": 0}, ValueError, STRENGTH + "0"),
    "beta < 0": ({"beta": -1}, ValueError, STRENGTH + "-1"),
    "beta nan": ({"beta": NAN}, ValueError, STRENGTH + "nan"),
    "beta inf": ({"beta": INF}, ValueError, STRENGTH + "inf"),
    "beta x": ({"beta": "x"}, ValueError, "`beta` must be 'auto', a number > 0 or .*, got 'x'"),
    "beta kind": ({"beta": True}, TypeError, "`beta` must be 'auto', a number or .*, got True"),
    "cost": ({"cost": "l1"}, ValueError, r"`cost` must be one of \['cross_entropy', 'mse'\].*'l1'"),
    "stencil": ({"stencil": 3}, TypeError, "`stencil` must be a function such as mep.one_sided"),
    "settler": ({"settler": "sweep"}, TypeError, r"`settler` must be .*mep.Sweep\(\), got 'sweep'"),
    "energy": ({"energy": "kl"}, TypeError, r"`energy` must be .*mep.PredictionError\(\), got 'kl"),
    "gradient_method": (
        {"gradient_method": "exact"},
        ValueError,
        "`gradient_method` must be 'analytic' or 'autograd', got 'exact'",
    ),
}


@pytest.mark.parametrize(("options", "error", "message"), OWN.values(), ids=OWN)
def test_nonsense_option_of_the_optimizer_is_refused(options, error, message):
    model = network()
    with pytest.raises(error, match=message):
        mep.EPOptimizer(model.parameters(), model=model, **options)


@pytest.mark.parametrize("route", ["estimate", "construct"])
@pytest.mark.parametrize(("options", "error", "message"), SHARED.values(), ids=SHARED)
def test_nonsense_option_of_the_estimate_is_refused(options, error, message, route):
    model, opt = trained()
    before = snapshot(model, opt)
    with pytest.raises(error, match=message):
        if route == "estimate":
            mep.estimate(model, X, Y, **options)
        else:
            mep.EPOptimizer(model.parameters(), model=model, **options)
    assert_unchanged(before, model, opt)


# name: (what makes it, message); a strategy object refuses its numbers itself.
STRATEGIES = {
    "c 0": (lambda: mep.AutoBeta(0.0), r"`AutoBeta\(c=...\)` must be a finite number > 0, got 0.0"),
    "c < 0": (lambda: mep.AutoBeta(-1.0), r"AutoBeta\(c=.*> 0, got -1.0"),
    "c nan": (lambda: mep.AutoBeta(math.nan), r"AutoBeta\(c=.*> 0, got nan"),
    "max_sweeps 0": (lambda: mep.Sweep(max_sweeps=0), r"`Sweep\(max_sweeps=.*>= 1, got 0"),
    "sweep tol 0": (
        lambda: mep.Sweep(tol=0.0),
        r"`Sweep\(tol=...\)` must be a number > 0, or None, got 0.0",
    ),
    "sweep tol < 0": (
        lambda: mep.Sweep(tol=-1.0),
        r"`Sweep\(tol=...\)` must be a number > 0, or None, got -1.0",
    ),
    "steps": (
        lambda: mep.GradientDescent(max_steps=0),
        r"`GradientDescent\(max_steps=.*>= 1, got 0",
    ),
    "gd lr": (lambda: mep.GradientDescent(lr=0.0), r"`GradientDescent\(lr=.*> 0, got 0.0"),
    "gd tol": (
        lambda: mep.GradientDescent(tol=0.0),
        r"`GradientDescent\(tol=.*> 0, or None, got 0.0",
    ),
    "gd momentum": (
        lambda: mep.GradientDescent(momentum=1.0),
        r"`Gra.*\(momentum=.*in .0, 1., got 1.0",
    ),
    "memory": (lambda: mep.Anderson(memory=0), r"`Anderson\(memory=.*>= 1, got 0"),
    "damping": (lambda: mep.Anderson(damping=0.0), r"`Anderson\(damping=.*in .0, 1., got 0.0"),
    "temperature": (lambda: mep.KL(temperature=0.0), r"`KL\(temperature=...\)` must be > 0, got 0"),
}


@pytest.mark.parametrize(("make", "message"), STRATEGIES.values(), ids=STRATEGIES)
def test_strategy_refuses_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
