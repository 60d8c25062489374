"""A step within a memory budget: the same update, however little is kept of the chain."""

import copy
import pickle

import pytest
import torch
from problems import problem
from small_training import batch_of, distance, identical, network, train, weights
from test_blockwise import CASES, ONE, RULES
from torch import nn

import mep
from mep.contrast import BlockSegments, streaming
from mep.memory import Plan, track
from mep.optim.budget import Budget

# float64 rounding of three steps; one phase adds what another one stacks.
SAME = 1e-13
STREAMING = [case for case in CASES if case[1] != "natural"]
# Of blocks per span, level by level: segments of one, of some that do not divide the chain, more
# than there are, and a tower of levels.
LENGTHS = [(1,), (2,), (3,), (100,), (4, 2), (2, 1), (4, 2, 1)]


@pytest.fixture
def planned(monkeypatch):
    """Sets the plan, whatever the budget says."""

    def by(*lengths):
        monkeypatch.setattr(
            Budget, "_plan", lambda self, chain, *_: Plan(0, len(chain), lengths, 0)
        )

    return by


def streamed(model, **options):
    chosen = {"settler": ONE, "lr": 0.05, "memory_budget": "1GB"} | options
    return mep.EPOptimizer(model.parameters(), model=model, **chosen)


def plain(model, **options):
    chosen = {"settler": ONE, "lr": 0.05, "blockwise": True} | options
    return mep.EPOptimizer(model.parameters(), model=model, **chosen)


def everything(model, opt):
    """Parameters, running statistics and optimizer state."""
    state = [opt.state[p].get("momentum_buffer", torch.zeros(1)) for p in model.parameters()]
    return [*weights(model), *(b.double() for b in model.buffers()), *state]


# --- the same update -----------------------------------------------------------------------------


@pytest.mark.parametrize(("net", "rule"), STREAMING)
def test_is_the_plain_update(planned, net, rule):
    planned(2)
    found = []
    for make in (streamed, plain):
        p = problem(net)
        opt = make(p.model, **RULES[rule])
        losses = [opt.step(x=p.x, target=p.y) for _ in range(3)]
        found.append([*weights(p.model), *losses, opt.last.residual])
    assert distance(*found) < SAME


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_is_the_plain_update_for_any_plan(planned, lengths):
    planned(*lengths)
    torch.manual_seed(0)
    body = [m for _ in range(8) for m in (nn.Tanh(), nn.Linear(5, 5))]
    model = nn.Sequential(nn.Linear(4, 5), *body, nn.Tanh(), nn.Linear(5, 3)).double()
    found = []
    for make in (streamed, plain):
        mine = copy.deepcopy(model)
        opt = make(mine, momentum=0.9)
        train(opt, 3, batch_of())
        found.append([*everything(mine, opt), opt.last.residual])
    assert distance(*found) < SAME


class Noisy(nn.Module):
    """A block that draws numbers and keeps running statistics, differentiated as a whole."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.drop = nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.4)

    def forward(self, x):
        return x + self.drop(self.norm(torch.tanh(self.inner(x))))


def noisy_net():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5)]
    for _ in range(3):
        layers += [nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 5), nn.BatchNorm1d(5), Noisy()]
    return nn.Sequential(*layers, nn.Linear(5, 3)).double()


@pytest.mark.parametrize("lengths", [(1,), (2,), (4, 2), (4, 2, 1)], ids=str)
def test_masks_and_statistics_are_those_of_the_plain_step(planned, lengths):
    planned(*lengths)
    found, after = [], []
    for make in (streamed, plain):
        model = noisy_net()
        opt = make(model)
        torch.manual_seed(1)
        train(opt, 3, batch_of())
        after.append(torch.rand(1))  # the generator goes on from the same place
        found.append(everything(model, opt))
    assert distance(*found) < SAME
    assert torch.equal(*after)
    assert model[3 + 1].num_batches_tracked == 3


def test_embedding_and_attention_stream(planned):
    planned(2, 1)
    torch.manual_seed(0)
    body = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.1) for _ in range(2)]
    model = nn.Sequential(nn.Embedding(11, 8), *body, nn.Flatten(), nn.Linear(24, 3)).double()
    x, y = torch.randint(11, (4, 3)), torch.tensor([0, 1, 2, 0])
    found = []
    for make in (streamed, plain):
        mine = copy.deepcopy(model)
        torch.manual_seed(2)
        opt = make(mine)
        for _ in range(2):
            opt.step(x=x, target=y)
        found.append(weights(mine))
    assert distance(*found) < SAME
    assert distance(found[0], weights(model)) > 1e-3


# --- what is kept --------------------------------------------------------------------------------


def deep(depth, width=32):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mep.models.deep_mlp(depth, width, 16, 10)


def measured(model, batch=16, **options):
    """A later step's usage: the first makes the optimizer's state."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 16), torch.randint(10, (batch,))
    opt = mep.EPOptimizer(model.parameters(), model=model, lr=0.01, momentum=0.9, **options)
    opt.step(x=x, target=y)
    with track(model, opt, samples=batch) as usage:
        opt.step(x=x, target=y)
    return usage, opt


