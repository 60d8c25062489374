"""Errors that descend by matrices of their own: fixed ones, and ones that align."""

import copy
from dataclasses import replace

import pytest
import torch
from problems import problem, tanh_problem
from small_training import batch_of, distance, identical, network, train, weights
from torch import nn
from torch.nn import functional as F

import mep
from mep.contrast import free_phase, settings
from mep.settling import settle

# Residuals are settled to 1e-13 of the nudge; float64 rounding of short sums is below.
SAME = 1e-12
RANDOM = mep.Sweep(300, tol=1e-13, feedback="random")
POLLACK = mep.Sweep(feedback="kolen-pollack")


def optimizer(model, settler=RANDOM, **options):
    return mep.EPOptimizer(model.parameters(), model=model, settler=settler, **options)


def matrices(model, opt):
    """Weights and their feedback, from the second block on."""
    found = [p for p in model.parameters() if "feedback" in opt.state[p]]
    return found, [opt.state[p]["feedback"] for p in found]


def settled(model, x, y, feedback, beta, **options):
    how = settings(settler=RANDOM, beta=beta, **options)
    own = {id(p): b for p, b in feedback}
    with torch.no_grad():
        free = free_phase(model, x, y, how, own)
        return settle(how.energy.nudged(free, beta), RANDOM)


# --- the transpose is the default ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "convolutional", "residual"])
def test_transpose_is_bitwise_the_default(name):
    found = []
    for settler in (mep.Sweep(), mep.Sweep(feedback="transpose"), None):
        p = problem(name)
        opt = optimizer(p.model, settler, momentum=0.9)
        losses = [opt.step(x=p.x, target=p.y) for _ in range(3)]
        assert not any("feedback" in state for state in opt.state.values())
        found.append([*weights(p.model), *losses])
    assert identical(found[0], found[1]) and identical(found[0], found[2])


@pytest.mark.parametrize("name", ["mlp", "convolutional"])
@pytest.mark.parametrize("sweeps", [1, 3, 300])
def test_feedback_that_is_the_weight_gives_the_same_update(name, sweeps):
    found = []
    for feedback in ("transpose", "random"):
        p = problem(name)
        opt = optimizer(p.model, mep.Sweep(sweeps, tol=1e-13, feedback=feedback))
        for state_of, b in zip(*matrices(p.model, opt), strict=True):
            b.copy_(state_of.detach())
        opt.step(x=p.x, target=p.y)
        found.append(weights(p.model))
    assert identical(*found)


def test_every_kind_of_feedback_has_a_result_of_its_own():
    found = []
    for feedback in ("transpose", "random", "kolen-pollack"):
        model = network()
        train(optimizer(model, mep.Sweep(feedback=feedback), weight_decay=0.1), 4, batch_of())
        found.append(weights(model))
    assert all(distance(found[i], found[j]) > 1e-5 for i, j in ((0, 1), (0, 2), (1, 2)))


# --- random feedback -----------------------------------------------------------------------------


def test_matrices_are_drawn_once_for_all_and_never_change():
    model, twin = network(), network()
    opt, other = optimizer(model, momentum=0.9), optimizer(twin)
    torch.manual_seed(5)
    ws, bs = matrices(model, opt)
    assert [w.shape for w in ws] == [(6, 8), (3, 6)]  # the first block sends no error down
    before = [b.clone() for b in bs]
    assert identical(before, matrices(twin, other)[1])
    train(opt, 5, batch_of())
    assert identical(before, matrices(model, opt)[1])
    assert all(b.abs().max() > 0 for b in before)


def test_matrices_have_the_size_of_the_weights_and_nothing_else_of_them():
    model = tanh_problem([60, 80, 70, 90]).model
    with torch.no_grad():
        model[4].weight.mul_(100)
    state = torch.get_rng_state()
    ws, bs = matrices(model, optimizer(model))
    assert torch.equal(state, torch.get_rng_state())  # the user's random numbers stay his
    for w, b in zip(ws, bs, strict=True):
        # thousands of normal numbers: their mean square is theirs within 1.4 %, their overlap 1 %
        ratio = float(b.square().mean() / w.detach().square().mean())
        assert abs(ratio - 1) < 0.1 and abs(float(b.mean())) < 0.05 * float(b.std())
        assert abs(F.cosine_similarity(w.flatten(), b.flatten(), dim=0)) < 0.05
    normal = [b / b.norm() for b in bs]
    overlap = (normal[0][:70, :70] * normal[1][:70, :70]).sum()
    assert abs(overlap) < 0.05  # of two layers they are two


