"""Activations, pooling, dropout: closed forms against autograd."""

import pytest
import torch
from problems import (
    ACTIVATIONS,
    EXACT,
)
from torch import nn

import mep
from mep.blocks.activations import of_module
from mep.blocks.operations import Scale, operation_of

# A difference costs about ten roundings of size eps |d| times a slope or curvature below 7 here.
ROUNDINGS = 70
# phi(x + d) is plain subtraction's rounding error in float64 at |x| <= 36, and its derivative's.
SUBTRACTION = 36 * 10 * torch.finfo(torch.float64).eps
# phi(x + d) - phi(x) = phi'(x) d (1 + O(d)): curvatures here are below 10.
TINY = 1e-9
TANGENT = 1e-7


def grid(kinks=(), dtype=torch.float64):
    """Points on both sides of and on every kink, and out to the tails."""
    near = torch.tensor([0.0, 1e-4, -1e-4, 0.02, -0.3], dtype=torch.float64)
    points = [torch.linspace(-6, 6, 25, dtype=torch.float64), torch.tensor([-30.0, 25.0])]
    x = torch.cat([*points, *[near + k for k in kinks]])
    steps = [1e-6, 3e-4, 0.04, 0.06, 0.7, 2.5, 9.0]
    d = torch.tensor([s * sign for s in steps for sign in (1, -1)], dtype=torch.float64)
    x, d = torch.meshgrid(x, d, indexing="ij")
    return x.flatten().to(dtype), d.flatten().to(dtype)


def moved(activation, x, d):
    return activation.move(x, activation.value(x), d, x + d)


@pytest.fixture(params=sorted(ACTIVATIONS))
def activation(request):
    module, kinks = ACTIVATIONS[request.param]
    closed = of_module(module)
    assert closed is not None
    return module, kinks, closed


def test_activation_values_and_slopes_are_torchs(activation):
    module, kinks, closed = activation
    x = grid(kinks)[0].requires_grad_()
    g = torch.sin(torch.arange(len(x), dtype=torch.float64))
    y = module(x)
    torch.testing.assert_close(closed.value(x), y, rtol=EXACT, atol=EXACT)
    slope = torch.autograd.grad(y, x, g)[0]
    x, y = x.detach(), y.detach()
    torch.testing.assert_close(closed.pull(x, y, g), slope, rtol=EXACT, atol=EXACT)


def test_activation_difference_is_the_difference(activation):
    module, kinks, closed = activation
    x, d = grid(kinks)
    delta, y_new = moved(closed, x, d)
    torch.testing.assert_close(delta, module(x + d) - module(x), rtol=EXACT, atol=SUBTRACTION)
    torch.testing.assert_close(y_new, module(x + d), rtol=EXACT, atol=SUBTRACTION)


def test_activation_difference_keeps_its_digits_in_float32(activation):
    module, kinks, closed = activation
    x, d = grid(kinks, torch.float32)
    # A step across torch's own softplus seam is subtracted plainly: it jumps there.
    seam = kinks if isinstance(module, nn.Softplus) else ()
    clear = torch.ones_like(x, dtype=torch.bool)
    for k in seam:
        clear &= (x > k) == (x + d > k)
    x, d = x[clear], d[clear]
    # The float32 sum x + d moves the end point; the truth knows only x and d.
    truth = moved(closed, x.double(), d.double())[0]
    error = (moved(closed, x, d)[0].double() - truth).abs()
    allowed = ROUNDINGS * torch.finfo(torch.float32).eps * d.double().abs()
    assert (error <= allowed).all(), (x[error > allowed], d[error > allowed])


def test_activation_difference_of_a_tiny_step_is_its_tangent(activation):
    _, kinks, closed = activation
    x = grid(kinks)[0]
    x = x[torch.stack([(x - k).abs() > 1e-6 for k in (*kinks, 99.0)]).all(0)]
    d = torch.full_like(x, TINY)
    tangent = closed.pull(x, closed.value(x), d)
    delta = moved(closed, x, d)[0]
    assert ((delta - tangent).abs() <= TANGENT * TINY).all()
    assert tangent.abs().max() > 0.1 * TINY


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_ramps_state_their_kinks(name):
    module, kinks = ACTIVATIONS[name]
    box = of_module(module).box
    is_ramp = isinstance(module, nn.ReLU | nn.Hardtanh | nn.ReLU6)
    assert (box is not None) == is_ramp
    if box is not None:
        assert tuple(b for b in box if b != float("inf")) == kinks


