"""The training loop: fairness, random streams, checkpoints, resume."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import mep
from mep.training import (
    Arm,
    CheckpointError,
    Checkpointing,
    Observer,
    ProgressBar,
    TensorBoard,
    TrainingConfig,
    accuracy,
    atomic_write,
    fit,
    load_checkpoint,
)
from mep.training.loop import permutation

CONFIG = TrainingConfig(epochs=2, batch_size=32)  # 4 steps per epoch on 100 samples
STEPS = 4


@pytest.fixture(scope="module")
def data():
    digits = mep.data.load("digits")
    return dataclasses.replace(
        digits,
        x_train=digits.x_train[:100],
        y_train=digits.y_train[:100],
        x_test=digits.x_test[:60],
        y_test=digits.y_test[:60],
    )


def network(dropout=0.3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 10)
        )


def ep_arm(name="EP", **options):
    model = network()
    numbers = {"lr": 0.1, "momentum": 0.9, **options}
    return Arm(name, model, mep.EPOptimizer(model.parameters(), model=model, **numbers))


def backprop_arm(name="backprop", lr=0.1):
    model = network()
    optimizer = mep.EPOptimizer(
        model.parameters(), model=model, mode="backprop", lr=lr, momentum=0.9
    )
    return Arm(name, model, optimizer)


class Recording(torch.optim.SGD):
    """Stands in for an EPOptimizer: notes what it is given, and when."""

    last, skipped = None, 0

    def __init__(self, model, name, journal):
        super().__init__(model.parameters(), lr=0.1)
        self.name, self.journal = name, journal

    def step(self, closure=None, *, x=None, target=None):
        self.journal.append((self.name, x.clone(), target.clone()))
        return torch.tensor(1.0)


def recording_arms(names):
    journal = []
    models = {name: network() for name in names}
    return [Arm(n, m, Recording(m, n, journal)) for n, m in models.items()], journal


class KillAt(Observer):
    """Ends the run as a kill would, after so many steps or epochs."""

    def __init__(self, step=None, epoch_step=None):
        self.at_step, self.at_epoch = step, epoch_step

    def step(self, step, values):
        if step == self.at_step:
            raise KeyboardInterrupt

    def epoch(self, step, rows):
        if step == self.at_epoch:
            raise KeyboardInterrupt


def timeless(rows):
    return [{key: value for key, value in row.items() if key != "step_ms"} for row in rows]


def same(one, other):
    """Equal bit for bit, through any nesting."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_arms(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert same(one.model.state_dict(), other.model.state_dict())
        assert same(one.optimizer.state_dict(), other.optimizer.state_dict())


# Fairness


def test_every_arm_gets_the_same_batches_in_the_same_order(data):
    arms, journal = recording_arms(["a", "b"])
    fit(arms, data, CONFIG)
    given = {n: [(x, y) for name, x, y in journal if name == n] for n in ("a", "b")}
    assert len(given["a"]) == len(given["b"]) == 2 * STEPS
    for (x1, y1), (x2, y2) in zip(given["a"], given["b"], strict=True):
        assert torch.equal(x1, x2) and torch.equal(y1, y2)


def test_an_epoch_is_a_permutation_of_the_training_set(data):
    arms, journal = recording_arms(["a"])
    fit(arms, data, CONFIG)
    order = permutation(100, CONFIG.seed, 0)
    assert order.sort().values.tolist() == list(range(100))
    assert torch.equal(torch.cat([x for _, x, _ in journal[:STEPS]]), data.x_train[order])
    assert not torch.equal(order, permutation(100, CONFIG.seed, 1))
    assert not torch.equal(permutation(100, 1, 0), permutation(100, 0, 1))


def test_the_arm_that_goes_first_changes(data):
    arms, journal = recording_arms(["a", "b", "c"])
    fit(arms, data, CONFIG)
    names = [name for name, _, _ in journal]
    assert names[:9] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_arms_do_not_disturb_each_other(data):
    alone = fit([ep_arm()], data, CONFIG)
    together = fit([backprop_arm(), ep_arm()], data, CONFIG)
    assert timeless(alone) == timeless([row for row in together if row["arm"] == "EP"])


