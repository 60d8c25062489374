"""Fused kernels against float64 truth, and against their eager twins."""

import contextlib
import math
import sys
from itertools import product

import pytest
import torch
from problems import flat, tanh_problem
from torch import nn
from torch.nn import functional as F

import mep
import mep.kernels
from mep.blocks.activations import of_module
from mep.blocks.elementwise import Elementwise, elementwise_of
from mep.energies import CrossEntropy
from mep.kernels import cross_entropy, kernels_of

EPS = torch.finfo(torch.float32).eps
# What the kernel's polynomial claims: relative error of tanh at every argument.
TANH = 4e-7
# A change is tanh(d) times a slope 1 - y^2, whose error is twice that of y, and a few roundings.
CHANGE = 4 * TANH
# A sum of at most 64 squares in any order, each with a rounding of its own, and a root.
SUM = 70 * EPS

INF, NAN = math.inf, math.nan
MODULES = {"tanh": nn.Tanh(), "relu": nn.ReLU()}
TRUTH = {"tanh": torch.tanh, "relu": torch.relu}
SLOPE = {"tanh": lambda y: 1 - y * y, "relu": lambda y: (y > 0).double()}
# One sample, one unit, and 17 units: no multiple of what a processor takes at a time.
SHAPES = [(1, 1), (1, 17), (5, 1), (3, 17), (4, 64)]

both = pytest.mark.parametrize("twin", ["fused", "eager"])
every = pytest.mark.parametrize("name", MODULES)


def arithmetic(name, twin="fused"):
    activation = of_module(MODULES[name])
    if twin == "eager":
        return Elementwise(activation)
    pytest.importorskip("numba")
    found = elementwise_of(activation, torch.zeros(1))
    assert type(found) is not Elementwise
    return found


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activated(between, s, bias=None):
    """The state with its bias, and its activity; what is given stays."""
    s, y = s.clone(), torch.full_like(s, NAN)
    between.activate(s, bias, y)
    return s, y


def nudged(between, s, d, p=None, e=None, beta=0.0):
    """Change, new activity and norm, from a state without bias."""
    s, y = activated(between, s)
    p, e = (torch.zeros_like(s) if t is None else t for t in (p, e))
    given, d = [t.clone() for t in (s, y, d, p, e)], d.clone()
    if beta:
        given[2] += beta * e
    change, y_new, norm = (torch.full_like(t, NAN) for t in (s, s, s[:, 0]))
    between.nudge(s, y, d, beta, p, e, change, y_new, norm)
    for kept, before in zip((s, y, d, p, e), given, strict=True):
        bound = {"rtol": EPS, "atol": EPS} if kept is d and beta else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(kept, before, equal_nan=True, **bound)
    return change, y_new, norm


def within(found, truth, bound):
    """Every value within its own bound; NaN is in none."""
    return bool(((found.double() - truth).abs() <= bound).all())


# --- three kernels -------------------------------------------------------------------------------


@both
@every
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_activate(name, twin, shape, with_bias):
    given, bias = normal(*shape, scale=3.0), normal(shape[1], seed=1) if with_bias else None
    s, y = activated(arithmetic(name, twin), given, bias)
    assert torch.equal(s, given + bias if with_bias else given)
    truth = TRUTH[name](s.double())
    assert within(y, truth, TANH * truth.abs())
    torch.testing.assert_close(
        y, activated(arithmetic(name, "eager"), given, bias)[1], rtol=2 * TANH, atol=0
    )


@both
@every
@pytest.mark.parametrize("shape", SHAPES)
def test_pull(name, twin, shape):
    between = arithmetic(name, twin)
    # 1e15: squares are large, but no float32 overflows; 1e-15: nor does any become 0.
    for scale in (1.0, 1e15, 1e-15):
        s, y = activated(between, normal(*shape))
        p, e, again = normal(*shape, seed=1, scale=scale), *(torch.full_like(s, NAN) for _ in "ab")
        square = float(between.pull_and_square(s, y, p, e))
        truth = SLOPE[name](y.double()) * p.double()
        assert within(e, truth, 2 * EPS * p.double().abs())  # roundings of 1 - y^2, of the product
        assert square == pytest.approx(float(truth.square().sum()), rel=SUM)
        between.pull(s, y, p, again)
        assert torch.equal(e, again)


