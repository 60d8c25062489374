"""Update rules against their formulas and torch's own: Muon, decoupled decay, clipping."""

import math
from dataclasses import fields

import pytest
import torch
from small_training import (
    SAME_RULE,
    SAME_SUM,
    backward,
    batch_of,
    distance,
    identical,
    network,
    train,
    weights,
)
from torch import nn

import mep
from mep.updates.newton_schulz import COEFFICIENTS, orthogonalise

# float64 rounding of one Newton-Schulz iteration: its slope at 0 (4^5 to 8 x 4^3 x 2^4, some 10^4)
# times a few roundings of 2.2e-16.
ITERATED = 1e-11
# The standard quintic, five times: scalars in [0.01, 1] end in [0.6818, 1.1344] (computed).
STANDARD = 0.68, 1.14
# Polar Express, five times: scalars in [0.001, 1] end in [0.876, 1.124] as published, and from
# 0.84 on with its authors' safety factor of 1.01.
EXPRESS = 0.83, 1.13
# One rounding of bfloat16 (2^-8) in each of the products of the last iteration.
BFLOAT16 = 0.05


def normal(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def parameters(shapes, dtype=torch.float64):
    return [nn.Parameter(normal(*shape, seed=k, dtype=dtype)) for k, shape in enumerate(shapes)]


def give_gradients(owned, step):
    for k, p in enumerate(owned):
        p.grad = normal(*p.shape, seed=1000 + 50 * step + k, dtype=p.dtype)


# --- orthogonalisation ---------------------------------------------------------------------------


def with_singular_values(values, m, n, seed=0):
    """``U, V`` and ``U diag(values) V^T`` of shape (m, n)."""
    u = torch.linalg.qr(normal(m, len(values), seed=seed))[0]
    v = torch.linalg.qr(normal(n, len(values), seed=seed + 1))[0]
    return u, v, u @ torch.diag(values) @ v.T


def through_polynomials(s, name, steps):
    """What the iteration makes of singular values: one scalar polynomial after the other."""
    for k in range(steps):
        a, b, c = COEFFICIENTS[name][min(k, len(COEFFICIENTS[name]) - 1)]
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("steps", [1, 5, 10])
@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (5, 5)], ids=str)
def test_singular_values_go_through_the_polynomials_and_vectors_stay(shape, name, steps):
    s = torch.logspace(0, -4, 5, dtype=torch.float64)
    u, v, matrix = with_singular_values(s, *shape)
    kept = matrix.clone()
    found = orthogonalise(matrix, steps, COEFFICIENTS[name])
    truth = u @ torch.diag(through_polynomials(s / s.norm(), name, steps)) @ v.T
    torch.testing.assert_close(found, truth, rtol=0, atol=ITERATED)
    assert torch.equal(matrix, kept)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (12, 12)], ids=str)
@pytest.mark.parametrize(
    ("name", "least", "bounds"), [("standard", 1e-2, STANDARD), ("polar-express", 1e-3, EXPRESS)]
)
def test_five_steps_bring_singular_values_near_one(name, least, bounds, shape):
    s = torch.logspace(0, math.log10(2 * least), 12, dtype=torch.float64)  # the norm is below 2
    _, _, matrix = with_singular_values(s, *shape)
    assert s.min() / s.norm() > least
    found = torch.linalg.svdvals(orthogonalise(100 * matrix, 5, COEFFICIENTS[name]))
    assert bounds[0] < found.min() and found.max() < bounds[1]


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (12, 12)], ids=str)
def test_eight_polar_express_steps_are_the_polar_factor(shape):
    s = torch.logspace(0, math.log10(2e-3), 12, dtype=torch.float64)
    u, v, matrix = with_singular_values(s, *shape)
    assert s.min() / s.norm() > 1e-3
    found = orthogonalise(matrix, 8, COEFFICIENTS["polar-express"])
    torch.testing.assert_close(found, u @ v.T, rtol=0, atol=ITERATED)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(found, left @ right, rtol=0, atol=ITERATED)


