"""Symmetric couplings: forces, contrasts, solvers and estimators against autograd and algebra."""

import copy
import dataclasses
import itertools
import math
import pickle
import warnings

import pytest
import torch
from problems import EXACT
from torch import nn

import mep
from mep.couplings import Couplings, couplings_of
from mep.energies import (
    Relaxation,
    States,
    contraction,
    cost_of,
    displaced,
    forward_start,
    settled_states,
)
from mep.models import (
    EquilibriumNet,
    LoopedMLP,
    Scale,
    hopfield_cnn,
    hopfield_mlp,
    hopfield_resnet13,
)

# All samples settled to the last digit, not just half of them below a tolerance: a round takes off
# a quarter at least, so that 0.75^150 < 1e-18 of the first residual is left.
DEEP = mep.FixedPoint(max_steps=150, tol=None)


def clip():
    return nn.Hardtanh(-0.5, 1)


def conv(pool, activation=nn.Tanh, **options):
    return EquilibriumNet(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), activation(), pool, nn.Conv2d(3, 4, 3, stride=2),
            activation(), nn.Flatten(), nn.Linear(4, 3),
        ),
        **options,
    )  # fmt: skip


def dense(activation, **options):
    return hopfield_mlp(32, (7, 6), 3, activation, **options)


# Name: how it is made, and the cost. Inputs are (B, 2, 4, 4); two hidden layers or one that loops.
NETS = {
    "clipped": (lambda: dense(clip), "mse"),
    "clipped, conjugate": (lambda: dense(clip, potential="conjugate"), "mse"),
    "clipped, read out": (lambda: dense(clip, readout=True), "cross_entropy"),
    "tanh": (lambda: dense(nn.Tanh, potential="conjugate"), "mse"),
    "tanh, square": (lambda: dense(nn.Tanh, potential="square"), "mse"),
    "sigmoid, cross-entropy": (lambda: dense(nn.Sigmoid, potential="conjugate"), "cross_entropy"),
    "sigmoid, square": (
        lambda: dense(nn.Sigmoid, potential="square", readout=True),
        "cross_entropy",
    ),
    "tanh, read out": (
        lambda: dense(nn.Tanh, potential="conjugate", readout=True),
        "cross_entropy",
    ),
    "looped": (lambda: LoopedMLP(32, 6, 3), "cross_entropy"),
    "conv, average": (
        lambda: conv(nn.AvgPool2d(2, 1), potential="conjugate"),
        "mse",
    ),
    "conv, a factor": (lambda: conv(Scale(-1.3), potential="conjugate"), "mse"),
    "residual": (
        lambda: EquilibriumNet(
            nn.Sequential(
                nn.Conv2d(2, 3, 3, padding=1),
                nn.Tanh(),
                nn.Conv2d(3, 3, 3, padding=1),
                nn.Tanh(),
                nn.Flatten(),
                nn.Linear(48, 3),
            ),
            skips={(1, 2): 0.4},
        ),
        "mse",
    ),
    "conv, max": (lambda: conv(nn.MaxPool2d(2, 1), clip, readout=True), "cross_entropy"),
}
SMOOTH = [name for name in NETS if "clipped" not in name and "max" not in name]
AT_REST = [name for name in SMOOTH if "square" not in name]


def net_of(name, scale=0.7):
    torch.manual_seed(3)
    model = NETS[name][0]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)  # so that every net contracts
    model.settler = DEEP
    return model


