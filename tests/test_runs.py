"""Runs of dense blocks against the same blocks taken one by one."""

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
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
from mep.blocks.run import DenseRun, Run, _Gradients
from mep.contrast.phases import all_finite
from mep.curvature import Stack
from mep.kernels import rows

# Roundings of 1e-7, through five blocks up, down and up again, relative to the size of an update.
SINGLE = 2e-5
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
ONE = mep.Sweep(1, tol=1.0)  # the residual is not the matter


# --- tensors in a row ----------------------------------------------------------------------------


def shapes(found):
    return [tuple(t.shape) for t in found]


def test_rows_of_one_tensor_are_that_tensor():
    whole = torch.randn(5, 2, 3)
    for part in (whole, whole[2:]):  # the second does not begin where its memory does
        (found,) = rows(part.unbind())
        assert torch.equal(found, part) and found.data_ptr() == part.data_ptr()
    found = [*rows([whole[0], whole[1], whole[3], whole[4]])]
    assert shapes(found) == [(2, 2, 3), (2, 2, 3)]
    assert torch.equal(torch.cat(found), whole[[0, 1, 3, 4]])
    assert shapes(rows(reversed(whole.unbind()))) == [(2, 3)] * 5
    assert shapes(rows(whole[::2].unbind())) == [(2, 3)] * 3


@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("change", [torch.t, lambda t: t.view(torch.int32)])
def test_rows_of_another_layout_or_dtype_stay_alone(where, change):
    three = [*torch.randn(3, 2, 2).unbind()]
    changed = three[where] = change(three[where])
    found = [*rows(three)]
    assert any(t is changed for t in found)
    assert sum(t.numel() for t in found) == 12
    assert len(found) >= (3 if where == 1 else 2)


def test_neighbours_by_chance_stay_alone():
    """Two tensors, each of which owns its memory only; a view across both would leave it."""
    memory = bytearray(64)
    one, other = (torch.frombuffer(memory, dtype=torch.float32, count=8, offset=k) for k in (0, 32))
    assert one.data_ptr() + one.untyped_storage().nbytes() == other.data_ptr()
    assert shapes(rows([one, other])) == [(8,), (8,)]
    quarters = [*one.view(2, 4), *other.view(2, 4)]
    assert all(t.untyped_storage().nbytes() == 32 for t in rows(quarters))
    assert sum(t.numel() for t in rows(quarters)) == 16


@given(st.data())
def test_every_tensor_comes_exactly_once(data):
    """Slices of one tensor in any order: what follows each other, and nothing else, is joined."""
    count = data.draw(st.integers(1, 8))
    whole = torch.arange(float(4 * count)).view(count, 2, 2)
    order = data.draw(st.permutations(range(count)))[: data.draw(st.integers(1, count))]
    kind = {k: data.draw(st.sampled_from(["plain", "turned", "flat"])) for k in order}
    make = {"plain": lambda t: t, "turned": torch.t, "flat": torch.flatten}
    found = [*rows(make[kind[k]](whole[k]) for k in order)]
    # By shape, in the order in which shapes come.
    by_shape = sorted(order, key=lambda k: (kind[k] == "flat") != (kind[order[0]] == "flat"))
    assert torch.equal(flat(found), flat([make[kind[k]](whole[k]) for k in by_shape]))
    joined = [b == a + 1 and kind[a] == kind[b] != "turned" for a, b in pairwise(by_shape)]
    assert len(found) == len(order) - sum(joined)
    inside = range(whole.data_ptr(), whole.data_ptr() + whole.nbytes)
    assert all(t.data_ptr() in inside for t in found)  # nothing is copied


@pytest.mark.parametrize("count", [3, 40])  # from some number on, rows are looked at as one
def test_all_finite_sees_every_value(count):
    whole = torch.full((count, 2, 3), 1e30)  # whose squares overflow
    tensors = [*whole.unbind(), torch.randn(4, 4).t(), torch.zeros(0), torch.ones(6)[::2]]
    for t in tensors:
        for bad in (torch.inf, -torch.inf, torch.nan) if t.numel() else ():
            t[(-1,) * t.dim()] = bad
            assert not all_finite(tensors)
            t[(-1,) * t.dim()] = 1.0
    assert all_finite(tensors)


