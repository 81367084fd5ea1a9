"""What a checkpoint is read as: entries with lazy tensors, and what was left aside."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint; the data is read when `load` is called, and again each time.

    Attributes:
        name: canonical, unique in the checkpoint: without the prefixes and suffixes that wrappers add.
        keys: where it is stored; the first one holds the `elements` that this entry accounts for.
        shape: of the tensor that `load` returns.
        dtype: torch's name of the stored dtype, such as "bfloat16".
        elements: number of stored elements that this entry accounts for.
        load: returns the tensor on the CPU, in the stored dtype.
        aliases: names of other entries of the file that are the same memory (tied weights).
        derived: how `load` computes the weight in use from the stored tensors; "" where it is stored as it stands.
        unusable: why no weight can be read from it (quantised, integers, part of another entry); "" where one can.
        remark: what a reader must know about the weight, such as an unknown parametrization.
    """

    name: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    elements: int
    load: "Callable[[], Tensor]" = field(repr=False, compare=False)
    aliases: tuple[str, ...] = ()
    derived: str = ""
    unusable: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Left:
    """A part of a checkpoint that holds no weights of the model taken, with the reason why it was left."""

    name: str
    tensors: int
    elements: int
    reason: str


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. The file stays mapped as long as an entry of it is alive.

    Attributes:
        path: what was opened.
        format: "safetensors", "safetensors (sharded)", "torch", "torch (legacy)", ...
        entries: in the order of the file; tied tensors once.
        left: parts that were not taken, such as the optimizer's state.
        taken: the part of a nested file that was taken; "" for the whole.
        metadata: the file's own.
        elements: number of elements in the file, counted before anything was taken or left; tied tensors once.
    """

    path: Path
    format: str
    entries: tuple[Entry, ...]
    left: tuple[Left, ...]
    taken: str
    metadata: dict[str, str]
    elements: int