def batch(samples=4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(samples) % 3


def random_states(model, x):
    generator = torch.Generator().manual_seed(2)
    shapes = [s.shape for s in forward_start(model.couplings(), x).states]
    return [torch.randn(shape, generator=generator, dtype=x.dtype) for shape in shapes]


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def estimated(model, x, y, **options):
    model.zero_grad()
    found = mep.estimate(model, x, y, **options)
    return gradients(model), found


def by_backprop(model, x, y, cost, backward="recurrent"):
    model.backward = backward
    model.zero_grad()
    cost_of(cost).mean(model(x), y).backward()
    return gradients(model)


def distance(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", NETS)
def test_forces_are_those_of_autograd_at_random_states(name):
    model, (x, y) = net_of(name), batch()
    states, cost = random_states(model, x), NETS[name][1]
    ours, theirs = (
        mep.state_gradients(model, x, states, y, beta=0.3, cost=cost, method=method)
        for method in ("analytic", "autograd")
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)
    assert min(float(f.abs().max()) for f in ours) > 0.01


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("stencil", [mep.one_sided, mep.centered], ids=["one-sided", "centered"])
def test_the_contrast_is_the_gradient_of_the_energy_difference(name, stencil):
    model, (x, y) = net_of(name), batch()
    how = {"cost": NETS[name][1], "beta": 0.2, "stencil": stencil, "settler": solver_of(name, 60)}
    closed, _ = estimated(model, x, y, **how)
    reference, _ = estimated(model, x, y, gradient_method="autograd", **how)
    torch.testing.assert_close(closed, reference, rtol=1e-11, atol=1e-11)


def solver_of(name, steps):
    """Square potentials of smooth units come to rest by gradient descent only."""
    if "square" in name:
        return mep.GradientDescent(max_steps=steps, lr=0.3, momentum=0.5)
    return mep.FixedPoint(max_steps=steps, tol=None)


@pytest.mark.parametrize("name", AT_REST)
def test_a_centered_estimate_is_the_gradient_through_the_settled_dynamics(name):
    model, (x, y) = net_of(name), batch()
    cost = NETS[name][1]
    truth = by_backprop(model, x, y, cost, "through time")
    found, report = estimated(model, x, y, cost=cost, beta=1e-4, stencil=mep.centered, settler=DEEP)
    assert report.converged and float(report.residual.max()) < 1e-8  # 1e-13 of the states
    # The stencil's own error is beta^2 times third derivatives of order one.
    assert distance(found, truth) < 1e-6


@pytest.mark.parametrize("name", AT_REST)
def test_recurrent_backprop_is_backprop_through_time(name):
    model, (x, y) = net_of(name), batch()
    cost = NETS[name][1]
    # The equilibrium is known to 1e-14, and both linear systems are solved as far.
    ours = by_backprop(model, x, y, cost)
    assert distance(ours, by_backprop(model, x, y, cost, "through time")) < 1e-10


@pytest.mark.parametrize("name", ["tanh", "looped", "conv, average"])
@pytest.mark.parametrize(
    ("stencil", "order"), [(mep.one_sided, 1), (mep.centered, 2), (mep.five_point, 4)]
)
def test_observed_order_of_accuracy(name, stencil, order):
    model, (x, y) = net_of(name), batch()
    cost = NETS[name][1]
    truth = by_backprop(model, x, y, cost)
    betas = (0.2, 0.1)
    errors = [
        distance(estimated(model, x, y, cost=cost, beta=b, stencil=stencil, settler=DEEP)[0], truth)
        for b in betas
    ]
    # An order that higher ones have not yet left behind is off by a tenth or so.
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("name", ["tanh", "looped", "sigmoid, cross-entropy"])
def test_a_holomorphic_estimate_converges_geometrically(name):
    model, (x, y) = net_of(name), batch()
    cost = NETS[name][1]
    truth = by_backprop(model, x, y, cost)
    errors = [
        distance(
            estimated(model, x, y, cost=cost, beta=0.3, stencil=mep.holomorphic(n), settler=DEEP)[
                0
            ],
            truth,
        )
        for n in (2, 4, 6, 8)
    ]
    # Two nodes more take off a factor that does not shrink, until rounding is seen.
    for few, more in itertools.pairwise(errors):
        assert more < max(0.3 * few, 1e-12), errors


def test_two_holomorphic_nodes_are_the_centered_stencil():
    model, (x, y) = net_of("tanh"), batch()
    how = {"cost": "mse", "beta": 0.3, "settler": DEEP}
    ours, _ = estimated(model, x, y, stencil=mep.holomorphic(2), **how)
    theirs, _ = estimated(model, x, y, stencil=mep.centered, **how)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_both_signs_of_a_random_nudge_average_to_the_centered_stencil():
    model, (x, y) = net_of("tanh"), batch()
    how = {"cost": "mse", "beta": 0.1, "settler": DEEP}
    stencil, found = mep.random_sign(torch.Generator().manual_seed(0)), {}
    for _ in range(8):
        gradient, _ = estimated(model, x, y, stencil=lambda b: seen(stencil(b)), **how)
        found[last[0]] = gradient
    assert sorted(found) == [-0.1, 0.1]
    centered, _ = estimated(model, x, y, stencil=mep.centered, **how)
    assert distance((found[0.1] + found[-0.1]) / 2, centered) < 1e-8


last = [0.0]


def seen(nodes):
    last[0] = nodes[1][0]
    return nodes


@pytest.mark.parametrize("name", AT_REST)
@pytest.mark.parametrize(
    "solver",
    [
        mep.FixedPoint(300, None, "synchronous"),
        mep.FixedPoint(150, None, "forward"),
        mep.FixedPoint(150, None, "backward"),
        mep.Anderson(60, None),
        mep.GradientDescent(400, lr=0.3, momentum=0.7),
    ],
    ids=["synchronous", "forward", "backward", "anderson", "descent"],
)
def test_every_solver_ends_in_the_same_equilibrium(name, solver):
    model, (x, y) = net_of(name), batch()
    how = {"cost": NETS[name][1], "beta": 0.3}
    ours = mep.settle(model, x, y, settler=solver, **how)
    reference = mep.settle(model, x, y, settler=DEEP, **how)
    assert ours.converged and reference.converged
    for a, b in zip(ours.states, reference.states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_orders_are_different_iterations():
    model, (x, y) = net_of("tanh"), batch()
    orders = ("alternating", "synchronous", "forward", "backward")
    steps = {
        order: mep.settle(model, x, y, cost="mse", settler=mep.FixedPoint(500, 1e-8, order)).steps
        for order in orders
    }
    # Half of a synchronous round uses what is out of date.
    assert steps["synchronous"] > 1.5 * steps["alternating"]


def test_anderson_takes_fewer_rounds():
    model, (x, y) = net_of("looped", scale=1.6), batch()
    plain, mixed = (
        mep.settle(model, x, y, beta=0.3, settler=s)
        for s in (mep.FixedPoint(500, 1e-9), mep.Anderson(500, 1e-9))
    )
    assert plain.converged and mixed.converged
    assert mixed.steps < plain.steps / 2


def test_a_linear_net_solves_its_linear_system():
    """``s_1 = W_1 x + b_1 + W_2^T s_2``, ``s_2 = W_2 s_1 + b_2 - beta (s_2 - t)`` in the box."""
    torch.manual_seed(0)
    model = hopfield_mlp(3, (4,), 2, lambda: nn.Hardtanh(-100, 100)).double()
    first, second = model.net[1], model.net[3]
    with torch.no_grad():
        second.weight.mul_(0.5)
    x, t, beta = torch.randn(1, 3).double(), torch.randn(1, 2).double(), 0.4
    w = second.weight
    matrix = torch.eye(6).double()
    matrix[:4, 4:], matrix[4:, :4] = -w.T, -w
    matrix[4:, 4:] *= 1 + beta
    right = torch.cat([first(x), second.bias + beta * t], 1)
    wanted = torch.linalg.solve(matrix, right.mT).mT
    found = mep.settle(model, x, t, cost="mse", beta=beta, settler=DEEP)
    torch.testing.assert_close(torch.cat(found.states, 1), wanted, rtol=1e-10, atol=1e-10)


def test_displacements_are_from_the_free_states():
    model, (x, y) = net_of("tanh"), batch()
    found = mep.settle(model, x, y, cost="mse", beta=0.3, settler=DEEP)
    free = settled_states(model.couplings(), x, DEEP).states
    for d, s, s_0 in zip(found.displacements, found.states, free, strict=True):
        torch.testing.assert_close(d, s - s_0, rtol=1e-9, atol=1e-12)


def test_the_input_is_pushed_once_and_a_round_takes_one_product_per_weight_and_way(monkeypatch):
    """What a residual has looked at is what the next round begins with."""
    model, (x, y) = net_of("clipped"), batch()
    counts = {}
    from mep.blocks.layers import Linear

    def counted(method):
        original = getattr(Linear, method)

        def call(self, *args, **options):
            key = method, self.weight.shape[0]
            counts[key] = counts.get(key, 0) + 1
            return original(self, *args, **options)

        monkeypatch.setattr(Linear, method, call)

    counted("apply")
    counted("pull")
    steps = 10
    settler = mep.FixedPoint(steps, None)
    found = mep.settle(model, x, y, cost="mse", beta=0.3, settler=settler)
    assert found.steps == steps
    assert counts["apply", 7] == 1
    # Two phases, each with a start that is looked at; the forward start has pushed once more.
    assert counts["apply", 6] <= 2 * (steps + 1) + 1
    assert counts["pull", 6] <= 2 * (steps + 1)


def test_what_has_not_moved_sends_nothing(monkeypatch):
    """A nudge reaches layer after layer; the products of a chain still at rest are not taken."""
    model, (x, y) = net_of("clipped"), batch()
    free = settled_states(model.couplings(), x, DEEP).configuration
    start, cost = displaced(free), cost_of("mse")
    problem = Relaxation(start, cost, cost.prepare(y, free.output), 0.3, 0.3)
    sent = []
    original = mep.couplings.Interaction.pull

    def pull(self, point, a):
        sent.append((self.source, self.target))
        return original(self, point, a)

    monkeypatch.setattr(mep.couplings.Interaction, "pull", pull)
    at = problem.relax(problem.start(), "alternating")
    assert sent == [] and not at[1].any() and not at[2].any() and at[3].any()
    at = problem.relax(at, "alternating")
    assert sent == [(2, 3), (1, 2)] and at[1].any()


@pytest.mark.parametrize("name", NETS)
def test_a_displaced_unit_is_the_unit_less_its_rest(name):
    """``around(s, I)`` at a rest: activities, rests, slopes and forces are differences."""
    net, generator = net_of(name).couplings(), torch.Generator().manual_seed(5)
    for unit in net.units:
        # Sums of such numbers are exact, and hit the kinks.
        current, change = torch.randint(-128, 129, (2, 200), generator=generator).double() / 64
        s = unit.rest(current) if unit.has_rest else current
        moved, d = unit.around(s, current), unit.kept(s + change) - s
        close = {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(
            moved.activity(d), unit.activity(s + d) - unit.activity(s), **close
        )
        torch.testing.assert_close(moved.slope(d), unit.slope(s + d))
        left = unit.force(s, current) if not unit.has_rest else torch.zeros_like(s)
        inside = unit.slope(s + d) > 0  # a ramp outside its box is at rest there, or is not kept
        wanted = unit.force(s + d, current + change) - left
        torch.testing.assert_close(moved.force(d, change)[inside], wanted[inside], **close)
        if unit.has_rest:
            torch.testing.assert_close(moved.rest(change), unit.rest(current + change) - s, **close)


@pytest.mark.parametrize("name", NETS)
def test_a_displaced_unit_stays_where_nothing_pulls(name):
    """Even where the free phase has left something to settle."""
    net, generator = net_of(name).couplings(), torch.Generator().manual_seed(6)
    for unit in net.units:
        s, current = torch.randn(2, 200, generator=generator, dtype=torch.float64)
        moved = unit.around(unit.kept(s), current)
        nothing = torch.zeros_like(s)
        if unit.has_rest:
            assert not moved.rest(nothing).any()
        else:
            assert not moved.force(nothing, nothing).any()


@pytest.mark.parametrize("name", AT_REST)
@pytest.mark.parametrize("stencil", [mep.one_sided, mep.centered, mep.holomorphic(3)])
def test_no_digit_of_a_small_nudge_is_lost_in_float32(name, stencil):
    model, (x, y) = net_of(name), batch()
    options = {"cost": NETS[name][1], "beta": 1e-6, "stencil": stencil, "settler": DEEP}
    exact, _ = estimated(model, x, y, **options)
    single, _ = estimated(net_of(name).float(), x.float(), y, **options)
    assert distance(single.double(), exact) < 1e-5


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_over_relaxation_shrinks_errors_as_young_says(share):
    """Alternating layers: rounds shrink by ``share``; with the best omega, by ``omega - 1``."""
    torch.manual_seed(0)
    model = hopfield_mlp(3, (5,), 5, lambda: nn.Hardtanh(-100, 100)).double()
    with torch.no_grad():  # symmetric, and the largest eigenvalue the square root of the share
        w = torch.linalg.qr(torch.randn(5, 5).double())[0]
        sizes = torch.linspace(0.1, share**0.5, 5).double()
        model.net[3].weight.copy_(w @ torch.diag(sizes) @ w.T)
    x, omega = torch.randn(1, 3).double(), 2 / (1 + (1 - share) ** 0.5)

    def shrinks(omega, first, last):
        solver = mep.FixedPoint(last, None, omega=omega)
        history = settled_states(model.couplings(), x, solver).history
        return (history[last] / history[first]) ** (1 / (last - first))

    assert shrinks(1.0, 20, 25) == pytest.approx(share, rel=0.01)
    # A double eigenvalue: the error falls like k (omega - 1)^k.
    assert shrinks(omega, 6, 10) == pytest.approx((omega - 1) * (10 / 6) ** (1 / 4), rel=0.1)


def test_under_relaxation_settles_what_flips():
    model = LoopedMLP(4, 3, 2).double()
    with torch.no_grad():
        model.net["recurrent"].weight.copy_(-1.5 * torch.eye(3))
        model.net["recurrent"].bias.zero_()
        model.net["input"].bias.fill_(0.1)
    net, x = model.couplings(), torch.zeros(2, 4).double()
    with pytest.warns(UserWarning, match="not reached"):
        assert not settled_states(net, x, mep.FixedPoint(100, 1e-8)).converged
    assert settled_states(net, x, mep.FixedPoint(100, 1e-8, omega=0.6)).converged


def test_settling_does_not_report_what_it_has_not_reached():
    model, (x, y) = net_of("clipped"), batch()
    with pytest.warns(UserWarning, match="it contracts, give it more than 1 steps"):
        found = mep.estimate(model, x, y, cost="mse", beta=0.2, settler=mep.FixedPoint(1, 1e-6))
    assert found.status in ("not settled", "diverged") and not found.converged
    assert found.median > 1e-6


def test_a_net_that_does_not_contract_is_told_so_once():
    model, (x, y) = net_of("looped"), batch()
    with torch.no_grad():  # h = tanh(-3 h + ...) goes to and fro
        model.net["recurrent"].weight.copy_(-3 * torch.eye(6))
    advice = "spectral radius 3 .*SpectralNorm"
    with pytest.warns(UserWarning, match=advice):
        found = mep.estimate(model, x, y, beta=0.2, settler=mep.FixedPoint(50, 1e-3))
    assert not found.converged
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mep.estimate(model, x, y, beta=0.2, settler=mep.FixedPoint(50, 1e-3))
    assert not any("SpectralNorm" in str(w.message) for w in caught)
    with pytest.warns(UserWarning, match="equilibrium was not reached"):
        mep.free_states(model, x)
    with torch.no_grad():
        model.net["recurrent"].weight.div_(-4)
    assert mep.estimate(model, x, y, beta=0.2, settler=mep.FixedPoint(50, 1e-3)).converged


def test_a_free_phase_that_has_not_settled_is_the_status_of_the_estimate():
    """Though its nudged phase, taken on from there, may look settled."""
    model, (x, y) = net_of("tanh"), batch()
    settler = mep.FixedPoint(max_steps=3, tol=1e-3)
    with pytest.warns(UserWarning, match="has not settled"):
        found = mep.estimate(model, x, y, cost="mse", beta=0.01, settler=settler)
    assert found.median > 1e-3 and not found.converged


@pytest.mark.parametrize("name", ["looped", "tanh"])
def test_the_spectral_radius_is_that_of_the_jacobian(name):
    model, (x, _) = net_of(name), batch(1)
    net = model.couplings()
    at = settled_states(net, x, DEEP).configuration
    problem = Relaxation(at, None, None, 0.0, 1.0)
    sizes = [s.numel() for s in at.states]

    def rounded(flat):
        parts = [part.view_as(s) for part, s in zip(flat.split(sizes), at.states, strict=True)]
        moved = problem.relax(States(net, x, parts), "synchronous").states
        return torch.cat([s.flatten() for s in moved])

    flat = torch.cat([s.flatten() for s in at.states])
    jacobian = torch.autograd.functional.jacobian(rounded, flat)
    wanted = float(torch.linalg.eigvals(jacobian).abs().max())
    # Thirty rounds of power iteration, and differences of half the digits.
    assert contraction(problem, at, "synchronous") == pytest.approx(wanted, rel=0.05)


def test_only_the_symmetric_part_of_a_lateral_weight_acts():
    model, (x, y) = net_of("looped"), batch()
    before = mep.free_states(model, x)[0]
    estimated(model, x, y, beta=0.1, settler=DEEP)
    weight = model.net["recurrent"].weight
    torch.testing.assert_close(weight.grad, weight.grad.T, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        weight += torch.triu(torch.ones(6, 6).double()) - torch.tril(torch.ones(6, 6).double())
    torch.testing.assert_close(mep.free_states(model, x)[0], before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("hidden", "count"), [(64, 8_970), (1024, 1_126_410)])
def test_sizes_of_the_looped_net(hidden, count):
    model = LoopedMLP(64, hidden, 10)
    assert sum(p.numel() for p in model.parameters()) == count
    weight = model.net["recurrent"].weight
    assert torch.equal(weight, weight.T)


def test_the_looped_net_is_a_fixed_point_of_its_equation():
    model, (x, _) = net_of("looped"), batch()
    part = model.net
    h = torch.tanh(settled_states(model.couplings(), x, DEEP).states[0])
    s = (part["recurrent"].weight + part["recurrent"].weight.T) / 2
    wanted = torch.tanh(part["input"](x.flatten(1)) + h @ s + part["recurrent"].bias / 2)
    torch.testing.assert_close(h, wanted, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model(x), part["output"](h), rtol=1e-9, atol=1e-9)


def test_free_states_of_units_without_a_closed_rest_come_downhill():
    model, (x, y) = net_of("tanh, square"), batch()
    states = mep.free_states(model, x)
    forces = mep.state_gradients(model, x, states, y, beta=0.0, cost="mse")
    force = torch.cat(forces, 1).norm(dim=1) / torch.cat(states, 1).norm(dim=1)
    assert float(force.median()) <= 1e-6


def settings_of(name):
    return {"cost": NETS[name][1], "beta": 0.2, "stencil": mep.centered}


def test_the_optimizer_takes_the_step_of_the_estimate():
    x, y = batch()
    ours, theirs = net_of("clipped"), net_of("clipped")
    how = settings_of("clipped")
    opt = mep.EPOptimizer(ours.parameters(), model=ours, lr=0.1, momentum=0.9, **how)
    sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        opt.step(x=x, target=y)
        sgd.zero_grad()
        mep.estimate(theirs, x, y, **how)
        sgd.step()
    assert opt.last.converged
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_optimizer_can_be_copied_and_saved():
    x, y = batch()
    model = net_of("looped")
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.1, momentum=0.9, beta=0.2)
    opt.step(x=x, target=y)
    twin, twin_model = copy.deepcopy((opt, model))
    read, read_model = pickle.loads(pickle.dumps((opt, model)))
    for o in (opt, twin, read):
        o.step(x=x, target=y)
    for other in (twin_model, read_model):
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def test_it_learns():
    data = mep.data.load("digits")
    torch.manual_seed(0)
    model = hopfield_mlp(64, (64,), 10)
    opt = mep.EPOptimizer(
        model.parameters(), model=model, lr=0.05, momentum=0.9, cost="mse", beta=0.2,
        stencil=mep.centered,
    )  # fmt: skip
    for epoch in range(3):
        order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(epoch))
        for part in order.split(32):
            opt.step(x=data.x_train[part], target=data.y_train[part])
    with torch.no_grad():
        right = (model(data.x_test).argmax(1) == data.y_test).double().mean()
    assert right > 0.9 and opt.skipped == 0


def test_backprop_mode_differentiates_the_equilibrium():
    x, y = batch()
    model = net_of("tanh")
    opt = mep.EPOptimizer(model.parameters(), model=model, mode="backprop", lr=0.1, cost="mse")
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(x=x, target=y)
    step = torch.cat([(b - p).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    with torch.no_grad():
        for p, b in zip(model.parameters(), before, strict=True):
            p.copy_(b)
    truth = by_backprop(model, x, y, "mse", "through time")
    assert distance(step.detach() / 0.1, truth) < 1e-8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"settler": mep.Sweep()}, "does not settle mep.Hopfield"),
        (lambda: {"settler": mep.Limit()}, "does not settle mep.Hopfield"),
        (lambda: {"blockwise": True}, "energy=mep.PredictionError"),
        (lambda: {"memory_budget": "4MB"}, "energy=mep.PredictionError"),
        (lambda: {"update": mep.Route(mep.Natural())}, "reads curvature"),
    ],
)
def test_what_symmetric_couplings_cannot_do_is_refused(make, message):
    model, options = net_of("clipped"), make()
    with pytest.raises(ValueError, match=message):
        mep.EPOptimizer(model.parameters(), model=model, lr=0.1, cost="mse", **options)


def test_curvature_of_a_task_is_refused():
    model, (x, y) = net_of("clipped"), batch()
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.1, cost="mse", penalty=mep.EWC(1.0))
    with pytest.raises(ValueError, match="curvature is read off"):
        opt.consolidate([(x, y)])


