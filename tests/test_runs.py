"""Runs of dense blocks against the same blocks taken one by one."""

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import CLASSES, EXACT, convolutional, flat
from torch import nn

import mep
from mep.blocks import run
from mep.blocks.buffers import Buffers
from mep.blocks.rows import rows
from mep.blocks.run import DenseRun, Run, _Gradients

# Roundings of 1e-7, through five blocks up, down and up again, relative to the size of an update.
SINGLE = 2e-5
METHODS = ("free", "descend", "climb", "signals")
ONE = mep.Sweep(1, tol=1.0)  # the residual is not the matter


# --- tensors in a row ----------------------------------------------------------------------------


def shapes(found):
    return [tuple(t.shape) for t in found]


def test_rows_of_one_tensor_are_that_tensor():
    whole = torch.randn(5, 2, 3)
    (found,) = rows(whole.unbind())
    assert torch.equal(found, whole) and found.data_ptr() == whole.data_ptr()
    (found,) = rows(whole[2:].unbind())  # the first does not begin where its memory does
    assert torch.equal(found, whole[2:]) and found.data_ptr() == whole[2].data_ptr()
    found = [*rows([whole[0], whole[1], whole[3], whole[4]])]
    assert shapes(found) == [(2, 2, 3), (2, 2, 3)]
    assert torch.equal(torch.cat(found), whole[[0, 1, 3, 4]])
    assert shapes(rows(whole.flip(0).unbind())) == [(5, 2, 3)]  # a copy: in a row again
    assert shapes(rows(reversed(whole.unbind()))) == [(2, 3)] * 5
    assert shapes(rows(whole[::2].unbind())) == [(2, 3)] * 3
    assert [*rows([])] == []


def same_tensors(found, given_):
    """Each exactly once, and nothing joined."""
    return sorted(map(id, found)) == sorted(map(id, given_))


@pytest.mark.parametrize("where", [0, 1, 2])
def test_rows_of_another_layout_or_dtype_stay_alone(where):
    whole = torch.randn(3, 2, 2)
    three = [*whole.unbind()]
    three[where] = three[where].t()
    found = [*rows(three)]
    assert len(found) == (3 if where == 1 else 2)
    assert torch.equal(flat(found).sort()[0], whole.flatten().sort()[0])
    three = [*whole.unbind()]
    three[where] = three[where].view(torch.int32)
    found = [*rows(three)]
    # What is of another dtype than the first is not looked at closely.
    assert len(found) == {0: 3, 1: 3, 2: 2}[where]
    assert {t.dtype for t in found} == {torch.float32, torch.int32}
    assert sum(t.numel() for t in found) == whole.numel()


def test_neighbours_by_chance_stay_alone():
    """Two tensors, each of which owns its memory only; a view across both would leave it."""
    memory = bytearray(64)
    first, second = (torch.frombuffer(memory, dtype=torch.float32, count=8, offset=k) for k in (0, 32))
    assert first.data_ptr() + 32 == second.data_ptr()
    assert first.untyped_storage().nbytes() == 32
    assert same_tensors(rows([first, second]), [first, second])
    halves = [first[:4], first[4:], second[:4], second[4:]]
    assert sum(t.numel() for t in rows(halves)) == 16
    assert all(t.untyped_storage().nbytes() == 32 for t in rows(halves))
    assert shapes(rows(halves[:2])) == [(2, 4)]


@given(st.data())
def test_every_tensor_comes_exactly_once(data):
    """Slices of one tensor, in any order: what follows each other, and nothing else, is joined."""
    count, width = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    whole = torch.arange(float(count * width * width)).view(count, width, width)
    order = data.draw(st.permutations(range(count)))
    order = order[: data.draw(st.integers(1, count))]
    turned = {k for k in order if width > 1 and data.draw(st.booleans())}
    flattened = {k for k in order if width > 1 and data.draw(st.booleans())} - turned
    tensors = {k: whole[k].t() if k in turned else whole[k] for k in order}
    tensors |= {k: whole[k].flatten() for k in flattened}
    found = [*rows(tensors.values())]
    kinds = [[k for k in order if k in flattened], [k for k in order if k not in flattened]]
    if order[0] not in flattened:
        kinds.reverse()
    assert torch.equal(flat(found), flat([tensors[k] for kind in kinds for k in kind]))
    breaks = [
        sum(b != a + 1 or {a, b} & turned != set() for a, b in zip(kind, kind[1:], strict=False)) + 1
        for kind in kinds
        if kind
    ]
    assert len(found) == sum(breaks)
    inside = range(whole.data_ptr(), whole.data_ptr() + whole.nbytes)
    assert all(t.data_ptr() in inside for t in found)  # nothing is copied


