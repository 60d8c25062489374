"""From a model to its pieces: the smallest parts between which a single tensor flows.

A nested ``nn.Sequential`` is read off directly. Any other module is recorded by ``torch.fx`` and
cut wherever the graph narrows to one tensor, so a residual or attention block is one piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import fx, nn

from mep.blocks.graph import Run, as_module, faults, runs_of, works_in_place

__all__ = ["Piece", "pieces_of"]


@dataclass(frozen=True)
class Piece:
    """A part of a model with one tensor in and one tensor out."""

    name: str
    module: nn.Module


def pieces_of(model: nn.Module, path: str = "") -> tuple[list[Piece], list[str]]:
    """Cuts a model into pieces.

    Args:
        model: a module whose forward takes one tensor and returns one tensor.
        path: where the module stands in the whole model, as a prefix for names.

    Returns:
        The pieces in the order in which they are applied, and the reasons why parts could not be
        cut (empty if all could).
    """
    name = path.rstrip(".") or type(model).__name__
    if _has_hooks(model):
        return [], [f"`{name}` has forward hooks, which cutting would skip; remove them"]
    if type(model) is nn.Sequential:
        return _read_off(model, path)
    if _is_leaf(model):
        return [Piece(name, model)], []
    graph, reason = _record(model)
    if graph is None:
        return [], [f"`{name}`: {reason}"]
    reasons = [f"`{name}`: {r}" for r in faults(graph)]
    if reasons:
        return [], reasons
    return [Piece(path + _name(run), as_module(model, run)) for run in runs_of(graph)], []


def _read_off(model: nn.Sequential, path: str) -> tuple[list[Piece], list[str]]:
    pieces: list[Piece] = []
    reasons: list[str] = []
    for key, child in model._modules.items():
        if child is None:
            continue
        if _stays_whole(child):
            pieces.append(Piece(path + key, child))
            continue
        more, why = pieces_of(child, f"{path}{key}.")
        pieces += more
        reasons += why
    return pieces, reasons


def _name(run: Run) -> str:
    """A run is called by its last module with parameters, else by its last node."""
    modules = [str(n.target) for n in run.nodes if n.op == "call_module"]
    return modules[-1] if modules else run.nodes[-1].name


def _has_hooks(module: nn.Module) -> bool:
    """A hooked module must be called as a whole, or its hooks would be skipped."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_leaf(module: nn.Module) -> bool:
    """Torch's own modules and hooked ones stay whole."""
    if _has_hooks(module):
        return True
    return type(module) is not nn.Sequential and type(module).__module__.startswith("torch.nn")


def _stays_whole(module: nn.Module) -> bool:
    """Inside a model, a module whose forward cannot be recorded becomes one block as well."""
    if _is_leaf(module) or type(module) is nn.Sequential:
        return _is_leaf(module)
    return _record(module)[0] is None


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[list[str]]:
    """Undoes what happens to buffers; the list that it yields names those, afterwards."""
    known = [
        (f"{path}.{name}".lstrip("."), module._buffers, name, b, b._version, b.clone())
        for path, module in model.named_modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for path, home, name, b, version, value in known:
            if home.get(name) is not b or b._version != version:
                changed.append(f"`{path}`")
                home[name] = b
                b.data.copy_(value)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _stays_whole(m)


def _record(model: nn.Module) -> tuple[fx.Graph | None, str]:
    """Returns the graph of a module's forward, or None and what to do about it."""
    try:
        with _buffers_kept(model) as changed:
            graph = _Tracer().trace(model)
        if changed:
            return None, (
                f"forward changes {', '.join(changed)}, which a recording would do once and for "
                "all; move that into a submodule, which then becomes one block"
            )
        # A value that is never used (`out, _ = attend(...)`) must not keep a cut from closing.
        ends = ("placeholder", "output")
        graph.eliminate_dead_code(lambda n: n.op in ends or works_in_place(n, model))
        return graph, ""
    except Exception as error:  # the user's forward runs on proxies: anything may be raised
        return None, (
            f"forward cannot be recorded ({error}); write it as an nn.Sequential, or move what "
            "depends on the data into a submodule, which then becomes one block"
        )
