"""Blocks: closed forms against autograd, and models read as chains."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    ACTIVATIONS,
    DEVICES,
    DTYPES,
    EXACT,
    MODELS,
    FunctionalNet,
    backprop,
    distance,
    problem,
    random_states,
    tanh_mlp,
)
from torch import nn
from torch.nn import functional as F

import mep
from mep.blocks.activations import of_module
from mep.blocks.chain import Chain
from mep.blocks.local import LocalBlock
from mep.blocks.operations import operation_of

# A difference costs about ten roundings of size eps |d| times a slope or curvature below 7 here.
ROUNDINGS = 70
# phi(x + d) is plain subtraction's rounding error in float64 at |x| <= 36, and its derivative's.
SUBTRACTION = 36 * 10 * torch.finfo(torch.float64).eps
# phi(x + d) - phi(x) = phi'(x) d (1 + O(d)): curvatures here are below 10.
TINY = 1e-9
TANGENT = 1e-7
# One product in float32 and its double: the rounding of the float32 matrix product alone.
SINGLE = 1e-5

BLOCK_MODELS = sorted(MODELS)


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


def assert_is_its_function(block, s, d=None, tolerance=EXACT):
    """Every method of a block against autograd through its modules, at a random error."""
    body = nn.Sequential(*block.modules)
    out, point = block.predict(s)
    e = torch.randn_like(out)
    parameters = [p for p in body.parameters() if p.requires_grad]
    inputs = [s.detach().requires_grad_()] if s.is_floating_point() else []
    truth = body(inputs[0] if inputs else s)
    grads = torch.autograd.grad(truth, [*inputs, *parameters], e)
    torch.testing.assert_close(out, truth, rtol=tolerance, atol=tolerance)
    if inputs:
        pulled = block.pull(point, block.product(point, e))
        torch.testing.assert_close(pulled, grads[0], rtol=tolerance, atol=tolerance)
        d = torch.randn_like(s) if d is None else d
        delta, moved_point = block.difference(point, d)
        change = (body(s + d) - body(s)).detach()
        torch.testing.assert_close(delta, change, rtol=tolerance, atol=tolerance)
        there = torch.autograd.functional.vjp(body, s + d, e)[1]
        pulled = block.pull(moved_point, block.product(moved_point, e))
        torch.testing.assert_close(pulled, there, rtol=tolerance, atol=tolerance)
    found = dict(block.gradients(point, e, 0.5))
    assert set(found) == set(parameters)
    for parameter, gradient in zip(parameters, grads[len(inputs) :], strict=True):
        torch.testing.assert_close(found[parameter], 0.5 * gradient, rtol=tolerance, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(
    positions=st.lists(st.integers(1, 3), max_size=2),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    bias=st.booleans(),
)
def test_linear_over_any_positions(positions, sizes, bias):
    n_in, n_out, batch = sizes
    model = nn.Sequential(nn.Tanh(), nn.Linear(n_in, n_out, bias=bias)).double()
    (block,) = mep.trace(model)
    assert block.kind == "closed form"
    assert_is_its_function(block, torch.randn(batch, *positions, n_in, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    groups=st.integers(1, 2),
    bias=st.booleans(),
)
def test_conv2d_with_any_geometry(stride, padding, dilation, kernel, groups, bias):
    conv = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups, bias)
    (block,) = mep.trace(nn.Sequential(nn.Sigmoid(), conv).double())
    assert block.kind == "closed form"
    assert_is_its_function(block, torch.randn(2, 2, 6, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(1, 2, 3, padding="same"), nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")],
    ids=["same", "circular"],
)
def test_conv2d_without_closed_form_is_left_to_autograd(conv):
    (block,) = mep.trace(conv.double())
    assert block.kind == "local autograd"
    assert_is_its_function(block, torch.randn(2, 1, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_blocks_are_their_functions(name):
    at = problem(name)
    # Evaluating a batch norm's modules directly would move its running statistics.
    states = [at.x, *random_states(at.model, at.x)[:-1]]
    for block, s in zip(mep.trace(copy.deepcopy(at.model)), states, strict=True):
        assert_is_its_function(block, s)


@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_closed_form_equals_its_autograd_twin(name):
    at = problem(name)
    pairs = list(zip(mep.trace(at.model), autograd_twin(at.model), strict=True))
    assert all(twin.kind == "local autograd" for _, twin in pairs)
    states = [at.x, *random_states(at.model, at.x)[:-1]]
    for (block, twin), s in zip(pairs, states, strict=True):
        (out, point), (twin_out, twin_point) = block.predict(s), twin.predict(s)
        e = torch.randn_like(out)
        compare = [(out, twin_out)]
        if s.is_floating_point():
            d = torch.randn_like(s)
            compare += [
                (b.pull(p, b.product(p, e)), b.difference(p, d)[0])
                for b, p in ((block, point), (twin, twin_point))
            ]
        grads = [dict(b.gradients(p, e, 2.0)) for b, p in ((block, point), (twin, twin_point))]
        assert set(grads[0]) == set(grads[1])
        compare.append((list(grads[0].values()), [grads[1][p] for p in grads[0]]))
        if s.is_floating_point():
            compare = [compare[0], *zip(*compare[1:3], strict=True), compare[3]]
        for ours, theirs in compare:
            torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)


def autograd_twin(model):
    return mep.trace(model, gradient_method="autograd")


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_chain_of_any_shape_is_the_model(sizes, seed):
    torch.manual_seed(seed)
    model = tanh_mlp(sizes).double()
    x = torch.randn(2, sizes[0], dtype=torch.float64)
    states = mep.free_states(model, x)
    assert [s.shape for s in states] == [(2, n) for n in sizes[1:]]
    assert torch.equal(states[-1], model(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_free_states_are_the_forward_pass(name, dtype, device):
    at = problem(name, dtype=dtype, device=device)
    output = mep.free_states(at.model, at.x)[-1]
    assert output.dtype == dtype and not output.requires_grad
    assert torch.equal(output, at.model(at.x))


CHAINS = {
    "mlp": [("0", "Linear(6, 8)"), ("2", "Tanh > Linear(8, 7)"), ("4", "Tanh > Linear(7, 4)")],
    "residual": [
        ("enter", "Linear(5, 6)"),
        ("one.second", "Tanh > Subgraph"),
        ("two.second", "Subgraph"),
        ("leave", "Sigmoid > Linear(6, 4)"),
    ],
    "layer norm": [("0", "Linear(5, 6)"), ("3", "LayerNorm > GELU > Linear(6, 4)")],
    "attention": [
        ("enter", "Linear(3, 6)"),
        ("attention.attend", "Subgraph"),
        ("leave", "Subgraph > Tanh > Linear(6, 4)"),
    ],
    "embedding": [("0", "Embedding"), ("3", "Flatten > Tanh > Linear(15, 4)")],
    "functional": [
        ("conv", "Conv2d(1, 3, (3, 3))"),
        ("hidden", "ReLU > MaxPool2d > Flatten > Linear(12, 6)"),
        ("leave", "Tanh > Flatten > Linear(6, 4)"),
    ],
}


@pytest.mark.parametrize("name", sorted(CHAINS))
def test_cut_points_and_names(name):
    chain = mep.trace(problem(name).model)
    assert [(block.name, block.describe()) for block in chain] == CHAINS[name]


def test_functional_calls_get_closed_forms():
    assert {block.kind for block in mep.trace(FunctionalNet())} == {"closed form"}


class Called(nn.Module):
    """Linear, one function, Linear."""

    def __init__(self, function):
        super().__init__()
        self.enter, self.leave, self.function = nn.Linear(3, 4), nn.Linear(4, 2), function

    def forward(self, x):
        return self.leave(self.function(self.enter(x)))


FUNCTIONS = {
    "relu": F.relu,
    "relu inplace": lambda x: F.relu(x, inplace=True),
    "method": lambda x: x.sigmoid(),
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky relu": lambda x: F.leaky_relu(x, negative_slope=0.3),
    "elu": lambda x: F.elu(x, alpha=0.4),
    "softplus": lambda x: F.softplus(x, beta=3.0),
    "silu": F.silu,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.5),
    "relu6": F.relu6,
}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functional_activation_keeps_its_options(name):
    torch.manual_seed(0)
    model, x = Called(FUNCTIONS[name]).double(), torch.randn(5, 3, dtype=torch.float64)
    block = list(mep.trace(model))[-1]
    assert block.kind == "closed form"
    assert torch.equal(mep.free_states(model, x)[-1], model(x))
    assert_is_its_function(block, torch.randn(5, 4, dtype=torch.float64))


def test_nested_sequential_is_read_off():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 4))),
        nn.Sequential(),
        nn.Tanh(),
        nn.Linear(4, 2),
        nn.Sigmoid(),
    )
    described = [(b.name, b.describe(), b.kind) for b in mep.trace(model)]
    assert described == [
        ("0.0", "Linear(2, 3)", "closed form"),
        ("0.1.1", "ReLU > Linear(3, 4)", "closed form"),
        ("3", "Tanh > Linear(4, 2)", "closed form"),
        ("4", "Sigmoid", "closed form"),
    ]


class Trailing(nn.Module):
    """Ends in a tuple of which one entry is never used, as attention usually does."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Linear(4, 4)
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        h = self.enter(x)
        found, _ = self.attend(h, h, h)
        return found


