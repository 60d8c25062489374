"""Learning tasks one after another: what is compared and chosen, and that a killed run goes on."""

import re
import signal
from contextlib import contextmanager
from dataclasses import replace
from math import sqrt
from types import SimpleNamespace

import pytest
import torch
from small_training import identical, killed_at_step, weights
from test_cli import PNG, invoke, record_of

import mep
from mep.bench import continual as bench
from mep.bench import deep, sequence
from mep.cli.choices import load
from mep.data import Dataset, permuted

TASKS, UPDATES = 3, 10
CONFIG = bench.ContinualConfig(
    arms=tuple(bench.ARMS), tasks=TASKS, seeds=(0, 1), epochs=1, width=8, batch=16, curvature=24,
    kept=5, search=0,
)  # fmt: skip
ALONE = replace(CONFIG, arms=("ep",), seeds=(0,))
NAME = "mep bench continual"


@pytest.fixture(scope="module")
def data():
    return load("digits", None, UPDATES * CONFIG.batch)


@pytest.fixture(scope="module")
def numbered():
    """Every image tells its number in the set and, by the order of its pixels, its task."""
    x = torch.arange(200.0).view(-1, 1, 1, 1) + torch.arange(16).view(4, 4) / 100
    y = torch.arange(200) % 10
    return Dataset("numbered", x[:160], y[:160], x[160:], y[160:], 10)


def numbers_of(batches):
    return [int(image.min()) for x in batches for image in x]


def order_of(x):
    orders = {tuple(image.flatten().argsort().tolist()) for image in x}
    assert len(orders) == 1  # no batch mixes tasks
    return orders.pop()


@contextmanager
def watched(idle=False):
    """Yields runs by arm, seed and point as they begin; an idle optimizer only looks at batches."""
    step, consolidate, learn = mep.EPOptimizer.step, mep.EPOptimizer.consolidate, bench.learn
    runs, at = {}, []

    def begun(run, tasks, folder):
        at.append(SimpleNamespace(model=run.model, tasks=tasks, steps=[], consolidated=[]))
        runs[tuple(run.identity[key] for key in ("arm", "seed", "lr", "lam"))] = at[-1]
        return learn(run, tasks, folder)

    def taken(self, *, x, target):
        own = {"lr": self.param_groups[0]["lr"], "start": weights(self.model), "how": self.how}
        loss = torch.zeros(()) if idle else step(self, x=x, target=target)
        at[-1].steps.append(SimpleNamespace(x=x, y=target, loss=float(loss), **own))
        return loss

    def remembered(self, loader=None):
        at[-1].consolidated.append(loader)
        if not idle:
            consolidate(self, loader)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "learn", begun)
        patch.setattr(mep.EPOptimizer, "step", taken)
        patch.setattr(mep.EPOptimizer, "consolidate", remembered)
        yield runs


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """All arms on three tasks, two seeds: the record, and the runs by arm and seed."""
    with watched() as runs:
        record = bench.run(CONFIG, data, tmp_path_factory.mktemp("whole"), NAME)
    return record, {key[:2]: run for key, run in runs.items()}


@pytest.fixture(scope="module")
def idle(numbered, tmp_path_factory):
    """Some arms for two epochs, and of every update the task and the numbers of its samples."""
    arms = ("ep", "ep-replay", "joint", "ep-ewc", "backprop-diagonal", "ep-si")
    config = replace(CONFIG, arms=arms, seeds=(3,), epochs=2)
    with watched(idle=True) as runs:
        bench.run(config, numbered, tmp_path_factory.mktemp("idle"), NAME)
    orders = [order_of(permuted(numbered, TASKS, 3).test(t)[0]) for t in range(TASKS)]
    for run in runs.values():
        run.story = [(orders.index(order_of(s.x)), numbers_of([s.x])) for s in run.steps]
        seen = [torch.cat([x for x, _ in loader]) for loader in run.consolidated if loader]
        run.seen = [(orders.index(order_of(x)), numbers_of([x])) for x in seen]
    return {key[0]: run for key, run in runs.items()}


def rows_of(record, arm):
    return [{**row, "ms": 0} for row in record.rows if (row["arm"], row["seed"]) == (arm, 0)]


