"""Checkpoints: a path <-> a stream of names, metadata and lazy tensors; reading never runs code from the file."""

from opnorm.checkpoint.atomic import new_folder, replacing
from opnorm.checkpoint.entry import Checkpoint, Entry, Left
from opnorm.checkpoint.reading import open_checkpoint, open_state, stored_tensors
from opnorm.checkpoint.writing import Transform, rewrite

__all__ = [
    "Checkpoint",
    "Entry",
    "Left",
    "Transform",
    "new_folder",
    "open_checkpoint",
    "open_state",
    "replacing",
    "rewrite",
    "stored_tensors",
]
