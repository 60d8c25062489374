"""Memories of finished tasks: against penalties written out and minima in closed form."""

import copy
import io
import math
import pickle
from functools import partial
from itertools import pairwise

import pytest
import torch
from problems import distance, flat
from small_training import SAME_RULE, backward, batch_of, identical, network, train, weights
from torch import nn

import mep
from mep.continual import fisher_diagonal
from mep.contrast import free_phase, free_signals, settings
from mep.curvature import kronecker_factors

EWC, SI = mep.EWC, mep.SynapticIntelligence

# float64 rounding (1e-16) times conditions of up to 1e4, of eigenbases or of normal equations.
SAME = 1e-11
LIMIT = {"settler": mep.Limit()}
RUNS = {
    "kronecker": EWC(3.0, every=4),
    "separate": EWC(30.0, "diagonal"),
    "online": EWC(30.0, "diagonal", "online", gamma=0.9),
    "intelligence": SI(1.0),
}


def task(k, dtype=torch.float64):
    """The same inputs' classes go by other names in every task."""
    x, y = batch_of(seed=k, dtype=dtype)
    return x, (y + k) % 3


def optimizer(penalty, model=None, **options):
    model, options = model or network(), {"lr": 0.2, "momentum": 0.9} | options
    penalty = copy.deepcopy(penalty)  # one object, one optimizer
    return mep.EPOptimizer(model.parameters(), model=model, penalty=penalty, **options)


def end(opt, batch):
    opt.consolidate(None if isinstance(opt.penalty, SI) else [batch])


def run(penalty, count=3, steps=6, **options):
    """Several tasks and the beginning of another; it ends in the middle of a cycle of ``every``."""
    opt = optimizer(penalty, **options)
    for k in range(count + 1):
        batch = task(k, next(opt.model.parameters()).dtype)
        train(opt, steps, batch)
        if opt.penalty is not None and k < count:
            end(opt, batch)
    return opt


def apart(a, b):
    return distance(weights(a.model), weights(b.model))


@torch.no_grad()
def scatter(model, seed):
    torch.manual_seed(seed)
    for p in model.parameters():
        p.copy_(torch.randn_like(p))


# --- the penalty, written out --------------------------------------------------------------------

FORMS = {
    "separate": EWC(2.0, "diagonal", damping=0.1),
    "online": EWC(2.0, "diagonal", "online", gamma=0.6, damping=0.1),
    "kronecker": EWC(2.0, gamma=0.7, damping=0.1, every=1),
}
# A kernel, a weight and a bias of their own; scale, shift and bias inside a block have no factors.
FACTORED = ["0.weight", "0.bias", "3.weight", "3.bias", "6.weight"]


def mixed():
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(),
        nn.Linear(12, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3),
    ).double()  # fmt: skip


def looked_at(model, x, y, penalty, cost="cross_entropy"):
    """Optimum and curvature of a task by name: a diagonal, or two factors."""
    found = fisher_diagonal(model, [(x, y)], cost=cost)
    with torch.no_grad():
        signals = free_signals(free_phase(model, x, y, settings(cost=cost)), "true")
    for name in found.keys() & set(FACTORED) if penalty.curvature == "kronecker" else ():
        found[name] = kronecker_factors(signals[id(model.get_parameter(name))])
    return {name: p.detach().clone() for name, p in model.named_parameters()}, found


def grown(factor, damping):
    n = len(factor)
    return factor + math.sqrt(damping) * factor.trace() / n * torch.eye(n).double()


def written_out(penalty, history, parameters):
    """The penalty at any parameters, as the docstring of EWC has it."""
    ages, total = [penalty.gamma**k for k in reversed(range(len(history)))], 0
    for name, theta in parameters.items():
        centers, curvatures = zip(*((c[name], f[name]) for c, f in history), strict=True)
        if isinstance(curvatures[0], tuple):
            a, g = (sum(w * f[i] for w, f in zip(ages, curvatures, strict=True)) for i in (0, 1))
            whole = torch.kron(grown(g, penalty.damping), grown(a, penalty.damping)) / sum(ages)
            d = (theta - centers[-1]).flatten()
            total = total + penalty.lam / 2 * d @ whole @ d
            continue
        for age, center, f in zip(ages, centers, curvatures, strict=True):
            d = theta - (center if penalty.mode == "separate" else centers[-1])
            f = age * (f + penalty.damping * f.mean())  # separate memories stay whole: gamma is 1
            total = total + penalty.lam / 2 * (f * d.square()).sum()
    return total


