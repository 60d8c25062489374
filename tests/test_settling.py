"""Settling: known equilibria, displacements, residuals, statuses, and what every option does."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    CLASSES,
    ENERGIES,
    SOLVERS,
    distance,
    linear_equilibrium,
    linear_problem,
    problem,
    scalar_equilibrium,
    scalar_problem,
    tanh_mlp,
    tanh_problem,
)
from torch import nn

import mep

# What a force leaves of uncertainty in the states: the condition of the small chains here.
CONDITION = 1e3
# Settled to a residual of 1e-13, times that condition.
SETTLED = 1e-10
# Forces formed as sums of states in place of displacements: states of size 1 under a nudge of
# 1e-2 lose two digits.
RECOMPUTED = 1e-9


def equal_states(ours, truth, tolerance=SETTLED):
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("beta", [0.05, 0.3])
def test_linear_chain_reaches_the_solution_of_its_linear_system(solver, beta):
    at = linear_problem()
    found = mep.settle(at.model, at.x, at.y, cost="mse", beta=beta, settler=SOLVERS[solver])
    assert found.converged
    equal_states(found.states, linear_equilibrium(at, beta))


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=5), seed=st.integers(0, 50))
def test_linear_chains_of_any_shape(sizes, seed):
    at = linear_problem(tuple(sizes), batch=2, seed=seed)
    found = mep.settle(
        at.model, at.x, at.y, cost="mse", beta=mep.AutoBeta(0.1), settler=SOLVERS["sweep"]
    )
    beta = 0.1 / gain_of(at, "mse")
    equal_states(found.states, linear_equilibrium(at, beta))


def gain_of(at, cost):
    how = mep.contrast.settings(cost=cost)
    with torch.no_grad():
        return mep.contrast.free_phase(at.model, at.x, at.y, how).gain


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("weights", [(0.8, 0.9), (-1.1, 0.6), (0.5, -1.2)])
def test_scalar_chain_reaches_the_root(solver, weights):
    at = scalar_problem(weights)
    found = mep.settle(at.model, at.x, at.y, cost="mse", beta=0.3, settler=SOLVERS[solver])
    truth = scalar_equilibrium(at, 0.3)
    assert [s.item() for s in found.states] == pytest.approx(truth, abs=SETTLED)


def assert_same_equilibrium(one, other):
    """Up to what the worst sample has left, and up to a common shift of all logits.

    The divergence does not see the shift, so its equilibria are free to differ by one.
    """
    allowed = CONDITION * max(float(r.residual.max()) for r in (one, other))
    assert allowed < 1e-4
    for a, b in zip(one.displacements[:-1], other.displacements[:-1], strict=True):
        assert distance([a], [b]) < allowed
    ends = [r.displacements[-1] for r in (one, other)]
    assert distance(*[[d - d.mean(1, keepdim=True)] for d in ends]) < allowed


@pytest.mark.parametrize("energy", sorted(ENERGIES))
def test_all_solvers_end_in_one_equilibrium(energy):
    at = tanh_problem([5, 6, 5, CLASSES])
    found = {
        name: mep.settle(at.model, at.x, at.y, beta=0.1, energy=ENERGIES[energy], settler=solver)
        for name, solver in SOLVERS.items()
    }
    assert {r.status for r in found.values()} == {"converged"}
    truth = found.pop("sweep")
    for other in found.values():
        assert_same_equilibrium(other, truth)


@pytest.mark.parametrize("name", ["residual", "attention", "layer norm", "embedding"])
def test_sweep_and_descent_agree_on_local_blocks(name):
    at = problem(name)
    sweep, descent = (
        mep.settle(at.model, at.x, at.y, beta=0.05, settler=SOLVERS[solver])
        for solver in ("sweep", "gradient descent")
    )
    assert sweep.converged and descent.converged
    assert_same_equilibrium(descent, sweep)


# --- displacement form ---------------------------------------------------------------------------


def confident_chain(depth, width):
    """An isometric tanh chain that classifies most of its batch well."""
    torch.manual_seed(0)
    model = tanh_mlp([16] + [width] * (depth - 1) + [CLASSES], gain=1.0)
    x = 0.5 * torch.randn(16, 16)
    with torch.no_grad():
        output = mep.free_states(model, x)[-1]
        model[-1].weight.mul_(12 / output.abs().amax(1).median())
    output = mep.free_states(model, x)[-1]
    confident = torch.softmax(output, 1).amax(1) > 0.99
    return model, x, output.argmax(1), confident


@pytest.mark.parametrize(("depth", "width"), [(1000, 16), (10_000, 8)])
def test_float32_moves_well_classified_samples_as_far_as_float64(depth, width):
    """As sums of states, these displacements come out near 0 (design, section 2)."""
    model, x, y, confident = confident_chain(depth, width)
    assert int(confident.sum()) >= 4
    sweep = mep.Sweep(max_sweeps=1, tol=None)
    narrow = mep.settle(model, x, y, settler=sweep).displacements[-1].double()
    wide = mep.settle(model.double(), x.double(), y, settler=sweep).displacements[-1]
    share = (narrow * wide).sum(1) / wide.square().sum(1)
    assert share[confident].min() >= 0.9
    assert share.max() <= 1.1


def test_states_are_free_states_plus_displacements():
    at = problem("mlp")
    found = mep.settle(at.model, at.x, at.y)
    free = mep.free_states(at.model, at.x)
    parts = zip(found.states, free, found.displacements, strict=True)
    assert all(torch.equal(s, f + d) for s, f, d in parts)


# --- nudging strength ----------------------------------------------------------------------------


def deep_problem(depth, width, gain=1.0, scale=1.0):
    torch.manual_seed(0)
    model = tanh_mlp([784] + [width] * (depth - 1) + [10], gain).double()
    x = scale * torch.randn(64, 784, dtype=torch.float64)
    return model, x, torch.randint(0, 10, (64,))


@pytest.mark.parametrize(("depth", "width"), [(10, 128), (100, 128), (1000, 64)])
def test_automatic_strength_settles_in_a_few_sweeps_at_any_depth(depth, width):
    at = deep_problem(depth, width)
    found = mep.settle(*at, settler=mep.Sweep(max_sweeps=3, tol=None))
    assert found.history[1] < 1e-2
    assert found.history[3] < 1e-4


@pytest.mark.parametrize(("gain", "scale"), [(1.3, 0.01), (1.6, 1.0)])
def test_strength_by_gain_settles_where_strength_by_depth_does_not(gain, scale):
    """Where a chain amplifies, kappa exceeds its depth, and c / L is too strong by their ratio."""
    at = deep_problem(30, 128, gain, scale)
    automatic = mep.settle(*at, settler=mep.Sweep(max_sweeps=3, tol=None))
    by_depth = mep.settle(*at, beta=0.05 / 30, settler=mep.Sweep(max_sweeps=10, tol=None))
    assert automatic.history[2] < 2e-3
    assert min(by_depth.history) > 0.1


def test_strength_by_depth_is_only_slower_where_tanh_saturates():
    """The gain 1.3 alone does not break c / L: at inputs of size 1 saturation eats the gain."""
    at = deep_problem(30, 128, 1.3)
    sweep = mep.Sweep(max_sweeps=6, tol=None)
    automatic = mep.settle(*at, settler=sweep).history
    by_depth = mep.settle(*at, beta=0.05 / 30, settler=sweep).history
    assert automatic[-1] < by_depth[-1] < 1e-2


# --- residual ------------------------------------------------------------------------------------


@pytest.mark.parametrize("energy", sorted(ENERGIES))
@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
@pytest.mark.parametrize(
    "solver",
    [mep.Sweep(1, tol=None), mep.Anderson(2, tol=None), mep.GradientDescent(7)],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize("name", ["mlp", "residual"])
def test_residual_is_the_force_over_the_nudge(name, solver, cost, energy):
    at, beta = problem(name), 0.1
    options = {"cost": cost, "energy": ENERGIES[energy]}
    found = mep.settle(at.model, at.x, at.y, beta=beta, settler=solver, **options)
    forces = [
        mep.state_gradients(at.model, at.x, found.states, at.y, beta=b, **options)
        for b in (beta, 0.0)
    ]
    nudge = (forces[0][-1] - forces[1][-1]).norm(dim=1)
    size = torch.stack([f.flatten(1).norm(dim=1) for f in forces[0]]).norm(dim=0)
    torch.testing.assert_close(found.residual, size / nudge, rtol=RECOMPUTED, atol=RECOMPUTED)
    assert found.residual.min() > 1e-6  # something is left to be compared


def test_figures_of_a_residual():
    at = tanh_problem([5, 6, CLASSES], batch=40)
    found = mep.settle(at.model, at.x, at.y, settler=mep.Sweep(1, tol=None))
    r, nudge = found.residual, found.balance.nudge
    assert r.shape == nudge.shape == (40,)
    assert found.median == float(r.median())
    assert found.q95 == pytest.approx(float(r.sort().values[37:39].mean()), rel=0.1)
    truth = ((r * nudge).square().sum() / nudge.square().sum()).sqrt()
    assert found.aggregate == pytest.approx(float(truth), rel=1e-12)
    assert found.history == [1.0, found.median]


@pytest.mark.parametrize("solver", [mep.Sweep(), mep.Anderson(), mep.GradientDescent(tol=1e-2)])
def test_nothing_to_learn_is_an_equilibrium(solver):
    at = problem("mlp")
    target = at.model(at.x).detach()
    found = mep.settle(at.model, at.x, target, cost="mse", settler=solver)
    assert found.converged and not found.residual.any()
    assert not any(d.any() for d in found.displacements)


@pytest.mark.parametrize("solver", [mep.Sweep(), mep.Anderson()])
def test_samples_without_a_nudge_do_not_hide_the_others(solver):
    """A median of 0 before the first sweep must not end the settling of the rest."""
    at = tanh_problem([4, 6, CLASSES], batch=5)
    target = at.model(at.x).detach()
    target[0] += 1.0
    found = mep.settle(at.model, at.x, target, cost="mse", settler=solver)
    moved = found.displacements[0].norm(dim=1) > 0
    assert moved.tolist() == [True, False, False, False, False]
    assert found.residual[0] < 0.1


# --- solvers' options ----------------------------------------------------------------------------


def test_anderson_needs_fewer_sweeps():
    at = tanh_problem([8] + [16] * 9 + [10], batch=16, gain=1.0)
    steps = [
        mep.settle(at.model, at.x, at.y, beta=mep.AutoBeta(0.5), settler=solver(100, 1e-8))
        for solver in (mep.Sweep, mep.Anderson)
    ]
    assert all(found.converged for found in steps)
    assert steps[1].steps < steps[0].steps


def test_anderson_without_memory_is_the_sweep():
    at = tanh_problem([5, 6, 6, CLASSES])
    plain = mep.settle(at.model, at.x, at.y, settler=mep.Sweep(4, tol=None))
    mixed = mep.settle(at.model, at.x, at.y, settler=mep.Anderson(4, tol=None, memory=1))
    assert distance(mixed.displacements, plain.displacements) < SETTLED


OPTIONS = [
    (mep.Sweep(2, tol=None), mep.Sweep(3, tol=None)),
    (mep.Sweep(9, tol=1e-2), mep.Sweep(9, tol=1e-6)),
    (mep.Sweep(9, tol=1e-2), mep.Sweep(9, tol=None)),
    (mep.Anderson(3, tol=None), mep.Anderson(4, tol=None)),
    (mep.Anderson(9, tol=1e-2), mep.Anderson(9, tol=1e-6)),
    (mep.Anderson(5, tol=None, memory=2), mep.Anderson(5, tol=None, memory=4)),
    (mep.Anderson(5, tol=None, damping=1.0), mep.Anderson(5, tol=None, damping=0.7)),
    (mep.GradientDescent(8), mep.GradientDescent(9)),
    (mep.GradientDescent(8, lr=0.2), mep.GradientDescent(8, lr=0.1)),
    (mep.GradientDescent(8, momentum=0.5), mep.GradientDescent(8, momentum=0.4)),
    (mep.GradientDescent(99, tol=None), mep.GradientDescent(99, tol=1e-1)),
]


@pytest.mark.parametrize(("one", "other"), OPTIONS, ids=str)
def test_every_option_changes_the_result(one, other):
    at = tanh_problem([5, 6, 6, CLASSES])
    results = [
        mep.settle(at.model, at.x, at.y, beta=mep.AutoBeta(0.5), settler=solver)
        for solver in (one, other)
    ]
    assert distance(results[0].displacements, results[1].displacements) > 1e-9


@pytest.mark.parametrize("patience", [1, 3, 6])
def test_patience_ends_a_settling_that_gets_no_better(patience):
    at = tanh_problem([5, 6, 6, CLASSES])
    # Unstable: the residual rises from the first step on.
    solver = mep.GradientDescent(50, lr=1.2, momentum=0.9, tol=1e-9, patience=patience)
    found = mep.settle(at.model, at.x, at.y, beta=0.1, settler=solver)
    best = min(range(len(found.history)), key=found.history.__getitem__)
    assert found.steps - best == patience < 50


def test_history_counts_the_steps():
    at = tanh_problem([5, 6, CLASSES])
    for solver in (mep.Sweep(4, tol=None), mep.Anderson(4, tol=None), mep.GradientDescent(4)):
        found = mep.settle(at.model, at.x, at.y, settler=solver)
        assert found.steps == 4 and len(found.history) == 5 and found.history[0] == 1.0


def test_tolerance_stops_at_the_first_median_below():
    at = tanh_problem([5, 6, 6, CLASSES])
    found = mep.settle(at.model, at.x, at.y, settler=mep.Sweep(50, tol=1e-6))
    assert found.history[-1] <= 1e-6 < found.history[-2]


# --- statuses ------------------------------------------------------------------------------------

STATUSES = [
    (mep.Sweep(), "auto", "converged"),
    (mep.Sweep(1, tol=1e-9), "auto", "not settled"),
    (mep.GradientDescent(2), "auto", "not settled"),
    (mep.GradientDescent(200, lr=30.0), "auto", "diverged"),
    (mep.Limit(), "auto", "limit"),
]


@pytest.mark.parametrize(("solver", "beta", "status"), STATUSES, ids=str)
def test_status(solver, beta, status):
    at = tanh_problem([5, 6, 6, CLASSES])
    found = mep.settle(at.model, at.x, at.y, beta=beta, settler=solver)
    assert found.status == status
    assert found.converged == (status == "converged")


def test_limit_moves_nothing():
    at = problem("mlp")
    found = mep.settle(at.model, at.x, at.y, settler=mep.Limit())
    assert found.steps == 0 and not any(d.any() for d in found.displacements)


@pytest.mark.parametrize("stencil", [mep.one_sided, mep.centered])
def test_divergence_is_a_status_and_leaves_gradients_alone(stencil):
    at = problem("batch norm")
    buffers = [b.clone() for b in at.model.buffers()]
    at.model[0].weight.grad = kept = torch.ones_like(at.model[0].weight)
    settler = mep.GradientDescent(400, lr=50.0)
    with pytest.warns(UserWarning, match="no gradient was written"):
        found = mep.estimate(at.model, at.x, at.y, settler=settler, stencil=stencil)
    assert found.status == "diverged" and not found.converged
    assert not math.isfinite(found.median)
    assert torch.equal(kept, torch.ones_like(kept)) and at.model[0].weight.grad is kept
    assert at.model[-1].weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(buffers, at.model.buffers(), strict=True))


def test_overflow_in_the_gain_is_a_status():
    """kappa = 4^L leaves float32 long before the chain itself does."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(100)])
    mep.init.orthogonal_(model, 2.0)
    x, y = 1e-30 * torch.randn(3, 4), torch.zeros(3, dtype=torch.long)
    with pytest.warns(UserWarning, match="diverged"):
        assert mep.estimate(model, x, y).status == "diverged"
    assert all(p.grad is None for p in model.parameters())


