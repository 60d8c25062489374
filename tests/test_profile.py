"""Where a step's time is said to go."""

import time

import pytest
import torch
from torch import nn

import mep
from mep.bench import profiling, publish
from mep.memory import phase


def test_time_goes_to_the_innermost_phase_and_its_operation():
    a = torch.randn(400, 400)

    def step():
        with phase("mep: settle"):
            torch.mm(a, a)
            with phase("mep: contrast"):
                time.sleep(0.02)
        a.exp()

    found = profiling.run(step, 3, {"label": "a step"}, "mep profile", warmup=1)
    spent = {(row["phase"], row["operation"]): row["ms"] for row in found.rows}
    assert spent["contrast", "Python and kernels"] >= 20
    assert ("settle", "aten::mm") in spent and ("the rest", "aten::exp") in spent
    assert ("contrast", "aten::mm") not in spent
    shares = [entry["share"] for entry in found.summary["phases"]]
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)


def test_a_step_of_the_optimizer(tmp_path):
    model = mep.models.mlp(6, [5, 5, 5], 3, nn.Tanh)
    optimizer = mep.EPOptimizer(model.parameters(), model=model, lr=0.1)
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    with mep.kernels.eager():  # compiled calls learn while they form the contrast
        found = profiling.run(
            lambda: optimizer.step(x=x, target=y), 2, {"label": "ep"}, "mep profile"
        )
    phases = {entry["phase"] for entry in found.summary["phases"]}
    assert phases == {"settle", "contrast", "update", "the rest"}
    assert any(r["phase"] == "settle" and r["operation"] == "aten::mm" for r in found.rows)
    publish(tmp_path, found, profiling.table(found), profiling.plot(found), "profile.png")
    assert "settle" in (tmp_path / "table.txt").read_text()


def test_compiled_calls_have_names():
    pytest.importorskip("numba")
    model = mep.models.mlp(6, [5, 5, 5], 3, nn.Tanh)
    optimizer = mep.EPOptimizer(
        model.parameters(), model=model, lr=0.1, momentum=0.9, settler=mep.Sweep(1, tol=1.0)
    )
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    found = profiling.run(lambda: optimizer.step(x=x, target=y), 2, {"label": "ep"}, "mep profile")
    named = {(r["phase"], r["operation"]) for r in found.rows if "compiled" in r["operation"]}
    assert named == {("settle", "compiled sweep"), ("update", "compiled learn")}
