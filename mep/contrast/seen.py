"""What has been read off a module, and whether it still holds."""

from __future__ import annotations

from functools import cache
from operator import is_, itemgetter

from torch import nn

__all__ = ["Seen"]


class Seen:
    """What a chain has frozen of a module: its children, mode, numbers and buffers, its hooks.

    Numbers in lists and dictionaries of a module's own are read once.
    """

    __slots__ = (  # there are thousands
        "buffers", "children", "hooks", "numbers", "read", "size", "state",
    )  # fmt: skip

    def __init__(self, module: nn.Module) -> None:
        self.state = vars(module)
        plain = tuple(name for name, v in self.state.items() if _is_plain(v))
        self.read = _reader(plain)
        self.numbers, self.size = self.read(self.state), len(self.state)
        self.hooks = self._hooks()
        self.children = [*self.state["_modules"].values()]
        self.buffers = [*self.state["_buffers"].values()]

    def _hooks(self) -> tuple[int, int]:
        return len(self.state["_forward_hooks"]), len(self.state["_forward_pre_hooks"])

    def unchanged(self) -> bool:
        """True if the module is as it was."""
        state = self.state
        try:
            same = len(state) == self.size and self.read(state) == self.numbers
            modules, buffers = state["_modules"], state["_buffers"]
        except KeyError:  # an attribute is gone
            return False
        # Most modules have none of them, and a list takes time.
        parts = [*modules.values()] if modules else []
        tensors = [*buffers.values()] if buffers else []
        same = same and len(tensors) == len(self.buffers) and parts == self.children
        return same and self._hooks() == self.hooks and all(map(is_, tensors, self.buffers))


@cache
def _reader(names: tuple[str, ...]) -> itemgetter:
    return itemgetter("training", *names)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
