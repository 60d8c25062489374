"""Fisher information of a task, sample by sample, against torch.func."""

import math
import pickle
from itertools import pairwise

import pytest
import torch
from problems import CLASSES, MODELS, Residual, distance, flat, tanh_mlp
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

EWC, SI, KINDS = mep.EWC, mep.SynapticIntelligence, ("kronecker", "diagonal")

# float64 rounding (1e-16) of sums over up to a hundred positions, with room for cancellation.
SAME = 1e-10
BATCHES = (3, 1, 5)  # means over batches of equal weight would be wrong
CHOICES = [(which, cost) for which in ("true", "empirical") for cost in ("cross_entropy", "mse")]


class Tied(nn.Module):
    """A layer at two places of the chain, and its weight in another layer, at two positions."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.leave = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(10, CLASSES)
        self.two.weight = self.one.weight

    def forward(self, x):
        x = torch.tanh(self.one(torch.tanh(self.one(x))))
        return self.leave(torch.tanh(self.two(x)).flatten(1))


def then(width, *first):
    return lambda: nn.Sequential(*[m() for m in first], nn.Flatten(), nn.Linear(width, CLASSES))


def normal(*shape):
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


# name -> (the model, inputs); layers that a model of problems.py does not have
OWN = {
    "deep": (lambda: tanh_mlp([5, 6, 6, 6, 6, CLASSES]), normal(5)),
    "positions": (then(18, lambda: nn.Linear(5, 6), nn.Tanh), normal(3, 5)),
    "strided": (then(36, lambda: nn.Conv2d(2, 4, 3, 2, padding=1), nn.Tanh), normal(2, 5, 6)),
    "wide": (
        then(144, lambda: nn.Conv2d(2, 4, (2, 3), padding=(1, 2), dilation=(1, 2)), nn.Tanh),
        lambda n: normal(2, 5, 6)(n).to(memory_format=torch.channels_last),
    ),
    "groups": (then(24, lambda: nn.Conv2d(4, 6, 3, groups=2), nn.Tanh), normal(4, 4, 4)),
    "dropout": (then(6, lambda: nn.Linear(5, 6), nn.Dropout, nn.Tanh), normal(5)),
    "tied": (Tied, normal(2, 5)),
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
        return F.cross_entropy(out, y[None]) if cost != "mse" else 0.5 * (out[0] - y).square().sum()

    parameters = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    return vmap(grad(loss), (None, 0, 0))(parameters, x, y)


def targets(model, x, y, fisher, cost):
    """Targets with their probabilities ``(B,)``, over which to take the expectation.

    Of ``t ~ N(s, I)`` the points ``s +- sqrt(n) e_k`` have the second moments exactly.
    """
    s = model(x).detach()
    n, ones = s[0].numel(), torch.ones(len(x)).double()
    if fisher == "empirical":
        return [(F.one_hot(y, CLASSES).double() if cost == "mse" else y, ones)]
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


@pytest.mark.parametrize(("fisher", "cost"), [("true", "mse"), ("empirical", "cross_entropy")])
def test_output_at_positions(fisher, cost):
    conv, x, y = nn.Conv2d(2, 3, 2).double(), normal(2, 3, 4)(9), torch.randint(0, 3, (9, 2, 3))
    found = fisher_diagonal(conv, batched(x, y), fisher=fisher, cost=cost)
    assert_is(found, mean_moments(conv, x, y, fisher, cost))


def test_frozen_parameters_are_left_out_and_unused_ones_have_no_curvature():
    model, x, y = setup("residual")
    frozen = ["enter.weight", "one.first.weight", "one.second.bias"]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    truth = mean_moments(model, x, y)
    model.spare = nn.Parameter(torch.ones(2, 3).double())
    found = fisher_diagonal(model, batched(x, y))
    assert torch.equal(found.pop("spare"), torch.zeros(2, 3).double())
    assert not found.keys() & set(frozen)
    assert_is(found, truth)


# Where the product comes before the square: positions, groups, places, inside a block.
@pytest.mark.parametrize("at_once", [1, 100, 2**22])
@pytest.mark.parametrize("name", ["positions", "strided", "wide", "groups", "tied", "residual"])
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
    model = nn.Sequential(Residual(50), nn.Linear(50, 3)).double()
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
        opt = mep.EPOptimizer(model.parameters(), model=model, penalty=EWC(1.0, "diagonal"))
        opt.consolidate(loader)
        return [opt.state[p]["penalty"]["curvature"] for p in model.parameters()]

    assert distance(look([batch] * 600), look([batch])) < 2**-7  # one rounding of the result


# --- targets that are drawn ----------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["cross_entropy", "mse"])
@pytest.mark.parametrize("samples", [1, 7, 100])
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
    ({"samples": 0}, ValueError, r"samples=...\)` draws targets .* at least 1: got 0"),
    ({"samples": 3, "fisher": "empirical"}, ValueError, r"got 3 with fisher='empirical'"),
    ({"samples": 2.0}, TypeError, r"samples=...\)` must be a whole number or None, got 2.0"),
]
BAD_PENALTIES = [
    ({"lam": -1.0}, ValueError, r"`EWC\(lam=...\)` must be a finite number >= 0, got -1.0"),
    ({"lam": "1"}, TypeError, r"`EWC\(lam=...\)` must be a number, got '1'"),
    ({"curvature": "full"}, ValueError, r"curvature=...\)` must be one of .*, got 'full'"),
    ({"mode": "both"}, ValueError, r"mode=...\)` must be one of .*, got 'both'"),
    ({"mode": "separate"}, ValueError, "keeps sums of factors.* use mode='online', or curvature="),
    ({"curvature": "diagonal", "gamma": 0.9}, ValueError, "is for mode='online'"),
    ({"gamma": 0.0}, ValueError, r"gamma=...\)` must be in \(0, 1\], got 0.0"),
    ({"damping": -0.1}, ValueError, r"damping=...\)` must be a finite number >= 0, got -0.1"),
    ({"every": 0}, ValueError, r"every=...\)` must be a whole number >= 1, got 0"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=str)
def test_bad_options_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        fisher_diagonal(nn.Linear(2, 2), [], **options)


@pytest.mark.parametrize(("options", "kind", "message"), BAD + BAD_PENALTIES, ids=str)
def test_bad_options_of_a_penalty_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        EWC(**{"lam": 1.0} | options)


class Quartic(SquaredError):
    """A cost whose expectation nobody has worked out, and that draws nothing."""

    name = "quartic"
    directions, drawn = Cost.directions, Cost.drawn


REFUSED = [
    ({}, lambda x, y: [], r"`loader` has no batches"),
    ({}, lambda x, y: [(x, y), (x * math.nan, y)], r"`x` holds NaN"),
    ({"cost": "hinge"}, lambda x, y: [(x, y)], r"`cost` must be one of .* got 'hinge'"),
    ({"cost": Quartic(), "samples": 2}, lambda x, y: [(x, y)], r"draws no targets: use fisher="),
]


@pytest.mark.parametrize(("options", "loader", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_after_a_refusal_everything_is_as_it_was(options, loader, message):
    model, x, y = setup("batch norm")
    before, modes = weights(model), [m.training for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        fisher_diagonal(model, loader(x, y), **options)
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


INPUT = torch.arange(12.0).view(3, 4).double()
SOME, NONE, HUGE = ((factor * INPUT, torch.tensor([0, 1, 2])) for factor in (0.1, 0.0, 1e200))
FORGETFUL = [
    (EWC(1.0), [], "`loader` has no batches"),
    (EWC(1.0), None, "EWC takes a task's curvature from its data"),
    (SI(1.0), [SOME], "gathers its memory during the updates"),
    *((EWC(1.0, kind), [SOME, HUGE], "curvature is not finite") for kind in KINDS),
    *((EWC(1.0, kind), [NONE], "the task's curvature is zero") for kind in KINDS),
    (SI(1.0), None, "have gathered no importance"),
]


@pytest.mark.parametrize(("penalty", "loader", "message"), FORGETFUL, ids=[r[2] for r in FORGETFUL])
def test_what_cannot_be_remembered_is_refused_and_changes_nothing(penalty, loader, message):
    model = nn.Linear(4, 3, bias=False).double()
    opt = mep.EPOptimizer(model.parameters(), model=model, penalty=penalty)
    known = not message.endswith(("zero", "importance"))  # of nothing else, the penalty stays zero
    if known:
        opt.step(x=SOME[0], target=SOME[1])
        opt.consolidate([SOME] if isinstance(penalty, EWC) else None)
    before, state = weights(model), pickle.dumps(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.consolidate(loader)
    assert pickle.dumps(opt.state_dict()) == state and torch.equal(model.weight, *before)
    assert model.training and opt.penalty.loss() == 0


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
