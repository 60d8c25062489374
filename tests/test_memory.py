"""The tracker against hand counts and torch's allocator; plans against real steps."""

import copy
import gc
import math
import random
import weakref
from contextlib import nullcontext
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import mep
from mep.memory import KINDS, Footprint, Plan, Update, label, parse, phase, plan, show, track
from mep.memory.plan import _candidates, _Costs

N = 256
UNIT = 4 * N  # bytes of N numbers in float32


def new(units=1, **options):
    return torch.zeros(units * N, **options)


def bytes_of(tensors):
    return sum(t.nbytes for t in tensors)


# --- bytes ---------------------------------------------------------------------------------------


def resized_behind_its_back(units, then):
    x = new(2)
    x.untyped_storage().resize_(units * UNIT)  # no operation: seen by the next one
    return then(x)


def in_a_cycle():
    x = [new()]
    x.append(x)
    del x
    gc.collect()


# What a function returns is alive at the end. -> most units at once, units at the end
PROGRAMS = {
    "views": (lambda: [x := new(), x[3:], x.view(4, -1).t(), x.detach(), x.expand(9, N)], 1, 1),
    "view alone": (lambda: new()[:1], 1, 1),
    "in turn": (lambda: [new().nbytes, new()], 1, 1),
    "at once": (lambda: [new(), new()][0], 2, 1),
    "in place": (lambda: new().add_(1).mul_(2).relu_().zero_(), 1, 1),
    "whole numbers": (lambda: new(dtype=torch.int64), 2, 2),
    "gaps": (lambda: torch.empty_strided((2, 1), (N - 1, 1)), 1, 1),
    "grown": (lambda: new().resize_(3 * N), 3, 3),
    "grown storage": (lambda: resized_behind_its_back(3, lambda x: x.view(-1)), 3, 3),
    "shrunk storage": (lambda: resized_behind_its_back(1, lambda x: x[:1]), 2, 1),
    "set": (lambda: new(2).set_(new()), 3, 1),
    "several results": (lambda: new(2).chunk(2), 2, 2),
    "list of arguments": (lambda: torch.cat([new(), new()]), 4, 2),
    "saved by a graph": (lambda: new(requires_grad=True).exp().exp(), 3, 3),
    "cycle": (in_a_cycle, 1, 0),
    "nothing": (lambda: [new(device="meta"), torch.zeros(0)], 0, 0),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_bytes_are_those_counted_by_hand(name):
    program, peak, end = PROGRAMS[name]
    tracker = track()
    with tracker as usage:
        kept = program()
        assert tracker.live == end * UNIT
        del kept
        assert tracker.live == 0
    assert usage.extra == usage.peak["other"] == tracker.most == peak * UNIT


def test_what_was_there_counts_when_first_read_and_once():
    old, other, unread = new(), new(2), new(4)
    tracker = track()
    with tracker as usage:
        old[:1]
        assert tracker.live == UNIT
        torch.add(input=old, other=other[:N], out=old)
        assert tracker.live == tracker.most == usage.extra == 3 * UNIT
        torch.stack([old, other[N:]])
        assert (tracker.live, tracker.most) == (3 * UNIT, 5 * UNIT)
    assert unread.nbytes == 4 * UNIT


def test_nested_trackers_see_what_each_has_met():
    with track() as outer:
        a, unread = new(), new(4)
        with track() as inner:
            b = a + 1
            del a
            c = new()
        d = new(8)
    assert (outer.extra, inner.extra) == (bytes_of([unread, b, c, d]), 2 * UNIT)


def test_reset_live_and_most_and_nothing_after_the_end():
    tracker = track()
    with tracker as usage:
        x = new(3)
        del x
        y = new()
        assert (tracker.live, tracker.most) == (UNIT, 3 * UNIT)
        assert tracker.reset() == UNIT == tracker.most == usage.extra
        z = new()
        assert (tracker.live, tracker.most) == (2 * UNIT, 2 * UNIT)
    before = copy.deepcopy(usage)
    label(y, "gradients")
    y = torch.cat([y, z, new(5)])
    del y, z
    assert usage == before and tracker.live == 2 * UNIT


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Parameter(new(device="meta")),
        lambda: nn.Parameter(new().to_sparse()),
        lambda: nn.LazyLinear(2).weight,
    ],
    ids=("meta", "sparse", "lazy"),
)
def test_tensors_without_storage_do_no_harm(make):
    model = nn.Module()
    model.x = make()
    with track(model) as usage:
        assert label(model.x, "gradients") is model.x
    assert sum(usage.peak.values()) == 0