def after_tasks(form, **options):
    """Three tasks, remembered batch by batch, and the penalty written out from whole ones."""
    model, history = mixed(), []
    opt = optimizer(FORMS[form], model, **options)
    for k in range(3):
        scatter(model, k)
        x, y = torch.randn(9, 1, 3, 3).double(), torch.arange(9) % 3
        opt.consolidate(list(zip(x.split((3, 1, 5)), y.split((3, 1, 5)), strict=True)))
        history.append(looked_at(model, x, y, opt.penalty))
    scatter(model, 9)
    return opt, partial(written_out, opt.penalty, history)


def gradients(opt):
    return [opt.penalty.gradient(p, opt.state[p]["penalty"]) for p in opt.model.parameters()]


def slopes(model, formula):
    own = {k: p.detach().clone().requires_grad_() for k, p in model.named_parameters()}
    return torch.autograd.grad(formula(own), list(own.values()))


def pulled(opt, formula):
    """Both sides of ``(theta - t) / eta = penalty'(t)`` after a step ``t`` without a gradient."""
    before, group = weights(opt.model), opt.param_groups[0]
    for p in opt.model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()
    eta = group["lr"] * group["lr_scale"] / (1 - group["momentum"])
    ways = [(b - p) / eta for p, b in zip(weights(opt.model), before, strict=True)]
    return ways, slopes(opt.model, formula)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_value_gradient_and_proximal_step_are_those_of_the_penalty_written_out(form, momentum):
    opt, formula = after_tasks(form, lr=0.3, momentum=momentum)
    opt.param_groups[0]["lr_scale"] = 0.5
    for seed in (9, 50, 1):  # the last one is an optimum, not the latest
        scatter(opt.model, seed)
        truth = float(formula(dict(opt.model.named_parameters())).detach())
        assert truth > 1 and float(opt.penalty.loss()) == pytest.approx(truth, rel=SAME)
        assert distance(gradients(opt), slopes(opt.model, formula)) < SAME
    for way, slope in zip(*pulled(opt, formula), strict=True):
        assert float(way.abs().max()) > 1e-3 and distance([way], [slope]) < SAME


# --- where it ends up ----------------------------------------------------------------------------

NUDGE = 0.05  # one layer's estimate is the gradient over 1 + beta, exactly
MODES = {
    "backprop": ({"mode": "backprop"}, 1.0),
    "ep": ({"beta": NUDGE, "settler": mep.Sweep(30, tol=1e-13)}, 1 / (1 + NUDGE)),
}


def landed(penalty, steps, mode="backprop", **options):
    """Distance from the minimum of loss and penalty, by Newton, for a layer: both are quadratic."""
    model, (how, share) = nn.Sequential(nn.Linear(4, 3)).double(), MODES[mode]
    scatter(model, 3)
    x, y, first, nothing = (torch.randn(20, n).double() for n in (4, 3, 4, 3))
    opt = optimizer(penalty, model, cost="mse", momentum=0.0, **how)
    opt.param_groups[0].update(options)
    opt.consolidate([(first, nothing)])
    history = [looked_at(model, first, nothing, penalty, "mse")]

    def objective(z):
        own = {"0.weight": z[:12].view(3, 4), "0.bias": z[12:]}
        loss = 0.5 * (x @ own["0.weight"].T + own["0.bias"] - y).square().sum() / 20
        return share * loss + written_out(penalty, history, own)

    start = flat(weights(model))
    curvature = torch.autograd.functional.hessian(objective, start)
    slope = torch.autograd.functional.jacobian(objective, start)
    for _ in range(steps):
        opt.step(x=x, target=y)
    way = -torch.linalg.solve(curvature, slope)
    assert way.norm() > 0.1 * start.norm()  # the new task has something to say
    return float((flat(weights(model)) - start - way).norm() / way.norm())


RATES = {"lr": 0.3}, {"lr": 0.1, "momentum": 0.8}, {"lr": 0.1, "momentum": 0.8, "nesterov": True}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rates", RATES, ids=str)
@pytest.mark.parametrize("penalty", [EWC(0.7, every=1), EWC(0.7, "diagonal")], ids=str)
def test_lands_on_the_minimum_of_loss_and_penalty(penalty, rates, mode):
    assert landed(penalty, 300, mode, **rates) < SAME


def test_rare_pulls_land_beside_it_by_the_learning_rate():
    off = [landed(EWC(0.7, every=4), round(80 / lr), lr=lr) for lr in (0.2, 0.1, 0.05)]
    orders = [math.log2(a / b) for a, b in pairwise(off)]
    assert all(0.8 < order < 1.2 for order in orders), off
    assert 1e-4 < off[0] < 4 * 0.2  # every times lr


