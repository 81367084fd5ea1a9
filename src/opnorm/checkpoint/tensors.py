"""Tensors in memory -> entries: ties, what is really stored, and what holds no weight."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from opnorm.checkpoint.dtypes import reason_unusable
from opnorm.checkpoint.entry import Checkpoint, Entry

Keys = tuple[str, ...]


def from_state(state: Mapping[str, Tensor], label: str) -> Checkpoint:
    """Read a state dict in memory as a checkpoint called `label`."""
    merged = merge_ties([((key,), tensor) for key, tensor in state.items()])
    entries = tuple(entry_of(paths, tensor, 0) for paths, tensor in merged)
    return Checkpoint(Path(label), "module", entries, (), "", {}, sum(entry.elements for entry in entries))


def merge_ties(found: list[tuple[Keys, Tensor]]) -> list[tuple[list[Keys], Tensor]]:
    """Join the tensors that are the same memory, read in the same way."""
    merged: dict[object, tuple[list[Keys], Tensor]] = {}
    for index, (path, tensor) in enumerate(found):
        identity: object = index
        if is_plain(tensor) and tensor.numel():
            place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.dtype)
            identity = (place, tuple(tensor.shape), tensor.stride())
        merged.setdefault(identity, ([], tensor))[0].append(path)
    return list(merged.values())


def entry_of(paths: list[Keys], tensor: Tensor, prefix: int) -> Entry:
    """Describe a tensor that is stored under `paths`, named without their first `prefix` keys."""
    names = [".".join(path[prefix:]) or ".".join(path) for path in paths]
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Entry(
        name=names[0],
        keys=(".".join(paths[0]),),
        shape=tuple(tensor.shape),
        dtype=dtype,
        elements=count_elements(tensor),
        load=tensor.detach,
        aliases=tuple(names[1:]),
        unusable=_unusable(tensor, dtype),
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is a strided view of memory that is there."""
    return tensor.layout == torch.strided and not tensor.is_meta and not tensor.is_nested


def count_elements(tensor: Tensor) -> int:
    """Count the stored elements: a view that repeats its storage counts what is stored."""
    if is_plain(tensor):
        return min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())
    return int(tensor._values().numel()) if tensor.layout == torch.sparse_coo else 0


def _unusable(tensor: Tensor, dtype: str) -> str:
    if tensor.is_quantized:
        return f"{dtype}: quantised; the weights are codes times scales"
    if not is_plain(tensor):
        return "on the meta device, without data" if tensor.is_meta else f"{tensor.layout}: not a strided tensor"
    if tensor.numel() > count_elements(tensor):
        return f"a view that repeats {count_elements(tensor)} stored elements"
    return reason_unusable(dtype)