def test_subclass_of_an_activation_has_no_closed_form():
    class Doubled(nn.Tanh):
        def forward(self, x):
            return 2 * super().forward(x)

    assert of_module(Doubled()) is None
    model = nn.Sequential(nn.Linear(3, 4), Doubled(), nn.Linear(4, 2))
    x = torch.randn(2, 3)
    assert torch.equal(mep.free_states(model, x)[-1], model(x))


OPERATIONS = {
    "factor": (Scale(-0.3), (2, 3, 4)),
    "flatten": (nn.Flatten(), (2, 3, 4)),
    "flatten some": (nn.Flatten(2), (2, 3, 4)),
    "unflatten": (nn.Unflatten(1, (2, 3)), (6,)),
    "max": (nn.MaxPool2d(2), (2, 6, 6)),
    "max overlapping": (nn.MaxPool2d(3, stride=1, padding=1), (2, 5, 5)),
    "max dilated": (nn.MaxPool2d(2, stride=1, dilation=2), (2, 5, 6)),
    "max ceil": (nn.MaxPool2d(2, ceil_mode=True), (2, 5, 5)),
    "average": (nn.AvgPool2d(2), (2, 6, 6)),
    "average overlapping": (nn.AvgPool2d(3, stride=1, padding=1), (2, 5, 5)),
    "average of real units": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (2, 5, 5)),
    "average, own divisor": (nn.AvgPool2d(2, divisor_override=3), (2, 4, 4)),
}


@pytest.mark.parametrize("name", sorted(OPERATIONS))
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_operation_against_autograd(name, size):
    module, shape = OPERATIONS[name]
    torch.manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64)
    d = size * torch.randn_like(x)
    operation = operation_of(module)
    assert operation is not None
    y, memo = operation.apply(x)
    g = torch.randn_like(y)
    truth = torch.autograd.functional.vjp(module, x, g)
    assert torch.equal(y, truth[0])
    torch.testing.assert_close(operation.pull(x, y, memo, g), truth[1], rtol=EXACT, atol=EXACT)
    delta, y_new, memo = operation.move(x, y, memo, d, x + d)
    torch.testing.assert_close(y_new, module(x + d), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(delta, module(x + d) - y, rtol=EXACT, atol=EXACT)
    there = torch.autograd.functional.vjp(module, x + d, g)[1]
    torch.testing.assert_close(operation.pull(x + d, y_new, memo, g), there, rtol=EXACT, atol=EXACT)


def test_max_pool_with_unchanged_winners_passes_a_displacement_exactly():
    operation = operation_of(nn.MaxPool2d(2))
    x = torch.randn(2, 1, 4, 4)
    d = torch.full_like(x, 1e-12)  # far below the last digit of x
    y, memo = operation.apply(x)
    assert torch.equal(operation.move(x, y, memo, d, x + d)[0], torch.full_like(y, 1e-12))


def test_dropout_mask_is_drawn_once():
    module = nn.Dropout(0.4)
    operation = operation_of(module)
    x, d = torch.ones(4, 50, dtype=torch.float64), torch.full((4, 50), 0.1, dtype=torch.float64)
    y, mask = operation.apply(x)
    assert 0 < int((mask == 0).sum()) < mask.numel()
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.6}
    delta, y_new, later = operation.move(x, y, mask, d, x + d)
    assert later is mask
    torch.testing.assert_close(delta, mask * d)
    torch.testing.assert_close(y_new, mask * (x + d))
    assert torch.equal(operation.pull(x, y, mask, d), mask * d)
    assert not torch.equal(operation.apply(x)[1], mask)  # the next step draws its own
    module.eval()
    assert operation.apply(x)[0] is x


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_dropout_at_the_ends(p):
    x = torch.randn(3, 4)
    assert torch.equal(operation_of(nn.Dropout(p)).apply(x)[0], x * (1 - p))
