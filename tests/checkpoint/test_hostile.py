"""Files that are damaged, foreign or hostile: each is refused with its name, the reason and the way out."""

import io
import json
import os
import pickle
import pickletools
import socket
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as safe_bytes
from torch import nn

from opnorm.checkpoint import open_checkpoint
from opnorm.errors import CheckpointError


def _saved(content: object, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _script() -> bytes:
    # Without the compiler: what tells the archive apart is what lies in it.
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("net/data.pkl", "net/constants.pkl", "net/code/__torch__.py", "net/version"):
            archive.writestr(name, b"x")
    return buffer.getvalue()


def _archive(names: list[str], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name in names:
            archive.writestr(name, b"\0" * 100_000)
    return buffer.getvalue()


def _safe(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.eye(2))
    return buffer.getvalue()


STATE = {"w": torch.eye(8), "b": torch.ones(8)}
WHOLE, LEGACY, SAFE = _saved(STATE), _saved(STATE, legacy=True), safe_bytes(STATE)

FILES = [
    ("empty", b"", "an empty file"),
    ("text", b"hello world, this is no checkpoint", "neither safetensors nor"),
    ("zip cut off", WHOLE[:-30], "zip archive is cut off or damaged"),
    ("zip head only", WHOLE[:100], "zip archive is cut off or damaged"),
    ("legacy cut off", LEGACY[:-20], "damaged or cut off"),
    ("legacy head only", LEGACY[:60], "damaged|refused"),
    ("safetensors cut off", SAFE[:-8], "not a whole safetensors file"),
    ("safetensors header cut off", SAFE[:20], "not a whole safetensors file"),
    ("safetensors header not JSON", _safe(b"{not json at all"), "not a whole safetensors file"),
    (
        "safetensors claims a terabyte",
        _safe({"w": {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, 2**40]}}),
        "not a whole safetensors file",
    ),
    (
        "safetensors shape overflows",
        _safe({"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 4]}}, b"\0" * 4),
        "not a whole safetensors file",
    ),
    (
        "safetensors shape and bytes differ",
        _safe({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 4]}}, b"\0" * 4),
        "not a whole safetensors file",
    ),
    ("safetensors header of 2^63 bytes", struct.pack("<Q", 2**63) + b"{" + b" " * 50, "not a whole safetensors file"),
    ("TorchScript", _script(), "TorchScript archive.*state_dict"),
    ("torch.export", _archive(["net/archive_format", "net/data/weights"]), "torch.export archive"),
    ("npz", _npz(), "no data.pkl"),
    ("zip bomb", _archive(["x/data.pkl", "x/data/0"], zipfile.ZIP_DEFLATED), "compressed or claim"),
    ("whole module", _saved(nn.Linear(2, 2)), "could run code.*Linear.*state_dict"),
    ("whole module, legacy", _saved(nn.Linear(2, 2), legacy=True), "could run code.*Linear"),
    ("plain pickle", pickle.dumps({"w": [1.0]}), "refused"),
    ("no tensors", _saved({"epoch": 3}), "holds no tensors"),
    ("a number", _saved(3), "holds no tensors"),
    ("gguf", b"GGUF" + b"\0" * 100, "GGUF"),
    ("hdf5", b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "HDF5"),
    ("gzip", b"\x1f\x8b" + b"\0" * 100, "gzip-compressed; unpack"),
    ("lfs pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ("too deep", _saved({"a": torch.ones(1), "deep": eval("[" * 70 + "torch.ones(1)" + "]" * 70)}), "nested more than"),
]


@pytest.mark.parametrize(("content", "reason"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_refused_with_a_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def _claims_more(size: int) -> bytes:
    """A legacy file whose pickle claims a storage of `size` elements, of which it holds two."""
    data = _saved({"w": torch.ones(2)}, legacy=True)
    old, new = b"K\x02N", b"\x8a\x08" + struct.pack("<q", size) + b"N"
    assert data.count(old) == 1
    return data.replace(old, new)


@pytest.mark.parametrize("size", [1000, 2**40, 2**61])
def test_storages_that_claim_more_than_the_file_holds(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(_claims_more(size))
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(path)


def test_a_storage_that_no_data_follows_is_not_read_from_elsewhere(tmp_path: Path) -> None:
    # The list of stored keys is emptied: without a check the tensor would be memory that was never written.
    data, end = _claims_more(2**28), 0
    for _ in range(4):
        *_, (_, _, stop) = pickletools.genops(data[end:])
        end += stop + 1
    (tmp_path / "x.pt").write_bytes(data[:end] + pickle.dumps([], 2))
    with pytest.raises(CheckpointError, match=r"claim \d+ bytes in a file of"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("step", range(12))
def test_no_flipped_byte_ends_in_another_error(tmp_path: Path, step: int) -> None:
    for index, content in enumerate((WHOLE, LEGACY, SAFE)):
        for place in range(step, min(len(content), 900), 12):
            path = tmp_path / f"{index}.bin"
            path.write_bytes(content[:place] + bytes([content[place] ^ 0x5A]) + content[place + 1 :])
            try:
                for entry in open_checkpoint(path).entries:
                    assert entry.unusable or entry.load().numel() == entry.elements
            except CheckpointError:
                pass


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


PLACES: list[tuple[str, Callable[[Path], object], str]] = [
    ("absent", lambda path: None, "no such file"),
    ("pipe", os.mkfifo, "not a regular file"),
    ("socket", _socket, "not a regular file"),
    ("link to nothing", lambda path: path.symlink_to(path.with_name("nothing")), "no such file"),
    ("link to itself", lambda path: path.symlink_to(path), "no such file|cannot be read"),
]


@pytest.mark.parametrize(("make", "reason"), [case[1:] for case in PLACES], ids=[case[0] for case in PLACES])
def test_paths_that_cannot_be_read(tmp_path: Path, make: Callable[[Path], object], reason: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path / "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(SAFE)
    path.chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_paths_that_no_file_can_have(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be read|no such file"):
        open_checkpoint(name)
