"""What has been read off a module, and whether it still holds."""

from __future__ import annotations

from functools import cache
from operator import is_, itemgetter
from typing import Any

from torch import nn

__all__ = ["Seen"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Seen:
    """What a chain has frozen of a module: its children, mode, numbers and buffers, its hooks.

    Numbers in lists and dictionaries of a module's own are read once.
    """

    __slots__ = ("buffers", "children", "read", "seen", "size", "state")  # there are thousands

    def __init__(self, module: nn.Module) -> None:
        self.state = vars(module)
        plain = tuple(name for name, v in self.state.items() if _is_plain(v))
        self.read = _reader(plain)
        self.seen, self.size = tuple(map(_kept, self.read(self.state))), len(self.state)
        self.children = [*self.state["_modules"].values()]
        self.buffers = [*self.state["_buffers"].values()]

    def unchanged(self) -> bool:
        """True if the module is as it was."""
        state = self.state
        try:
            same = len(state) == self.size and self.read(state) == self.seen
            modules, tensors = state["_modules"], state["_buffers"]
        except KeyError:  # an attribute is gone
            return False
        return same and _are(modules, self.children) and _are(tensors, self.buffers)


@cache
def _reader(names: tuple[str, ...]) -> itemgetter:
    return itemgetter(*_HOOKS, "training", *names)


def _are(parts: dict[str, Any], known: list[Any]) -> bool:
    """Returns whether there are the same ones in the same order; most modules have none."""
    if not parts and not known:
        return True
    return len(parts) == len(known) and all(map(is_, parts.values(), known))


def _kept(value: Any) -> Any:
    """Returns what will still be there when a module's dictionary has changed."""
    return (dict(value) or _NONE) if isinstance(value, dict) else value


_NONE: dict[str, Any] = {}


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
