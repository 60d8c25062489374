"""The comparisons of rules, of presets against depth and of Muon: rows, resuming, refusals."""

from dataclasses import replace

import pytest
import torch
from small_training import killed_at_step

import mep
from mep.bench import deep, publish
from mep.bench import muon as muon_bench
from mep.bench import presets as presets_bench
from mep.bench import rules as rules_bench

PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def data():
    digits = mep.data.load("digits")
    return replace(digits, x_train=digits.x_train[:300], y_train=digits.y_train[:300])


def test_rules(tmp_path, data, monkeypatch):
    config = rules_bench.RulesConfig((2,), 2, (0,), (0.3, 1.0), tuning_steps=3, width=8, batch=32)
    found = rules_bench.run(config, data, tmp_path, "mep bench rules")
    grid = [row for row in found.rows if row["part"] == "grid"]
    runs = {row["arm"]: row for row in found.rows if row["part"] == "run"}
    assert len(grid) == 2 * len(rules_bench.ARMS) and set(runs) == set(rules_bench.ARMS)
    for arm, row in runs.items():
        tried = {point["lr"]: point["accuracy"] for point in grid if point["arm"] == arm}
        assert tried[row["lr"]] == max(tried.values())
        assert row["looks"][-1] == 2 * (300 // 32) and row["course"][-1] == row["accuracy"]
        by_backprop = arm.endswith("bp") or arm == "muon_backprop"
        assert ("regime" not in row) == by_backprop
        assert by_backprop or (row["cosine"] > 0.9 and 0 <= row["settled"] <= 1)
    assert runs[rules_bench.BASELINE]["ratio"] == 1.0
    assert all(row["max_sigma"] > 0 and row.get("skipped", 0) == 0 for row in runs.values())
    written = rules_bench.table(found), rules_bench.plot(found)
    publish(tmp_path, found, *written, "rules.png")
    assert (tmp_path / "rules.png").read_bytes().startswith(PNG)

    monkeypatch.setattr(rules_bench, "_one_depth", None)  # a finished part is not done again
    assert rules_bench.run(config, data, tmp_path, "mep bench rules").rows == found.rows


def test_rules_of_one_seed_start_and_see_the_same(data):
    """A rate of nothing leaves every arm where all began."""
    config = rules_bench.RulesConfig((3,), width=8, batch=32)
    rates = dict.fromkeys(rules_bench.ARMS, 0.0)
    rows = rules_bench._race(config, data, 3, 0, rates, 2)
    assert len({row["accuracy"] for row in rows}) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1,)}, r"`depths` must be one or more numbers >= 2, got \(1,\)"),
        ({"epochs": 0}, "`epochs` must be >= 1, got 0"),
        ({"seeds": ()}, "`seeds` and `factors` must not be empty"),
        ({"factors": (0.0,)}, "factors must be > 0"),
    ],
)
def test_rules_refuses_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        rules_bench.RulesConfig(**options)


def test_presets_resume_where_they_were_killed(tmp_path, data, monkeypatch):
    monkeypatch.setattr(presets_bench, "_LOOK", 2)
    monkeypatch.setattr(deep, "_SAVE", 0)  # after every step
    monkeypatch.setattr(deep, "_SHARE", float("inf"))
    config = presets_bench.PresetsConfig("smep_fast", (2, 4), steps=6, width=8, batch=32)
    whole = presets_bench.run(config, data, tmp_path / "whole", "mep bench presets")

    with killed_at_step(4):
        presets_bench.run(config, data, tmp_path / "killed", "mep bench presets")
    resumed = presets_bench.run(config, data, tmp_path / "killed", "mep bench presets")
    for one, other in zip(whole.rows, resumed.rows, strict=True):
        assert {**one, "ms": 0} == {**other, "ms": 0}
    assert [row["step"] for row in whole.rows if row["depth"] == 2] == [1, 2, 4, 6]
    assert whole.rows[0]["first_move"] > 0 and whole.summary["depths"][1]["depth"] == 4
    publish(tmp_path, whole, presets_bench.table(whole), presets_bench.plot(whole), "presets.png")

    with pytest.raises(ValueError, match=r"checkpoint-depth2\.pt is of another run"):
        presets_bench.run(replace(config, width=9), data, tmp_path / "killed", "mep bench presets")
    with pytest.raises(ValueError, match="`preset` must be one of"):
        presets_bench.PresetsConfig("sgd")


def test_muon(tmp_path):
    config = muon_bench.MuonConfig(layers=2, widths=(4, 8), rounds=2, warmup=0)
    found = muon_bench.run(config, "mep bench muon")
    assert len(found.rows) == 2 * 2 * 2 and len(found.summary["arms"]) == 4
    publish(tmp_path, found, muon_bench.table(found), muon_bench.plot(found), "muon.png")
    with pytest.raises(ValueError, match="`layers` must be >= 1, got 0"):
        muon_bench.MuonConfig(layers=0)


def test_both_muons_make_the_same_update():
    """Or their times would say nothing."""
    config = muon_bench.MuonConfig(layers=1)
    one, other = (muon_bench._matrices(config, 16) for _ in range(2))
    ours = mep.EPOptimizer(one, lr=1e-3, momentum=0.95, nesterov=True, update=mep.Muon())
    ours.step()
    torch.optim.Muon(other, lr=1e-3, weight_decay=0.0).step()
    assert torch.equal(one[0], other[0])