@pytest.mark.parametrize("name", COEFFICIENTS)
@pytest.mark.parametrize("shape", [(7, 3), (3, 7)], ids=str)
def test_batch_is_orthogonalised_one_by_one(shape, name):
    batch = normal(4, *shape)
    found = orthogonalise(batch, 6, COEFFICIENTS[name])
    for matrix, ours in zip(batch, found, strict=True):
        alone = orthogonalise(matrix, 6, COEFFICIENTS[name])
        torch.testing.assert_close(ours, alone, rtol=0, atol=ITERATED)


@pytest.mark.parametrize("steps", [5, 8, 12])
@pytest.mark.parametrize("name", COEFFICIENTS)
def test_rank_one_in_bfloat16_stays_bounded(name, steps):
    """A rounding above the largest singular value, 1, must not run away: batches of one sample."""
    top = []
    for seed in range(30):
        matrix = torch.outer(normal(17, seed=seed), normal(11, seed=seed + 100)).bfloat16()
        found = orthogonalise(matrix, steps, COEFFICIENTS[name]).double()
        top.append(float(torch.linalg.matrix_norm(found, 2)))
    assert max(top) < 1.21 + BFLOAT16  # the standard quintic reaches 1.2024 between 0 and 1


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_zero_stays_zero(name):
    assert not orthogonalise(torch.zeros(3, 4), 5, COEFFICIENTS[name]).any()


# --- Muon against its formula --------------------------------------------------------------------


def muon_by_formula(theta, m, g, *, lr, mu, decay, nesterov, scale, coefficients, steps):
    """One step, written out; always on the left side and never in a batch."""
    m = mu * m + (1 - mu) * g
    wanted = (1 - mu) * g + mu * m if nesterov else m
    x = wanted.reshape(len(wanted), -1)
    out, inputs = x.shape
    x = x / x.square().sum().sqrt()
    for k in range(steps):
        a, b, c = COEFFICIENTS[coefficients][min(k, len(COEFFICIENTS[coefficients]) - 1)]
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    ratio = {"original": max(1, out / inputs) ** 0.5, "match_rms_adamw": 0.2 * max(x.shape) ** 0.5}
    return theta * (1 - lr * decay) - lr * ratio[scale] * x.reshape(theta.shape), m


SHAPES = {
    "tall": [(7, 3)],
    "wide": [(3, 7)],
    "square": [(5, 5)],
    "kernels": [(4, 2, 3, 3), (20, 2, 2, 2)],
    "one shape": [(6, 4)] * 3,
    "one shape and others": [(4, 8), (8, 4), (4, 2, 2, 2), (4, 8)],
}


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("coefficients", COEFFICIENTS)
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_muon_is_its_formula(shapes, scale, coefficients, nesterov, momentum):
    ours, truth = parameters(shapes), [p.detach() for p in parameters(shapes)]
    opt = mep.EPOptimizer(
        ours, lr=0.02, momentum=momentum, nesterov=nesterov, weight_decay=0.1,
        update=mep.Muon(6, coefficients, scale, ns_dtype=None),
    )  # fmt: skip
    numbers = {"lr": 0.02, "mu": momentum, "decay": 0.1, "nesterov": nesterov}
    options = {"scale": scale, "coefficients": coefficients, "steps": 6}
    buffers = [torch.zeros_like(p) for p in truth]
    for step in range(20):
        give_gradients(ours, step)
        opt.step()
        for k, p in enumerate(ours):
            truth[k], buffers[k] = muon_by_formula(
                truth[k], buffers[k], p.grad, **numbers, **options
            )
    assert distance(ours, truth) < SAME_RULE
    assert distance(ours, parameters(shapes)) > 1e-2  # it did move


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True], ids=["heavy ball", "nesterov"])
def test_muon_is_torchs_muon_to_the_bit(nesterov, weight_decay, scale):
    shapes = [(24, 10), (10, 24), (12, 12), (33, 4)]
    ours, theirs = parameters(shapes, torch.float32), parameters(shapes, torch.float32)
    numbers = {"lr": 0.02, "momentum": 0.95, "nesterov": nesterov, "weight_decay": weight_decay}
    opt = mep.EPOptimizer(ours, update=mep.Muon(scale=scale), **numbers)
    muon = torch.optim.Muon(theirs, adjust_lr_fn=scale, **numbers)
    for step in range(20):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        opt.step()
        muon.step()
    assert identical(ours, theirs)
    assert distance(ours, parameters(shapes, torch.float32)) > 0.1


