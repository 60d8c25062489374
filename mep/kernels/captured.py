"""The tensors of a perceptron's step, with all addresses written down once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mep.kernels import DESCENT, SWEEP, SWEEPS
from mep.kernels.descent import begin, relax
from mep.kernels.further import again
from mep.kernels.job import NUMBERS, SUMS, Job, addresses, empty
from mep.kernels.library import Native
from mep.kernels.perceptron import fall, learn, rise
from mep.kernels.team import call

__all__ = ["Captured", "Fallen"]


@dataclass(frozen=True)
class Fallen:
    """What the free phase and the errors' way down leave.

    Attributes:
        loss: batch mean of the cost.
        top: squares of the output's error, summed.
        below: those of all others.
        entering: squares of the input.
    """

    loss: float
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
        settling: of the nudged phase, one of ``LIMIT``, ``SWEEP``, ``SWEEPS``, ``DESCENT``.

    Attributes:
        tensors: all that there is, for those who count.
        output: the free output, ``(B, out)``; good until the next step.
        gradient: of the cost there.
        top: the output's error.
        settling: see above; what there is room for.
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
        settling: str,
    ) -> None:
        depth, widths, most = len(weights), [len(w) for w in weights], max(map(len, weights))
        self._native, self._batch, self.settling = found, batch, settling
        self._work = batch * sum(w.numel() for w in weights)
        self._job = Job(depth)
        self.tensors: list[Tensor] = [self._job.tensor]  # addresses are good as long as these live
        self._batch_in_use: tuple[Tensor, ...] = ()
        states, errors = self._rooms(widths), [0] * (depth - 1)
        self._errors: list[Tensor] = []
        if settling != SWEEP or any(skips):
            self._errors = self._rooms(widths[:-1])
            errors = addresses(self._errors)
        self.top = self._room(widths[-1])
        errors.append(self.top.data_ptr())
        self._job.fill(
            width=widths, kind=[*kinds, 0], weight=addresses(weights), bias=addresses(biases),
            skip=skips, s=addresses(states), e=errors,
            y=[*addresses(self._rooms(widths[:-1])), 0],
            p=[*addresses(self._rooms(widths[:-1])), 0],
            # What comes through the next layer is the error itself, unless a skip leads around it.
            through=[
                self._room(n).data_ptr() if skip else e
                for n, skip, e in zip(widths, [*skips[1:], False], errors, strict=True)
            ],
            d=addresses(self._rooms(widths)) if settling in (SWEEPS, DESCENT) else [0] * depth,
            u=addresses(self._rooms(widths)) if settling == DESCENT else [0] * depth,
        )  # fmt: skip
        self.output, self.gradient = states[-1], self._room(widths[-1])
        self._loss = self._room(1).view(-1)
        self._sums = np.zeros((torch.get_num_threads(), SUMS))
        self._beta, self.numbers = self._doubles(3), self._doubles(2, depth, NUMBERS)
        self._job.set(
            inputs=weights[0].shape[1], squared=squared, most=most,
            loss=self._loss.data_ptr(), gradient=self.gradient.data_ptr(),
            nudged=self._room(widths[-1]).data_ptr(), change=self._room(most).data_ptr(),
            moved=self._room(most).data_ptr(), norm=self._room(1).data_ptr(),
            forces=self._doubles(batch).ctypes.data, beta=self._beta.ctypes.data,
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
        self._batch_in_use = x, target
        self._job.set(x=x.data_ptr(), target=target.data_ptr(), sums=self._sums.ctypes.data)
        call(self._native, fall, self._job.array, self._batch, 2 * self._work)
        top, below, entering, _ = map(sum, zip(*self._sums.tolist(), strict=True))
        # A small reduction takes torch ten times as long.
        return Fallen(float(self._loss.numpy().mean(dtype=np.float64)), top, below, entering)

    def errors(self) -> float:
        """Returns the squares of all errors, of the sweep taken last."""
        return float(self._sums[:, :2].sum())

    def active(self) -> float:
        """Returns the squares of all activities, of the nudged states once there are some."""
        return float(self._sums[:, 3].sum())

    def rise(self, beta: float) -> tuple[Tensor, Tensor, float]:
        """Takes the first nudged sweep.

        Returns:
            Residuals and nudges per sample, ``(B,)`` each, and the residuals' median.
        """
        self._beta[0] = beta
        return self._sweep(rise, 1)

    def again(self) -> tuple[Tensor, Tensor, float]:
        """Takes one more, for which there must be room; returns the same."""
        self._sums[:, :2] = 0
        return self._sweep(again, 2)

    def begin(self, beta: float, rate: float, momentum: float) -> None:
        """Begins to go downhill from the free states.

        Args:
            beta: nudging strength.
            rate: step size.
            momentum: of the states.
        """
        self._beta[:] = beta, rate, momentum
        call(self._native, begin, self._job.array, self._batch, self._work)

    def relax(self, steps: int) -> tuple[Tensor, Tensor, float]:
        """Takes steps downhill; returns the same."""
        self._sums[:, :2] = 0
        self._job.set(steps=steps)
        return self._sweep(relax, 2 * steps)

    def silent(self) -> bool:
        """Returns whether the output has an error, and some layer below has none at all."""
        return bool(self.top.any()) and not all(bool(e.any()) for e in self._errors)

    def _sweep(self, loop: Any, passes: int) -> tuple[Tensor, Tensor, float]:
        residual, strength = empty(2, self._batch).unbind()
        self._sums[:, 3] = 0
        self._job.set(residual=residual.data_ptr(), strength=strength.data_ptr())
        call(self._native, loop, self._job.array, self._batch, passes * self._work)
        values, middle = residual.numpy(), (self._batch - 1) // 2  # the lower of two, as torch's
        median = np.nan if np.isnan(values.sum()) else np.partition(values, middle)[middle]
        return residual, strength, float(median)

    def learn(self, weights: list[int], biases: list[int]) -> None:
        """Takes the step by what has been written to ``numbers``, at the states settled last.

        Args:
            weights: addresses of the weights' momenta; 0 for one without.
            biases: the same of the biases.
        """
        self._job.fill(weight_momentum=weights, bias_momentum=biases)
        call(self._native, learn, self._job.array, self._batch, self._work)
        self._batch_in_use = ()

    def _room(self, n: int) -> Tensor:
        self.tensors.append(empty(self._batch, n))
        return self.tensors[-1]

    def _doubles(self, *shape: int) -> np.ndarray:
        self.tensors.append(torch.zeros(shape, dtype=torch.float64, device="cpu"))
        return self.tensors[-1].numpy()

    def _rooms(self, widths: Sequence[int]) -> list[Tensor]:
        return [self._room(n) for n in widths]