def by_hand(model, bs, x, y, beta, rounds=300):
    """Activities and errors per unit of beta: ``e_i = phi'(s_i) (e_{i+1} B_{i+1})``."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    errors = [torch.zeros(len(x), layer.out_features).double() for layer in layers]
    one_hot = F.one_hot(y, layers[-1].out_features)
    for _ in range(rounds):
        a, states, activities = x, [], []
        for layer, e in zip(layers, errors, strict=True):
            activities.append(a)
            states.append(a @ layer.weight.T + layer.bias + beta * e)
            a = torch.tanh(states[-1])
        errors[-1] = one_hot - torch.softmax(states[-1], 1)
        for i in reversed(range(len(bs))):
            errors[i] = (1 - torch.tanh(states[i]) ** 2) * (errors[i + 1] @ bs[i])
    return activities, errors, states


@torch.no_grad()
def test_settled_errors_and_update_are_those_of_the_vector_field():
    p, beta = tanh_problem([5, 8, 7, 6, 4], batch=6), 0.1
    opt = optimizer(p.model, beta=beta, lr=0.2)
    ws, bs = matrices(p.model, opt)
    activities, errors, states = by_hand(p.model, bs, p.x, p.y, beta)
    at = settled(p.model, p.x, p.y, zip(ws, bs, strict=True), beta)
    assert at.status == "converged"
    assert distance(at.states, states) < SAME
    assert distance(at.configuration.local_errors(), errors) < SAME
    for i, b in enumerate(bs):  # the field itself, at the states that were found
        e, above = at.configuration.errors[i : i + 2]
        assert distance([e], [(1 - torch.tanh(at.states[i]) ** 2) * (above @ b)]) < SAME
        assert e.abs().max() > 1e-3
    expected = []
    for layer, a, e in zip([p.model[k] for k in (0, 2, 4, 6)], activities, errors, strict=True):
        expected += [layer.weight + 0.2 * e.T @ a / 6, layer.bias + 0.2 * e.mean(0)]
    opt.step(x=p.x, target=p.y)
    assert distance(weights(p.model), expected) < SAME


CONVS = [{}, {"padding": 1}, {"stride": 2}, {"dilation": 2}, {"groups": 2}]


@pytest.mark.parametrize("options", CONVS, ids=str)
def test_feedback_kernel_is_the_adjoint_of_its_convolution(options):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 4, 3, **options)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), conv).double()
    x = torch.randn(3, 1, 8, 9, dtype=torch.float64)
    y = torch.randn(model(x).shape).double()
    ((w,), (b,)) = matrices(model, optimizer(model, cost="mse"))
    assert w is conv.weight and b.shape == w.shape
    at = settled(model, x, y, [(w, b)], 0.1, cost="mse")
    s = at.states[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        F.conv2d(torch.tanh(s), b, **options), s, at.configuration.local_errors()[1]
    )
    assert distance([at.configuration.errors[0]], [expected]) < SAME
    assert expected.abs().max() > 1e-2


# --- Kolen-Pollack -------------------------------------------------------------------------------


@pytest.mark.parametrize("blockwise", [False, True])
def test_weights_and_feedback_take_equal_updates(blockwise):
    """What is left of their difference shrinks by ``1 - lr lambda`` a step, exactly."""
    model = network()
    settler = mep.Sweep(1, feedback="kolen-pollack")
    opt = optimizer(model, settler, lr=0.1, weight_decay=0.3, blockwise=blockwise)
    ws, bs = matrices(model, opt)
    for _ in range(4):
        apart = [(b - w).detach() for w, b in zip(ws, bs, strict=True)]
        kept = [b.clone() for b in bs]
        train(opt, 1, batch_of())
        now = [(b - w).detach() for w, b in zip(ws, bs, strict=True)]
        assert distance(now, [(1 - 0.1 * 0.3) * d for d in apart]) < 1e-15
        assert distance(bs, [(1 - 0.1 * 0.3) * b for b in kept]) > 1e-4  # the gradient is there


RULES = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decoupled": {"momentum": 0.9, "update": mep.SGD(decoupled=True)},
    "normalised": {"momentum": 0.9, "update": mep.Normalised()},
    "muon": {"momentum": 0.9, "update": mep.Route(mep.Muon(ns_dtype=None))},
    "clipped": {"momentum": 0.9, "clip_norm": 0.1},
    "dion": {"momentum": 0.9, "update": mep.Route(mep.Dion())},
}


@pytest.mark.parametrize("name", RULES)
def test_difference_is_forgotten_under_every_rule(name):
    """0.9 after ten steps of ``lr lambda = 0.02`` with momentum, 0.82 without."""
    model = network()
    opt = optimizer(model, POLLACK, lr=0.1, weight_decay=0.2, **RULES[name])
    ws, bs = matrices(model, opt)
    apart = [(b - w).detach() for w, b in zip(ws, bs, strict=True)]
    train(opt, 10, batch_of())
    now = [(b - w).detach() for w, b in zip(ws, bs, strict=True)]
    for before, after in zip(apart, now, strict=True):
        assert after.norm() < 0.9 * before.norm()
        # the direction is the old one: nothing but the start was ever different
        assert F.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 1 - 1e-9


def cosine(a, b):
    return float(F.cosine_similarity(a.detach().flatten(), b.flatten(), dim=0))


def test_digits_are_learned_and_feedback_aligns():
    data = mep.data.load("digits")
    torch.manual_seed(0)
    model = mep.models.mlp(64, [64], 10)
    opt = optimizer(model, POLLACK, lr=0.1, momentum=0.9, weight_decay=1e-2)
    (w,), (b,) = matrices(model, opt)
    assert abs(cosine(w, b)) < 0.2
    epochs, random = 10, torch.Generator().manual_seed(0)
    steps = epochs * -(-len(data.y_train) // 32)
    rates = torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, steps, cycle_momentum=False)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.y_train), generator=random).split(32):
            opt.step(x=data.x_train[batch], target=data.y_train[batch])
            rates.step()
    accuracy = (model(data.x_test).argmax(1) == data.y_test).double().mean()
    assert accuracy >= 0.95 and opt.skipped == 0
    assert cosine(w, b) > 0.9


@pytest.mark.parametrize("feedback", ["random", "kolen-pollack"])
@pytest.mark.parametrize("rule", [None, mep.Route(mep.Muon()), mep.Route(mep.Dion(0.5))], ids=str)
def test_saved_run_continues_bitwise(tmp_path, feedback, rule):
    def start(seed):
        model = network(seed=seed)
        settler = mep.Sweep(feedback=feedback)
        options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "update": rule}
        return model, optimizer(model, settler, **options)

    (model, opt), (other, other_opt) = start(0), start(9)
    train(opt, 3, batch_of())
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["opt"])
    twin = copy.deepcopy(opt)
    for each in (opt, other_opt, twin):
        train(each, 3, batch_of())
    for a, b in ((other, other_opt), (twin.model, twin)):
        assert identical(weights(a), weights(model))
        assert identical(matrices(a, b)[1], matrices(model, opt)[1])


# --- refusals ------------------------------------------------------------------------------------


def test_feedback_of_another_name_is_refused():
    with pytest.raises(ValueError, match=r"`Sweep\(feedback=...\)` must be one of .*got 'fixed'"):
        mep.Sweep(feedback="fixed")


NEEDS_DECAY = "`feedback='kolen-pollack'` needs `weight_decay` > 0"


def test_kolen_pollack_without_weight_decay_is_refused():
    with pytest.raises(ValueError, match=NEEDS_DECAY):
        optimizer(network(), POLLACK)


def test_kolen_pollack_without_decay_of_the_weights_is_refused():
    """Biases forget, but they have no feedback."""
    model = network()
    split = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.1},
    ]
    with pytest.raises(ValueError, match=NEEDS_DECAY):
        mep.EPOptimizer(split, model=model, settler=POLLACK)


@pytest.mark.parametrize("rule", [mep.Natural(), mep.Route(mep.Natural())], ids=["alone", "routed"])
def test_kolen_pollack_with_a_rule_that_observes_is_refused(rule):
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    with pytest.raises(ValueError, match=r"`feedback='kolen-pollack'` and `update=.*do not go"):
        optimizer(model, POLLACK, weight_decay=0.1, update=rule)
    optimizer(model, update=rule)  # fixed feedback has no update of its own


@pytest.mark.parametrize("settler", [RANDOM, POLLACK], ids=["random", "kolen-pollack"])
def test_blocks_of_several_weights_are_refused_by_name(settler):
    p = problem("residual")
    with pytest.raises(
        ValueError, match=r"needs blocks of one Linear or Conv2d each; `one.second`.*whole"
    ):
        optimizer(p.model, settler, weight_decay=0.1)


@pytest.mark.parametrize("settler", [RANDOM, POLLACK], ids=["random", "kolen-pollack"])
def test_weight_that_is_not_optimized_is_refused_by_the_name_of_its_block(settler):
    model = network()
    chosen = list(model.parameters())[:4]
    with pytest.raises(ValueError, match="pass the parameters of block `4` to the optimizer"):
        mep.EPOptimizer(chosen, model=model, settler=settler, weight_decay=0.1)
    rest = list(model.parameters())[2:]  # the first weight carries no error down
    mep.EPOptimizer(rest, model=model, settler=settler, weight_decay=0.1)


@pytest.mark.parametrize("function", [mep.estimate, mep.settle, mep.diagnose])
def test_functions_without_an_optimizer_have_no_feedback(function):
    message = r"`feedback='random'` keeps weights of its own, which live in an EPOptimizer"
    with pytest.raises(ValueError, match=message):
        function(network(), *batch_of(), settler=replace(RANDOM, max_sweeps=2))
