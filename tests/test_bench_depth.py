"""Very deep nets and their controls: what is compared, and that a killed run goes on."""

from dataclasses import replace

import pytest
import torch
from small_training import distance, identical, killed_at_step, weights
from torch import nn

import mep
from mep.bench import deep, publish
from mep.bench import depth as bench
from mep.memory import parse

CONFIG = bench.DepthConfig(
    bench.ARMS, (20,), (0, 1), steps=8, width=12, batch=32, warmup=2, memory="48kB"
)


@pytest.fixture(scope="module")
def data():
    digits = mep.data.load("digits")
    return replace(digits, x_train=digits.x_train[:300], y_train=digits.y_train[:300])


@pytest.fixture(scope="module")
def record(data, tmp_path_factory):
    return bench.run(CONFIG, data, tmp_path_factory.mktemp("depth"), "mep bench depth")


def test_every_arm_is_there_with_its_figures(record, tmp_path):
    entries = {entry["arm"]: entry for entry in record.summary["arms"]}
    assert list(entries) == list(bench.ARMS)
    ep = entries["ep"]
    assert ep["extra"] <= ep["planned"] <= parse("48kB", "memory")
    assert ep["silent_layers"] == 0 and ep["sweeps"] == 1
    assert len(ep["gradient_norms"]) == 5 and min(ep["gradient_norms"]) > 0
    assert 0 <= ep["reset"] <= 1
    reached = {(r["arm"], r["seed"]): r["accuracy"] for r in record.rows if r["step"] == 8}
    gains = [reached["ep", seed] - reached["identity", seed] for seed in (0, 1)]
    assert ep["over_identity"] == pytest.approx(sum(gains) / 2)
    assert ep["over_identity_spread"] == pytest.approx(torch.tensor(gains).double().std().item())
    assert entries["identity"]["over_identity"] == 0
    publish(tmp_path, record, bench.table(record), bench.plot(record), "depth.png")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    assert "EP, hidden layers held at I" in (tmp_path / "table.txt").read_text()


def test_without_a_budget_nothing_is_planned(record, data, tmp_path):
    """The same steps with all states at hand; but no nudge gives way, which moves the losses."""
    found = bench.run(replace(CONFIG, arms=("ep",), seeds=(0,), memory=None), data, tmp_path, "")
    (entry,) = found.summary["arms"]
    assert entry["planned"] is None and entry["extra"] > parse("48kB", "memory")
    within = [r["loss"] for r in record.rows if (r["arm"], r["seed"]) == ("ep", 0)]
    assert [r["loss"] for r in found.rows] == pytest.approx(within, rel=2e-3)
    publish(tmp_path, found, bench.table(found), bench.plot(found), "depth.png")
    assert "budget none" in (tmp_path / "table.txt").read_text()


def test_finished_parts_are_not_done_again(record, data, tmp_path, monkeypatch):
    config = replace(CONFIG, arms=("identity",), seeds=(0,))
    first = bench.run(config, data, tmp_path, "mep bench depth")
    assert [f.name for f in tmp_path.iterdir()] == ["part-identity-depth20-seed0.pt"]
    monkeypatch.setattr(bench, "train", None)
    assert bench.run(config, data, tmp_path, "mep bench depth").rows == first.rows
    same = [r for r in record.rows if (r["arm"], r["seed"]) == ("identity", 0)]
    for one, other in zip(first.rows, same, strict=True):
        # Times differ; so does what runs before, which changes no number.
        assert one["accuracy"] == other["accuracy"] and one["loss"] == other["loss"]


@pytest.mark.parametrize("arm", ["ep", "backprop"])
def test_killed_run_goes_on_bit_for_bit(data, tmp_path, monkeypatch, arm):
    monkeypatch.setattr(deep, "_SAVE", 0)  # after every step
    monkeypatch.setattr(deep, "_SHARE", float("inf"))
    config = replace(CONFIG, arms=(arm,), seeds=(0,))
    whole = bench.run(config, data, tmp_path / "whole", "mep bench depth")
    with killed_at_step(5):
        bench.run(config, data, tmp_path / "killed", "mep bench depth")
    resumed = bench.run(config, data, tmp_path / "killed", "mep bench depth")
    for one, other in zip(whole.rows, resumed.rows, strict=True):
        assert {**one, "ms": 0} == {**other, "ms": 0}
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_checkpoint_of_another_run_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_findings", None)  # killed after the training
    config = replace(CONFIG, arms=("identity",), seeds=(0,))
    with pytest.raises(TypeError):
        bench.run(config, data, tmp_path, "mep bench depth")
    with pytest.raises(ValueError, match=r"checkpoint-identity-depth20-seed0.pt is of another run"):
        bench.run(replace(config, lr=0.2), data, tmp_path, "mep bench depth")


