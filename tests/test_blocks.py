"""Blocks: closed forms against autograd and their twins, in every phase."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    DEVICES,
    DTYPES,
    EXACT,
    MODELS,
    assert_is_its_function,
    distance,
    problem,
    random_states,
    tanh_mlp,
)
from torch import nn

import mep
from mep.blocks import Block
from mep.blocks.local import LocalBlock, _Point

# One product in float32 and its double: the rounding of the float32 matrix product alone.
SINGLE = 1e-5

BLOCK_MODELS = sorted(MODELS)


@settings(max_examples=25, deadline=None)
@given(
    positions=st.lists(st.integers(1, 3), max_size=2),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3)),
    bias=st.booleans(),
)
def test_linear_over_any_positions(positions, sizes, bias):
    n_in, n_out, batch = sizes
    model = nn.Sequential(nn.Tanh(), nn.Linear(n_in, n_out, bias=bias)).double()
    (block,) = mep.trace(model)
    assert block.kind == "closed form"
    assert_is_its_function(block, torch.randn(batch, *positions, n_in, dtype=torch.float64))


@settings(max_examples=40, deadline=None)
@given(
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 1)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    groups=st.integers(1, 2),
    bias=st.booleans(),
)
def test_conv2d_with_any_geometry(stride, padding, dilation, kernel, groups, bias):
    conv = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups, bias)
    (block,) = mep.trace(nn.Sequential(nn.Sigmoid(), conv).double())
    assert block.kind == "closed form"
    assert_is_its_function(block, torch.randn(2, 2, 6, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(1, 2, 3, padding="same"), nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")],
    ids=["same", "circular"],
)
def test_conv2d_without_closed_form_is_left_to_autograd(conv):
    (block,) = mep.trace(conv.double())
    assert block.kind == "local autograd"
    assert_is_its_function(block, torch.randn(2, 1, 4, 5, dtype=torch.float64))


@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_blocks_are_their_functions(name):
    at = problem(name)
    # Evaluating a batch norm's modules directly would move its running statistics.
    states = [at.x, *random_states(at.model, at.x)[:-1]]
    for block, s in zip(mep.trace(copy.deepcopy(at.model)), states, strict=True):
        assert_is_its_function(block, s)


@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_closed_form_equals_its_autograd_twin(name):
    at = problem(name)
    pairs = list(zip(mep.trace(at.model), autograd_twin(at.model), strict=True))
    assert all(twin.kind == "local autograd" for _, twin in pairs)
    states = [at.x, *random_states(at.model, at.x)[:-1]]
    for (block, twin), s in zip(pairs, states, strict=True):
        (out, point), (twin_out, twin_point) = block.predict(s), twin.predict(s)
        e = torch.randn_like(out)
        compare = [(out, twin_out)]
        if s.is_floating_point():
            d = torch.randn_like(s)
            compare += [
                (b.pull(p, b.product(p, e)), b.difference(p, d)[0])
                for b, p in ((block, point), (twin, twin_point))
            ]
        grads = [
            {signal.parameter: signal.form() for signal in b.signals(p, e, 2.0)}
            for b, p in ((block, point), (twin, twin_point))
        ]
        assert set(grads[0]) == set(grads[1])
        compare.append((list(grads[0].values()), [grads[1][p] for p in grads[0]]))
        if s.is_floating_point():
            compare = [compare[0], *zip(*compare[1:3], strict=True), compare[3]]
        for ours, theirs in compare:
            torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)


def autograd_twin(model):
    return mep.trace(model, gradient_method="autograd")


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_chain_of_any_shape_is_the_model(sizes, seed):
    torch.manual_seed(seed)
    model = tanh_mlp(sizes).double()
    x = torch.randn(2, sizes[0], dtype=torch.float64)
    states = mep.free_states(model, x)
    assert [s.shape for s in states] == [(2, n) for n in sizes[1:]]
    assert torch.equal(states[-1], model(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_free_states_are_the_forward_pass(name, dtype, device):
    at = problem(name, dtype=dtype, device=device)
    output = mep.free_states(at.model, at.x)[-1]
    assert output.dtype == dtype and not output.requires_grad
    assert torch.equal(output, at.model(at.x))


def dropped():
    """Dropout in a closed form, inside an attention module and inside a recorded subgraph."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x):
            return x + self.drop(torch.tanh(self.layer(x)))

    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.attend(x, x, x, need_weights=False)[0]

    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 4), Skip(), Attend(),
        nn.Flatten(), nn.Linear(8, 4),
    ).double()  # fmt: skip


