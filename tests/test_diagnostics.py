"""The report on a run: regimes, agreement with backprop, and that looking changes nothing."""

import copy

import pytest
import torch
from problems import (
    ENERGIES,
    EXACT,
    MODELS,
    STENCILS,
    backprop,
    estimated,
    flat,
    problem,
    tanh_problem,
)
from torch import nn

import mep

# Figures of one computation done twice; cosines of float64 vectors lose half the digits near 1.
SAME = 1e-9
# A relative nudge of 5 % bends the gradient by less than that in angle (cosine 1 - 0.05^2).
ALIGNED = 0.99


def report(at, **options):
    return mep.diagnose(at.model, at.x, at.y, **options)


REGIMES = [
    (mep.Sweep(), "finite nudge"),
    (mep.Anderson(), "finite nudge"),
    (mep.GradientDescent(400, tol=1e-3), "finite nudge"),
    (mep.Limit(), "limit"),
    (mep.GradientDescent(2), "not settled"),
    (mep.Sweep(1, tol=1e-9), "not settled"),
]


@pytest.mark.filterwarnings("ignore:.*no signal")
@pytest.mark.parametrize(("settler", "regime"), REGIMES, ids=str)
def test_regime(settler, regime):
    at = tanh_problem([5, 6, 6, 4], batch=16)
    assert report(at, settler=settler).regime == regime


def test_diverged_run_is_not_settled():
    at = tanh_problem([5, 6, 6, 4], batch=16)
    with pytest.warns(UserWarning, match="diverged"):
        found = report(at, settler=mep.GradientDescent(400, lr=50.0))
    assert found.regime == "not settled" and found.layers_with_gradient == 0


@pytest.mark.parametrize("beta", [0.05, 1e-4, 1e-8])
@pytest.mark.parametrize("name", ["mlp", "functional", "residual"])
def test_rounding_does_not_touch_a_nudge_in_float32(name, beta):
    """As sums of states, nudges of 1e-8 would be gone and the regime would be the limit."""
    found = report(problem(name, dtype=torch.float32), beta=beta)
    assert found.dtype == "float32"
    assert found.displacement_ratio == pytest.approx(1.0, abs=1e-3)
    assert found.regime == "finite nudge"
    assert found.displacement < 10 * beta


class Rough(nn.Module):
    """Rounds in float32, and draws: random blocks are subtracted plainly, not in double."""

    def forward(self, x):
        return x + 1e5 - 1e5 + 0 * torch.rand_like(x)


@pytest.mark.parametrize(("dtype", "regime"), [("float32", "limit"), ("float64", "finite nudge")])
def test_displacement_lost_to_rounding_is_the_limit(dtype, regime):
    at = tanh_problem([4, 6, 6, 6, 4], batch=16, gain=1.0, dtype=getattr(torch, dtype))
    at.model[-2] = nn.Sequential(Rough(), nn.Tanh())
    found = report(at, beta=1e-4, settler=mep.Sweep(1, tol=10.0))
    assert found.dtype == dtype and found.regime == regime
    assert (found.displacement_ratio < 0.9) == (regime == "limit")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_report_agrees_with_estimate_and_backprop(name):
    at = problem(name)
    truth = flat(backprop(at)).double()
    found = report(at)
    grads, made = estimated(at)
    ours = flat(grads)
    assert found.cosine == pytest.approx(float(ours @ truth / (ours.norm() * truth.norm())), SAME)
    assert found.cosine > ALIGNED
    assert (found.median, found.q95, found.aggregate) == pytest.approx(
        (made.median, made.q95, made.aggregate), rel=SAME, abs=EXACT
    )
    assert found.beta == pytest.approx(made.beta, rel=SAME)
    assert found.c == pytest.approx(0.05, rel=SAME)
    assert found.sweeps == made.sweeps and found.dtype == "float64"


@pytest.mark.parametrize("name", sorted(MODELS))
def test_layers_of_a_report(name):
    at = problem(name)
    found = report(at, beta=mep.AutoBeta(1e-4))
    chain = mep.trace(at.model)
    assert [layer.name for layer in found.layers] == [block.name for block in chain]
    assert found.layers_with_gradient == len(chain)
    for layer in found.layers:
        assert layer.cosine > 1 - 1e-3 and layer.norm_ratio == pytest.approx(1, abs=1e-2)