# --- the controls are what they say ---------------------------------------------------------------


def start(arm, depth=30):
    torch.manual_seed(0)
    whole = mep.models.deep_mlp(depth, 12, 64, 10)
    return whole, bench._arm(whole, arm, depth)


@pytest.mark.parametrize("arm", ["identity", "frozen"])
def test_control_computes_what_the_deep_net_does(arm):
    whole, small = start(arm)
    x = torch.randn(7, 64)
    torch.testing.assert_close(small(x), whole(x), rtol=0, atol=0)
    linear = [m for m in small if isinstance(m, nn.Linear)]
    assert len(linear) == {"identity": 2, "frozen": 1 + 3}[arm]
    trained = [m.weight.requires_grad for m in linear]
    assert trained == {"identity": [True, True], "frozen": [False, True, True, True]}[arm]


def test_identity_control_is_the_deep_net_with_its_hidden_layers_held():
    """By backprop, where a step does not depend on the nudge."""
    x, y = torch.randn(16, 64), torch.randint(10, (16,))
    found = []
    for arm in ("identity", "held"):
        whole, small = start("identity" if arm == "identity" else "ep", depth=8)
        model = small if arm == "identity" else whole
        for layer in [m for m in whole if isinstance(m, nn.Linear)][1:-1]:
            layer.requires_grad_(False)
        own = [p for p in model.parameters() if p.requires_grad]
        opt = mep.EPOptimizer(own, model=model, mode="backprop", lr=0.1, momentum=0.9)
        for _ in range(3):
            opt.step(x=x, target=y)
        found.append(
            weights(small)[:2] + weights(small)[-2:]
            if arm == "identity"
            else weights(whole)[:2] + weights(whole)[-2:]
        )
    assert distance(*found) < 1e-6  # float32


def test_reset_puts_the_middle_back(data):
    torch.manual_seed(0)
    model = mep.models.deep_mlp(20, 12, 64, 10)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    before = weights(model)
    bench._reset_accuracy(model, data, 20)
    after = weights(model)
    eye, kept = torch.eye(12), [*range(2), *range(18, 20)]
    for k in range(20):
        if k in kept:
            assert identical(before[2 * k : 2 * k + 2], after[2 * k : 2 * k + 2])
        else:
            assert torch.equal(after[2 * k].float(), eye) and not after[2 * k + 1].any()


def test_gradient_norms_are_backprops_in_the_limit_of_a_weak_nudge(data):
    torch.manual_seed(0)
    model = mep.models.deep_mlp(12, 12, 64, 10).double()
    x, y = data.x_test[:16].double(), data.y_test[:16]
    found = bench._gradient_norms(model, x, y, mep.AutoBeta(1e-6))
    nn.functional.cross_entropy(model(x), y).backward()
    truth = [m.weight.grad.norm().item() for m in model if isinstance(m, nn.Linear)]
    assert found == pytest.approx(truth, rel=1e-4)


def test_rate_rises_and_falls_in_a_line():
    rates = [bench._rate(10, 2, k) for k in range(10)]
    assert rates[:3] == pytest.approx([0.5, 0.9, 0.8]) and rates[-1] == pytest.approx(0.1)


BAD = {
    "arms": ({"arms": ("ep", "magic")}, r"`arms` must be some of"),
    "depths": ({"depths": (2,)}, r"`depths` must be one or more numbers >= 3"),
    "seeds": ({"seeds": ()}, "`seeds` must not be empty"),
    "steps": ({"steps": 0}, "`steps` must be >= 1"),
    "lr": ({"lr": 0.0}, "`lr` must be > 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_nonsense_is_refused(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **options)