# --- where chains are cut ------------------------------------------------------------------------


def chain(*sizes, activation=nn.Tanh, bias=True):
    """Isometric, so that every layer moves."""
    layers = [nn.Linear(sizes[0], sizes[1])]
    for n_in, n_out in zip(sizes[1:], sizes[2:], strict=False):
        layers += [activation(), nn.Linear(n_in, n_out, bias=bias)]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, 1.0 if activation is nn.Tanh else 2**0.5)
    return nn.Sequential(*layers)


def cut(model):
    """The kinds of runs, and how many blocks are in each."""
    traced = mep.trace(model)
    assert [b for r in traced.runs for b in r.blocks] == traced.blocks
    assert [b for r in traced.runs for b in traced.blocks[r.span]] == traced.blocks
    return [(type(r).__name__[:-3] or "any", len(r.blocks)) for r in traced.runs]


def test_a_run_has_one_width_and_one_activation():
    assert cut(chain(5, 8, 8, 8, 4)) == [("any", 1), ("Dense", 3)]
    assert cut(chain(8, 8, 8, 8)) == [("any", 1), ("Dense", 2)]
    assert cut(chain(5, 8, 8, 6, 6, 3)) == [("any", 1), ("Dense", 2), ("Dense", 2)]
    assert cut(chain(5, 4)) == [("any", 1)]
    mixed = chain(5, 8, 8, 8, 8, 4)
    mixed[5] = mixed[7] = nn.ReLU()
    assert cut(mixed) == [("any", 1), ("Dense", 2), ("Dense", 2)]
    smooth = chain(5, 8, 8, 4, activation=nn.GELU)
    assert cut(smooth) == [("any", 1), ("any", 2)]


def test_first_block_is_alone_whatever_it_is():
    assert cut(nn.Sequential(nn.Tanh(), *chain(8, 8, 8))) == [("any", 1), ("Dense", 1)]
    rest = chain(6, 6, 6, 4)
    conv = nn.Sequential(*convolutional()[:-1], nn.Linear(6, 6), nn.Tanh(), *rest)
    assert cut(conv) == [("any", 1), ("any", 2), ("Dense", 3)]


def test_hooks_cut_a_run():
    model = chain(5, 8, 8, 8, 8, 4)
    model[3].register_forward_hook(lambda *_: None)
    assert cut(model) == [("any", 1), ("Dense", 1), ("any", 1), ("Dense", 2)]
    assert cut(nn.Sequential(*model[:3], nn.Dropout(), *model[5:])) == [("any", 1), ("Dense", 1), ("any", 1), ("Dense", 1)]


# --- steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, how it steps, and which methods dense runs then see to themselves."""

    build: Callable[[], nn.Module] = lambda: chain(5, 8, 8, 8, 8, CLASSES)
    own: str = "free descend climb signals"
    batches: tuple[int, ...] = (6, 6, 6)
    between: Callable[[nn.Module], Any] = lambda model: None
    x: Callable[[int], torch.Tensor] = lambda batch: torch.randn(batch, 5)
    y: Callable[[int], torch.Tensor] = lambda batch: torch.randint(0, CLASSES, (batch,))
    options: dict[str, Any] = field(default_factory=dict)


def relu(**options):
    return chain(5, 8, 8, 8, 8, CLASSES, activation=nn.ReLU, **options)


def frozen(name):
    def build():
        model = chain(5, 8, 8, 8, 8, CLASSES)
        model.get_parameter(name).requires_grad_(False)
        return model

    return build


def tied():
    model = chain(5, 8, 8, 8, 8, 8, CLASSES)
    model[6].weight = model[2].weight  # in one run, and not one after the other
    return model


def turned():
    """A bias that is every other number of its memory."""
    model = chain(5, 8, 8, 8, 8, CLASSES)
    model[4].bias = nn.Parameter(torch.randn(16)[::2])
    return model


