"""Flat steps against the reference: the same states, residuals and updates."""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from problems import CLASSES, flat
from torch import nn

import mep
import mep.kernels
from mep.energies import CrossEntropy
from mep.kernels.library import native
from mep.optim.flat import FlatSteps

pytestmark = pytest.mark.skipif(
    not mep.kernels.available() or native() is None, reason="nothing to compile, or to call"
)

# Roundings of 1e-7 through up to seven blocks and back, relative to the size of an update.
SINGLE = 2e-5
ONE = mep.Sweep(1, tol=1.0)  # the residual is not the matter


def net(*sizes, activation=nn.Tanh, bias=True):
    """Isometric, so that every layer moves."""
    sizes = sizes or (5, 8, 8, 8, 8, CLASSES)
    layers: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
    for n_in, n_out in pairwise(sizes[1:]):
        layers += [activation(), nn.Linear(n_in, n_out, bias=bias)]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, 1.0 if activation is nn.Tanh else 2**0.5)
    return nn.Sequential(*layers)


def residual(activation, every=1, ends=(5, 8)):
    """Skips around every so many of the hidden layers."""
    layers: list[nn.Module] = [nn.Linear(*ends)]
    for k in range(4):
        branch = nn.Sequential(activation(), nn.Linear(ends[1], ends[1]))
        layers.append(mep.models.feedforward.Residual(branch) if k % every == 0 else branch)
    return nn.Sequential(*layers, activation(), nn.Linear(ends[1], CLASSES))


def changed(change):
    model = net()
    change(model)
    return model


def by_layer(model):
    return [{"params": [*m.parameters()], "lr": 0.1 * (k + 1)} for k, m in enumerate(model[::2])]


def weights_and_biases(model):
    split = ([p for p in model.parameters() if p.dim() == d] for d in (2, 1))
    return [{"params": ps, "lr": lr} for ps, lr in zip(split, (0.1, 0.3), strict=True)]


@dataclass(frozen=True)
class Case:
    """A model, its groups, how it steps, and on batches of which sizes."""

    build: Callable[[], nn.Module] = net
    groups: Callable[[nn.Module], Any] = lambda model: model.parameters()
    options: dict[str, Any] = field(default_factory=dict)
    batches: tuple[int, ...] = (6, 6, 6)
    x: Callable[[int], torch.Tensor] = lambda batch: torch.randn(batch, 5)
    real: bool = False
    remembers: bool = False  # its first batch, as a finished task


RELU = partial(net, activation=nn.ReLU)
FLAT = {
    "tanh": Case(),
    "relu": Case(RELU),
    "two layers": Case(lambda: net(5, 8, CLASSES)),
    "three layers": Case(lambda: net(5, 8, 8, CLASSES)),
    "other widths": Case(lambda: net(5, 17, 6, 11, CLASSES)),
    "two activations": Case(
        lambda: nn.Sequential(*net(5, 8, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))
    ),
    "no bias": Case(partial(net, bias=False)),
    "residual": Case(partial(residual, nn.Tanh)),
    "residual, relu": Case(partial(residual, nn.ReLU)),
    "residual, some": Case(partial(residual, nn.Tanh, 2)),
    "residual, last": Case(
        lambda: nn.Sequential(
            nn.Linear(5, CLASSES),
            mep.models.feedforward.Residual(nn.Sequential(nn.Tanh(), nn.Linear(CLASSES, CLASSES))),
        )
    ),
    "negative view": Case(x=lambda b: torch._neg_view(torch.randn(b, 5))),
    "no momentum": Case(options={"momentum": 0.0, "weight_decay": 0.01}),
    "decoupled, no momentum": Case(
        options={"momentum": 0.0, "weight_decay": 0.01, "update": mep.SGD(decoupled=True)}
    ),
    "momentum for some": Case(
        groups=lambda m: [g | {"momentum": 0.3 * (k % 2)} for k, g in enumerate(by_layer(m))]
    ),
    "real targets": Case(options={"cost": "mse"}, real=True),
    "last of the same width": Case(lambda: net(5, 8, 8, 8, 8), options={"cost": "mse"}),
    "images": Case(
        lambda: nn.Sequential(nn.Flatten(), *net(6, 8, 8, 8, CLASSES)),
        x=lambda batch: torch.randn(batch, 1, 2, 3),
    ),
    "mse": Case(options={"cost": "mse"}),
    "limit": Case(options={"settler": mep.Limit()}),
    "stronger": Case(options={"beta": mep.AutoBeta(0.3)}),
    "fixed beta": Case(options={"beta": 0.02}),
    "up to three": Case(options={"settler": mep.Sweep(3, tol=0.5)}),
    "all sweeps, one": Case(options={"settler": mep.Sweep(1, tol=None)}),
    "nesterov": Case(options={"nesterov": True, "weight_decay": 0.01}),
    "decay": Case(options={"weight_decay": 0.01}),
    "decoupled": Case(options={"update": mep.SGD(decoupled=True), "weight_decay": 0.01}),
    "depth rule": Case(groups=lambda m: mep.param_groups(m, 0.2)),
    "group by layer": Case(groups=by_layer),
    "weights and biases": Case(groups=weights_and_biases),
    "empty group": Case(groups=lambda m: [{"params": []}, {"params": [*m.parameters()]}]),
    "other batch sizes": Case(batches=(6, 1, 9, 6)),
    "penalty, factors": Case(options={"penalty": mep.EWC(30.0, every=2)}, remembers=True),
    "penalty, depth rule": Case(
        groups=lambda m: mep.param_groups(m, 0.2),
        options={"penalty": mep.EWC(30.0, every=1)},
        remembers=True,
    ),
    "penalty, diagonal": Case(
        groups=lambda m: [g | {"momentum": 0.3 * (k % 2)} for k, g in enumerate(by_layer(m))],
        options={"penalty": mep.EWC(30.0, "diagonal")},
        remembers=True,
    ),
    "not contiguous": Case(x=lambda batch: torch.randn(5, batch).t()),
}


