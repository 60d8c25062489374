"""Compiled passes over segments against the reference, block by block: the same steps."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import CLASSES, flat
from test_flat import FLAT, LEFT, Case, assert_same, batch, net, optimizer, residual, trained
from torch import nn

import mep
import mep.kernels
from mep.contrast import BlockSegments, FlatSegments
from mep.kernels.library import native
from mep.memory import Plan
from mep.optim.budget import Budget

pytestmark = pytest.mark.skipif(
    not mep.kernels.available() or native() is None, reason="nothing to compile, or to call"
)

WITHIN = {"memory_budget": "1GB"}
# Of layers per span: segments of one, of some that do not divide the chain, more than there are,
# and a tower of levels.
LENGTHS = [(1,), (2,), (3,), (100,), (4, 2), (4, 2, 1)]
# What a budget excludes by itself, or what needs another settler.
NOT_WITHIN = {"limit", "up to three", "all sweeps, one"}
PLAIN = {
    name: replace(case, options={**case.options, **WITHIN})
    for name, case in FLAT.items()
    if name not in NOT_WITHIN and name != "other widths" and not case.remembers
}
OTHERS = {
    name: replace(LEFT[name], options={**LEFT[name].options, **WITHIN})
    for name in (
        "a step of its own", "double precision", "strided bias", "pooled", "other activation",
        "frozen weight", "not all", "autograd", "feedback", "muon", "constraint", "positions",
    )
} | {
    "five widths": Case(partial(net, 5, 8, 9, 10, 11, CLASSES), options=WITHIN),
    "dropout": Case(
        lambda: nn.Sequential(*net(5, 8, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, CLASSES)),
        options=WITHIN,
    ),
}  # fmt: skip


@pytest.fixture
def planned(monkeypatch):
    """Sets the plan, for compiled passes where there are some."""

    def by(*lengths):
        def plan(self, chain, x, target, updates, compiled):
            self._compiled = compiled is not None
            return Plan(0, len(chain), lengths, 0)

        monkeypatch.setattr(Budget, "_plan", plan)

    return by


@pytest.fixture
def walked(monkeypatch):
    """The kinds of segments that have been climbed."""
    found = set()
    for kind in (FlatSegments, BlockSegments):

        def noting(self, *rest, climb=kind.climb):
            found.add(type(self))
            return climb(self, *rest)

        monkeypatch.setattr(kind, "climb", noting)
    return found


def reference(case, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(FlatSegments, "of", lambda *_: None)
        return trained(case)


def compare(found, truth):
    assert found[-1] == truth[-1]
    for ours, theirs in zip(found[:-1], truth[:-1], strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", PLAIN)
def test_steps_are_the_reference_s(name, planned, walked, monkeypatch):
    planned(2)
    found = trained(PLAIN[name])
    assert walked == {FlatSegments}
    walked.clear()
    compare(found, reference(PLAIN[name], monkeypatch))
    assert walked == {BlockSegments}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("build", [net, partial(residual, nn.Tanh, 2)], ids=["plain", "skips"])
def test_any_plan_gives_the_same_steps(lengths, build, planned, walked, monkeypatch):
    planned(*lengths)
    case = Case(build, options=WITHIN)
    found = trained(case)
    assert walked == {FlatSegments}
    compare(found, reference(case, monkeypatch))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("teams", [True, False], ids=["teams", "no teams"])
@pytest.mark.parametrize("sizes", [(40, 96, 96, 96, 96, 10), (40, 96, 33, 96, 10)])
def test_threads_share_the_samples(threads, teams, sizes, planned, walked, monkeypatch):
    planned(2)
    case = Case(
        partial(net, *sizes), batches=(67, 67, 90), x=lambda b: torch.randn(b, 40), options=WITHIN
    )
    truth, found, asked = reference(case, monkeypatch), native(), []
    noted = lambda *a: asked.append(a[2]) or found.parallel(*a)  # noqa: E731
    own = replace(found, parallel=noted if teams else None)
    monkeypatch.setattr("mep.kernels.native", lambda: own)
    before = torch.get_num_threads()
    walked.clear()
    try:
        torch.set_num_threads(threads)
        compare(trained(case), truth)
    finally:
        torch.set_num_threads(before)
    assert walked == {FlatSegments} and bool(asked) == (teams and threads > 1)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_plain_is_left_to_the_reference(name, planned, walked, monkeypatch):
    planned(2)
    found = trained(OTHERS[name])
    assert walked == {BlockSegments}
    for ours, theirs in zip(found, reference(OTHERS[name], monkeypatch), strict=True):
        assert ours == theirs if isinstance(ours, list) else torch.equal(ours, theirs)


def test_eager_steps_are_the_reference_s(planned, walked, monkeypatch):
    planned(2)
    case = Case(options=WITHIN)
    with mep.kernels.eager():
        compare(trained(case), reference(case, monkeypatch))
    assert walked == {BlockSegments}


def test_checkpoints_of_half_the_digits_are_the_reference_s(planned, walked, monkeypatch):
    """Rounded states and errors are the same ones, but for a few at the edge between two values."""
    planned(4, 2)
    case = Case(options={**WITHIN, "state_dtype": torch.bfloat16})
    (seen, moved, _), (_, truth, _) = trained(case), reference(case, monkeypatch)
    assert walked == {FlatSegments, BlockSegments}
    exact = trained(Case(options=WITHIN))[1]
    assert (moved - truth).norm() < 0.1 * (moved - exact).norm()
    assert bool(seen.isfinite().all())


@pytest.mark.parametrize(
    "other",
    [lambda m: m.double(), lambda m: m.t().contiguous().t()], ids=["dtype", "strides"],
)  # fmt: skip
def test_momenta_of_another_kind_are_left_to_the_reference(other, planned, walked):
    planned(2)
    model = net()
    opt = optimizer(Case(options=WITHIN), model)
    opt.step(**batch())
    own = opt.state[model[2].weight]
    own["momentum_buffer"] = other(own["momentum_buffer"])
    walked.clear()
    try:
        opt.step(**batch())
    except RuntimeError as error:  # torch's own, of tensors that do not fit
        assert "dtype" in str(error)
    assert walked == {BlockSegments}


@pytest.mark.parametrize("bad", ["input", "features", "target"])
def test_bad_batches_change_nothing(bad, planned, walked):
    planned(2)
    model, each = net(), batch()
    opt = optimizer(Case(options=WITHIN), model)
    opt.step(**each)
    before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
    if bad == "target":
        each["target"][0] = CLASSES
    else:
        each["x"] = torch.full((6, 5), torch.inf) if bad == "input" else torch.randn(6, 4)
    with pytest.raises(ValueError, match=r"classes in|NaN or infinite|does not fit the model"):
        opt.step(**each)
    after = (model.state_dict(), opt.state_dict()["state"])
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert all(
        torch.equal(before[1][k]["momentum_buffer"], after[1][k]["momentum_buffer"])
        for k in before[1]
    )


@pytest.mark.filterwarnings("ignore:settling diverged")
def test_what_is_not_finite_is_refused_before_the_first_write(planned, walked):
    planned(1)
    model = net()
    model[4].bias.data[0] = torch.nan
    opt = optimizer(Case(options=WITHIN), model)
    before = flat(model.parameters()).detach().clone()
    opt.step(**batch())
    assert opt.last.status == "diverged" and opt.skipped == 1 and not walked
    assert torch.equal(before.nan_to_num(), flat(model.parameters()).detach().nan_to_num())


def test_a_segment_whose_gradient_may_overflow_does_not_learn(planned, walked):
    """Errors of 1e18 times activities of 1e21: the others learn, and the step counts as skipped."""
    planned(1)
    torch.manual_seed(0)
    model = net(5, 8, 8, CLASSES, activation=nn.ReLU)
    with torch.no_grad():
        model[0].weight.mul_(1e21)
        model[2].weight.mul_(1e-21)
        model[4].weight.mul_(1e18)
    opt = optimizer(Case(options={**WITHIN, "beta": 1e-30}), model)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step(**batch())
    assert walked == {FlatSegments} and opt.skipped == 1
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert not moved[2] and any(moved)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_graphs_notice_that_weights_have_moved(planned):
    planned(2)
    model = net()
    opt = optimizer(Case(options=WITHIN), model)
    loss = model(torch.randn(6, 5, requires_grad=True)).sum()
    opt.step(**batch())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_small_batches_that_bookkeeping_would_burst_are_left_to_the_reference(walked):
    """Of two samples of four units, a layer's addresses take more than its states."""
    model = mep.models.deep_mlp(60, 4, 5, CLASSES)
    x, y = torch.randn(2, 5), torch.tensor([0, 1])
    used = []
    for budget in ("13kB", "1200B"):
        opt = mep.EPOptimizer(model.parameters(), model=model, memory_budget=budget)
        opt.step(x=x, target=y)
        assert opt.plan.levels >= 1
        used.append(walked.copy())
        if used == [{FlatSegments}]:
            with mep.memory.track(model, opt, samples=2) as usage:
                opt.step(x=x, target=y)
            assert usage.extra <= opt.plan.peak <= opt.plan.budget
        walked.clear()
    assert used == [{FlatSegments}, {BlockSegments}]


