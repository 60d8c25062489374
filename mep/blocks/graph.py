"""Cutting a recorded graph wherever it narrows to one tensor.

A cut may follow node ``v`` if nothing computed before ``v`` is used after it. Two kinds of value
may cross a cut because they are the same on both sides: constants (parameters read directly) and
the batch size, which every piece can read from its own input.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from mep.blocks.operations import Scale

__all__ = ["Run", "as_module", "faults", "module_of", "runs_of", "works_in_place"]


@dataclass(frozen=True)
class Run:
    """The nodes between two cuts: ``source`` flows in, the last of ``nodes`` flows out."""

    source: fx.Node
    nodes: list[fx.Node]


def faults(graph: fx.Graph) -> list[str]:
    """Lists everything that keeps a recorded graph from being one tensor to one tensor."""
    reasons = []
    inputs = [n.name for n in graph.nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        reasons.append(f"forward takes {len(inputs)} inputs ({', '.join(inputs)}); pass one tensor")
    for node in graph.nodes:
        if not node.users and node.op not in ("placeholder", "output"):
            reasons.append(
                f"`{node.name}` works in place and its result is not used; write `h = ...` instead"
            )
        if node.op == "output" and not isinstance(node.args[0], fx.Node):
            reasons.append("forward returns several values; return the output tensor alone")
        if node.op == "call_function" and "dropout" in getattr(node.target, "__name__", ""):
            reasons.append(
                f"`{node.name}` is a functional dropout, whose mode would be frozen by tracing; "
                "use an nn.Dropout module"
            )
    return reasons


def works_in_place(node: fx.Node, root: nn.Module) -> bool:
    """True if a node changes its input, so that dropping it would change the model."""
    if node.op == "call_module":
        return getattr(root.get_submodule(str(node.target)), "inplace", False)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place_name = name.endswith("_") and not name.endswith("__")
    return in_place_name or node.kwargs.get("inplace") is True or "out" in node.kwargs


def runs_of(graph: fx.Graph) -> list[Run]:
    """Splits the graph's data flow into runs between cuts."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    constant, batch, scalar = _constants(graph), _batch_sizes(graph), _scalars(graph)
    free = constant | batch
    flow = [n for n in graph.nodes if n.op not in ("output",) and n not in free]
    last_use = {n: max((order[u] for u in n.users if u not in batch), default=-1) for n in flow}
    runs: list[Run] = []
    source, nodes, busy_until = None, [], -1
    for node in flow:
        if node.op != "placeholder":
            nodes.append(node)
        if busy_until <= order[node] and node not in scalar and not _is_tuple(node):
            if source is not None:
                runs.append(Run(source, nodes))
            source, nodes = node, []
        busy_until = max(busy_until, last_use[node])
    return runs


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Parameters and buffers read directly, and what is computed from them alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        derived = node.op in ("call_function", "call_method") and all(n in found for n in inputs)
        if node.op == "get_attr" or derived:
            found.add(node)
    return found


def _batch_sizes(graph: fx.Graph) -> set[fx.Node]:
    """``x.size(0)`` and ``x.shape[0]``, with the shape nodes that serve nothing else."""
    sizes = {n for n in graph.nodes if _is_batch_size(n)}
    shapes = {n for n in graph.nodes if _is_shape(n) and n.users and set(n.users) <= sizes}
    return sizes | shapes