class Unused(nn.Module):
    """Computes something after its output that nobody reads."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave, self.other = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        h = self.enter(x)
        y = self.leave(h)
        self.other(h)
        return y


@pytest.mark.parametrize("make", [Trailing, Unused])
def test_unused_values_do_not_swallow_a_block(make):
    model, x = make(), torch.randn(3, 2, 4)
    chain = mep.trace(model)
    assert len(chain) == 2
    assert torch.equal(chain.free(x)[0][-1], model(x))


class Batched(nn.Module):
    """Reads the batch size before a cut and uses it behind."""

    def __init__(self, read):
        super().__init__()
        self.enter, self.leave, self.read = nn.Linear(4, 6), nn.Linear(6, 2), read

    def forward(self, x):
        n = self.read(x)
        return self.leave(torch.tanh(self.enter(x.view(n, -1))).view(n, 6))


READS = {
    "size": lambda x: x.size(0),
    "shape": lambda x: x.shape[0],
    "sizes": lambda x: x.size()[0],
}


@pytest.mark.parametrize("name", sorted(READS))
def test_batch_size_may_cross_a_cut(name):
    model, x = Batched(READS[name]), torch.randn(3, 2, 2)
    chain = mep.trace(model)
    assert len(chain) == 2
    assert torch.equal(chain.free(x)[0][-1], model(x))


class Folded(nn.Module):
    """Folds positions into the batch: states would belong to no sample."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.enter(x.reshape(-1, 4))
        return self.leave(torch.tanh(h)).view(x.size(0), -1, 3)