def test_layers_without_a_gradient_are_counted():
    at = tanh_problem([5] + [6] * 9 + [4])
    with pytest.warns(UserWarning, match="no signal"):
        found = report(at, settler=mep.GradientDescent(3))
    assert 0 < found.layers_with_gradient < 10
    silent = [layer for layer in found.layers if layer.cosine == 0]
    assert len(silent) == 10 - found.layers_with_gradient


def test_limit_is_aligned_to_rounding():
    found = report(problem("convolutional"), settler=mep.Limit())
    assert found.cosine == pytest.approx(1, abs=EXACT)
    assert found.displacement == 0 and found.displacement_ratio == 1.0


CHANGING = [
    {"cost": "mse"},
    {"beta": 0.2},
    {"settler": mep.Sweep(1, None)},
    {"stencil": STENCILS["centered"][0]},
    {"energy": ENERGIES["kl"]},
]


@pytest.mark.parametrize("options", CHANGING, ids=lambda o: next(iter(o)))
def test_every_option_changes_the_report(options):
    at = tanh_problem([5, 6, 6, 4], batch=8)
    base = {"settler": mep.Sweep(8, 1e-6)}
    assert report(at, **base | options).cosine != report(at, **base).cosine


def test_gradient_method_changes_the_path_only(monkeypatch):
    at = problem("mlp")
    calls = []
    plain = mep.blocks.local.LocalBlock.pull
    monkeypatch.setattr(
        mep.blocks.local.LocalBlock, "pull", lambda *a: calls.append(1) or plain(*a)
    )
    analytic = report(at)
    assert not calls
    autograd = report(at, gradient_method="autograd")
    assert calls
    assert autograd.cosine == pytest.approx(analytic.cosine, rel=EXACT)


def dropout_problem():
    """Dropout by closed form, and with a batch norm inside a recorded subgraph."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = nn.Linear(6, 6), nn.Dropout(0.3)
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return x + self.drop(torch.tanh(self.norm(self.layer(x))))

    at = tanh_problem([5, 6, 4], batch=16)
    at.model = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 6), Skip(), nn.Linear(6, 4)
    ).double()
    return at


@pytest.mark.parametrize("first_mode", ["train", "eval"])
@pytest.mark.parametrize("method", ["analytic", "autograd"])
def test_dropout_in_train_mode_agrees_with_backprop(method, first_mode):
    """With another mask in any phase, the contrast would be mostly that of the masks."""
    at = dropout_problem()
    at.model.train(first_mode == "train")
    mep.free_states(at.model, at.x)  # a forward recorded in one mode must follow to the other
    at.model.train()
    found = report(at, beta=mep.AutoBeta(0.01), gradient_method=method)
    assert found.cosine > ALIGNED
    assert found.regime == "finite nudge"
    assert found.layers_with_gradient == len(found.layers)
    assert found.displacement_ratio == pytest.approx(1, abs=SAME)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_diagnosis_leaves_no_trace(mode):
    at = dropout_problem()
    at.model.train(mode == "train")
    mep.estimate(at.model, at.x, at.y)
    before = copy.deepcopy(at.model.state_dict())
    grads = [p.grad.clone() for p in at.model.parameters()]
    modes = [m.training for m in at.model.modules()]
    stream = torch.get_rng_state()
    report(at)
    assert torch.equal(torch.get_rng_state(), stream)
    assert [m.training for m in at.model.modules()] == modes
    after = at.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(
        torch.equal(p.grad, g) and p.dtype == torch.float64
        for p, g in zip(at.model.parameters(), grads, strict=True)
    )


def test_diagnosis_does_not_depend_on_the_random_state():
    at = dropout_problem()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(report(at))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["mlp", "convolutional", "residual"])
def test_bfloat16_is_measured_against_float64(name):
    """Displacement form keeps even eight bits' nudge; what is lost is the weights' rounding."""
    found = report(problem(name, dtype=torch.bfloat16))
    assert found.dtype == "bfloat16"
    assert 0.9 < found.displacement_ratio < 1.1
    assert found.cosine > 0.98


def test_agreement_at_exact_kinks():
    """Half of the units of an identity start sit at exactly 0, where torch's ReLU has slope 0."""
    torch.manual_seed(0)
    model = mep.models.deep_mlp(10, 32, 20, 5)
    x, y = torch.randn(16, 20), torch.randint(5, (16,))
    assert mep.diagnose(model, x, y, settler=mep.Limit()).cosine > 1 - 1e-5  # float32
