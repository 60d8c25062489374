"""The estimator: order of accuracy, the limit, accumulation, options, warnings."""

import math
import warnings

import pytest
import torch
from problems import (
    CLASSES,
    COSTS,
    DEVICES,
    DTYPES,
    ENERGIES,
    EXACT,
    MODELS,
    STENCILS,
    backprop,
    distance,
    estimated,
    linear_problem,
    problem,
    tanh_problem,
)
from torch import nn

import mep
from mep.contrast.strength import check_beta, strength_of

# Leading order alone, at c = 0.2 against 0.1: the next term is smaller by a factor near c^p.
OBSERVED = 0.15
# Rounding of the limit in float32: depth times a few roundings of 6e-8.
SINGLE = 1e-5
# A finite nudge at c = 0.05 is off by a few per cent of the gradient.
NUDGED = 0.15
# In eight bits many units of a pooling window tie, and a nudge may pass the lead to another.
COARSE = 0.3

TIGHT = mep.Sweep(max_sweeps=200, tol=1e-12)


# --- accuracy ------------------------------------------------------------------------------------


def accuracy_problem(depth):
    return tanh_problem([6] + [10] * (depth - 1) + [CLASSES], batch=4, gain=1.0, seed=3)


@pytest.mark.parametrize("depth", [3, 20])
@pytest.mark.parametrize("name", sorted(STENCILS))
@pytest.mark.parametrize("cost", COSTS)
def test_observed_order_of_accuracy(name, depth, cost):
    stencil, order = STENCILS[name]
    at = accuracy_problem(depth)
    truth = backprop(at, cost)
    errors = []
    for c in (0.2, 0.1):
        grads, found = estimated(
            at, cost=cost, beta=mep.AutoBeta(c), stencil=stencil, settler=TIGHT
        )
        assert found.converged
        errors.append(distance(grads, truth))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=OBSERVED)


@pytest.mark.parametrize("name", sorted(STENCILS))
@pytest.mark.parametrize("beta", [1.0, 0.03])
def test_stencil_moments(name, beta):
    """sum w = 0, sum w beta = 1, and exact for polynomials up to its order."""
    stencil, order = STENCILS[name]
    nodes = stencil(beta)
    assert max(abs(b) for b, _ in nodes) == pytest.approx(beta)

    def moment(k):
        return sum(w * b**k for b, w in nodes)

    size = sum(abs(w) for _, w in nodes)
    assert moment(0) == pytest.approx(0, abs=EXACT * size)
    assert moment(1) == pytest.approx(1, abs=EXACT)
    for k in range(2, order + 1):
        assert moment(k) == pytest.approx(0, abs=EXACT)
    assert abs(moment(order + 1)) > 0.01 * beta**order


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("method", ["analytic", "autograd"])
def test_limit_is_backprop(name, cost, method):
    at = problem(name)
    truth = backprop(at, cost)
    grads, found = estimated(at, cost=cost, settler=mep.Limit(), gradient_method=method)
    assert found.status == "limit" and found.sweeps == 0
    assert distance(grads, truth) < EXACT


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_limit_is_backprop_in_float32(name, device):
    at = problem(name, dtype=torch.float32, device=device)
    grads, _ = estimated(at, settler=mep.Limit(), stencil=mep.centered, beta=0.3)
    assert distance(grads, backprop(at)) < SINGLE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_estimate_in_every_dtype(name, dtype, device):
    at = problem(name, dtype=dtype, device=device)
    grads, found = estimated(at)
    assert found.converged
    assert {g.dtype for g in grads} == {dtype} and found.residual.dtype == dtype
    exact = problem(name, device=device)
    exact.model.load_state_dict(at.model.state_dict())
    exact.x = at.x.double() if at.x.is_floating_point() else at.x
    allowed = COARSE if dtype == torch.bfloat16 else NUDGED
    assert distance(grads, backprop(exact)) < allowed


@pytest.mark.parametrize(
    ("name", "stencil", "energy"),
    [
        *[(name, "one_sided", energy) for name in sorted(MODELS) for energy in ("squared", "kl")],
        *[("mlp", stencil, energy) for stencil in sorted(STENCILS) for energy in sorted(ENERGIES)],
    ],
)
def test_finite_nudge_comes_close_to_backprop(name, stencil, energy):
    at = problem(name)
    grads, found = estimated(
        at,
        # The divergence is softer than the squared error (curvature p / T^2): a tenth goes as far.
        beta=mep.AutoBeta(0.05 if energy == "squared" else 0.005),
        stencil=STENCILS[stencil][0],
        energy=ENERGIES[energy],
        settler=mep.Sweep(10, 1e-4),
    )
    assert found.converged
    assert EXACT < distance(grads, backprop(at)) < NUDGED


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("energy", ["squared", "kl"])
def test_gradient_methods_agree(name, energy):
    at = problem(name)
    both = [
        estimated(at, gradient_method=method, energy=ENERGIES[energy], settler=mep.Sweep(4, None))
        for method in ("analytic", "autograd")
    ]
    assert distance(both[0][0], both[1][0]) < 100 * EXACT  # five evaluations deep
    kinds = [{b.kind for b in mep.trace(at.model, gradient_method=m)} for m in METHODS]
    assert kinds[1] == {"local autograd"}