# --- kinds ---------------------------------------------------------------------------------------

IN, OUT, BATCH = 64, 32, 16
WEIGHT = 4 * IN * OUT


def linear(units=OUT):
    return nn.Linear(IN, units, bias=False)


def batch():
    return torch.ones(BATCH, IN)


def only(**sizes):
    return dict.fromkeys(KINDS, 0) | sizes


def test_parameters_and_buffers_are_one_kind_whatever_their_shape():
    model = nn.Sequential(linear(BATCH), nn.BatchNorm1d(BATCH))  # a row per sample, too
    owned = bytes_of([*model.parameters(), *model.buffers()])
    with track(model, samples=BATCH) as usage:
        model[0](batch())
    states = 4 * BATCH * (IN + BATCH)
    assert usage.peak == only(parameters=owned, states=states) and usage.extra == states


def test_gradients_count_as_such_from_the_peak_on():
    """At the peak there are a loss and its gradient; a second gradient is added to the first."""
    model, x = linear(), batch()
    with track(model, samples=BATCH) as usage:
        model(x).sum().backward()
    first = only(parameters=WEIGHT, gradients=WEIGHT, states=x.nbytes, other=4 + 4)
    assert usage.peak == first
    tracker = track(model, samples=BATCH)
    with tracker as usage:
        assert tracker.live == usage.peak["gradients"] == WEIGHT
        model(x).sum().backward()
        assert usage.peak == first | {"other": WEIGHT + 4 + 4}
        model.zero_grad()
        assert tracker.live == x.nbytes


def optimizers(model):
    return {
        "sgd": (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), WEIGHT),
        "adam": (torch.optim.Adam(model.parameters()), 2 * WEIGHT + 4),  # two moments, a count
        "ep": (mep.EPOptimizer(model.parameters(), model=model, momentum=0.9), WEIGHT),
    }


def one_step(model, opt, x):
    if isinstance(opt, mep.EPOptimizer):
        opt.step(x=x, target=torch.zeros(len(x), dtype=torch.long))
    else:
        opt.zero_grad()
        model(x).sum().backward()
        opt.step()


@pytest.mark.parametrize("name", ["sgd", "adam", "ep"])
def test_optimizer_state_is_known_from_the_end_of_the_first_step(name):
    model, x = linear(), batch()
    opt, size = optimizers(model)[name]
    tracker = track(model, opt)
    with tracker:
        one_step(model, opt, x)
        if name != "ep":  # left are gradient and batch
            assert tracker.live == WEIGHT + x.nbytes
    with track(model, opt) as usage:
        one_step(model, opt, x)
    assert usage.peak["optimizer state"] == size
    with track(model) as blind:
        one_step(model, opt, x)
    assert blind.peak["optimizer state"] == 0
    most = [u.phases.get("mep: update", u.extra) for u in (blind, usage)]
    assert most[0] > most[1]


ROWS = {
    ((BATCH, 3), torch.float32): "states",
    ((BATCH,), torch.bfloat16): "states",
    ((3, BATCH), torch.float32): "other",
    ((BATCH, 3), torch.long): "other",
    ((), torch.float32): "other",
}


def test_states_have_one_row_per_sample():
    for (shape, dtype), kind in ROWS.items():
        with track(samples=BATCH) as usage, track() as unknowing:
            x = torch.zeros(shape, dtype=dtype)
        assert usage.peak == only(**{kind: x.nbytes}), shape
        assert unknowing.peak == only(other=x.nbytes)