@pytest.mark.parametrize(
    ("dtype", "ns_dtype", "tolerance"),
    [(torch.float64, None, SAME_RULE), (torch.float32, torch.bfloat16, BFLOAT16)],
    ids=["float64", "bfloat16 iterations"],
)
def test_matrices_of_one_shape_are_treated_as_if_alone(dtype, ns_dtype, tolerance):
    together, alone = parameters([(9, 6)] * 4, dtype), parameters([(9, 6)] * 4, dtype)
    rule, lr = mep.Muon(ns_dtype=ns_dtype), 0.1
    opts = [mep.EPOptimizer(ps, lr=lr, update=rule) for ps in (together, *([p] for p in alone))]
    for ps in (together, alone):
        give_gradients(ps, 0)
    for opt in opts:
        opt.step()
    assert distance(together, alone) < lr * tolerance
    assert distance(together, parameters([(9, 6)] * 4, dtype)) > 10 * lr * tolerance


def test_muon_takes_kernels_in_any_memory_format():
    plain, strided = parameters([(6, 4, 3, 3)]), parameters([(6, 4, 3, 3)])
    strided[0].data = strided[0].data.to(memory_format=torch.channels_last)
    for owned in (plain, strided):
        opt = mep.EPOptimizer(owned, momentum=0.9, update=mep.Muon(ns_dtype=None))
        for step in range(3):
            give_gradients(owned, step)
            opt.step()
    assert strided[0].is_contiguous(memory_format=torch.channels_last)
    assert distance(plain, strided) < SAME_RULE


def test_muon_without_a_gradient_to_follow_stays():
    (p,) = parameters([(3, 4)], torch.float32)
    p.grad, before = torch.zeros_like(p), p.detach().clone()
    mep.EPOptimizer([p], update=mep.Muon()).step()
    assert torch.equal(p, before)


MUON = {"steps": 4, "coefficients": "polar-express", "scale": "match_rms_adamw", "ns_dtype": None}
NUMBERS = {"lr": 0.2, "lr_scale": 0.5, "momentum": 0.5, "weight_decay": 0.2, "nesterov": False}