def test_plan_stays_while_nothing_changes():
    model = mep.models.deep_mlp(60, 16, 5, CLASSES)
    opt = mep.EPOptimizer(model.parameters(), model=model, memory_budget="40kB", momentum=0.9)
    opt.step(**batch())
    first = opt.plan
    opt.step(**batch())
    assert opt.plan is first and first.levels >= 1 and opt._budget._compiled
    with mep.kernels.eager():
        opt.step(**batch())
    assert opt.plan is not first and not opt._budget._compiled


# --- what could go wrong with addresses ----------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "name", "shape"),
    [(2, "weight", (8, 40)), (2, "weight", (8, 2)), (4, "weight", (9, 8)), (2, "bias", (1,))],
)
def test_parameters_that_no_longer_fit_are_left_to_the_reference(layer, name, shape, walked):
    """They are looked at before every step, though the plan is an old one."""
    model = net(5, *[8] * 60, CLASSES)
    opt = optimizer(Case(options={"memory_budget": "20kB", "momentum": 0.0}), model)
    opt.step(**batch())
    assert walked == {FlatSegments}
    walked.clear()
    getattr(model[layer], name).data = torch.zeros(shape)
    if name == "bias":  # torch broadcasts it
        opt.step(**batch())
        assert walked == {BlockSegments}
    else:
        with pytest.raises(ValueError, match="does not fit the model"):
            opt.step(**batch())