def test_label_moves_a_storage_and_the_peak_it_made():
    tracker = track()
    with tracker as usage:
        x, y = new(), new(2)
        assert label(y[1:], "gradients").shape == (2 * N - 1,)  # a view: the whole storage moves
        assert usage.peak == only(gradients=2 * UNIT, other=UNIT)
        del y
        label(x, "gradients")  # that peak has passed
        assert usage.peak == only(gradients=2 * UNIT, other=UNIT) and tracker.live == UNIT


@pytest.mark.parametrize("kind", KINDS[:2])
def test_what_is_later_said_to_last_stays_in_the_peak(kind):
    tracker = track()
    with tracker as usage:
        x = new(2)
        del x
        y = new(3)
        label(y, kind)
        assert usage.peak == only(other=3 * UNIT) and tracker.live == 0
        z = new(4)
        assert usage.peak == only(**{kind: 3 * UNIT}, other=z.nbytes)
        label(y, "other")
        assert tracker.live == usage.extra == 7 * UNIT


@pytest.mark.parametrize("kind", KINDS)
def test_label_counts_what_is_unseen_as_what_it_is_in_all_trackers(kind):
    old, lasting = new(2), kind in KINDS[:2]
    assert label(old, kind) is old  # nobody looks on
    one, other = track(), track()
    with one, other:
        assert label(old, kind) is old
        assert one.usage.extra == one.live == other.live == (0 if lasting else 2 * UNIT)
        new(3)
    assert one.usage == other.usage and one.usage.extra == (3 if lasting else 5) * UNIT
    assert one.usage.peak[kind] == (5 if kind == "other" else 2) * UNIT


def test_what_is_no_option_is_refused():
    with pytest.raises(ValueError, match="`samples` must be >= 1, got 0"):
        track(samples=0)
    tracker = track()
    with tracker, pytest.raises(ValueError, match=r"`kind` must be one of .* got 'weights'"):
        label(new(), "weights")


def hooks_of(model, opt):
    found = [len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return [*found, len(opt._optimizer_step_post_hooks)]


@pytest.mark.parametrize("fails", [True, False])
def test_nothing_is_left_behind(fails):
    """Neither hooks nor finalizers nor references: all can be freed while tracked bytes live."""
    model, x = linear(), batch()
    opt, _ = optimizers(model)["sgd"]
    hooks, finalizers = hooks_of(model, opt), set(weakref.finalize._registry)
    tracker = track(model, opt)
    with pytest.raises(RuntimeError, match="inside") if fails else nullcontext(), tracker as usage:
        assert hooks_of(model, opt) != hooks
        one_step(model, opt, x)
        if fails:
            raise RuntimeError("inside")
    assert hooks_of(model, opt) == hooks and set(weakref.finalize._registry) <= finalizers
    seen = copy.deepcopy(usage)
    one_step(model, opt, torch.cat([x] * 9))
    assert usage == seen and usage.extra > 0
    alive, weight = [weakref.ref(o) for o in (model, opt, tracker)], model.weight.detach()
    del model, opt
    gc.collect()
    assert [ref() for ref in alive] == [None, None, tracker]
    del tracker
    assert alive[2]() is None and weight.isfinite().all()


# --- phases --------------------------------------------------------------------------------------


def test_the_innermost_phase_counts_what_is_alive_in_it():
    with track() as usage:
        x = new()
        with phase("outer"):
            y = new()
            with phase("inner"):
                new(4)
                z = new(2)
            del y, z  # they were alive when the inner one ended
        with phase("quiet"), record_function("torch's own"):
            x.add_(1)
        with phase("freed"):
            del x
        for units in (3, 1):  # one that comes again keeps its largest
            with pytest.raises(RuntimeError), phase("fails"):
                new(units)
                raise RuntimeError
        new(8)
    units = {"outer": 4, "inner": 6, "quiet": 1, "freed": 1, "fails": 3}
    assert usage.phases == {name: n * UNIT for name, n in units.items()}


def test_phases_of_a_step_leave_out_what_lasts():
    model, x = linear(), batch()
    opt, _ = optimizers(model)["ep"]
    one_step(model, opt, x)
    with track(model, opt) as usage:
        one_step(model, opt, x)
    assert {"mep: settle", "mep: contrast"} <= set(usage.phases)
    assert max(usage.phases.values()) == usage.extra


def test_a_phase_shows_in_profiles_tracked_or_not():
    named = phase("mep: settle")  # one and the same may come again
    for watch in (nullcontext, track, nullcontext):
        with profile(activities=[ProfilerActivity.CPU]) as prof, watch(), named:
            new()
        assert [event.name for event in prof.events()].count("mep: settle") == 1
    with track() as usage, named:  # nobody profiles now
        new()
    assert usage.phases == {"mep: settle": UNIT}


# --- torch's allocator ---------------------------------------------------------------------------


def allocated(prof):
    """The most that torch's allocator has handed out on CPU since a profile began."""

    def below(nodes):
        for node in nodes:
            yield node
            yield from below(node.children)

    tree = prof.profiler.kineto_results.experimental_event_tree()
    events = [e for e in below(tree) if e.tag.name == "Allocation"]
    events = [e for e in events if e.extra_fields.device.type == "cpu"]
    assert events
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_time_ns):
        now += event.extra_fields.alloc_size
        most = max(most, now)
    assert now == 0  # a step gives back what it takes
    return most


