"""The record of one run: what was asked, where it ran, every raw row, and the summary."""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mep
from mep.training import atomic_write

__all__ = ["Record", "environment"]

_KEYS = ("command", "environment", "config", "rows", "summary")


def environment() -> dict[str, Any]:
    """Describe where this runs, without paths or the name of the machine.

    Returns:
        Versions of library, torch, Python and numba (None: no fused kernels); processor, threads
        and accelerator; the commit and whether files differ from it (both None outside a git
        checkout).

    Example:
        >>> sorted(environment())[:3]
        ['accelerator', 'commit', 'cpu']
    """
    commit, dirty = _commit()
    return {
        "mep": mep.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numba": _version("numba"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": commit,
        "dirty": dirty,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


@dataclass
class Record:
    """One run of a benchmark, complete enough to draw its table and plot again.

    Args:
        command: the command line, without file and folder names.
        config: every setting, as numbers, strings, lists and dicts of them.
        rows: the raw measurements, one dict each.
        summary: the figures to quote.
        environment: where it ran.
    """

    command: str
    config: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=environment)

    def write(self, folder: str | Path) -> Path:
        """Write ``record.json`` into a folder, atomically; non-finite numbers become null.

        Args:
            folder: created if it is not there.

        Returns:
            The path of the file.
        """
        values = {key: asdict(self)[key] for key in _KEYS}
        text = json.dumps(_finite(values), indent=1, allow_nan=False) + "\n"
        return atomic_write(Path(folder) / "record.json", lambda file: file.write(text.encode()))

    @classmethod
    def read(cls, path: str | Path) -> Record:
        """Read a record back.

        Args:
            path: a file written by `write`.

        Returns:
            The record.

        Raises:
            ValueError: if the file is not a record.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{key: values[key] for key in _KEYS})
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a record: {error}.") from error


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(inner) for inner in value]
    return value


def _cpu() -> str:
    """The processor's model name; Python itself knows it only on some systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> tuple[str | None, bool | None]:
    """Commit and dirty flag, only if this very file is under version control.

    An installed copy inside somebody else's repository must not be given that one's commit. Records
    that have been made again since are no change of what makes them; new files beside this one are.
    """
    tracked = _git("ls-files", "--error-unmatch", Path(__file__).name)
    commit = _git("rev-parse", "HEAD") if tracked else None
    if not commit:
        return None, None
    others = (":/", ":(top,exclude)results")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *others)
    return commit, bool(changed or _git("ls-files", "--others", "--exclude-standard"))


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