KINKS = partial(RELU, 5, *[32] * 6, CLASSES)
STRONG = {"settler": mep.Sweep(4, tol=1e-6), "beta": 0.5}
FURTHER = {
    "tanh": Case(options=STRONG),
    "until settled": Case(options={"settler": mep.Sweep(4, tol=1e-5)}),
    "relu": Case(RELU, options=STRONG),
    "relu, all sweeps": Case(RELU, options={"settler": mep.Sweep(3, tol=None)}),
    "relu, mse": Case(RELU, options={"cost": "mse", **STRONG, "beta": 0.1}),
    "relu, on kinks": Case(KINKS, options=STRONG, batches=(64,)),
    "relu, other widths": Case(lambda: RELU(5, 17, 6, 11, CLASSES), options=STRONG),
    "two activations": Case(FLAT["two activations"].build, options=STRONG),
    "residual": Case(partial(residual, nn.Tanh), options=STRONG),
    "residual, relu": Case(partial(residual, nn.ReLU), options=STRONG),
    "residual, relu, some": Case(partial(residual, nn.ReLU, 2), options=STRONG),
    "residual, last": Case(FLAT["residual, last"].build, options=STRONG),
    "no bias, no momentum": Case(partial(net, bias=False), options={"momentum": 0.0, **STRONG}),
    "other batch sizes": Case(RELU, options=STRONG, batches=(6, 1, 9, 6)),
}


DESCENT = {
    "tanh": Case(options={"settler": mep.GradientDescent(10)}),
    "relu": Case(RELU, options={"settler": mep.GradientDescent(10, lr=0.1, momentum=0.8)}),
    "no momentum": Case(options={"settler": mep.GradientDescent(5, momentum=0.0), "beta": 0.1}),
    "two activations": Case(
        FLAT["two activations"].build, options={"settler": mep.GradientDescent(7)}
    ),
    "other widths": Case(
        lambda: net(5, 17, 6, 11, CLASSES), options={"settler": mep.GradientDescent(10)}
    ),
    "residual, some": Case(
        partial(residual, nn.ReLU, 2), options={"settler": mep.GradientDescent(10, lr=0.1)}
    ),
    "residual, last": Case(
        FLAT["residual, last"].build, options={"settler": mep.GradientDescent(10)}
    ),
    "mse": Case(options={"cost": "mse", "settler": mep.GradientDescent(10)}),
    "until settled": Case(options={"settler": mep.GradientDescent(200, tol=0.3)}),
    "until it stalls": Case(
        options={"settler": mep.GradientDescent(200, lr=0.7, momentum=0.9, tol=1e-6, patience=3)}
    ),
    "other batch sizes": Case(options={"settler": mep.GradientDescent(10)}, batches=(6, 1, 9, 6)),
}


