"""Checkpoints: a path <-> a stream of names, metadata and lazy tensors; reading never runs code from the file."""

from opnorm.checkpoint.entry import Checkpoint, Entry, Left
from opnorm.checkpoint.reading import open_checkpoint

__all__ = ["Checkpoint", "Entry", "Left", "open_checkpoint"]
