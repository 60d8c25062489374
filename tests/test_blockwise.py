"""Learning on the way up: every block is updated during the nudged sweep, and nothing waits."""

import copy
import weakref

import pytest
import torch
from problems import problem, tanh_problem
from small_training import batch_of, distance, identical, network, train, weights
from torch import nn

import mep
from mep.blocks import layers, run
from mep.blocks.local import LocalBlock
from mep.optim.optimizer import Updating

# float64 rounding of three steps: rules and constraints treat equal shapes as one batch otherwise.
SAME = 1e-13
NUMBERS = {"lr": 0.1, "lr_scale": 1.0, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}


# A verdict eases the next nudge; where that is not the matter, every residual is good enough.
ONE = mep.Sweep(1, tol=1.0)


def optimizer(model, blockwise=True, **options):
    chosen = {"settler": ONE, "lr": 0.05} | options
    return mep.EPOptimizer(model.parameters(), model=model, blockwise=blockwise, **chosen)


RULES = {
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "normalised": {"update": mep.Normalised(), "momentum": 0.9, "weight_decay": 0.01},
    "muon": {"update": mep.Route(mep.Muon(ns_dtype=None)), "momentum": 0.9},
    "muon, last layer apart": {"update": mep.Route(mep.Muon(ns_dtype=None), last=True)},
    "dion": {"update": mep.Route(mep.Dion(0.5)), "momentum": 0.9},
    "natural": {"update": mep.Route(mep.Natural(limit=None, refresh=2)), "lr": 0.01},
    "spectral": {"constraint": mep.SpectralNorm(0.5), "lr": 0.5},
    "muon, spectral": {
        "update": mep.Route(mep.Muon(ns_dtype=None)),
        "constraint": mep.SpectralNorm(0.7),
    },
    "kolen-pollack": {
        "settler": mep.Sweep(1, tol=1.0, feedback="kolen-pollack"),
        "weight_decay": 0.01, "momentum": 0.9,
    },
}  # fmt: skip
NETS = ["mlp", "convolutional", "residual"]
CASES = [(n, r) for n in NETS for r in RULES if (n, r) != ("residual", "kolen-pollack")]


@pytest.mark.parametrize(("net", "rule"), CASES)
def test_is_the_same_update_as_after_the_sweep(net, rule):
    found = []
    for blockwise in (True, False):
        p = problem(net)
        opt = optimizer(p.model, blockwise, **RULES[rule])
        losses = [opt.step(x=p.x, target=p.y) for _ in range(3)]
        found.append([*weights(p.model), *losses])
    assert distance(*found) < SAME
    assert distance(found[0], [*weights(problem(net).model), *found[0][-3:]]) > 1e-3


def test_groups_keep_their_numbers():
    found = []
    for blockwise in (True, False):
        model = network()
        groups = mep.param_groups(model, 0.1)
        groups[0] |= {"weight_decay": 0.1}
        groups[1] |= {"momentum": 0.5}
        opt = mep.EPOptimizer(groups, model=model, blockwise=blockwise, settler=ONE)
        train(opt, 3, batch_of())
        found.append(weights(model))
    assert distance(*found) < SAME


def test_frozen_and_foreign_parameters_stay():
    model = network()
    model[0].weight.requires_grad_(False)
    before = weights(model)
    chosen = list(model.parameters())[:4]  # the last layer's are not the optimizer's
    opt = mep.EPOptimizer(chosen, model=model, blockwise=True, settler=mep.Sweep(1))
    train(opt, 2, batch_of())
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [False, True, True, True, False, False]
    assert opt.skipped == 0


# --- that it happens on the way ------------------------------------------------------------------


def test_every_block_is_updated_before_the_sweep_goes_on(monkeypatch):
    p = tanh_problem([6, 5, 5, 5, 4])
    names = {id(q): name.split(".")[0] for name, q in p.model.named_parameters()}
    events = []
    for kind in {type(b) for b in mep.trace(p.model)}:
        original = kind.advance

        def advance(self, *rest, original=original):
            events.append(("up", self.name))
            return original(self, *rest)

        monkeypatch.setattr(kind, "advance", advance)
    apply = Updating.apply

    def noting(self, gradients, groups, *rest):
        chosen = [q for group in groups for q in group["params"]]
        events.append(("update", *sorted({names[id(q)] for q in chosen})))
        return apply(self, gradients, groups, *rest)

    monkeypatch.setattr(Updating, "apply", noting)
    optimizer(p.model).step(x=p.x, target=p.y)
    names_in_order = [block.name for block in mep.trace(p.model)]
    truth = [("update", "0")]
    for name in names_in_order[1:]:
        truth += [("up", name), ("update", name)]
    assert events == truth
    events.clear()
    optimizer(p.model, blockwise=False).step(x=p.x, target=p.y)
    assert [kind for kind, *_ in events if kind == "update"] == ["update"]


