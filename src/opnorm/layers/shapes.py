"""Checks of `input_shape`, with messages that say what fits."""

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


def needs_size(name: str, why: str, example: str) -> InputShapeError:
    """Return the error for a missing `input_shape`."""
    return InputShapeError(f"the norm of {name} depends on the size of its input ({why}); give {example}")