def test_complex_nudges_are_refused_where_nothing_is_analytic():
    model, (x, y) = net_of("clipped"), batch()
    how = {"cost": "mse", "beta": 0.1, "stencil": mep.holomorphic(4)}
    with pytest.raises(ValueError, match="analytic units"):
        mep.estimate(model, x, y, **how)
    with pytest.raises(ValueError, match="analytic units"):
        mep.estimate(net_of("tanh"), x, y, gradient_method="autograd", **how)
    with pytest.raises(ValueError, match="complex nodes needs an energy"):
        mep.estimate(nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).double(), x, y, **how)


def test_fixed_points_of_predictions_are_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"does not settle mep\.PredictionError"):
        mep.estimate(model, torch.ones(2, 4), torch.tensor([0, 1]), settler=mep.FixedPoint())


def test_plain_nets_and_unbounded_units_are_refused():
    plain = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(mep.TraceError, match="EquilibriumNet"):
        mep.free_states(plain, torch.ones(2, 4), energy=mep.Hopfield())
    with pytest.raises(mep.TraceError, match=r"(?s)ReLU.*bounded activation"):
        EquilibriumNet(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    with pytest.raises(mep.TraceError, match="no plain Linear or Conv2d"):
        EquilibriumNet(nn.Sequential(nn.Embedding(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    with pytest.raises(mep.TraceError, match="layer of states below"):
        EquilibriumNet(nn.Sequential(nn.Linear(4, 3)), readout=True)
    with pytest.raises(ValueError, match="`potential` must be"):
        couplings_of(mep.trace(plain), potential="cubic")
    with pytest.raises(ValueError, match="`backward` must be"):
        EquilibriumNet(plain, backward="sideways")
    with pytest.raises(ValueError, match="`pool` must be"):
        hopfield_cnn(pool="sum")
    for kernel in (4, (5, 4), (5,)):
        with pytest.raises(ValueError, match="`kernel` must be odd"):
            hopfield_cnn(kernel=kernel)
    for how in ({"coupling": 0.5}, {"coupling": 0.0, "readout": True}):
        with pytest.raises(ValueError, match="`coupling` must be positive"):
            hopfield_cnn(**how)
    with pytest.raises(ValueError, match="`factor` must be a finite number"):
        hopfield_cnn(channels=(2, 3, 4), coupling=1e-200, readout=True)
    with pytest.raises(ValueError, match="`factor` must be a finite number"):
        Scale(math.inf)
    with pytest.raises(ValueError, match="`factor` must be a finite number"):
        Scale(torch.tensor(0.5))
    with pytest.raises(ValueError, match="`channels` must name"):
        hopfield_cnn(channels=(), full_size=True)
    with pytest.raises(ValueError, match="sizes must be"):
        LoopedMLP(4, 0, 2)


def test_maps_are_halved_by_stride_or_by_pooling():
    x = torch.rand(2, 1, 9, 9)

    def maps(pool, channels=(2, 3), **how):
        net = hopfield_cnn(1, 9, 10, channels, pool=pool, **how).couplings()
        return [shape[1:] for shape in mep.Hopfield().shapes(net, x)]

    assert maps("stride") == [(2, 5, 5), (3, 3, 3), (10,)]
    assert maps("average") == maps("max") == [(2, 9, 9), (3, 4, 4), (10,)]
    large = {"kernel": 3, "full_size": True}
    assert maps("stride", (2, 3, 4), **large) == [(2, 9, 9), (3, 5, 5), (4, 3, 3), (10,)]
    assert maps("average", (2, 3, 4), **large) == [(2, 9, 9), (3, 9, 9), (4, 4, 4), (10,)]
    assert hopfield_cnn(1, 9, kernel=3).net[2].weight.shape == (64, 32, 3, 3)
    each = hopfield_cnn(1, 9, 10, (2, 3), kernel=(5, 3))
    assert [each.net[i].weight.shape[-1] for i in (0, 2)] == [5, 3]
    assert each(x).shape == (2, 10)
    assert hopfield_cnn(1, 1, 10, (2, 3))(x[..., :1, :1]).shape == (2, 10)


def test_coupling_weakens_feedback_and_not_the_signal():
    """In states ``s_k c^(1 - k)``, bounded and biased so, it is a net of feedback ``c^2``."""
    torch.manual_seed(0)
    strength, x = 0.4, torch.rand(3, 1, 8, 8, dtype=torch.float64)
    net = hopfield_cnn(1, 8, 10, (4, 5, 6), kernel=3, coupling=strength, readout=True).double()
    assert [f"{m.factor:.2f}" for m in net.net if isinstance(m, Scale)] == ["0.40", "0.40", "6.25"]
    first, second, third, last = (net.net[i] for i in (0, 3, 6, 10))

    def up(layer, below, feedback, depth):
        bias = layer.bias[:, None, None] * (strength**-depth - 1)
        return (layer(below) + bias + feedback).clamp(0, strength**-depth)

    def back(layer, s, size):
        kept = {"stride": 2, "padding": 1, "output_padding": 1 - size % 2}
        return torch.conv_transpose2d(s, layer.weight, **kept)

    s = first(x).clamp(0, 1)
    t = up(second, s, 0.0, 1)
    for _ in range(200):
        u = up(third, t, 0.0, 2)
        t = up(second, s, strength**2 * back(third, u, 2), 1)
        s = up(first, x, strength**2 * back(second, t, 4), 0)
    net.settler = DEEP
    torch.testing.assert_close(net(x), last(u.flatten(1)), rtol=1e-10, atol=1e-10)


def test_smooth_units_of_the_square_potential_have_no_rest():
    model, (x, y) = net_of("tanh, square"), batch()
    with pytest.raises(ValueError, match="no rest in closed form"):
        mep.estimate(model, x, y, cost="mse", settler=mep.FixedPoint())


def test_fixed_point_options_are_checked():
    with pytest.raises(ValueError, match="order"):
        mep.FixedPoint(order="random")
    with pytest.raises(ValueError, match="max_steps"):
        mep.FixedPoint(max_steps=0)
    with pytest.raises(ValueError, match="number of nodes"):
        mep.holomorphic(1)


@pytest.mark.parametrize("name", ["tanh", "looped", "clipped"])
def test_diagnose_compares_with_backprop_through_the_equilibrium(name):
    model, (x, y) = net_of(name), batch()
    before = [p.detach().clone() for p in model.parameters()]
    found = mep.diagnose(
        model, x, y, cost=NETS[name][1], beta=0.02, stencil=mep.centered,
        settler=mep.FixedPoint(300, 1e-4),
    )  # fmt: skip
    assert found.regime == "finite nudge" and found.cosine > 0.999
    assert found.layers_with_gradient == len(found.layers) == 3
    assert found.displacement_ratio == pytest.approx(1.0, abs=0.01)
    assert found.c == pytest.approx(0.02)
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, b)


def test_feedback_of_its_own_replaces_the_transpose():
    model, (x, _) = net_of("tanh"), batch()
    net = model.couplings()

    def settled(change):
        bent = [
            dataclasses.replace(c, feedback=c.block.layer.weight.detach() + change)
            for c in net.interactions
        ]
        return settled_states(Couplings(net.units, bent, net.readout), x, DEEP).states[0]

    reference = settled_states(net, x, DEEP).states[0]
    torch.testing.assert_close(settled(0.0), reference, rtol=1e-12, atol=1e-12)
    assert (settled(0.1) - reference).abs().max() > 1e-3


def test_a_state_needs_something_from_below():
    net = net_of("tanh").couplings()
    with pytest.raises(ValueError, match="no interaction from below"):
        Couplings(net.units, net.interactions[1:])


@pytest.mark.parametrize("name", NETS)
def test_what_is_kept_of_states_is_what_new_ones_would_compute(name):
    """After any sequence of changes, read or not in between."""
    model, (x, _) = net_of(name), batch()
    net = model.couplings()
    count = len(net.units)
    generator = torch.Generator().manual_seed(0)
    at = States(net, x, random_states(model, x))
    for _ in range(12):
        i = int(torch.randint(1, count + 1, (), generator=generator))
        at.put(i, torch.randn(at[i].shape, generator=generator, dtype=x.dtype))
        j = int(torch.randint(1, count + 1, (), generator=generator))
        fresh = States(net, x, at.states)
        torch.testing.assert_close(at.current(j), fresh.current(j), rtol=0, atol=0)
        torch.testing.assert_close(at.output, fresh.output, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in NETS if "square" not in name])
@pytest.mark.parametrize("order", mep.settling.ORDERS)
def test_what_is_said_to_rest_has_no_force(name, order):
    model, (x, y) = net_of(name), batch()
    net, cost = model.couplings(), cost_of(NETS[name][1])
    at = States(net, x, random_states(model, x))
    problem = Relaxation(at, cost, cost.prepare(y, at.output), 0.3, 0.3)
    for _ in range(3):
        at = problem.relax(at, order)
        fresh = States(net, x, at.states)
        found, truth = problem.residual(at), problem.residual(fresh)
        torch.testing.assert_close(found.per_sample, truth.per_sample, rtol=1e-9, atol=1e-12)


def test_a_saturated_net_that_flips_is_not_settled():
    """Its forces vanish with the slopes; its activities do not rest."""
    model = LoopedMLP(4, 3, 2)
    with torch.no_grad():
        model.net["recurrent"].weight.copy_(-20 * torch.eye(3))
        model.net["recurrent"].bias.zero_()
        model.net["input"].bias.fill_(0.5)
    with pytest.warns(UserWarning, match="has not settled"):
        found = mep.estimate(model, torch.zeros(4, 4), torch.tensor([0, 1, 0, 1]))
    assert not found.converged and found.median > 1


def test_samples_without_a_nudge_settle_all_the_same():
    model = net_of("clipped")
    x, _ = batch()
    target = model.net(x).detach()  # what the forward start says: no cost, and no equilibrium
    found = mep.estimate(model, x, target, cost="mse", beta=0.2)
    assert found.converged and found.loss > 0
    with torch.no_grad():
        assert float(found.loss) == pytest.approx(
            float(cost_of("mse").mean(model(x), target)), rel=0.05
        )


@pytest.mark.parametrize("name", ["tanh", "looped"])
def test_anderson_mixes_complex_states(name):
    model, (x, y) = net_of(name), batch()
    how = {"cost": NETS[name][1], "beta": 0.3, "stencil": mep.holomorphic(5)}
    plain, _ = estimated(model, x, y, settler=DEEP, **how)
    mixed, report = estimated(model, x, y, settler=mep.Anderson(60, 1e-11), **how)
    assert report.sweeps < 60 and float(report.residual.max()) < 1e-6
    assert distance(mixed, plain) < 1e-6


def test_units_take_the_potential_that_has_a_rest():
    model = EquilibriumNet(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
    assert all(unit.has_rest for unit in model.couplings().units)
    with torch.no_grad():
        ours = model(torch.ones(2, 4))
    explicit = EquilibriumNet(model.net, potential="conjugate")
    with torch.no_grad():
        assert torch.equal(ours, explicit(torch.ones(2, 4)))
        downhill = EquilibriumNet(model.net, potential="square")
        settled = mep.free_states(downhill, torch.ones(2, 4))[-1]
        torch.testing.assert_close(downhill(torch.ones(2, 4)), settled)
        assert (settled - ours).abs().max() > 1e-3
    with pytest.raises(ValueError, match="no rest in closed form"):
        downhill(torch.ones(2, 4))


@pytest.mark.parametrize("between", [nn.ReLU(), nn.Tanh(), nn.Dropout(0.5)])
def test_what_cannot_carry_activities_back_is_refused(between):
    with pytest.raises(mep.TraceError, match="only be pooling, reshaping and a factor"):
        EquilibriumNet(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), between, nn.Linear(3, 2)))


def test_dropout_of_the_input_and_hooks_are_refused():
    with pytest.raises(mep.TraceError, match="only be pooling"):
        EquilibriumNet(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)))
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    net[0].register_forward_hook(lambda *_: None)
    with pytest.raises(mep.TraceError, match="hooks"):
        EquilibriumNet(net)