def _is_shape(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    as_method = node.target == "size" and len(node.args) == 1
    return as_method or (node.target is getattr and node.args[1:] == ("shape",))


def _is_batch_size(node: fx.Node) -> bool:
    if node.target == "size":
        return node.args[1:] == (0,)
    return node.target is operator.getitem and node.args[1:] == (0,) and _is_shape(node.args[0])


def _scalars(graph: fx.Graph) -> set[fx.Node]:
    """Shapes, dimensions and numbers computed from them: values no cut may fall on."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        reads = _is_shape(node) or node.target in ("size", "dim", "numel") or node.target is getattr
        inputs = node.all_input_nodes
        derived = node.op == "call_function" and inputs and all(n in found for n in inputs)
        if reads or derived:
            found.add(node)
    return found


def _is_tuple(node: fx.Node) -> bool:
    """A module with several outputs: all it is good for is being indexed."""
    users = list(node.users)
    return bool(users) and all(
        u.target is operator.getitem and isinstance(u.args[1], int) for u in users
    )


def as_module(root: nn.Module, run: Run) -> nn.Module:
    """Turns a run into a module: torch's own where it is one, else a graph of its nodes."""
    if len(run.nodes) == 1:
        known = module_of(root, run)
        if known is not None:
            return known
    return fx.GraphModule(root, _subgraph(run), "Subgraph")


def _subgraph(run: Run) -> fx.Graph:
    graph = fx.Graph()
    start = graph.placeholder("s")
    copies: dict[fx.Node, fx.Node] = {run.source: start}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            if _is_batch_size(node):
                copies[node] = graph.call_method("size", (start, 0))
            else:  # a constant, copied with what it is computed from
                copies[node] = graph.node_copy(node, copy)
        return copies[node]

    graph.output(copy(run.nodes[-1]) if len(run.nodes) == 1 else [copy(n) for n in run.nodes][-1])
    graph.lint()
    return graph


# By the function itself, and by name for methods: a user's own `relu` may compute something else.
_ACTIVATIONS: dict[Any, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    torch.relu: nn.ReLU,
    torch.tanh: nn.Tanh,
    torch.sigmoid: nn.Sigmoid,
    F.relu: nn.ReLU,
    F.tanh: nn.Tanh,
    F.sigmoid: nn.Sigmoid,
    F.silu: nn.SiLU,
    F.softplus: nn.Softplus,
    F.elu: nn.ELU,
    F.leaky_relu: nn.LeakyReLU,
    F.hardtanh: nn.Hardtanh,
    F.relu6: nn.ReLU6,
    F.gelu: nn.GELU,
}
_PRODUCTS = (operator.mul, torch.mul, "mul")
_POOLS = {F.max_pool2d: nn.MaxPool2d, F.avg_pool2d: nn.AvgPool2d, torch.max_pool2d: nn.MaxPool2d}


def module_of(root: nn.Module, run: Run) -> nn.Module | None:
    """The module form of a single node, so that its closed form applies."""
    node = run.nodes[0]
    if node.op != "call_module" and node.target in _PRODUCTS and not node.kwargs:
        return _factor(node.args, run.source)
    if not node.args or node.args[0] is not run.source:
        return None
    rest, options = node.args[1:], dict(node.kwargs)
    if node.op == "call_module":
        return None if rest or options else root.get_submodule(str(node.target))
    options.pop("inplace", None)
    if node.target in (torch.flatten, "flatten") and not options and rest == (1,):
        return nn.Flatten()
    reshapes = node.target in (torch.reshape, "view", "reshape")
    if reshapes and len(rest) == 2 and rest[1] == -1:
        return nn.Flatten() if isinstance(rest[0], fx.Node) and _is_batch_size(rest[0]) else None
    if node.target in _POOLS and all(isinstance(r, int) for r in rest):
        return _made(_POOLS[node.target], rest, options)
    kind = _ACTIVATIONS.get(node.target)
    return _made(kind, (), options) if kind is not None and not rest else None


def _factor(operands: tuple[Any, ...], source: fx.Node) -> nn.Module | None:
    """The product of what flows in and a number, on either side."""
    numbers = [a for a in operands if isinstance(a, (int, float))]
    if len(numbers) != 1 or source not in operands:
        return None
    return _made(Scale, tuple(numbers), {})


def _made(kind: type[nn.Module], args: tuple, options: dict[str, Any]) -> nn.Module | None:
    try:
        return kind(*args, **options)
    except (TypeError, ValueError):  # what the module does not take: leave it to autograd
        return None
