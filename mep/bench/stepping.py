"""One training step of a deep net, by EP and by backprop in its leanest forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint_sequential

import mep

__all__ = [
    "ARMS",
    "BACKPROP",
    "CHECKPOINTED",
    "IN_BACKWARD",
    "PLAIN",
    "STREAMED",
    "Stepper",
    "tanh_net",
]

BACKPROP = "backprop"
CHECKPOINTED = "backprop, checkpoints"
IN_BACKWARD = "backprop, checkpoints, update in backward"
PLAIN = "EP"
STREAMED = "EP within"  # and the budget
ARMS = (BACKPROP, CHECKPOINTED, IN_BACKWARD, PLAIN, STREAMED)

_MOMENTUM = 0.9


def tanh_net(depth: int, width: int) -> nn.Module:
    """Returns a plain net of Linear and tanh, orthogonal: one sweep settles it at any depth."""
    return mep.init.orthogonal_(mep.models.mlp(784, [width] * (depth - 1), 10, nn.Tanh))


class Stepper:
    """A net, a batch and a way to take a step on it: SGD with momentum.

    Args:
        arm: one of ``ARMS``; for the last with its budget: ``"EP within 4MB"``.
        depth: number of weighted layers.
        width: units per hidden layer.
        batch: samples.
        seed: of weights and batch; the same for every arm.
        lr: learning rate; 0 leaves the net what it is.

    Attributes:
        model: from ``tanh_net``.
        optimizer: the optimizer that holds the state, or None where parameters step by themselves.
        step: takes a step.
    """

    def __init__(
        self, arm: str, depth: int, width: int, batch: int, seed: int, lr: float = 0.0
    ) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = tanh_net(depth, width)
            self.x, self.y = torch.randn(batch, 784), torch.randint(10, (batch,))
        self.lr = lr
        self.state: dict[nn.Parameter, Tensor] = {}
        self.optimizer: torch.optim.Optimizer | None = None
        self.step: Callable[[], None] = self._chosen(arm)

    @property
    def lasting(self) -> int:
        """Bytes of parameters and momentum: what every arm keeps between steps."""
        return 2 * sum(p.nbytes for p in self.model.parameters())

    def _chosen(self, arm: str) -> Callable[[], None]:
        own = self.model.parameters()
        if arm == PLAIN or arm.startswith(STREAMED):
            budget = arm.removeprefix(STREAMED).strip() or None
            self.optimizer = ep = mep.EPOptimizer(
                own, model=self.model, lr=self.lr, momentum=_MOMENTUM, settler=mep.Sweep(1),
                memory_budget=None if arm == PLAIN else budget,
            )  # fmt: skip

            def settle() -> None:
                ep.step(x=self.x, target=self.y)

            return settle
        if arm == IN_BACKWARD:
            for parameter in own:
                self.state[parameter] = torch.zeros_like(parameter)
                parameter.register_post_accumulate_grad_hook(self._update)
            return lambda: self._loss(checkpoints=True).backward()
        if arm in (BACKPROP, CHECKPOINTED):
            self.optimizer = sgd = torch.optim.SGD(own, lr=self.lr, momentum=_MOMENTUM)

            def step() -> None:
                sgd.zero_grad()
                self._loss(checkpoints=arm == CHECKPOINTED).backward()
                sgd.step()

            return step
        raise ValueError(f"`arm` must be one of {ARMS}, got {arm!r}")

    def _loss(self, *, checkpoints: bool) -> Tensor:
        if not checkpoints:
            return F.cross_entropy(self.model(self.x), self.y)
        assert isinstance(self.model, nn.Sequential)
        segments = max(1, round(math.sqrt(len(self.model))))
        out = checkpoint_sequential(self.model, segments, self.x, use_reentrant=False)
        return F.cross_entropy(out, self.y)

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        """Steps as soon as the gradient is there, and lets go of it."""
        momentum = self.state[parameter]  # pyright: ignore[reportArgumentType]
        assert parameter.grad is not None
        momentum.mul_(_MOMENTUM).add_(parameter.grad)
        parameter.add_(momentum, alpha=-self.lr)
        parameter.grad = None
