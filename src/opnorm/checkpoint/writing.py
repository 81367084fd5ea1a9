"""Writing a checkpoint with some weights replaced: same format, names, dtypes, metadata and ties."""

import json
import shutil
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from opnorm.checkpoint import nested
from opnorm.checkpoint.atomic import new_folder, replacing
from opnorm.checkpoint.detect import kind_of
from opnorm.checkpoint.entry import Checkpoint, Entry
from opnorm.checkpoint.folder import INDEX_SUFFIX, read_index
from opnorm.checkpoint.reading import locate, open_checkpoint
from opnorm.checkpoint.torchfile import load_object
from opnorm.errors import ArgumentError, CheckpointError

Transform = Callable[[Entry], Tensor | None]
"""Returns the tensor to store in the place of an entry, of the same shape and dtype; None keeps what is stored."""

_WEIGHT_FILES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"})
_CHUNK = 1 << 24


def rewrite(src: str | PathLike[str], dst: str | PathLike[str], transform: Transform, part: str = "") -> Checkpoint:
    """Copy a checkpoint, asking `transform` once for every entry of it; parts that were left are copied as they are.

    safetensors are written tensor by tensor, with the header of the original byte for byte. Torch files keep their
    structure and their ties; tensors stored on a GPU become CPU tensors. A folder becomes a
    folder, with its other files.

    Args:
        src: a file or folder that `open_checkpoint` reads.
        dst: where to write; a file is replaced at the end and at once, a folder must be new.
        transform: gives the new tensors.
        part: the part to take, as for `open_checkpoint`.

    Returns:
        The checkpoint that was read.

    Raises:
        CheckpointError: if `src` cannot be read or `dst` cannot be written.
        ArgumentError: if a new tensor has another shape or dtype, or is for a weight that is stored in parts.
    """
    place = locate(src)
    checkpoint = open_checkpoint(place, part)
    by_key = {entry.keys[0]: entry for entry in checkpoint.entries}

    def changed(key: str) -> Tensor | None:
        entry = by_key.get(key)
        new = transform(entry) if entry is not None else None
        return _checked(entry, new) if entry is not None and new is not None else None

    if place.name.endswith(INDEX_SUFFIX) or Path(src).is_dir():
        sharded = place.name.endswith(INDEX_SUFFIX)
        files = list(dict.fromkeys(read_index(place)[0].values())) if sharded else [place.name]
        with new_folder(dst) as folder:
            for name in files:
                _rewrite_file(place.parent / name, folder / name, changed)
            _copy_others(place.parent, folder, place.name)
    else:
        with replacing(dst) as target:
            _rewrite_file(place, target, changed)
    return checkpoint


def _checked(entry: Entry, new: Tensor) -> Tensor:
    if entry.derived:
        raise ArgumentError(f"{entry.name}: stored in parts ({entry.derived}); fold it into one weight first")
    if tuple(new.shape) != entry.shape or str(new.dtype) != f"torch.{entry.dtype}":
        raise ArgumentError(f"{entry.name}: {entry.dtype} {entry.shape} cannot become {new.dtype} {tuple(new.shape)}")
    return new


def _rewrite_file(src: Path, dst: Path, changed: Callable[[str], Tensor | None]) -> None:
    kind = kind_of(src)
    if kind == "safetensors":
        _rewrite_safetensors(src, dst, changed)
    else:
        _rewrite_torch(src, dst, changed, legacy=kind == "torch legacy")


def _rewrite_safetensors(src: Path, dst: Path, changed: Callable[[str], Tensor | None]) -> None:
    with src.open("rb") as old, dst.open("wb") as new:
        length = old.read(8)
        header = old.read(int.from_bytes(length, "little"))
        new.write(length + header)
        table = json.loads(header)
        table.pop("__metadata__", None)
        start = new.tell()
        for key, info in sorted(table.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            begin, end = info["data_offsets"]
            tensor = changed(key)
            if tensor is None:
                old.seek(start + begin)
                _copy_bytes(old, new, end - begin)
            else:
                new.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _copy_bytes(old: BinaryIO, new: BinaryIO, count: int) -> None:
    while count:
        piece = old.read(min(count, _CHUNK))
        if not piece:
            raise CheckpointError(f"{old.name}: changed while it was being read")
        new.write(piece)
        count -= len(piece)


@torch.no_grad()
def _rewrite_torch(src: Path, dst: Path, changed: Callable[[str], Tensor | None], *, legacy: bool) -> None:
    tree = load_object(src, legacy=legacy)
    found = [(("tensor",), tree)] if isinstance(tree, Tensor) else list(nested.leaves(tree))
    for path, tensor in found:
        new = changed(".".join(path))
        if new is not None:
            # The mapping is private: writing in place keeps ties and structure, and never reaches the original file.
            tensor.copy_(new)
    torch.save(tree, dst, _use_new_zipfile_serialization=not legacy)


def _copy_others(src: Path, dst: Path, index: str) -> None:
    """Copy configuration, tokenizer and the like: not the weights in other formats, nor the indices of those."""
    for item in src.iterdir():
        foreign = item.suffix in _WEIGHT_FILES or (item.name.endswith(INDEX_SUFFIX) and item.name != index)
        if item.is_file() and not foreign:
            shutil.copy(item, dst / item.name)
