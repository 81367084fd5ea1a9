"""Hugging Face folders: one file, or shards with an index."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opnorm.checkpoint.entry import Checkpoint, Left
from opnorm.errors import CheckpointError

Opener = Callable[[Path], Checkpoint]

INDEX_SUFFIX = ".index.json"
_SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
_SAFE, _TORCH = (".safetensors",), (".pt", ".pth", ".bin", ".ckpt")


def checkpoint_in(folder: Path) -> Path:
    """Return the checkpoint in a folder: the index of its shards, or its only weight file.

    Raises:
        CheckpointError: if there is none, or several that exclude each other.
    """
    try:
        names = sorted(item.name for item in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from error
    # safetensors before torch's pickles where a folder offers both, as transformers does.
    for suffix in (f".safetensors{INDEX_SUFFIX}", f".bin{INDEX_SUFFIX}"):
        found = [name for name in names if name.endswith(suffix)]
        if len(found) > 1:
            raise CheckpointError(f"{folder}: several checkpoints ({', '.join(found)}); give the path of one")
        if found:
            return folder / found[0]
    for name in _SINGLE:
        if name in names:
            return folder / name
    for suffixes in (_SAFE, _TORCH):
        found = [name for name in names if name.endswith(suffixes)]
        if len(found) == 1:
            return folder / found[0]
        if found:
            raise CheckpointError(f"{folder}: several weight files and no index ({', '.join(found[:10])}); give one")
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        raise CheckpointError(
            f"{folder}: a distributed checkpoint; convert it with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    raise CheckpointError(f"{folder}: no checkpoint in this folder (no safetensors, no index, no torch file)")


def others_in(folder: Path, taken: Path) -> tuple[Left, ...]:
    """Return the weight files of a folder that are not read because `taken` is."""
    shards = set(read_index(taken)[0].values()) if taken.name.endswith(INDEX_SUFFIX) else set()
    names = sorted(item.name for item in folder.iterdir() if item.name.endswith((*_SAFE, *_TORCH)) and item.is_file())
    reason = f"another file of the folder, of which {taken.name} was taken; give its own path to read it"
    return tuple(Left(name, 0, 0, reason) for name in names if name != taken.name and name not in shards)


def read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return the index's map from tensor to shard and its metadata.

    Raises:
        CheckpointError: if it is malformed, or names a shard outside its folder.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        weight_map = index["weight_map"]
        metadata = index.get("metadata") or {}
        names = [text for pair in weight_map.items() for text in pair]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not an index of shards ({type(error).__name__}: {error})") from error
    if not all(isinstance(text, str) for text in names):
        raise CheckpointError(f"{path}: not an index of shards (weight_map does not map names to names)")
    for shard in set(weight_map.values()):
        if Path(shard).name != shard or "\\" in shard or shard in {"", ".", ".."}:
            raise CheckpointError(f"{path}: names the shard {shard!r}, which is not a file of its folder; refused")
    return weight_map, {str(key): str(value) for key, value in metadata.items()}


def open_sharded(path: Path, open_shard: Opener) -> Checkpoint:
    """Open all shards that an index names, and check that every tensor is where the index says.

    Args:
        path: the index.
        open_shard: opens one shard.

    Raises:
        CheckpointError: if a shard or a key is missing; the message names it.
    """
    weight_map, metadata = read_index(path)
    if not weight_map:
        raise CheckpointError(f"{path}: an index without tensors")
    entries, left, elements = [], [], 0
    form = ""
    for shard in dict.fromkeys(weight_map.values()):
        if not (path.parent / shard).exists():
            missing = next(key for key, value in weight_map.items() if value == shard)
            raise CheckpointError(f"{path.parent}: the shard {shard} is missing (it holds {missing} and others)")
        part = open_shard(path.parent / shard)
        stored: dict[str, Any] = {entry.keys[0]: entry for entry in part.entries}
        tied = {alias for entry in part.entries for alias in entry.aliases}
        for key, home in weight_map.items():
            if home == shard and key not in stored and key not in tied:
                raise CheckpointError(f"{path.parent}: {key} is missing from {shard}, where the index says it is")
        for key, entry in stored.items():
            if weight_map.get(key) == shard:
                entries.append(entry)
            else:
                left.append(Left(f"{shard}: {key}", 1, entry.elements, "in the shard but not in the index"))
        left.extend(part.left)
        elements += part.elements
        form = part.format
    return Checkpoint(path, f"{form}, sharded", tuple(entries), tuple(left), "", metadata, elements)
