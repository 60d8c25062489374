"""Benchmarks of nets that settle: complete records, true gradients, effects of every setting."""

import pytest
import torch
from test_cli import PNG, invoke, record_of
from torch import nn

import mep
from mep.bench.robustness import NOISE, _disturbed

SMALL = ("--updates", 4, "--rounds", 2, "--batch", 16, "--samples", 40)


@pytest.fixture(scope="module", params=["mlp", "looped"])
def measured(request, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param)
    words = ("bench", "equilibrium", "digits", "--net", request.param, *SMALL)
    return record_of(out, *words)[0], out


def test_every_arm_is_timed_and_weighed(measured):
    record, out = measured
    entries = {entry["arm"]: entry for entry in record.summary["arms"]}
    assert list(entries) == [
        "backprop, feedforward net", "backprop through time", "recurrent backprop",
        "EP, centered (two nudged phases)", "EP, random sign (one nudged phase)",
    ]  # fmt: skip
    assert entries["backprop, feedforward net"]["ratio"] == 1.0
    for name, entry in entries.items():
        assert (entry["residual"] is not None) == name.startswith("EP")
        assert entry["residual"] is None or 0 < entry["residual"] < 2 * record.config["tol"]
    assert all(entry["extra"] > 0 and entry["ms"] > 0 for entry in entries.values())
    assert len(record.rows) == 5 * record.config["rounds"]
    assert (out / "equilibrium.png").read_bytes().startswith(PNG)


def test_gradients_are_those_of_backprop_through_time(measured):
    record, _ = measured
    # The centered stencil's own error at beta = 1e-4, and kinks that a nudge may cross.
    assert max(layer["error"] for layer in record.summary["layers"]) < 1e-5
    assert min(layer["cosine"] for layer in record.summary["layers"]) > 0.9


def test_phases_are_settled_and_disturbances_measured(measured):
    record, _ = measured
    for phase in record.summary["phases"]:
        assert phase["status"] == "converged" and phase["residual"] <= record.config["tol"]
        assert len(phase["history"]) == phase["rounds"]
    rows = record.summary["robustness"]
    noise = [row for row in rows if row["kind"] == "noise in activities"]
    assert {row["net"] for row in noise} == {"equilibrium", "feedforward"}
    unequal = [row for row in rows if row["kind"] == "unequal feedback"]
    # Whatever the net knows, its gradient is backprop's the less the more feedback differs.
    assert unequal[0]["cosine"] > unequal[-1]["cosine"]
    coarse = [row["level"] for row in rows if row["kind"] == "bits per weight"]
    assert set(coarse) == {8, 6, 5, 4, 3, 2}


@pytest.mark.parametrize("make", [mep.models.hopfield_mlp, mep.models.LoopedMLP])
def test_noise_reaches_the_output(make):
    model = make(8, 6 if make is mep.models.LoopedMLP else (6, 6), 3)
    x, feedforward = torch.randn(5, 8), nn.Sequential(nn.Linear(8, 3), nn.ReLU())
    torch.manual_seed(0)
    outputs = [
        net(x)
        for level in (0.0, 0.5)
        for name, net, _ in _disturbed(NOISE, level, model, feedforward, None, None)
        if name == "equilibrium"
    ]
    with torch.no_grad():
        torch.testing.assert_close(outputs[0], model(x), rtol=0, atol=0.02)  # twenty rounds
    assert (outputs[1] - outputs[0]).abs().max() > 0.05


def test_looped(tmp_path):
    words = ("bench", "looped", "--hidden", "16,64", "--rounds", 1, "--batch", 8)
    record, _ = record_of(tmp_path, *words)
    entries = record.summary["arms"]
    assert {(entry["hidden"], entry["arm"]) for entry in entries} == {
        (hidden, arm)
        for hidden in (16, 64)
        for arm in (
            "backprop through time", "recurrent backprop", "EP, Hebbian", "EP, energy difference",
        )
    }  # fmt: skip
    assert {e["parameters"] for e in entries if e["hidden"] == 64} == {8_970}
    assert (tmp_path / "looped.png").read_bytes().startswith(PNG)


def test_a_hebbian_update_forms_no_gradient(tmp_path):
    """At a size where gradients are most of the memory, it takes a fraction of backprop's."""
    words = ("bench", "looped", "--hidden", "512", "--rounds", 1, "--batch", 8)
    entries = {e["arm"]: e for e in record_of(tmp_path, *words)[0].summary["arms"]}
    assert entries["EP, Hebbian"]["share"] < 0.5
    assert entries["EP, energy difference"]["share"] > 0.8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("equilibrium", "--net", "magic"), "`net` must be one of"),
        (("equilibrium", "--rounds", "0"), "`rounds` must be >= 1"),
        (("equilibrium", "--updates", "-1"), "`updates` must be >= 0"),
        (("looped", "--hidden", "0"), "`hidden` must be one or more numbers >= 1"),
        (("looped", "--rounds", "0"), "`rounds` must be >= 1"),
    ],
)
def test_mistakes(tmp_path, words, message):
    name, *rest = words
    result = invoke("bench", name, "digits", *rest, "--out", tmp_path)
    assert result.exit_code == 2 and message in result.output


def test_over_relaxation_changes_the_rounds(tmp_path, measured):
    record, _ = measured
    words = ("bench", "equilibrium", "digits", "--net", record.config["net"], *SMALL)
    slow, _ = record_of(tmp_path, *words, "--omega", 0.3)
    rounds = [sum(p["rounds"] for p in r.summary["phases"]) for r in (record, slow)]
    assert slow.config["omega"] == 0.3 and rounds[1] > 1.5 * rounds[0]