METHODS = ("analytic", "autograd")


@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_outputs_with_positions(shape):
    """``(B, C, positions)``: averaged over positions, as torch does."""

    class Channels(nn.Module):
        def forward(self, x):
            return x.movedim(-1, 1)

    torch.manual_seed(0)
    at = problem("mlp")
    at.model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), Channels()).double()
    at.x = torch.randn(3, *shape, 3, dtype=torch.float64)
    at.y = torch.randint(0, 4, (3, *shape))
    grads, found = estimated(at, settler=mep.Limit())
    assert found.residual.shape == (3,)
    assert distance(grads, backprop(at)) < EXACT


# --- what is added to .grad ----------------------------------------------------------------------


def test_estimate_accumulates():
    at = problem("functional")
    once, _ = estimated(at)
    mep.estimate(at.model, at.x, at.y)
    mep.estimate(at.model, at.x, at.y)
    twice = [p.grad for p in at.model.parameters()]
    assert distance(twice, [2 * g for g in once]) < EXACT


def test_accumulating_does_not_write_into_a_gradient_of_the_caller():
    at = problem("mlp")
    mep.estimate(at.model, at.x, at.y)
    first = [p.grad for p in at.model.parameters()]
    shares = {g.untyped_storage().data_ptr() for g in first}
    assert len(shares) == len(first)
    assert not shares & {p.untyped_storage().data_ptr() for p in at.model.parameters()}


@pytest.mark.parametrize("weight", [0.25, -3.0])
def test_weight_multiplies(weight):
    at = problem("mlp")
    plain, _ = estimated(at)
    weighted, _ = estimated(at, weight=weight)
    assert distance(weighted, [weight * g for g in plain]) < EXACT


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"batch norm"}))
@pytest.mark.parametrize("settler", [mep.Sweep(4, None), mep.Limit()], ids=str)
def test_unequal_micro_batches_add_up(name, settler):
    """At a fixed beta: the automatic one is a figure of the batch."""
    at = problem(name)
    whole, _ = estimated(at, beta=0.01, settler=settler)
    for part in (slice(0, 1), slice(1, 3)):
        share = len(at.y[part]) / len(at.y)
        mep.estimate(at.model, at.x[part], at.y[part], beta=0.01, settler=settler, weight=share)
    parts = [p.grad for p in at.model.parameters()]
    assert distance(parts, whole) < EXACT


@pytest.mark.parametrize("name", sorted(MODELS))
def test_doubled_batch_gives_the_same_gradient(name):
    """Means for parameters. Batch statistics, too, are those of the single batch."""
    at = problem(name)
    once, found = estimated(at)
    at.x, at.y = torch.cat([at.x, at.x]), torch.cat([at.y, at.y])
    twice, doubled = estimated(at)
    assert doubled.beta == pytest.approx(found.beta, rel=EXACT)
    assert distance(twice, once) < 100 * EXACT


@pytest.mark.parametrize("name", sorted(MODELS))
def test_frozen_parameters_get_no_gradient(name):
    at = problem(name)
    full, _ = estimated(at)
    parameters = list(at.model.parameters())
    for p in parameters[::2]:
        p.requires_grad_(False)
    mep.estimate(at.model, at.x, at.y)
    assert all(p.grad is None for p in parameters[::2])
    assert distance([p.grad for p in parameters[1::2]], full[1::2]) < EXACT


def test_estimate_reports_the_loss_and_leaves_no_graph():
    at = problem("mlp")
    grads, found = estimated(at)
    loss = nn.functional.cross_entropy(at.model(at.x), at.y)
    assert found.loss.shape == () and not found.loss.requires_grad
    assert float(found.loss) == pytest.approx(loss.item(), rel=EXACT)
    assert not any(g.requires_grad for g in grads)


def test_estimate_works_under_no_grad_and_inference_data():
    at = problem("residual")
    truth, _ = estimated(at)
    with torch.no_grad():
        found, _ = estimated(at)
    assert distance(found, truth) < EXACT


@pytest.mark.parametrize("strongest", ["first", "last"])
def test_estimate_reports_the_worst_phase(strongest):
    at = tanh_problem([5, 6, 6, 4])
    options = {"beta": 0.3, "settler": mep.Sweep(50, 1e-4)}

    def nodes(beta):
        w = 1 / (0.99 * beta)
        both = ((beta, w), (beta / 100, -w))
        return both if strongest == "first" else both[::-1]

    settled = [
        mep.settle(at.model, at.x, at.y, **options | {"beta": beta}) for beta in (0.3, 0.003)
    ]
    _, found = estimated(at, stencil=nodes, **options)
    assert torch.equal(found.residual, torch.maximum(*[s.residual for s in settled]))
    assert not any(torch.equal(found.residual, s.residual) for s in settled[1:])
    assert found.sweeps == settled[0].steps > settled[1].steps