def after_muon(options=(), numbers=()):
    owned = parameters([(6, 4), (5, 5)])
    base = {"lr": 0.1, "lr_scale": 1.0, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    group = {"params": owned, **base, **dict(numbers)}
    opt = mep.EPOptimizer([group], update=mep.Muon(**dict(options)))
    for step in range(3):
        give_gradients(owned, step)
        opt.step()
    return owned


def test_every_option_of_muon_changes_the_result():
    assert {f.name for f in fields(mep.Muon)} == set(MUON)
    base = after_muon()
    for name, value in MUON.items():
        assert distance(after_muon({name: value}), base) > 1e-4, name
    for name, value in NUMBERS.items():
        assert distance(after_muon(numbers={name: value}), base) > 1e-4, name


def test_lr_scale_multiplies_muons_lr():
    changed = {"lr": 0.2, "lr_scale": 0.5}
    assert identical(after_muon(numbers=changed), after_muon())


def test_muon_takes_lr_as_a_tensor():
    as_tensor = {"lr": torch.tensor(0.1, dtype=torch.float64)}
    assert identical(after_muon(numbers=as_tensor), after_muon())


BAD = {
    "steps 0": ({"steps": 0}, ValueError, r"`Muon\(steps=\.\.\.\)` .* >= 1, got 0"),
    "steps 2.5": ({"steps": 2.5}, ValueError, r"`Muon\(steps=\.\.\.\)` .* >= 1, got 2\.5"),
    "coefficients": (
        {"coefficients": "cubic"},
        ValueError,
        r"`Muon\(coefficients=\.\.\.\)` .*'polar-express', 'standard'.* got 'cubic'",
    ),
    "coefficients as numbers": (
        {"coefficients": (3.4, -4.8, 2.0)},
        ValueError,
        r"`Muon\(coefficients=\.\.\.\)` .*'polar-express', 'standard'.* got \(3\.4",
    ),
    "coefficients as a list": (
        {"coefficients": [3.4, -4.8, 2.0]},
        ValueError,
        r"`Muon\(coefficients=\.\.\.\)` .*'polar-express', 'standard'.* got \[3\.4",
    ),
    "scale": ({"scale": "adam"}, ValueError, r"`Muon\(scale=\.\.\.\)` .*'original'.* got 'adam'"),
    "ns_dtype": (
        {"ns_dtype": torch.int32},
        TypeError,
        r"`Muon\(ns_dtype=\.\.\.\)` .*floating dtype or None, got torch\.int32",
    ),
    "ns_dtype by name": ({"ns_dtype": "bfloat16"}, TypeError, r"`Muon\(ns_dtype=.*got 'bfloat16'"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_muon_refuses_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        mep.Muon(**options)


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"`lr` must be a finite number >= 0, got -1\.0"),
        ({"lr": "fast"}, TypeError, "`lr` must be a number, got 'fast'"),
        ({"momentum": 1.0}, ValueError, r"`momentum` must be in \[0, 1\), got 1\.0"),
        ({"weight_decay": math.inf}, ValueError, "`weight_decay` .*got inf"),
    ],
)
def test_muon_refuses_bad_numbers(numbers, error, message):
    with pytest.raises(error, match=message):
        mep.EPOptimizer(parameters([(3, 3)]), update=mep.Muon(), **numbers)


@pytest.mark.parametrize("update", ["muon", mep.Muon, torch.optim.SGD], ids=repr)
def test_update_must_be_a_rule(update):
    with pytest.raises(TypeError, match=r"`update` must be an update rule such as mep\.Muon\(\)"):
        mep.EPOptimizer(parameters([(3, 3)]), update=update)


# --- SGD with decoupled decay --------------------------------------------------------------------


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.8, False), (0.8, True)])
def test_decoupled_sgd_is_its_formula(momentum, nesterov):
    lr, scale, decay = 0.05, 0.5, 0.2
    ours, truth = parameters([(4, 3), (4,)]), [p.detach() for p in parameters([(4, 3), (4,)])]
    opt = mep.EPOptimizer(
        [{"params": ours, "lr_scale": scale}], lr=lr, momentum=momentum, nesterov=nesterov,
        weight_decay=decay, update=mep.SGD(decoupled=True),
    )  # fmt: skip
    buffers = [torch.zeros_like(p) for p in truth]
    for step in range(10):
        give_gradients(ours, step)
        opt.step()
        for k, p in enumerate(ours):
            buffers[k] = momentum * buffers[k] + p.grad
            taken = p.grad + momentum * buffers[k] if nesterov else buffers[k]
            truth[k] = (1 - lr * scale * decay) * truth[k] - lr * scale * taken
    assert distance(ours, truth) < SAME_SUM


# --- the gradient is the user's own --------------------------------------------------------------