def test_gradients_of_the_input_with_frozen_parameters():
    model, (x, _) = net_of("tanh"), batch()
    model.requires_grad_(False)
    x.requires_grad_()
    model(x).sum().backward()
    h = 1e-5 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        slope = float((model(x + h) - model(x - h)).sum() / 2)
    assert slope == pytest.approx(float((x.grad * h).sum()), rel=1e-6)


def test_nothing_trainable_and_nothing_at_all():
    model, (x, y) = net_of("tanh"), batch()
    assert model(x[:0]).shape == (0, 3)
    model.requires_grad_(False)
    for method in ("analytic", "autograd"):
        how = {"cost": "mse", "beta": 0.1, "settler": DEEP, "gradient_method": method}
        assert mep.estimate(model, x, y, **how).converged


@pytest.mark.parametrize("call", [lambda m, x: m(x), lambda m, x: mep.free_states(m, x)])
def test_an_input_that_does_not_fit_names_the_layer(call):
    with pytest.raises(ValueError, match=r"does not fit the model: Flatten > Linear\(32, 7\)"):
        call(net_of("tanh"), torch.randn(3, 5).double())


def test_too_strong_a_nudge_is_told_so():
    model, (x, _) = net_of("clipped"), batch()
    how = {"cost": "mse", "beta": 1.0, "stencil": mep.centered}  # unbounded below at -1
    with pytest.warns(UserWarning, match="nudge is too strong"):
        found = mep.estimate(model, x, torch.randn(4, 3).double() * 1e3, **how)
    assert found.status == "diverged" and all(p.grad is None for p in model.parameters())


