"""Costs, output energies and state gradients against torch's own functions and autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    CLASSES,
    COSTS,
    ENERGIES,
    EXACT,
    MODELS,
    backprop,
    distance,
    flat,
    problem,
    random_states,
    tanh_problem,
)
from torch import nn
from torch.nn import functional as F

import mep
from mep.energies import CrossEntropy, FreePhase, SquaredError, cost_of

# Softmax in float32: an exponential and a sum over the classes, a few roundings of 6e-8.
SINGLE = 2e-6
# Newton's method in float64 stops at rounding; p_y of badly classified samples divides it.
SOLVED = 1e-10

SHAPES = [(3, 4), (3, 4, 5), (2, 3, 2, 2)]


def batch_for(shape, seed=0):
    """Outputs with class labels."""
    torch.manual_seed(seed)
    s = 3 * torch.randn(shape, dtype=torch.float64)
    return s, torch.randint(0, shape[1], shape[:1] + shape[2:])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy_is_torchs(shape):
    s, y = batch_for(shape)
    cost = CrossEntropy()
    torch.testing.assert_close(cost.mean(s, y), F.cross_entropy(s, y), rtol=EXACT, atol=EXACT)
    assert cost.value(s, y).shape == shape[:1]


@pytest.mark.parametrize("labels", ["classes", "one-hot", "real"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squared_error_is_half_the_summed_square(shape, labels):
    s, y = batch_for(shape)
    one_hot = torch.zeros_like(s).scatter_(1, y.unsqueeze(1), 1.0)
    target = {"classes": y, "one-hot": one_hot, "real": torch.randn_like(s)}[labels]
    truth = 0.5 * F.mse_loss(s, one_hot if labels == "classes" else target, reduction="sum")
    found = SquaredError().mean(s, target) * len(s)
    torch.testing.assert_close(found, truth, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cost_gradient_is_autograds(name, shape):
    cost = cost_of(name)
    s, target = batch_for(shape)
    y = cost.prepare(target, s)
    s.requires_grad_()
    truth = torch.autograd.grad(cost.value(s, y).sum(), s)[0]
    torch.testing.assert_close(cost.gradient(s.detach(), y), truth, rtol=EXACT, atol=EXACT)


@settings(max_examples=25, deadline=None)
@given(
    classes=st.integers(1, 5),
    positions=st.lists(st.integers(1, 3), max_size=2),
    batch=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_cross_entropy_gradient_over_shapes(classes, positions, batch, seed):
    s, y = batch_for((batch, classes, *positions), seed)
    s.requires_grad_()
    truth = batch * torch.autograd.grad(F.cross_entropy(s, y), s)[0]
    found = CrossEntropy().gradient(s.detach(), y)
    torch.testing.assert_close(found, truth, rtol=EXACT, atol=EXACT)


def test_well_classified_sample_keeps_its_digits_in_float32():
    s = torch.tensor([[20.0, 0.0, 1.0, -2.0]])
    y = torch.tensor([0])
    truth = CrossEntropy().gradient(s.double(), y)
    found = CrossEntropy().gradient(s, y)
    assert float(torch.softmax(s, 1)[0, 0] - 1) == 0.0  # the plain formula loses the sample
    assert ((found.double() - truth).abs() <= SINGLE * truth.abs()).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
@pytest.mark.parametrize("name", COSTS)
def test_labels_of_any_integer_type(name, dtype):
    s, y = batch_for((3, 4))
    cost = cost_of(name)
    assert torch.equal(cost.mean(s, y.to(dtype)), cost.mean(s, y))


BAD_TARGETS = [
    ("cross_entropy", [0, 1, 2], TypeError, "must be a Tensor"),
    ("cross_entropy", torch.zeros(3), TypeError, "class indices"),
    ("cross_entropy", torch.zeros(3, dtype=torch.bool), TypeError, "class indices"),
    ("cross_entropy", torch.zeros(3, 1, dtype=torch.long), ValueError, r"shape \(3,\)"),
    ("cross_entropy", torch.tensor([0, 1, 4]), ValueError, r"classes in \[0, 4\)"),
    ("cross_entropy", torch.tensor([0, -1, 2]), ValueError, "from -1 to 2"),
    ("mse", torch.zeros(3, 3), ValueError, "output's shape"),
    ("mse", torch.zeros(3), ValueError, "output's shape"),
    ("mse", torch.full((3, 4), float("nan")), ValueError, "NaN or infinite"),
    ("mse", torch.tensor([0, 1, 7]), ValueError, "from 0 to 7"),
]


@pytest.mark.parametrize(("name", "target", "kind", "reason"), BAD_TARGETS)
def test_bad_target_is_refused(name, target, kind, reason):
    with pytest.raises(kind, match=reason):
        cost_of(name).mean(torch.zeros(3, 4), target)


def test_cross_entropy_needs_classes():
    with pytest.raises(ValueError, match="classes"):
        CrossEntropy().mean(torch.zeros(3), torch.zeros(3, dtype=torch.long))


def test_unknown_cost_lists_the_known():
    with pytest.raises(ValueError, match=r"\['cross_entropy', 'mse'\].*'hinge'"):
        cost_of("hinge")


TEMPERATURES = [1.0, 1.7, 0.4]


def outputs(seed=0, batch=5):
    torch.manual_seed(seed)
    f, v = (torch.randn(batch, CLASSES, dtype=torch.float64) for _ in range(2))
    return f, v, torch.randint(0, CLASSES, (batch,))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kl_is_the_divergence(temperature):
    f, v, _ = outputs()
    p, q = (torch.softmax(z / temperature, 1) for z in (f + v, f))
    truth = (p * (p / q).log()).sum(1)
    found = mep.KL(temperature).value(v, f)
    torch.testing.assert_close(found, truth, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_kl_force_and_error_are_autograds(temperature, size):
    f, v, _ = outputs()
    s, f = (f + size * v).requires_grad_(), f.requires_grad_()
    kl = mep.KL(temperature)
    force, error = torch.autograd.grad(kl.value(s - f, f).sum(), [s, f])
    v, f = (s - f).detach(), f.detach()
    torch.testing.assert_close(kl.force(v, f), force, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(kl.error(v, f), -error, rtol=EXACT, atol=EXACT)


def test_kl_error_of_a_tiny_move_keeps_its_digits():
    """``(p - q)/T`` in float32 would subtract two equal numbers."""
    f, v, _ = outputs()
    kl, tiny = mep.KL(), (1e-9 * v).float()
    truth = kl.error(tiny.double(), f.float().double())
    assert distance([kl.error(tiny, f.float())], [truth]) < SINGLE


# With the squared error only beta > 0: the divergence cannot hold back a common shift of logits,
# which a negative nudge would drive without end. Below T = 1 cross-entropy falls more slowly than
# the divergence saturates: only a weak nudge has an equilibrium at all.
EQUATIONS = [
    *[("cross_entropy", b, t) for b in (0.01, 0.3, -0.02) for t in (1.0, 1.7)],
    *[("cross_entropy", b, 0.4) for b in (0.01, -0.02)],
    *[("mse", b, t) for b in (0.01, 0.3) for t in TEMPERATURES],
]


@pytest.mark.parametrize(("cost", "beta", "temperature"), EQUATIONS)
def test_kl_output_equation_is_solved(cost, beta, temperature):
    f, _, labels = outputs()
    kl, which = mep.KL(temperature), cost_of(cost)
    y = which.prepare(labels, f)
    v = kl.respond(torch.zeros_like(f), f, which, y, beta)
    nudge = beta * which.gradient(f + v, y)
    assert float((kl.force(v, f) + nudge).norm() / nudge.norm()) < SOLVED


def test_kl_without_an_equilibrium_says_so():
    at = tanh_problem([4, 6, CLASSES], batch=20)
    energy = mep.PredictionError(output=mep.KL(temperature=0.2))
    settler = mep.Sweep(max_sweeps=20)
    assert mep.settle(at.model, at.x, at.y, energy=energy, settler=settler).converged
    strong = mep.settle(at.model, at.x, at.y, energy=energy, settler=settler, beta=2.0)
    assert not strong.converged and not strong.median < settler.tol


def test_kl_target_rise_is_monotone_scalar_equation():
    """T = 1 with cross-entropy: only the target's logit rises, by ``u = beta / p_y(u)``."""
    f, _, y = outputs()
    v = mep.KL().respond(torch.zeros_like(f), f, CrossEntropy(), y, 0.2)
    u = v.gather(1, y.unsqueeze(1))
    assert torch.equal(torch.zeros_like(v).scatter_(1, y.unsqueeze(1), u), v)
    p = torch.softmax(f + v, 1).gather(1, y.unsqueeze(1))
    torch.testing.assert_close(u * p, torch.full_like(u, 0.2), rtol=SOLVED, atol=0)