def test_the_global_random_stream_is_left_alone(data):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fit([backprop_arm()], data, CONFIG)
    assert torch.equal(torch.rand(4), expected)


def test_rows(data):
    rows = fit([ep_arm(), backprop_arm()], data, CONFIG)
    assert [(row["arm"], row["epoch"]) for row in rows] == [
        ("EP", 1), ("backprop", 1), ("EP", 2), ("backprop", 2),
    ]  # fmt: skip
    for row in rows:
        assert set(row) == {
            "arm", "seed", "epoch", "train_loss", "test_accuracy", "residual",
            "residual_aggregate", "sweeps", "skipped", "step_ms",
        }  # fmt: skip
        assert 0 <= row["test_accuracy"] <= 1 and row["step_ms"] > 0
        assert (row["residual"] is None) == (row["arm"] == "backprop")
    assert rows[2]["train_loss"] < rows[0]["train_loss"]


def test_the_seed_changes_order_and_dropout(data):
    losses = [
        fit([backprop_arm()], data, dataclasses.replace(CONFIG, seed=seed))[0]["train_loss"]
        for seed in (0, 1)
    ]
    assert losses[0] != losses[1]


class Rates(Observer):
    """Notes the learning rate after every step."""

    def __init__(self, arm):
        self.arm, self.rates = arm, []

    def step(self, step, values):
        self.rates.append(self.arm.optimizer.param_groups[0]["lr"])


def test_the_schedule_shapes_the_learning_rate(data):
    arm = backprop_arm()
    config = dataclasses.replace(CONFIG, epochs=6, schedule="one-cycle")
    watched = Rates(arm)
    fit([arm], data, config, observers=[watched])
    assert max(watched.rates) == pytest.approx(0.1, rel=0.05)
    assert watched.rates[0] < 0.02 and watched.rates[-2] < 0.01
    assert "max_lr" not in arm.optimizer.param_groups[0]
    assert arm.optimizer.param_groups[0]["lr"] == 0.1  # its own again, for a further run

    watched = Rates(arm)
    fit([arm], data, dataclasses.replace(CONFIG, schedule="constant"), observers=[watched])
    assert set(watched.rates) == {0.1}


def test_a_given_scheduler_is_stepped_after_every_batch(data):
    arm = backprop_arm()
    arm.scheduler = torch.optim.lr_scheduler.ExponentialLR(arm.optimizer, 0.5)
    fit([arm], data, CONFIG)
    assert arm.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** (2 * STEPS))


# Resume


@pytest.mark.parametrize("schedule", ["one-cycle", "constant"])
@pytest.mark.parametrize(
    ("kill", "every"),
    [
        (KillAt(step=2), 0.0),  # within the first epoch, just saved
        (KillAt(step=6), 0.0),  # within the second
        (KillAt(step=6), 1e9),  # within the second, saved at the end of the first
        (KillAt(step=2), 1e9),  # before anything was saved
        (KillAt(epoch_step=STEPS), 0.0),  # between the epochs
    ],
)
def test_a_resumed_run_equals_the_unbroken_one(data, tmp_path, kill, every, schedule):
    config = dataclasses.replace(CONFIG, schedule=schedule, shift=1, flip=True)

    def arms():
        drawing = ep_arm("random sign", stencil=mep.random_sign(), beta=0.5)
        return [ep_arm(), backprop_arm(), drawing]

    unbroken = arms()
    expected = fit(unbroken, data, config)

    saving = Checkpointing(tmp_path / "run.pt", every=every)
    with pytest.raises(KeyboardInterrupt):
        fit(arms(), data, config, checkpointing=saving, observers=[kill])
    torch.manual_seed(99)  # a new process has another global stream
    resumed = arms()
    rows = fit(resumed, data, config, checkpointing=saving)

    assert timeless(rows) == timeless(expected)
    assert_same_arms(resumed, unbroken)


