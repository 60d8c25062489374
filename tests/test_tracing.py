"""Models read as chains: cuts, names, refusals, changes noticed."""

import pytest
import torch
from problems import (
    EXACT,
    FunctionalNet,
    assert_is_its_function,
    backprop,
    distance,
    problem,
)
from torch import nn
from torch.nn import functional as F

import mep
from mep.blocks.chain import Chain
from mep.blocks.local import LocalBlock

# Two orders of adding up in float32
SINGLE = 1e-5

CHAINS = {
    "mlp": [("0", "Linear(6, 8)"), ("2", "Tanh > Linear(8, 7)"), ("4", "Tanh > Linear(7, 4)")],
    "residual": [
        ("enter", "Linear(5, 6)"),
        ("one.second", "Tanh > Subgraph"),
        ("two.second", "x + (Linear(6, 7) > Tanh > Linear(7, 6))"),
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


class Power(nn.Module):
    """Called like a product; takes a number, and stays whole for its data-dependent forward."""

    def forward(self, x, exponent):
        return x**exponent if x.sum() < 1e9 else x


def test_a_module_called_like_a_product_is_none():
    class Named(Called):
        def __init__(self, mul):
            super().__init__(None)
            self.mul = mul

        def forward(self, x):
            hidden = self.enter(x)
            return self.leave(self.mul(hidden, 2) if type(self.mul) is Power else self.mul(hidden))

    x = torch.randn(5, 3)
    for module in (Power(), nn.Linear(4, 4)):
        model = Named(module)
        assert torch.equal(mep.free_states(model, x)[-1], model(x))
    assert [block.kind for block in mep.trace(model)] == ["closed form"] * 3


@pytest.mark.parametrize(
    "factor", [lambda x: x * x, lambda x: x * float("inf"), lambda x: x * 10**400]
)
def test_only_a_finite_number_is_a_factor(factor):
    kinds = [block.kind for block in mep.trace(Called(factor))]
    assert "closed form" not in kinds[1:]


def test_whole_numbers_stay_whole():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 3)

        def forward(self, x):
            return self.embed(x * 2)

    model, x = Doubled(), torch.arange(4)
    assert torch.equal(mep.free_states(model, x)[-1], model(x))


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
    "factor": lambda x: 0.3 * x,
    "factor behind": lambda x: x * -2,
    "factor by torch": lambda x: torch.mul(x, 0.3),
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


class Counting(nn.Module):
    """Statistics written by hand, in place or not."""

    def __init__(self, in_place=True):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("nothing", None)

    def forward(self, x):
        if self.in_place:
            self.calls += 1
            self.mean.mul_(0.5).add_(0.5 * x.detach().mean(0))
        else:
            self.calls, self.mean = self.calls + 1, 0.5 * self.mean + 0.5 * x.detach().mean(0)
        return x - self.mean


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
    "statistics": (Counting, "changes `mean`, `calls`.*submodule"),
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


@pytest.mark.parametrize("in_place", [True, False])
def test_statistics_written_by_hand_move_once_per_step(in_place):
    """Recorded once and for all, they would stand still; or move at every evaluation."""
    at, inner = problem("mlp"), Counting(in_place)
    at.model = nn.Sequential(nn.Linear(6, 3), inner, nn.Tanh(), nn.Linear(3, 4)).double()
    means = []
    for step in range(3):
        with torch.no_grad():
            expected = 0.5 * inner.mean + 0.5 * at.model[0](at.x).mean(0)
        assert mep.estimate(at.model, at.x, at.y).converged
        assert int(inner.calls) == step + 1
        assert torch.allclose(inner.mean, expected, atol=1e-12)
        means.append(inner.mean.clone())
    assert not torch.equal(means[0], means[2])
    mep.trace(at.model)
    assert int(inner.calls) == 3


def test_buffers_that_are_replaced_are_noticed():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("by", torch.ones(4).double())

        def forward(self, x):
            return x * self.by

    at = problem("mlp")
    at.model = nn.Sequential(nn.Linear(6, 4), Scaled(), nn.Linear(4, 4)).double()
    first = mep.estimate(at.model, at.x, at.y).loss
    at.model[1].by = torch.zeros(4).double()
    assert mep.estimate(at.model, at.x, at.y).loss != first
    assert torch.equal(mep.free_states(at.model, at.x)[-1], at.model(at.x))


def swap_layer(model):
    model[2] = nn.Linear(4, 2)


def swap_activation(model):
    model[1] = nn.ReLU()


def move_activation(model):
    model._modules["1"] = model._modules.pop("1")  # now the last


def add_hook(model):
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)


def reload_weights(model):
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})


def replace_parameter(model):
    model[2].weight = nn.Parameter(torch.ones(2, 4))


