"""Which rule treats which parameter, and that every kind of step applies the same rule."""

import copy
import math
import pickle

import pytest
import torch
from small_training import (
    SAME_RULE,
    backward,
    batch_of,
    distance,
    identical,
    network,
    train,
    weights,
)
from torch import nn
from torch.optim import lr_scheduler

import mep
from mep.curvature import Factors
from mep.updates import Rule


class Noting(Rule):
    """Notes what it is asked to treat, and moves nothing."""

    def __init__(self):
        self.seen = {}  # id of the parameter -> the learning rate

    def check(self, group):
        pass

    def step(self, parameters, gradients, states, group):
        assert all(p.shape == g.shape for p, g in zip(parameters, gradients, strict=True))
        assert not set(map(id, parameters)) & set(self.seen)
        self.seen |= {id(p): group["lr"] for p in parameters}


class NotingMatrices(Noting):
    """Takes nothing else than matrices."""

    def assign(self, parameter, role):
        return None if parameter.dim() < 2 else (self, 1.0)


class NotingFactors(Noting):
    """Takes gradients as factors."""

    takes_factors = True

    def step(self, parameters, gradients, states, group):
        self.seen |= {id(p): type(g) for p, g in zip(parameters, gradients, strict=True)}


def rules(*names):
    return {name: Noting() for name in names}


def treated(owned, make, noting, model=None, lr=1.0):
    """Name of the parameter -> (name of the rule, learning rate), after one step on ``.grad``.

    Args:
        owned: (name, parameter) of those that the optimizer gets, in this order.
        make: the update rule, from the noting rules.
        noting: the noting rules by name.
        model: for the optimizer, if any.
        lr: the group's.
    """
    owned = list(owned)
    mode = {"model": model, "mode": "backprop"} if model is not None else {}
    opt = mep.EPOptimizer([p for _, p in owned], lr=lr, update=make(**noting), **mode)
    for _, p in owned:
        p.grad = torch.zeros_like(p)
    opt.step()
    assert opt.param_groups[0]["lr"] == lr  # a factor is none of the group's
    found = {}
    for label, rule in noting.items():
        found |= {name: (label, rule.seen[id(p)]) for name, p in owned if id(p) in rule.seen}
    assert sum(len(rule.seen) for rule in noting.values()) == len(found)  # each once
    return found


def labels(found):
    return {name: label for name, (label, _) in found.items()}


