"""Reading what `torch.save` wrote: `weights_only=True` always, mapped where the format allows it."""

import pickle
import warnings
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opnorm.checkpoint import nested
from opnorm.checkpoint.entry import Checkpoint, Left
from opnorm.checkpoint.tensors import count_elements, entry_of, is_plain, merge_ties
from opnorm.errors import CheckpointError

_WAY_OUT = (
    "if you trust where it comes from, load it in Python yourself and save its state_dict() with "
    "safetensors.torch.save_file"
)


def open_torch(path: Path, part: str, *, legacy: bool) -> Checkpoint:
    """Open a file of `torch.save`; the format before torch 1.6 can only be read into memory as a whole.

    Raises:
        CheckpointError: if it is refused, damaged, or holds no tensors.
    """
    tree = load_object(path, legacy=legacy)
    found: list[tuple[nested.Path, Tensor]]
    try:
        found = [(("tensor",), tree)] if isinstance(tree, Tensor) else list(nested.leaves(tree))
        choice = nested.Choice((), {}) if isinstance(tree, Tensor) else nested.choose(tree, part)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not found:
        raise CheckpointError(f"{path}: holds no tensors, only a {type(tree).__name__}")
    names = Counter(".".join(path) for path, _ in found)
    if len(names) < len(found):
        raise CheckpointError(
            f"{path}: two tensors are called {names.most_common(1)[0][0]!r}; they cannot be told apart"
        )
    _check_storages([tensor for _, tensor in found], path)
    # Weights first, so that one that is tied to a copy in another part counts as a weight.
    found.sort(key=lambda item: _left_of(item[0], choice) is not None)
    merged = merge_ties(found)
    entries = [
        entry_of(paths, tensor, len(choice.prefix)) for paths, tensor in merged if _left_of(paths[0], choice) is None
    ]
    if not entries:
        raise CheckpointError(f"{path}: the part {'.'.join(choice.prefix)!r} holds no tensors")
    total = sum(count_elements(tensor) for _, tensor in merged)
    form = "torch (legacy)" if legacy else "torch"
    return Checkpoint(path, form, tuple(entries), _left(merged, choice), ".".join(choice.prefix), {}, total)


def load_object(path: Path, *, legacy: bool) -> Any:
    """Unpickle with torch's restricted unpickler, on the CPU.

    Raises:
        CheckpointError: if the file is damaged, or wants to create objects other than tensors and containers.
    """
    if not legacy:
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            # What torch deprecates in a file is nothing that its reader can change.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=not legacy)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, " ".join(str(error).split()))) from error
    # A hostile or damaged pickle can raise anything, RecursionError and MemoryError included.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path}: damaged or cut off ({type(error).__name__}: {reason})") from error


def _refusal(path: Path, message: str) -> str:
    detail = message.partition("WeightsUnpickler error:")[2].strip()
    wanted = detail.partition(" by default")[0].partition(". ")[0].partition(" Please use")[0]
    if (
        "Unsupported global" in wanted
        or "Unsupported class" in wanted
        or "GLOBAL" in wanted
        or "Trying to" in wanted
        or "not allowed" in wanted
    ):
        return (
            f"{path}: refused, because it holds more than tensors and loading it could run code "
            f"({wanted[:200]}); {_WAY_OUT}"
        )
    return f"{path}: refused, because its pickle is damaged or was not written by torch.save ({wanted[:200]})"


def _check_archive(path: Path) -> None:
    """Tell other kinds of zip archives apart, and compare the sizes that it claims with what is there."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: the zip archive is cut off or damaged ({error})") from error
    parts = {member.filename.partition("/")[2] or member.filename for member in members}
    if "constants.pkl" in parts or any(part.startswith("code/") for part in parts):
        raise CheckpointError(
            f"{path}: a TorchScript archive, which holds a program and not only weights; load it with torch.jit.load "
            "where you trust it, and save its state_dict()"
        )
    if "archive_format" in parts or "serialized_exported_program.json" in parts:
        raise CheckpointError(
            f"{path}: a torch.export archive, which holds a program and not only weights; load it with "
            "torch.export.load where you trust it, and save its state_dict"
        )
    if "data.pkl" not in parts:
        raise CheckpointError(f"{path}: a zip archive, but not one that torch.save writes (it has no data.pkl)")
    claimed, size = sum(member.file_size for member in members), path.stat().st_size
    if claimed > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(
            f"{path}: its members are compressed or claim {claimed} bytes in a file of {size}; torch.save does neither"
        )


def _check_storages(tensors: list[Tensor], path: Path) -> None:
    """Refuse storages that claim more bytes than the file has; none of them has been touched yet."""
    claimed = {}
    for tensor in tensors:
        if is_plain(tensor):
            storage = tensor.untyped_storage()
            claimed[storage.data_ptr()] = storage.nbytes()
    if sum(claimed.values()) > path.stat().st_size:
        raise CheckpointError(
            f"{path}: its tensors claim {sum(claimed.values())} bytes in a file of {path.stat().st_size}; it is damaged"
        )


def _left_of(path: nested.Path, choice: nested.Choice) -> nested.Path | None:
    """Return the part that was left and holds `path`; None for what was taken."""
    return next((path[:depth] for depth in range(1, len(path) + 1) if path[:depth] in choice.left), None)


def _left(merged: list[tuple[list[nested.Path], Tensor]], choice: nested.Choice) -> tuple[Left, ...]:
    counts = dict.fromkeys(choice.left, (0, 0))
    for paths, tensor in merged:
        part = _left_of(paths[0], choice)
        if part is not None:
            tensors, elements = counts[part]
            counts[part] = (tensors + 1, elements + count_elements(tensor))
    return tuple(Left(".".join(part), *counts[part], choice.left[part]) for part in choice.left)
