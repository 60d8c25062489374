"""The tensors of a perceptron's step, with all addresses written down once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mep.kernels.library import Native
from mep.kernels.perceptron import HEAD, NUMBERS, OWN, SUMS, TABLES, fall, learn, rise
from mep.kernels.team import COMMON, call

__all__ = ["Captured", "Fallen"]


@dataclass(frozen=True)
class Fallen:
    """What the free phase and the errors' way down leave.

    Attributes:
        loss: cost per sample, ``(B,)``; good until the next step.
        top: squares of the output's error, summed.
        below: those of all others.
        entering: squares of the input.
    """

    loss: Tensor
    top: float
    below: float
    entering: float


class Captured:
    """Steps of one perceptron on batches of one size: float32, on a CPU.

    Args:
        found: functions of torch's libraries.
        kinds: numbers of the activations between layers.
        weights: ``(out, in)``, contiguous, each as wide as the one before is high.
        biases: ``(out,)``, contiguous, or None.
        skips: whether a skip leads around a layer, which is as wide as high then.
        batch: number of samples.
        squared: whether the cost is half the squared distance; cross-entropy otherwise.

    Attributes:
        tensors: all that there is, for those who count.
        output: the free output, ``(B, out)``; good until the next step.
        gradient: of the cost there.
        numbers: ``(2, L, 5)``, for weights and biases: rate, momentum, decay in the gradient and
            out of it, 1 for Nesterov's momentum.
    """

    def __init__(
        self,
        found: Native,
        kinds: Sequence[int],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        skips: Sequence[bool],
        batch: int,
        squared: bool,
    ) -> None:
        depth, widths, most = len(weights), [len(w) for w in weights], max(map(len, weights))
        self._native, self._batch = found, batch
        self._work = batch * sum(w.numel() for w in weights)
        self.tensors: list[Tensor] = []  # addresses are good as long as these live
        self._batch_in_use: tuple[Tensor, ...] = ()
        self._nudged = False
        self._job = self._array(HEAD + len(TABLES) * depth, torch.int64)
        self._tables = dict(zip([*TABLES], self._job[HEAD:].reshape(-1, depth), strict=True))
        states = self._rooms(widths)
        tables: dict[str, Sequence[int]] = {
            "width": widths, "kind": [*kinds, 0], "weight": _addresses(weights),
            "bias": _addresses(biases), "s": _addresses(states),
            "e": _addresses(self._rooms(widths)), "skip": skips,
            "force": [*_addresses(self._rooms([1] * (depth - 1))), 0],
        }  # fmt: skip
        for name in ("y", "p", "y_new"):
            tables[name] = [*_addresses(self._rooms(widths[:-1])), 0]
        # What comes through the next layer is the error itself, unless a skip leads around that.
        tables["through"] = [
            self._room(n).data_ptr() if skip else e
            for n, skip, e in zip(widths, [*skips[1:], False], tables["e"], strict=True)
        ]
        for name, row in tables.items():
            self._tables[name][:] = row
        self.output, self.gradient = states[-1], self._room(widths[-1])
        self._loss = self._room(1).view(-1)
        self._sums = np.zeros((torch.get_num_threads(), SUMS))
        self._beta, self.numbers = np.zeros(1), self._array(2 * depth * NUMBERS, torch.float64)
        self.numbers = self.numbers.reshape(2, depth, NUMBERS)
        self._set(
            depth=depth, inputs=weights[0].shape[1], squared=squared, most=most,
            loss=self._loss.data_ptr(), gradient=self.gradient.data_ptr(),
            nudged=self._room(widths[-1]).data_ptr(), change=self._room(most).data_ptr(),
            moved=self._room(most).data_ptr(), beta=self._beta.ctypes.data,
            numbers=self.numbers.ctypes.data,
        )  # fmt: skip

    def fall(self, x: Tensor, target: Tensor) -> Fallen:
        """Runs the free phase and the backward sweep.

        Args:
            x: ``(B, in)``, contiguous.
            target: ``(B,)`` int64, or ``(B, out)`` float32; contiguous.
        """
        if len(self._sums) < torch.get_num_threads():
            self._sums = np.zeros((torch.get_num_threads(), SUMS))
        self._sums[:] = 0
        self._batch_in_use, self._nudged = (x, target), False
        self._set(x=x.data_ptr(), target=target.data_ptr(), sums=self._sums.ctypes.data)
        call(self._native, fall, self._job, self._batch, 2 * self._work)
        top, below, entering, _ = map(sum, zip(*self._sums.tolist(), strict=True))
        return Fallen(self._loss, top, below, entering)

    def active(self) -> float:
        """Returns the squares of all activities, of the nudged states once there are some."""
        return float(self._sums[:, 3].sum())

    def rise(self, beta: float) -> tuple[Tensor, Tensor]:
        """Takes the nudged sweep; returns residuals and nudges per sample, ``(B,)`` each."""
        residual, strength = _empty(2, self._batch).unbind()
        self._beta[0], self._nudged = beta, True
        self._sums[:, 3] = 0
        self._set(residual=residual.data_ptr(), strength=strength.data_ptr())
        call(self._native, rise, self._job, self._batch, self._work)
        return residual, strength

    def learn(self, weights: list[int], biases: list[int]) -> None:
        """Takes the step by what has been written to ``numbers``, at the states settled last.

        Args:
            weights: addresses of the weights' momenta; 0 for one without.
            biases: the same of the biases.
        """
        own = self._tables
        own["weight momentum"][:], own["bias momentum"][:] = weights, biases
        own["activity"][:] = own["y_new" if self._nudged else "y"]
        call(self._native, learn, self._job, self._batch, self._work)
        self._batch_in_use = ()

    def _set(self, **numbers: int) -> None:
        for name, number in numbers.items():
            self._job[_PLACES[name]] = number

    def _room(self, n: int) -> Tensor:
        self.tensors.append(_empty(self._batch, n))
        return self.tensors[-1]

    def _array(self, size: int, dtype: torch.dtype) -> np.ndarray:
        self.tensors.append(torch.zeros(size, dtype=dtype, device="cpu"))
        return self.tensors[-1].numpy()

    def _rooms(self, widths: Sequence[int]) -> list[Tensor]:
        return [self._room(n) for n in widths]


_PLACES = {name: place for place, name in enumerate(OWN, COMMON)}


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if t is None else t.data_ptr() for t in tensors]


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")