# --- where chains are cut ------------------------------------------------------------------------


def chain(*sizes, activation=nn.Tanh, bias=True):
    """Isometric, so that every layer moves."""
    sizes = sizes or (5, 8, 8, 8, 8, CLASSES)
    layers = [nn.Linear(sizes[0], sizes[1])]
    for n_in, n_out in pairwise(sizes[1:]):
        layers += [activation(), nn.Linear(n_in, n_out, bias=bias)]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, 1.0 if activation is nn.Tanh else 2**0.5)
    return nn.Sequential(*layers)


def changed(change, *sizes):
    model = chain(*sizes)
    change(model)
    return model


CUTS = {
    "one width": (lambda: chain(5, 8, 8, 8, 4), [1], [3]),
    "also the first": (lambda: chain(8, 8, 8, 8), [1], [2]),
    "two widths": (lambda: chain(5, 8, 8, 6, 6, 3), [1], [2, 2]),
    "two activations": (partial(changed, lambda m: m.__setitem__(5, nn.ReLU())), [1], [2, 1, 1]),
    "no buffers for it": (lambda: chain(5, 8, 8, 4, activation=nn.GELU), [1, 2], []),
    "one layer": (lambda: chain(5, 4), [1], []),
    "dense first": (lambda: nn.Sequential(nn.Tanh(), *chain(8, 8, 8)), [1], [1]),
    "convolutions": (lambda: nn.Sequential(*convolutional()[:-1], *chain(6, 6, 6, 4)), [1, 2], [2]),
    "hook": (partial(changed, lambda m: m[3].register_forward_hook(print)), [1, 1], [1, 2]),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_run_has_one_width_and_one_activation(name):
    build, others, dense = CUTS[name]
    traced = mep.trace(build())
    assert [b for r in traced.runs for b in r.blocks] == traced.blocks
    assert [b for r in traced.runs for b in traced.blocks[r.span]] == traced.blocks
    assert [len(r.blocks) for r in traced.runs if type(r) is Run] == others
    assert [len(r.blocks) for r in traced.runs if type(r) is DenseRun] == dense


# --- steps ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, how it steps, and which methods dense runs then see to themselves."""

    build: Callable[[], nn.Module] = chain
    own: str = "free descend climb signals"
    batches: tuple[int, ...] = (6, 6, 6)
    x: Callable[[int], torch.Tensor] = lambda batch: torch.randn(batch, 5)
    options: dict[str, Any] = field(default_factory=dict)


RELU = partial(chain, activation=nn.ReLU)
TWICE = {"settler": mep.Sweep(3, tol=1e-7)}
NO_SIGNALS = "free descend climb"  # errors of a second sweep do not lie in a row

CASES = {
    "tanh": Case(),
    "relu": Case(RELU),
    "no bias": Case(partial(chain, bias=False)),
    "relu, no bias": Case(partial(RELU, bias=False)),
    "last of the same width": Case(lambda: chain(5, 8, 8, 8, 8)),
    "two runs": Case(lambda: chain(5, 8, 8, 8, 6, 6, 6, CLASSES)),
    "frozen weight": Case(partial(changed, lambda m: m[4].weight.requires_grad_(False))),
    "frozen bias": Case(partial(changed, lambda m: m[4].bias.requires_grad_(False))),
    # in one run, and not one after the other
    "tied weight": Case(
        partial(changed, lambda m: setattr(m[6], "weight", m[2].weight), 5, 8, 8, 8, 8, 8, CLASSES)
    ),
    "centered": Case(options={"stencil": mep.centered}),
    "five_point": Case(options={"stencil": mep.five_point}),
    "second sweep": Case(own=NO_SIGNALS, options=TWICE),
    "second sweep, relu": Case(RELU, NO_SIGNALS, options=TWICE),
    "limit": Case(own="free descend signals", options={"settler": mep.Limit()}),
    "random feedback": Case(own="free climb", options={"settler": mep.Sweep(1, feedback="random")}),
    "mse": Case(options={"cost": "mse"}),
    "KL": Case(own=NO_SIGNALS, options={"energy": mep.PredictionError(mep.KL())}),
    "momentum": Case(options={"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "muon": Case(options={"update": mep.Route(mep.Muon(ns_dtype=None)), "momentum": 0.9}),
    "dion": Case(options={"update": mep.Route(mep.Dion(0.5)), "momentum": 0.9}),
    "natural": Case(options={"update": mep.Route(mep.Natural(limit=None, refresh=2)), "lr": 0.01}),
    "normalised": Case(options={"update": mep.Normalised()}),
    "clipped": Case(options={"clip_norm": 0.1}),
    "positions": Case(
        lambda: chain(5, 8, 8, 8, 8, 5), "", x=lambda b: torch.randn(b, 3, 5),
        options={"cost": "mse"},  # of an autoencoder
    ),
    "input not contiguous": Case(x=lambda b: torch.randn(5, b).t()),
    "other batch sizes": Case(batches=(6, 1, 9, 6)),
    "strided bias": Case(
        partial(changed, lambda m: setattr(m[4], "bias", nn.Parameter(torch.randn(16)[::2])))
    ),
    "blockwise": Case(own="free descend", options={"blockwise": True}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_flat_steps(monkeypatch):
    """They are tested by themselves."""
    monkeypatch.setattr("mep.optim.flat.FlatSteps.take", lambda *_: None)


def counted(monkeypatch):
    """Counts what dense runs do themselves: their calls less those that reach the reference."""
    own = Counter()
    for name in ("free", "descend", "climb", "signals"):
        for kind, sign in ((DenseRun, 1), (Run, -1)):
            original = getattr(kind, name)

            def counting(self, *rest, original=original, name=name, sign=sign, **named):
                if isinstance(self, DenseRun):
                    own[name] += sign
                return original(self, *rest, **named)

            monkeypatch.setattr(kind, name, counting)
    return own


def optimizer(model, **options):
    return mep.EPOptimizer(model.parameters(), model=model, **{"settler": ONE, "lr": 0.2} | options)


def parameters(model):
    return flat(model.parameters()).detach().clone()


def batch_of(dtype=torch.float32):
    return {"x": torch.randn(6, 5).to(dtype), "target": torch.randint(0, CLASSES, (6,))}


def trained(case, dtype):
    """What some steps have returned, and how far they have moved the parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = case.build().to(dtype)
        opt, seen, moved = optimizer(model, **case.options), [], []
        for size in case.batches:
            x, y = case.x(size).to(dtype), torch.randint(0, CLASSES, (size,))
            before = parameters(model)
            seen.append(opt.step(x=x, target=y if x.dim() == 2 else x))
            seen += [opt.last.residual] * bool(opt.last.sweeps)
            moved.append(parameters(model) - before)
    assert opt.skipped == 0 and all(step.norm() > 1e-3 for step in moved)
    return flat(seen).double(), flat(moved).double()


def assert_same(found, truth, dtype):
    assert (found - truth).norm() < (SINGLE if dtype == torch.float32 else EXACT) * truth.norm()


@dtypes
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
        assert_same(ours, theirs, dtype)


@dtypes
def test_what_memory_held_before_is_not_read(dtype):
    """A batch that overflowed leaves NaN in every buffer."""
    clean = chain().to(dtype)
    spoilt, batch = copy.deepcopy(clean), batch_of(dtype)
    for model in (clean, spoilt):
        opt = optimizer(model)
        for _ in range(3):
            opt.step(**batch)
            kept = [t for shelf in opt._buffers._shelves.values() for t in shelf._own.values()]
            assert len(kept) > 10
            for t in kept if model is spoilt else ():
                t.fill_(torch.nan)
    assert torch.equal(parameters(spoilt), parameters(clean))


def test_results_are_not_overwritten_by_the_next_step():
    opt, kept, copies = optimizer(chain()), [], []
    for _ in range(3):
        loss = opt.step(**batch_of())
        kept.append((loss, opt.last.loss, opt.last.residual, opt.last.balance.nudge))
        copies.append([t.clone() for t in kept[-1]])
    for results, before in zip(kept, copies, strict=True):
        assert all(map(torch.equal, results, before))
    assert not any(map(torch.equal, kept[0], kept[2]))


def test_estimate_gives_every_parameter_memory_of_its_own():
    """What is outside ``Buffers.lend()`` is the caller's to keep."""
    model, batch = chain().double(), batch_of(torch.float64)
    mep.estimate(model, **batch, settler=ONE)
    grads, before = [p.grad for p in model.parameters()], parameters(model)
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)
    assert all(g.untyped_storage().nbytes() == g.nbytes for g in grads)
    copies = [g.clone() for g in grads]
    optimizer(model, lr=1.0).step(**batch)
    assert all(map(torch.equal, grads, copies))
    assert_same(before - parameters(model), flat(grads), torch.float64)


# --- what changes between steps ------------------------------------------------------------------


def new_memory(model):
    for p in model.parameters():
        p.data = 0.9 * p.data


def transposed(model):
    """Another matrix at the same address."""
    model[4].weight.data = model[4].weight.data.t()


def grown(model):
    """Four more units between two layers."""
    random, like = torch.Generator().manual_seed(1), model[4].weight.detach()
    shapes = {"4.weight": (12, 8), "4.bias": (12,), "6.weight": (8, 12)}
    for name, shape in shapes.items():
        new = nn.Parameter(0.3 * torch.randn(*shape, generator=random).to(like))
        setattr(model.get_submodule(name[0]), name[2:], new)


@dtypes
@pytest.mark.parametrize("change", [new_memory, transposed, grown])
def test_changed_model_steps_like_a_new_one(change, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        old, batch = chain().to(dtype), batch_of(dtype)
    optimizer(old).step(**batch)
    change(old)
    before, new = parameters(old), copy.deepcopy(old)
    for model in (old, new):
        opt = optimizer(model)
        for _ in range(2):
            truth = nn.functional.cross_entropy(model(batch["x"]), batch["target"]).item()
            assert opt.step(**batch).item() == pytest.approx(truth, rel=1e-6)
    assert_same(parameters(old) - before, parameters(new) - before, dtype)


@pytest.mark.parametrize(
    ("layer", "block"),
    [(nn.Linear(8, 6), "6"), (nn.Linear(8, 9), "6"), (nn.Linear(8, 8).double(), "4")],
    ids=["too narrow", "too wide", "other dtype"],
)
def test_block_that_does_not_fit_is_named(layer, block):
    model = chain()
    model[4] = layer
    with pytest.raises(ValueError, match=f"does not fit the model: block `{block}`"):
        optimizer(model).step(**batch_of())


# --- gradients of a run --------------------------------------------------------------------------


def test_gradients_can_be_asked_for_again():
    """Whoever was given one may have changed it."""
    model, truth, given_out = chain().double(), {}, []
    model[4].weight.requires_grad_(False)
    model[6].bias.requires_grad_(False)
    a, e = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    blocks = mep.trace(model).blocks[1:4]
    for block, a_k, e_k in zip(blocks, a, e, strict=True):
        truth[block.weight] = 0.3 * torch.einsum("ni,nj->ij", e_k, a_k)
        truth[block.bias] = 0.3 * e_k.sum(0)
    with torch.no_grad(), Buffers().lend():
        whole = _Gradients(Stack(a, e), 0.3)
        signals = [s for k, block in enumerate(blocks) for s in whole.signals(k, block)]
        assert {s.parameter for s in signals} == {p for p in truth if p.requires_grad}
        for signal in [*signals, *signals[::-1], *signals]:
            assert (signal.scale, signal.samples) == (0.3, 7)
            found, wanted = signal.form(), truth[signal.parameter]
            torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)
            assert all(found.data_ptr() != g.data_ptr() for g in given_out)
            given_out.append(found.fill_(torch.nan))
            activity, error = signal.rows()
            found = (0.3 * error.t() @ activity).view_as(wanted)
            torch.testing.assert_close(found, wanted, rtol=EXACT, atol=EXACT)


def test_a_step_leaves_nothing_to_the_garbage_collector(monkeypatch):
    """Who trains with it switched off would otherwise run out of memory."""
    made, original = [], _Gradients.__init__
    noting = lambda self, *rest: made.append(weakref.ref(self)) or original(self, *rest)  # noqa: E731
    monkeypatch.setattr(_Gradients, "__init__", noting)
    opt = optimizer(chain())
    gc.disable()
    try:
        opt.step(**batch_of())
        assert [ref() for ref in made] == [None]
    finally:
        gc.enable()