def test_folding_into_the_batch_is_refused_and_never_wrong():
    with pytest.raises(ValueError, match="batch must stay the first dimension"):
        mep.free_states(Folded(), torch.randn(3, 2, 4))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.middle, self.leave = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.leave.weight = self.middle.weight

    def forward(self, x):
        h = torch.tanh(self.enter(x))
        h = torch.tanh(self.middle(torch.tanh(self.middle(h))))
        return self.leave(h)


def test_shared_weights_get_the_sum_of_their_gradients():
    at = problem("mlp")
    at.model, at.x = Tied().double(), at.x[:, :3]
    assert len(mep.trace(at.model)) == 4
    mep.estimate(at.model, at.x, at.y, settler=mep.Limit())
    ours = [p.grad for p in at.model.parameters()]
    assert distance(ours, backprop(at)) < EXACT


def test_parametrised_layer_is_left_to_autograd():
    torch.manual_seed(0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))
    at = problem("mlp")
    at.model = nn.Sequential(normed, nn.Tanh(), nn.Linear(5, 4)).double()
    assert [b.kind for b in mep.trace(at.model)] == ["local autograd", "closed form"]
    mep.estimate(at.model, at.x, at.y, settler=mep.Limit())
    assert distance([p.grad for p in at.model.parameters()], backprop(at)) < EXACT


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, y):
        return self.layer(x) + y


class TwoOutputs(TwoInputs):
    def forward(self, x):
        return self.layer(x), x


class FunctionalDropout(TwoInputs):
    def forward(self, x):
        return F.dropout(self.layer(x), 0.5, self.training)


class DataDependent(TwoInputs):
    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


def hooked():
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_forward_hook(lambda module, inputs, output: output)
    return model


def shared_norm():
    norm = nn.BatchNorm1d(3)
    return nn.Sequential(norm, nn.Linear(3, 3), norm, nn.Linear(3, 3))


