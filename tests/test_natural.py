"""Natural gradient: against exact Fisher matrices, built entry by entry."""

import math

import pytest
import torch
from problems import linear_problem, problem
from small_training import backward, batch_of, distance, identical, network, train, weights
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import mep
from mep.contrast import free_phase, free_signals, settings
from mep.curvature import Signal, kronecker_factors

# float64 rounding (1e-16) times the conditions of the small systems solved here (up to 1e4).
SAME = 1e-11
PLAIN = {"damping": 0.0, "decay": 0.0, "refresh": 1, "limit": None}
NUMBERS = {"lr": 0.1, "lr_scale": 1.0, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
MODES = {"ep": {"settler": mep.Limit()}, "backprop": {"mode": "backprop"}}


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def optimizer(model, rule, mode="ep", **options):
    return mep.EPOptimizer(model.parameters(), model=model, update=rule, **MODES[mode] | options)


def bare_problem(sizes, seed=0, batch=20):
    """A linear chain without biases and a regression that it does not fit."""
    p = linear_problem(sizes, batch, seed)
    for layer in p.model:
        layer.bias = None
    return p


def sample_gradients(model, x, y):
    """``(B, *parameter)`` by name: gradients of every sample's squared error."""

    def loss(parameters, x, y):
        return 0.5 * (functional_call(model, parameters, (x[None],))[0] - y).square().sum()

    parameters = {k: p.detach() for k, p in model.named_parameters()}
    return vmap(grad(loss), (None, 0, 0))(parameters, x, y)


def exact_fishers(model, x):
    """``E[vec g vec g^T]`` by name, over inputs and ``t ~ N(s, I)``, whose second moments the
    points ``s +- sqrt(n) e_k`` have exactly; ``vec`` is row by row."""
    s = model(x).detach()
    n, found = s.shape[1], {}
    for shift in [sign * math.sqrt(n) * unit for unit in torch.eye(n).to(s) for sign in (1, -1)]:
        for name, g in sample_gradients(model, x, s + shift).items():
            g = g.flatten(1)
            found[name] = found.get(name, 0) + g.T @ g / (len(x) * 2 * n)
    return found


# --- the natural gradient itself -----------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_one_step_on_a_linear_gaussian_problem_is_least_squares(mode):
    p = bare_problem((5, 3))
    opt = optimizer(p.model, mep.Natural(**PLAIN, fisher="true"), mode, lr=1.0, cost="mse")
    opt.step(x=p.x, target=p.y)
    assert distance([p.model[0].weight], [torch.linalg.lstsq(p.x, p.y).solution.T]) < SAME


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", [(5, 3), (4, 2, 3)])  # no narrower above: G must have an inverse
def test_update_is_the_inverse_of_the_exact_fisher_times_the_gradient(sizes, mode):
    """Block by block: of a linear chain's layer the Kronecker product is exact."""
    p = bare_problem(sizes)
    fishers = exact_fishers(p.model, p.x)
    gradients = sample_gradients(p.model, p.x, p.y)
    expected = [
        w.detach() - torch.linalg.solve(fishers[k], gradients[k].mean(0).flatten()).view_as(w)
        for k, w in p.model.named_parameters()
    ]
    opt = optimizer(p.model, mep.Natural(**PLAIN, fisher="true"), mode, lr=1.0, cost="mse")
    opt.step(x=p.x, target=p.y)
    assert distance(list(p.model.parameters()), expected) < SAME


@pytest.mark.parametrize("mode", MODES)
def test_factors_of_a_linear_chain_are_the_exact_fisher(mode):
    p = bare_problem((5, 4, 3, 2))
    fishers, hidden = exact_fishers(p.model, p.x), p.x
    opt = optimizer(p.model, mep.Natural(fisher="true"), mode, lr=0.0, cost="mse")
    opt.step(x=p.x, target=p.y)
    for layer, (name, w) in zip(p.model, p.model.named_parameters(), strict=True):
        a, g = (opt.state[w][f"{which}_factor"] for which in ("activity", "error"))
        assert distance([a], [hidden.T @ hidden / len(hidden)]) < SAME
        assert distance([torch.kron(g, a)], [fishers[name]]) < SAME
        hidden = layer(hidden).detach()


CONVS = [{}, {"padding": 1}, {"stride": 2, "padding": 1}, {"dilation": 2}]


@pytest.mark.parametrize("options", CONVS, ids=str)
def test_factors_of_a_convolution_are_those_of_grosse_and_martens(options):
    """``A = E sum_t a_t a_t^T`` and ``G = 1/T E sum_t e_t e_t^T``, patch by patch."""
    conv = nn.Conv2d(2, 3, (3, 2), **options).double()
    x, labels = randn(4, 2, 7, 6), torch.tensor([0, 1, 2, 0])
    columns = conv(x).flatten(1).shape[1]
    model = nn.Sequential(conv, nn.Flatten(), nn.Linear(columns, 3).double())
    out = conv(x).detach().requires_grad_()
    loss = F.cross_entropy(model[2](out.flatten(1)), labels, reduction="sum")
    (error,) = torch.autograd.grad(loss, out)
    stride, step = options.get("stride", 1), options.get("dilation", 1)
    padded, a, g = F.pad(x, (options.get("padding", 0),) * 4), 0, 0
    places = out[0, 0].numel()
    for n in range(len(x)):
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                rows = slice(i * stride, i * stride + 2 * step + 1, step)
                cols = slice(j * stride, j * stride + step + 1, step)
                patch, e = padded[n, :, rows, cols].flatten(), error[n, :, i, j]
                a = a + torch.outer(patch, patch) / len(x)
                g = g + torch.outer(e, e) / (len(x) * places)
    opt = optimizer(model, mep.Route(mep.Natural()), lr=0.0)
    opt.step(x=x, target=labels)
    state = opt.state[conv.weight]
    assert distance([state["activity_factor"], state["error_factor"]], [a, g]) < SAME


# --- local blocks --------------------------------------------------------------------------------


class InPlace(nn.Module):
    """A skip around layers whose ReLU writes over the first one's output."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 5))

    def forward(self, x):
        return x + self.body(x)


def check_rows(model, x, target, inner):
    """Rows of a block's inner weights against every sample's own gradient."""

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    parameters = {k: p.detach() for k, p in model.named_parameters()}
    truth = vmap(grad(loss), (None, 0, 0))(parameters, x, target)
    with torch.no_grad():
        found = free_signals(free_phase(model, x, target, settings()), "empirical")
    for name in inner:
        (signal,) = found[id(model.get_parameter(name))]
        a, e = signal.rows()
        assert truth[name].abs().max() > 1e-3
        assert distance([-torch.einsum("bo,bi->boi", e, a)], [truth[name]]) < SAME


def test_rows_inside_a_residual_block_are_per_sample_gradients():
    p = problem("residual")
    inner = [f"{block}.{layer}.weight" for block in ("one", "two") for layer in ("first", "second")]
    check_rows(p.model, p.x, p.y, ["enter.weight", *inner, "leave.weight"])


def test_rows_of_a_layer_whose_output_is_written_over():
    torch.manual_seed(0)
    model = nn.Sequential(InPlace(), nn.Tanh(), nn.Linear(5, 3)).double()
    check_rows(model, randn(4, 5), torch.tensor([0, 1, 2, 1]), ["0.body.0.weight"])


def test_learns_a_residual_net():
    p = problem("residual")
    opt = optimizer(p.model, mep.Route(mep.Natural(refresh=1)), settler=None, lr=0.3)
    first = opt.step(x=p.x, target=p.y)
    for _ in range(30):
        last = opt.step(x=p.x, target=p.y)
    assert last < 0.5 * first
    assert "activity_factor" in opt.state[p.model.one.first.weight]


@pytest.mark.parametrize("mode", MODES)
def test_weight_without_local_signal_is_refused_by_name(mode):
    p = problem("attention")
    opt = optimizer(p.model, mep.Route(mep.Natural()), mode)
    before = weights(p.model)
    with pytest.raises(
        ValueError,
        match=r"`Natural` needs the local signal of `attention\.attend\.in_proj_weight`, which is "
        r"no Linear or Conv2d of its own: use another rule",
    ):
        opt.step(x=p.x, target=p.y)
    assert identical(weights(p.model), before)


def test_frozen_weight_stays_and_the_others_learn():
    model = network()
    model[2].weight.requires_grad_(False)
    before = weights(model)
    train(optimizer(model, mep.Route(mep.Natural())), 2, batch_of())
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [True, True, False, True, True, True]


# --- the formulas, on made-up signals ------------------------------------------------------------


def signal(out=3, inputs=4, seed=0, samples=12):
    parameter = nn.Parameter(torch.ones(out, inputs, dtype=torch.float64))
    a, e = randn(samples, inputs, seed=seed), randn(samples, out, seed=seed + 50)
    return Signal(parameter, 1 / samples, samples, lambda: e.T @ a / samples, lambda: (a, e))


def observed(rule, *signals):
    state = {}
    for each in signals:
        rule.observe([each], state)
    return state


def damped(factor, d):
    n = len(factor)
    return factor + math.sqrt(d) * factor.trace() / n * torch.eye(n, dtype=torch.float64)


def predicted(step, state):
    """``<d, G d A>`` of a weight's change, with the rule's own damping."""
    a, g = damped(state["activity_factor"], 0.3), damped(state["error_factor"], 0.3)
    return float((step * (g @ step @ a)).sum())


def test_factors_are_a_running_average():
    signals = [signal(seed=k) for k in range(3)]
    state = observed(mep.Natural(decay=0.7), *signals)
    (a0, g0), (a1, g1), (a2, g2) = (kronecker_factors([s]) for s in signals)
    for name, f in {"activity": (a0, a1, a2), "error": (g0, g1, g2)}.items():
        truth = 0.7 * (0.7 * f[0] + 0.3 * f[1]) + 0.3 * f[2]
        assert distance([state[f"{name}_factor"]], [truth]) < SAME


@pytest.mark.parametrize("d", [0.0, 0.01, 0.3, 10.0])
def test_damping_is_relative_to_the_mean_curvature(d):
    state = observed(mep.Natural(damping=d), signal())
    for name, factor in zip(("activity", "error"), kronecker_factors([signal()]), strict=True):
        truth = torch.linalg.inv(damped(factor, d))
        size = state[f"{name}_factor"].diagonal().mean()  # which is kept apart
        assert distance([state[f"{name}_inverse"] / size], [truth]) < SAME


@pytest.mark.parametrize("seed", range(40))
def test_singular_factor_without_damping_takes_the_pseudo_inverse(seed):
    """Where rounding makes a pivot positive, too: directions never seen stay as they are."""
    inputs = 2 + seed % 18
    samples = 1 + (7 * seed) % (inputs - 1)
    one = signal(inputs=inputs, seed=seed, samples=samples)
    state = observed(mep.Natural(damping=0.0), one)
    inverse = state["activity_inverse"] / state["activity_factor"].diagonal().mean()
    a = one.rows()[0]
    # the condition of the matrices above is below 1e6, and rounding 1e-16
    projected = a @ inverse @ a.T / samples
    assert distance([projected], [torch.eye(samples, dtype=torch.float64)]) < 1e-8


def run(rule, numbers=NUMBERS, steps=3, changing=True):
    """Steps of two parameters from ones, by changing gradients."""
    signals = [signal(), signal(2, 5, seed=1)]
    states = [observed(rule, each) for each in signals]
    parameters = [each.parameter.detach() for each in signals]
    gradients = [
        [randn(*p.shape, seed=10 * changing * k + i + 3) for i, p in enumerate(parameters)]
        for k in range(steps)
    ]
    for each in gradients:
        rule.step(parameters, [g.clone() for g in each], states, numbers)
    return parameters, states, gradients


@pytest.mark.parametrize("limit", [None, 1e-3, 1e-1])
def test_step_is_its_formula(limit):
    rule = mep.Natural(limit=limit)
    numbers = NUMBERS | {"lr_scale": 0.5, "momentum": 0.9, "weight_decay": 0.2}
    parameters, states, gradients = run(rule, numbers, steps=4)
    theta = [torch.ones_like(p) for p in parameters]
    momenta = [torch.zeros_like(p) for p in parameters]
    for each in gradients:
        natural = [
            torch.linalg.inv(damped(s["error_factor"], 0.3))
            @ g
            @ torch.linalg.inv(damped(s["activity_factor"], 0.3))
            for g, s in zip(each, states, strict=True)
        ]
        change = (0.05 / 0.1) ** 2 * sum((g * n).sum() for g, n in zip(each, natural, strict=True))
        trust = 1.0 if limit is None else min(1.0, math.sqrt(limit / change))
        momenta = [0.9 * m + trust * n for m, n in zip(momenta, natural, strict=True)]
        theta = [(1 - 0.05 * 0.2) * t - 0.05 * m for t, m in zip(theta, momenta, strict=True)]
    assert distance(parameters, theta) < SAME
    assert distance([s["momentum_buffer"] for s in states], momenta) < SAME


@pytest.mark.parametrize("changing", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_predicted_change_is_never_above_the_limit(momentum, changing):
    rule, numbers = mep.Natural(limit=1e-3), NUMBERS | {"momentum": momentum, "lr": 3.0}
    changes = []
    for steps in (1, 2, 5, 60):
        _, states, _ = run(rule, numbers, steps, changing)
        changes.append(sum(predicted(3.0 * s["momentum_buffer"], s) for s in states))
    assert max(changes) <= 1e-3 * (1 + 1e-9)
    if not changing:  # momentum that has gathered reaches it: the limit is no looser than stated
        assert changes[-1] > 0.95e-3


# --- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", [1, 3])
def test_signals_are_looked_at_every_few_steps(monkeypatch, refresh):
    seen, original = [], mep.Natural.observe
    monkeypatch.setattr(mep.Natural, "observe", lambda *a: seen.append(a) or original(*a))
    model = network()
    opt, counts = optimizer(model, mep.Route(mep.Natural(refresh=refresh))), []
    for _ in range(7):
        train(opt, 1, batch_of())
        counts.append(len(seen))
    assert counts == [3 * (k // refresh + 1) for k in range(7)]  # three matrices


@pytest.mark.parametrize("options", [{}, {"blockwise": True, "settler": mep.Sweep(1)}], ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_limit_holds_for_what_steps_together(grouped, options):
    """For a parameter group; block by block, for the block (which has one matrix here)."""
    model = network()
    groups = mep.param_groups(model, 10.0, depth_scale=False) if grouped else model.parameters()
    rule = mep.Route(mep.Natural(limit=1e-2))
    opt = mep.EPOptimizer(groups, model=model, lr=10.0, update=rule, **options)
    before = {id(p): p.detach().clone() for p in model.parameters()}
    train(opt, 1, batch_of())
    changes = [
        [
            predicted(p.detach() - before[id(p)], opt.state[p])
            for p in group["params"]
            if p.dim() > 1
        ]
        for group in opt.param_groups
    ]
    if options:
        assert all(change == pytest.approx(1e-2) for group in changes for change in group)
    else:
        assert [sum(group) for group in changes] == pytest.approx([1e-2] * len(changes))


OPTIONS = {
    "damping": ({"damping": 0.1}, {}),
    "decay": ({"decay": 0.5}, {}),
    "refresh": ({"refresh": 1}, {}),
    "fisher": ({"fisher": "true"}, {}),
    "limit": ({"limit": 1e-4}, {}),
    "lr": ({}, {"lr": 0.02}),
    "momentum": ({}, {"momentum": 0.5}),
    "weight_decay": ({}, {"weight_decay": 0.1}),
}
BASE = {"damping": 0.3, "decay": 0.95, "refresh": 2, "fisher": "empirical", "limit": None}


def matrices_after(rule_options, options):
    model = network()
    rule = mep.Route(mep.Natural(**BASE | rule_options))
    opt = optimizer(model, rule, **{"lr": 0.01} | options)
    for k in range(4):
        train(opt, 1, batch_of(seed=k))
    return weights(model)[::2]


@pytest.mark.parametrize("name", OPTIONS)
def test_option_alone_changes_the_result(name):
    assert distance(matrices_after(*OPTIONS[name]), matrices_after({}, {})) > 1e-5


BAD = {
    "damping": [-1.0, math.nan, math.inf],
    "decay": [-0.1, 1.0, math.nan],
    "refresh": [0, -1, 2.5],
    "fisher": ["exact", None],
    "limit": [0.0, -1.0, math.nan],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, values in BAD.items() for v in values])
def test_option_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"`Natural\({name}=...\)` must be .*, got "):
        mep.Natural(**{name: value})


def test_nesterov_is_refused():
    """Nothing is accepted and ignored."""
    with pytest.raises(ValueError, match="`nesterov` must be False with Natural"):
        mep.EPOptimizer(
            network().parameters(), update=mep.Route(mep.Natural()), momentum=0.9, nesterov=True
        )


def test_factors_that_overflow_poison_nothing():
    """Loss and gradients of the batch are finite in float32, squares of its activity are not."""
    model = nn.Sequential(nn.Linear(4, 3))
    opt = optimizer(model, mep.Route(mep.Natural(refresh=1)), lr=1e-3)
    opt.step(x=torch.full((8, 4), 1e20), target=torch.zeros(8, dtype=torch.long))
    opt.step(x=torch.ones(8, 4), target=torch.ones(8, dtype=torch.long))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(opt.state[model[0].weight]["activity_inverse"]).all()


@pytest.mark.parametrize("steps_before", [0, 1])
def test_grad_carries_no_local_signals_and_is_refused(steps_before):
    """Not only where a look at the signals is due."""
    model = network()
    opt = optimizer(model, mep.Route(mep.Natural()))
    for _ in range(steps_before):
        train(opt, 1, batch_of())
    before = weights(model)
    backward(model, batch_of())
    with pytest.raises(ValueError, match=r"needs local signals, which `.grad` does not carry.*x=."):
        opt.step()
    assert identical(weights(model), before)


def test_saved_run_continues_bitwise(tmp_path):
    def start(seed):
        model = network(seed=seed)
        rule = mep.Route(mep.Natural(refresh=2))
        return model, optimizer(model, rule, lr=0.05, momentum=0.9, weight_decay=0.01)

    (model, opt), (other, other_opt) = start(0), start(9)
    train(opt, 3, batch_of())
    train(other_opt, 2, batch_of())
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["opt"])
    for each in (opt, other_opt):  # over the next refresh
        train(each, 4, batch_of())
    assert identical(weights(other), weights(model))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert opt.state[p].keys() == other_opt.state[q].keys()