def test_a_finished_run_is_not_trained_again(data, tmp_path):
    saving = Checkpointing(tmp_path / "run.pt")
    first, again = backprop_arm(), backprop_arm()
    rows = fit([first], data, CONFIG, checkpointing=saving)
    assert fit([again], data, CONFIG, checkpointing=saving, observers=[KillAt(step=1)]) == rows
    assert_same_arms([first], [again])


def test_without_resume_the_checkpoint_is_overwritten(data, tmp_path):
    path = tmp_path / "run.pt"
    path.write_bytes(b"anything")
    fit([backprop_arm()], data, CONFIG, checkpointing=Checkpointing(path, resume=False))
    assert load_checkpoint(path)["epoch"] == CONFIG.epochs


def test_checkpoints_are_plain_and_alone_in_their_folder(data, tmp_path):
    path = tmp_path / "run.pt"
    fit([ep_arm()], data, CONFIG, checkpointing=Checkpointing(path, every=0))
    payload = torch.load(path, weights_only=True)
    assert set(payload["arms"]) == {"EP"}
    assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]


# Unusable checkpoints


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def _flip(path):
    content = bytearray(path.read_bytes())
    at = bytes(content).index(b"data/0") + 200  # within the first stored tensor
    content[at] ^= 1
    path.write_bytes(content)


def _empty(path):
    path.write_bytes(b"")


def _text(path):
    path.write_text("not a checkpoint")


def _other_content(path):
    torch.save({"model": {}}, path)


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, _text, _other_content])
def test_a_damaged_checkpoint_is_refused_and_nothing_changes(data, tmp_path, damage):
    path = tmp_path / "run.pt"
    fit([ep_arm()], data, CONFIG, checkpointing=Checkpointing(path))
    damage(path)
    content = path.read_bytes()
    arm, untouched = ep_arm(), ep_arm()
    with pytest.raises(CheckpointError, match=r"run\.pt .*Nothing was changed.*--no-resume"):
        fit([arm], data, dataclasses.replace(CONFIG, schedule="constant"),
            checkpointing=Checkpointing(path))  # fmt: skip
    assert path.read_bytes() == content
    assert_same_arms([arm], [untouched])