RULES = [mep.Muon(), mep.Dion(), mep.Natural(), mep.Normalised(), mep.Sign(), mep.TopK(0.5)]


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("rule", [*RULES, mep.ErrorFeedback(mep.Sign())], ids=repr)
def test_rule_without_effective_step_gets_both_gradients(monkeypatch, rule, name):
    opt = run(RUNS[name], 1, 1, update=mep.Route(rule), momentum=0.0, **LIMIT)
    scatter(opt.model, 1)
    of_penalty, seen = dict(zip(opt.model.parameters(), gradients(opt), strict=True)), {}
    spy = lambda rule, own, g, *_: seen.update(zip(own, g, strict=True))  # noqa: E731
    monkeypatch.setattr(type(rule), "step", spy)
    backward(opt.model, task(1))
    train(opt, 1, task(1))
    assert list(seen) == [p for p in of_penalty if p.dim() == 2]
    for p, g in seen.items():
        assert of_penalty[p].norm() > 1e-3 * p.grad.norm()
        assert distance([g], [p.grad + of_penalty[p]]) < SAME


@pytest.mark.parametrize("update", [None, mep.Route(mep.Normalised())], ids=["SGD", "Normalised"])
def test_intelligence_is_its_formula(update):
    """By hand, over three tasks: gradients of the loss alone, ways with all that moves a weight."""
    opt = optimizer(SI(0.7, xi=0.2), lr=0.6, weight_decay=0.01, update=update, **LIMIT)
    parameters, total, least = list(opt.model.parameters()), [0] * 6, 0.0
    for k in range(3):
        start, paths = weights(opt.model), [0] * 6
        for _ in range(6):
            loss = nn.functional.cross_entropy(opt.model(task(k)[0]), task(k)[1])
            slope, before = torch.autograd.grad(loss, parameters), weights(opt.model)
            train(opt, 1, task(k))
            moved = zip(paths, slope, weights(opt.model), before, strict=True)
            paths = [path - g * (new - old) for path, g, new, old in moved]
        least = min(least, float(flat(paths).min()))
        opt.consolidate()
        center = weights(opt.model)
        every = zip(total, paths, center, start, strict=True)
        total = [t + o.clamp(min=0) / ((new - old) ** 2 + 0.2) for t, o, new, old in every]
        memories = [opt.state[p]["penalty"] for p in parameters]
        assert distance([m["curvature"] for m in memories], total) < SAME
        assert identical([m["center"] for m in memories], center)
    assert least < -1e-3  # what has made the loss grow counts as nothing
    scatter(opt.model, 1)

    def formula(own):
        every = zip(total, own.values(), center, strict=True)
        return 0.7 * sum((o * (t - c) ** 2).sum() for o, t, c in every)

    truth = float(formula(dict(opt.model.named_parameters())).detach())
    assert float(opt.penalty.loss()) == pytest.approx(truth, rel=SAME)
    opt.param_groups[0].update(momentum=0.0, weight_decay=0.0)
    assert update or distance(*pulled(opt, formula)) < SAME


# --- the same, however it is reached -------------------------------------------------------------


