"""The command line: `mep train`, `check`, `diagnose`, `settle`, `profile` and `bench`."""

from __future__ import annotations

import typer

from mep.cli import bench, check, diagnose, profile, settle, train

__all__ = ["app", "main"]

app = typer.Typer(
    name="mep",
    help="Equilibrium Propagation for PyTorch: train, inspect, measure.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command("train")(train.train)
app.command("check")(check.check)
app.command("diagnose")(diagnose.diagnose)
app.command("settle")(settle.settle)
app.command("profile")(profile.profile)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point of the command ``mep``."""
    app(prog_name="mep")
