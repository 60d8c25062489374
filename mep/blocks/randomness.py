"""Random states: what a free phase has drawn, every later evaluation of the step draws again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["random_state", "replayed"]


def random_state(device: torch.device) -> Tensor:
    """Returns the state of torch's generator on a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def replayed(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Draws from a given state while the context lasts, then puts the present one back.

    None draws from the present state and leaves it advanced.
    """
    if state is None:
        yield
        return
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else [], device_type="cuda"):
        if cuda:
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)
        yield
