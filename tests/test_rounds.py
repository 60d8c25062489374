"""Compiled rounds of a coupled perceptron, against the rounds they stand for."""

import copy
import pickle

import pytest
import torch
from torch import nn

import mep
from mep.bench.robustness import _Noisy
from mep.couplings import Couplings, Interaction, Ramp
from mep.energies.costs import SquaredError
from mep.energies.equilibrium import Equilibrium, contraction, fixed_point, forward_start
from mep.energies.hopfield import Hopfield
from mep.energies.relaxation import Relaxation
from mep.energies.rounds import are_compiled
from mep.energies.states import States
from mep.kernels import eager
from mep.models import EquilibriumNet, LoopedMLP, hopfield_mlp
from mep.settling import settle

pytest.importorskip("numba")
from mep.kernels import rounds as module

SIZES = (12, (9, 7, 8), 5)
ORDERS = ["alternating", "forward", "backward"]


def net_and_batch(batch=40, sizes=SIZES, scale=1.5):
    torch.manual_seed(0)
    model = hopfield_mlp(*sizes)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)  # units at both rims
    return model, torch.rand(batch, sizes[0]), torch.randint(sizes[2], (batch,))


def free_phase(model, x, y, solver):
    net = Hopfield().read(model, "analytic")
    return Equilibrium(net, x, y, SquaredError(), solver, 0.3)


@pytest.fixture
def programs(monkeypatch):
    """The instructions of every round: what is computed, and of which state."""
    taken = []
    call = module.call

    def noted(found, loop, job, batch, work):
        length = int(job[module._LENGTH])
        taken.append([tuple(map(int, row)) for row in job[-3 * length :].reshape(-1, 3)])
        call(found, loop, job, batch, work)

    monkeypatch.setattr(module, "call", noted)
    return taken


