"""Dion: orthonormal, low rank, its own error feedback, and gradients that are never formed."""

import copy
import math

import pytest
import torch
from small_training import backward, batch_of, distance, identical, network, train, weights
from torch import nn

import mep
from mep.curvature import Factors, Signal
from mep.updates.dion import Dion, dion_step

# What the method asks of its columns; QR by reflections gives about 5e-7 in float32.
ORTHONORMAL = 1e-6
# Rounding of float64 (1e-16) in sums of up to 100 numbers of size 1.
SAME = 1e-13
NUMBERS = {"lr": 0.1, "lr_scale": 1.0, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False}
SHAPES = [(6, 6), (3, 8), (8, 3), (40, 24), (1, 5), (5, 1)]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def start(inputs, rank, dtype=torch.float64):
    return torch.linalg.qr(randn(inputs, rank, seed=99)).Q.to(dtype)


def gram_error(columns):
    columns = columns.double()
    return float((columns.mT @ columns - torch.eye(columns.shape[-1])).abs().max())


def run(rule, gradients, numbers=NUMBERS, shape=None):
    """Steps of one parameter from ones; gradients are matrices or factors."""
    parameter, state = torch.ones(shape or gradients[0].shape, dtype=torch.float64), {}
    for gradient in gradients:
        gradient = gradient.clone() if isinstance(gradient, torch.Tensor) else gradient
        rule.step([parameter], [gradient], [state], numbers)
    return parameter, state


# --- the algorithm -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mu", [0.0, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_is_orthonormal_and_loses_nothing(shape, mu, dtype):
    rounding = SAME * torch.finfo(dtype).eps / torch.finfo(torch.float64).eps
    for rank in {1, math.ceil(min(shape) / 2), min(shape)}:
        momentum, right = torch.zeros(shape, dtype=dtype), start(shape[1], rank, dtype)
        for k in range(20):
            gradient = randn(*shape, seed=k, dtype=dtype)
            found = dion_step(momentum + gradient, right, mu)
            assert gram_error(found.left) < ORTHONORMAL
            norms = torch.linalg.vector_norm(found.right.double(), dim=0)
            assert (norms - 1).abs().max() < ORTHONORMAL
            taken = (1 - mu) * found.left @ found.product.mT
            assert distance([found.momentum + taken], [momentum + gradient]) < rounding
            momentum, right = found.momentum, found.right


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [1, 3])
def test_rank_deficient_matrix_gives_an_update_of_its_rank(rank, dtype):
    """Of eight columns ``rank`` have something to follow; the others are left out of the update."""
    u, v = torch.linalg.qr(randn(12, rank)).Q, torch.linalg.qr(randn(10, rank, seed=1)).Q
    sizes = 0.25 ** torch.arange(rank, dtype=torch.float64)
    matrix, right = (u * sizes @ v.T).to(dtype), start(10, 8, dtype)
    for _ in range(15):
        found = dion_step(matrix, right, 0.9)
        assert gram_error(found.left) < ORTHONORMAL
        assert torch.linalg.svdvals(found.update.double())[rank:].max() < ORTHONORMAL
        right = found.right
    # 1/16 a step from about 1, down to float32's rounding over the least singular value
    assert distance([found.update.double()], [u @ v.T]) < 1e-5


@pytest.mark.parametrize("shape", [(8, 8), (12, 8), (8, 12)])
def test_fixed_matrix_converges_to_its_orthogonal_factor(shape):
    """Power iteration on singular values 2^-i: neighbours part by 1/4 a step, 1e-6 after ten."""
    u, v = torch.linalg.qr(randn(shape[0], 8)).Q, torch.linalg.qr(randn(shape[1], 8, seed=1)).Q
    matrix = u @ torch.diag(0.5 ** torch.arange(8.0, dtype=torch.float64)) @ v.T
    right, errors = start(shape[1], 8), []
    for _ in range(50):
        found = dion_step(matrix, right, 0.9)
        right = found.right
        errors.append(distance([found.update], [u @ v.T]))
    assert errors[0] > 1e-2
    assert errors[-1] < 1e-6


def test_low_rank_converges_to_the_leading_directions():
    u, v = torch.linalg.qr(randn(9, 9)).Q, torch.linalg.qr(randn(9, 9, seed=1)).Q
    matrix = u @ torch.diag(0.5 ** torch.arange(9.0, dtype=torch.float64)) @ v.T
    right = start(9, 3)
    for _ in range(50):
        found = dion_step(matrix, right, 0.9)
        right = found.right
    assert distance([found.update], [u[:, :3] @ v[:, :3].T]) < 1e-6


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_size_of_the_gradient_does_not_matter(size):
    """Its square is no number of float32."""
    matrix, right = randn(6, 5, dtype=torch.float32), start(5, 2, torch.float32)
    found, scaled = dion_step(matrix, right, 0.9), dion_step(matrix * size, right, 0.9)
    assert distance([found.update], [scaled.update]) < 1e-5


