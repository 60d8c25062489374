"""Ramps that settle, fused, against their eager twins."""

import pytest
import torch
from torch import nn

import mep
from mep.couplings import Ramp, ramp
from mep.kernels import eager, ramps_of
from mep.models import EquilibriumNet, hopfield_cnn, hopfield_mlp

pytest.importorskip("numba")
from mep.kernels.ramp import Ramps
from mep.kernels.rounds import Rounds

BOX = Ramp(-0.25, 1.0, "square")
# Small ones, one that is no multiple of a vector's length, and one that is shared by threads.
SHAPES = [(1, 1), (3, 5), (4, 3, 2, 7), (64, 2000)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def units(shape):
    """A ramp, and its displacements from states of which some rest on a rim."""
    current = normal(*shape, seed=9)
    yield BOX
    yield BOX.around(BOX.rest(current), current)


def both(ask):
    """What is found by kernels, and by their twins in float32."""
    with torch.no_grad():
        found = ask()
        with eager():
            return found, ask()


def close(pair):
    (found, gap), (wanted, wanted_gap) = pair
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    assert (gap is None) == (wanted_gap is None)
    if gap is not None:
        torch.testing.assert_close(gap, wanted_gap, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("terms", [1, 2])
def test_rest_and_how_far_it_is(shape, terms, threads):
    currents, s = [normal(*shape, seed=k) for k in range(terms)], normal(*shape, seed=5)
    for unit in units(shape):
        for state in (s, None):
            close(both(lambda state=state, unit=unit: unit.rest_under(currents, state)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.6, 1.0, 1.3])
def test_a_share_of_the_way(shape, share, threads):
    s, current = normal(*shape, seed=5), normal(*shape, seed=6)
    for unit in units(shape):
        rest, start = unit.rest(current), unit.kept(s)
        close(both(lambda u=unit, s=start, r=rest: u.approach(s, r, share)))
        with torch.no_grad():
            moved = unit.approach(start, rest, share)[0]
        torch.testing.assert_close(moved, unit.kept(start + share * (rest - start)))
        assert share != 1 or torch.equal(moved, rest)


def last(t):
    return t.to(memory_format=torch.channels_last)


@torch.no_grad()
def test_maps_with_channels_last_are_the_same_in_another_order():
    shape = (4, 3, 2, 7)
    s, one, two, current = (normal(*shape, seed=k) for k in range(4))
    assert ramps_of(last(s), last(one)) is not None
    assert ramps_of(last(s), one) is None and ramps_of(one, last(s)) is None
    first = BOX.around(BOX.rest(current), current)
    moved = BOX.around(last(BOX.rest(current)), last(current))
    for unit, other in ((BOX, BOX), (first, moved)):
        wanted, gap = unit.rest_under([one, two], s)
        found, other_gap = other.rest_under([last(one), last(two)], last(s))
        assert torch.equal(found, wanted) and found.stride() == last(s).stride()
        torch.testing.assert_close(other_gap, gap)
        start = unit.kept(s)
        wanted, gap = unit.approach(start, wanted, 1.3)
        found, other_gap = other.approach(last(start), found, 1.3)
        assert torch.equal(found, wanted) and found.stride() == last(s).stride()
        torch.testing.assert_close(other_gap, gap)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_own_sample(bad):
    current = normal(3, 40)
    current[1, 7] = bad
    for unit in units((3, 40)):
        close_to_nan = {"rtol": 1e-6, "atol": 1e-6, "equal_nan": True}
        found, wanted = both(lambda u=unit: u.rest_under([current], torch.zeros(3, 40)))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, **close_to_nan)
        assert found[0][[0, 2]].isfinite().all()


def test_kernels_are_for_float32_in_a_row():
    s = normal(4, 6)
    assert ramps_of(s) is None  # gradients are recorded
    with torch.no_grad():
        assert ramps_of(s) is not None and ramps_of(s, None) is not None
        assert ramps_of(s.double()) is None
        assert ramps_of(s, s.double()) is None
        assert ramps_of(s.mT) is None
        assert ramps_of(s, s[:2]) is None
        with eager():
            assert ramps_of(s) is None
    close(both(lambda: BOX.rest_under([normal(6, 4).mT], s)))


NETS = {
    "mlp": lambda: hopfield_mlp(49, (32, 24), 10),
    "strided": lambda: hopfield_cnn(1, 7, 10, (3, 4)),
    "channels first": lambda: hopfield_cnn(1, 7, 10, (3, 4)).to(
        memory_format=torch.contiguous_format
    ),
    "averages": lambda: hopfield_cnn(1, 7, 10, (3, 4), pool="average"),
    "skip": lambda: EquilibriumNet(
        nn.Sequential(
            nn.Flatten(), nn.Linear(49, 24), nn.Hardtanh(0, 1), nn.Linear(24, 24),
            nn.Hardtanh(0, 1), nn.Linear(24, 24), nn.Hardtanh(0, 1), nn.Linear(24, 10),
        ),
        skips={(1, 3): 0.4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("omega", [1.0, 1.2])
@pytest.mark.parametrize("order", ["alternating", "synchronous", "backward"])
def test_a_step_is_what_it_is_without_kernels(name, omega, order, monkeypatch):
    if order == "synchronous" and omega > 1:
        omega = 0.9
    asked = []
    for kind, what in ((Ramps, "rest"), (Rounds, "relax")):
        do = getattr(kind, what)
        monkeypatch.setattr(
            kind, what, lambda self, *a, do=do, kind=kind: asked.append(kind) or do(self, *a)
        )
    unfused = []
    monkeypatch.setattr(ramp, "ramps_of", lambda *t: ramps_of(*t) or unfused.append(t))
    settler = mep.FixedPoint(300, 1e-4, order, omega)

    def step():
        torch.manual_seed(0)
        model = NETS[name]()
        start = [p.detach().clone() for p in model.parameters()]
        opt = mep.EPOptimizer(
            model.parameters(), model=model, lr=1.0, cost="mse", beta=0.3, stencil=mep.centered,
            settler=settler,
        )  # fmt: skip
        opt.step(x=torch.rand(6, 1, 7, 7), target=torch.arange(6))
        assert opt.last.status == "converged"
        return torch.cat([(p.detach() - s).flatten() for p, s in zip(model.parameters(), start)])  # noqa: B905

    found = step()
    assert {*asked} == {Rounds if name == "mlp" and order != "synchronous" else Ramps}
    assert not unfused  # whatever order in memory layers and poolings give maps
    with eager():
        asked.clear()
        wanted = step()
        assert not asked
    assert float((found - wanted).norm() / wanted.norm()) < 2e-3  # settled to 1e-4