def test_kl_refuses_positions_and_temperatures():
    with pytest.raises(ValueError, match=r"KL\(temperature=\.\.\.\)"):
        mep.KL(temperature=0.0)
    with pytest.raises(ValueError, match=r"\(B, classes\)"):
        mep.KL().respond(
            torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), CrossEntropy(), torch.zeros(2, 4).long(), 1
        )


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("energy", sorted(ENERGIES))
def test_state_gradients_are_autograds(name, cost, energy):
    """At random states and beta > 0: nowhere does a term vanish by itself."""
    at = problem(name)
    states = random_states(at.model, at.x)
    options = {"beta": 0.7, "cost": cost, "energy": ENERGIES[energy]}
    ours = mep.state_gradients(at.model, at.x, states, at.y, **options)
    theirs = mep.state_gradients(at.model, at.x, states, at.y, method="autograd", **options)
    leaves = [s.clone().requires_grad_() for s in states]
    total = mep.energy(at.model, at.x, leaves, at.y, **options).sum()
    truth = torch.autograd.grad(total, leaves)
    for layer in zip(ours, theirs, truth, states, strict=True):
        assert layer[0].shape == layer[3].shape
        assert distance([layer[0]], [layer[2]]) < EXACT
        assert distance([layer[1]], [layer[2]]) < EXACT


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("energy", sorted(ENERGIES))
def test_energy_by_its_definition(cost, energy):
    """Written out once more, with nothing of the library but the divergence's parameter."""
    at, beta = tanh_problem([4, 5, CLASSES]), 0.6
    s1, s2 = random_states(at.model, at.x)
    f1, f2 = at.model[0](at.x), at.model[2](torch.tanh(s1))
    which = ENERGIES[energy].output
    if isinstance(which, mep.KL):
        log_p, log_q = (torch.log_softmax(z / which.temperature, 1) for z in (s2, f2))
        last = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
    else:
        last = 0.5 * (s2 - f2).square().sum(1)
    if cost == "cross_entropy":
        nudge = F.cross_entropy(s2, at.y, reduction="none")
    else:
        nudge = 0.5 * (s2 - F.one_hot(at.y, CLASSES)).square().sum(1)
    truth = 0.5 * (s1 - f1).square().sum(1) + last + beta * nudge
    options = {"beta": beta, "cost": cost, "energy": ENERGIES[energy]}
    found = mep.energy(at.model, at.x, [s1, s2], at.y, **options)
    torch.testing.assert_close(found, truth, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("energy", sorted(ENERGIES))
def test_energy_is_differentiable_in_states_and_parameters(energy):
    at = tanh_problem([3, 4, CLASSES], batch=2)
    states = [s.requires_grad_() for s in random_states(at.model, at.x)]

    def total(*states):
        return mep.energy(
            at.model, at.x, list(states), at.y, beta=0.4, energy=ENERGIES[energy]
        ).sum()

    assert torch.autograd.gradcheck(total, states)
    grads = torch.autograd.grad(total(*states), list(at.model.parameters()))
    assert all(g.any() for g in grads)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"batch norm"}))
