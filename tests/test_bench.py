"""The benchmarks: records, tables, timing, and what each one sums up."""

import dataclasses
import json
import platform
import subprocess
from pathlib import Path

import pytest
import torch

import mep
from mep.bench import Record, Table, environment, interleave, publish, spread, steps
from mep.bench import diagnose as diagnose_bench
from mep.bench import settle as settle_bench
from mep.bench import speed as speed_bench
from mep.bench import train as train_bench
from mep.bench.regime import LIMIT, describe, pool
from mep.training import Observer, TrainingConfig, annotate, load_checkpoint

PNG = b"\x89PNG\r\n"


# Records


def record(**changes):
    values = {"command": "mep test", "config": {"seeds": (0, 1)}, "rows": [{"ms": 1.5}]}
    return Record(**{**values, "summary": {"ratio": 2.0}, **changes})


def test_a_record_is_read_back_as_written(tmp_path):
    written = record()
    path = written.write(tmp_path / "new" / "folder")
    values = json.loads(path.read_text())
    assert list(values) == ["command", "environment", "config", "rows", "summary"]
    read = Record.read(path)
    assert read == dataclasses.replace(written, config={"seeds": [0, 1]})
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_numbers_json_does_not_know_become_null(tmp_path):
    path = record(summary={"a": float("nan"), "b": [float("inf"), 1.0]}).write(tmp_path)
    assert Record.read(path).summary == {"a": None, "b": [None, 1.0]}