CHANGES = [
    swap_layer, swap_activation, move_activation, add_hook, reload_weights, replace_parameter,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_change_after_the_first_use_is_noticed(change):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    before = mep.free_states(model, x)[-1]
    change(model)
    after = mep.free_states(model, x)[-1]
    assert torch.equal(after, model(x)) and not torch.equal(after, before)


def test_chain_has_length_and_each_parameter_once():
    chain = mep.trace(Tied())
    assert isinstance(chain, Chain) and len(chain) == len(list(chain)) == 4
    assert len(list(chain.parameters())) == len(list(Tied().parameters()))


class InPlaceStatement(nn.Module):
    """Its activation is a statement whose result nobody takes."""

    def __init__(self, apply):
        super().__init__()
        self.a, self.b, self.apply = nn.Linear(3, 4), nn.Linear(4, 2), apply

    def forward(self, x):
        h = self.a(x)
        self.apply(h)
        return self.b(h)


@pytest.mark.parametrize(
    "apply", [lambda h: h.relu_(), torch.relu_, lambda h: F.relu(h, inplace=True)], ids=range(3)
)
def test_in_place_statement_is_refused_and_never_dropped(apply):
    with pytest.raises(mep.TraceError, match="works in place and its result is not used"):
        mep.trace(InPlaceStatement(lambda h: apply(h)))


@torch.fx.wrap
def relu(x):
    """Not torch's."""
    return x.clamp(min=0) ** 2


class OwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(relu(self.a(x)))


def test_own_function_named_like_torchs_is_called():
    model, x = OwnFunction(), torch.randn(5, 3)
    assert torch.allclose(mep.free_states(model, x)[-1], model(x), atol=SINGLE)


def test_changed_number_of_a_module_is_noticed():
    model, x = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.1), nn.Linear(4, 2)), torch.randn(5, 3)
    mep.free_states(model, x)
    model[1].negative_slope = 0.9
    assert torch.allclose(mep.free_states(model, x)[-1], model(x), atol=SINGLE)


# --- residual blocks -----------------------------------------------------------------------------


class Skip(nn.Module):
    """A skip around modules, added up in some way."""

    def __init__(self, add, *branch):
        super().__init__()
        self.add, self.branch = add, nn.Sequential(*branch)

    def forward(self, x):
        return self.add(x, self.branch(x))


def plainly(x, f):
    return x + f


BRANCHES = {
    "one layer": (plainly, nn.ReLU(), nn.Linear(6, 6)),
    "the other way round": (lambda x, f: f + x, nn.Tanh(), nn.Linear(6, 6, bias=False)),
    "torch.add": (torch.add, nn.Tanh(), nn.Linear(6, 6)),
    "two layers": (plainly, nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6)),
}
LOCAL = {
    "ends without a layer": (plainly, nn.Linear(6, 6), nn.ReLU()),
    "a factor": (lambda x, f: torch.add(x, f, alpha=2), nn.ReLU(), nn.Linear(6, 6)),
    "a difference": (lambda x, f: x - f, nn.ReLU(), nn.Linear(6, 6)),
    "in place": (plainly, nn.ReLU(inplace=True), nn.Linear(6, 6)),
    "in place after a view": (plainly, nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(6, 6)),
    "broadcast": (plainly, nn.ReLU(), nn.Linear(6, 1)),
    "a norm": (plainly, nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 6)),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_skip_has_a_closed_form(name):
    """Against the same block by local autograd: prediction, errors, displacement, gradients."""
    (block,) = mep.trace(Skip(*BRANCHES[name]).double())
    assert block.kind == "closed form" and block.describe().startswith("x + (")
    twin = LocalBlock("twin", block.modules)
    s, d, e = torch.randn(3, 7, 6, dtype=torch.float64).unbind()
    found = []
    for each in (block, twin):
        with torch.no_grad():
            f, point = each.predict(s)
            delta, moved = each.difference(point, d)
            pulled = each.pull(moved, each.product(point, e))
            signals = {id(g.parameter): g.form() for g in each.signals(moved, e, -0.3)}
        found.append([f, delta, pulled, *(signals[id(p)] for p in block.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", LOCAL)
def test_other_skips_are_left_to_autograd(name):
    model = Skip(*LOCAL[name])
    (block,) = mep.trace(model)
    assert block.kind == "local autograd"
    s = torch.randn(7, 6)
    torch.testing.assert_close(block.predict(s.clone())[0], model(s.clone()))


@pytest.mark.parametrize(
    "branch",
    [
        [nn.AvgPool2d(4), nn.Conv2d(3, 3, 1)],
        [nn.ReLU(), nn.Conv2d(3, 3, 4)],
        [nn.ReLU(), nn.Conv2d(3, 3, 3, stride=4, padding=1)],
    ],
    ids=["pooled", "unpadded", "strided"],
)
def test_skips_that_broadcast_over_space_are_left_to_autograd(branch):
    model = Skip(plainly, *branch)
    (block,) = mep.trace(model)
    assert block.kind == "local autograd"
    s = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(block.predict(s)[0], model(s))


def test_convolutions_may_be_skipped_and_hooks_may_not():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    (block,) = mep.trace(Skip(plainly, nn.ReLU(), conv).double())
    assert block.kind == "closed form"
    conv.register_forward_hook(lambda *a: None)
    (block,) = mep.trace(Skip(plainly, nn.ReLU(), conv))
    assert block.kind == "local autograd"