# --- kinks ---------------------------------------------------------------------------------------


def identity_chain(noise):
    torch.manual_seed(1)
    model = mep.models.deep_mlp(10, width=64).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise * torch.randn_like(p))
    return model, torch.randn(64, 784, dtype=torch.float64), torch.randint(0, 10, (64,))


def test_identity_start_settles():
    assert mep.settle(*identity_chain(0.0)).converged


def test_ramps_solved_exactly_come_closer_than_slopes_read_off():
    """Perturbed identity layers hold many units next to their kinks, where slopes flip for ever."""
    at = identity_chain(1e-4)
    exact = mep.settle(*at, settler=mep.Sweep(6, tol=None)).history
    slopes = mep.settle(*at, settler=mep.Anderson(6, tol=None, memory=1)).history
    assert exact[1] == slopes[1]  # the first sweep is the same
    assert max(exact[3:]) < 0.5 * min(slopes[3:])


def test_unit_rests_on_its_kink():
    """s_1 = 0.1 is pulled down by more than 0.1: below 0 nothing pulls, so it rests at 0."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    model = model.double()
    with torch.no_grad():
        model[0].weight.fill_(0.1)
        model[2].weight.fill_(1.0)
    x, target = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), -4.0).double()
    found = mep.settle(model, x, target, cost="mse", beta=0.5, settler=mep.Sweep(60, tol=1e-13))
    # On the kink f_2 = 0, so (1 + beta) s_2 = beta t.
    assert [s.item() for s in found.states] == pytest.approx([0.0, 0.5 * -4 / 1.5], abs=SETTLED)
    assert found.converged


# --- bad arguments -------------------------------------------------------------------------------

BAD_SOLVERS = [
    (mep.Sweep, "max_sweeps", 0),
    (mep.Sweep, "tol", 0.0),
    (mep.Anderson, "max_steps", 0),
    (mep.Anderson, "tol", -1.0),
    (mep.Anderson, "memory", 0),
    (mep.Anderson, "damping", 0.0),
    (mep.Anderson, "damping", 1.1),
    (mep.GradientDescent, "max_steps", 0),
    (mep.GradientDescent, "lr", 0.0),
    (mep.GradientDescent, "momentum", 1.0),
    (mep.GradientDescent, "momentum", -0.1),
    (mep.GradientDescent, "tol", 0.0),
    (mep.GradientDescent, "patience", 0),
]


@pytest.mark.parametrize(("solver", "name", "value"), BAD_SOLVERS)
def test_solver_names_the_bad_option(solver, name, value):
    with pytest.raises(ValueError, match=rf"`{solver.__name__}\({name}=\.\.\.\)`"):
        solver(**{name: value})


@pytest.mark.parametrize("solver", [mep.Sweep, mep.Anderson, mep.GradientDescent, mep.Limit])
def test_solvers_are_frozen_values(solver):
    assert solver() == solver() and hash(solver()) == hash(solver())
    with pytest.raises(AttributeError):
        solver().tol = 0.5


BAD_INPUTS = [
    ([1.0], TypeError, "must be a Tensor"),
    (torch.zeros(0, 6), ValueError, "empty"),
    (torch.zeros(3, 6), TypeError, "dtype"),
    (torch.zeros(3, 6, dtype=torch.long), TypeError, "embedding"),
    (torch.full((3, 6), math.nan).double(), ValueError, "NaN or infinite"),
    (torch.zeros(3, 5).double(), ValueError, "block `0`"),
]


@pytest.mark.parametrize(("x", "kind", "reason"), BAD_INPUTS)
def test_bad_input_is_refused(x, kind, reason):
    at = problem("mlp")
    for call in (mep.settle, mep.estimate):
        with pytest.raises(kind, match=reason):
            call(at.model, x, at.y)
    assert all(p.grad is None for p in at.model.parameters())


def test_half_precision_is_refused():
    at = problem("mlp", dtype=torch.float16)
    with pytest.raises(TypeError, match="bfloat16"):
        mep.settle(at.model, at.x, at.y)