@pytest.mark.parametrize("method", ["analytic", "autograd"])
def test_dropout_has_one_mask_in_all_phases(method):
    torch.manual_seed(0)
    model, x = dropped(), torch.randn(6, 2, 3, dtype=torch.float64)
    for block, s in zip(mep.trace(model, gradient_method=method), states_of(model, x), strict=True):
        _, point = block.predict(s)
        still = torch.zeros_like(s)
        delta, moved_point = block.difference(point, still)
        # With another mask, an unmoved input would make another output.
        assert torch.equal(delta, torch.zeros_like(delta))
        e = torch.randn_like(delta)
        here, there = (block.pull(p, block.product(p, e)) for p in (point, moved_point))
        assert torch.equal(here, there)


def states_of(model, x):
    return [x, *mep.free_states(model, x)[:-1]]


def test_dropout_phases_leave_the_random_stream_alone():
    """Only the free phase draws: a longer settling sees the same numbers afterwards."""
    model, x = dropped(), torch.randn(6, 2, 3, dtype=torch.float64)
    y = torch.zeros(6, dtype=torch.long)
    after = []
    for sweeps in (1, 4):
        torch.manual_seed(7)
        mep.estimate(model, x, y, settler=mep.Sweep(max_sweeps=sweeps, tol=None))
        after.append(torch.rand(3))
    assert torch.equal(*after)


class NormedSkip(nn.Module):
    """Batch norm and dropout inside a recorded subgraph."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop(self.norm(self.layer(x)))


def normed(kind):
    inner = [nn.BatchNorm1d(4), nn.Tanh()] if kind == "plain" else [NormedSkip()]
    return nn.Sequential(nn.Linear(3, 4), *inner, nn.Linear(4, 4)).double()


@pytest.mark.parametrize("first_mode", ["train", "eval"])
@pytest.mark.parametrize("kind", ["plain", "subgraph"])
def test_running_statistics_move_once_per_estimate(kind, first_mode):
    torch.manual_seed(0)
    model, x, y = normed(kind), torch.randn(6, 3, dtype=torch.float64), torch.arange(6) % 4
    twin = copy.deepcopy(model)
    model.train(first_mode == "train")
    mep.trace(model)
    mep.free_states(model, x)  # records the forward in that mode, and moves nothing
    model.train()
    mep.estimate(model, x, y, stencil=mep.five_point)
    twin(x)
    for ours, torchs in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=EXACT, atol=EXACT)
    assert any(int(b) == 1 for b in model.buffers() if b.dim() == 0)


def test_chain_recorded_in_eval_mode_follows_a_switch_to_train():
    """A recorded subgraph keeps the flag of its recording; its children's flags are the truth."""
    torch.manual_seed(0)
    model = normed("subgraph").eval()
    chain = mep.trace(model)
    model.train()
    before = [b.clone() for b in model.buffers()]
    s = torch.randn(6, 4, dtype=torch.float64)
    _, point = chain.blocks[1].predict(s)
    delta, _ = chain.blocks[1].difference(point, torch.zeros_like(s))
    assert torch.equal(delta, torch.zeros_like(delta))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_inspection_moves_no_running_statistics(mode):
    at = problem("batch norm")
    at.model.train(mode == "train")
    before = [b.clone() for b in at.model.buffers()]
    states = mep.free_states(at.model, at.x)
    mep.energy(at.model, at.x, states, at.y, beta=0.1)
    mep.state_gradients(at.model, at.x, states, at.y, beta=0.1, method="autograd")
    mep.settle(at.model, at.x, at.y)
    assert all(torch.equal(a, b) for a, b in zip(before, at.model.buffers(), strict=True))


@pytest.mark.parametrize("name", BLOCK_MODELS)
@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_difference_in_float32_keeps_a_small_nudge(name, size):
    """Local and closed blocks alike, against the same block in double."""
    narrow, wide = problem(name, dtype=torch.float32), problem(name)
    wide.model.load_state_dict(narrow.model.state_dict())
    wide.x = narrow.x.double() if narrow.x.is_floating_point() else narrow.x
    chains = mep.trace(narrow.model), mep.trace(wide.model)
    states = states_of(narrow.model, narrow.x)
    for s, block, twin in zip(states[1:], *(c.blocks[1:] for c in chains), strict=True):
        d = size * torch.randn_like(s)
        delta = block.difference(block.predict(s)[1], d)[0]
        truth = twin.difference(twin.predict(s.double())[1], d.double())[0]
        assert delta.dtype == torch.float32
        assert distance([delta], [truth]) < SINGLE


