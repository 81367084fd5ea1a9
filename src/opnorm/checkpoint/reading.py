"""A path -> a checkpoint: which reader, canonical names, and the weights that are stored in parts."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

from torch import Tensor

from opnorm.checkpoint.derived import recompose
from opnorm.checkpoint.detect import kind_of
from opnorm.checkpoint.entry import Checkpoint, Entry
from opnorm.checkpoint.folder import INDEX_SUFFIX, checkpoint_in, open_sharded, others_in
from opnorm.checkpoint.names import canonical_names
from opnorm.checkpoint.safe import open_safetensors
from opnorm.checkpoint.tensors import from_state
from opnorm.checkpoint.torchfile import open_torch
from opnorm.errors import CheckpointError


def open_checkpoint(path: str | PathLike[str], part: str = "") -> Checkpoint:
    """Open a safetensors file, a Hugging Face folder or index, or a file of `torch.save`, without reading its data.

    Args:
        path: the file or folder.
        part: for nested torch files, the part to take as a dotted path, such as "ema"; "" lets the names decide.

    Raises:
        CheckpointError: if it cannot be read; the message names the file, the reason and the way out.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": torch.eye(2)}, f"{folder}/model.safetensors")
        ...     [(entry.name, entry.shape, entry.dtype) for entry in open_checkpoint(folder).entries]
        [('fc.weight', (2, 2), 'float32')]
    """
    taken = locate(path)
    stored = open_stored(taken, part)
    if taken != Path(path):
        stored = replace(stored, left=(*stored.left, *others_in(Path(path), taken)))
    return named(stored)


def open_state(state: Mapping[str, Tensor], label: str) -> Checkpoint:
    """Read a state dict in memory like a file; `label` says what it is of."""
    return named(from_state(state, label))


def stored_tensors(path: str | PathLike[str], part: str = "") -> Mapping[str, Tensor]:
    """The tensors of a checkpoint as they are stored, each read when it is asked for.

    They answer to their stored names, and to the names that they have in the model where wrappers added something.

    Raises:
        CheckpointError: if it cannot be read.
    """
    entries = {n: e for e in open_stored(locate(path), part).entries for n in (e.name, *e.aliases)}
    short = {new: entries[old] for old, new in canonical_names(entries).items() if new not in entries}
    return _Stored(entries, short)


class _Stored(Mapping[str, Tensor]):
    """A mapping that lists the stored names only, and knows the short ones too."""

    def __init__(self, entries: dict[str, Entry], short: dict[str, Entry]) -> None:
        self.entries, self.short = entries, short

    def __getitem__(self, name: str) -> Tensor:
        return (self.entries if name in self.entries else self.short)[name].load()

    def __contains__(self, name: object) -> bool:
        return name in self.entries or name in self.short

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def named(stored: Checkpoint) -> Checkpoint:
    """Give the entries canonical names, and put weights together that are stored in parts."""
    names = canonical_names(name for entry in stored.entries for name in (entry.name, *entry.aliases))
    entries = (
        replace(entry, name=names[entry.name], aliases=tuple(names[alias] for alias in entry.aliases))
        for entry in stored.entries
    )
    return replace(stored, entries=recompose(tuple(entries)))


def locate(path: str | PathLike[str]) -> Path:
    """Return the file that a path stands for: itself, or the checkpoint in the folder.

    Raises:
        CheckpointError: if the folder holds none.
    """
    place = Path(path)
    try:
        folder = place.is_dir()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place}: cannot be read ({error})") from error
    return checkpoint_in(place) if folder else place


def open_stored(path: Path, part: str = "") -> Checkpoint:
    """Open a file or an index with the tensors as they are stored, under their stored names."""
    if path.name.endswith(INDEX_SUFFIX):
        return open_sharded(path, open_stored)
    kind = kind_of(path)
    if kind == "safetensors":
        if part:
            raise CheckpointError(f"{path}: safetensors files have no parts; {part!r} cannot be taken")
        return open_safetensors(path)
    return open_torch(path, part, legacy=kind == "torch legacy")
