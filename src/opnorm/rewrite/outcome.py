"""What was done to a checkpoint, as pure data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opnorm._enclosure import Enclosure
from opnorm.certificate.format import Certificate
from opnorm.checkpoint import Left

Action = Literal["divided", "unchanged"]


@dataclass(frozen=True)
class Changed:
    """A weight that the certificate bounds.

    Attributes:
        name: canonical.
        aliases: other names of the same memory; they were changed with it.
        shape: of the tensor.
        dtype: as stored, before and after.
        role: how it was read: "linear", "conv2d", "embedding", ...
        before: enclosure of the norm that it had; of the largest part where a tensor holds several matrices.
        bound: what its norm is proved to be at most, as stored.
        action: `unchanged` where mode "clip" found nothing to do, or the weight is zero.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    role: str
    before: Enclosure
    bound: float
    action: Action


@dataclass(frozen=True)
class Kept:
    """A tensor whose bytes were copied, and why it was not divided."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    elements: int
    reason: str


@dataclass(frozen=True)
class Outcome:
    """The result of normalising a checkpoint.

    Attributes:
        source: the file or folder that was read.
        target: the one that was written.
        certificate_path: where the certificate was written.
        certificate: its contents.
        changed: weights with a bound, in the order of the file.
        kept: tensors that were copied.
        left: parts of a nested file that hold no weights of the model; they were copied.
    """

    source: Path
    target: Path
    certificate_path: Path
    certificate: Certificate
    changed: tuple[Changed, ...]
    kept: tuple[Kept, ...]
    left: tuple[Left, ...]
