"""Checks of `input_shape`, with messages that say what fits."""

from collections.abc import Sequence
from typing import NoReturn

from opnorm.errors import InputShapeError


def sizes_of(name: str, shape: tuple[int, ...], channels: int | None, dims: int) -> tuple[int, ...]:
    """Return the spatial sizes of `shape` = (channels, *sizes).

    Raises:
        InputShapeError: if the number of axes or of channels is another, or a size is not positive.
    """
    wanted = f"({'channels' if channels is None else channels}, {', '.join(f'n{i + 1}' for i in range(dims))})"
    fits = len(shape) == dims + 1 and channels in {None, shape[0]}
    if not fits or any(n < 1 for n in shape):
        raise InputShapeError(f"{name} takes input_shape={wanted} without the batch, got {shape}")
    return shape[1:]


def refuse_missing(name: str, why: str, example: str) -> NoReturn:
    """Refuse a missing `input_shape`.

    Raises:
        InputShapeError: always.
    """
    raise InputShapeError(f"the norm of {name} depends on the size of its input ({why}); give {example}")


def per_axis(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Return one number for each axis, from one for all of them or from as many."""
    return (value,) * dims if isinstance(value, int) else tuple(value)