def new_memory(model):
    for p in model.parameters():
        p.data = 0.9 * p.data


def new_parameter(model):
    model[4].weight = nn.Parameter(model[4].weight.detach() * 0.9)


TWICE = {"settler": mep.Sweep(3, tol=1e-7)}
NO_SIGNALS = "free descend climb"  # errors of a second sweep do not lie in a row

CASES = {
    "tanh": Case(),
    "relu": Case(relu),
    "no bias": Case(lambda: chain(5, 8, 8, 8, 8, CLASSES, bias=False)),
    "relu, no bias": Case(lambda: relu(bias=False)),
    "last of the same width": Case(lambda: chain(5, 8, 8, 8, 8)),
    "two runs": Case(lambda: chain(5, 8, 8, 8, 6, 6, 6, CLASSES)),
    "frozen weight": Case(frozen("4.weight")),
    "frozen bias": Case(frozen("4.bias")),
    "tied weight": Case(tied),
    "centered": Case(options={"stencil": mep.centered}),
    "five_point": Case(options={"stencil": mep.five_point}),
    "second sweep": Case(own=NO_SIGNALS, options=TWICE),
    "second sweep, relu": Case(relu, NO_SIGNALS, options=TWICE),
    "limit": Case(own="free descend signals", options={"settler": mep.Limit()}),
    "random feedback": Case(own="free climb", options={"settler": mep.Sweep(1, feedback="random")}),
    "mse": Case(options={"cost": "mse"}),
    "KL": Case(own=NO_SIGNALS, options={"energy": mep.PredictionError(mep.KL())}),
    "momentum": Case(options={"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "muon": Case(options={"update": mep.Route(mep.Muon(ns_dtype=None)), "momentum": 0.9}),
    "dion": Case(options={"update": mep.Route(mep.Dion(0.5)), "momentum": 0.9}),
    "natural": Case(
        options={"update": mep.Route(mep.Natural(limit=None, refresh=2)), "lr": 0.01}
    ),
    "normalised": Case(options={"update": mep.Normalised()}),
    "clipped": Case(options={"clip_norm": 0.1}),
    "positions": Case(
        own="", x=lambda b: torch.randn(b, 3, 5), y=lambda b: torch.randn(b, 3, CLASSES),
        options={"cost": "mse"},
    ),
    "input not contiguous": Case(x=lambda b: torch.randn(5, b).t()),
    "other batch sizes": Case(batches=(6, 1, 9, 6)),
    "new memory": Case(between=new_memory),
    "new parameter": Case(between=new_parameter),
    "strided bias": Case(turned),
    "blockwise": Case(own="free descend", options={"blockwise": True}),
}  # fmt: skip


def counted(monkeypatch):
    """Counts what dense runs do themselves: their calls less those that reach the reference."""
    own = Counter()
    for name in METHODS:
        for kind, sign in ((DenseRun, 1), (Run, -1)):
            original = getattr(kind, name)

            def counting(self, *rest, original=original, name=name, sign=sign):
                if isinstance(self, DenseRun):
                    own[name] += sign
                return original(self, *rest)

            monkeypatch.setattr(kind, name, counting)
    return own


def trained(case, dtype):
    """All that some steps have changed or returned, and how far they have moved the parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.build().to(dtype)
        options = {"lr": 0.2, "settler": ONE} | case.options
        opt = mep.EPOptimizer(model.parameters(), model=model, **options)
        seen, moved = [], []
        for batch in case.batches:
            x, y = case.x(batch), case.y(batch)
            before = flat(model.parameters()).detach().clone()
            loss = opt.step(x=x.to(dtype), target=y.to(dtype) if y.is_floating_point() else y)
            seen += [loss, opt.last.residual] if opt.last.sweeps else [loss]
            moved.append(flat(model.parameters()).detach() - before)
            case.between(model)
    assert opt.skipped == 0 and torch.cat(moved).norm() > 1e-3
    return flat(seen).double(), torch.cat(moved).double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("name", CASES)
def test_step_is_that_of_the_blocks_one_by_one(name, dtype, monkeypatch):
    case = CASES[name]
    with monkeypatch.context() as patch:
        own = counted(patch)
        found = trained(case, dtype)
    assert {method for method, calls in own.items() if calls} == set(case.own.split())
    with monkeypatch.context() as patch:
        own = counted(patch)
        patch.setattr(run, "DenseRun", Run)
        truth = trained(case, torch.float64)
        assert not own
    for ours, theirs in zip(found, truth, strict=True):
        print(name, dtype, float((ours - theirs).norm() / theirs.norm()))
        assert (ours - theirs).norm() < (EXACT if dtype == torch.float64 else SINGLE) * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_memory_held_before_is_not_read(dtype):
    """A batch that overflowed leaves NaN in every buffer."""
    models = [chain(5, 8, 8, 8, 8, CLASSES).to(dtype)]
    models.append(copy.deepcopy(models[0]))
    x, y = torch.randn(6, 5, dtype=dtype), torch.randint(0, CLASSES, (6,))
    for model, spoil in zip(models, (True, False), strict=True):
        opt = mep.EPOptimizer(model.parameters(), model=model, settler=ONE)
        for _ in range(3):
            opt.step(x=x, target=y)
            kept = [t for shelf in opt._buffers._shelves.values() for t in shelf._own.values()]
            assert len(kept) > 10
            for t in kept if spoil else ():
                t.fill_(torch.nan)
    assert torch.equal(*(flat(model.parameters()) for model in models))


def test_results_are_not_overwritten_by_the_next_step():
    model = chain(5, 8, 8, 8, 8, CLASSES)
    opt = mep.EPOptimizer(model.parameters(), model=model)
    kept = []
    for _ in range(3):
        x, y = torch.randn(6, 5), torch.randint(0, CLASSES, (6,))
        loss = opt.step(x=x, target=y)
        kept.append((loss, opt.last.loss, opt.last.residual, opt.last.balance.nudge))
        if len(kept) == 1:
            copies = [t.clone() for t in kept[0]]
    assert all(map(torch.equal, kept[0], copies))
    assert not any(map(torch.equal, kept[0], kept[2]))


def test_estimate_gives_every_parameter_memory_of_its_own():
    """What is outside ``Buffers.lend()`` is the caller's to keep."""
    model = chain(5, 8, 8, 8, 8, 8, CLASSES).double()
    x, y = torch.randn(6, 5).double(), torch.randint(0, CLASSES, (6,))
    mep.estimate(model, x, y, settler=ONE)
    grads = [p.grad for p in model.parameters()]
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)
    assert all(g.untyped_storage().nbytes() == g.nbytes for g in grads)
    copies = [g.clone() for g in grads]
    before = flat(model.parameters()).detach().clone()
    opt = mep.EPOptimizer(model.parameters(), model=model, settler=ONE, lr=1.0)
    opt.step(x=x, target=y)
    assert all(map(torch.equal, grads, copies))
    # theta has been rounded once, at size 1
    torch.testing.assert_close(before - flat(model.parameters()), flat(grads), rtol=EXACT, atol=1e-15)


# --- what changes between steps ------------------------------------------------------------------


def steps_after(change, reference, monkeypatch, dtype=torch.float64):
    """Two steps of a model that has been changed after one step; the last losses."""
    with monkeypatch.context() as patch, torch.random.fork_rng():
        if reference:
            patch.setattr(run, "DenseRun", Run)
        torch.manual_seed(0)
        model = chain(5, 8, 8, 8, 8, CLASSES, activation=nn.ReLU).to(dtype)
        x, y = torch.randn(6, 5, dtype=dtype), torch.randint(0, CLASSES, (6,))
        opt = mep.EPOptimizer(model.parameters(), model=model, settler=ONE)
        opt.step(x=x, target=y)
        change(model)
        losses = [opt.step(x=x, target=y) for _ in range(2)]
    return losses, nn.functional.cross_entropy(model(x), y)


def transpose(model):
    model[4].weight.data = model[4].weight.data.t()


def grow(model):
    """Four more units between two layers."""
    like = model[4].weight
    model[4].weight, model[4].bias = (
        nn.Parameter(torch.randn(*shape).to(like)) for shape in ((12, 8), (12,))
    )
    model[6].weight = nn.Parameter(torch.randn(8, 12).to(like))


@pytest.mark.filterwarnings("error:An output with one or more elements was resized")
@pytest.mark.parametrize("change", [transpose, grow])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_model_is_taken_as_it_is_now(change, dtype, monkeypatch):
    ...