class Halved(mep.SGD):
    """A rule with a step of its own."""

    def step(self, parameters, gradients, states, group):
        super().step(parameters, gradients, states, group | {"lr": group["lr"] / 2})


LEFT = {
    "a step of its own": Case(options={"update": Halved()}),
    "double precision": Case(lambda: net().double(), x=lambda b: torch.randn(b, 5).double()),
    "no units": Case(
        lambda: nn.Sequential(
            nn.Linear(5, 0), nn.Tanh(), nn.Linear(0, 8), nn.Tanh(), nn.Linear(8, CLASSES)
        )
    ),
    "33 classes": Case(lambda: net(5, 8, 8, 33)),
    "some classes": Case(options={"cost": CrossEntropy(classes=(0, 1, 2, 3))}),
    "strided bias": Case(
        partial(changed, lambda m: setattr(m[4], "bias", nn.Parameter(torch.randn(16)[::2])))
    ),
    "pooled": Case(
        lambda: nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), *net(6, 8, 8, CLASSES)),
        x=lambda b: torch.randn(b, 1, 4, 6),
    ),
    "other activation": Case(partial(net, activation=nn.GELU)),
    "frozen weight": Case(partial(changed, lambda m: m[4].weight.requires_grad_(False))),
    "tied weight": Case(partial(changed, lambda m: setattr(m[6], "weight", m[2].weight))),
    "not all": Case(groups=lambda m: [*m.parameters()][2:]),
    "centered": Case(options={"stencil": mep.centered}),
    "KL": Case(options={"energy": mep.PredictionError(mep.KL())}),
    "autograd": Case(options={"gradient_method": "autograd"}),
    "feedback": Case(options={"settler": mep.Sweep(1, feedback="random")}),
    "too few steps": Case(options={"settler": mep.GradientDescent(4)}),
    "signals underflow": Case(
        lambda: net(*[5] + [8] * 79, CLASSES),
        options={"settler": mep.GradientDescent(80, lr=0.1, momentum=0.0)},
    ),
    "stops before all layers": Case(options={"settler": mep.GradientDescent(9, tol=0.95)}),
    "clipped": Case(options={"clip_norm": 0.1}),
    "muon": Case(options={"update": mep.Route(mep.Muon(ns_dtype=None))}),
    "constraint": Case(options={"constraint": mep.SpectralNorm()}),
    "penalty": Case(options={"penalty": mep.SynapticIntelligence(1.0)}),
    "blockwise": Case(options={"blockwise": True}),
    "positions": Case(
        lambda: net(5, 8, 8, 8, 5), options={"cost": "mse"}, x=lambda b: torch.randn(b, 3, 5)
    ),
}  # fmt: skip


def optimizer(case, model):
    options = {"settler": ONE, "lr": 0.2, "momentum": 0.9} | case.options
    return mep.EPOptimizer(case.groups(model), model=model, **options)


