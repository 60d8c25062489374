"""Memory against depth: asserted on bytes, not on time."""

import pytest
from small_training import distance, weights

from mep.bench import memory as bench
from mep.bench import publish
from mep.bench.stepping import BACKPROP, CHECKPOINTED, IN_BACKWARD, PLAIN, Stepper
from mep.memory import parse

CONFIG = bench.MemoryConfig((20, 60), ("64kB",), width=16, batch=8, rounds=1, capped=0, spare="2MB")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("memory")


@pytest.fixture(scope="module")
def record(out):
    with pytest.MonkeyPatch.context() as patch:  # processes of their own are for resident sets
        patch.setattr(bench, "_in_a_process", lambda work: work())
        return bench.run(CONFIG, out, "mep bench memory")


def test_finished_parts_are_not_done_again(record, out, monkeypatch):
    monkeypatch.setattr(bench, "_in_a_process", None)
    assert bench.run(CONFIG, out, "mep bench memory").rows == record.rows


def test_every_arm_is_measured_at_every_depth(record, tmp_path):
    rows = {(row["arm"], row["depth"]): row for row in record.summary["memory"]}
    assert list(rows) == [(arm, depth) for depth in CONFIG.depths for arm in CONFIG.arms]
    for (arm, _), row in rows.items():
        if "within" in arm:
            budget = parse(arm.split()[-1], "budget")
            assert 0.92 * row["planned"] <= row["extra"] <= row["planned"] <= budget
            assert row["residual"] <= 1e-2 and row["sweeps"] == 1
    # What grows with depth, and what does not.
    for arm in (BACKPROP, CHECKPOINTED, PLAIN):
        assert rows[arm, 60]["extra"] > 1.4 * rows[arm, 20]["extra"]
    assert rows[BACKPROP, 60]["kinds"]["gradients"] > 0
    assert rows["EP within 64kB", 60]["kinds"]["gradients"] == 0
    assert rows[IN_BACKWARD, 60]["extra"] < rows[CHECKPOINTED, 60]["extra"]
    timed = [row for row in record.rows if row["part"] == "time"]
    assert {row["arm"] for row in timed} == set(CONFIG.arms)
    publish(tmp_path, record, bench.table(record), bench.plot(record), "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "64kB" in (tmp_path / "table.txt").read_text()


def test_limited_memory_tells_who_runs_out():
    """20 MB above start-up, parameters and momentum: backprop's gradients alone take 38."""
    config = bench.MemoryConfig(
        (3,), ("1MB",), width=128, batch=32, rounds=0, capped=600, spare="20MB"
    )
    fates = {
        arm: bench._in_a_process(bench.partial(bench._capped, config, arm))["status"]
        for arm in (BACKPROP, "EP within 1MB")
    }
    assert fates == {BACKPROP: "out of memory", "EP within 1MB": bench.TRAINED}


def test_budget_that_no_plan_keeps_to_is_a_row(record):
    found = bench._measure(CONFIG, 20, "EP within 1kB")
    assert found["status"] == "refused" and "the least that works" in found["why"]


def test_all_arms_take_the_same_step():
    """The leanest backprop is still backprop."""
    found = []
    for arm in (BACKPROP, CHECKPOINTED, IN_BACKWARD):
        one = Stepper(arm, 6, 8, 4, 0, lr=0.1)
        for _ in range(3):
            one.step()
        found.append(weights(one.model))
    assert distance(found[0], found[1]) < 1e-6  # float32
    assert distance(found[0], found[2]) < 1e-6


BAD = {
    "depths": ({"depths": ()}, "`depths` must be"),
    "batch": ({"batch": 0}, "`batch` must be >= 1"),
    "rounds": ({"rounds": -1}, "`rounds` and `capped` must be >= 0"),
    "budgets": ({"budgets": ("many",)}, "`budgets` must be a size"),
}


@pytest.mark.parametrize("name", BAD)
def test_nonsense_is_refused(name):
    options, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        bench.MemoryConfig(**options)