@pytest.mark.parametrize("budget", [60_000, 200_000, "4MB"])
@pytest.mark.parametrize("depth", [20, 100, 300])
def test_peak_is_within_the_budget_and_as_predicted(depth, budget):
    usage, opt = measured(deep(depth), memory_budget=budget)
    assert usage.extra <= opt.plan.peak <= opt.plan.budget
    # Many levels of one or two blocks each are counted as if their worst moments coincided.
    assert usage.extra >= (0.92 if opt.plan.levels <= 2 else 0.85) * opt.plan.peak
    biases = sum(p.nbytes for p in opt.model.parameters() if p.dim() == 1)
    assert usage.peak["gradients"] <= biases  # SGD adds the factors of the others up


@pytest.mark.parametrize("budget", ["1MB", "4MB"])
def test_prediction_is_within_five_per_cent_at_the_benchmark_s_size(budget):
    model = mep.models.deep_mlp(100, 128, 16, 10)
    usage, opt = measured(model, batch=32, memory_budget=budget)
    assert 0.95 * opt.plan.peak <= usage.extra <= opt.plan.peak <= opt.plan.budget


RULE_BUDGETS = {
    "muon": {"update": mep.Route(mep.Muon())},
    "muon, spectral": {"update": mep.Route(mep.Muon()), "constraint": mep.SpectralNorm()},
    "dion": {"update": mep.Route(mep.Dion(0.5))},
    "normalised": {"update": mep.Normalised()},
    "error feedback": {"update": mep.ErrorFeedback(mep.TopK(0.1))},
    "nesterov": {"nesterov": True, "weight_decay": 0.1},
}


@pytest.mark.parametrize("rule", RULE_BUDGETS)
def test_the_rule_s_own_needs_are_part_of_the_plan(rule):
    usage, opt = measured(deep(100), memory_budget=400_000, **RULE_BUDGETS[rule])
    assert opt.plan.levels >= 1
    assert usage.extra <= opt.plan.peak <= opt.plan.budget


def test_convolutions_keep_to_the_budget():
    torch.manual_seed(0)
    body = [m for _ in range(30) for m in (nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())]
    model = nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        *body,
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    usage, opt = measured(model, memory_budget=120_000)
    assert opt.plan.levels >= 1
    assert usage.extra <= opt.plan.budget
    assert abs(usage.extra / opt.plan.peak - 1) < 0.05


def test_peak_does_not_grow_with_depth_and_the_plain_one_does():
    flat = [measured(deep(n), memory_budget=100_000)[0].extra for n in (50, 400)]
    steep = [measured(deep(n), blockwise=True, settler=ONE)[0].extra for n in (50, 400)]
    assert max(flat) <= 100_000
    assert steep[1] > 6 * steep[0]


def test_half_the_digits_take_half_the_checkpoints_and_change_little():
    torch.manual_seed(0)
    found, usages, plans = [], [], []
    for dtype in (None, torch.bfloat16):
        model = deep(200)
        before = weights(model)
        usage, opt = measured(model, memory_budget=72_000, state_dtype=dtype)
        usages.append(usage.extra)
        plans.append(opt.plan)
        changes = [p - q for p, q in zip(weights(model), before, strict=True)]
        found.append(torch.cat([change.flatten() for change in changes]))
    assert usages[1] <= plans[1].peak
    assert plans[1].levels < plans[0].levels or plans[1].peak < 0.8 * plans[0].peak
    assert distance([found[1]], [found[0]]) > 1e-6  # rounding to 8 bits shows
    assert torch.cosine_similarity(*found, dim=0) > 0.99


