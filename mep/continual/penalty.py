"""What a penalty is: a quadratic around finished tasks, and how an update obeys it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mep.continual.fisher import Sweeps

__all__ = ["Penalty", "check_strength"]

_State = dict[str, Any]


class Penalty(ABC):
    """Keeps parameters where finished tasks have left them.

    The object holds options; what is remembered of a parameter stands in the optimizer's state,
    under ``"penalty"``, and is saved with it. Where the update rule has an effective step ``eta``
    (that of its fixed point, ``lr / (1 - mu)`` for heavy ball), the pull is the proximal step
    ``theta <- argmin_t |t - theta|^2 / (2 eta) + penalty(t)``, exact and stable at any strength;
    other rules get the penalty's gradient with the loss's.

    Args:
        lam: strength, >= 0.

    Raises:
        ValueError: if it is out of range.
    """

    def __init__(self, lam: float) -> None:
        check_strength(f"{type(self).__name__}(lam=...)", lam)
        self.lam = float(lam)
        self._bound: list[tuple[Tensor, _State]] = []

    # --- of one parameter, once a task is remembered ---------------------------------------------

    @abstractmethod
    def pull(self, parameter: Tensor, memory: _State, step: float) -> None:
        """Takes the proximal step of size ``step``, in place."""

    @abstractmethod
    def gradient(self, parameter: Tensor, memory: _State) -> Tensor:
        """Returns the penalty's gradient, of the parameter's shape."""

    @abstractmethod
    def value(self, parameter: Tensor, memory: _State) -> Tensor:
        """Returns the penalty of one parameter, a scalar."""

    # --- of a task --------------------------------------------------------------------------------

    @abstractmethod
    def remember(
        self,
        parameters: Sequence[Tensor],
        states: Sequence[_State],
        task: Callable[[], Iterator[tuple[int, Sweeps]]] | None,
    ) -> None:
        """Adds a finished task to the memories.

        Args:
            parameters: where the task has left them.
            states: their states.
            task: goes through the task's batches: their sizes, and what sweeps over their signals;
                None if no data were given.

        Raises:
            ValueError: if the penalty would stay zero, or is not finite; nothing has changed then.
        """

    # --- during an update -------------------------------------------------------------------------

    @property
    def watches(self) -> bool:
        """Whether it hears of every update and its gradients: it has a ``watch`` of its own."""
        return type(self).watch is not Penalty.watch

    def watch(self, parameters: Sequence[Tensor], states: Sequence[_State]) -> list[Tensor]:
        """Notes what ``learned`` will need of the parameters before an update."""
        raise AssertionError("a penalty that watches must say what")

    def learned(
        self,
        parameters: Sequence[Tensor],
        before: list[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[_State],
    ) -> None:
        """Takes note of an update."""
        raise AssertionError("a penalty that watches must learn")

    # --- for inspection ---------------------------------------------------------------------------

    def bind(self, parameters: Sequence[Tensor], states: Mapping[Tensor, _State]) -> None:
        """Lets ``loss`` know whose penalty it is."""
        self._bound = [(p, states[p]) for p in parameters]

    def loss(self) -> Tensor:
        """Returns the penalty at the present parameters, a scalar; 0 before the first task.

        Raises:
            RuntimeError: if no optimizer uses it.
        """
        if not self._bound:
            raise RuntimeError(
                "no optimizer uses this penalty: give it to EPOptimizer(..., penalty=...)"
            )
        with torch.no_grad():
            total = torch.zeros((), dtype=self._bound[0][0].dtype, device=self._bound[0][0].device)
            for p, state in self._bound:
                memory = memory_of(state)
                if memory is not None:
                    total += self.value(p, memory).to(total)
        return total

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": []}  # the optimizer that travels with it binds it again


def memory_of(state: _State) -> _State | None:
    """Returns what is remembered of a parameter: None before the first task."""
    found = state.get("penalty")
    return found if found and "center" in found else None


def check_strength(name: str, value: float) -> None:
    """Refuses what is no finite number >= 0.

    Raises:
        TypeError, ValueError: naming it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}")
    if not (value >= 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be a finite number >= 0, got {value}")