def trained(case):
    """What some steps return, how they move the parameters with the momenta left, and verdicts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.build()
        opt, seen, moved, verdicts = optimizer(case, model), [], [], []
        for size in case.batches:
            x, y = case.x(size), torch.randint(0, CLASSES, (size,))
            y = torch.randn(size, CLASSES) if case.real else y
            before = flat(model.parameters()).detach().clone()
            seen.append(opt.step(x=x, target=x if x.dim() == 3 else y).reshape(1))
            seen += [opt.last.residual, opt.last.balance.nudge]
            verdicts.append((opt.last.status, opt.last.sweeps))
            moved.append(flat(model.parameters()).detach() - before)
            if case.remembers and len(moved) == 1:
                opt.consolidate([(x, y)])
    momenta = [opt.state[p].get("momentum_buffer") for p in model.parameters()]
    moved += [m.flatten() for m in momenta if m is not None]
    return flat(seen).double(), flat(moved).double(), verdicts


def assert_same(found, truth):
    assert (found - truth).norm() <= SINGLE * truth.norm()


@pytest.fixture
def taken(monkeypatch):
    """Whether steps were flat, one after the other."""
    found, original = [], FlatSteps.take

    def noting(self, *rest):
        estimate = original(self, *rest)
        found.append(estimate is not None)
        return estimate

    monkeypatch.setattr(FlatSteps, "take", noting)
    return found


def reference(case, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(FlatSteps, "take", lambda *_: None)
        return trained(case)


@pytest.mark.parametrize("case", FLAT.values(), ids=FLAT)
def test_flat_step_is_the_reference_s(case, taken, monkeypatch):
    found = trained(case)
    assert taken == [True] * len(case.batches)
    *numbers, verdicts = reference(case, monkeypatch)
    assert found[-1] == verdicts
    for ours, theirs in zip(found[:-1], numbers, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("case", FURTHER.values(), ids=FURTHER)
def test_further_sweeps_are_the_reference_s(case, taken, monkeypatch):
    test_flat_step_is_the_reference_s(case, taken, monkeypatch)
    assert max(sweeps for _, sweeps in trained(case)[-1]) > 1


@pytest.mark.parametrize("case", DESCENT.values(), ids=DESCENT)
def test_descent_is_the_reference_s(case, taken, monkeypatch):
    test_flat_step_is_the_reference_s(case, taken, monkeypatch)


@pytest.mark.filterwarnings("ignore:settling diverged")
def test_descent_that_diverges_changes_nothing(taken):
    model = net()
    settler = mep.GradientDescent(60, lr=3.0)
    opt = optimizer(Case(options={"settler": settler}), model)
    before = flat(model.parameters()).detach().clone()
    opt.step(**batch())
    assert opt.skipped == 1 and opt.last.status == "diverged" and taken == [False]
    assert torch.equal(flat(model.parameters()), before)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("teams", [True, False], ids=["teams", "no teams"])
@pytest.mark.parametrize("sizes", [(40, 96, 96, 96, 10), (40, 96, 33, 70, 10), ()])
@pytest.mark.parametrize(
    "more",
    [{}, STRONG, {"settler": mep.GradientDescent(10)}],
    ids=["one sweep", "several", "descent"],
)
def test_threads_share_the_samples(threads, teams, sizes, more, monkeypatch, taken):
    """Where there is work for several, with and without a way to call them together."""
    build = partial(net, *sizes) if sizes else partial(residual, nn.Tanh, ends=(40, 96))
    case = Case(build, options=more, batches=(37, 37, 50), x=lambda b: torch.randn(b, 40))
    truth = reference(case, monkeypatch)
    found, asked = native(), []
    original = found.parallel
    noted = lambda *a: asked.append(a[2]) or original(*a)  # noqa: E731
    own = replace(found, parallel=noted if teams else None)
    monkeypatch.setattr("mep.kernels.native", lambda: own)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        seen, moved, verdicts = trained(case)
    finally:
        torch.set_num_threads(before)
    assert all(taken) and verdicts == truth[2]
    assert_same(seen, truth[0])
    assert_same(moved, truth[1])
    assert bool(asked) == (teams and threads > 1) and {*asked} <= {2, threads}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.filterwarnings("ignore:.*layers get no signal")
@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_plain_is_left_to_the_reference(name, taken, monkeypatch):
    found = trained(LEFT[name])
    assert not any(taken)
    *numbers, verdicts = reference(LEFT[name], monkeypatch)
    assert found[-1] == verdicts
    for ours, theirs in zip(found[:-1], numbers, strict=True):
        assert torch.equal(ours, theirs)  # what had been tried left no trace


def batch():
    return {"x": torch.randn(6, 5), "target": torch.randint(0, CLASSES, (6,))}


def test_eager_steps_are_the_reference_s(taken, monkeypatch):
    with mep.kernels.eager():
        found = trained(Case())
    assert not any(taken)
    truth = reference(Case(), monkeypatch)
    assert_same(found[0], truth[0])


@pytest.mark.parametrize(
    "other",
    [lambda m: m.double(), lambda m: m.t().contiguous().t(), lambda m: m[..., :1].clone()],
    ids=["dtype", "strides", "shape"],
)
def test_momenta_of_another_kind_are_left_to_the_reference(other, taken):
    """Nothing is written where they do not reach."""
    model = net()
    opt = optimizer(Case(), model)
    opt.step(**batch())
    own = opt.state[model[2].weight]
    own["momentum_buffer"] = other(own["momentum_buffer"])
    with contextlib.suppress(RuntimeError):  # torch's own, of tensors that do not fit
        opt.step(**batch())
    assert taken[0] and not any(taken[1:])


def test_momenta_of_a_layer_that_has_grown_are_left_to_the_reference(taken):
    """Addresses are as old as the tensors, whose sizes may be newer."""
    model = net()
    opt = optimizer(Case(), model)
    for _ in range(2):
        opt.step(**batch())
    model[2].weight.data, model[2].bias.data = torch.randn(64, 8), torch.randn(64)
    model[4].weight.data = torch.randn(8, 64)
    own = opt.state[model[2].weight]["momentum_buffer"]
    before = own.clone()
    with contextlib.suppress(RuntimeError):  # torch's own, of tensors that do not fit
        opt.step(**batch())
    assert taken[:2] == [True, True] and not any(taken[2:]) and torch.equal(own, before)


@pytest.mark.parametrize("count", [1, 2, 7, 128])
@pytest.mark.parametrize("kind", ["random", "sorted", "reversed", "equal", "ties"])
def test_median_is_torch_s(count, kind):
    from mep.kernels.sweep import _median

    torch.manual_seed(0)
    x = {
        "random": lambda: torch.randn(count),
        "sorted": lambda: torch.arange(count).float(),
        "reversed": lambda: -torch.arange(count).float(),
        "equal": lambda: torch.ones(count),
        "ties": lambda: torch.randint(3, (count,)).float(),
    }[kind]()
    before, room = x.clone(), torch.empty(count)
    assert _median(x.data_ptr(), room.data_ptr(), count) == float(x.median())
    assert torch.equal(x, before)


@pytest.mark.filterwarnings("ignore:settling diverged")
@pytest.mark.parametrize("where", ["classes", "state", "nudged"])
def test_threads_agree_on_what_is_not_sound(where, taken):
    """None of them waits for one that has given up."""
    model = net(40, 96, 96, 96, 10, activation=nn.ReLU)
    settler = mep.Sweep(1, tol=1.0)
    opt = optimizer(Case(options={"settler": settler, "beta": 1e30}), model)
    if where != "nudged":  # where all is well until the states are nudged
        opt = optimizer(Case(options={"settler": settler}), model)
    x, y = torch.randn(64, 40), torch.randint(0, 10, (64,))
    if where == "state":
        x[-1] = 1e38
    if where == "classes":
        y[-1] = 10
    before, threads = flat(model.parameters()).detach().clone(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for _ in range(20):
            with pytest.raises(ValueError) if where == "classes" else contextlib.nullcontext():
                opt.step(x=x, target=y)
            opt.skipped_in_a_row = 0
    finally:
        torch.set_num_threads(threads)
    assert not any(taken) and torch.equal(flat(model.parameters()), before)


def test_losses_have_memory_of_their_own():
    opt = optimizer(Case(), net())
    losses = [opt.step(**batch()) for _ in range(3)]
    assert all(loss.untyped_storage().nbytes() == 4 for loss in losses)
    assert len({loss.data_ptr() for loss in losses}) == 3


def test_empty_batches_are_refused(taken):
    opt = optimizer(Case(), net())
    with pytest.raises(ValueError, match="is empty"):
        opt.step(x=torch.zeros(0, 5), target=torch.zeros(0, dtype=torch.long))
    assert taken == [False]


def test_graphs_notice_that_weights_have_moved(taken):
    model = net()
    opt = optimizer(Case(), model)
    loss = model(torch.randn(6, 5, requires_grad=True)).sum()
    opt.step(**batch())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert all(taken)


def test_units_rest_on_their_kinks():
    """What ramps are solved exactly for is there in the cases above."""
    torch.manual_seed(0)
    model, x, y = KINKS(), torch.randn(64, 5), torch.randint(0, CLASSES, (64,))
    found = mep.settle(model, x, y, **STRONG).configuration
    pairs = zip(found.free, found.displacements, strict=True)
    assert sum(int((s + d == 0).sum()) for s, d in pairs) > 100


def test_room_for_further_sweeps_is_made_when_it_is_needed(taken):
    """And part of the state: a run that is resumed has it from its first step on."""
    opt = optimizer(FURTHER["relu"], RELU())
    assert not opt.room.further
    opt.step(**batch())
    assert opt.room.further and opt.last.sweeps > 1
    other = optimizer(Case(), net())
    other.load_state_dict(opt.state_dict())
    assert opt.room == other.room == copy.deepcopy(opt).room
    opt = optimizer(Case(options={"settler": mep.Sweep(3, tol=1.0)}), net())
    opt.step(**batch())
    assert opt.last.sweeps == 1 and not opt.room.further and all(taken)


def test_what_one_sweep_settles_learns_in_the_same_call(monkeypatch):
    """Once there are momenta, and unless somebody looks on."""
    from mep.kernels.captured import Captured

    apart, original = [], Captured.learn
    monkeypatch.setattr(Captured, "learn", lambda self: apart.append(self) or original(self))
    for options, steps in (({}, 1), ({"momentum": 0.0}, 0), (STRONG, 4), ({"beta": 0.02}, 1)):
        opt = optimizer(Case(options=options), net())
        apart.clear()
        for _ in range(3):
            opt.step(**batch())
        with mep.memory.track():
            opt.step(**batch())
        assert len(apart) == min(steps + 1, 4)


def test_default_dtype_is_no_matter(taken):
    model, each, before = net(), batch(), torch.get_default_dtype()
    twin = copy.deepcopy(model)
    opt, other = optimizer(Case(), model), optimizer(Case(), twin)
    other.step(**each)
    try:
        torch.set_default_dtype(torch.float64)
        opt.step(**each)
    finally:
        torch.set_default_dtype(before)
    assert taken == [True, True] and opt.last.residual.dtype == torch.float32
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))


def test_changes_of_the_model_are_seen(taken):
    """A parameter that is frozen, thawed and replaced; each is noticed at the next step."""
    model = net()
    opt = optimizer(Case(), model)
    frozen = model[2].weight
    before = frozen.detach().clone()
    opt.step(**batch())
    assert not torch.equal(frozen, before)
    before = frozen.detach().clone()
    frozen.requires_grad_(False)
    opt.step(**batch())
    assert torch.equal(frozen, before)
    frozen.requires_grad_(True)
    opt.step(**batch())
    model[4].weight = nn.Parameter(model[4].weight.detach().clone())  # in no group
    other = model[4].weight.detach().clone()
    opt.step(**batch())
    assert torch.equal(model[4].weight, other)
    opt.add_param_group({"params": [model[4].weight]})
    opt.step(**batch())
    assert not torch.equal(model[4].weight, other)
    assert taken == [True, False, True, False, True]


def test_changes_of_the_groups_are_seen(taken):
    """A weight that is moved to another group, and then taken out."""
    model = net()
    opt = optimizer(Case(), model)
    opt.step(**batch())
    weight, before = model[2].weight, model[2].weight.detach().clone()
    opt.param_groups[0]["params"] = [p for p in model.parameters() if p is not weight]
    opt.param_groups.append({**opt.param_groups[0], "params": [weight], "lr": 0.0})
    opt.step(**batch())
    assert torch.equal(weight, before)
    del opt.param_groups[1]
    opt.step(**batch())
    assert torch.equal(weight, before) and taken == [True, True, False]


@pytest.mark.filterwarnings("ignore:.*layers get no signal")
@pytest.mark.parametrize("settler", [ONE, mep.Limit(), mep.GradientDescent(10)], ids=repr)
@pytest.mark.parametrize("label", [-1, CLASSES, 2**40])
def test_classes_that_there_are_not_are_refused(label, settler, taken):
    """By whichever thread comes upon them."""
    model = net(40, 96, 96, CLASSES)
    opt = optimizer(Case(options={"settler": settler}), model)
    x, y = torch.randn(64, 40), torch.randint(0, CLASSES, (64,))
    opt.step(x=x, target=y)
    assert taken == [True]
    before = flat(model.parameters()).detach().clone()
    known = torch.get_num_threads()
    try:
        for threads, place in ((1, 0), (2, 0), (2, 63), (3, 31)):
            torch.set_num_threads(threads)
            wrong = y.clone()
            wrong[place] = label
            with pytest.raises(ValueError, match="must hold classes in"):
                opt.step(x=x, target=wrong)
    finally:
        torch.set_num_threads(known)
    assert torch.equal(flat(model.parameters()), before)
    opt.step(x=x, target=y.int())
    assert taken == [True, *[False] * 4, True]


def test_steps_that_do_without_buffers_keep_none():
    model = net()
    opt = optimizer(Case(), model)
    model[0].weight.requires_grad_(False)
    opt.step(**batch())
    assert opt._buffers._shelves
    model[0].weight.requires_grad_(True)
    opt.step(**batch())
    assert not opt._buffers._shelves


def test_momentum_that_is_none_is_none_yet(taken):
    """As torch's SGD leaves it in the state where there was no momentum."""
    found = []
    for empty in (True, False):
        torch.manual_seed(0)
        model = net()
        opt = optimizer(Case(), model)
        if empty:
            for p in model.parameters():
                opt.state[p]["momentum_buffer"] = None
        opt.step(**batch())
        found.append(flat(model.parameters()).detach().clone())
    assert torch.equal(*found) and all(taken)