def test_state_dtype_goes_through_several_levels(planned):
    """Every pass starts a segment from the same rounded state, however deep its level."""
    found = []
    for lengths in ((2,), (4, 2), (8, 4, 2)):
        planned(*lengths)
        model = deep(20)
        _, opt = measured(model, memory_budget="1GB", state_dtype=torch.bfloat16)
        found.append([*weights(model), opt.last.loss])
    # The free states are the same to the last bit; errors are rounded where a plan keeps them.
    assert found[0][-1] == found[1][-1] == found[2][-1]
    assert distance(found[0][:-1], found[2][:-1]) < 1e-3


# --- what it says --------------------------------------------------------------------------------


def test_plan_can_be_printed_and_follows_the_batch():
    model = deep(200)
    opt = mep.EPOptimizer(model.parameters(), model=model, memory_budget="100kB")
    assert opt.plan is None
    x, y = torch.randn(16, 16), torch.zeros(16, dtype=torch.long)
    opt.step(x=x, target=y)
    first = opt.plan
    assert "200 blocks within 100.00 kB" in str(first) and "level" in str(first)
    opt.step(x=x, target=y)
    assert opt.plan is first
    opt.step(x=x[:8], target=y[:8])
    assert opt.plan.peak < first.peak


def test_least_budget_is_named_and_works():
    model = deep(100)
    x, y = torch.randn(16, 16), torch.zeros(16, dtype=torch.long)
    before = weights(model)
    opt = mep.EPOptimizer(model.parameters(), model=model, memory_budget="10kB", momentum=0.9)
    with pytest.raises(
        ValueError, match=r"`memory_budget=10.00 kB` is not enough.*least.* kB"
    ) as e:
        opt.step(x=x, target=y)
    assert identical(before, weights(model)) and not opt.state
    least = str(e.value).rsplit("works is ", 1)[1]
    opt = mep.EPOptimizer(model.parameters(), model=model, memory_budget=least)
    opt.step(x=x, target=y)
    assert opt.plan.peak <= opt.plan.budget


