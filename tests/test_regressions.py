"""Defects that readers have found, one test each: none may come back."""

import copy
import gc
import weakref

import pytest
import torch
from small_training import backward, batch_of, distance, identical, network, train, weights
from torch import nn
from torch.nn import functional as F

import mep
from mep.updates import SGD

# A nudge of c = 1e-5 differs from the limit by about that.
NEAR_LIMIT = 1e-4


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Flatten()],
        [nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(12, 4)],
        [nn.Linear(4, 4), nn.Identity(), nn.Linear(4, 4), nn.Flatten(), nn.Linear(16, 4)],
    ],
    ids=["trailing reshape", "reshape alone", "identity"],
)
@pytest.mark.parametrize("step", ["estimate", "optimizer"])
def test_a_pull_that_is_a_view_leaves_the_errors_alone(layers, step):
    """The residual was once taken in place, into memory that the errors shared."""
    model = nn.Sequential(*copy.deepcopy(layers)).double()
    x, y = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.arange(5) % 4
    backward(model, (x, y))
    truth = [p.grad.clone() for p in model.parameters()]
    before = weights(model)
    if step == "estimate":
        model.zero_grad()
        mep.estimate(model, x, y, beta=mep.AutoBeta(1e-5))
        found = [p.grad for p in model.parameters()]
    else:
        opt = mep.EPOptimizer(model.parameters(), model=model, lr=1.0, beta=mep.AutoBeta(1e-5))
        opt.step(x=x, target=y)
        found = [old - new for old, new in zip(before, weights(model), strict=True)]
    for g, t in zip(found, truth, strict=True):
        assert (g - t).norm() <= NEAR_LIMIT * t.norm()


def test_sgd_does_not_mind_the_memory_layout():
    weight, gradient = torch.randn(6, 4).t(), torch.randn(4, 6)
    numbers = {"lr": 0.1, "lr_scale": 1.0, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
    expected = weight - 0.1 * gradient
    SGD().step([weight], [gradient], [{}], numbers)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("damping", [0.3, 1e-13])
@pytest.mark.parametrize("limit", [1e-2, None])
def test_natural_steps_of_a_fitted_net_stay_finite(damping, limit):
    """Errors of 1e-20 make a curvature whose inverse no float32 holds."""
    model = nn.Sequential(nn.Linear(30, 3, bias=False))
    x, y = torch.randn(8, 30), torch.zeros(8, dtype=torch.long)
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.lstsq(x, 45.0 * F.one_hot(y, 3).float()).solution.T)
    rule = mep.Natural(damping=damping, refresh=1, limit=limit)
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.1, momentum=0.9, update=rule)
    for _ in range(3):
        opt.step(x=x, target=y)
    assert torch.isfinite(model[0].weight).all()


def test_rules_that_observe_need_a_model():
    with pytest.raises(ValueError, match=r"`update=Route\(...\)` needs local signals, and so a mo"):
        mep.EPOptimizer(network().parameters(), update=mep.Route(mep.Natural()))


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(input=torch.tanh(x))


def test_inner_layers_may_be_called_by_keyword():
    model = nn.Sequential(nn.Linear(4, 4), ByKeyword(), nn.Linear(4, 3)).double()
    opt = mep.EPOptimizer(model.parameters(), model=model, update=mep.Route(mep.Natural()))
    train(opt, 2, batch_of())
    assert opt.skipped == 0


def test_many_steps_of_settling_hoard_no_memory():
    model = network()
    opt = mep.EPOptimizer(model.parameters(), model=model, settle_steps=30)
    train(opt, 1, batch_of())
    assert not opt._buffers._shelves


def test_presets_take_named_parameters_and_refuse_foreign_ones():
    model, other = mep.models.deep_mlp(5, 8, 4, 3), nn.Linear(2, 2)
    named = mep.presets.smep(model.named_parameters(), model=model)
    assert [group["lr_scale"] for group in named.param_groups] == [1.0, 0.2]
    with pytest.raises(ValueError, match="do not belong to `model`"):
        mep.presets.smep([*model.parameters(), *other.parameters()], model=model)


def test_the_depth_rule_counts_blocks_with_parameters():
    model = nn.Sequential(*network(), nn.Flatten())
    scales = {id(p): g["lr_scale"] for g in mep.param_groups(model, 0.1) for p in g["params"]}
    assert scales[id(model[4].weight)] == 1.0 and scales[id(model[2].weight)] == 1 / 3


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.factors = nn.Linear(3, 2), (1.0,)

    def forward(self, x):
        return self.layer(x) * self.factors[0]


def test_a_changed_tuple_is_noticed():
    model, x, y = Scaled(), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    for factors in ((1.0,), (5.0,)):
        model.factors = factors
        found = mep.estimate(model, x, y).loss
        torch.testing.assert_close(found, F.cross_entropy(model(x), y).detach())


def test_a_model_that_is_one_layer_can_be_forgotten():
    model = nn.Linear(3, 2)
    mep.estimate(model, torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_feedback_of_a_zero_weight_sends_something_down():
    model = network()
    nn.init.zeros_(model[4].weight)
    before = weights(model)
    settler = mep.Sweep(feedback="random")
    train(mep.EPOptimizer(model.parameters(), model=model, settler=settler), 2, batch_of())
    assert not torch.equal(before[0], model[0].weight)


def test_feedback_is_drawn_by_torchs_seed():
    def drawn(seed):
        torch.manual_seed(seed)
        model = network()
        settler = mep.Sweep(feedback="random")
        opt = mep.EPOptimizer(model.parameters(), model=model, settler=settler)
        return opt.state[model[2].weight]["feedback"]

    assert torch.equal(drawn(1), drawn(1)) and distance([drawn(1)], [drawn(2)]) > 0.1


def test_normalisations_of_images_are_no_matrices():
    model = nn.Sequential(nn.LayerNorm([2, 3]), nn.Flatten(), nn.Linear(6, 3))
    opt = mep.EPOptimizer(model.parameters(), model=model, update=mep.Route(mep.Muon()))
    assert opt._roles[id(model[0].weight)][1] == "vector"


def test_a_loaded_state_is_checked_before_anything_changes():
    saved = mep.EPOptimizer(network().parameters(), momentum=0.9, nesterov=True).state_dict()
    model = network()
    opt = mep.EPOptimizer(model.parameters(), momentum=0.5, update=mep.Route(mep.Dion()))
    with pytest.raises(ValueError, match="`nesterov` must be False with Dion"):
        opt.load_state_dict(saved)
    assert opt.param_groups[0]["momentum"] == 0.5


def test_no_signal_and_hardly_an_eps_is_no_step():
    theta = torch.ones(3)
    numbers = {"lr": 1.0, "lr_scale": 1.0, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
    mep.Normalised(eps=1e-50).step([theta], [torch.zeros(3)], [{}], numbers)
    assert identical([theta], [torch.ones(3)])


def test_blockwise_counts_what_did_not_settle():
    model = network()
    settler = mep.Sweep(1, tol=1e-12)
    opt = mep.EPOptimizer(model.parameters(), model=model, blockwise=True, settler=settler)
    train(opt, 3, batch_of())
    assert opt.unsettled == 3 and opt.skipped == 0