class Turned(mep.energies.CrossEntropy):
    """A cost whose gradient lies in memory the other way round."""

    def gradient(self, s, target):
        return super().gradient(s, target).t().contiguous().t()


class Wide(mep.energies.CrossEntropy):
    """A cost whose gradient is of another type."""

    def gradient(self, s, target):
        return super().gradient(s, target).double()


def test_a_cost_s_gradient_may_lie_as_it_will(planned, walked, monkeypatch):
    planned(2)
    case = Case(options={**WITHIN, "cost": Turned()})
    compare(trained(case), reference(Case(options=WITHIN), monkeypatch))
    assert FlatSegments in walked


def test_a_cost_s_gradient_of_another_type_is_refused(planned):
    planned(2)
    model = net()
    opt = optimizer(Case(options={**WITHIN, "cost": Wide()}), model)
    before = flat(model.parameters()).detach().clone()
    with pytest.raises(TypeError, match=r"cost's gradient must be torch\.float32 on cpu"):
        opt.step(**batch())
    assert torch.equal(before, flat(model.parameters()))


@pytest.mark.parametrize("budget", [{}, WITHIN], ids=["plain", "within a budget"])
def test_default_device_is_no_matter(budget, planned):
    planned(2)
    model, each = net(), batch()
    twin = copy.deepcopy(model)
    opt, other = (optimizer(Case(options=budget), m) for m in (model, twin))
    other.step(**each)
    with torch.device("meta"):
        loss = opt.step(**each)
    assert loss.device.type == "cpu"
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


# --- memory --------------------------------------------------------------------------------------


def skipping(width):
    body = [
        mep.models.feedforward.Residual(nn.Sequential(nn.Tanh(), nn.Linear(width, width)))
        for _ in range(120)
    ]
    return nn.Sequential(nn.Linear(16, width), *body, nn.Tanh(), nn.Linear(width, CLASSES))


HEAVY = {
    "a group for every parameter": lambda: (
        mep.models.deep_mlp(300, 16, 16, CLASSES), torch.randn(8, 16), True
    ),
    "an input that is copied": lambda: (
        mep.models.deep_mlp(100, 16, 784, CLASSES), torch.randn(784, 16).t(), False
    ),
    "skips": lambda: (skipping(24), torch.randn(16, 16), False),
}  # fmt: skip


@pytest.mark.parametrize("name", HEAVY)
def test_plans_count_what_a_step_takes(name, walked):
    torch.manual_seed(0)
    model, x, apart = HEAVY[name]()
    groups = [{"params": [p]} for p in model.parameters()] if apart else model.parameters()
    y, budget = torch.randint(CLASSES, (len(x),)), 2 * x.nbytes + 120_000
    opt = mep.EPOptimizer(groups, model=model, lr=0.01, momentum=0.9, memory_budget=budget)
    opt.step(x=x, target=y)
    with mep.memory.track(model, opt, samples=len(x)) as usage:
        opt.step(x=x, target=y)
    assert walked == {FlatSegments} and opt.plan.levels >= 1
    assert 0.85 * opt.plan.peak <= usage.extra <= opt.plan.peak <= opt.plan.budget