REFUSED = {
    "two inputs": (TwoInputs, "takes 2 inputs"),
    "two outputs": (TwoOutputs, "returns several values"),
    "dropout": (FunctionalDropout, "functional dropout"),
    "data": (DataDependent, "cannot be recorded"),
    "hooks": (hooked, "forward hooks"),
    "norm": (shared_norm, "keeps buffers"),
    "empty": (lambda: nn.Sequential(nn.Tanh()), "no parameters"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refusal_names_its_reason(name):
    make, reason = REFUSED[name]
    with pytest.raises(mep.TraceError, match=reason):
        mep.trace(make())


def test_refusal_lists_every_reason():
    model = nn.Sequential(
        TwoOutputs(), nn.Sequential(FunctionalDropout()), TwoInputs(), shared_norm()
    )
    with pytest.raises(mep.TraceError) as caught:
        mep.trace(model)
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 4
    for line, (path, reason) in zip(
        lines,
        [("0", "several"), ("1.0", "dropout"), ("2", "2 inputs"), ("3.2", "buffers")],
        strict=True,
    ):
        assert f"`{path}`" in line and reason in line


@pytest.mark.parametrize(
    ("arguments", "kind", "reason"),
    [
        (("model",), TypeError, "must be an nn.Module"),
        ((nn.Linear(2, 2), "magic"), ValueError, "'analytic' or 'autograd'"),
    ],
)
def test_trace_refuses_bad_arguments(arguments, kind, reason):
    options = {"gradient_method": arguments[1]} if len(arguments) > 1 else {}
    with pytest.raises(kind, match=reason):
        mep.trace(arguments[0], **options)


def test_data_dependent_submodule_is_one_block():
    at = problem("mlp")
    inner = DataDependent()
    at.model = nn.Sequential(nn.Linear(6, 3), inner, nn.Tanh(), nn.Linear(3, 4)).double()
    assert [b.describe() for b in mep.trace(at.model)][1] == "DataDependent"
    with torch.no_grad():
        at.model[0].bias.fill_(9.0)  # the branch with the layer
    mep.estimate(at.model, at.x, at.y, settler=mep.Limit())
    assert distance([p.grad for p in at.model.parameters()], backprop(at)) < EXACT


def swap_layer(model):
    model[2] = nn.Linear(4, 2)


def swap_activation(model):
    model[1] = nn.ReLU()


def add_hook(model):
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)


def reload_weights(model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})


def replace_parameter(model):
    model[2].weight = nn.Parameter(torch.ones(2, 4))


CHANGES = [swap_layer, swap_activation, add_hook, reload_weights, replace_parameter]


