"""Feedback weights: matrices that carry errors down in place of the weights' own transposes."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mep.contrast import Settings, chain_of
from mep.optim.updating import States
from mep.settling import KOLEN_POLLACK, TRANSPOSE
from mep.updates import Rule

__all__ = ["check_learning", "feedback_weights", "learning"]


def feedback_weights(
    model: nn.Module, how: Settings, parameters: Sequence[Tensor], state: States
) -> dict[int, Tensor] | None:
    """Returns the feedback matrix of every block above the first, by the ``id`` of its weight.

    Missing ones are drawn, normal with the weight's own mean square (or one over the number of
    its inputs where that is 0), by a generator that ``torch.manual_seed`` sets, and kept as
    ``"feedback"`` in the weight's state dictionary.

    Args:
        model: the model.
        how: the strategy, whose settler says what carries errors down.
        parameters: that are optimized.
        state: per parameter.

    Returns:
        None where it is the transposes.

    Raises:
        ValueError: if a block has no weight that could be replaced, or one is not optimized.

    Source: Lillicrap et al. 2016.
    """
    feedback = how.settler.feedback
    if feedback == TRANSPOSE:
        return None
    states, found = {id(p): state[p] for p in parameters}, {}
    for i, block in enumerate(chain_of(model, how.gradient_method, how.energy).blocks[1:]):
        weight = block.feedback_weight
        if weight is None and any(True for _ in block.parameters()):
            raise ValueError(
                f"`feedback={feedback!r}` needs blocks of one Linear or Conv2d each; "
                f"`{block.name}` ({block.describe()}) is differentiated as a whole"
            )
        if weight is None:
            continue
        if id(weight) not in states:
            raise ValueError(
                f"`feedback={feedback!r}` keeps its matrices beside the weights: pass the "
                f"parameters of block `{block.name}` to the optimizer, too"
            )
        own = states[id(weight)]
        if "feedback" not in own:
            own["feedback"] = _draw(weight, i)
        found[id(weight)] = own["feedback"]
    return found


def learning(how: Settings, feedback: Mapping[int, Tensor] | None) -> Mapping[int, Tensor]:
    """Returns those feedback weights that learn, by the ``id`` of the weight they belong to."""
    return feedback if feedback and how.settler.feedback == KOLEN_POLLACK else {}


def check_learning(groups: Sequence[dict[str, Any]], feedback: Container[int], rule: Rule) -> None:
    """Refuses what keeps Kolen-Pollack feedback from aligning.

    Raises:
        ValueError: naming the option and the remedy.
    """
    undecayed = (group["params"] for group in groups if group["weight_decay"] == 0)
    if any(id(p) in feedback for params in undecayed for p in params):
        raise ValueError(
            "`feedback='kolen-pollack'` needs `weight_decay` > 0: without it feedback and weights "
            "never forget how they differed at first"
        )
    if any(part.observes for part in rule.parts()):
        raise ValueError(
            f"`feedback='kolen-pollack'` and `update={type(rule).__name__}(...)` do not go "
            "together: there are no local signals of the feedback weights"
        )


def _draw(weight: Tensor, seed: int) -> Tensor:
    random = torch.Generator().manual_seed((torch.initial_seed() + seed) % 2**63)
    drawn = torch.randn(weight.shape, generator=random, dtype=torch.float32)
    size = float(weight.detach().square().mean().sqrt())
    # A weight that starts at 0 would send nothing down.
    return drawn.to(weight) * (size if size > 0 else weight[0].numel() ** -0.5)