def test_nothing_comes_from_nothing():
    right = start(5, 4)
    found = dion_step(torch.zeros(6, 5, dtype=torch.float64), right, 0.9)
    assert found.update.count_nonzero() == found.momentum.count_nonzero() == 0
    assert torch.equal(found.right, right)
    assert gram_error(found.left) < ORTHONORMAL


@pytest.mark.parametrize("shape", [(4, 6), (6, 6), (6, 4)])
def test_without_momentum_a_zero_gradient_moves_nothing(shape):
    """At full rank all is taken; the rounding that is left of it is no direction."""
    parameter, state = torch.zeros(shape, dtype=torch.float64), {}
    numbers = NUMBERS | {"momentum": 0.0}
    Dion(1.0).step([parameter], [randn(*shape)], [state], numbers)
    before = parameter.clone()
    Dion(1.0).step([parameter], [torch.zeros_like(parameter)], [state], numbers)
    assert torch.equal(parameter, before) and before.count_nonzero() > 0


def test_zero_gradient_does_not_kill_the_directions():
    gradients = [torch.zeros(6, 5, dtype=torch.float64)] * 2 + [randn(6, 5)]
    late, first = run(Dion(0.5), gradients), run(Dion(0.5), gradients[2:])
    assert torch.equal(late[0], first[0]) and torch.equal(late[1]["right"], first[1]["right"])


# --- the rule ------------------------------------------------------------------------------------


def test_step_is_the_algorithm_line_by_line():
    shape, numbers = (6, 4), NUMBERS | {"weight_decay": 0.2, "lr_scale": 0.5}
    gradients = [randn(*shape, seed=k) for k in range(5)]
    parameter, state = run(Dion(0.5), gradients, numbers)
    theta, momentum = torch.ones(shape, dtype=torch.float64), torch.zeros(shape).double()
    _, fresh = run(Dion(0.5), [torch.zeros_like(momentum)])
    right = fresh["right"]
    assert right.shape == (4, 2) and gram_error(right) < SAME
    for gradient in gradients:
        b = momentum + gradient
        p = torch.linalg.qr(b @ right).Q
        r = b.T @ p
        momentum = b - 0.1 * p @ r.T
        right = r / r.norm(dim=0)
        theta = (1 - 0.05 * 0.2) * theta - 0.05 * math.sqrt(6 / 4) * p @ right.T
    assert distance([parameter, state["momentum_buffer"]], [theta, momentum]) < SAME


def test_batch_is_one_by_one():
    shapes = [(5, 4), (5, 4), (6, 4), (5, 4), (6, 4)]
    sequences = [[randn(*s, seed=10 * i + k) for k in range(4)] for i, s in enumerate(shapes)]
    parameters, states = [torch.ones(s).double() for s in shapes], [{} for _ in shapes]
    for gradients in zip(*sequences, strict=True):
        Dion(0.5).step(parameters, [g.clone() for g in gradients], states, NUMBERS)
    alone = [run(Dion(0.5), sequence) for sequence in sequences]
    assert distance(parameters, [parameter for parameter, _ in alone]) < SAME
    for name in ("momentum_buffer", "right"):
        assert distance([s[name] for s in states], [s[name] for _, s in alone]) < SAME


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernel_is_its_flattened_matrix(layout):
    gradients = [randn(6, 3, 2, 2, seed=k) for k in range(4)]
    kernel, state = torch.ones(6, 3, 2, 2).double().to(memory_format=layout), {}
    for gradient in gradients:
        Dion(0.5).step([kernel], [gradient.to(memory_format=layout)], [state], NUMBERS)
    matrix, _ = run(Dion(0.5), [g.flatten(1) for g in gradients])
    assert distance([kernel.flatten(1)], [matrix]) < SAME
    assert state["momentum_buffer"].shape == kernel.shape and state["right"].shape == (12, 3)


def test_bfloat16_computes_in_float32():
    gradients = [randn(8, 6, seed=k).bfloat16() for k in range(3)]
    parameter, state = torch.ones(8, 6, dtype=torch.bfloat16), {}
    for gradient in gradients:
        Dion(0.5).step([parameter], [gradient.clone()], [state], NUMBERS)
    exact, _ = run(Dion(0.5), [g.double() for g in gradients])
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    assert distance([parameter.double()], [exact]) < 0.02  # 2^-8, the digits of bfloat16, at 1


def test_another_rank_starts_anew():
    parameter, state = torch.ones(8, 8).double(), {}
    for fraction, rank in ((0.25, 2), (0.5, 4)):
        Dion(fraction).step([parameter], [randn(8, 8)], [state], NUMBERS)
        assert state["right"].shape == (8, rank)