@pytest.mark.parametrize(
    ("arms", "config", "identity", "named"),
    [
        ([backprop_arm], {"epochs": 3}, {}, r"training\.epochs: 2 there, 3 here"),
        ([backprop_arm], {"seed": 1}, {}, r"training\.seed: 0 there, 1 here"),
        ([backprop_arm], {}, {"c": 0.1}, r"settings\.c: None there, 0\.1 here"),
        ([ep_arm], {}, {}, r"arms\.EP"),
        ([backprop_arm, ep_arm], {}, {}, r"arms\.EP"),
        ([lambda: backprop_arm(lr=0.2)], {}, {}, r"groups\.0\.\w*lr"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    data, tmp_path, arms, config, identity, named
):
    path = tmp_path / "run.pt"
    fit([backprop_arm()], data, CONFIG, checkpointing=Checkpointing(path))
    saving = Checkpointing(path, identity=identity)
    with pytest.raises(CheckpointError, match=f"another configuration.*{named}"):
        fit([make() for make in arms], data, dataclasses.replace(CONFIG, **config),
            checkpointing=saving)  # fmt: skip


def test_a_state_that_does_not_load_is_rolled_back(data, tmp_path):
    path = tmp_path / "run.pt"
    fit([ep_arm(), backprop_arm()], data, CONFIG, checkpointing=Checkpointing(path))
    payload = torch.load(path, weights_only=True)
    del payload["arms"]["backprop"]["optimizer"]["param_groups"]
    torch.save(payload, path)
    arms, untouched = [ep_arm(), backprop_arm()], [ep_arm(), backprop_arm()]
    with pytest.raises(CheckpointError, match="does not fit the arms"):
        fit(arms, data, CONFIG, checkpointing=Checkpointing(path))
    assert_same_arms(arms, untouched)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*none\.pt"):
        load_checkpoint(tmp_path / "none.pt")


# Atomic writing


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = atomic_write(tmp_path / "folder" / "file", lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_bytes() == b"old"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_a_failed_save_keeps_the_old_checkpoint(data, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    saving = Checkpointing(path, every=0)
    with pytest.raises(KeyboardInterrupt):
        fit([ep_arm()], data, CONFIG, checkpointing=saving, observers=[KillAt(step=3)])
    content = path.read_bytes()

    def half_save(payload, file):
        file.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(torch, "save", half_save)
        fit([ep_arm()], data, CONFIG, checkpointing=saving)
    assert path.read_bytes() == content
    assert timeless(fit([ep_arm()], data, CONFIG, checkpointing=saving)) == timeless(
        fit([ep_arm()], data, CONFIG)
    )


# Evaluation and observers


def test_accuracy_restores_the_mode_of_every_module(data):
    model = network()
    model.train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    whole = accuracy(model, data.x_test, data.y_test)
    assert [module.training for module in model.modules()] == modes
    # In evaluation mode dropout is off, so the answer neither varies nor depends on the batches.
    assert accuracy(model, data.x_test, data.y_test, batch_size=7) == whole
    expected = (model.eval()(data.x_test).argmax(1) == data.y_test).float().mean().item()
    assert whole == pytest.approx(expected)


def test_tensorboard_writes_events(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit([ep_arm()], data, CONFIG, observers=[TensorBoard(tmp_path)])
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("step/loss/EP")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("epoch/test_accuracy/EP")] == [4, 8]


def test_tensorboard_names_its_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"mep-torch\[tensorboard\]"):
        TensorBoard(tmp_path)


def test_the_progress_bar_shows_loss_accuracy_and_residual(data):
    bar = ProgressBar("digits")
    fit([ep_arm(), backprop_arm()], data, CONFIG, observers=[bar])
    task = bar.bar.tasks[0]
    assert (task.completed, task.total) == (2 * STEPS, 2 * STEPS)
    ours, theirs = task.fields["values"].split(" | ")
    assert ours.startswith("EP: loss ") and " acc " in ours and " res " in ours
    assert theirs.startswith("backprop: loss ") and " res " not in theirs


# Bad input


def test_every_arm_meets_the_same_changed_images_in_every_epoch_anew(data):
    seen = {}

    def watching(name):
        arm = backprop_arm(name)
        met = seen.setdefault(name, [])
        arm.model.register_forward_pre_hook(
            lambda model, inputs: met.append(inputs[0].clone()) if model.training else None
        )
        return arm

    fit([watching("one"), watching("other")], data, dataclasses.replace(CONFIG, shift=1, flip=True))
    one, other = seen["one"], seen["other"]
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(torch.cat(one[:STEPS]), torch.cat(one[STEPS:]))
    fit([watching("plain")], data, CONFIG)
    assert not torch.equal(seen["plain"][0], one[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": -1}, "`shift` must be >= 0, got -1"),
        ({"epochs": 0}, "`epochs` must be >= 1, got 0"),
        ({"batch_size": 0}, "`batch_size` must be >= 1, got 0"),
        ({"eval_batch_size": -1}, "`eval_batch_size` must be >= 1, got -1"),
        ({"schedule": "cosine"}, "`schedule` must be one of"),
        ({"seed": -1}, "`seed` must be >= 0, got -1"),
    ],
)
def test_bad_configuration(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)


def test_bad_arguments(data):
    with pytest.raises(ValueError, match="different names, got"):
        fit([], data, CONFIG)
    with pytest.raises(ValueError, match="different names, got"):
        fit([backprop_arm(), backprop_arm()], data, CONFIG)
    with pytest.raises(ValueError, match="nothing to train on"):
        fit([backprop_arm()], dataclasses.replace(data, x_train=data.x_train[:0]), CONFIG)
    with pytest.raises(ValueError, match="must be >= 0, got -1"):
        Checkpointing(Path("run.pt"), every=-1)
    with pytest.raises(ValueError, match="at least one sample"):
        accuracy(network(), data.x_test[:0], data.y_test[:0])