def phases(model, x, y, order, omega, rounds):
    """Where the free phase and two nudged ones are after some rounds, and their residuals."""
    solver = mep.FixedPoint(rounds, None, order, omega)
    free = free_phase(model, x, y, solver)
    found = [free.settled]
    found += [settle(free.nudged(beta), solver) for beta in (0.3, -0.3)]
    return [(p.configuration.unknowns, p.balance.per_sample) for p in found]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("omega", [1.0, 0.7, 1.2])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_rounds_are_those_without_kernels(order, omega, rounds, threads, programs):
    model, x, y = net_and_batch(sizes=(400, (300, 200), 10), batch=64, scale=1.0)
    found = phases(model, x, y, order, omega, rounds)
    assert len(programs) == 3 * rounds
    with eager():
        wanted = phases(model, x, y, order, omega, rounds)
    assert len(programs) == 3 * rounds
    for (states, residual), (true, known) in zip(found, wanted, strict=True):
        for one, other in zip(states, true, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-6)
        # A residual is what is left: of numbers of 1, roundings of 1e-7 each, through two products.
        torch.testing.assert_close(residual, known, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_every_product_is_computed_once_a_round(order, programs):
    model, x, y = net_and_batch()
    free = free_phase(model, x, y, mep.FixedPoint(4, None, order, 1.1))
    products = [[row for row in program if row[0] <= 1] for program in programs]
    states, known = range(1, 5), [(0, i) for i in (2, 3, 4)]
    every = {*known, *((1, i) for i in states[:-1])}
    assert [sorted(row[:2] for row in rows) for rows in products[1:]] == [sorted(every)] * 3
    programs.clear()
    settle(free.nudged(0.3), mep.FixedPoint(1, None, "alternating"))
    # The output moves, the state below it, and nothing else: that is all that has to be sent.
    assert [row for row in programs[0] if row[0] <= 1] == [(1, 3, 0), (1, 2, 0), (0, 4, 0)]


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_kept_of_states_is_what_new_ones_would_compute(order, programs):
    model, x, y = net_and_batch()
    free = free_phase(model, x, y, mep.FixedPoint(3, None, order, 1.1))
    nudged = settle(free.nudged(0.3), mep.FixedPoint(2, None, order)).configuration
    for at in (free.settled.configuration, nudged):
        fresh = States(at.net, at.x, at.unknowns, at.free)
        assert at.rounds is not None and fresh.rounds is None
        for i in range(1, len(at.unknowns) + 1):
            torch.testing.assert_close(at.current(i), fresh.current(i), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(at.activity(i), fresh.activity(i))
        for k in range(len(at.net.interactions)):
            for one, other in zip(at.pushed(k)[1].values, fresh.pushed(k)[1].values, strict=True):
                assert one.shape == other.shape and (at.free or torch.equal(one, other))
    assert len(programs) == 3 + 2


@pytest.fixture
def free_problem():
    """A free phase that has not begun, of a net with units at both rims."""
    model, x, y = net_and_batch()
    net, cost = Hopfield().read(model, "analytic"), SquaredError()
    with torch.no_grad():
        start = forward_start(net, x)
        return Relaxation(start, cost, cost.prepare(y, start.output), 0.0, 1.0)


def same(ask, **bounds):
    """What is asked for is the same with kernels and without."""
    with torch.no_grad():
        found = ask()
        with eager():
            wanted = ask()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **(bounds or {"rtol": 1e-4, "atol": 2e-6}))
    return found


def test_a_copy_has_a_room_of_its_own(free_problem, programs):
    def ask():
        at = free_problem.relax(free_problem.start(), "alternating")
        copy, known = at.copy(), [s.clone() for s in at.unknowns]
        moved = free_problem.relax(copy, "alternating")
        assert all(torch.equal(at[i], s) for i, s in enumerate(known, 1))
        assert not torch.equal(moved[1], known[0])
        left = free_problem.residual(at.copy()).per_sample
        torch.testing.assert_close(left, free_problem.residual(at).per_sample, rtol=1e-4, atol=1e-6)
        free_problem.relax(at, "alternating")
        assert not torch.equal(at[1], known[0])
        return [*moved.unknowns, free_problem.residual(moved).per_sample]

    same(ask)
    assert len(programs) == 3


def test_what_is_kept_by_hand_moves_nothing_else(free_problem, programs):
    """Deep copies and files have no addresses in them."""
    with torch.no_grad():
        settled = settle(free_problem, mep.FixedPoint(2, None))
        known = [s.clone() for s in settled.configuration.unknowns]
        for other in (copy.deepcopy(settled), pickle.loads(pickle.dumps(settled))):
            free_problem.relax(other.configuration, "alternating")
            assert not torch.equal(other.configuration[1], known[0])
        assert all(torch.equal(settled.configuration[i], s) for i, s in enumerate(known, 1))
    assert len(programs) == 4


@pytest.mark.parametrize("order", [*ORDERS, "synchronous"])
@pytest.mark.parametrize("omega", [1.0, 0.7])
def test_new_states_wherever_they_are(free_problem, order, omega, programs):
    """Inside their box or not, with nothing computed yet."""
    at = free_problem.start()
    drawn = torch.Generator().manual_seed(3)
    states = [2 * torch.randn(s.shape, generator=drawn) for s in at.unknowns]

    def ask():
        fresh = States(at.net, at.x, states)
        moved = free_problem.relax(fresh, order, omega)
        free_problem.relax(moved, order, omega)
        return [*moved.unknowns, free_problem.residual(moved).per_sample]

    same(ask, rtol=1e-3, atol=1e-5)
    assert len(programs) == (order != "synchronous")  # inside after the first round


def test_what_has_been_put_is_what_relaxes(free_problem, programs):
    def ask():
        at = free_problem.relax(free_problem.start(), "alternating")
        at.put(2, torch.full_like(at[2], 0.25))
        free_problem.relax(at, "synchronous")
        free_problem.relax(at, "alternating")
        return at.unknowns

    same(ask)
    assert programs


@pytest.mark.parametrize("beta", [0.4, -0.4])
def test_another_nudge_has_another_room(free_problem, beta, programs):
    def ask():
        start = free_problem.relax(free_problem.start(), "alternating")
        other = Relaxation(start, free_problem.cost, free_problem.target, beta, abs(beta))
        before = other.residual(start).per_sample
        moved = other.relax(start, "alternating")
        return [*moved.unknowns, before, other.residual(moved).per_sample]

    same(ask, rtol=1e-3, atol=1e-5)
    assert len(programs) == 2


@pytest.mark.parametrize(("rounds", "omega"), [(1, 1.0), (6, 1.0), (6, 1.3)])
def test_units_rest_on_their_rims_to_the_last_bit(rounds, omega, programs):
    """What is beyond a rim is known only of those."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(12, 40), nn.Hardtanh(-0.3, 0.7), nn.Linear(40, 40), nn.Hardtanh(-0.3, 0.7),
        nn.Linear(40, 5),
    )  # fmt: skip
    for p in net.parameters():
        p.data.mul_(3)
    x, y = torch.randn(64, 12), torch.randint(5, (64,))
    free = free_phase(EquilibriumNet(net), x, y, mep.FixedPoint(rounds, None, omega=omega))
    at = free.settled.configuration
    for i in (1, 2) if rounds > 1 else (1,):  # the other layer has moved since
        rest = at.current(i).clamp(-0.3, 0.7)
        rim = (rest - at[i]).abs() < 1e-5
        rim &= (rest == rest.new_tensor(-0.3)) | (rest == rest.new_tensor(0.7))
        assert rim.any() and torch.equal(at[i][rim], rest[rim])
    assert programs


def test_a_displacement_that_nothing_holds_goes_back(programs):
    model, x, y = net_and_batch()
    free = free_phase(model, x, y, mep.FixedPoint(30, None))
    programs.clear()

    def ask():
        problem = free.nudged(0.3)
        at = problem.start()
        d = (0.2 * torch.ones_like(at[1])).clamp(at.net.units[0].low, at.net.units[0].high)
        at.put(1, d, d)
        problem.relax(at, "alternating")
        return [*at.unknowns, problem.residual(at).per_sample]

    same(ask, rtol=1e-3, atol=1e-5)
    assert programs


def test_the_spectral_radius_is_that_without_kernels(free_problem):
    radii = []

    def ask():
        at = fixed_point(free_problem, "alternating")
        radii.append(contraction(free_problem, at, "alternating"))
        return at.unknowns

    same(ask, rtol=1e-3, atol=1e-5)
    assert radii[0] == pytest.approx(radii[1], rel=0.02)


def test_samples_that_are_not_nudged_settle_to_their_states(programs):
    model, x, y = net_and_batch(batch=6)
    solver = mep.FixedPoint(200, 1e-6, share=1.0)
    free = free_phase(model, x, y, solver)
    output = free.settled.configuration.output
    target = nn.functional.one_hot(y, 5).float()
    target[2] = output[2]
    again = free_phase(model, x, target, solver).settled
    with eager():
        wanted = free_phase(model, x, target, solver).settled
    assert again.status == wanted.status == "converged"
    assert again.balance.per_sample.isfinite().all() and programs


def test_what_is_not_finite_diverges(programs):
    model, x, y = net_and_batch()
    x[3, 2] = torch.nan
    settled = free_phase(model, x, y, mep.FixedPoint(3)).settled
    assert settled.status == "diverged" and programs
    assert settled.configuration[1][[0, 1, 2, 4]].isfinite().all()


def _noisy(net):
    return Couplings([_Noisy(net.units[0], 0.1), *net.units[1:]], net.interactions)


def _fed_back(net):
    last = net.interactions[-1]
    other = torch.randn_like(last.block.layer.weight)
    kept = net.interactions[:-1]
    return Couplings(
        net.units, [*kept, type(last)(last.source, last.target, last.block, 1.0, other)]
    )


class _Odd(Ramp):
    """A ramp that rests elsewhere."""

    def rest(self, current):
        return super().rest(current).mul(0.5)


class _Loud(Interaction):
    def push(self, a):
        pushed, point = super().push(a)
        return 2 * pushed, point


class _Biased(SquaredError):
    pass


def _odd(net):
    unit = net.units[0]
    return Couplings([_Odd(unit.low, unit.high, unit.potential), *net.units[1:]], net.interactions)


def _loud(net):
    last = net.interactions[-1]
    return Couplings(
        net.units, [*net.interactions[:-1], _Loud(last.source, last.target, last.block)]
    )


def _narrow(net):
    layer = net.interactions[1].block.layer.module
    layer.bias = nn.Parameter(torch.ones(1))  # torch broadcasts it
    return net


def _hidden(activation, **options):
    return EquilibriumNet(
        nn.Sequential(nn.Linear(12, 9), activation, nn.Linear(9, 7), activation, nn.Linear(7, 5)),
        **options,
    ).couplings()


OTHERS = {
    "smooth units": lambda: _hidden(nn.Tanh()),
    "a read-out": lambda: _hidden(nn.Hardtanh(0, 1), readout=True),
    "a skip": lambda: EquilibriumNet(
        nn.Sequential(
            nn.Linear(12, 7), nn.Hardtanh(0, 1), nn.Linear(7, 7), nn.Hardtanh(0, 1),
            nn.Linear(7, 5),
        ),
        skips={(1, 2): 0.1},
    ).couplings(),
    "recurrent": lambda: LoopedMLP(12, 7, 5).couplings(),
    "noise": lambda: _noisy(hopfield_mlp(12, (9, 7), 5).couplings()),
    "feedback": lambda: _fed_back(hopfield_mlp(12, (9, 7), 5).couplings()),
    "a unit of another kind": lambda: _odd(hopfield_mlp(12, (9, 7), 5).couplings()),
    "an interaction of another kind": lambda: _loud(hopfield_mlp(12, (9, 7), 5).couplings()),
    "a bias of another shape": lambda: _narrow(hopfield_mlp(12, (9, 7), 5).couplings()),
    "double precision": lambda: hopfield_mlp(12, (9, 7), 5).double().couplings(),
    "a convolution": lambda: mep.models.hopfield_cnn(1, 6, 5, (2, 3)).couplings(),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_nets_take_the_reference(name, programs):
    torch.manual_seed(0)
    net = OTHERS[name]()
    shape = (8, 1, 6, 6) if name == "a convolution" else (8, 12)
    x, y = torch.rand(shape).to(net.parameter.dtype), torch.randint(5, (8,))
    Equilibrium(net, x, y, SquaredError(), mep.FixedPoint(2), 0.3)
    assert not programs


def test_other_costs_and_nudges_take_the_reference(free_problem, programs):
    at, cost, target = free_problem.start(), free_problem.cost, free_problem.target
    with torch.no_grad():
        for other in (
            Relaxation(at, _Biased(), target, 0.0, 1.0),
            Relaxation(at, None, None, 0.0, 1.0),
            Relaxation(at, cost, target[:1], 0.0, 1.0),  # torch broadcasts it
        ):
            other.relax(other.start(), "alternating")
        assert not are_compiled(at.net, cost, target, 0.3j)
    assert not programs
    with torch.no_grad():
        free_problem.relax(free_problem.start(), "alternating")
    assert programs
    programs.clear()
    with torch.enable_grad():
        free_problem.relax(free_problem.start(), "alternating")
    assert not programs


@pytest.mark.parametrize(
    "solver", [mep.FixedPoint(300, 1e-5, share=1.0), mep.Anderson(300, 1e-5, 1), mep.Anderson(4)]
)
def test_a_training_step_is_that_without_kernels(solver, programs):
    def step():
        model, x, y = net_and_batch(scale=1.0)
        opt = mep.EPOptimizer(
            model.parameters(), model=model, lr=0.5, cost="mse", beta=0.2, settler=solver,
            stencil=mep.centered,
        )  # fmt: skip
        for _ in range(3):
            opt.step(x=x, target=y)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    found = step()
    assert programs
    with eager():
        programs.clear()
        wanted = step()
        assert not programs
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