def test_hopeless_options_of_nets_are_refused():
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(TypeError, match="`settler` must be a mep"):
        EquilibriumNet(net, settler=mep.GradientDescent())
    with pytest.raises(ValueError, match="for every pooling"):
        hopfield_cnn(1, 2, 10, (4, 8), pool="average")
    found = EquilibriumNet(net).couplings()
    with pytest.raises(ValueError, match="must be Linear"):
        Couplings(found.units[:1], found.interactions[:1])
    with pytest.raises(ValueError, match="a read-out reads state 2, not 1"):
        Couplings(found.units, found.interactions, found.interactions[1])


@pytest.mark.parametrize("stencil", [mep.random_sign(), mep.holomorphic(4)])
def test_stencils_with_options_can_be_pickled(stencil):
    model = net_of("tanh")
    opt = mep.EPOptimizer(model.parameters(), model=model, cost="mse", stencil=stencil)
    read = pickle.loads(pickle.dumps(opt))
    assert len(read.how.stencil(0.1)) == len(stencil(0.1))


def test_diagnose_leaves_random_numbers_alone():
    model, (x, y) = net_of("tanh"), batch()
    before = torch.get_rng_state()
    found = mep.diagnose(model, x, y, cost="mse", beta=0.1, stencil=mep.random_sign())
    assert torch.equal(torch.get_rng_state(), before)
    complex_ = mep.diagnose(model, x, y, cost="mse", beta=0.1, stencil=mep.holomorphic(3))
    assert found.dtype == complex_.dtype == "float64"


