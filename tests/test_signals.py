"""Local signals against exact gradients: rows, factors, and Fisher information sample by sample."""

import math

import pytest
import torch
from problems import CLASSES, EXACT, MODELS, backprop, flat, problem
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn import functional as F

from mep.contrast import free_phase, free_signals, settings
from mep.curvature import Factors, Signal, finite_products
from mep.energies import Cost, SquaredError

BATCH = 3


class Tied(nn.Module):
    """One weight at two places of the chain."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Positions(nn.Module):
    """Layers that act on every position of a sequence."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        return self.body(x)


# name -> (the model, shape of one sample)
LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear at positions": (lambda: nn.Linear(5, 4), (3, 5)),
    "linear on a plane": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    "deep at positions": (Positions, (4, 5)),
    "conv": (lambda: nn.Conv2d(2, 4, 3), (2, 6, 5)),
    "conv 1x1": (lambda: nn.Conv2d(2, 4, 1), (2, 3, 2)),
    "conv stride": (lambda: nn.Conv2d(2, 4, 3, stride=2), (2, 8, 7)),
    "conv padding": (lambda: nn.Conv2d(2, 4, 3, padding=1), (2, 4, 5)),
    "conv dilation": (lambda: nn.Conv2d(2, 4, 3, dilation=2), (2, 7, 6)),
    "conv all": (
        lambda: nn.Conv2d(3, 2, (2, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False),
        (3, 6, 7),
    ),
    "two convs": (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.Conv2d(3, 2, 2)),
        (1, 7, 7),
    ),
    "tied": (Tied, (4,)),
}


def regression(name, make=None, shape=None):
    """A row of LAYERS with random input and a random target of the output's shape."""
    make, shape = LAYERS[name] if make is None else (make, shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
        x = torch.randn(BATCH, *shape, dtype=torch.float64)
        y = torch.randn_like(model(x))
    return model, x, y.detach()


@torch.no_grad()
def signals_of(model, x, y, cost="mse", targets="empirical"):
    """The signals of every parameter, by its name."""
    found = free_signals(free_phase(model, x, y, settings(cost=cost)), targets)
    return {name: found.get(id(p), []) for name, p in model.named_parameters()}


def product(signal):
    activity, error = signal.rows()
    return signal.scale * error.T @ activity


def assert_exact(ours, truth):
    size = max(1.0, float(truth.detach().abs().max()))
    torch.testing.assert_close(ours, truth.reshape(ours.shape), rtol=0, atol=EXACT * size)


# --- rows and factors ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_rows_multiply_to_the_dense_gradient(name):
    model, x, y = regression(name)
    weights = {k: v for k, v in signals_of(model, x, y).items() if k.endswith("weight")}
    assert weights
    for signals in weights.values():
        assert len(signals) == (2 if name == "tied" else 1)
        for signal in signals:
            dense = signal.form()
            assert dense.shape == signal.parameter.shape and dense.abs().max() > 1e-3
            assert_exact(product(signal), dense.flatten(1))
            activity, error = signal.rows()
            assert activity.shape == (len(error), dense[0].numel())
            assert error.shape[1] == len(dense)
            assert (signal.samples, signal.scale) == (len(x), 1 / len(x))


@pytest.mark.parametrize("name", ["linear", "conv padding"])
def test_form_is_a_new_tensor_every_time(name):
    model, x, y = regression(name)
    for (signal,) in signals_of(model, x, y).values():
        first, kept = signal.form(), signal.form()
        assert first.data_ptr() != kept.data_ptr()
        first.zero_()
        assert torch.equal(signal.form(), kept)


NO_PRODUCT = {
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 5, 5)),
    "circular": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "same": (lambda: nn.Conv2d(2, 4, 3, padding="same"), (2, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 4, 3), (2, 5, 5)),
}


@pytest.mark.parametrize("name", NO_PRODUCT)
def test_gradient_that_is_no_product_has_no_rows_and_the_right_form(name):
    model, x, y = regression(name, *NO_PRODUCT[name])
    truth = torch.autograd.grad(SquaredError().mean(model(x), y), list(model.parameters()))
    found = signals_of(model, x, y)
    for (key, (signal,)), gradient in zip(found.items(), truth, strict=True):
        assert signal.rows is None or key.endswith("bias")
        assert_exact(-signal.form(), gradient)


@pytest.mark.parametrize("name", LAYERS)
def test_a_bias_is_the_weight_of_an_input_that_is_one(name):
    model, x, y = regression(name)
    biases = [v for k, v in signals_of(model, x, y).items() if k.endswith("bias")]
    for signals in biases:
        for signal in signals:
            activity, error = signal.rows()
            assert activity.shape == (len(error), 1) and bool((activity == 1).all())
            assert_exact(product(signal)[:, 0], signal.form())