RULES = {
    "sgd": mep.SGD(),
    "decoupled": mep.SGD(decoupled=True),
    "muon": mep.Route(mep.Muon()),
    "muon in the parameters' dtype": mep.Route(mep.Muon(ns_dtype=None)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip_norm", [None, 0.1, 1e6])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_grad_stays_as_it_was(rule, clip_norm, dtype):
    owned = parameters([(4, 3), (4,), (3, 2, 2, 2), (4, 3)], dtype)
    opt = mep.EPOptimizer(
        owned, momentum=0.9, nesterov=True, weight_decay=0.1, update=rule, clip_norm=clip_norm
    )
    for step in range(2):
        give_gradients(owned, step)
        kept, same = [p.grad.clone() for p in owned], [p.grad for p in owned]
        opt.step()
        assert identical([p.grad for p in owned], kept)
        assert all(p.grad is g for p, g in zip(owned, same, strict=True))


# --- clipping ------------------------------------------------------------------------------------


TORCHS_EPS = 1e-6  # torch divides by the norm plus this


def clip_as_torch(owned, limit):
    """``clip_grad_norm_`` without its eps: the limit is raised by as much."""
    norm = float(nn.utils.get_total_norm([p.grad for p in owned]))
    return float(nn.utils.clip_grad_norm_(owned, limit * (norm + TORCHS_EPS) / norm))


def test_clipping_is_torchs_over_all_groups():
    shapes, limit = [(4, 3), (4,), (5, 4), (5,)], 6.0
    ours, theirs = parameters(shapes), parameters(shapes)
    numbers = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}
    opt = mep.EPOptimizer(
        [{"params": ours[:2]}, {"params": ours[2:], "lr": 0.02}], clip_norm=limit, **numbers
    )
    sgd = torch.optim.SGD([{"params": theirs[:2]}, {"params": theirs[2:], "lr": 0.02}], **numbers)
    norms = []
    for step in range(20):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        opt.step()
        norms.append(clip_as_torch(theirs, limit))
        sgd.step()
    assert min(norms) < limit < max(norms)  # both sides of the limit were met
    assert distance(ours, theirs) < SAME_SUM


def test_clipping_is_torchs_own_up_to_its_eps():
    limit, (ours, theirs) = 0.5, (parameters([(4, 3), (4,)]) for _ in range(2))
    for owned in (ours, theirs):
        give_gradients(owned, 0)
    mep.EPOptimizer(ours, lr=1.0, clip_norm=limit).step()
    norm = float(nn.utils.clip_grad_norm_(theirs, limit))
    torch.optim.SGD(theirs, lr=1.0).step()
    assert norm > limit
    assert distance(ours, theirs) < limit * TORCHS_EPS / norm


@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_step_on_a_batch_clips_as_torch(mode):
    ours, theirs, batch, limit = network(), network(), batch_of(), 0.2
    numbers = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}
    opt = mep.EPOptimizer(ours.parameters(), model=ours, mode=mode, clip_norm=limit, **numbers)
    sgd, norms = torch.optim.SGD(theirs.parameters(), **numbers), []
    for p in ours.parameters():
        p.grad = torch.full_like(p, 7.0)
    for _ in range(20):
        train(opt, 1, batch)
        if mode == "ep":
            theirs.zero_grad()
            mep.estimate(theirs, *batch)
        else:
            backward(theirs, batch)
        norms.append(clip_as_torch(list(theirs.parameters()), limit))
        sgd.step()
    assert min(norms) < limit < max(norms)
    assert distance(weights(ours), weights(theirs)) < SAME_RULE
    assert all(bool((p.grad == 7.0).all()) for p in ours.parameters())


@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_limit_above_every_norm_changes_nothing(mode):
    """But that EP's gradients are formed, and no longer added up in the momentum."""
    found = []
    for clip_norm in (None, 1e3):
        model = network()
        opt = mep.EPOptimizer(model.parameters(), model=model, mode=mode, clip_norm=clip_norm)
        train(opt, 3, batch_of())
        found.append(weights(model))
    assert identical(*found) if mode == "backprop" else distance(*found) < 1e-14


@pytest.mark.parametrize("limit", [0, -1.0, math.inf, math.nan])
def test_clip_norm_must_be_positive(limit):
    with pytest.raises(ValueError, match=rf"`clip_norm` .*> 0 or None, got {limit}"):
        mep.EPOptimizer(parameters([(3, 3)]), clip_norm=limit)