@pytest.mark.parametrize("rows", [64, 512])  # gradients dominate, activities dominate
@pytest.mark.parametrize(("act", "name"), [(nn.GELU, "sgd"), (nn.Tanh, "adam")])
def test_agrees_with_the_allocator(act, name, rows):
    layers = [m for _ in range(4) for m in (nn.Linear(256, 256), act())]
    model, x = nn.Sequential(*layers, nn.Linear(256, 10)), torch.randn(rows, 256)
    opt, _ = optimizers(model)[name]

    def step():
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    step()
    found = []
    for _ in range(2):  # the same to the byte
        with track(model, opt, samples=rows) as usage:
            step()
        found.append(usage)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    made = usage.extra - x.nbytes  # the batch was there before
    assert made > 2**20 and found[0] == found[1]
    # Apart are only the single numbers that kernels allocate inside: a few times 8 bytes.
    assert 0 <= allocated(prof) - made <= 64


# --- sizes ---------------------------------------------------------------------------------------

GOOD = {
    1: 1, 2**70: 2**70, np.int32(7): 7, "17": 17, "17B": 17, "512 bytes": 512, " 4M ": 2**22,
    "4 mb": 2**22, "512KiB": 2**19, "1.5GiB": 3 * 2**29, "0.25k": 256,
}  # fmt: skip
BAD = {
    (ValueError, "`name` must be a size such as '4MB', got '"): (
        "4 apples", "", "MB", "-4MB", "1e6", "1,5MB", "4TB", "4MB 2", "nan", "4i", "4 kbytes",
        "٤MB", "4_0", "9" * 16, "9" * 400, "0." + "1" * 10,
    ),
    (ValueError, "`name` must be > 0, got "): ("0MB", "0.5B", 0, -1),
    (TypeError, "`name` must be a number of bytes or a string such as '4MB', got "): (
        1.5, None, True, np.float64(8), b"4MB",
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", GOOD, ids=repr)
def test_sizes_are_read(size):
    found = parse(size, "name")
    assert found == GOOD[size] and type(found) is int


@pytest.mark.parametrize(("error", "message"), BAD)
def test_what_is_no_size_is_refused(error, message):
    for size in BAD[error, message]:
        with pytest.raises(error) as refusal:
            parse(size, "name")
        assert str(refusal.value).startswith(message)


@example(2**20 - 1)  # no 1024.00 kB
@given(st.one_of(st.integers(1, 2**12), st.integers(1, 2**42)))
def test_a_size_that_is_shown_can_be_read(size):
    # Two digits behind the point of a number that is 1 at least: half a hundredth, or a whole.
    assert parse(show(size), "name") == pytest.approx(size, rel=0.006)
    assert size <= parse(show(size, up=True), "name") <= 1.011 * size
    assert size > 2**30 or "1024" not in show(size) + show(size, up=True)


# --- plans ---------------------------------------------------------------------------------------

WAITING = ((False, False), (True, False), (True, True))  # an update is made at once, or waits


def block_of(sizes, waiting):
    return Footprint(*sizes[:5], Update(*sizes[5:], *waiting))


def chain_of(seed, count):
    """Blocks of any sizes."""
    draw = random.Random(seed)
    sizes = [[draw.randrange(10**6) for _ in range(7)] for _ in range(count)]
    return [block_of(s, draw.choice(WAITING)) for s in sizes]


def all_lengths(count, levels):
    """Every choice of at most so many levels, each a multiple of the next."""
    found, last = [()], [()]
    for _ in range(levels):
        last = [
            (*known, n)
            for known in last
            for n in range(1, count)
            if not known or (n < known[-1] and known[-1] % n == 0)
        ]
        found += last
    return found


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(6))
def test_only_spans_that_are_alike_are_added_up_once(seed, share):
    blocks = random.Random(seed).choices(chain_of(seed, 1 + seed % 3), k=13)
    costs, apart = _Costs(blocks, 7, share), _Costs(blocks, 7, share)
    apart.alike = [*range(13)]
    for lengths in all_lengths(13, 4)[1:]:
        assert costs.peak(lengths) == apart.peak(lengths)


def attempt(blocks, budget, share=1.0):
    try:
        return plan(blocks, budget, base=7, share=share)
    except ValueError:
        return None


def named_least(blocks, share=1.0):
    with pytest.raises(ValueError, match="is not enough for this model and batch") as refusal:
        plan(blocks, 1, base=7, share=share)
    start, least = str(refusal.value).split(": the least that works is ")
    assert start.startswith("`memory_budget=1 bytes` ")
    return parse(least, "least")


# Equal blocks, as in deep nets, or blocks of any sizes.
BLOCK = st.builds(block_of, st.tuples(*[st.integers(0, 10**6)] * 7), st.sampled_from(WAITING))
CHAINS = st.one_of(
    st.builds(lambda block, count: [block] * count, BLOCK, st.integers(1, 100)),
    st.builds(chain_of, st.integers(0, 10**9), st.integers(1, 40)),
)


@settings(deadline=None, max_examples=15)
@given(CHAINS, st.sampled_from([1.0, 0.5]))
def test_plans_keep_to_their_budgets(blocks, share):
    costs, named = _Costs(blocks, 7, share), named_least(blocks, share)
    assert attempt(blocks, named, share)  # it works, though it is rounded
    least = named
    while found := attempt(blocks, least - 1, share):
        least = found.peak
    assert attempt(blocks, least, share).peak == least and named <= 1.011 * least
    whole = costs.peak(())
    levels, peaks = [], {}
    for budget in sorted({least, *(least + (whole - least) * k // 5 for k in range(7))}):
        found = attempt(blocks, budget, share)
        assert (found.blocks, found.budget) == (len(blocks), budget)
        assert costs.peak(found.lengths) == found.peak <= budget
        assert all(a > b and a % b == 0 for a, b in pairwise(found.lengths))
        assert all(0 < n < len(blocks) for n in found.lengths)
        levels.append(found.levels)
        # Of the plans with so many passes it is the smallest, whatever the budget.
        assert peaks.setdefault(found.levels, found.peak) == found.peak
    assert levels == sorted(levels, reverse=True)
    assert (levels[-1] == 0) == (whole <= budget)


@pytest.mark.parametrize("count", [3, 16, 40])
def test_plans_of_equal_blocks_are_near_the_best_of_all(count):
    """Against all choices of lengths with as many levels as are tried: some 10 % at the most."""
    for sizes in ((100, 0, 0, 100), (100, 100, 0, 300), (100, 800, 100, 300)):
        blocks = [Footprint(*sizes)] * count
        costs = _Costs(blocks, 7, 1.0)
        known = [(costs.peak(n), len(n)) for n in all_lengths(count, int(math.log2(count)))]
        least = min(known)[0]
        assert least <= attempt(blocks, named_least(blocks)).peak <= 1.1 * least
        for budget in range(math.ceil(1.1 * least), costs.peak(()) + 1, 1000):
            fewest = min(levels for peak, levels in known if 1.1 * peak <= budget)
            assert plan(blocks, budget, base=7).levels <= fewest


# --- plans and real steps ------------------------------------------------------------------------

NETS = {
    "wide, narrow": [256, 32] * 14,
    "narrow, wide": [32, 256] * 14,
    "every third": [32, 32, 256] * 10,
    "grows": [64] * 26 + [512] * 4,
    "shrinks": [512] * 4 + [64] * 26,
    "equal": [64] * 30,
    "waves": [32, 64, 128, 256, 128, 64] * 7,
}


def step_of(net, dtype, budget):
    torch.manual_seed(0)
    layers = [m for a, b in pairwise([16, *NETS[net]]) for m in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(NETS[net][-1], 10))
    opt = mep.EPOptimizer(
        model.parameters(), model=model, lr=0.01, momentum=0.9,
        memory_budget=budget, state_dtype=dtype,
    )  # fmt: skip
    x, y = torch.randn(64, 16), torch.randint(10, (64,))
    return model, opt, lambda: opt.step(x=x, target=y)


@cache
def after_a_step(net, dtype):
    """A net whose first step has made the optimizer's state, and the costs of any plan."""
    costs = []

    def noting(blocks, budget, *, base, share, least=0):
        costs.append(_Costs(blocks, base, share))
        return Plan(budget, len(blocks), (1,), 0)

    model, opt, step = step_of(net, dtype, "1GB")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mep.optim.budget.plan", noting)
        step()
    return model, opt, step, costs[-1]


@cache
def measured_and_predicted(net, dtype, how):
    """Of a later step, at the least budget for so many levels, or with such lengths."""
    model, opt, step, costs = after_a_step(net, dtype)
    tried = _candidates(costs, how) if isinstance(how, int) else [how]
    predicted, lengths = min((costs.peak(lengths), lengths) for lengths in tried)
    opt._budget.plan = Plan(predicted, opt.plan.blocks, lengths, predicted)
    with track(model, opt) as usage:
        step()
    assert opt.plan.lengths == lengths
    return usage.extra, predicted


FULL, HALF = None, torch.bfloat16
STEPS = [(net, dtype, how) for net in [*NETS][:-1] for dtype in (FULL, HALF) for how in (1, 2, 3)]
STEPS += [("waves", FULL, (16, 4))]


@pytest.mark.parametrize(("net", "dtype", "how"), STEPS)
def test_no_step_takes_more_than_predicted(net, dtype, how):
    measured, predicted = measured_and_predicted(net, dtype, how)
    assert measured <= predicted


@pytest.mark.parametrize(("net", "dtype", "how"), STEPS)
def test_no_step_takes_much_less_than_predicted(net, dtype, how):
    measured, predicted = measured_and_predicted(net, dtype, how)
    assert measured >= 0.93 * predicted


LEAST = [("every third", FULL), ("every third", HALF), ("grows", HALF)]


@pytest.mark.parametrize(("net", "dtype"), LEAST)
def test_a_step_within_the_least_budget_that_is_named_keeps_to_it(net, dtype):
    with pytest.raises(ValueError, match="the least that works is") as refusal:
        step_of(net, dtype, 1)[-1]()
    model, opt, step = step_of(net, dtype, str(refusal.value).rsplit("works is ", 1)[1])
    step()
    with track(model, opt) as usage:
        step()
    assert opt.plan.levels > 1 and usage.extra <= opt.plan.budget