def made_up(shape=(3, 4), terms=3):
    """Signals of one parameter with different scales and numbers of rows, and their sum."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(*shape, dtype=torch.float64))
    out, inputs = parameter.flatten(1).shape
    signals, total = [], torch.zeros_like(parameter)
    for k in range(terms):
        a = torch.randn(5 + k, inputs, generator=generator, dtype=torch.float64)
        e = torch.randn(5 + k, out, generator=generator, dtype=torch.float64)
        scale = (-0.7) ** k
        dense = scale * torch.einsum("no,ni->oi", e, a).view(shape)
        signals.append(Signal(parameter, scale, 5, dense.clone, lambda a=a, e=e: (a, e)))
        total = total + dense
    return signals, total.detach()


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 2, 2)], ids=["matrix", "kernel"])
def test_factors_are_their_dense_gradient(shape, terms):
    signals, truth = made_up(shape, terms)
    factors = Factors(iter(signals))
    for _ in range(2):  # neither reading changes the other
        assert factors.dense().shape == shape
        assert_exact(factors.dense(), truth)
        matrix = torch.ones(truth.flatten(1).shape, dtype=torch.float64)
        assert factors.add_to(matrix) is matrix
        assert_exact(matrix - 1, truth)


@pytest.mark.parametrize("factor", [0.25, -3.0, 0.0])
def test_scaled_factors_are_scaled_in_every_reading(factor):
    signals, truth = made_up()
    factors = Factors(signals)
    scaled = factors.scaled(factor)
    assert_exact(scaled.dense(), factor * truth)
    assert_exact(scaled.add_to(torch.zeros_like(truth)), factor * truth)
    assert_exact(scaled.scaled(2.0).dense(), 2 * factor * truth)
    assert_exact(factors.dense(), truth)  # the original is as it was
    assert_exact(factors.add_to(torch.zeros_like(truth)), truth)


@pytest.mark.parametrize("size", [1.0, 1e15, 1e25, 1e160])
def test_products_that_might_overflow_are_not_called_finite(size):
    a, e = torch.randn(2, 4).double() * size, torch.randn(2, 3).double() * size
    parameter = nn.Parameter(torch.zeros(3, 4).double())
    for dtype in (torch.float64, torch.float32):
        pair = a.to(dtype), e.to(dtype)
        signal = Signal(parameter, 0.5, 2, lambda p=pair: 0.5 * p[1].T @ p[0], lambda p=pair: p)
        found, truth = finite_products([Factors([signal])]), signal.form().isfinite().all()
        assert truth or not found
        assert found == (size < (1e18 if dtype == torch.float32 else 1e150))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["activity", "error"])
def test_gradient_that_is_not_finite_is_not_called_so(where, bad):
    signals, _ = made_up()
    a, e = signals[1].rows()
    (a if where == "activity" else e)[0, 0] = bad
    assert not finite_products([Factors(signals)])


@pytest.mark.parametrize("name", LAYERS)
def test_factors_of_a_model_are_backprops_gradient(name):
    model, x, y = regression(name)
    loss = SquaredError().mean(model(x), y)
    for key, signals in signals_of(model, x, y).items():
        if signals[0].rows is None:
            continue
        (truth,) = torch.autograd.grad(loss, model.get_parameter(key), retain_graph=True)
        factors = Factors(signals).scaled(-1.0)  # errors point downhill
        assert_exact(factors.dense(), truth)
        matrix = torch.zeros(len(truth), truth[0].numel(), dtype=torch.float64)
        assert_exact(factors.add_to(matrix), truth)


# --- empirical signals ---------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", MODELS)
def test_empirical_signals_sum_to_backprops_gradient(name, cost):
    p = problem(name)
    found = signals_of(p.model, p.x, p.y, cost)
    # errors are minus the cost's gradient: the sign is of no account to squares
    sums = [-sum(signal.form() for signal in signals) for signals in found.values()]
    assert_exact(flat(sums), flat(backprop(p, cost)))


def per_sample_loss(model, cost):
    """``parameters, one input, one target -> cost``, by torch alone."""

    def loss(parameters, x, y):
        out = functional_call(model, parameters, (x[None],))
        if cost == "cross_entropy":
            return F.cross_entropy(out, y[None])
        return 0.5 * (out[0] - y).square().sum()

    return loss


def per_sample_gradients(model, x, y, cost):
    """Exact gradients ``(B, *parameter)`` of every sample's cost, by parameter."""
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    if cost == "mse" and not y.is_floating_point():
        y = F.one_hot(y, CLASSES).to(x.dtype)
    return vmap(grad(per_sample_loss(model, cost)), (None, 0, 0))(parameters, x, y)


def outer_products(signal):
    """Every sample's own gradient ``(B, out, in)``: the sum over its positions."""
    activity, error = (r.unflatten(0, (signal.samples, -1)) for r in signal.rows())
    return torch.einsum("bto,bti->boi", error, activity)


# those of MODELS in which every weight is a product; name -> names of the weights
PRODUCTS = {
    "mlp": ["0.weight", "2.weight", "4.weight"],
    "one layer": ["weight"],
    "convolutional": ["0.weight", "3.weight", "7.weight"],
    "functional": ["conv.weight", "hidden.weight", "leave.weight"],
}


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_rows_of_one_sample_are_its_own_gradient(name, cost):
    p = problem(name)
    found = signals_of(p.model, p.x, p.y, cost)
    truth = per_sample_gradients(p.model, p.x, p.y, cost)
    weights = {k: v for k, v in found.items() if k.endswith("weight")}
    assert [k for k, signals in weights.items() if signals[0].rows] == PRODUCTS[name]
    for key in PRODUCTS[name]:
        (signal,) = found[key]
        assert_exact(-outer_products(signal), truth[key].flatten(2))
        assert_exact(signal.scale * outer_products(signal).sum(0), signal.form())