@both
@every
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta", [0.0, -0.02])
def test_nudge(name, twin, shape, beta):
    s, d = normal(*shape), normal(*shape, seed=1, scale=0.1)
    p, e = normal(*shape, seed=2), normal(*shape, seed=3)
    change, y_new, norm = nudged(arithmetic(name, twin), s, d, p, e, beta)
    d = torch.add(d, e, alpha=beta)
    s, d, p, e = (t.double() for t in (s, d, p, e))
    new = TRUTH[name](s + d)
    assert within(change, new - TRUTH[name](s), CHANGE * d.abs())
    # The old value's error, that of the change, and a rounding of values up to 4.
    assert within(y_new, new, TANH + CHANGE * d.abs() + 4 * EPS)
    force = (SLOPE[name](new) * p - e).norm(dim=1)
    assert within(norm, force, SUM * force + 4 * TANH * p.norm(dim=1))


# --- the polynomial ------------------------------------------------------------------------------


def tanh_of(*values):
    return activated(arithmetic("tanh"), torch.tensor([values]))[1][0]


def test_tanh_keeps_its_relative_error_at_every_argument():
    x = torch.logspace(-12, math.log10(20), 50_000, dtype=torch.float64).float()
    x = torch.cat([x, -x])
    y = activated(arithmetic("tanh"), x[None])[1][0]
    truth = torch.tanh(x.double())
    assert within(y, truth, TANH * truth.abs())
    assert y.abs().max() <= 1  # beyond it slopes would be negative


def test_tanh_of_what_is_no_ordinary_number():
    zeros, ends = tanh_of(0.0, -0.0), tanh_of(INF, -INF, 3e38, -3e38)
    assert torch.equal(zeros, torch.zeros(2))
    assert within(ends, torch.tensor([1.0, -1.0, 1.0, -1.0]).double(), EPS)
    assert tanh_of(NAN).isnan().all()
    # Half the smallest denormal number, 7e-46, over the quotient's coefficients of 5e-3.
    assert within(tanh_of(1e-40, -1e-40), torch.tensor([1e-40, -1e-40]).double(), 1.5e-43)


# --- changes without cancellation ----------------------------------------------------------------


@both
@pytest.mark.parametrize("size", [1e-12, 1e-9, 1e-6, 1e-3])
def test_tanh_change_at_tiny_displacements(twin, size):
    """A difference of two values would be wrong by 1e-7 / size."""
    s = torch.linspace(-7, 7, 2001)[None]
    d = normal(*s.shape, scale=size)
    change = nudged(arithmetic("tanh", twin), s, d)[0]
    s, d = s.double(), d.double()
    y = torch.tanh(s)
    truth = torch.tanh(d) * (1 - y * torch.tanh(s + d))
    # A value within TANH of the truth knows its slope 1 - y^2 to 2 TANH, and no better.
    assert within(change, truth, (2 * TANH / (1 - y * y) + CHANGE) * truth.abs())


@both
def test_tanh_change_at_any_displacement(twin):
    """From one end to the other, too: what is left of a slope at one end says nothing of it."""
    s, d = torch.meshgrid(torch.linspace(-12, 12, 97), torch.linspace(-24, 24, 193), indexing="ij")
    s, d = s.reshape(1, -1).contiguous(), d.reshape(1, -1).contiguous()
    change, y_new, _ = nudged(arithmetic("tanh", twin), s, d)
    new, old = torch.tanh(s.double() + d.double()), torch.tanh(s.double())
    assert within(y_new, new, CHANGE)
    assert within(change, new - old, CHANGE)


@both
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1.0])
def test_relu_change_is_exact_where_no_kink_is_crossed(twin, size):
    s, d = normal(1, 5000, scale=100.0), normal(1, 5000, seed=1, scale=size)
    change = nudged(arithmetic("relu", twin), s, d)[0]
    up, down = (s > 0) & (s.double() + d > 0), (s < 0) & (s.double() + d < 0)
    assert up.any() and down.any()
    assert torch.equal(change[up], d[up])
    assert not change[down].any()


@both
def test_relu_change_across_the_kink(twin):
    s, d = normal(1, 5000), normal(1, 5000, seed=1, scale=3.0)
    change = nudged(arithmetic("relu", twin), s, d)[0]
    crossed = (s > 0) != (s + d > 0)
    assert crossed.sum() > 1000
    truth = torch.relu(s.double() + d.double()) - torch.relu(s.double())
    assert within(change[crossed], truth[crossed], EPS * d[crossed].double().abs())


# --- what is not finite --------------------------------------------------------------------------

STRANGE = [0.0, -0.0, 1.0, -1.0, 3e38, -3e38, INF, -INF, NAN]


def finite(*tensors):
    """Per sample, whether all of them are."""
    return torch.stack([t.isfinite().view(len(t), -1).all(1) for t in tensors]).all(0)


