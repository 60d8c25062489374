"""Those who watch a run: progress bar and TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Observer", "ProgressBar", "TensorBoard"]


class Observer:
    """Hears of every step and epoch; the base class listens to nothing.

    An exception raised here ends the run as a kill would: after the checkpoint that was due.
    """

    def start(self, total: int, done: int) -> None:
        """A run of ``total`` steps begins, ``done`` of them taken before it was resumed."""

    def step(self, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
        """All arms have taken step number ``step``; ``values[arm]`` has loss and residual."""

    def epoch(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """An epoch ended with step number ``step``; one row per arm."""

    def close(self) -> None:
        """The run is over, by success or by error."""


class ProgressBar(Observer):
    """A rich progress bar with loss, accuracy and residual of every arm.

    Args:
        label: what is being trained.
    """

    def __init__(self, label: str = "training") -> None:
        from rich import progress

        self.label = label
        self.accuracy: dict[str, float] = {}
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[values]}"),
            transient=True,
        )

    def start(self, total: int, done: int) -> None:
        """Show the bar, at the place a resumed run starts from."""
        self.task = self.bar.add_task(self.label, total=total, completed=done, values="")
        self.bar.start()

    def step(self, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
        """Move on by one step."""
        text = " | ".join(self._describe(arm, latest) for arm, latest in values.items())
        self.bar.update(self.task, completed=step, values=text)

    def epoch(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Remember the accuracies to show beside the losses."""
        self.accuracy = {row["arm"]: row["test_accuracy"] for row in rows}

    def close(self) -> None:
        """Remove the bar."""
        self.bar.stop()

    def _describe(self, arm: str, latest: Mapping[str, float]) -> str:
        parts = [f"{arm}: loss {latest['loss']:.3f}"]
        if arm in self.accuracy:
            parts.append(f"acc {100 * self.accuracy[arm]:.1f} %")
        if "residual" in latest:
            parts.append(f"res {latest['residual']:.0e}")
        return " ".join(parts)


class TensorBoard(Observer):
    """Scalars for TensorBoard: loss and residual per step, the row's numbers per epoch.

    Args:
        folder: where the event files go.

    Raises:
        ImportError: if TensorBoard is not installed, naming the extra that brings it.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "TensorBoard logging needs the package `tensorboard`: "
                "pip install 'mep-torch[tensorboard]'."
            ) from error
        self._open = SummaryWriter
        self.folder = str(folder)

    def start(self, total: int, done: int) -> None:
        """Open the event file."""
        # Steps a killed run logged beyond its last checkpoint are taken again: hide the first set.
        self.writer = self._open(self.folder, purge_step=done + 1 if done else None)

    def step(self, step: int, values: Mapping[str, Mapping[str, float]]) -> None:
        """Log every arm's loss and residual."""
        for arm, latest in values.items():
            for key, value in latest.items():
                self.writer.add_scalar(f"step/{key}/{arm}", value, step)

    def epoch(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log every arm's row."""
        for row in rows:
            for key in ("train_loss", "test_accuracy", "residual", "step_ms"):
                if row[key] is not None:
                    self.writer.add_scalar(f"epoch/{key}/{row['arm']}", row[key], step)

    def close(self) -> None:
        """Flush and close the event file."""
        if hasattr(self, "writer"):
            self.writer.close()