def test_a_share_of_the_samples_has_to_settle():
    model = net_of("tanh", scale=1.0)
    x, _ = batch(64)
    x = x * torch.logspace(-2, 1, 64).double().view(-1, 1, 1, 1)  # some settle later than others
    steps = {}
    for share in (0.25, 0.5, 0.9, 1.0):
        solver = mep.FixedPoint(500, 1e-6, share=share)
        found = settled_states(model.couplings(), x, solver)
        reached = float(found.residual.sort().values[math.ceil(share * 64) - 1])
        assert found.converged and found.history[-1] == reached <= 1e-6
        assert found.history[-2] > 1e-6
        steps[share] = found.steps
    assert steps[0.25] < steps[0.5] < steps[1.0] and steps[0.9] <= steps[1.0]


@pytest.mark.parametrize("options", [{"omega": 2.0}, {"omega": 0.0}, {"share": 0}, {"share": 1.1}])
def test_options_of_rounds_are_checked(options):
    with pytest.raises(ValueError, match="must be in"):
        mep.FixedPoint(**options)


def test_the_gradient_of_a_residual_net_of_13_layers_is_backprops():
    torch.manual_seed(0)
    model = hopfield_resnet13(2, 4, 3, width=2).double()
    net, (x, y) = model.couplings(), batch()
    assert len(net.units) == len(list(model.parameters())) // 2 == 13
    skips = [(c.source, c.target, c.factor) for c in net.interactions if c.block.layer is None]
    assert skips == [(1, 3, 0.4), (4, 6, 0.4), (7, 9, 0.4), (10, 12, 0.4)]
    model.settler = mep.FixedPoint(300, None)
    found, report = estimated(model, x, y, cost="mse", beta=1e-5, stencil=mep.centered,
                              settler=mep.FixedPoint(300, None))  # fmt: skip
    assert report.converged
    assert distance(found, by_backprop(model, x, y, "mse", "through time")) < 1e-6


@pytest.mark.parametrize("skips", [{(0, 1): 0.1}, {(2, 1): 0.1}, {(1, 3): 0.1}, {(1, 2): math.nan}])
def test_skips_that_lead_nowhere_are_refused(skips):
    with pytest.raises(ValueError, match="`skips` lead from a state to a later one, of 1 to 2"):
        EquilibriumNet(nn.Sequential(nn.Linear(4, 2), clip(), nn.Linear(2, 2)), skips=skips)


def test_a_skip_between_states_of_different_shapes_is_named():
    model = EquilibriumNet(nn.Sequential(nn.Linear(4, 8), clip(), nn.Linear(8, 2)),
                           skips={(1, 2): 0.3})  # fmt: skip
    with pytest.raises(ValueError, match="skip from state 1 to 2 said"):
        model(torch.zeros(1, 4))
