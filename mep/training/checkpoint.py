"""One file that holds a whole run, and the checks before it is believed."""

from __future__ import annotations

import copy
import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mep.training.arm import Lane
from mep.training.atomic import atomic_write

__all__ = [
    "CheckpointError",
    "Checkpointing",
    "Position",
    "annotate",
    "load_checkpoint",
    "resume",
    "save",
]

FORMAT = 1
_KEYS = {"format", "identity", "epoch", "position", "rows", "arms"}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


@dataclass(frozen=True)
class Checkpointing:
    """Where and how often a run is saved.

    Args:
        path: the one file, replaced as a whole at every save.
        every: seconds between saves within an epoch, >= 0; an epoch's end always saves.
        resume: go on from ``path`` if it exists; otherwise it is overwritten.
        identity: settings (numbers, strings, lists, dicts of them) beyond those `fit` knows of
            that a checkpoint must share with this run to be resumed.

    Raises:
        ValueError: for a negative interval.
    """

    path: str | Path
    every: float = 60.0
    resume: bool = True
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"`Checkpointing(every=...)` must be >= 0, got {self.every}.")


@dataclass
class Position:
    """How far a run has come: ``position`` batches into ``epoch``, and the rows so far."""

    epoch: int = 0
    position: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


def save(path: str | Path, at: Position, lanes: Sequence[Lane], identity: Any) -> None:
    """Write the run to ``path``, atomically."""
    payload = {
        "format": FORMAT,
        "identity": _plain(identity),
        "epoch": at.epoch,
        "position": at.position,
        "rows": at.rows,
        "arms": {lane.arm.name: lane.state_dict() for lane in lanes},
    }
    atomic_write(path, lambda file: torch.save(payload, file))


def annotate(path: str | Path, **notes: Any) -> None:
    """Adds what was found on a finished run to its checkpoint; training on takes it out again.

    Args:
        path: a file written by `fit`.
        notes: by name, as numbers, strings, lists and dicts of them.

    Raises:
        CheckpointError: if the file is missing, damaged, or not a checkpoint of this format.
    """
    payload = load_checkpoint(path)
    payload["notes"] = {**payload.get("notes", {}), **notes}
    atomic_write(path, lambda file: torch.save(payload, file))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read and verify a checkpoint, without unpickling any code.

    Args:
        path: a file written by `fit`.

    Returns:
        The payload: ``identity``, ``epoch``, ``position``, ``rows`` and, per arm name, ``arms``
        with ``model``, ``optimizer``, ``scheduler`` and ``random`` state; ``notes``, if any.

    Raises:
        CheckpointError: if the file is missing, damaged, or not a checkpoint of this format.
    """
    path = Path(path)
    try:
        # torch.load skips the archive's checksums, so a flipped bit would pass as a weight.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("checksum mismatch")
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint at {path}.") from None
    except (
        OSError, EOFError, RuntimeError, ValueError, KeyError, NotImplementedError,
        zipfile.BadZipFile, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise _unusable(path, f"is corrupt or truncated ({_first_line(error)})") from error
    if not isinstance(payload, dict) or _KEYS - payload.keys():
        raise _unusable(path, "is not a checkpoint of this library")
    if payload["format"] != FORMAT:
        raise _unusable(path, f"has format {payload['format']}, this version reads {FORMAT}")
    return payload


def resume(path: str | Path, lanes: Sequence[Lane], identity: Any) -> Position:
    """Put the lanes where the checkpoint left them; on any error they stay as they are."""
    payload = load_checkpoint(path)
    stored, wanted = _flat(payload["identity"]), _flat(_plain(identity))
    differing = sorted(k for k in stored.keys() | wanted.keys() if stored.get(k) != wanted.get(k))
    if differing:
        shown = "; ".join(
            f"{key}: {stored.get(key)!r} there, {wanted.get(key)!r} here" for key in differing[:4]
        )
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise _unusable(path, f"belongs to another configuration ({shown}{more})")
    before = copy.deepcopy([lane.state_dict() for lane in lanes])
    try:
        for lane in lanes:
            lane.load_state_dict(payload["arms"][lane.arm.name])
    except (KeyError, IndexError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        for lane, state in zip(lanes, before, strict=True):
            lane.load_state_dict(state)
        raise _unusable(path, f"does not fit the arms ({_first_line(error)})") from error
    return Position(payload["epoch"], payload["position"], list(payload["rows"]))


def _unusable(path: str | Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {path} {what}. Nothing was changed. Start afresh without resuming "
        "(`resume=False`, on the command line `--no-resume`), or use another file or folder."
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _plain(identity: Any) -> Any:
    """The form comparisons are made in: tuples and lists alike, keys as strings."""
    return json.loads(json.dumps(identity))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys, so that a difference can be named."""
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    else:
        return {prefix: value}
    return {
        key: leaf
        for name, inner in pairs
        for key, leaf in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }
