"""Chains with known equilibria, and the tables that the common tests run over.

A new model, cost, energy, solver, stencil or activation is one row here; the row brings its tests.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

import mep

# Two float64 evaluations of one formula in another order: a few hundred roundings of 2.2e-16.
EXACT = 1e-12

FAST = 3  # samples per batch where nothing depends on their number
CLASSES = 4

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


class Residual(nn.Module):
    """``x + W2 tanh(W1 x)``: one block, for its skip crosses every cut."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, width + 1), nn.Linear(width + 1, width)

    def forward(self, x):
        return x + self.second(torch.tanh(self.first(x)))


class ResidualNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 6), nn.Linear(6, CLASSES)
        self.one, self.two = Residual(6), Residual(6)

    def forward(self, x):
        h = self.two(self.one(torch.tanh(self.enter(x))))
        return self.leave(torch.sigmoid(h))


class Attention(nn.Module):
    """Self-attention with a skip; the attention module returns a tuple."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        h = self.norm(x)
        found, _ = self.attend(h, h, h)
        return x + found


class AttentionNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.attention = nn.Linear(3, 6), Attention(6)
        self.leave = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.leave(torch.tanh(self.attention(self.enter(x)).mean(1)))


class FunctionalNet(nn.Module):
    """A plain forward of functional calls, every one of which has a closed form."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.hidden, self.leave = nn.Linear(12, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        h = F.max_pool2d(F.relu(self.conv(x)), 2)
        h = torch.tanh(self.hidden(h.view(h.size(0), -1)))
        return self.leave(torch.flatten(h, 1))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 3), nn.Softplus(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6, CLASSES),
    )  # fmt: skip


def tanh_mlp(sizes, gain=None, bias=True):
    """A tanh chain; orthogonal with a gain if one is given."""
    layers = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Tanh()] * bool(layers) + [nn.Linear(n_in, n_out, bias=bias)]
    model = nn.Sequential(*layers)
    return model if gain is None else mep.init.orthogonal_(model, gain)


def normal(*shape):
    return lambda: torch.randn(FAST, *shape, dtype=torch.float64)


# name -> (factory of the model, factory of the input); all have CLASSES outputs
MODELS = {
    "mlp": (lambda: tanh_mlp([6, 8, 7, CLASSES]), normal(6)),
    "one layer": (lambda: nn.Linear(5, CLASSES), normal(5)),
    "convolutional": (convolutional, normal(1, 10, 10)),
    "residual": (ResidualNet, normal(5)),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, CLASSES)),
        normal(5),
    ),
    "attention": (AttentionNet, normal(4, 3)),
    "batch norm": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES)
        ),
        normal(1, 4, 4),
    ),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(11, 5), nn.Flatten(), nn.Tanh(), nn.Linear(15, CLASSES)),
        lambda: torch.randint(0, 11, (FAST, 3)),
    ),
    "functional": (FunctionalNet, normal(1, 4, 4)),
}

COSTS = ["cross_entropy", "mse"]

ENERGIES = {
    "squared": mep.PredictionError(),
    "kl": mep.PredictionError(output=mep.KL()),
    "kl T=1.7": mep.PredictionError(output=mep.KL(temperature=1.7)),
}

# solvers that reach the equilibrium itself, driven to rounding
SOLVERS = {
    "sweep": mep.Sweep(max_sweeps=300, tol=1e-13),
    "anderson": mep.Anderson(max_steps=100, tol=1e-13),
    "gradient descent": mep.GradientDescent(
        max_steps=20_000, lr=0.2, momentum=0.7, tol=1e-13, patience=300
    ),
}

STENCILS = {
    "one_sided": (mep.one_sided, 1),
    "centered": (mep.centered, 2),
    "five_point": (mep.five_point, 4),
}

# every activation with a closed form, and the points where it has a kink or a seam
ACTIVATIONS = {
    "relu": (nn.ReLU(), (0.0,)),
    "tanh": (nn.Tanh(), ()),
    "sigmoid": (nn.Sigmoid(), ()),
    "silu": (nn.SiLU(), ()),
    "softplus": (nn.Softplus(), (20.0,)),
    "softplus beta=2": (nn.Softplus(beta=2.0, threshold=10.0), (5.0,)),
    "leaky relu": (nn.LeakyReLU(0.2), (0.0,)),
    "elu": (nn.ELU(0.7), (0.0,)),
    "hardtanh": (nn.Hardtanh(-0.5, 2.0), (-0.5, 2.0)),
    "relu6": (nn.ReLU6(), (0.0, 6.0)),
    "gelu": (nn.GELU(), ()),
    "gelu tanh": (nn.GELU(approximate="tanh"), ()),
    "identity": (nn.Identity(), ()),
}


@dataclass
class Problem:
    """A model with a batch."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor


def problem(name, seed=0, dtype=torch.float64, device="cpu"):
    """A row of MODELS with random weights, input and labels."""
    make_model, make_x = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, x = make_model().to(device, dtype), make_x().to(device)
        y = torch.randint(0, CLASSES, (FAST,)).to(device)
    return Problem(model, x.to(dtype) if x.is_floating_point() else x, y)


def tanh_problem(sizes, batch=FAST, gain=None, seed=0, dtype=torch.float64):
    """A tanh chain with random input and labels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = tanh_mlp(sizes, gain).to(dtype)
        x, y = torch.randn(batch, sizes[0], dtype=dtype), torch.randint(0, sizes[-1], (batch,))
    return Problem(model, x, y)


def random_states(model, x, seed=1):
    """States far from any equilibrium, of the right shapes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        s + torch.randn(s.shape, generator=generator, dtype=torch.float64).to(s)
        for s in mep.free_states(model, x)
    ]


def linear_problem(sizes=(4, 6, 5, 3), batch=FAST, seed=0):
    """A chain of Linear layers and a real-valued target: its equilibria solve linear systems."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(*[nn.Linear(a, b) for a, b in pairwise(sizes)]).double()
        x = torch.randn(batch, sizes[0], dtype=torch.float64)
        target = torch.randn(batch, sizes[-1], dtype=torch.float64)
    return Problem(model, x, target)


def linear_equilibrium(problem, beta):
    """States where ``1/2 ||M s - c||^2 + beta/2 ||s_L - t||^2`` is least, by one linear solve."""
    weights = [layer.weight.detach() for layer in problem.model]
    ends = torch.tensor([0, *[w.shape[0] for w in weights]]).cumsum(0).tolist()
    m = torch.eye(ends[-1], dtype=torch.float64)
    for i, w in enumerate(weights[1:], start=1):
        m[ends[i] : ends[i + 1], ends[i - 1] : ends[i]] = -w
    first = problem.x @ weights[0].T
    inputs = [first, *[first.new_zeros(len(first), len(w)) for w in weights[1:]]]
    biases = [layer.bias.detach() for layer in problem.model]
    c = torch.cat([a + b for a, b in zip(inputs, biases, strict=True)], 1)
    at_output = torch.zeros_like(m)
    last = torch.arange(ends[-2], ends[-1])
    at_output[last, last] = 1.0
    pull = torch.cat([c.new_zeros(len(c), ends[-2]), problem.y], 1)
    solved = torch.linalg.solve(m.T @ m + beta * at_output, m.T @ c.T + beta * pull.T).T
    return [solved[:, a:b] for a, b in pairwise(ends)]


def scalar_problem(w=(0.8, 0.9), x=0.7, target=1.5):
    """``x -> w2 tanh(w1 x)`` with one unit per layer."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Tanh(), nn.Linear(1, 1, bias=False))
    model = model.double()
    with torch.no_grad():
        model[0].weight.fill_(w[0])
        model[2].weight.fill_(w[1])
    as_batch = [torch.full((1, 1), v, dtype=torch.float64) for v in (x, target)]
    return Problem(model, *as_batch)


def scalar_equilibrium(problem, beta):
    """Its two nudged states, by bisection: s_2 is eliminated, what is left changes sign once."""
    w1, w2 = problem.model[0].weight.item(), problem.model[2].weight.item()
    drive, target = w1 * problem.x.item(), problem.y.item()

    def force(s):
        a = torch.tanh(torch.tensor(s, dtype=torch.float64)).item()
        e2 = beta * (target - w2 * a) / (1 + beta)
        return s - drive - e2 * w2 * (1 - a * a)

    low, high = -10.0, 10.0
    for _ in range(200):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if force(middle) > 0 else (middle, high)
    a = torch.tanh(torch.tensor(low, dtype=torch.float64)).item()
    return [low, (w2 * a + beta * target) / (1 + beta)]


def backprop(problem, cost="cross_entropy"):
    """torch's gradients of the batch mean, in the order of the model's parameters."""
    if cost == "mse" and not problem.y.is_floating_point():
        output = problem.model(problem.x)
        loss = 0.5 * (output - F.one_hot(problem.y, CLASSES)).square().sum() / len(output)
    elif cost == "mse":
        output = problem.model(problem.x)
        loss = 0.5 * (output - problem.y).square().sum() / len(output)
    else:
        loss = F.cross_entropy(problem.model(problem.x), problem.y)
    return list(torch.autograd.grad(loss, list(problem.model.parameters())))


def estimated(problem, **options):
    """The estimate's gradients in the order of the model's parameters, and the estimate."""
    problem.model.zero_grad()
    found = mep.estimate(problem.model, problem.x, problem.y, **options)
    grads = [p.grad for p in problem.model.parameters()]
    problem.model.zero_grad()
    return grads, found


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def distance(ours, truth):
    """Relative distance of two lists of tensors."""
    a, b = flat(ours).detach().double(), flat(truth).detach().double()
    return float((a - b).norm() / b.norm())


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
    found = {s.parameter: s.form() for s in block.signals(point, e, 0.5)}
    assert set(found) == set(parameters)
    for parameter, gradient in zip(parameters, grads[len(inputs) :], strict=True):
        torch.testing.assert_close(found[parameter], 0.5 * gradient, rtol=tolerance, atol=tolerance)