def test_module_that_works_in_place_does_not_touch_the_states():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    for method in ("analytic", "autograd"):
        states = mep.trace(model, gradient_method=method).free(x)[0]
        assert torch.equal(states[0], model[0](x))


def test_frozen_parameters_are_left_out():
    block = mep.trace(nn.Linear(3, 2)).blocks[0]
    block.modules[0].weight.requires_grad_(False)
    for candidate in (block, LocalBlock("layer", block.modules)):
        out, point = candidate.predict(torch.randn(4, 3))
        found = [s.parameter for s in candidate.signals(point, torch.randn_like(out), 1.0)]
        assert [id(p) for p in found] == [id(block.modules[0].bias)]


def test_misfit_input_names_the_block():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(5, 2))
    with pytest.raises(ValueError, match=r"block `2` \(Tanh > Linear\(5, 2\)\).*shape \(2, 4\)"):
        mep.free_states(model, torch.randn(2, 3))


# --- local autograd: one graph at the nudged states ----------------------------------------------


def attention(dtype, dropout=0.0, frozen=False):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout, batch_first=True, norm_first=True)
    layer.linear1.weight.requires_grad_(not frozen)
    block = LocalBlock("layer", [layer.to(dtype)])
    s, d, e, below = (torch.randn(5, 3, 8, dtype=dtype) for _ in range(4))
    return block, block.predict(s.detach())[1], d, e, below


def asked(block, monkeypatch):
    """What a block runs: the type of every evaluation's input."""
    found, original = [], block._evaluate

    def noting(point, s):
        found.append(s.dtype)
        return original(point, s)

    monkeypatch.setattr(block, "_evaluate", noting)
    return found


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("more", [{}, {"dropout": 0.3}, {"frozen": True}], ids=str)
def test_local_block_advances_as_the_reference_does(dtype, more, monkeypatch):
    block, point, d, e, below = attention(dtype, **more)
    assert (point.rng is not None) == ("dropout" in more)
    moved_by = d.sub(below, alpha=0.3)  # the share of the error is yet to come
    runs = asked(block, monkeypatch)
    delta, moved, norm = block.advance(point, moved_by, e, below, 0.3)
    signals = [*block.signals(moved, e, 0.5)]
    assert runs == [dtype]  # one graph for all of it
    close = SINGLE if dtype == torch.float32 else EXACT
    assert distance([moved_by], [d]) < close
    truth = Block.advance(block, point, d, e, below)
    again = _Point(moved.state, point.rng, {})
    expected = [*block.signals(again, e, 0.5)]
    assert [id(s.parameter) for s in signals] == [id(s.parameter) for s in expected]
    assert len(signals) == (11 if "frozen" in more else 12)
    ours, theirs = ([s.form() for s in found] for found in (signals, expected))
    pairs = [*zip([delta, norm, *ours], [*truth[::2], *theirs], strict=True)]
    assert all(distance([a], [b]) < close for a, b in pairs)
    # Handed out once; another error than the force's is sent through for itself.
    runs.clear()
    other = [signal.form() for signal in block.signals(moved, 2 * e, 0.5)]
    assert runs == [dtype]
    assert all(distance([a], [2 * b]) < close for a, b in zip(other, theirs, strict=True))


@torch.no_grad()
def test_local_block_keeps_no_gradient_once_it_is_handed_out():
    block, point, d, e, below = attention(torch.float64)
    _, moved, _ = block.advance(point, d, e, below)
    assert moved.learned is not None
    [*block.signals(moved, e, 0.5)]
    assert moved.learned is None


@torch.no_grad()
def test_local_block_turns_to_double_precision_for_a_small_nudge(monkeypatch):
    block, point, d, e, below = attention(torch.float32)
    runs = asked(block, monkeypatch)
    delta, *_ = block.advance(point, 1e-6 * d, e, below)
    assert runs == [torch.float32, torch.float64, torch.float64]
    assert torch.equal(delta, block.difference(point, 1e-6 * d)[0])
