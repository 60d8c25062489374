"""The tensors of a perceptron's step, with all addresses written down once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mep.kernels import DESCENT, SWEEP, SWEEPS
from mep.kernels.descent import begin, relax
from mep.kernels.further import again
from mep.kernels.job import AT, NUMBERS, SUMS, Job, addresses, empty
from mep.kernels.library import Native
from mep.kernels.perceptron import learn
from mep.kernels.sweep import FOUND, LEARNED, TERMS, sweep
from mep.kernels.team import call

__all__ = ["Captured", "First", "Swung"]


# Samples for which there is room for what is left to settle, made at once.
_ROOMS = 2**12


class Swung(NamedTuple):
    """What a sweep or some steps leave to settle.

    Attributes:
        residual: per sample, ``(B,)``; good until the next sweep of the same phase.
        nudge: per sample, ``(B,)``, per unit of beta.
        median: of the residuals.
        total: their sum, which is finite if they all are.
    """

    residual: Tensor
    nudge: Tensor
    median: float
    total: float


class First(NamedTuple):
    """What the first sweep leaves, or the free phase and the errors' way down alone.

    Attributes:
        loss: batch mean of the cost, a scalar.
        beta: strength of the nudge.
        end: of the nudged sweep; of the free states, as if they were settled, where there was none.
        learned: whether the step has been taken to its end.
    """

    loss: Tensor
    beta: float
    end: Swung
    learned: bool


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
        self._taught: tuple[list[int], list[int]] = [], []
        self._asked: tuple[float, ...] = ()
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
        self._sums = np.zeros((0, SUMS))
        # Squares of all errors, of the sweep taken last; of the input; and of all activities, of
        # the nudged states once there are some.
        self._squares = self._entering = self._active = 0.0
        self._left = empty(0), empty(0)
        self._rooms_left: list[tuple[Tensor, Tensor, Tensor]] = []
        self._beta, self.numbers = self._doubles(3), self._doubles(2, depth, NUMBERS)
        self._terms, self._found = self._doubles(TERMS), self._doubles(FOUND)
        self._job.set(
            inputs=weights[0].shape[1], squared=squared, most=most,
            loss=self._loss.data_ptr(), gradient=self.gradient.data_ptr(),
            nudged=self._room(widths[-1]).data_ptr(), change=self._room(most).data_ptr(),
            moved=self._room(most).data_ptr(), norm=self._room(1).data_ptr(),
            forces=self._doubles(batch).ctypes.data, beta=self._beta.ctypes.data,
            numbers=self.numbers.ctypes.data, terms=self._terms.ctypes.data,
            found=self._found.ctypes.data,
        )  # fmt: skip

    def sweep(
        self, x: Tensor, target: Tensor, share: float, beta: float, most: float
    ) -> First | None:
        """Runs free phase and backward sweep, the first nudged sweep, and learns if told to.

        Args:
            x: ``(B, in)``, contiguous.
            target: ``(B,)`` int64, or ``(B, out)`` float32; contiguous.
            share: relative strength of the nudge; 0 where the strength itself is given.
            beta: that one.
            most: median residual up to which the step is taken at once, by what was ``taught``;
                negative for never.

        Returns:
            None where something is not finite, or a target is no class that there is; only the
            rooms of this step have changed then.
        """
        self._batch_in_use = x, target
        self._job.array[AT.x], self._job.array[AT.target] = x.data_ptr(), target.data_ptr()
        nudged = self.settling in (SWEEP, SWEEPS)
        terms = share, beta, nudged, most
        if terms != self._asked:
            self._terms[:] = self._asked = terms
        loss = self._make_room()
        self._job.array[AT.mean] = loss.data_ptr()
        self._call(sweep, 4)
        stage, beta, median, *sums = self._found.tolist()
        if not stage:
            return None
        top, below, self._entering, self._active, _, total = sums
        self._squares = top + below
        if stage == LEARNED:
            self._batch_in_use = ()
        return First(loss, beta, Swung(*self._left, median, total), stage == LEARNED)

    @property
    def largest(self) -> float:
        """Bound on the norm of every gradient at the states settled last."""
        # |G| <= |e| |a| / B, and what is below a bias is 1 for every sample.
        return math.sqrt(self._squares * (self._active + self._entering + self._batch))

    def again(self) -> Swung:
        """Takes one more sweep, for which there must be room."""
        return self._sweep(again, 2)

    def begin(self, rate: float, momentum: float) -> None:
        """Begins to go downhill from the free states, under the nudge of the last sweep's beta.

        Args:
            rate: step size.
            momentum: of the states.
        """
        self._beta[1:] = rate, momentum
        self._make_room()
        self._call(begin, 1)

    def relax(self, steps: int) -> Swung:
        """Takes steps downhill."""
        self._job.set(steps=steps)
        return self._sweep(relax, 2 * steps)

    def silent(self) -> bool:
        """Returns whether the output has an error, and some layer below has none at all."""
        return bool(self.top.any()) and not all(bool(e.any()) for e in self._errors)

    def _make_room(self) -> Tensor:
        """Makes room for what is left to settle, and for a loss: the last step's belong to others.

        For some steps at once, which takes hardly longer than for one; losses are often kept, and
        each has memory of its own.
        """
        if not self._rooms_left:
            with torch.inference_mode(False), torch.no_grad():
                rooms = empty(2, 1 + _ROOMS // self._batch, self._batch)
                pairs = zip(rooms[0].unbind(), rooms[1].unbind(), strict=True)
                self._rooms_left = [(residual, nudge, empty()) for residual, nudge in pairs]
        residual, nudge, loss = self._rooms_left.pop()
        self._left = residual, nudge
        array = self._job.array
        array[AT.residual], array[AT.strength] = residual.data_ptr(), nudge.data_ptr()
        return loss

    def _sweep(self, loop: Any, passes: int) -> Swung:
        self._call(loop, passes)
        _, _, median, top, below, _, self._active, _, total = self._found.tolist()
        self._squares = top + below
        return Swung(*self._left, median, total)

    def _call(self, loop: Any, passes: int) -> None:
        if len(self._sums) < torch.get_num_threads():
            self._sums = np.zeros((torch.get_num_threads(), SUMS))
            self._job.set(sums=self._sums.ctypes.data)
        call(self._native, loop, self._job.array, self._batch, passes * self._work)

    def teach(self, weights: list[int], biases: list[int]) -> None:
        """Takes note of where momenta are.

        Args:
            weights: addresses of the weights' momenta; 0 for one without.
            biases: the same of the biases.
        """
        if (weights, biases) != self._taught:
            self._job.fill(weight_momentum=weights, bias_momentum=biases)
            self._taught = weights, biases

    def learn(self) -> None:
        """Takes the step as it was taught, by ``numbers``, at the states settled last."""
        self._call(learn, 1)
        self._batch_in_use = ()

    def _room(self, n: int) -> Tensor:
        self.tensors.append(empty(self._batch, n))
        return self.tensors[-1]

    def _doubles(self, *shape: int) -> np.ndarray:
        self.tensors.append(torch.zeros(shape, dtype=torch.float64, device="cpu"))
        return self.tensors[-1].numpy()

    def _rooms(self, widths: Sequence[int]) -> list[Tensor]:
        return [self._room(n) for n in widths]