OPTIONS = {
    "rank_fraction": (Dion(0.5), {}),
    "lr": (Dion(), {"lr": 0.2}),
    "lr_scale": (Dion(), {"lr_scale": 0.5}),
    "momentum": (Dion(), {"momentum": 0.5}),
    "weight_decay": (Dion(), {"weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_alone_changes_the_result(name):
    rule, numbers = OPTIONS[name]
    gradients = [randn(8, 8, seed=k) for k in range(3)]
    changed, reference = run(rule, gradients, NUMBERS | numbers), run(Dion(), gradients)
    assert distance(changed[:1], reference[:1]) > 1e-3


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, math.nan])
def test_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match=r"`Dion\(rank_fraction=...\)` must be in \(0, 1\], got"):
        Dion(fraction)


def test_nesterov_is_refused():
    with pytest.raises(ValueError, match="`nesterov` must be False with Dion"):
        mep.EPOptimizer(network().parameters(), update=mep.Route(Dion()), nesterov=True)


def test_vectors_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"`update=Dion\(...\)`.*use mep.Route\(Dion\(...\)\)"):
        mep.EPOptimizer(network().parameters(), update=Dion())


# --- gradients as factors ------------------------------------------------------------------------


def factors(out, inputs, seed):
    """A sum of two outer products, as of two phases."""
    weight = nn.Parameter(torch.zeros(out, inputs, dtype=torch.float64))
    signals = []
    for k, scale in enumerate((0.5, -0.3)):
        a, e = randn(3, inputs, seed=seed + k), randn(3, out, seed=seed + 10 + k)
        signals.append(
            Signal(weight, scale, 3, lambda a=a, e=e, s=scale: s * e.T @ a, lambda a=a, e=e: (a, e))
        )
    return Factors(signals)


def never_formed(self):
    raise AssertionError("a gradient was formed")


@pytest.mark.parametrize("shape", [(6, 4), (4, 3, 2, 2)], ids=["matrix", "kernel"])
def test_factors_give_the_dense_result_and_are_never_formed(monkeypatch, shape):
    out, inputs = shape[0], math.prod(shape[1:])
    sums = [factors(out, inputs, 20 * k) for k in range(4)]
    dense = run(Dion(0.5), [s.dense().view(shape) for s in sums])
    monkeypatch.setattr(Factors, "dense", never_formed)
    factored = run(Dion(0.5), sums, shape=shape)
    assert distance(factored[:1], dense[:1]) < SAME
    for name in ("momentum_buffer", "right"):
        assert distance([factored[1][name]], [dense[1][name]]) < SAME


def dion_run(steps=3, seed=0, **options):
    model = network(torch.float64, seed)
    rule = {"update": mep.Route(Dion(0.5)), "lr": 0.05, "momentum": 0.9}
    opt = mep.EPOptimizer(model.parameters(), **{"model": model} | rule | options)
    if opt.model is not None:
        train(opt, steps, batch_of())
        return model, opt
    for _ in range(steps):
        backward(model, batch_of())
        opt.step()
    return model, opt


def test_ep_run_takes_factors(monkeypatch):
    added = []
    original = Factors.add_to
    monkeypatch.setattr(
        Factors, "add_to", lambda self, m: (added.append(m.shape), original(self, m))[1]
    )
    monkeypatch.setattr(Factors, "dense", never_formed)
    dion_run(steps=2)
    assert added == [(8, 4), (6, 8), (3, 6)] * 2  # three matrices, in each of two steps


def test_backprop_mode_is_the_rule_on_grad():
    with_model, opt = dion_run(mode="backprop")
    without, other = dion_run(model=None)
    assert distance(weights(with_model), weights(without)) < SAME
    assert distance(weights(with_model), weights(network())) > 1e-2
    for p, q in zip(with_model.parameters(), without.parameters(), strict=True):
        assert opt.state[p].keys() == other.state[q].keys()


def test_ep_near_the_limit_is_the_rule_under_backprop():
    """The same factors, the same rule: only the estimate differs, and the limit has none of it."""
    limit, _ = dion_run(settler=mep.Limit())
    backprop, _ = dion_run(mode="backprop")
    assert distance(weights(limit), weights(backprop)) < 1e-10  # beta cancels to 1e-12 or so


def test_loss_falls():
    _, opt = dion_run(steps=1)
    first = train(opt, 1, batch_of(40))
    assert train(opt, 60, batch_of(40)) < 0.3 * first


def test_saved_run_continues_bitwise(tmp_path):
    model, opt = dion_run(steps=3)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    other, other_opt = dion_run(steps=1, seed=9)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["opt"])
    twin = copy.deepcopy(opt)
    for each in (opt, other_opt, twin):
        train(each, 3, batch_of())
    assert identical(weights(other), weights(model))
    assert identical(weights(twin.model), weights(model))