def test_beta_of_an_estimate_is_the_largest_node():
    at = problem("mlp")
    for stencil, _ in STENCILS.values():
        assert estimated(at, stencil=stencil, beta=0.07)[1].beta == 0.07


# --- nudging strength ----------------------------------------------------------------------------


def test_automatic_strength_is_c_over_the_gain():
    assert strength_of(mep.AutoBeta(0.4), lambda: 8.0) == 0.05
    assert strength_of(0.3, lambda: 8.0) == 0.3
    assert check_beta("auto") == mep.AutoBeta() == mep.AutoBeta(c=0.05)
    assert check_beta(1) == 1.0 and check_beta(mep.AutoBeta(0.1)) == mep.AutoBeta(0.1)


@pytest.mark.parametrize("c", [0.0, -0.1, math.inf, math.nan])
def test_bad_c(c):
    with pytest.raises(ValueError, match=r"AutoBeta\(c=\.\.\.\)"):
        mep.AutoBeta(c)


BAD_BETAS = [
    (0, ValueError),
    (-0.5, ValueError),
    (math.inf, ValueError),
    (math.nan, ValueError),
    ("small", ValueError),
    (None, TypeError),
    (True, TypeError),
    ([0.5], TypeError),
]


@pytest.mark.parametrize(("beta", "kind"), BAD_BETAS)
def test_bad_beta(beta, kind):
    with pytest.raises(kind, match="`beta`"):
        check_beta(beta)
    at = problem("mlp")
    with pytest.raises(kind, match="`beta`"):
        mep.estimate(at.model, at.x, at.y, beta=beta)


BAD_OPTIONS = [
    ({"settler": "sweep"}, TypeError, "`settler`"),
    ({"settler": mep.Sweep}, TypeError, "`settler`"),
    ({"stencil": "centered"}, TypeError, "`stencil`"),
    ({"stencil": mep.random_sign}, TypeError, r"random_sign\(\)"),
    ({"stencil": lambda beta: ((0.0, 0.0), (beta, 1.0))}, ValueError, "sum w = 0"),
    ({"energy": "kl"}, TypeError, "`energy`"),
    ({"energy": mep.KL()}, TypeError, "`energy`"),
    ({"gradient_method": "magic"}, ValueError, "`gradient_method`"),
    ({"cost": "hinge"}, ValueError, "`cost`"),
]


@pytest.mark.parametrize(("options", "kind", "reason"), BAD_OPTIONS)
def test_bad_option_is_named(options, kind, reason):
    at = problem("mlp")
    with pytest.raises(kind, match=reason):
        mep.estimate(at.model, at.x, at.y, **options)
    assert all(p.grad is None for p in at.model.parameters())


CHANGING = [
    {"cost": "mse"},
    {"beta": 0.2},
    {"beta": mep.AutoBeta(0.3)},
    {"settler": mep.Sweep(1, None)},
    {"settler": mep.GradientDescent(60)},
    {"stencil": mep.centered},
    {"stencil": mep.five_point},
    {"energy": mep.PredictionError(output=mep.KL())},
    {"weight": 0.5},
]


@pytest.mark.parametrize("options", CHANGING, ids=range(len(CHANGING)))
def test_every_option_changes_the_gradient(options):
    at = tanh_problem([5, 6, 6, 4])
    base = {"settler": mep.Sweep(10, 1e-9)}
    assert distance(estimated(at, **base | options)[0], estimated(at, **base)[0]) > 1e-7


def test_temperature_changes_the_gradient():
    at = tanh_problem([5, 6, 4])
    grads = [
        estimated(at, energy=mep.PredictionError(output=mep.KL(temperature=t)))[0]
        for t in (1.0, 1.7)
    ]
    assert distance(*grads) > 1e-4


# --- warnings ------------------------------------------------------------------------------------


def test_silent_layers_are_named_with_the_remedy():
    at = tanh_problem([5] + [6] * 12 + [4])
    with pytest.warns(UserWarning, match=r"layers get no signal.*mep\.Sweep\(\).*beta='auto'"):
        grads, _ = estimated(at, settler=mep.GradientDescent(4))
    assert not grads[0].any() and grads[-1].any()


def test_no_warning_where_every_layer_hears():
    at = tanh_problem([5] + [6] * 3 + [4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for settler in (mep.GradientDescent(10), mep.Sweep(), mep.Anderson(), mep.Limit()):
            grads, _ = estimated(at, settler=settler)
            assert all(g.any() for g in grads)


def test_sweep_reaches_every_layer():
    at = tanh_problem([5] + [6] * 30 + [4], gain=1.0)
    grads, found = estimated(at)
    assert found.converged and all(g.any() for g in grads)


def test_divergence_under_a_number_names_auto():
    at = linear_problem()  # sweeps of a linear chain grow by beta kappa each
    mep.init.orthogonal_(at.model, 1.5)
    with pytest.warns(UserWarning, match=r"beta=90\.0 .*beta='auto' and settler=mep\.Sweep\(\)"):
        grads, found = estimated(at, cost="mse", beta=90, settler=mep.Sweep(300, None))
    assert found.status == "diverged" and grads == [None] * len(grads)