def test_a_failed_write_keeps_the_old_record(tmp_path):
    path = record().write(tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        record(summary={"model": torch.nn.Linear(1, 1)}).write(tmp_path)
    assert Record.read(path).summary == {"ratio": 2.0}


@pytest.mark.parametrize("content", ["", "[]", '{"command": "mep"}'])
def test_what_is_no_record_is_refused(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"record\.json is not a record"):
        Record.read(path)


def test_the_environment_names_versions_but_no_place():
    found = environment()
    assert found["torch"] == torch.__version__ and found["mep"] == mep.__version__
    assert found["threads"] == torch.get_num_threads()
    text = json.dumps(found)
    assert str(Path.home()) not in text and str(Path.cwd()) not in text
    assert platform.node() not in text or not platform.node()


# Tables and files


def test_tables_refuse_ragged_rows():
    with pytest.raises(ValueError, match="row of 2 cells"):
        Table("t", ["a", "b"], [["1"]])


def test_publish_writes_record_table_and_plot(tmp_path):
    from mep.bench.plot import canvas

    figure, (ax,) = canvas()
    ax.plot([1, 2])
    publish(tmp_path, record(), Table("t", ["a"], [["1"]], "A note."), figure, "plot.png")
    assert {file.name for file in tmp_path.iterdir()} == {"record.json", "table.txt", "plot.png"}
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    assert (tmp_path / "table.txt").read_text().endswith("| 1 |\n\nA note.\n")


# Timing


def test_interleave_takes_the_ratio_within_a_round():
    journal, now = [], [0.0]

    def arm(name, seconds):
        def run():
            journal.append(name)
            # The machine gets ten times slower half way: the ratio of a round does not notice.
            now[0] += seconds * (1 if len(journal) <= 6 else 10)
            return lambda: {"name": name}

        return run

    arms = {"base": arm("base", 1.0), "other": arm("other", 3.0)}
    rows = interleave(arms, rounds=4, warmup=1, baseline="base", clock=lambda: now[0])
    base = [row for row in rows if row["arm"] == "base"]
    other = [row for row in rows if row["arm"] == "other"]
    assert [row["ratio"] for row in other] == pytest.approx([3.0] * 4)
    assert [row["ratio"] for row in base] == [1.0] * 4
    assert [row["ms"] for row in base] == pytest.approx([1e3, 1e3, 1e4, 1e4])
    assert all(row["name"] == row["arm"] for row in rows)
    assert len(journal) == 2 * (4 + 1)


def test_interleave_rotates_the_order():
    journal = []
    arms = {name: lambda name=name: journal.append(name) for name in "abc"}
    interleave(arms, rounds=3, warmup=0, baseline="a")
    assert "".join(journal) == "abcbcacab"


def test_interleave_refuses_bad_input():
    with pytest.raises(ValueError, match="`baseline` must be one of"):
        interleave({"a": lambda: None}, 1, baseline="b")
    with pytest.raises(ValueError, match="`rounds` must be >= 1"):
        interleave({"a": lambda: None}, 0, baseline="a")


def test_spread_of_one_number():
    assert spread([2.0]) == (2.0, 2.0, 2.0)


# Regimes


def measured(regime, **changes):
    values = {"c": 0.05, "residual": 1e-3, "residual_aggregate": 1e-2, "cosine": 0.9}
    return {"regime": regime, **values, **changes}


@pytest.mark.parametrize(
    ("regimes", "worst"),
    [
        (["finite nudge", "finite nudge"], "finite nudge"),
        (["finite nudge", "not settled"], "not settled"),
        (["limit", "not settled", "finite nudge"], "limit"),
    ],
)
def test_runs_are_called_by_their_worst_regime(regimes, worst):
    assert pool([measured(regime) for regime in regimes])["regime"] == worst


def test_pool_takes_medians_and_knows_missing_numbers():
    runs = [measured("finite nudge", cosine=x, c=None) for x in (0.1, 0.5, 0.9)]
    pooled = pool(runs)
    assert pooled["cosine"] == 0.5 and pooled["c"] is None
    assert pool([]) == {}
    assert "fixed beta" in describe({"subject": "EP", **pooled})


def test_the_limit_is_never_called_ep_alone():
    assert describe({"subject": LIMIT, **measured("limit")}) == "limit (= backprop)"
    assert "limit (= backprop)" in describe({"subject": "EP", **measured("limit")})


# The training comparison


class Kill(Observer):
    """Ends the run after so many steps, as a kill would."""

    def __init__(self, step):
        self.at = step

    def step(self, step, values):
        if step == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def data():
    digits = mep.data.load("digits")
    return dataclasses.replace(
        digits, x_train=digits.x_train[:96], y_train=digits.y_train[:96],
        x_test=digits.x_test[:60], y_test=digits.y_test[:60],
    )  # fmt: skip


def optimizer(model, **options):
    return mep.EPOptimizer(model.parameters(), model=model, lr=0.1, **options)


def contest(data, **changes):
    values = {
        "data": data,
        "model": lambda: mep.models.mlp(64, (16,), 10),
        "arms": {"EP": optimizer, "backprop": lambda model: optimizer(model, mode="backprop")},
        "training": TrainingConfig(epochs=2, batch_size=32),
        "seeds": (0, 1),
        "config": {"dataset": "digits", "model": "mlp"},
        "diagnose": mep.diagnose,
    }
    return train_bench.Contest(**{**values, **changes})


def test_the_arms_start_from_the_same_network(data):
    ours, theirs = train_bench._arms(contest(data), seed=3)
    other, _ = train_bench._arms(contest(data), seed=4)
    for one, two in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(one, two) and one is not two
    assert not torch.equal(ours.model[1].weight, other.model[1].weight)


def test_a_trained_net_is_diagnosed_once(data, tmp_path):
    asked = []

    def diagnose(model, x, y):
        assert not model.training
        asked.append(1)
        return mep.diagnose(model, x, y)

    def run(**how):
        given = contest(data, diagnose=diagnose, training=TrainingConfig(epochs=1, batch_size=32))
        return train_bench.run(given, tmp_path, "mep train", **how)

    first, again = run(), run()
    assert len(asked) == 2 and again.summary == first.summary and again.rows == first.rows
    path = train_bench.checkpoint_path(tmp_path, 0)
    annotate(path, other=1)
    assert load_checkpoint(path)["notes"].keys() == {"diagnosis", "other"}
    afresh = run(resume=False)
    assert len(asked) == 4 and afresh.summary["diagnoses"] == first.summary["diagnoses"]
    assert load_checkpoint(path)["notes"].keys() == {"diagnosis"}


def test_the_training_record(data, tmp_path):
    found = train_bench.run(contest(data), tmp_path, "mep train digits")
    assert len(found.rows) == 2 * 2 * 2  # seeds, epochs, arms
    summary = found.summary
    last = [r["test_accuracy"] for r in found.rows if r["arm"] == "EP" and r["epoch"] == 2]
    assert summary["test_accuracy"] == pytest.approx(sum(last) / 2)
    assert summary["test_accuracy_std"] == pytest.approx(abs(last[0] - last[1]) / 2**0.5)
    assert summary["accuracy_difference"] == pytest.approx(
        summary["test_accuracy"] - summary["backprop_test_accuracy"]
    )
    assert summary["regime"] == "finite nudge" and summary["c"] == pytest.approx(0.05)
    assert 0 < summary["residual"] < 1 and summary["residual_aggregate"] > 0
    assert summary["cosine"] > 0.9 and summary["step_time_ratio"] > 0
    assert [entry["seed"] for entry in summary["diagnoses"]] == [0, 1]
    words = train_bench.sentence(found)
    assert words.startswith("EP (finite nudge, c = 0.05, residual ") and "backprop's time" in words
    assert train_bench.table(found).columns == ["", "EP", "backprop"]
    publish(tmp_path, found, train_bench.table(found), train_bench.plot(found), "curves.png")
    assert train_bench.sentence(Record.read(tmp_path / "record.json")) == words


def test_a_killed_comparison_goes_on_where_it_stopped(data, tmp_path):
    expected = train_bench.run(contest(data), tmp_path / "unbroken", "mep")

    def kill_second_seed(seed):
        return [Kill(4)] if seed == 1 else []

    with pytest.raises(KeyboardInterrupt):
        train_bench.run(contest(data), tmp_path / "killed", "mep", every=0,
                        observe=kill_second_seed)  # fmt: skip
    steps = []

    class Count(Observer):
        def step(self, step, values):
            steps.append(step)

    resumed = train_bench.run(
        contest(data), tmp_path / "killed", "mep", observe=lambda _: [Count()]
    )
    assert steps == [5, 6]  # of the second seed, whose steps are 6; nothing of the first
    for row, other in zip(resumed.rows, expected.rows, strict=True):
        assert {**row, "step_ms": 0} == {**other, "step_ms": 0}


def test_backprop_alone_and_the_limit(data, tmp_path):
    alone = contest(
        data, arms={"backprop": lambda m: optimizer(m, mode="backprop")}, diagnose=None, seeds=(0,)
    )
    found = train_bench.run(alone, tmp_path / "a", "mep")
    assert "regime" not in found.summary and "accuracy_difference" not in found.summary
    assert train_bench.sentence(found).startswith("backprop ")
    assert train_bench.table(found).columns == ["", "backprop"]

    def at_limit(model):
        return optimizer(model, settler=mep.Limit())

    limit = contest(
        data, arms={LIMIT: at_limit}, seeds=(0,),
        diagnose=lambda m, x, y: mep.diagnose(m, x, y, settler=mep.Limit()),
    )  # fmt: skip
    found = train_bench.run(limit, tmp_path / "b", "mep")
    assert found.summary["regime"] == "limit"
    assert train_bench.sentence(found).startswith("limit (= backprop) ")


# The others


@pytest.mark.parametrize("net", ["tanh", "relu"])
def test_speed(tmp_path, net):
    every = tuple(key for key in speed_bench.ARMS if key != "compiled")
    config = speed_bench.SpeedConfig((net,), (2, 4), (8,), (4,), every, rounds=3, warmup=1)
    found = speed_bench.run(config, "mep bench speed")
    assert len(found.rows) == 2 * 3 * len(every)  # depths, rounds, arms
    entries = {(entry["depth"], entry["arm"]): entry for entry in found.summary["arms"]}
    ours = entries[4, "EP"]
    ratios = sorted(r["ratio"] for r in found.rows if r["arm"] == "EP" and r["depth"] == 4)
    assert ours["ratio"] == ratios[1]
    assert ours["ratio_iqr"] == pytest.approx((ratios[2] - ratios[0]) / 2)
    rivals = ["backprop", "backprop, foreach SGD", "backprop, fused SGD"]
    fastest = min(rivals, key=lambda arm: entries[4, arm]["ms"])
    assert {ours["baseline"], entries[4, fastest]["baseline"]} == {fastest}
    assert entries[4, fastest]["ratio"] == entries[4, "bare products"]["floors"] == 1.0
    assert ours["c"] == pytest.approx(0.05) and 0 < ours["residual"] < 1
    publish(tmp_path, found, speed_bench.table(found), speed_bench.plot(found), "speed.png")
    assert "limit (= backprop)" in (tmp_path / "table.txt").read_text()


@pytest.mark.parametrize(("net", "width"), [("cnn", 2), ("residual", 8), ("transformer", 8)])
def test_speed_of_other_nets(net, width):
    config = speed_bench.SpeedConfig((net,), (3,), (width,), (4,), ("backprop", "ep"), 2, 0)
    found = speed_bench.run(config, "mep bench speed")
    assert {(row["net"], row["arm"]) for row in found.rows} == {(net, "backprop"), (net, "EP")}


def test_the_floor_is_the_products_of_an_update(monkeypatch):
    """L + (L - 1) + (L - 1) + L of them, of the sizes that the layers have."""
    case = steps.case_of("tanh", 4, 8, 5, 0, torch.device("cpu"))
    step = steps.arms_of(case, ("floor",), sweeps=1, c=0.05)["bare products"]
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append((*a.shape, b.shape[1])) or out)
    step()
    monkeypatch.setattr(torch, "mm", mm)
    forward = [(5, 784, 8), (5, 8, 8), (5, 8, 8), (5, 8, 10)]
    down = [(5, 10, 8), (5, 8, 8), (5, 8, 8)]
    contrast = [(8, 5, 784), (8, 5, 8), (8, 5, 8), (10, 5, 8)]
    assert seen == forward + down + forward[1:] + contrast


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depths": ()}, "`depths` must be"),
        ({"depths": (3, 1)}, "`depths` must be"),
        ({"nets": ("gelu",)}, "`nets` must be some of"),
        ({"arms": ("magic",)}, "`arms` must be some of"),
        ({"arms": ("ep",)}, "`arms` must have one of"),
        ({"nets": ("cnn",), "arms": ("backprop", "floor")}, "the floor of bare products"),
        ({"widths": (0,)}, "`widths` must be one or more numbers >= 1"),
        ({"batches": ()}, "`batches` must be one or more"),
        ({"rounds": 0}, "`rounds` must be >= 1, got 0"),
        ({"warmup": -1}, "`warmup` must be >= 0, got -1"),
        ({"c": 0.0}, "`c` must be > 0, got 0"),
    ],
)
def test_speed_refuses_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        speed_bench.SpeedConfig(**settings)


