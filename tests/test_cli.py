"""The command line: every option has an effect, every mistake a message."""

import re

import pytest
from typer.testing import CliRunner

import mep
from mep.bench import Record
from mep.cli import app, choices
from mep.cli.names import DEFAULTS, MODELS, SETTLERS, STENCILS
from mep.training import load_checkpoint

PNG = b"\x89PNG\r\n"


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def record_of(out, *words):
    result = invoke(*words, "--out", out)
    assert result.exit_code == 0, result.output
    return Record.read(out / "record.json"), result.output


SMALL = ("--max-samples", 96, "--epochs", 1, "--batch-size", 32, "--schedule", "constant")


def trained(out, *words):
    return record_of(out, "train", "digits", *SMALL, *words)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run that every variation is compared with."""
    out = tmp_path_factory.mktemp("plain")
    return trained(out)[0], out


def losses(record):
    return [row["train_loss"] for row in record.rows]


@pytest.fixture
def unplotted(monkeypatch):
    """Drawing takes most of the time of a short run; those that compare numbers go without."""
    monkeypatch.setattr("mep.bench.report.save", lambda figure, path: path)


# Training


def test_train_beside_backprop_leaves_a_complete_record(tmp_path):
    record, output = trained(tmp_path, "--compare", "backprop", "--seeds", "0,1", "--epochs", 2)
    assert record.command.startswith("mep train digits ") and "--compare backprop" in record.command
    assert {
        "test_accuracy", "test_accuracy_std", "residual", "residual_aggregate", "regime", "cosine",
        "c", "backprop_test_accuracy", "backprop_test_accuracy_std", "accuracy_difference",
        "step_time_ratio",
    } <= record.summary.keys()  # fmt: skip
    assert {(row["arm"], row["seed"]) for row in record.rows} == {
        ("EP", 0), ("EP", 1), ("backprop", 0), ("backprop", 1),
    }  # fmt: skip
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert "test accuracy" in (tmp_path / "table.txt").read_text()
    last = " ".join(output.splitlines()[-1:])
    assert re.search(r"EP \(.*c = 0\.05, residual .*\) [\d.]+ %, backprop [\d.]+ %; EP takes", last)


def test_the_defaults_reach_97_percent_on_digits(tmp_path):
    record, _ = record_of(tmp_path, "train", "--compare", "backprop")
    assert record.summary["test_accuracy"] >= 0.97
    assert record.summary["backprop_test_accuracy"] >= 0.97
    assert record.summary["regime"] == "finite nudge"


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (("--model", "cnn"), {"model": "cnn"}),
        (("--model", "hopfield-mlp"), {"cost": "mse", "settler": "fixed-point", "sweeps": 50}),
        (("--model", "hopfield-cnn"), {"cost": "mse", "pool": "stride"}),
        (("--model", "hopfield-cnn3"), {"kernel": 3, "full_size": True}),
        (("--model", "hopfield-cnn3-strided"), {"kernel": [5, 5, 3], "full_size": False}),
        (("--model", "hopfield-cnn", "--readout", "--coupling", 0.4), {"coupling": 0.4}),
        (("--model", "hopfield-resnet13"), {"cost": "mse", "width": 16}),
        (("--model", "looped"), {"cost": "cross_entropy", "settler": "fixed-point"}),
        (("--cost", "mse"), {"cost": "mse"}),
        (("--spectral", 0.5), {"spectral": 0.5, "clip": False}),
        (("--model", "deep-mlp"), {"model": "deep-mlp", "depth": 10}),
        (("--model", "deep-mlp", "--depth", 4), {"depth": 4}),
        (("--optimizer", "backprop"), {"optimizer": "backprop"}),
        (("--settler", "descent", "--settle-steps", 7), {"settler": "descent", "settle_steps": 7}),
        (("--settler", "anderson", "--tol", 1e-9), {"settler": "anderson", "sweeps": 10}),
        (("--settler", "limit"), {"settler": "limit"}),
        (("--tol", 1e-6), {"tol": 1e-6}),
        (("--stencil", "centered"), {"stencil": "centered"}),
        (("--stencil", "five-point"), {"stencil": "five-point"}),
        (("--stencil", "random-sign"), {"stencil": "random-sign"}),
        (("--beta", 0.3), {"beta": 0.3}),
        (("--c", 0.5), {"c": 0.5, "beta": "auto"}),
        (("--batch-size", 48), {"batch_size": 48}),
        (("--lr", 0.2), {"lr": 0.2}),
        (("--momentum", 0.5), {"momentum": 0.5}),
        (("--weight-decay", 0.1), {"weight_decay": 0.1}),
        (("--schedule", "one-cycle"), {"schedule": "one-cycle"}),
        (("--shift", 1), {"shift": 1, "flip": False}),
        (("--flip",), {"flip": True}),
        (("--seeds", "5"), {"seeds": [5]}),
        (("--max-samples", 64), {"max_samples": 64}),
        (("--epochs", 2), {"epochs": 2}),
    ],
    ids=lambda value: "=".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_every_option_of_train_has_an_effect(tmp_path, plain, unplotted, words, setting):
    record, _ = trained(tmp_path, *words)
    assert setting.items() <= record.config.items()
    assert record.config != plain[0].config
    assert losses(record) != losses(plain[0])


def test_seeds_may_join_a_finished_run(tmp_path, plain, unplotted):
    first, _ = trained(tmp_path)
    both, _ = trained(tmp_path, "--seeds", "1,0")
    assert both.rows[1:] == first.rows  # to the last digit of its times: it was not run again
    assert losses(both)[1:] == losses(plain[0]) and both.summary["seeds"] == 2


def test_a_memory_budget_changes_the_plan_and_not_the_result(tmp_path, unplotted):
    words = ("--model", "deep-mlp", "--depth", 8)
    within, _ = trained(tmp_path / "within", *words, "--memory-budget", "300kB")
    plain, _ = trained(tmp_path / "plain", *words, "--sweeps", 1)
    assert within.config == plain.config | {"memory_budget": "300kB"}
    # One update folds the gradient in where the other forms it: rounding, over three steps.
    assert losses(within) == pytest.approx(losses(plain), rel=1e-5)


def test_over_relaxed_rounds_end_near_the_same_equilibrium(tmp_path, unplotted):
    words = ("--model", "hopfield-mlp")
    plain, _ = trained(tmp_path / "plain", *words)
    over, _ = trained(tmp_path / "over", *words, "--omega", 1.2)
    assert over.config == plain.config | {"omega": 1.2}
    assert losses(over) != losses(plain)
    assert losses(over) == pytest.approx(losses(plain), rel=0.02)


def test_a_clipped_spectrum_is_another_than_a_scaled_one(tmp_path, unplotted):
    words = ("--model", "deep-mlp", "--depth", 4, "--spectral", 0.5)
    scaled, _ = trained(tmp_path / "scaled", *words)
    clipped, _ = trained(tmp_path / "clipped", *words, "--clip")
    assert clipped.config == scaled.config | {"clip": True}
    assert losses(clipped) != losses(scaled)


def test_an_output_that_is_read_out_is_no_state(tmp_path):
    words = ("diagnose", "digits", "--batch", 16, "--model", "hopfield-cnn")
    within, _ = record_of(tmp_path / "within", *words)
    outside, _ = record_of(tmp_path / "outside", *words, "--readout")
    assert outside.config == within.config | {"readout": True}
    assert outside.summary["cosine"] != within.summary["cosine"]
    assert min(outside.summary["cosine"], within.summary["cosine"]) > 0.99


def test_plots_name_what_was_asked_for():
    assert choices.described("cnn", {"hidden": 128}) == "cnn"
    assert choices.described("deep-mlp", {"depth": 30}) == "deep-mlp, 30 layers"
    assert choices.described("hopfield-mlp", {"readout": False}) == "hopfield-mlp"
    assert choices.described("hopfield-mlp", {"readout": True}) == "hopfield-mlp, read out"
    weak = {"readout": True, "coupling": 0.4}
    assert choices.described("hopfield-cnn", weak) == "hopfield-cnn, coupling 0.4, read out"
    assert choices.described("hopfield-cnn", {"coupling": 1.0}) == "hopfield-cnn"


@pytest.mark.parametrize("model", ["mlp", "cnn", "cnn3", "cnn3-strided", "resnet13"])
def test_every_hopfield_model_can_be_read_out(model):
    data = mep.data.load("digits")
    for given, readout in ((None, False), (True, True)):
        make, config = choices.network(f"hopfield-{model}", data, None, given, None)
        assert make().readout is config["readout"] is readout


def test_coupling_and_kernels_reach_the_net():
    data = mep.data.load("digits")
    make, config = choices.network("hopfield-cnn3-strided", data, None, True, 0.5)
    net = make().net
    factors = [layer.factor for layer in net if isinstance(layer, mep.models.Scale)]
    assert factors == [0.5, 0.5, 4.0] and config["coupling"] == 0.5
    assert [p.shape[-1] for p in net.parameters() if p.dim() == 4] == [5, 5, 3]


def test_sweeps_bound_the_settling(tmp_path, unplotted):
    for sweeps in (1, 2):
        record, _ = trained(tmp_path / str(sweeps), "--tol", 1e-9, "--sweeps", sweeps)
        assert record.config["sweeps"] == sweeps
        assert [row["sweeps"] for row in record.rows] == [sweeps]


def test_the_same_command_gives_the_same_result(tmp_path, plain):
    assert losses(trained(tmp_path)[0]) == losses(plain[0])


@pytest.mark.parametrize("settler", ["sweep", "limit"])
def test_the_limit_is_named_wherever_it_stands(tmp_path, settler):
    _, output = trained(tmp_path, "--settler", settler, "--compare", "backprop")
    texts = [output, (tmp_path / "table.txt").read_text(), (tmp_path / "record.json").read_text()]
    for text in texts:
        assert ("limit (= backprop)" in text) == (settler == "limit")
    assert ("EP takes" in output) == (settler == "sweep")


def test_resume_and_no_resume(tmp_path, unplotted):
    trained(tmp_path)
    finished = load_checkpoint(tmp_path / "checkpoint-seed0.pt")
    assert finished["epoch"] == 1

    refused = invoke("train", "digits", *SMALL, "--lr", 0.2, "--out", tmp_path)
    assert refused.exit_code == 2
    assert re.search(r"lr: 0\.1 there, 0\.2 here.*--no-resume", refused.output, re.DOTALL)

    again, _ = trained(tmp_path, "--resume")
    assert again.rows == finished["rows"]  # times included: nothing was trained
    fresh, _ = trained(tmp_path, "--lr", 0.2, "--no-resume")
    assert fresh.config["lr"] == 0.2


def test_a_corrupt_checkpoint_is_reported(tmp_path):
    (tmp_path / "checkpoint-seed0.pt").write_bytes(b"not a checkpoint")
    result = invoke("train", "digits", *SMALL, "--out", tmp_path)
    assert result.exit_code == 2
    assert "checkpoint-seed0.pt is corrupt" in result.output.replace("\n", " ")


def test_tensorboard_logs_into_the_folder(tmp_path):
    pytest.importorskip("tensorboard")
    trained(tmp_path, "--tensorboard")
    assert list((tmp_path / "tensorboard" / "seed0").glob("events*"))


def test_data_dir_is_where_the_files_are_looked_for(tmp_path):
    missing = tmp_path / "nowhere"
    result = invoke("train", "mnist", "--data-dir", missing, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "nowhere" in result.output.replace("\n", "")


def test_a_record_holds_no_path(tmp_path):
    trained(tmp_path)
    assert str(tmp_path) not in (tmp_path / "record.json").read_text()


@pytest.mark.filterwarnings("ignore:settling diverged")
def test_a_run_that_diverges_ends_with_a_message(tmp_path):
    result = invoke("train", "digits", *SMALL, "--epochs", 9, "--lr", 1e6, "--beta", 1,
                    "--out", tmp_path)  # fmt: skip
    assert result.exit_code == 1 and "Error: " in result.output
    assert "Traceback" not in result.output


# The other subcommands

MODULE = """
from torch import nn
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
def make():
    return model
