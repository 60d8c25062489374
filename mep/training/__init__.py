"""A small training loop: arms in lock-step, progress, checkpoint and resume."""

from mep.training.arm import Arm
from mep.training.atomic import atomic_write
from mep.training.checkpoint import CheckpointError, Checkpointing, annotate, load_checkpoint
from mep.training.config import SCHEDULES, TrainingConfig
from mep.training.evaluation import accuracy
from mep.training.loop import batches, fit
from mep.training.observers import Observer, ProgressBar, TensorBoard

__all__ = [
    "SCHEDULES",
    "Arm",
    "CheckpointError",
    "Checkpointing",
    "Observer",
    "ProgressBar",
    "TensorBoard",
    "TrainingConfig",
    "accuracy",
    "annotate",
    "atomic_write",
    "batches",
    "fit",
    "load_checkpoint",
]
