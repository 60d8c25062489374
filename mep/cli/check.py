"""``mep check``: can this model be trained by EP, and how is it cut?"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import nn

import mep
from mep.bench import Table
from mep.cli import choices

__all__ = ["check"]


def check(
    target: Annotated[
        str, typer.Argument(metavar="PATH.py:NAME", help="A module, or what returns one.")
    ],
) -> None:
    """Show the blocks of a model, or every reason why it cannot be traced (exit code 1)."""
    with choices.usage():
        model = _model(target)
    try:
        chain = mep.trace(model)
    except mep.TraceError as error:
        typer.secho(str(error), err=True)
        raise typer.Exit(1) from error
    rows = [[block.name, block.kind, block.describe()] for block in chain]
    console = Console()
    console.print(f"{target.rpartition(':')[2]}: {len(chain)} blocks", style="bold")
    console.print(Table("", ("block", "kind", "computes"), rows).rich())


def _model(target: str) -> nn.Module:
    path, _, name = target.rpartition(":")
    if not path or not name:
        raise ValueError(f"the model must be given as PATH.py:NAME, got {target!r}.")
    found: Any = vars(_run(Path(path)))
    if name not in found:
        raise ValueError(f"{path} defines no {name!r}.")
    model = found[name]
    if not isinstance(model, nn.Module) and callable(model):
        with _blamed(f"{name}() in {path}"):
            model = model()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} in {path} must be or return a torch module, got {model!r}.")
    return model


@contextmanager
def _blamed(culprit: str) -> Iterator[None]:
    """What goes wrong in the user's own code is reported with its place."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{culprit} fails: {type(error).__name__}: {error}") from error


def _run(path: Path) -> Any:
    """The Python file as a module."""
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"there is no Python file {path}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # it is a Python file
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))  # its neighbours, as when Python runs the file
    try:
        with _blamed(str(path)):
            spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module
