"""What has been read off a module, and whether it still holds."""

from __future__ import annotations

from functools import cache
from operator import is_, itemgetter
from typing import Any

from torch import nn

__all__ = ["Seen", "unchanged"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_PARTS = ("_modules", "_buffers")


class Seen:
    """What a chain has frozen of a module: its children, mode, numbers and buffers, its hooks.

    Numbers in lists and dictionaries of a module's own are read once.
    """

    __slots__ = ("buffers", "children", "read", "seen", "size", "state")  # there are thousands

    def __init__(self, module: nn.Module) -> None:
        self.state = vars(module)
        self.children = [*self.state["_modules"].values()]
        self.buffers = [*self.state["_buffers"].values()]
        plain = [name for name, v in self.state.items() if _is_plain(v)]
        # Most modules have no parts, which is then one of the things that are read at once.
        plain += [name for name in _PARTS if not self.state[name]]
        self.read = _reader(tuple(plain))
        self.seen, self.size = tuple(map(_kept, self.read(self.state))), len(self.state)


def unchanged(modules: list[Seen]) -> bool:
    """Returns whether all of them are as they were."""
    try:
        for known in modules:
            state = known.state
            if len(state) != known.size or known.read(state) != known.seen:
                return False
            if known.children and not _are(state["_modules"], known.children):
                return False
            if known.buffers and not _are(state["_buffers"], known.buffers):
                return False
    except KeyError:  # an attribute is gone
        return False
    return True


@cache
def _reader(names: tuple[str, ...]) -> itemgetter:
    return itemgetter(*_HOOKS, "training", *names)


def _are(parts: dict[str, Any], known: list[Any]) -> bool:
    """Returns whether there are the same ones in the same order."""
    return len(parts) == len(known) and all(map(is_, parts.values(), known))


def _kept(value: Any) -> Any:
    """Returns what will still be there when a module's dictionary has changed."""
    return (dict(value) or _NONE) if isinstance(value, dict) else value


_NONE: dict[str, Any] = {}


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)