REFUSED = {
    "clip_norm": ({"clip_norm": 1.0}, "`memory_budget` knows no norm over all blocks"),
    "natural": (
        {"update": mep.Route(mep.Natural())},
        r"`memory_budget` and `update=Natural\(...\)` exclude each other",
    ),
    "sweeps": ({"settler": mep.Sweep(2)}, r"`memory_budget` updates during the nudged sweep"),
    "descent": ({"settle_steps": 3}, r"`memory_budget` updates during the nudged sweep"),
    "stencil": ({"stencil": mep.centered}, "`memory_budget` has one nudged phase"),
    "energy": (
        {"energy": mep.PredictionError(output=mep.KL())}, "`memory_budget` needs the squared error"
    ),
    "blockwise": ({"blockwise": True}, "drop `blockwise`"),
    "size": ({"memory_budget": "4 apples"}, "`memory_budget` must be a size such as '4MB'"),
    "nothing": ({"memory_budget": 0}, "`memory_budget` must be > 0"),
    "dtype": ({"state_dtype": torch.int32}, "`state_dtype` must be a floating point dtype"),
    "dtype alone": (
        {"memory_budget": None, "state_dtype": torch.bfloat16}, "give `memory_budget`, too"
    ),
    "backprop": ({"mode": "backprop"}, "mode='backprop' does not settle: drop memory_budget"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(name):
    options, message = REFUSED[name]
    model = network()
    with pytest.raises((TypeError, ValueError), match=message):
        mep.EPOptimizer(model.parameters(), model=model, **{"memory_budget": "1MB"} | options)


def test_grad_is_refused():
    model = network()
    opt = mep.EPOptimizer(model.parameters(), model=model, memory_budget="1MB")
    with pytest.raises(ValueError, match=r"`memory_budget` and `\.grad` exclude each other"):
        opt.step()


def test_shared_parameter_is_refused():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    with pytest.raises(ValueError, match="`memory_budget`: block `2` shares a parameter"):
        mep.EPOptimizer(model.parameters(), model=model, memory_budget="1MB")


BAD = {
    "infinite": (torch.full((3, 4), torch.inf), torch.tensor([0, 1, 2]), "NaN or infinite"),
    "features": (torch.zeros(3, 5), torch.tensor([0, 1, 2]), r"does not fit the model: block `0`"),
    "target": (torch.zeros(3, 4), torch.tensor([0, 1, 7]), "classes in"),
    "samples": (torch.zeros(3, 4), torch.tensor([0, 1]), "`target` must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_batch_changes_nothing(planned, name):
    x, y, message = BAD[name]
    planned(1)
    model = network()
    opt = streamed(model, momentum=0.9)
    train(opt, 1, batch_of())
    before = everything(model, opt)
    with pytest.raises(ValueError, match=message):
        opt.step(x=x.double(), target=y)
    assert identical(before, everything(model, opt))


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_refused_before_the_first_write(planned, value):
    planned(1)
    model = network()
    model[4].bias.data[0] = value  # loss and errors, but not the input
    opt = streamed(model)
    before = weights(model)
    opt.step(*(), **dict(zip(("x", "target"), batch_of(), strict=True)))
    assert opt.last.status == "diverged" and opt.skipped == 1
    assert identical(before[:-1], weights(model)[:-1])


def test_residual_above_tolerance_eases_the_next_nudge(planned):
    planned(1)
    model = network()
    opt = streamed(model, settler=mep.Sweep(1, tol=1e-9), beta=0.1)
    x, y = batch_of()
    opt.step(x=x, target=y)
    assert (opt.last.status, opt.unsettled) == ("not settled", 1)
    opt.step(x=x, target=y)
    assert opt.last.beta == pytest.approx(0.05)


def test_a_budget_survives_saving_and_copies(planned, tmp_path):
    planned(2)
    model = network()
    opt = streamed(model, momentum=0.9)
    train(opt, 2, batch_of())
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(model)
    other = streamed(twin, momentum=0.9)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    copied = pickle.loads(pickle.dumps(opt))
    train(opt, 2, batch_of())
    train(other, 2, batch_of())
    train(copied, 2, batch_of())
    assert identical(weights(model), weights(twin))
    assert identical(weights(model), weights(copied.model))


def test_a_changed_model_gets_a_new_plan():
    model = deep(40)
    opt = mep.EPOptimizer(model.parameters(), model=model, memory_budget="4MB")
    x, y = torch.randn(16, 16), torch.zeros(16, dtype=torch.long)
    opt.step(x=x, target=y)
    first = opt.plan
    copied = pickle.loads(pickle.dumps(opt))
    assert copied.plan is None
    copied.step(x=x, target=y)
    assert copied.plan == first
    model[2] = nn.Tanh()
    opt.step(x=x, target=y)
    assert opt.plan is not first


def test_frozen_and_foreign_parameters_stay(planned):
    planned(1)
    model = network()
    model[0].weight.requires_grad_(False)
    before = weights(model)
    opt = mep.EPOptimizer(list(model.parameters())[:4], model=model, memory_budget="1MB")
    train(opt, 2, batch_of())
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert moved == [False, True, True, True, False, False]


def test_fixed_beta_is_used_as_it_is(planned):
    planned(1)
    model = network()
    opt = streamed(model, beta=0.25)
    train(opt, 1, batch_of())
    assert opt.last.beta == 0.25


def test_every_block_is_walked_as_often_as_the_plan_says(planned, monkeypatch):
    """Of a span neither its last part is run through to mark it, nor its first one descended."""
    model = deep(64)
    middle = mep.trace(model).blocks[21]
    counts = dict.fromkeys(("predict", "product", "advance", "signals"), 0)
    for name in counts:
        original = getattr(type(middle), name)

        def noting(self, *args, name=name, original=original):
            counts[name] += self.name == middle.name
            return original(self, *args)

        monkeypatch.setattr(type(middle), name, noting)
    for lengths in ((4,), (16,), (16, 4)):
        planned(*lengths)
        counts.update(dict.fromkeys(counts, 0))
        opt = mep.EPOptimizer(model.parameters(), model=model, memory_budget="1GB")
        opt.step(x=torch.randn(4, 16), target=torch.zeros(4, dtype=torch.long))
        passes = Plan(0, 64, lengths, 0).passes
        names = ("forward", "backward", "nudged", "contrast")
        assert [*counts.values()] == [passes[name] for name in names]


def test_walk_is_a_reference_free_of_levels():
    """One span over all of the chain is the plain walk."""
    model = network()
    chain = mep.trace(model)
    segments = BlockSegments(chain, lambda _: None, lambda _: None)
    walk = streaming._Walk(segments, (100,), None)
    x, _ = batch_of()
    output, marks = walk.free(x)
    torch.testing.assert_close(output, model(x))
    assert len(marks) == 1 and marks[0].state is x