number = 3
def broken(x):
    return x
"""

UNTRACEABLE = """
import torch
from torch import nn
class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x
model = Branching()
"""


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(MODULE)
    return path


@pytest.mark.parametrize("name", ["model", "make"])
def test_check_lists_the_blocks(module, name):
    result = invoke("check", f"{module}:{name}")
    assert result.exit_code == 0 and f"{name}: 2 blocks" in result.output
    assert result.output.count("closed form") == 2 and "Tanh" in result.output


def test_check_gives_the_reasons(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(UNTRACEABLE)
    result = invoke("check", f"{path}:model")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert len(result.output.strip()) > 20


def test_diagnose(tmp_path):
    one, output = record_of(tmp_path / "a", "diagnose", "digits", "--batch", 64)
    assert one.summary["regime"] == "finite nudge" and one.config["batch"] == 64
    assert len(one.rows) == 3 and "finite nudge" in output
    assert (tmp_path / "a" / "diagnosis.png").read_bytes().startswith(PNG)
    for words in (("--c", 0.5), ("--seed", 1), ("--stencil", "centered"), ("--model", "cnn"),
                  ("--autocast",)):  # fmt: skip
        other, _ = record_of(tmp_path / "b", "diagnose", "digits", "--batch", 64, *words)
        assert other.config != one.config and other.rows != one.rows


def test_diagnose_takes_the_weights_of_a_checkpoint(tmp_path, plain):
    record, out = plain
    found, _ = record_of(
        tmp_path, "diagnose", "digits", "--batch", 96, "--checkpoint", out / "checkpoint-seed0.pt"
    )
    assert found.config["trained"]
    # Training ends with this very diagnosis.
    assert found.summary["cosine"] == pytest.approx(record.summary["cosine"], abs=1e-6)


def test_settle_an_equilibrium_net(tmp_path):
    words = ("settle", "digits", "--model", "hopfield-mlp", "--sweeps", 4, "--settle-steps", 6)
    record, _ = record_of(tmp_path, *words)
    steps = {entry["settler"]: entry["steps"] for entry in record.summary["settlers"]}
    orders = ("alternating", "synchronous", "forward", "backward", "anderson")
    assert steps == {**dict.fromkeys(orders, 4), "descent": 6}


def test_settle(tmp_path):
    words = ("settle", "digits", "--depth", 3, "--batch", 32)
    one, _ = record_of(tmp_path / "a", *words, "--sweeps", 4, "--settle-steps", 6)
    assert (tmp_path / "a" / "settling.png").read_bytes().startswith(PNG)
    steps = {entry["settler"]: entry["steps"] for entry in one.summary["settlers"]}
    assert steps == {"sweep": 4, "descent": 6}
    for extra in (("--c", 0.5), ("--beta", 0.5), ("--seed", 1), ("--model", "cnn")):
        used = [word for word in words if extra[0] != "--model" or word not in ("--depth", 3)]
        other, _ = record_of(tmp_path / "b", *used, *extra)
        assert other.config != one.config and other.rows[1] != one.rows[1]


def test_bench_speed(tmp_path):
    words = ("--depths", "2,3", "--widths", 8, "--batches", 4, "--rounds", 2, "--warmup", 0)
    record, output = record_of(tmp_path, "bench", "speed", *words, "--c", 0.2, "--sweeps", 2)
    assert record.command == (
        "mep bench speed --depths 2,3 --widths 8 --batches 4 --rounds 2 --warmup 0 --sweeps 2 "
        "--c 0.2"
    )
    assert len(record.rows) == 2 * 2 * 5 and "limit (= backprop)" in output
    ours = next(entry for entry in record.summary["arms"] if entry["arm"] == "EP")
    assert ours["c"] == pytest.approx(0.2)
    assert (tmp_path / "speed.png").read_bytes().startswith(PNG)


def test_bench_fisher(tmp_path):
    words = ("--rounds", 1, "--warmup", 0, "--batch", 4)
    record, output = record_of(tmp_path, "bench", "fisher", *words)
    assert len(record.rows) == 3 * 3 and "Kronecker factors" in output
    assert all(e["ratio"] == 1 for e in record.summary["arms"] if e["arm"] == "contrast")
    assert (tmp_path / "fisher.png").read_bytes().startswith(PNG)


def test_bench_memory(tmp_path, monkeypatch):
    # Processes of their own are for resident sets.
    monkeypatch.setattr("mep.bench.memory._in_a_process", lambda work: work())
    words = ("--depths", "12", "--budgets", "64kB", "--width", 8, "--batch", 4, "--rounds", 0)
    record, output = record_of(tmp_path, "bench", "memory", *words, "--capped", 0)
    assert [row["arm"] for row in record.rows][-1] == "EP within 64kB" in output
    assert record.config["budgets"] == ["64kB"] and record.config["capped"] == 0
    assert (tmp_path / "memory.png").read_bytes().startswith(PNG)


def test_bench_depth(tmp_path):
    words = ("--arms", "ep,identity", "--depths", 6, "--steps", 3, "--width", 8, "--batch", 16)
    more = ("--seeds", "1", "--lr", 0.2, "--warmup", 1, "--memory", "1MB", "--c", 0.2)
    record, _ = record_of(tmp_path, "bench", "depth", "digits", *words, *more)
    chosen = {"width": 8, "batch": 16, "lr": 0.2, "warmup": 1, "memory": "1MB", "c": 0.2}
    assert chosen.items() <= record.config.items() and record.config["seeds"] == [1]
    assert {row["arm"] for row in record.rows} == {"ep", "identity"}
    assert (tmp_path / "depth.png").read_bytes().startswith(PNG)


# Mistakes


def test_a_budget_that_is_too_small_is_a_message(tmp_path):
    result = invoke("train", "digits", *SMALL, "--memory-budget", "1kB", "--out", tmp_path)
    assert result.exit_code == 2 and "the least that works" in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "cifar"), "DATASET must be one of digits, mnist, fashion-mnist; got 'cifar'"),
        (("train", "--model", "rnn"), "--model must be one of mlp, cnn, deep-mlp, hopfield-mlp"),
        (("train", "--model", "looped", "--settler", "sweep"), "does not settle mep.Hopfield"),
        (("train", "--settler", "fixed-point"), "does not settle mep.PredictionError"),
        (("train", "--cost", "magic"), "--cost must be one of cross_entropy, mse"),
        (("train", "--optimizer", "adam"), "--optimizer must be one of ep, backprop"),
        (("train", "--compare", "adam"), "--compare must be one of backprop"),
        (("train", "--settler", "magic"), "--settler must be one of"),
        (("train", "--stencil", "magic"), "--stencil must be one of"),
        (("train", "--schedule", "magic"), "`schedule` must be one of"),
        (("train", "--beta", "strong"), "--beta must be auto or a number; got 'strong'"),
        (("train", "--beta", "-1"), "`beta` must be a finite number > 0"),
        (("train", "--beta", "0.5", "--c", "0.1"), "--c has no effect with an explicit --beta"),
        (("train", "--c", "0"), "must be a finite number > 0, got 0"),
        (("train", "--seeds", "0,x"), "--seeds must be numbers such as 0,1,2"),
        (("train", "--seeds", "1,1"), "--seeds must be different numbers >= 0"),
        (("train", "--epochs", "0"), "`epochs` must be >= 1, got 0"),
        (("train", "--batch-size", "0"), "`batch_size` must be >= 1, got 0"),
        (("train", "--lr", "-1"), "lr"),
        (("train", "--depth", "5"), "--depth has no effect with --model mlp"),
        (("train", "--clip"), "--clip has no effect with no --spectral"),
        (("train", "--readout"), "--readout has no effect with --model mlp"),
        (("train", "--coupling", "2"), "--coupling has no effect with --model mlp"),
        (("train", "--model", "hopfield-cnn", "--coupling", "0.4"), "needs `readout`"),
        (("train", "--omega", "1.2"), "--omega has no effect with --settler sweep"),
        (("train", "--settle-steps", "5"), "--settle-steps has no effect with --settler sweep"),
        (("train", "--settler", "limit", "--c", "1"), "--c has no effect with --settler limit"),
        (("train", "--settler", "limit", "--tol", "1"), "--tol has no effect with --settler limit"),
        (("train", "--optimizer", "backprop", "--c", "1"), "--c has no effect with --optimizer"),
        (("train", "--optimizer", "backprop", "--compare", "backprop"), "--compare has no effect"),
        (("train", "--optimizer", "backprop", "--memory-budget", "1MB"), "--memory-budget has no"),
        (("train", "--memory-budget", "lots"), "`memory_budget` must be a size such as '4MB'"),
        (("bench", "depth", "digits", "--arms", "magic"), "`arms` must be some of"),
        (("bench", "memory", "--budgets", "lots"), "`budgets` must be a size"),
        (("train", "--device", "abacus"), "--device abacus cannot be used"),
        (("diagnose", "--checkpoint", "none.pt"), "no checkpoint at none.pt"),
        (("bench", "speed", "--depths", "1"), "`depths` must be"),
        (("bench", "speed", "--rounds", "0"), "`rounds` must be >= 1"),
        (("check", "model.py"), "must be given as PATH.py:NAME"),
        (("check", "none.py:model"), "there is no Python file none.py"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_mistakes_get_a_message_and_exit_code_2(tmp_path, words, message):
    out = () if words[0] == "check" else ("--out", str(tmp_path))
    result = invoke(*words, *out)
    assert result.exit_code == 2
    assert message in result.output and "Traceback" not in result.output
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize("words", [("train", "--nonsense"), ("train", "--depth", "x"), ("fly",)])
def test_unknown_options_and_commands(words):
    result = invoke(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "defines no 'absent'"), ("number", "must be or return a torch module, got 3"),
     ("broken", "broken")],
)  # fmt: skip
def test_check_refuses_what_is_no_model(module, name, message):
    result = invoke("check", f"{module}:{name}")
    assert result.exit_code == 2 and message in result.output


def test_check_reports_a_file_that_fails(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text("import nothing_of_this_name")
    result = invoke("check", f"{path}:model")
    assert result.exit_code == 2 and "ModuleNotFoundError" in result.output


def test_a_checkpoint_of_another_model_is_refused(tmp_path, plain):
    checkpoint = plain[1] / "checkpoint-seed0.pt"
    result = invoke(
        "diagnose", "--model", "cnn", "--checkpoint", checkpoint, "--out", tmp_path / "out"
    )
    assert result.exit_code == 2 and "holds another model" in result.output


def test_a_checkpoint_of_another_coupling_is_refused(tmp_path, unplotted):
    words = ("--model", "hopfield-cnn", "--readout", "--coupling")
    trained(tmp_path / "run", *words, 0.4)
    checkpoint = ("diagnose", "--checkpoint", tmp_path / "run" / "checkpoint-seed0.pt")
    result = invoke(*checkpoint, *words, 0.6, "--batch", 8, "--out", tmp_path / "other")
    assert (
        result.exit_code == 2 and "trained with coupling 0.4, and here it is 0.6" in result.output
    )
    result = invoke(*checkpoint, *words, 0.4, "--batch", 8, "--out", tmp_path / "same")
    assert result.exit_code == 0


def test_the_name_tables_are_complete():
    assert tuple(DEFAULTS) == mep.data.names()
    assert set(MODELS) == {
        "mlp", "cnn", "deep-mlp", "hopfield-mlp", "hopfield-cnn", "hopfield-cnn3",
        "hopfield-cnn3-strided", "hopfield-resnet13", "looped",
    }  # fmt: skip
    assert set(SETTLERS) == {"sweep", "descent", "anderson", "limit", "fixed-point"}
    assert set(STENCILS) == {"one-sided", "centered", "five-point", "random-sign"}
