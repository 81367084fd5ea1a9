"""Writing beside and renaming: an interrupt leaves what was there before."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opnorm.errors import CheckpointError


@contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write a file to, and put it in the place of `target` when the block ends without an error.

    The path has the target's own name, in a hidden folder beside it, so that the rename stays on one file system.

    Raises:
        CheckpointError: if the folder does not exist or cannot be written to, or `target` is a folder.
    """
    place = Path(target)
    if place.is_dir():
        raise CheckpointError(f"{place}: is a folder; give the name of a file to write")
    with _beside(place) as folder:
        yield folder / place.name
        with (folder / place.name).open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(folder / place.name, place)


@contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a folder to write into, and rename it to `target` when the block ends without an error.

    Raises:
        CheckpointError: if `target` exists and is not an empty folder; nothing is ever deleted to make room.
    """
    place = Path(target)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise CheckpointError(f"{place}: exists and is not an empty folder; name a new one")
    with _beside(place) as folder:
        inner = folder / place.name
        inner.mkdir()
        yield inner
        os.replace(inner, place)


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.absolute().parent))
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be written ({error.strerror})") from error
    try:
        yield folder
    except OSError as error:
        raise CheckpointError(f"{place}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