def most_alive(monkeypatch, model, x, y, blockwise):
    """The largest number of weight gradients in different memory that exist at once."""
    seen, most = [], [0]
    makers = [(layers.Linear, "weight_gradient"), (layers.Conv2d, "gradients")]
    with monkeypatch.context() as patch:
        for kind, name in [*makers, (run._Gradients, "_weight")]:
            original = getattr(kind, name)

            def noting(self, *rest, original=original):
                gradient = found = original(self, *rest)
                if isinstance(found, tuple):  # with the bias's
                    gradient, _ = found
                seen.append(weakref.ref(gradient))
                alive = {ref().data_ptr() for ref in seen if ref() is not None}
                most[0] = max(most[0], len(alive))
                return found

            patch.setattr(kind, name, noting)
        # A rule that takes gradients: SGD adds their factors up without forming any.
        optimizer(model, blockwise, update=mep.Normalised()).step(x=x, target=y)
    return most[0]


def convs():
    body = [m for _ in range(4) for m in (nn.Conv2d(3, 3, 3, padding=1), nn.Tanh())]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(48, 4)).double()


@pytest.mark.parametrize("net", ["dense", "convolutional"])
def test_no_gradient_outlives_its_block(monkeypatch, net):
    if net == "dense":
        p = tanh_problem([4] * 7)
        model, x, y = p.model, p.x, p.y
    else:
        torch.manual_seed(0)
        model, x, y = convs(), torch.randn(2, 3, 4, 4).double(), torch.tensor([0, 1])
    every = sum(q.dim() > 1 for q in model.parameters())
    assert most_alive(monkeypatch, copy.deepcopy(model), x, y, False) == every
    assert most_alive(monkeypatch, model, x, y, True) == 1