def test_arms_of_a_seed_start_alike_and_meet_the_same_batches(whole):
    _, runs = whole
    for seed in (0, 1):
        first = runs["backprop", seed].steps
        for arm in bench.ARMS:
            assert identical(runs[arm, seed].steps[0].start, first[0].start)
        for arm in {*bench.ARMS} - {"ep-replay", "joint"}:
            for one, other in zip(runs[arm, seed].steps, first, strict=True):
                assert torch.equal(one.x, other.x) and torch.equal(one.y, other.y)
    one, other = runs["backprop", 0].steps, runs["backprop", 1].steps
    assert not identical(one[0].start, other[0].start)
    assert not any(torch.equal(a.y, b.y) for a, b in zip(one, other, strict=True))


def test_every_epoch_passes_over_a_task_once(idle):
    story = idle["ep"].story
    assert [t for t, _ in story] == [t for t in range(TASKS) for _ in range(2 * UPDATES)]
    for k in range(0, len(story), UPDATES):
        assert sorted(n for _, some in story[k : k + UPDATES] for n in some) == [*range(160)]


def test_rate_starts_afresh_in_every_task(whole):
    record, runs = whole
    for arm in bench.ARMS:
        rate, steps = rows_of(record, arm)[0]["lr"], TASKS * UPDATES
        length = steps if arm == "joint" else UPDATES
        truth = [rate * (1 - (k % length) / length) for k in range(steps)]
        assert [step.lr for step in runs[arm, 0].steps] == pytest.approx(truth)


def test_figures_are_means_over_all_updates_of_a_task(whole):
    losses = torch.tensor([step.loss for step in whole[1]["ep", 0].steps]).view(TASKS, UPDATES)
    found = torch.tensor([row["loss"] for row in rows_of(whole[0], "ep")[1:]])
    torch.testing.assert_close(found, losses.mean(1))


