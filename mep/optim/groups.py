"""A model's parameters: their names and roles, and groups that carry the depth rule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mep.contrast import chain_of
from mep.updates import Role

__all__ = ["check_own", "param_groups", "roles"]

_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def check_own(model: nn.Module | None, parameters: list[Any]) -> None:
    """Refuses parameters that are not the model's.

    Raises:
        ValueError: with their number.
    """
    own = {id(p) for p in model.parameters()} if model is not None else None
    foreign = sum(id(p) not in own for p in parameters) if own is not None else 0
    if foreign:
        raise ValueError(
            f"{foreign} of {len(parameters)} parameters do not belong to `model`; "
            "pass model.parameters()"
        )


def roles(model: nn.Module | None, parameters: Iterable[Tensor]) -> dict[int, tuple[str, Role]]:
    """Returns name and role of every parameter, by its ``id``.

    Without a model the order of the parameters says which matrix is first and last; names are
    their numbers, and an embedding looks like any matrix.
    """
    if model is None:
        named = [(f"parameter {k}", p) for k, p in enumerate(parameters)]
        tables, scales = set[int](), set[int]()
    else:
        named = list(model.named_parameters())
        kinds = (nn.Embedding, nn.EmbeddingBag)
        tables = {id(m.weight) for m in model.modules() if isinstance(m, kinds)}
        norms = [m for m in model.modules() if isinstance(m, _NORMALISATIONS)]
        scales = {id(p) for m in norms for p in m.parameters(recurse=False)}
    found: dict[int, tuple[str, Role]] = {}
    for name, p in named:
        plain = p.dim() < 2 or id(p) in scales
        role: Role = "vector" if plain else "embedding" if id(p) in tables else "hidden"
        found[id(p)] = name, role
    matrices = [key for key, (_, role) in found.items() if role == "hidden"]
    ends: dict[int, Role] = {}
    if matrices:
        alone = len(matrices) == 1
        ends = {matrices[0]: "only"} if alone else {matrices[0]: "first", matrices[-1]: "last"}
    return {key: (name, ends.get(key, role)) for key, (name, role) in found.items()}


def param_groups(model: nn.Module, lr: float, *, depth_scale: bool = True) -> list[dict[str, Any]]:
    """Splits a model's parameters into groups that carry the depth rule.

    In an isometric chain a step of every layer moves the output by ``L`` times a layer's share, so
    hidden layers take steps of ``lr / L`` and the first and last block of ``lr``. The factor stands
    in the group's ``lr_scale``: schedulers change ``lr`` and keep it.

    Args:
        model: any model that ``mep.trace`` can read.
        lr: learning rate of the first and last block, >= 0.
        depth_scale: False gives every block ``lr_scale=1``.

    Returns:
        Two groups (one for chains of one or two blocks), each parameter once.

    Raises:
        mep.TraceError: if the model cannot be read as a chain.

    >>> [g["lr_scale"] for g in param_groups(nn.Sequential(*[nn.Linear(2, 2)] * 1), 0.1)]
    [1.0]

    Source: the 1/L step of deep residual scaling, Zhang et al. 2019 (Fixup), sec. 3.
    """
    blocks = [block for block in chain_of(model).blocks if any(True for _ in block.parameters())]
    ends = {id(p) for block in (blocks[0], blocks[-1]) for p in block.parameters()}
    every = list(model.parameters())
    outer = [p for p in every if id(p) in ends]
    hidden = [p for p in every if id(p) not in ends]
    groups = [{"params": outer, "lr": lr, "lr_scale": 1.0}]
    if hidden:
        scale = 1.0 / len(blocks) if depth_scale else 1.0
        groups.append({"params": hidden, "lr": lr, "lr_scale": scale})
    return groups