SWEPT = {"settler": mep.Sweep(1), "beta": mep.AutoBeta(0.01), "lr": 0.05}
NORMALISED, ON_THE_WAY = SWEPT | {"update": mep.Route(mep.Normalised())}, {"blockwise": True}
TWICE = {
    "backprop": (LIMIT, {"mode": "backprop"}, 1e-12),  # rounding of a few sums
    "on the way": (SWEPT, SWEPT | ON_THE_WAY, SAME_RULE),
    "on the way, normalised": (NORMALISED, NORMALISED | ON_THE_WAY, SAME_RULE),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("way", TWICE)
def test_other_ways_to_take_the_same_steps(way, name):
    *both, tolerance = TWICE[way]
    first, second = (run(RUNS[name], **options) for options in both)
    assert apart(first, second) < tolerance and second.unsettled == 0


def test_feedback_that_learns_goes_where_the_penalty_pulls_its_weight():
    """Kolen-Pollack: the difference of two matrices that take the same steps only decays."""
    found = []
    for penalty in (None, EWC(30.0, every=1)):
        opt = run(penalty, settler=mep.Sweep(feedback="kolen-pollack"), weight_decay=0.02)
        matrices = [p for p in opt.model.parameters() if "feedback" in opt.state[p]]
        found.append([p.detach() - opt.state[p]["feedback"] for p in matrices])
    assert flat(found[1]).norm() < (1 + SAME_RULE) * flat(found[0]).norm()


def test_ewc_lambda_stands_for_ewc():
    assert apart(run(EWC(2.0)), run(None, ewc_lambda=2.0)) == 0


@pytest.mark.parametrize("penalty", [EWC(0.0), EWC(0.0, "diagonal"), SI(0.0)], ids=str)
def test_no_strength_is_no_penalty_to_the_last_bit(penalty):
    opt = run(penalty)
    assert apart(opt, run(None)) == 0 == opt.penalty.loss()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("curvature", ["kronecker", "diagonal"])
def test_far_too_strong_a_penalty_holds_the_weights(curvature, momentum, dtype):
    ways = {}
    for lam in (0.0, 1e5, 3e38):  # a hundred is a useful strength; the last of 8 steps is a pull
        opt = run(EWC(lam, curvature), 1, 8, model=network(dtype), momentum=momentum)
        center = [opt.state[p]["penalty"]["center"] for p in opt.model.parameters()]
        ways[lam] = distance(weights(opt.model), center)
        assert math.isfinite(float(opt.penalty.loss()))
    assert ways[0.0] > 0.05 > 10 * ways[1e5] and ways[3e38] < 1e-6  # rounding of float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("lr", [0.0, 1e-30])
@pytest.mark.parametrize("curvature", ["kronecker", "diagonal"])
def test_pull_of_no_length_moves_nothing(curvature, lr, dtype):
    """What rounding moves would grow from pull to pull where bases are not quite orthogonal."""
    opt = optimizer(EWC(1.0, curvature, every=1), network(dtype), lr=lr, mode="backprop")
    opt.consolidate([task(0, dtype)])
    scatter(opt.model, 1)
    before = weights(opt.model)
    train(opt, 100, task(0, dtype))
    assert distance(weights(opt.model), before) == 0


def through(way, opt):
    if way != "file":
        return copy.deepcopy(opt) if way == "deepcopy" else pickle.loads(pickle.dumps(opt))
    other, file = run(opt.penalty, model=network(seed=9)), io.BytesIO()
    torch.save({"model": opt.model.state_dict(), "opt": opt.state_dict()}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other.model.load_state_dict(saved["model"])
    other.load_state_dict(saved["opt"])
    return other


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("way", ["file", "deepcopy", "pickle"])
def test_run_continues_to_the_last_bit(way, name):
    opt = run(RUNS[name])
    other, before = through(way, opt), opt.penalty.loss()
    assert other.penalty.loss() == before > 0
    for each in (other, opt):
        assert opt.penalty.loss() == before  # each follows its own parameters
        train(each, 5, task(4))
        end(each, task(4))
        train(each, 6, task(5))
        assert each.penalty.loss() != before
    assert apart(other, opt) == 0 and other.penalty.loss() == opt.penalty.loss()


KRONECKER, DIAGONAL = partial(EWC, 3.0, every=2), partial(EWC, 30.0, "diagonal")
OPTIONS = {
    "lam": (KRONECKER(), EWC(4.0, every=2)),
    "curvature": (KRONECKER(), EWC(3.0, "diagonal")),
    "mode": (DIAGONAL(), DIAGONAL(mode="online")),
    "gamma": (DIAGONAL(mode="online"), DIAGONAL(mode="online", gamma=0.5)),
    "damping": (KRONECKER(), KRONECKER(damping=0.1)),
    "fisher": (KRONECKER(), KRONECKER(fisher="empirical")),
    "samples": (KRONECKER(), KRONECKER(samples=3)),
    "every": (KRONECKER(), KRONECKER(every=3)),
    "xi": (SI(1.0), SI(1.0, xi=0.2)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_alone_changes_the_result(name):
    assert apart(*map(run, OPTIONS[name])) > 1e-4


WRONG = [
    (lambda: SI(1.0, xi=0.0), r"xi=...\)` must be a finite number > 0, got 0.0"),
    (lambda: optimizer("ewc"), "`penalty` must be a penalty such as .* got 'ewc'"),
    (lambda: optimizer(EWC(1.0), ewc_lambda=1.0), "give one of the two"),
    (lambda: optimizer(EWC(1.0), memory_budget="4MB"), "`memory_budget` and `penalty=EWC.* excl"),
    (lambda: copy.deepcopy(optimizer(EWC(1.0)).penalty).loss(), "no optimizer uses this penalty"),
    (lambda: optimizer(None).consolidate([]), "there is no penalty to consolidate"),
    (lambda: mep.EPOptimizer(network().parameters(), ewc_lambda=1.0).consolidate([]), "needs EPO"),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=[row[1] for row in WRONG])
def test_nonsense_is_refused(make, message):
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        make()