def test_forces_do_not_know_the_batch(name):
    """Sums for states: a sample's force is the same alone and in a doubled batch."""
    at = problem(name)
    states = random_states(at.model, at.x)
    once = mep.state_gradients(at.model, at.x, states, at.y, beta=0.7)
    twice = mep.state_gradients(
        at.model, at.x.repeat(2, *[1] * (at.x.dim() - 1)),
        [torch.cat([s, s]) for s in states], torch.cat([at.y, at.y]), beta=0.7,
    )  # fmt: skip
    alone = mep.state_gradients(at.model, at.x[:1], [s[:1] for s in states], at.y[:1], beta=0.7)
    for single, double, first in zip(once, twice, alone, strict=True):
        torch.testing.assert_close(double, torch.cat([single, single]), rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(first, single[:1], rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("energy", sorted(ENERGIES))
def test_forces_vanish_at_the_free_equilibrium(energy):
    at = problem("mlp")
    states = mep.free_states(at.model, at.x)
    forces = mep.state_gradients(at.model, at.x, states, at.y, beta=0.0, energy=ENERGIES[energy])
    assert not flat(forces).any()


def test_beta_and_cost_reach_the_output_force_only():
    at = problem("mlp")
    states = random_states(at.model, at.x)
    free = mep.state_gradients(at.model, at.x, states, at.y, beta=0.0)
    for cost in COSTS:
        forces = mep.state_gradients(at.model, at.x, states, at.y, beta=0.3, cost=cost)
        which = cost_of(cost)
        nudge = 0.3 * which.gradient(states[-1], which.prepare(at.y, states[-1]))
        assert all(torch.equal(a, b) for a, b in zip(forces[:-1], free[:-1], strict=True))
        torch.testing.assert_close(forces[-1], free[-1] + nudge, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("cost", COSTS)
def test_gain_is_the_sum_of_squared_errors(cost):
    """kappa from autograd's own gradients in the states."""
    at = tanh_problem([4, 6, 5, CLASSES])
    phase = FreePhase(mep.trace(at.model), at.x, at.y, cost_of(cost))
    s1 = at.model[0](at.x)
    s2 = at.model[2](torch.tanh(s1))
    s3 = at.model[4](torch.tanh(s2))
    loss = cost_of(cost).value(s3, phase.target).sum()
    squares = [float(g.square().sum()) for g in torch.autograd.grad(loss, [s1, s2, s3])]
    with torch.no_grad():
        assert phase.gain == pytest.approx(sum(squares) / squares[-1], rel=EXACT)


def test_gain_of_an_isometric_chain_is_its_depth():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(7)]).double()
    mep.init.orthogonal_(model)
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
    with torch.no_grad():
        gain = FreePhase(mep.trace(model), x, y, cost_of("mse")).gain
    assert gain == pytest.approx(7, rel=EXACT)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda m, x, s, y: mep.energy(m, x, s[:1], y, beta=1.0), "`states` must have the shapes"),
        (
            lambda m, x, s, y: mep.state_gradients(m, x, s[:1], y, beta=1.0),
            "`states` must have the shapes",
        ),
        (lambda m, x, s, y: mep.state_gradients(m, x, s, y, beta=1.0, method="x"), "`method`"),
    ],
)
def test_inspection_refuses_what_does_not_fit(call, reason):
    at = problem("mlp")
    with pytest.raises(ValueError, match=reason):
        call(at.model, at.x, mep.free_states(at.model, at.x), at.y)


@pytest.mark.parametrize("cost", COSTS)
def test_loss_is_backprops(cost):
    """The baseline minimises the very same function."""
    at = problem("mlp")
    at.model.zero_grad()
    cost_of(cost).mean(at.model(at.x), at.y).backward()
    assert distance([p.grad for p in at.model.parameters()], backprop(at, cost)) < EXACT