def test_settling(data, tmp_path):
    torch.manual_seed(0)
    model = mep.models.deep_mlp(4, width=16, in_features=64)
    settlers = {
        "sweep": mep.Sweep(max_sweeps=4, tol=None), "descent": mep.GradientDescent(max_steps=6)
    }  # fmt: skip
    config = {"label": "four layers"}
    found = settle_bench.run(
        model, data.x_test, data.y_test, settlers, "auto", config, "mep settle"
    )
    course = [row["residual"] for row in found.rows if row["settler"] == "sweep"]
    assert len(course) == 5 and len(found.rows) == 5 + 7
    assert course[0] == pytest.approx(1.0) and course[-1] < course[1] < 0.1
    assert found.summary["settlers"][0]["residual"] == pytest.approx(course[-1])
    publish(tmp_path, found, settle_bench.table(found), settle_bench.plot(found), "settling.png")


def test_diagnosis(data, tmp_path):
    torch.manual_seed(0)
    model = mep.models.mlp(64, (16, 16), 10)
    found = mep.diagnose(model, data.x_test, data.y_test)
    made = diagnose_bench.run(found, "EP", {"dataset": "digits", "model": "mlp"}, "mep diagnose")
    assert [row["layer"] for row in made.rows] == [layer.name for layer in found.layers]
    assert made.summary["cosine"] == found.cosine and made.summary["layers"] == 3
    figure = diagnose_bench.plot(made)
    publish(tmp_path, made, diagnose_bench.table(made), figure, "diagnosis.png")


def test_dirty_is_what_makes_records_not_the_records(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    code, kept = tmp_path / "mep" / "record.py", tmp_path / "results" / "record.json"
    for path in (code, kept):
        path.parent.mkdir()
        path.write_text("1")
    git("init")
    monkeypatch.setattr(mep.bench.record, "__file__", str(code))
    assert mep.bench.record._commit() == (None, None)
    git("add", "-A")
    git("commit", "-m", "one")
    assert mep.bench.record._commit()[1] is False
    kept.write_text("2")
    assert mep.bench.record._commit()[1] is False
    code.write_text("2")
    assert mep.bench.record._commit()[1] is True
    code.write_text("1")
    assert mep.bench.record._commit()[1] is False
    (code.parent / "new.py").write_text("1")
    assert mep.bench.record._commit()[1] is True