@every
def test_what_is_not_finite_stays_so(name):
    """One unit per sample, every combination of strange values."""
    s, d, p, e = (t[:, None].clone() for t in torch.tensor([*product(STRANGE, repeat=4)]).unbind(1))
    fused, eager = arithmetic(name), arithmetic(name, "eager")
    found, reference = (nudged(twin, s, d, p, e) for twin in (fused, eager))
    hidden = finite(*found) & ~finite(*reference)
    assert not hidden.any(), [t[hidden][0].item() for t in (s, d, p, e)]
    nan = s.isnan() | d.isnan()
    assert found[0][nan].isnan().all() and found[1][nan].isnan().all()
    assert not found[2][p[:, 0].isnan()].isfinite().any() and finite(*reference).any()


@every
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_one_bad_value_spoils_its_own_sample(name, bad):
    between = arithmetic(name)
    for k in range(4):
        # States and displacements are positive, so that no slope is 0.
        s, d, p, e = tensors = [normal(3, 17, seed=i).abs() for i in range(4)]
        tensors[k][1, 16] = bad
        found = nudged(between, s, d, p, e)
        assert finite(*found)[::2].all()
        if bad != bad or k >= 2:  # an infinite state may end in a plain 1, or 0
            assert not finite(*found)[1]
    s, y = activated(between, normal(3, 17).abs())
    p = normal(3, 17, seed=1)
    p[1, 16] = bad
    e = torch.empty_like(p)
    square = between.pull_and_square(s, y, p, e)
    assert finite(e).tolist() == [True, False, True] and not math.isfinite(square)


# --- any memory ----------------------------------------------------------------------------------


@torch.no_grad()
@every
def test_block_takes_operands_of_any_layout(name):
    """Addresses know nothing of strides."""
    block = mep.trace(nn.Sequential(nn.Linear(2, 6), MODULES[name], nn.Linear(6, 4))).blocks[1]
    point = block.predict(normal(5, 6))[1]
    d, p, e = (normal(6, 5, seed=k).t() for k in range(3))
    pulled = block.pull(point, p.contiguous())
    assert torch.equal(block.pull(point, p), pulled)
    plain = block.advance(point, d.contiguous(), p.contiguous(), e.contiguous())
    for operands in ((d, p, e), (d.contiguous(), p, e)):
        for beta in (0.0, 0.3):  # the displacement's share of the error is there, or yet to come
            moved_by = operands[0] - beta * operands[2]
            found = block.advance(point, moved_by, *operands[1:], beta)
            torch.testing.assert_close(found[0], plain[0])
            torch.testing.assert_close(found[2], plain[2])
            torch.testing.assert_close(moved_by, operands[0])


# --- who has kernels -----------------------------------------------------------------------------


@pytest.fixture
def without_numba(monkeypatch):
    """As if it were not installed; what is known of it is forgotten before and after."""
    caches = [mep.kernels._has, mep.kernels._kernels]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "numba", None)
        for cache in caches:
            cache.cache_clear()
        yield
    for cache in caches:
        cache.cache_clear()


def test_kernels_are_for_float32_and_some_activations():
    pytest.importorskip("numba")
    like = torch.zeros(1)
    assert mep.kernels.available()
    assert all(kernels_of(name, like) is not None for name in MODULES)
    assert kernels_of("gelu", like) is None
    assert kernels_of("tanh", like.double()) is kernels_of("tanh", like.bfloat16()) is None
    assert kernels_of("tanh", like.to("meta")) is None


def test_a_package_that_does_not_work_here_is_none(tmp_path, monkeypatch):
    """numba says by an ImportError that it does not go with the numpy that is there."""
    (tmp_path / "broken.py").write_text("raise ImportError('needs another numpy')")
    monkeypatch.syspath_prepend(tmp_path)
    assert not mep.kernels._has("broken")
    assert not mep.kernels._has("nowhere_to_be_found")
    assert mep.kernels._has("torch")


def test_eager_ends_with_its_context():
    pytest.importorskip("numba")
    like = torch.zeros(1)
    with pytest.raises(KeyError), mep.kernels.eager():
        with mep.kernels.eager():
            assert kernels_of("tanh", like) is None
        assert kernels_of("tanh", like) is None
        assert type(elementwise_of(of_module(nn.Tanh()), like)) is Elementwise
        raise KeyError
    assert kernels_of("tanh", like) is not None


def test_without_numba_there_are_none(without_numba):
    assert not mep.kernels.available()
    assert all(kernels_of(name, torch.zeros(1)) is None for name in MODULES)
    assert type(elementwise_of(of_module(nn.Tanh()), torch.zeros(1))) is Elementwise