@pytest.mark.parametrize("name", LAYERS)
def test_rows_of_one_sample_are_its_own_gradient_at_positions_and_places(name):
    model, x, y = regression(name)
    truth = per_sample_gradients(model, x, y, "mse")
    for key, signals in signals_of(model, x, y).items():
        if key.endswith("weight"):
            found = -sum(outer_products(signal) for signal in signals)
            assert_exact(found, truth[key].flatten(2))


# --- the expectation over the model's own targets ------------------------------------------------


def second_moments(gradients):
    """``sum_n g_n g_n^T`` of gradients ``(B, ...)``."""
    g = gradients.flatten(1)
    return g.T @ g


@pytest.mark.parametrize("name", PRODUCTS)
def test_true_signals_give_the_expectation_over_drawn_classes(name):
    p = problem(name)
    with torch.no_grad():
        probability = torch.softmax(p.model(p.x), 1)
    classes = probability.shape[1]
    truth = dict.fromkeys(PRODUCTS[name], 0)
    for k in range(classes):
        drawn = per_sample_gradients(p.model, p.x, torch.full_like(p.y, k), "cross_entropy")
        for key in truth:
            weighted = drawn[key].flatten(1) * probability[:, k : k + 1].sqrt()
            truth[key] = truth[key] + second_moments(weighted)
    found = signals_of(p.model, p.x, p.y, "cross_entropy", "true")
    for key, expected in truth.items():
        assert len(found[key]) == classes
        assert_exact(sum(second_moments(outer_products(s)) for s in found[key]), expected)


@pytest.mark.parametrize("name", ["linear at positions", "deep at positions", "conv", "two convs"])
def test_true_signals_of_mse_give_the_jacobians_square(name):
    """Of ``t ~ N(s, 1)``: the expectation of ``J^T (s - t) (s - t)^T J`` is ``J^T J``."""
    model, x, y = regression(name)
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def output(parameters, x):
        return functional_call(model, parameters, (x[None],)).flatten()

    jacobians = vmap(jacrev(output), (None, 0))(parameters, x)
    found = signals_of(model, x, y, "mse", "true")
    for key in (k for k in parameters if k.endswith("weight")):
        assert len(found[key]) == y[0].numel()
        truth = second_moments(jacobians[key].flatten(0, 1))
        assert_exact(sum(second_moments(outer_products(s)) for s in found[key]), truth)


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
def test_true_signals_do_not_read_the_targets_and_differ_from_the_empirical(cost):
    p = problem("mlp")
    other = (p.y + 1) % CLASSES
    found = {
        name: signals_of(p.model, p.x, y, cost, targets)["0.weight"]
        for name, y, targets in [
            ("true", p.y, "true"),
            ("other target", other, "true"),
            ("empirical", p.y, "empirical"),
        ]
    }
    fisher = {k: sum(second_moments(outer_products(s)) for s in v) for k, v in found.items()}
    assert torch.equal(fisher["true"], fisher["other target"])
    assert (fisher["true"] - fisher["empirical"]).norm() > 0.1 * fisher["true"].norm()


def test_true_signals_of_cross_entropy_refuse_positions():
    model, x, _ = regression("two convs")
    labels = torch.zeros(BATCH, 2, 2, dtype=torch.long)
    with pytest.raises(
        ValueError,
        match=r"cost 'cross_entropy' takes outputs \(B, classes\), got \(3, 2, 2, 2\); "
        r"use fisher='empirical'",
    ):
        signals_of(model, x, labels, "cross_entropy", "true")
    assert signals_of(model, x, labels, "cross_entropy")["0.weight"]


class Quartic(SquaredError):
    """A cost whose expectation nobody has worked out."""

    name = "quartic"
    directions = Cost.directions

    def value(self, s, y):
        return 0.25 * (s - y).flatten(1).square().square().sum(1)

    def gradient(self, s, y):
        return (s - y) ** 3


def test_true_signals_of_a_cost_without_expectation_are_refused():
    model, x, y = regression("linear")
    with pytest.raises(ValueError, match=r"'quartic' states no exact Fisher .*'empirical'"):
        signals_of(model, x, y, Quartic(), "true")
    assert signals_of(model, x, y, Quartic())["weight"]


@pytest.mark.parametrize("targets", ["empirical", "true"])
def test_frozen_parameter_has_no_signal_and_no_grad_is_written(targets):
    p = problem("mlp")
    p.model[2].weight.requires_grad_(False)
    found = signals_of(p.model, p.x, p.y, "cross_entropy", targets)
    assert found["2.weight"] == []
    assert all(found[k] for k in found if k != "2.weight")
    assert all(parameter.grad is None for parameter in p.model.parameters())
