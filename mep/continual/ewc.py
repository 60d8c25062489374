"""Elastic weight consolidation, with the diagonal of the Fisher information or its factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mep.continual import diagonal, kronecker
from mep.continual.fisher import Sweeps, check_fisher, widened
from mep.continual.penalty import Penalty, check_strength, memory_of
from mep.curvature import Signal, activity_factor, diagonal_fisher, error_factor

__all__ = ["EWC"]

CURVATURES, MODES = ("kronecker", "diagonal"), ("separate", "online")


class EWC(Penalty):
    """``lam/2 (theta - theta*)^T F (theta - theta*)``: the finished tasks' loss, to second order.

    With ``curvature="kronecker"`` every weight has the full matrix of its block, as factors:
    ``F = (sum_t A_t) (x) (sum_t G_t) / T``, around the latest optimum. With ``"diagonal"`` there is
    one number per weight: ``lam/2 sum_t F_t (theta - theta*_t)^2`` (``mode="separate"``), or
    ``F <- gamma F + F_t`` around the latest optimum (``"online"``). Curvature is taken at the free
    equilibrium, where it is exact. Weights that are no Linear or Conv2d of their own, scales and
    shifts have the diagonal in either case.

    ``lam`` is not comparable between the two: the diagonal leaves out how weights act together.

    Args:
        lam: strength, >= 0.
        curvature: ``"kronecker"`` or ``"diagonal"``.
        mode: ``"separate"`` (the default of the diagonal) or ``"online"`` (the factors' only one).
        gamma: what online memories keep at each new task, in (0, 1].
        damping: relative curvature added in every direction, >= 0: factors grow by
            ``sqrt(damping) tr / n``, the diagonal by ``damping`` times its mean.
        fisher: ``"true"``: expectation over targets that the model itself draws; ``"empirical"``:
            the given targets.
        samples: with ``"true"``, targets to draw for every input, >= 1; None takes the exact
            expectation, one backward sweep per output.
        every: updates from one pull through the factors' eigenbases to the next, >= 1, which is
            taken with the steps of all of them: it costs two products of the weight with each
            basis. Where an update ends up is off by ``O(every eta)``; 1 is exact. Steps that still
            wait at the end of a task are dropped.

    Raises:
        TypeError, ValueError: if an option is out of range, or the factors shall be kept apart.

    >>> EWC(3.0), EWC(50.0, curvature="diagonal").mode
    (EWC(lam=3.0, curvature='kronecker', mode='online'), 'separate')

    Source: Kirkpatrick et al. 2017, eq. 3; Schwarz et al. 2018 (online); Ritter et al. 2018
    (Kronecker factors).
    """

    def __init__(
        self,
        lam: float,
        curvature: str = "kronecker",
        mode: str | None = None,
        *,
        gamma: float = 1.0,
        damping: float = 1e-3,
        fisher: str = "true",
        samples: int | None = None,
        every: int = 4,
    ) -> None:
        super().__init__(lam)
        if curvature not in CURVATURES:
            raise ValueError(f"`EWC(curvature=...)` must be one of {CURVATURES}, got {curvature!r}")
        if mode is None:
            mode = "online" if curvature == "kronecker" else "separate"
        if mode not in MODES:
            raise ValueError(f"`EWC(mode=...)` must be one of {MODES}, got {mode!r}")
        if curvature == "kronecker" and mode != "online":
            raise ValueError(
                "`EWC(curvature='kronecker')` keeps sums of factors, around the latest optimum: "
                "use mode='online', or curvature='diagonal'"
            )
        check_strength("EWC(damping=...)", damping)
        if not 0 < gamma <= 1:
            raise ValueError(f"`EWC(gamma=...)` must be in (0, 1], got {gamma}")
        if gamma != 1 and mode != "online":
            raise ValueError("`EWC(gamma=...)` is for mode='online': separate memories stay whole")
        check_fisher("EWC", fisher, samples)
        self.curvature, self.mode = curvature, mode
        self.gamma, self.damping = float(gamma), float(damping)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"`EWC(every=...)` must be a whole number >= 1, got {every!r}")
        self.fisher, self.samples, self.every = fisher, samples, every

    def __repr__(self) -> str:
        return f"EWC(lam={self.lam}, curvature={self.curvature!r}, mode={self.mode!r})"

    def pull(self, parameter: Tensor, memory: dict[str, Any], step: float) -> None:
        if "tasks" not in memory:
            diagonal.pull(parameter, memory, step * self.lam)
            return
        memory["steps"] = memory.get("steps", 0) + 1
        memory["due"] = memory.get("due", 0.0) + step
        if memory["steps"] % self.every == 0:
            kronecker.pull(parameter, memory, memory.pop("due") * self.lam)

    def gradient(self, parameter: Tensor, memory: dict[str, Any]) -> Tensor:
        how = kronecker if "tasks" in memory else diagonal
        return how.gradient(parameter, memory, self.lam)

    def value(self, parameter: Tensor, memory: dict[str, Any]) -> Tensor:
        how = kronecker if "tasks" in memory else diagonal
        return how.value(parameter, memory, self.lam)

    def remember(
        self,
        parameters: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        task: Callable[[], Iterator[tuple[int, Sweeps]]] | None,
    ) -> None:
        if task is None:
            raise ValueError("EWC takes a task's curvature from its data: consolidate(loader)")
        sums = {id(p): _Sum(self.curvature == "kronecker") for p in parameters}
        for size, sweeps in task():
            for k, sweep in enumerate(sweeps()):
                for key in sums.keys() & sweep.keys():
                    sums[key].add(sweep[key], size, first=k == 0)
            for total in sums.values():
                total.count += size
        _check_finite([*sums.values()])
        found = [
            self._with(memory_of(state), sums[id(p)], p)
            for p, state in zip(parameters, states, strict=True)
        ]
        _check([memory for memory in found if memory is not None])
        for state, memory in zip(states, found, strict=True):
            if memory is not None:
                state["penalty"] = memory

    def _with(
        self, memory: dict[str, Any] | None, task: _Sum, parameter: Tensor
    ) -> dict[str, Any] | None:
        """Returns a parameter's memory with another task in it."""
        center = parameter.detach()
        if task.factors is None and task.diagonal is None:  # nothing to say of it
            return memory
        if memory is not None and ("tasks" in memory) != (task.factors is not None):
            raise ValueError(
                f"the state holds the memory of another penalty than {self}: load a checkpoint of "
                "the same one"
            )
        if task.factors is not None:
            a, g = task.factors
            factors = a / task.count, g / task.count
            return kronecker.add(memory, factors, center, self.gamma, self.damping)
        assert task.diagonal is not None
        curvature = (task.diagonal / task.count).to(center.dtype)
        curvature += self.damping * curvature.mean()
        if self.mode == "separate":
            return diagonal.add(memory, curvature, center)
        if memory is not None:
            curvature += self.gamma * memory["curvature"]
        return diagonal.replace(curvature, center)


class _Sum:
    """One parameter's curvature, summed over the ``count`` samples of a task."""

    def __init__(self, factored: bool) -> None:
        self.factored, self.count = factored, 0
        self.factors: tuple[Tensor, Tensor] | None = None
        self.diagonal: Tensor | None = None

    def add(self, signals: list[Signal], size: int, *, first: bool) -> None:
        """Adds one direction of one batch; the activity is that of the first direction."""
        if self.factored and len(signals) == 1 and signals[0].rows is not None:
            a, g = self.factors or (0.0, 0.0)
            a = a + activity_factor(signals[0]) * size if first else a
            assert isinstance(a, Tensor), "every batch has a first direction"
            self.factors = a, g + error_factor(signals[0]) * size
        else:
            found = widened(diagonal_fisher(signals)) * size
            self.diagonal = found if self.diagonal is None else self.diagonal + found

    @property
    def tensors(self) -> list[Tensor]:
        """What has been summed."""
        return [*(self.factors or ()), *([self.diagonal] if self.diagonal is not None else [])]


def _check_finite(sums: list[_Sum]) -> None:
    """Refuses curvature that is not finite, of which there is no eigenbasis either.

    Raises:
        ValueError: saying so.
    """
    if not all(bool(torch.isfinite(t).all()) for task in sums for t in task.tensors):
        raise ValueError("the task's curvature is not finite; look at the loss and the data")


def _check(memories: list[dict[str, Any]]) -> None:
    """Refuses memories that would remember nothing.

    Raises:
        ValueError: saying why that may be.
    """
    if not any(
        bool(m["error_sizes"].any() and m["activity_sizes"].any())
        if "tasks" in m
        else bool(m["curvature"].any())
        for m in memories
    ):
        raise ValueError(
            "the task's curvature is zero, and so the penalty would be: the model's output does "
            "not depend on its parameters for these data, or none of them is trained"
        )