def test_replay_keeps_so_many_samples_and_shows_them_every_second_time(idle):
    plain, seen = idle["ep"].story, {0: set(), 1: set()}
    assert len(idle["ep-replay"].story) == len(plain)
    for k, (source, numbers) in enumerate(idle["ep-replay"].story):
        t, turn = divmod(k, 2 * UPDATES)
        if t and turn % 2:
            assert source < t
            seen[source] |= {*numbers}
        else:  # the batches that the others meet, half as many of them
            assert (source, numbers) == plain[t * 2 * UPDATES + (turn // 2 if t else turn)]
    # At least 60 draws of five: one is left out by 5 (4/5)^60 = 1e-5.
    assert len(seen[0]) == len(seen[1]) == CONFIG.kept and seen[0] != seen[1]


def test_joint_mixes_all_tasks_in_as_many_updates(idle, whole):
    sources = [t for t, _ in idle["joint"].story]
    assert len(sources) == len(idle["ep"].story) and not idle["joint"].consolidated
    for k in range(0, len(sources), 20):
        # 20 draws of three: fewer than two of one task come by 3 (2/3)^20 (1 + 10) = 1e-2.
        assert min(sources[k : k + 20].count(t) for t in range(TASKS)) >= 2
    rows = [(row["task"], len(row["accuracies"])) for row in rows_of(whole[0], "joint")]
    assert rows == [(-1, 2), (TASKS - 1, TASKS)]


def test_curvature_is_taken_of_so_many_samples_of_the_task_just_learned(idle):
    assert idle["ep"].consolidated == [] and idle["ep-si"].consolidated == [None, None]
    for arm in ("ep-ewc", "backprop-diagonal"):  # after the last one there is nothing to keep
        sizes = [(t, len(numbers), len({*numbers})) for t, numbers in idle[arm].seen]
        assert sizes == [(t, CONFIG.curvature, CONFIG.curvature) for t in range(TASKS - 1)]


@pytest.mark.parametrize("scenario", bench.SCENARIOS)
def test_accuracies_are_those_of_all_tasks_so_far_and_the_next(data, tmp_path, scenario):
    """Where the task is told, only its outputs compete, and are trained."""
    count = TASKS if scenario == "permuted" else 5
    config = replace(ALONE, scenario=scenario, tasks=count, arms=("backprop",))
    with watched() as runs:
        record = bench.run(config, data, tmp_path, NAME)
    (run,), sizes = runs.values(), [2, *range(2, count + 1), count]
    model, updates = run.model, len(run.steps) // count
    states = [run.steps[t * updates].start for t in range(count)] + [weights(model)]
    costs = [step.how.cost.classes for step in run.steps]
    assert costs == [run.tasks.classes(k // updates) for k in range(len(costs))]
    assert [row["task"] for row in record.rows] == [*range(-1, count)]
    for row, state, size in zip(record.rows, states, sizes, strict=True):
        for p, w in zip(model.parameters(), state, strict=True):
            p.data.copy_(w)
        assert len(row["accuracies"]) == size
        for t, found in enumerate(row["accuracies"]):
            x, y = run.tasks.test(t)
            own = slice(2 * t, 2 * t + 2) if scenario == "split-task" else slice(None)
            truth = (model(x)[:, own].argmax(1) + (own.start or 0) == y).float().mean()
            assert found == pytest.approx(float(truth))


# After no task (the first weights), after the first, the second, the third.
ONE = [[0.1, 0.2], [0.9, 0.3], [0.95, 0.8, 0.15], [0.75, 0.6, 0.95]]
TWO = [[0.1, 0.1], [0.5, 0.1], [0.6, 0.7, 0.1], [0.8, 0.9, 1.0]]


def made_up(accuracies, arm="ep", seed=0, tasks=(-1, 0, 1, 2)):
    rest = {"kind": "run", "arm": arm, "seed": seed, "lr": 0.1, "lam": None, "skipped": 0}
    return [{**rest, "task": t, "accuracies": a} for t, a in zip(tasks, accuracies, strict=True)]


def test_figures_of_made_up_runs():
    one, two = (bench._summary("ep", made_up(rows)) for rows in (ONE, TWO))
    assert one["accuracy"] == pytest.approx((0.75 + 0.6 + 0.95) / 3)
    # The first task is best after the second one, the second when it has just been learned.
    assert one["forgetting"] == pytest.approx(((0.95 - 0.75) + (0.8 - 0.6)) / 2)
    assert one["backward"] == pytest.approx(((0.75 - 0.9) + (0.6 - 0.8)) / 2)
    # Before they are learned the two have 0.3 and 0.15; with the first weights it was 0.2.
    assert one["forward"] == pytest.approx(((0.3 - 0.2) + (0.15 - 0.2)) / 2)
    assert two["forgetting"] == 0  # its tasks only gain
    assert two["backward"] == pytest.approx(((0.8 - 0.5) + (0.9 - 0.7)) / 2)
    others = [{**row, "kind": "search"} for row in made_up(TWO)] + made_up(TWO, "joint")
    both = bench._summary("ep", made_up(TWO, seed=1) + others + made_up(ONE))
    assert both["seeds"] == [0, 1]
    for row, first, second in zip(both["matrix"], ONE[1:], TWO[1:], strict=True):
        assert row == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    for key in bench._METRICS:
        assert one[f"{key}_spread"] is None
        assert both[key] == pytest.approx((one[key] + two[key]) / 2)
        assert both[f"{key}_spread"] == pytest.approx(abs(one[key] - two[key]) / sqrt(2))
    mixed = bench._summary("joint", made_up([[0.1, 0.2], [0.7, 0.8, 0.9]], "joint", tasks=(-1, 2)))
    assert mixed["accuracy"] == pytest.approx(0.8)
    assert mixed["forgetting"] is mixed["backward"] is mixed["forward"] is None


def test_penalty_forgets_less(tmp_path):
    """Same rate, same start, same batches; what is new is learned as well."""
    digits = load("digits", None, 600)
    config = replace(CONFIG, tasks=2, width=32, batch=32, curvature=300, epochs=6)
    for seed in (0, 1):
        tasks, found = permuted(digits, 2, seed), {}
        for arm, lam in (("ep", None), ("ep-ewc", 3.0)):
            rows = bench._part(config, tasks, arm, seed, 0.05, lam, tmp_path)
            found[arm] = bench._forgetting(rows), rows[-1]["accuracies"][-1]
        # 31 and 62 points are forgotten without, 0 and 2 with it.
        assert found["ep"][0] > 0.2 and found["ep-ewc"][0] < 0.1
        assert min(new for _, new in found.values()) > 0.85


@pytest.mark.parametrize("best", [0, 4])
@pytest.mark.parametrize("arm", ["ep", "ep-ewc", "joint"])
def test_best_point_in_the_mean_of_all_tasks_is_taken(data, tmp_path, monkeypatch, arm, best):
    grid, asked = bench.ARMS[arm].grid, []
    assert all(len({*other.grid}) == len(grid) == 6 for other in bench.ARMS.values())

    def made_up_learning(run, tasks, folder):
        point = run.identity["lr"], run.identity["lam"]
        asked.append((run.identity["seed"], len(tasks), run.updates))
        end = [0.7, 0.7] if point == grid[best] else [[1.0, 0.3], [0.3, 1.0]][grid.index(point) % 2]
        reached = {-1: [0.1, 0.1], 0: [0.1, 0.1], 1: end}
        return [{"task": t, "accuracies": a, "skipped": 0} for t, a in reached.items()]

    monkeypatch.setattr(bench, "learn", made_up_learning)
    rows = bench.run(replace(CONFIG, arms=(arm,), search=2, epochs=3), data, tmp_path, NAME).rows
    points = [(row["kind"], row["lr"], row["lam"]) for row in rows]
    assert points == [("search", *point) for point in grid] + [("run", *grid[best])] * 6
    assert rows[best]["accuracy"] == pytest.approx(0.7)
    # Three epochs of what is not held out, in batches of 16.
    updates = [round(3 * samples / 16) for samples in (160 - 160 // 6, 160)]
    assert [made[1:] for made in asked] == [(2, updates[0])] * 6 + [(TASKS, updates[1])] * 2
    assert [made[0] for made in asked[6:]] == [0, 1] and asked[0][0] not in (0, 1)


@pytest.mark.parametrize("scenario", ["permuted", "split-class"])
def test_search_sees_no_test_sample_and_no_permutation_of_the_runs(numbered, tmp_path, scenario):
    count, chosen = (TASKS, 2) if scenario == "permuted" else (5, 5)
    config = replace(CONFIG, scenario=scenario, arms=("ep",), tasks=count, search=2)
    with watched(idle=True) as runs:
        bench.run(config, numbered, tmp_path, NAME)
    held, own = [*runs.values()][:6], [*runs.values()][6:]
    assert len(own) == 2 and all(len(run.tasks) == chosen for run in held)
    for run in held:
        judged = {*numbers_of(run.tasks.test(t)[0] for t in range(chosen))}
        trained = {*numbers_of(step.x for step in run.steps)}
        assert len(judged) == 160 // 6 and not judged & trained
        assert max(judged | trained) < 160  # test samples begin there
    if scenario == "permuted":
        orders = [{order_of(step.x) for run in some for step in run.steps} for some in (held, own)]
        assert [*map(len, orders)] == [2, 2 * TASKS] and not orders[0] & orders[1]


def test_one_held_out_task_will_do(data, tmp_path):
    rows = bench.run(replace(ALONE, search=1), data, tmp_path, NAME).rows
    assert sum(row["kind"] == "search" for row in rows) == 6


@pytest.mark.parametrize("save", [0, 180])
@pytest.mark.parametrize("arm", bench.ARMS)
def test_run_killed_within_a_task_goes_on(whole, data, tmp_path, monkeypatch, arm, save):
    """Bit for bit, from a checkpoint after every step or from that after the first task alone."""
    monkeypatch.setattr(deep, "_SAVE", save)
    monkeypatch.setattr(deep, "_SHARE", float("inf"))
    config = replace(ALONE, arms=(arm,))
    with killed_at_step(17):  # in the second task, after the first has been consolidated
        bench.run(config, data, tmp_path, NAME)
    with watched() as runs:
        resumed = bench.run(config, data, tmp_path, NAME)
    finished = 16 if save == 0 else 0 if arm == "joint" else UPDATES
    assert [len(run.steps) for run in runs.values()] == [TASKS * UPDATES - finished]
    assert rows_of(resumed, arm) == rows_of(whole[0], arm)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("place", ["consolidate", "_save", "atomic_write"])
@pytest.mark.parametrize("arm", ["ep-ewc", "ep-diagonal", "ep-si"])
def test_run_killed_between_tasks_goes_on(whole, data, tmp_path, arm, place, after):
    """Bit for bit, from where the process has died as it first got there; another is refused."""
    owners = {"consolidate": mep.EPOptimizer, "_save": sequence, "atomic_write": bench}
    config, call = replace(ALONE, arms=(arm,)), getattr(owners[place], place)

    def dying(*args, **kwargs):
        if after:
            call(*args, **kwargs)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owners[place], place, dying)
        bench.run(config, data, tmp_path, NAME)
    with pytest.raises(ValueError, match=r"\.pt is of another run: remove it"):
        bench.run(replace(config, curvature=25), data, tmp_path, NAME)
    with watched() as runs:
        resumed = bench.run(config, data, tmp_path, NAME)
    finished = TASKS if place == "atomic_write" else 1
    assert sum(len(run.steps) for run in runs.values()) == (TASKS - finished) * UPDATES
    assert rows_of(resumed, arm) == rows_of(whole[0], arm)


def test_finished_parts_are_not_done_again(data, tmp_path):
    config = replace(CONFIG, arms=("ep", "ep-ewc"), search=2, tasks=2)

    def again(**changes):
        with watched() as runs:
            rows = bench.run(replace(config, **changes), data, tmp_path, NAME).rows
        return rows, [key[:2] for key in runs]

    first, _ = again()
    assert again() == (first, [])  # times included
    assert again(arms=("ep-ewc",), seeds=(1, 2))[1] == [("ep-ewc", 2)]
    assert again(arms=("ep",), seeds=(0,), search=0, curvature=25)[1] == [("ep", 0)]


def test_parts_of_other_samples_are_not_taken(data, tmp_path):
    bench.run(ALONE, data, tmp_path / "used", NAME)
    fewer = load("digits", None, 80)
    found = [bench.run(ALONE, fewer, tmp_path / name, NAME) for name in ("used", "fresh")]
    assert rows_of(found[0], "ep") == rows_of(found[1], "ep")


SMALL = ("--max-samples", 64, "--tasks", 2, "--epochs", 1, "--width", 6, "--batch", 16,
         "--search", 0, "--arms", "ep,ep-ewc,joint", "--seeds", "4", "--curvature", 16)  # fmt: skip
BAD = {
    "--arms ep,magic": "`arms` must be some of",
    "--arms ep,ep": "`arms` must be",
    "--scenario magic": "`scenario` must be one of",
    "--scenario split-task --tasks 3": "`count` must cut 10 classes",
    "--tasks 1": "`tasks` must be >= 2, got 1",
    "--seeds 0,x": "--seeds must be numbers such as 0,1,2",
    "--search -1": "`search` must be >= 0, got -1",
    "--batch 0": "--batch",
    **{f"--{n} 0": f"`{n}` must be >= 1, got 0" for n in ("epochs", "width", "curvature", "kept")},
}


def test_bench_continual(tmp_path):
    record, output = record_of(tmp_path, "bench", "continual", "digits", *SMALL, "--kept", 7)
    chosen = {"scenario": "permuted", "tasks": 2, "seeds": [4], "epochs": 1, "width": 6, "kept": 7,
              "batch": 16, "search": 0, "curvature": 16, "data": "digits"}  # fmt: skip
    assert chosen.items() <= record.config.items()
    assert [*{row["arm"]: 0 for row in record.rows}] == ["ep", "ep-ewc", "joint"]
    assert (tmp_path / "continual.png").read_bytes().startswith(PNG) and "EP, EWC" in output
    lines = re.findall(r"^\| .*", (tmp_path / "table.txt").read_text(), re.MULTILINE)[1:]
    for entry, line in zip(record.summary["arms"], lines, strict=True):
        assert line.startswith(f"| {bench.ARMS[entry['arm']].label} ")
        assert line.split("|")[4].strip() == f"{100 * entry['accuracy']:.2f} %"


@pytest.mark.parametrize("words", BAD)
def test_nonsense_is_refused(tmp_path, words):
    result = invoke("bench", "continual", "digits", *SMALL, *words.split(), "--out", tmp_path)
    assert result.exit_code == 2 and BAD[words] in result.output, repr(result.exception)
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_task_without_training_samples_is_refused(data, tmp_path):
    def endless(*_):
        raise TimeoutError

    some, before = data.y_train < 8, signal.signal(signal.SIGALRM, endless)
    short = replace(data, x_train=data.x_train[some], y_train=data.y_train[some])
    signal.setitimer(signal.ITIMER_REAL, 3)  # a hundred times what the tasks before it take
    try:
        with pytest.raises(ValueError):
            bench.run(replace(ALONE, scenario="split-class", tasks=5), short, tmp_path, NAME)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
