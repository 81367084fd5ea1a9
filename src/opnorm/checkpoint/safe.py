"""Reading safetensors: the header first, each tensor when it is asked for."""

from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from opnorm.checkpoint.dtypes import NAMES, reason_unusable
from opnorm.checkpoint.entry import Checkpoint, Entry
from opnorm.errors import CheckpointError


def open_safetensors(path: Path) -> Checkpoint:
    """Read the header of a safetensors file; the library checks every size in it against the file's own.

    Raises:
        CheckpointError: if the file is truncated or its header is malformed.
    """
    try:
        file: Any = safe_open(str(path), framework="pt", device="cpu")
        entries = tuple(_entry(file, key, path) for key in file.keys())  # noqa: SIM118 - not a mapping
        metadata = dict(file.metadata() or {})
    except (SafetensorError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file ({error}); it was cut off, or damaged: fetch or save it again"
        ) from error
    return Checkpoint(path, "safetensors", entries, (), "", metadata, sum(entry.elements for entry in entries))


def _entry(file: Any, key: str, path: Path) -> Entry:
    view = file.get_slice(key)
    shape = tuple(view.get_shape())
    stored = view.get_dtype()
    dtype = NAMES.get(stored, stored)
    elements = 1
    for size in shape:
        elements *= size
    load = partial(_load, file, key, path)
    return Entry(key, (key,), shape, dtype, elements, load, unusable=reason_unusable(dtype))


def _load(file: Any, key: str, path: Path) -> Tensor:
    try:
        tensor: Tensor = file.get_tensor(key)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: tensor {key!r} could not be read ({error})") from error
    return tensor