class Net(nn.Module):
    """Every kind of parameter, the table not first in the order."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.conv = nn.Conv2d(1, 3, 3)
        self.table = nn.Embedding(7, 4)
        self.bag = nn.EmbeddingBag(5, 4)
        self.norm = nn.LayerNorm(4)
        self.hidden = nn.Linear(4, 4)
        self.grouped = nn.Conv2d(4, 4, 3, groups=2)
        self.leave = nn.Linear(4, 2)


PLAIN = {
    "scale": "vector",
    "conv.weight": "matrix",
    "conv.bias": "vector",
    "table.weight": "vector",
    "bag.weight": "vector",
    "norm.weight": "vector",
    "norm.bias": "vector",
    "hidden.weight": "matrix",
    "hidden.bias": "vector",
    "grouped.weight": "matrix",
    "grouped.bias": "vector",
    "leave.weight": "matrix",
    "leave.bias": "vector",
}
# option of Route -> what it changes
OPTIONS = {
    "none": ({}, {}),
    "first": ({"first": True}, {"conv.weight": "vector"}),
    "last": ({"last": True}, {"leave.weight": "vector"}),
    "both": ({"first": True, "last": True}, {"conv.weight": "vector", "leave.weight": "vector"}),
    # 27, 16, 72 and 8 entries
    "at_least=16": ({"at_least": 16}, {"leave.weight": "vector"}),
    "at_least=17": ({"at_least": 17}, {"leave.weight": "vector", "hidden.weight": "vector"}),
    "at_least=73": ({"at_least": 73}, {name: "vector" for name in PLAIN}),
}


@pytest.mark.parametrize(("options", "changes"), OPTIONS.values(), ids=OPTIONS)
def test_parameters_go_where_they_belong(options, changes):
    model = Net()
    found = treated(
        model.named_parameters(),
        lambda matrix, vector: mep.Route(matrix, vector, **options),
        rules("matrix", "vector"),
        model,
    )
    assert labels(found) == PLAIN | changes


def test_roles_are_the_models_not_the_groups():
    """An optimizer of some parameters knows which layers are first and last all the same."""
    model = Net()
    found = treated(
        model.hidden.named_parameters(),
        lambda matrix, vector: mep.Route(matrix, vector, first=True, last=True),
        rules("matrix", "vector"),
        model,
    )
    assert labels(found) == {"weight": "matrix", "bias": "vector"}


@pytest.mark.parametrize("with_model", [True, False], ids=["model", "no model"])
@pytest.mark.parametrize("end", ["first", "last"])
def test_lone_matrix_is_both_first_and_last(end, with_model):
    model = nn.Sequential(nn.Linear(3, 2))
    found = treated(
        model.named_parameters(),
        lambda matrix, vector: mep.Route(matrix, vector, **{end: True}),
        rules("matrix", "vector"),
        model if with_model else None,
    )
    assert labels(found) == {"0.weight": "vector", "0.bias": "vector"}


def test_without_a_model_the_order_tells_first_and_last():
    shapes = [(4,), (4, 3), (2, 1, 3, 3), (3, 3), (2, 3), (2,)]
    owned = [(str(k), nn.Parameter(torch.zeros(shape))) for k, shape in enumerate(shapes)]
    found = treated(
        owned,
        lambda matrix, vector: mep.Route(matrix, vector, first=True, last=True),
        rules("matrix", "vector"),
    )
    assert labels(found) == {
        "0": "vector", "1": "vector", "2": "matrix", "3": "matrix", "4": "vector", "5": "vector",
    }  # fmt: skip


def test_without_a_model_a_later_group_moves_the_last():
    first, middle, last = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    matrix, vector = Noting(), Noting()
    opt = mep.EPOptimizer([first, middle], update=mep.Route(matrix, vector, last=True))
    opt.add_param_group({"params": [last]})
    for p in (first, middle, last):
        p.grad = torch.zeros_like(p)
    opt.step()
    assert (set(matrix.seen), set(vector.seen)) == ({id(first), id(middle)}, {id(last)})


def test_without_a_model_an_embedding_looks_like_a_matrix():
    table = nn.Embedding(4, 2)
    found = treated(table.named_parameters(), lambda **r: mep.Route(**r), rules("matrix", "vector"))
    assert labels(found) == {"weight": "matrix"}
    found = treated(
        table.named_parameters(), lambda **r: mep.Route(**r), rules("matrix", "vector"), table
    )
    assert labels(found) == {"weight": "vector"}


def test_table_that_is_also_the_last_layers_weight_is_a_table():
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    found = treated(
        model.named_parameters(),
        lambda matrix, vector: mep.Route(matrix, vector),
        rules("matrix", "vector"),
        model,
    )
    assert labels(found) == {"0.weight": "vector", "1.weight": "matrix", "1.bias": "vector"}


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 7.0])
def test_vector_lr_is_a_factor_under_the_vector_rule_alone(factor):
    model = Net()
    found = treated(
        model.named_parameters(),
        lambda matrix, vector: mep.Route(matrix, vector, last=True, vector_lr=factor),
        rules("matrix", "vector"),
        model,
        lr=0.7,
    )
    expected = {"matrix": 0.7, "vector": 0.7 * factor}
    assert all(lr == expected[label] for label, lr in found.values())
    assert labels(found) == PLAIN | {"leave.weight": "vector"}


def test_vector_lr_scales_the_step_exactly():
    moved = {}
    for factor in (1.0, 0.25):  # a power of 2: no rounding
        model = network()
        for p in model.parameters():
            p.grad, p.data = torch.full_like(p, 0.3), torch.zeros_like(p)
        rule = mep.Route(mep.SGD(), mep.SGD(decoupled=True), vector_lr=factor)
        mep.EPOptimizer(model.parameters(), model=model, lr=0.1, update=rule).step()
        moved[factor] = weights(model)
    for small, full in zip(moved[0.25], moved[1.0], strict=True):
        assert torch.equal(small, full if full.dim() == 2 else 0.25 * full)
        assert full.abs().max() > 0.01


def test_routes_nest_on_the_matrix_side():
    model = Net()
    found = treated(
        model.named_parameters(),
        lambda hidden, end, vector: mep.Route(
            mep.Route(hidden, end, first=True, vector_lr=0.5), vector, last=True, vector_lr=0.25
        ),
        rules("hidden", "end", "vector"),
        model,
    )
    assert found == {name: ("vector", 0.25) for name in PLAIN} | {
        "conv.weight": ("end", 0.5),
        "hidden.weight": ("hidden", 1.0),
        "grouped.weight": ("hidden", 1.0),
    }


def test_routes_nest_on_the_vector_side_and_factors_multiply():
    model = Net()
    found = treated(
        model.named_parameters(),
        lambda hidden, end, vector: mep.Route(
            hidden, mep.Route(end, vector, vector_lr=0.5), last=True, vector_lr=0.25
        ),
        rules("hidden", "end", "vector"),
        model,
    )
    matrices = {name: ("hidden", 1.0) for name in PLAIN if PLAIN[name] == "matrix"}
    others = {name: ("vector", 0.125) for name in PLAIN if PLAIN[name] == "vector"}
    assert found == matrices | others | {"leave.weight": ("end", 0.25)}


def test_one_rule_on_both_sides_treats_each_parameter_once():
    model, rule = Net(), Noting()
    found = treated(
        model.named_parameters(),
        lambda rule: mep.Route(rule, rule, vector_lr=0.5),
        {"rule": rule},
        model,
    )
    assert found == {k: ("rule", {"matrix": 1.0, "vector": 0.5}[v]) for k, v in PLAIN.items()}


@pytest.mark.parametrize("side", ["matrix", "vector"])
def test_rule_that_takes_factors_gets_them_on_either_side(side):
    model, taking, other = network(), NotingFactors(), Noting()
    pair = (taking, other) if side == "matrix" else (other, taking)
    rule = mep.Route(*pair, last=True)
    assert rule.parts() == [*pair]
    train(mep.EPOptimizer(model.parameters(), model=model, update=rule), 1, batch_of())
    chosen = [0, 2] if side == "matrix" else [4]
    found = {id(model[k].weight): Factors for k in chosen}
    biases = {id(model[k].bias): torch.Tensor for k in (0, 2, 4)} if side == "vector" else {}
    assert taking.seen == found | biases
    assert set(other.seen) == {id(p) for p in model.parameters()} - set(taking.seen)


def test_groups_keep_their_numbers_under_a_route():
    model, noting = network(), rules("matrix", "vector")
    opt = mep.EPOptimizer(
        [
            {"params": model[0].parameters(), "lr": 0.5},
            {"params": [*model[2].parameters(), *model[4].parameters()]},
        ],
        model=model,
        lr=0.1,
        update=mep.Route(**noting, vector_lr=2.0),
    )
    train(opt, 1, batch_of())
    found = {k: r.seen.get(id(p)) for r in noting.values() for k, p in model.named_parameters()}
    assert found["0.bias"] == 1.0 and found["2.bias"] == found["4.bias"] == 0.2
    assert [noting["matrix"].seen[id(model[k].weight)] for k in (0, 2, 4)] == [0.5, 0.1, 0.1]


BAD = {
    "matrix": (lambda: mep.Route("muon"), TypeError, r"`Route\(matrix=.*mep\.SGD\(\), got 'muon'"),
    "class": (lambda: mep.Route(mep.Muon), TypeError, r"`Route\(matrix=.*update rule.*Muon'>"),
    "vector": (lambda: mep.Route(mep.Muon(), None), TypeError, r"`Route\(vector=.*got None"),
    "vector_lr": (lambda: mep.Route(mep.Muon(), vector_lr=-0.1), ValueError, r"vector_lr=.*-0\.1"),
    "infinite": (
        lambda: mep.Route(mep.Muon(), vector_lr=math.inf),
        ValueError,
        r"`Route\(vector_lr=\.\.\.\)` must be a finite number >= 0, got inf",
    ),
    "at_least": (
        lambda: mep.Route(mep.Muon(), at_least=-1),
        ValueError,
        r"at_least=.*>= 0, got -1",
    ),
    "fraction": (lambda: mep.Route(mep.Muon(), at_least=2.5), ValueError, r"at_least=.*got 2\.5"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD)
def test_route_refuses_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_numbers_are_checked_by_the_rules_of_both_sides():
    model = network()
    options = {"momentum": 0.0, "nesterov": True}
    mep.EPOptimizer([model[0].weight], update=mep.Muon(), **options)  # Muon alone has no quarrel
    with pytest.raises(ValueError, match="`nesterov=True` needs `momentum` > 0"):
        mep.EPOptimizer(model.parameters(), update=mep.Route(mep.Muon()), **options)
    with pytest.raises(ValueError, match="`nesterov=True` needs `momentum` > 0"):
        mep.EPOptimizer(
            model.parameters(), update=mep.Route(mep.SGD(), mep.Route(mep.Muon())), **options
        )


# --- refusal -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_muon_alone_refuses_biases_by_name_and_names_the_remedy(mode):
    model = network()
    with pytest.raises(
        ValueError,
        match=r"^`update=Muon\(\.\.\.\)` treats matrices and kernels only, not `0\.bias` \(8,\), "
        r"`2\.bias` \(6,\), `4\.bias` \(3,\): use mep\.Route\(Muon\(\.\.\.\)\), which sends the "
        r"others to SGD$",
    ):
        mep.EPOptimizer(model.parameters(), model=model, mode=mode, update=mep.Muon())
    mep.EPOptimizer(model.parameters(), model=model, mode=mode, update=mep.Route(mep.Muon()))
    bare = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    mep.EPOptimizer(bare.parameters(), model=bare, mode=mode, update=mep.Muon())


def test_full_name_of_a_nested_norm_is_given():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3, bias=False), nn.LayerNorm(3)))
    message = r"not `0\.1\.weight` \(3,\), `0\.1\.bias` \(3,\): use"
    with pytest.raises(ValueError, match=message):
        mep.EPOptimizer(model.parameters(), model=model, mode="backprop", update=mep.Muon())


def test_without_a_model_the_number_of_a_refused_parameter_is_given():
    with pytest.raises(ValueError, match=r"not `parameter 1` \(8,\), `parameter 3` \(6,\), "):
        mep.EPOptimizer(network().parameters(), update=mep.Muon())


@pytest.mark.parametrize("with_model", [True, False], ids=["model", "no model"])
def test_refused_group_leaves_everything_as_it_was(with_model):
    batch, runs = batch_of(), []
    for refuse in (False, True):
        model = network()
        opt = mep.EPOptimizer(
            [model[0].weight], model=model if with_model else None, momentum=0.9, update=mep.Muon()
        )
        before = copy.copy(opt.param_groups[0])
        if refuse:
            name = r"`2\.bias`" if with_model else "`parameter 2`"
            with pytest.raises(ValueError, match=rf"not {name} \(6,\): use mep\.Route"):
                opt.add_param_group({"params": model[2].parameters()})
        assert opt.param_groups == [before] and not opt.state
        assert [id(p) for p in before["params"]] == [id(model[0].weight)]
        for _ in range(3):
            backward(model, batch)
            opt.step()
        opt.add_param_group({"params": [model[2].weight]})
        backward(model, batch)
        opt.step()
        runs.append(weights(model))
    assert identical(*runs)
    assert not identical(runs[0], weights(network()))


def test_route_whose_vector_rule_takes_matrices_only_refuses_vectors():
    model = network()
    with pytest.raises(ValueError, match=r"matrices and kernels only, not `0\.bias` \(8,\)"):
        mep.EPOptimizer(model.parameters(), update=mep.Route(mep.SGD(), mep.Muon()), model=model)
    with pytest.raises(ValueError, match=r"not `0\.bias` \(8,\)"):
        rule = mep.Route(Noting(), NotingMatrices())
        mep.EPOptimizer(model.parameters(), update=rule, model=model)


# --- a true optimizer all the same ---------------------------------------------------------------


def make_run(seed=0, dtype=torch.float32, **options):
    model = network(dtype, seed)
    rule = mep.Route(mep.Muon(), last=True, vector_lr=0.5)
    numbers = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    return model, mep.EPOptimizer(
        model.parameters(), model=model, update=rule, **(numbers | options)
    )


@pytest.mark.parametrize("mode", ["ep", "backprop"])
def test_saved_run_continues_bitwise(tmp_path, mode):
    batch = batch_of(dtype=torch.float32)
    model, opt = make_run(mode=mode)
    train(opt, 4, batch)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    train(opt, 4, batch)
    other, other_opt = make_run(seed=9, mode=mode, lr=0.3)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["opt"])
    assert not identical(weights(other), weights(model))
    train(other_opt, 4, batch)
    assert identical(weights(other), weights(model))


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda opt: pickle.loads(pickle.dumps(opt))}


@pytest.mark.parametrize("with_model", [True, False], ids=["model", "no model"])
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_copy_continues_bitwise_and_on_its_own(make, with_model):
    batch = batch_of(dtype=torch.float32)
    if with_model:
        model, opt = make_run()
        train(opt, 3, batch)
    else:
        model = network(torch.float32)
        rule = mep.Route(mep.Muon(), first=True)
        opt = mep.EPOptimizer(model.parameters(), momentum=0.9, update=rule)
        backward(model, batch)
        opt.step()
    twin, start = make(opt), weights(model)
    assert twin.rule == opt.rule
    copied = [p for group in twin.param_groups for p in group["params"]]
    assert identical(copied, start)
    if with_model:
        train(twin, 3, batch)
        assert identical(weights(model), start)
        train(opt, 3, batch)
    else:
        for p, q in zip(model.parameters(), copied, strict=True):
            q.grad = p.grad.clone()
        twin.step()
        assert identical(weights(model), start)
        opt.step()
    assert identical(weights(model), copied)
    assert not identical(weights(model), start)


def test_scheduler_reaches_both_sides():
    model, noting = network(), rules("matrix", "vector")
    opt = mep.EPOptimizer(
        model.parameters(), model=model, lr=0.8, update=mep.Route(**noting, vector_lr=0.5)
    )
    schedule = lr_scheduler.StepLR(opt, 1, 0.5)
    for lr in (0.8, 0.4, 0.2):
        for rule in noting.values():
            rule.seen.clear()
        train(opt, 1, batch_of())
        schedule.step()
        assert set(noting["matrix"].seen.values()) == {lr}
        assert set(noting["vector"].seen.values()) == {0.5 * lr}


def test_scheduler_that_cycles_the_momentum_changes_muon():
    found = []
    for scheduled in (True, False):
        model, opt = make_run(dtype=torch.float64, weight_decay=0.0)
        schedule = lr_scheduler.OneCycleLR(opt, max_lr=0.05, total_steps=9) if scheduled else None
        for _ in range(8):
            train(opt, 1, batch_of())
            if schedule:
                schedule.step()
                opt.param_groups[0]["lr"] = 0.05  # what is left is the momentum
        found.append(weights(model))
    assert opt.param_groups[0]["momentum"] == 0.9
    assert distance(found[0][2:3], found[1][2:3]) > 1e-3  # the hidden matrix, under Muon


def test_bfloat16_trains_and_its_momentum_survives_a_checkpoint(tmp_path):
    model, opt = make_run(dtype=torch.bfloat16, lr=0.02, weight_decay=0.0)
    x, y = batch_of(40, torch.float32)
    batch = x.bfloat16(), y
    first = float(train(opt, 1, batch))
    assert float(train(opt, 40, batch)) < 0.7 * first
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in model.parameters())
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "run.pt")
    other, other_opt = make_run(seed=3, dtype=torch.bfloat16)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    other_opt.load_state_dict(saved["opt"])
    for o in (opt, other_opt):
        train(o, 2, batch)
    assert identical(weights(other), weights(model))


@pytest.mark.parametrize("kind", ["ep", "backprop", "grad"])
def test_frozen_parameters_stay_and_have_no_state(kind):
    mode = "ep" if kind == "ep" else "backprop"
    model, opt = make_run(mode=mode)
    frozen = [model[0].weight, model[2].bias]
    for p in frozen:
        p.requires_grad_(False)
    before, batch = weights(model), batch_of(dtype=torch.float32)
    for _ in range(2):
        if kind == "grad":
            backward(model, batch)
            opt.step()
        else:
            train(opt, 1, batch)
    for p, old in zip(model.parameters(), before, strict=True):
        still = any(p is f for f in frozen)
        assert torch.equal(p, old) == still
        assert (p in opt.state) != still


def test_frozen_and_unfrozen_again_is_treated_by_its_rule():
    model, noting = network(), rules("matrix", "vector")
    opt = mep.EPOptimizer(model.parameters(), model=model, update=mep.Route(**noting, first=True))
    model[0].weight.requires_grad_(False)
    train(opt, 1, batch_of())
    assert id(model[0].weight) not in noting["matrix"].seen | noting["vector"].seen
    assert id(model[2].weight) in noting["matrix"].seen  # a frozen layer is the first still
    model[0].weight.requires_grad_(True)
    noting["matrix"].seen.clear(), noting["vector"].seen.clear()
    train(opt, 1, batch_of())
    assert id(model[0].weight) in noting["vector"].seen


# --- from equal gradients equal updates ----------------------------------------------------------


EVERY = {
    "route": mep.Route(mep.Muon(ns_dtype=None), first=True, vector_lr=0.5),
    "decoupled": mep.SGD(decoupled=True),
    "nested": mep.Route(mep.Route(mep.Muon(ns_dtype=None), mep.SGD(decoupled=True), last=True)),
}
NUMBERS = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}


def on_a_batch(rule, **options):
    model = network()
    opt = mep.EPOptimizer(model.parameters(), model=model, update=rule, **NUMBERS, **options)
    train(opt, 6, batch_of())
    return weights(model)


def on_grad(rule, fill, with_model=None):
    model = network()
    options = {"model": model, "mode": with_model} if with_model else {}
    opt = mep.EPOptimizer(model.parameters(), update=rule, **NUMBERS, **options)
    for _ in range(6):
        model.zero_grad()
        fill(model)
        opt.step()
    return weights(model)


def by_backprop(model):
    backward(model, batch_of())


@pytest.mark.parametrize("rule", EVERY.values(), ids=EVERY)
def test_backprop_applies_one_rule_whichever_way_it_comes(rule):
    truth = on_a_batch(rule, mode="backprop")
    assert distance(truth, weights(network())) > 0.05  # it did train
    assert distance(on_grad(rule, by_backprop, "backprop"), truth) < SAME_RULE
    assert distance(on_grad(rule, by_backprop, "ep"), truth) < SAME_RULE
    assert distance(on_grad(rule, by_backprop), truth) < SAME_RULE
    # the limit of EP, which is backprop
    assert distance(on_a_batch(rule, settler=mep.Limit()), truth) < SAME_RULE


@pytest.mark.parametrize("rule", EVERY.values(), ids=EVERY)
def test_ep_applies_one_rule_whichever_way_it_comes(rule):
    def by_ep(model):
        mep.estimate(model, *batch_of())

    truth = on_a_batch(rule)
    assert distance(on_grad(rule, by_ep, "ep"), truth) < SAME_RULE
    assert distance(on_grad(rule, by_ep), truth) < SAME_RULE
    assert distance(on_a_batch(rule, mode="backprop"), truth) > 1e-5  # the nudge is finite


@pytest.mark.parametrize("route", [None, *EVERY.values()], ids=["plain", *EVERY])
def test_route_is_its_parts_on_their_own(route):
    """Under a route, every parameter fares as in an optimizer of its own with its own rule."""
    model = network()
    rules = route or mep.Route(mep.SGD())
    together = mep.EPOptimizer(model.parameters(), model=model, update=rules, **NUMBERS)
    twins, alone = network(), []
    last = len(list(twins.parameters())) - 2
    for k, p in enumerate(twins.parameters()):
        role = {0: "first", last: "last"}.get(k, "hidden") if p.dim() == 2 else "vector"
        part, factor = rules.assign(p, role)
        numbers = NUMBERS | {"lr": NUMBERS["lr"] * factor}
        alone.append(mep.EPOptimizer([p], update=part, **numbers))
    for _ in range(4):
        for net in (model, twins):
            backward(net, batch_of())
        for opt in (together, *alone):
            opt.step()
    assert distance(weights(model), weights(twins)) < SAME_RULE
