"""A small net, a learnable batch and what the optimizer tests ask of them."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

import mep

# float64 rounding of 50 steps in a differently fused order of the same sums.
SAME_RULE = 1e-10
# float64 rounding of one batch sum split in two.
SAME_SUM = 1e-12


def network(dtype=torch.float64, seed=0, middle=nn.Tanh):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Linear(4, 8), middle(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)]
        return nn.Sequential(*layers).to(dtype)


def batch_of(size=12, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=dtype)
    return x, x[:, :3].argmax(1)  # learnable: the largest of three inputs


def train(opt, steps, batch):
    for _ in range(steps):
        loss = opt.step(x=batch[0], target=batch[1])
    return loss


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def identical(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def distance(a, b):
    return max(float((p - q).detach().abs().max()) for p, q in zip(a, b, strict=True))


def backward(model, batch):
    model.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()


@contextmanager
def killed_at_step(count):
    """Every optimizer step counts; the given one is where the process dies."""
    step, taken = mep.EPOptimizer.step, []

    def dying(self, *args, **batch):
        taken.append(1)
        if len(taken) == count:
            raise KeyboardInterrupt
        return step(self, *args, **batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mep.EPOptimizer, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            yield