class Wave(nn.Module):
    """A block without a closed form."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return torch.sin(self.layer(x))


@pytest.mark.parametrize("blockwise", [True, False])
def test_no_gradient_of_an_autograd_block_outlives_it(blockwise, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), *(Wave() for _ in range(4)), nn.Linear(6, 4)).double()
    found, most, original = [], [0], LocalBlock._learn

    def noting(self, point, *rest, **more):
        result = original(self, point, *rest, **more)
        found.append(weakref.ref(point.learned))
        most[0] = max(most[0], sum(ref() is not None for ref in found))
        return result

    monkeypatch.setattr(LocalBlock, "_learn", noting)
    opt = optimizer(model, blockwise, update=mep.Normalised())
    opt.step(x=torch.randn(5, 3).double(), target=torch.tensor([0, 1, 2, 3, 0]))
    assert len(found) == 4 and most[0] == (1 if blockwise else 4)


# --- what it cannot do ---------------------------------------------------------------------------


REFUSED = {
    "three sweeps": ({"settler": mep.Sweep(3)}, r"one: use settler=mep.Sweep\(1\), not"),
    "default": ({"settler": None}, r"use settler=mep.Sweep\(1\), not Sweep\(max_sweeps=3"),
    "other solver": ({"settler": mep.Anderson(1)}, r"use settler=mep.Sweep\(1\), not Anderson"),
    "limit": ({"settler": mep.Limit()}, r"use settler=mep.Sweep\(1\), not Limit"),
    "centered": ({"stencil": mep.centered}, r"one nudged phase: use stencil=.*not centered"),
    "KL": ({"energy": mep.PredictionError(mep.KL())}, r"use energy=mep.PredictionError\(\), not"),
    "clipping": ({"clip_norm": 1.0}, r"drop `clip_norm`, or use update=mep.Normalised\(\)"),
    "backprop": ({"mode": "backprop", "settler": None}, r"does not settle: drop blockwise$"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        optimizer(network(), **options)


def test_shared_parameter_is_refused_by_the_name_of_its_block():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), layer)
    with pytest.raises(ValueError, match=r"block `.*` shares a parameter with an earlier one"):
        optimizer(model)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tied[2].bias = tied[0].bias
    with pytest.raises(ValueError, match="block `2` shares a parameter with an earlier one"):
        optimizer(tied)


def test_without_a_model_nothing_settles():
    with pytest.raises(ValueError, match="without `model` nothing settles: drop blockwise"):
        mep.EPOptimizer(network().parameters(), blockwise=True)


# --- verdicts ------------------------------------------------------------------------------------


def everything(model, opt):
    state = [t for p in model.parameters() for t in opt.state[p].values()]
    kept = [t for t in state if isinstance(t, torch.Tensor)]
    return [t.clone() for t in [*model.state_dict().values(), *kept]]


@pytest.mark.parametrize("where", ["loss", "errors"])
@pytest.mark.parametrize("rule", ["sgd", "natural", "muon, spectral"])
def test_what_is_not_finite_is_refused_before_the_first_write(rule, where):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        if where == "errors":  # the way down overflows, the way up does not
            model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
            with torch.no_grad():
                model[0].weight.zero_(), model[0].bias.zero_(), model[2].bias.zero_()
    opt = optimizer(model, max_skipped=2, **RULES[rule] | {"lr": 1e-3})
    good = batch_of(8, torch.float32)
    train(opt, 1, good)
    bad = torch.full((8, 4), 1e38)
    if where == "errors":
        bad = torch.zeros(8, 4)
        with torch.no_grad():
            for layer in (model[0], model[2]):
                layer.bias.zero_()
            model[2].weight.fill_(1e30), model[3].weight.copy_(1e30 * torch.randn(3, 4))
    before = everything(model, opt)
    loss = opt.step(x=bad, target=good[1])
    assert bool(torch.isfinite(loss)) == (where == "errors")
    assert (opt.skipped, opt.skipped_in_a_row, opt.last.status) == (1, 1, "diverged")
    assert identical(everything(model, opt), before)
    opt.step(x=bad, target=good[1])
    with pytest.raises(RuntimeError, match="3 updates in a row were skipped"):
        opt.step(x=bad, target=good[1])


def test_residual_above_tolerance_is_reported_and_eases_the_next_nudge():
    model = network()
    opt = optimizer(model, settler=mep.Sweep(1, tol=1e-9), lr=0.0, beta=0.2)
    betas = []
    for _ in range(14):
        before = weights(model)
        train(opt, 1, batch_of())
        betas.append(opt.last.beta)
        assert opt.last.status == "not settled" and opt.last.median > 1e-9
        assert opt.skipped == 0 and identical(weights(model), before)
    assert betas == pytest.approx([0.2 * 0.5 ** min(k, 10) for k in range(14)])


def test_relative_nudge_is_eased_too_and_the_update_is_made():
    model = network()
    opt = optimizer(model, settler=mep.Sweep(1, tol=1e-9))
    batch, cs = batch_of(), []
    for _ in range(3):
        before = weights(model)
        gain = mep.diagnose(model, *batch, beta=1e-3).c / 1e-3
        train(opt, 1, batch)
        cs.append(opt.last.beta * gain)
        assert not identical(weights(model), before)
    assert cs == pytest.approx([0.05, 0.025, 0.0125])


def test_easing_survives_saving_and_recovers_by_a_tenth(tmp_path):
    model = network()
    opt = optimizer(model, settler=mep.Sweep(1, tol=1e-9), beta=0.2, lr=0.0)
    train(opt, 3, batch_of())
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    other = optimizer(network(), beta=0.2, lr=0.0)
    other.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    twin, betas = copy.deepcopy(other), []
    for _ in range(25):
        train(other, 1, batch_of())
        betas.append(other.last.beta)
        assert other.last.converged
    assert betas == pytest.approx([0.2 * min(1.0, 1.1**k / 8) for k in range(25)])
    train(twin, 1, batch_of())
    assert twin.last.beta == betas[0]


# --- steps of their own length -------------------------------------------------------------------


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_normalised_step_is_its_formula():
    numbers = NUMBERS | {"lr_scale": 0.5, "momentum": 0.9, "weight_decay": 0.2}
    parameters = [
        torch.ones(3, 4).double(),
        torch.ones(5).double(),
        torch.ones(2, 3, 2, 2).double(),
    ]
    states, sizes = [{} for _ in parameters], (1.0, 1e-6, 1e6)
    theta, momenta = [p.clone() for p in parameters], [torch.zeros_like(p) for p in parameters]
    for k in range(4):
        each = [c * randn(*p.shape, seed=k) for c, p in zip(sizes, parameters, strict=True)]
        mep.Normalised().step(parameters, [g.clone() for g in each], states, numbers)
        momenta = [0.9 * m + 0.1 * g for m, g in zip(momenta, each, strict=True)]
        theta = [
            (1 - 0.05 * 0.2) * t - 0.05 * m / max(m.norm(), 1e-12)
            for t, m in zip(theta, momenta, strict=True)
        ]
    assert distance(parameters, theta) < SAME


def test_normalised_without_signal_moves_nothing():
    parameter, state = randn(3, 4), {}
    before = parameter.clone()
    mep.Normalised().step([parameter], [torch.zeros_like(parameter)], [state], NUMBERS)
    assert torch.equal(parameter, before)
    mep.Normalised(eps=1e3).step([parameter], [torch.full((3, 4), 1e-9).double()], [{}], NUMBERS)
    assert 0 < distance([parameter], [before]) < 1e-12  # noise below eps is no signal


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_normalised_eps_out_of_range_is_refused(eps):
    with pytest.raises(ValueError, match=r"`Normalised\(eps=...\)` must be > 0, got"):
        mep.Normalised(eps)


def test_normalised_refuses_nesterov():
    """Nothing is accepted and ignored."""
    with pytest.raises(ValueError, match="`nesterov` must be False with Normalised"):
        mep.EPOptimizer(
            network().parameters(), update=mep.Normalised(), momentum=0.9, nesterov=True
        )