@pytest.mark.parametrize("bad", [float("nan"), 1e30])
@pytest.mark.filterwarnings("ignore:settling diverged")
def test_what_is_not_finite_changes_nothing(bad, taken):
    model = net()
    opt = optimizer(Case(), model)
    opt.step(**batch())
    with torch.no_grad():
        model[0].bias[0] = bad if bad != bad else 0.0
        model[-1].weight[0, 0] = 1e38 if bad == bad else model[-1].weight[0, 0]
    before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
    opt.step(**batch())
    assert opt.skipped == 1 and taken == [True, False]
    after = (model.state_dict(), opt.state_dict()["state"])
    pairs = zip(before[0].values(), after[0].values(), strict=True)
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in pairs)
    assert all(
        torch.equal(before[1][k]["momentum_buffer"], after[1][k]["momentum_buffer"])
        for k in after[1]
    )


@pytest.mark.parametrize("copied", [False, True], ids=["loaded", "deep copy"])
@pytest.mark.parametrize(
    "more",
    [{}, {"settler": mep.Sweep(4, tol=0.0172)}, {"penalty": mep.EWC(30.0, every=4)}],
    ids=["one sweep", "one or two", "penalty"],
)
def test_run_goes_on_bitwise(copied, more, tmp_path, taken):
    torch.manual_seed(0)
    model, batches = net(), [batch() for _ in range(6)]
    case = Case(groups=lambda m: mep.param_groups(m, 0.2), options=more)
    opt = optimizer(case, model)
    for k, each in enumerate(batches[:3]):
        opt.step(**each)
        if k == 0 and opt.penalty is not None:
            opt.consolidate([(each["x"], each["target"])])
    if copied:
        other_model, other = copy.deepcopy((model, opt))
    else:
        torch.save([model.state_dict(), opt.state_dict()], tmp_path / "run.pt")
        other_model = net()
        other = optimizer(case, other_model)
        states = torch.load(tmp_path / "run.pt", weights_only=True)
        other_model.load_state_dict(states[0])
        other.load_state_dict(states[1])
    sweeps = []
    for each in batches[3:]:
        assert torch.equal(opt.step(**each), other.step(**each))
        sweeps.append(opt.last.sweeps)
    assert 1 in sweeps and opt.room.further == ("settler" in more)  # not every one would make room
    assert torch.equal(flat(model.parameters()), flat(other_model.parameters()))
    assert all(taken)


def test_momenta_lie_in_a_row_and_are_the_state_s(monkeypatch):
    """Of the reference: one product adds to all, and states show parts of one tensor."""
    monkeypatch.setattr(FlatSteps, "take", lambda *_: None)
    model = net()
    opt = optimizer(Case(), model)
    opt.step(**batch())
    first = [opt.state[model[k].weight]["momentum_buffer"] for k in (2, 4)]
    assert len({m.untyped_storage().data_ptr() for m in first}) == 1
    opt.step(**batch())
    again = [opt.state[model[k].weight]["momentum_buffer"] for k in (2, 4)]
    assert all(a is b for a, b in zip(first, again, strict=True))


def test_step_allocates_no_gradient():
    model = net(5, *[16] * 40, CLASSES)
    opt = optimizer(Case(), model)
    for _ in range(2):
        opt.step(**batch())
    with mep.memory.track(model, opt) as usage:
        opt.step(**batch())
    assert usage.peak["gradients"] == 0