def update(dtype):
    """What three steps make of the weights."""
    p = tanh_problem([5, 8, 8, 8, 8, 4], batch=6, dtype=torch.float32)
    model, x = p.model.to(dtype), p.x.to(dtype)
    before = flat(model.parameters()).detach().double()
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.5, settler=mep.Sweep(1, tol=1.0))
    for _ in range(3):
        opt.step(x=x, target=p.y)
    return flat(model.parameters()).detach().double() - before


@pytest.mark.parametrize("who", ["kernels", "eager", "without numba"])
def test_step_needs_no_kernels(who, request, monkeypatch):
    if who == "without numba":
        request.getfixturevalue("without_numba")
    elif who == "kernels":
        pytest.importorskip("numba")
        from mep.kernels.captured import Captured
    calls = []
    kind, name = (Captured, "sweep") if who == "kernels" else (Elementwise, "nudge")
    original = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, *a: calls.append(self) or original(self, *a))
    with mep.kernels.eager() if who == "eager" else contextlib.nullcontext():
        found = update(torch.float32)
    assert {type(self) for self in calls} == {kind}
    truth = update(torch.float64)
    # Roundings of 1e-7 through 5 layers, up, down and up again, relative to the step.
    assert float((found - truth).norm() / truth.norm()) < 2e-6


# --- cross-entropy -------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 32])
@pytest.mark.parametrize("scale", [0.1, 5.0, 40.0])
def test_cross_entropy_and_its_gradient(classes, scale):
    s, y = normal(64, classes, scale=scale), torch.arange(64) % classes
    s[::2].scatter_(1, y[::2, None], 60.0)  # well classified: p_y - 1 would have no digits left
    value, gradient = cross_entropy(s, y)
    exact = s.double().requires_grad_()
    truth = F.cross_entropy(exact, y, reduction="none")
    others = torch.softmax(exact.detach(), 1).scatter(1, y[:, None], 0.0)
    slope = others.scatter(1, y[:, None], -others.sum(1, keepdim=True))
    # Differences of arguments up to 200 are rounded before they become exponents.
    rounding = 4 * EPS * (s.abs().amax(1) + 2)
    assert within(value, truth.detach(), rounding)
    assert within(gradient, slope, rounding[:, None] * slope.abs() + 1e-37)
    (by_autograd,) = torch.autograd.grad(truth.sum(), exact)
    torch.testing.assert_close(slope, by_autograd, rtol=0, atol=1e-14)


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_cross_entropy_of_a_bad_sample_is_bad_alone(bad):
    s, y = normal(5, 4), torch.tensor([0, 1, 2, 3, 0])
    s[1, 2] = bad
    value, gradient = cross_entropy(s, y)
    fine = torch.tensor([True, False, True, True, True])
    assert torch.equal(value.isfinite(), fine) and torch.equal(gradient.isfinite().all(1), fine)


def test_cross_entropy_takes_any_layout_and_leaves_others_to_torch():
    s, y = normal(4, 6), torch.arange(8)[::2] % 4
    found, truth = (
        cross_entropy(s.t(), torch.arange(12)[::2] % 4),
        cross_entropy(s.t().contiguous(), torch.tensor([0, 2, 0, 2, 0, 2])),
    )
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))
    assert cross_entropy(s.double(), y) is None and cross_entropy(normal(4, 33), y) is None
    assert cross_entropy(normal(4, 6, 2), torch.zeros(4, 2, dtype=torch.long)) is None
    with mep.kernels.eager():
        assert cross_entropy(s, y) is None


def test_cost_takes_the_kernel_where_there_is_one():
    cost, s, y = CrossEntropy(), normal(6, 5), torch.arange(6) % 5
    found = cost.both(s, y)
    with mep.kernels.eager():
        truth = cost.both(s, y)
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    some = CrossEntropy(classes=(1, 3, 4))  # others take no part
    places = torch.arange(6) % 3
    value, gradient = some.both(s, places)
    assert not gradient[:, [0, 2]].any() and torch.equal(value, some.value(s, places))


# --- what is kept on disk ------------------------------------------------------------------------


def test_compiled_functions_are_kept_by_all_sources(monkeypatch, tmp_path):
    """A function contains those it calls, also those of other files."""
    pytest.importorskip("numba")
    from mep.kernels import cpu

    places = []

    def compiler(cache=False, **options):
        places.append(cpu.config.CACHE_DIR)
        return lambda function: function

    before = cpu.config.CACHE_DIR
    monkeypatch.setattr(cpu, "_HERE", tmp_path)
    for text in ("x = 1", "x = 2", "x = 2"):
        (tmp_path / "one.py").write_text(text)
        cpu._stamp.cache_clear()
        assert cpu.compiled(compiler, abs)(-3.0) == 3.0
    cpu._stamp.cache_clear()
    assert places[0] != places[1] == places[2] and before == cpu.config.CACHE_DIR
