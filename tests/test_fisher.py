"""Fisher information of a task, sample by sample, against torch.func."""

import math
from itertools import pairwise

import pytest
import torch
from problems import CLASSES, MODELS, distance, flat, tanh_mlp
from small_training import weights
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import mep
from mep.continual import fisher_diagonal
from mep.contrast import free_phase, free_signals, settings
from mep.curvature import diagonal, diagonal_fisher, kronecker_factors
from mep.energies import Cost, SquaredError
from mep.memory import track

# float64 rounding (1e-16) of sums over up to a hundred positions, with room for cancellation.
SAME = 1e-10
BATCHES = (3, 1, 5)  # means over batches of equal weight would be wrong
CHOICES = [("true", "cross_entropy"), ("true", "mse"), ("empirical", "cross_entropy")]


class Tied(nn.Module):
    """One layer at two places of the chain."""

    def __init__(self):
        super().__init__()
        self.layer, self.leave = nn.Linear(5, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.leave(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Shared(nn.Module):
    """One weight in two layers, each with a bias of its own, at several positions."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.leave = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(10, CLASSES)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.leave(torch.tanh(self.two(torch.tanh(self.one(x)))).flatten(1))


class Skip(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


def then(width, *first):
    return lambda: nn.Sequential(*[m() for m in first], nn.Flatten(), nn.Linear(width, CLASSES))


def normal(*shape):
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


# name -> (the model, inputs); layers that a model of problems.py does not have
OWN = {
    "deep": (lambda: tanh_mlp([5, 6, 6, 6, 6, CLASSES]), normal(5)),
    "no bias": (lambda: tanh_mlp([5, 6, CLASSES], bias=False), normal(5)),
    "positions": (then(18, lambda: nn.Linear(5, 6), nn.Tanh), normal(3, 5)),
    "stride": (
        then(36, lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh),
        normal(2, 5, 6),
    ),
    "dilation": (then(24, lambda: nn.Conv2d(2, 4, 2, dilation=2), nn.Tanh), normal(2, 5, 4)),
    "groups": (then(24, lambda: nn.Conv2d(4, 6, 3, groups=2), nn.Tanh), normal(4, 4, 4)),
    "circular": (
        then(24, lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.Tanh),
        normal(2, 2, 3),
    ),
    "dropout": (then(6, lambda: nn.Linear(5, 6), nn.Dropout, nn.Tanh), normal(5)),
    "tied": (Tied, normal(5)),
    "shared": (Shared, normal(2, 5)),
}
THEIRS = {
    name: (MODELS[name][0], lambda n, draw=MODELS[name][1]: torch.cat([draw() for _ in range(3)]))
    for name in [
        "convolutional", "residual", "layer norm", "attention", "batch norm", "embedding",
        "functional",
    ]
}  # fmt: skip
ROWS = OWN | THEIRS


def setup(name):
    """A row in training mode, with its data; running statistics are not those of the start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make, draw = ROWS[name]
        model, n = make().double(), sum(BATCHES)
        x, y = draw(n), torch.randint(0, CLASSES, (n,))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.train(), x, y


def batched(x, y):
    return list(zip(x.split(BATCHES), y.split(BATCHES), strict=True))


def sample_gradients(model, x, y, cost="cross_entropy"):
    """``(B, *parameter)`` by name, of every sample's own cost."""

    def loss(parameters, x, y):
        out = functional_call(model, parameters, (x[None],))
        mse = cost == "mse"
        return 0.5 * (out[0] - y).square().sum() if mse else F.cross_entropy(out, y[None])

    parameters = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    return vmap(grad(loss), (None, 0, 0))(parameters, x, y)


def targets(model, x, y, fisher, cost):
    """Targets with their probabilities ``(B,)``, over which to take the expectation.

    Of ``t ~ N(s, I)`` the points ``s +- sqrt(n) e_k`` have the second moments exactly.
    """
    s = model(x).detach()
    n, ones = s[0].numel(), torch.ones(len(x)).double()
    if fisher == "empirical":
        return [(y, ones)]
    if cost == "cross_entropy":
        p = torch.softmax(s, 1)
        return [(torch.full_like(y, k), p[:, k]) for k in range(n)]
    units = [
        sign * math.sqrt(n) * unit.view_as(s[0]) for unit in torch.eye(n).to(s) for sign in (1, -1)
    ]
    return [(s + unit, ones / (2 * n)) for unit in units]


def moments(model, x, y, fisher="true", cost="cross_entropy", power=2):
    """``E[g_n^power]`` by name, ``(B, *parameter)``, in evaluation mode."""
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    found = {}
    for t, p in targets(model, x, y, fisher, cost):
        for name, g in sample_gradients(model, x, t, cost).items():
            weighted = g**power * p.view(-1, *[1] * (g.dim() - 1))
            found[name] = found.get(name, 0) + weighted
    for module, training in before:
        module.training = training
    return found


def mean_moments(*task):
    return {name: m.mean(0) for name, m in moments(*task).items()}


def assert_is(found, truth):
    assert found.keys() == truth.keys()
    for name, expected in truth.items():
        assert found[name].shape == expected.shape
        assert float(expected.abs().max()) > 1e-6, "nothing to compare"
        assert distance([found[name]], [expected]) < SAME, name


# --- the diagonal --------------------------------------------------------------------------------


@pytest.mark.parametrize(("fisher", "cost"), CHOICES)
@pytest.mark.parametrize("name", ROWS)
def test_diagonal_is_the_mean_of_every_samples_squared_gradient(name, fisher, cost):
    model, x, y = setup(name)
    found = fisher_diagonal(model, batched(x, y), fisher=fisher, cost=cost)
    assert_is(found, mean_moments(model, x, y, fisher, cost))


def test_targets_of_mse_may_be_real_or_labels():
    model, x, y = setup("stride")
    found = fisher_diagonal(model, batched(x, y), fisher="empirical", cost="mse")
    one_hot = F.one_hot(y, CLASSES).double()
    truth = mean_moments(model, x, one_hot, "empirical", "mse")
    assert_is(found, truth)
    assert_is(fisher_diagonal(model, batched(x, one_hot), fisher="empirical", cost="mse"), truth)


def test_output_at_positions():
    conv, y = nn.Conv2d(2, 3, 2).double(), torch.randint(0, 3, (9, 2, 3))
    x = normal(2, 3, 4)(9)
    truth = mean_moments(conv, x, y, "true", "mse")
    real = torch.zeros(9, 3, 2, 3).double()
    assert_is(fisher_diagonal(conv, batched(x, real), cost="mse"), truth)
    truth = mean_moments(conv, x, y, "empirical")
    assert_is(fisher_diagonal(conv, batched(x, y), fisher="empirical"), truth)


def test_frozen_parameters_are_left_out_and_change_nothing_for_the_others():
    model, x, y = setup("residual")
    frozen = ["enter.weight", "one.first.weight", "one.second.bias"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    found = fisher_diagonal(model, batched(x, y))
    assert not found.keys() & set(frozen)
    assert_is(found, mean_moments(model, x, y))


def test_parameter_that_the_model_does_not_use_has_none():
    model, x, y = setup("tied")
    model.spare = nn.Parameter(torch.ones(2, 3).double())
    found = fisher_diagonal(model, batched(x, y))
    assert torch.equal(found["spare"], torch.zeros(2, 3).double())


# Where the product comes before the square: positions, groups, places, inside a block.
@pytest.mark.parametrize("at_once", [1, 100, 2**22])
@pytest.mark.parametrize("name", ["positions", "stride", "groups", "tied", "shared", "residual"])
def test_samples_are_taken_in_pieces(monkeypatch, name, at_once):
    pieces, plain = [], diagonal._gradients
    monkeypatch.setattr(diagonal, "_AT_ONCE", at_once)
    monkeypatch.setattr(diagonal, "_gradients", lambda *a: pieces.append(a) or plain(*a))
    model, x, y = setup(name)
    found = fisher_diagonal(model, batched(x, y), fisher="empirical")
    assert_is(found, mean_moments(model, x, y, "empirical"))
    for signal, span in pieces:
        assert span.stop - span.start <= max(1, at_once // signal.parameter.numel())
    assert any(span.start > 0 for _, span in pieces) == (at_once < 2**22)


def test_one_position_and_one_place_take_one_product(monkeypatch):
    monkeypatch.setattr(diagonal, "_gradients", None)
    model, x, y = setup("deep")
    assert len(fisher_diagonal(model, batched(x, y))) == 10


def test_a_block_never_holds_the_gradients_of_all_samples(monkeypatch):
    monkeypatch.setattr(diagonal, "_AT_ONCE", 2**14)
    model = nn.Sequential(Skip(50), nn.Linear(50, 3)).double()
    x, y = normal(50)(64), torch.zeros(64, dtype=torch.long)
    with track() as seen:
        fisher_diagonal(model, [(x, y)], fisher="empirical")
    whole = len(x) * 8 * sum(p.numel() for p in model[0].parameters())
    assert sum(seen.peak.values()) < whole


def test_diagonal_is_not_the_square_of_the_batch_gradient():
    model, x, y = setup("deep")
    found = fisher_diagonal(model, batched(x, y), fisher="empirical")
    squared = [g.mean(0).square() for g in sample_gradients(model, x, y).values()]
    assert float(flat(found.values()).sum()) > 2 * float(flat(squared).sum())
    assert distance(found.values(), squared) > 0.5


@pytest.mark.parametrize("diagonal_of", ["fisher_diagonal", "EWC"])
def test_sums_over_many_batches_do_not_stall_in_bfloat16(diagonal_of):
    """256 + 1 is 256 there: a sum in the parameter's own dtype would stop growing."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).bfloat16()
    batch = torch.randn(1, 4).bfloat16(), torch.tensor([1])

    def look(loader):
        if diagonal_of == "fisher_diagonal":
            return list(fisher_diagonal(model, loader).values())
        penalty = mep.EWC(1.0, "diagonal")
        opt = mep.EPOptimizer(model.parameters(), model=model, penalty=penalty)
        opt.consolidate(loader)
        return [opt.state[p]["penalty"]["curvature"] for p in model.parameters()]

    assert distance(look([batch] * 600), look([batch])) < 2**-7  # one rounding of the result


# --- targets that are drawn ----------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
@pytest.mark.parametrize("samples", [1, 7, 400])
def test_drawn_targets_are_right_on_average(samples, cost):
    """The deviation of every entry over its own standard deviation, which is known exactly.

    Squared it is 1 in expectation. Its mean over the entries, which go together, is above 10 or
    below 0.05 in less than one of ten seeds, by Markov; the seed is fixed.
    """
    model, x, y = setup("deep")
    truth, n = moments(model, x, y, "true", cost), len(x)
    if cost == "mse":  # g is normal: the variance of its square is 2 E[g^2]^2
        spread = {k: 2 * m.square() for k, m in truth.items()}
    else:
        fourth = moments(model, x, y, "true", cost, power=4)
        spread = {k: fourth[k] - m.square() for k, m in truth.items()}
    torch.manual_seed(0)
    found = fisher_diagonal(model, batched(x, y), samples=samples, cost=cost)
    off = flat([(found[k] - m.mean(0)).square() for k, m in truth.items()])
    variance = flat([v.sum(0) / (n * n * samples) for v in spread.values()])
    assert 0.05 < float((off / variance).mean()) < 10


# --- what is refused, and what stays as it was ---------------------------------------------------

BAD = [
    ({"fisher": "exact"}, ValueError, r"must be 'true' or 'empirical', got 'exact'"),
    ({"fisher": None}, ValueError, r"must be 'true' or 'empirical', got None"),
    ({"samples": 0}, ValueError, r"samples=...\)` draws targets .* at least 1: got 0"),
    ({"samples": -2}, ValueError, r"at least 1: got -2 with fisher='true'"),
    ({"samples": 3, "fisher": "empirical"}, ValueError, r"got 3 with fisher='empirical'"),
    ({"samples": 2.0}, TypeError, r"samples=...\)` must be a whole number or None, got 2.0"),
    ({"samples": True}, TypeError, r"must be a whole number or None, got True"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=str)
def test_bad_options_are_refused(options, kind, message):
    model, x, y = setup("deep")
    with pytest.raises(kind, match=message) as refusal:
        fisher_diagonal(model, batched(x, y), **options)
    assert "`fisher_diagonal(" in str(refusal.value)
    with pytest.raises(kind, match=message):
        mep.EWC(1.0, **options)


class Quartic(SquaredError):
    """A cost whose expectation nobody has worked out, and that draws nothing."""

    name = "quartic"
    directions, drawn = Cost.directions, Cost.drawn


REFUSED = [
    ([], {}, r"`loader` has no batches"),
    (None, {"cost": "hinge"}, r"`cost` must be one of .* got 'hinge'"),
    (None, {"cost": Quartic()}, r"'quartic' states no exact Fisher .* fisher='empirical'"),
    (None, {"cost": Quartic(), "samples": 2}, r"'quartic' draws no targets: use fisher='emp"),
    ("nan", {}, r"`x` holds NaN"),
]


@pytest.mark.parametrize(("loader", "options", "message"), REFUSED, ids=str)
def test_after_a_refusal_everything_is_as_it_was(loader, options, message):
    model, x, y = setup("batch norm")
    good = batched(x, y)
    bad = {"nan": [*good, (x * math.nan, y)], None: good}
    before, modes = weights(model), [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(model, loader if loader == [] else bad[loader], **options)
    assert torch.is_grad_enabled() and [m.training for m in model.modules()] == modes
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_model_is_left_as_it_was(fisher):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(12, CLASSES)
    ).double()
    model[1].eval()  # what was in evaluation mode stays there
    model[0].weight.grad = kept = torch.ones_like(model[0].weight)
    before = [t.clone() for t in model.state_dict().values()]
    modes = [m.training for m in model.modules()]
    loader = batched(normal(1, 4, 4)(9), torch.arange(9) % CLASSES)
    random = torch.get_rng_state()
    found = fisher_diagonal(model, loader, fisher=fisher)
    assert [m.training for m in model.modules()] == modes
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert torch.equal(random, torch.get_rng_state())
    assert model[0].weight.grad is kept and bool((kept == 1).all())
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert not any(f.requires_grad for f in found.values())


# --- factors -------------------------------------------------------------------------------------


def test_factors_of_a_linear_gaussian_layer_are_its_fisher():
    """``E[vec g vec g^T] = G (x) A``, row by row; of the bias, whose input is 1, too."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), normal(4)(7)
    truth = {}
    for t, p in targets(model, x, None, "true", "mse"):
        for name, g in sample_gradients(model, x, t, "mse").items():
            g = g.flatten(1)
            truth[name] = truth.get(name, 0) + (g * p[:, None]).T @ g / len(x)
    with torch.no_grad():
        free = free_phase(model, x, torch.zeros(7, 3).double(), settings(cost="mse"))
        found = free_signals(free, "true")
    for name, p in model.named_parameters():
        a, g = kronecker_factors(found[id(p)])
        assert distance([torch.kron(g, a)], [truth[name]]) < SAME


# --- why at the free equilibrium -----------------------------------------------------------------


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
def test_curvature_from_nudged_states_is_biased_to_first_order(cost):
    model, x, y = setup("deep")
    solver = mep.Sweep(max_sweeps=300, tol=1e-13)
    free, betas, off = fisher_diagonal(model, [(x, y)], fisher="empirical", cost=cost), [], []
    for k in range(4):
        betas.append(0.1 / 2**k)
        nudged = mep.settle(model, x, y, cost=cost, beta=betas[-1], settler=solver)
        at, found = nudged.configuration, {}
        for block, point, e in zip(mep.trace(model), at.points, at.local_errors(), strict=True):
            for signal in block.signals(point, e, 1 / len(x)):
                found[id(signal.parameter)] = diagonal_fisher([signal]).detach()
        ours = [found[id(model.get_parameter(name))] for name in free]
        off.append(distance(ours, free.values()))
    orders = [math.log2(a / b) for a, b in pairwise(off)]
    assert all(0.8 < order < 1.2 for order in orders), (off, orders)
    assert 0.01 < off[0] < 0.5  # at an ordinary nudge it is no rounding, and still a curvature
