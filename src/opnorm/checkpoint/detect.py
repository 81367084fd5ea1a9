"""What kind of file a path is, by its content; the extension proves nothing."""

from pathlib import Path
from typing import Literal

from opnorm.errors import CheckpointError

Kind = Literal["safetensors", "torch zip", "torch legacy"]

_FOREIGN = (
    (b"GGUF", "a GGUF file, whose tensors are mostly quantised; audit the safetensors checkpoint it was made from"),
    (b"\x89HDF", "an HDF5 file (Keras); export the weights as safetensors"),
    (b"\x93NUMPY", "a NumPy array; save it as safetensors"),
    (b"\x1f\x8b", "gzip-compressed; unpack it first"),
    (b"BZh", "bzip2-compressed; unpack it first"),
    (b"\xfd7zXZ", "xz-compressed; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed; unpack it first"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
)

_HEADER = 8
"""A safetensors file starts with eight bytes of length and then `{`."""


def kind_of(path: Path) -> Kind:
    """Return the format of a file, from its first bytes.

    Raises:
        CheckpointError: if it is empty, unreadable, no regular file, or no checkpoint.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder")
        if not path.is_file():
            raise CheckpointError(f"{path}: not a regular file (a device, socket or pipe)")
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not start:
        raise CheckpointError(f"{path}: an empty file; the download or the save did not finish")
    for magic, what in _FOREIGN:
        if start.startswith(magic):
            raise CheckpointError(f"{path}: {what}")
    if start.startswith(b"PK\x03\x04"):
        return "torch zip"
    if start[_HEADER : _HEADER + 1] == b"{":
        return "safetensors"
    if start[:1] == b"\x80":
        return "torch legacy"
    raise CheckpointError(f"{path}: neither safetensors nor a file of torch.save (it starts with {start[:8]!r})")