@pytest.mark.parametrize("change", CHANGES)
def test_change_after_the_first_use_is_noticed(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    before = mep.free_states(model, x)[-1]
    change(model)
    after = mep.free_states(model, x)[-1]
    assert torch.equal(after, model(x)) and not torch.equal(after, before)


def dropped():
    """Dropout in a closed form, inside an attention module and inside a recorded subgraph."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x):
            return x + self.drop(torch.tanh(self.layer(x)))

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.attend(x, x, x, need_weights=False)[0]

    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 4), Skip(), Attend(),
        nn.Flatten(), nn.Linear(8, 4),
    ).double()  # fmt: skip


@pytest.mark.parametrize("method", ["analytic", "autograd"])
def test_dropout_has_one_mask_in_all_phases(method):
    torch.manual_seed(0)
    model, x = dropped(), torch.randn(6, 2, 3, dtype=torch.float64)
    for block, s in zip(mep.trace(model, gradient_method=method), states_of(model, x), strict=True):
        _, point = block.predict(s)
        still = torch.zeros_like(s)
        delta, moved_point = block.difference(point, still)
        # With another mask, an unmoved input would make another output.
        assert torch.equal(delta, torch.zeros_like(delta))
        e = torch.randn_like(delta)
        here, there = (block.pull(p, block.product(p, e)) for p in (point, moved_point))
        assert torch.equal(here, there)


def states_of(model, x):
    return [x, *mep.free_states(model, x)[:-1]]


def test_dropout_phases_leave_the_random_stream_alone():
    """Only the free phase draws: a longer settling sees the same numbers afterwards."""
    model, x = dropped(), torch.randn(6, 2, 3, dtype=torch.float64)
    y = torch.zeros(6, dtype=torch.long)
    after = []
    for sweeps in (1, 4):
        torch.manual_seed(7)
        mep.estimate(model, x, y, settler=mep.Sweep(max_sweeps=sweeps, tol=None))
        after.append(torch.rand(3))
    assert torch.equal(*after)


class NormedSkip(nn.Module):
    """Batch norm and dropout inside a recorded subgraph."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.norm(self.layer(x)))


def normed(kind):
    inner = [nn.BatchNorm1d(4), nn.Tanh()] if kind == "plain" else [NormedSkip()]
    return nn.Sequential(nn.Linear(3, 4), *inner, nn.Linear(4, 4)).double()


@pytest.mark.parametrize("first_mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["plain", "subgraph"])
def test_running_statistics_move_once_per_estimate(kind, first_mode):
    torch.manual_seed(0)
    model, x, y = normed(kind), torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 4
    twin = copy.deepcopy(model)
    model.train(first_mode == "train")
    mep.trace(model)
    mep.free_states(model, x)  # records the forward in that mode, and moves nothing
    model.train()
    mep.estimate(model, x, y, stencil=mep.five_point)
    twin(x)
    for ours, torchs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=EXACT, atol=EXACT)
    assert any(int(b) == 1 for b in model.buffers() if b.dim() == 0)


def test_chain_recorded_in_eval_mode_follows_a_switch_to_train():
    """A recorded subgraph keeps the flag of its recording; its children's flags are the truth."""
    torch.manual_seed(0)
    model = normed("subgraph").eval()
    chain = mep.trace(model)
    model.train()
    before = [b.clone() for b in model.buffers()]
    s = torch.randn(6, 4, dtype=torch.float64)
    _, point = chain.blocks[1].predict(s)
    delta, _ = chain.blocks[1].difference(point, torch.zeros_like(s))
    assert torch.equal(delta, torch.zeros_like(delta))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_inspection_moves_no_running_statistics(mode):
    at = problem("batch norm")
    at.model.train(mode == "train")
    before = [b.clone() for b in at.model.buffers()]
    states = mep.free_states(at.model, at.x)
    mep.energy(at.model, at.x, states, at.y, beta=0.1)
    mep.state_gradients(at.model, at.x, states, at.y, beta=0.1, method="autograd")
    mep.settle(at.model, at.x, at.y)
    assert all(torch.equal(a, b) for a, b in zip(before, at.model.buffers(), strict=True))


@pytest.mark.parametrize("name", BLOCK_MODELS)
@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_difference_in_float32_keeps_a_small_nudge(name, size):
    """Local and closed blocks alike, against the same block in double."""
    narrow, wide = problem(name, dtype=torch.float32), problem(name)
    wide.model.load_state_dict(narrow.model.state_dict())
    wide.x = narrow.x.double() if narrow.x.is_floating_point() else narrow.x
    chains = mep.trace(narrow.model), mep.trace(wide.model)
    states = states_of(narrow.model, narrow.x)
    for s, block, twin in zip(states[1:], *(c.blocks[1:] for c in chains), strict=True):
        d = size * torch.randn_like(s)
        delta = block.difference(block.predict(s)[1], d)[0]
        truth = twin.difference(twin.predict(s.double())[1], d.double())[0]
        assert delta.dtype == torch.float32
        assert distance([delta], [truth]) < SINGLE


def test_module_that_works_in_place_does_not_touch_the_states():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    for method in ("analytic", "autograd"):
        states = mep.trace(model, gradient_method=method).free(x)[0]
        assert torch.equal(states[0], model[0](x))


def test_frozen_parameters_are_left_out():
    block = mep.trace(nn.Linear(3, 2)).blocks[0]
    block.modules[0].weight.requires_grad_(False)
    for candidate in (block, LocalBlock("layer", block.modules)):
        out, point = candidate.predict(torch.randn(4, 3))
        found = [p for p, _ in candidate.gradients(point, torch.randn_like(out), 1.0)]
        assert [id(p) for p in found] == [id(block.modules[0].bias)]


def test_chain_has_length_and_each_parameter_once():
    chain = mep.trace(Tied())
    assert isinstance(chain, Chain) and len(chain) == len(list(chain)) == 4
    assert len(list(chain.parameters())) == len(list(Tied().parameters()))


def test_misfit_input_names_the_block():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"block `2` \(Tanh > Linear\(5, 2\)\).*shape \(2, 4\)"):
        mep.free_states(model, torch.randn(2, 3))
