"""Where the frequencies of a convolution are looked at: constants of its geometry."""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from opnorm.parametrize.views import View

_SCALES = (0.5, 0.2, 0.08, 0.03, 0.012, 0.005, 0.002, 0.0008, 0.0003, 0.0001, 0.00003)
"""Steps of the search for a frequency, in units of the grid; the last decides the precision of the gradient."""

Points = tuple[tuple[float, ...], ...]


class Moves(NamedTuple):
    """Differences of frequencies."""

    by: Tensor  # shape: (moves, axes)
    phases: Tensor  # shape: (moves, taps)
    across: Tensor  # shape: (taps, moves): the same, each tap's in one piece


class Tables(NamedTuple):
    """What depends on the geometry alone."""

    positions: Tensor  # shape: (taps, axes)
    residues: Tensor  # shape: (taps,)
    classes: int  # how many residues there are
    lift: Tensor  # shape: (residues, taps): 1 where a tap has the residue
    pairs: Tensor  # shape: (taps, taps): whether two taps share a residue
    grid: Tensor  # shape: (scouts, axes): where the scouts live
    places: Tensor  # shape: (scouts, taps): the phases there
    moves: Moves  # where the tracked frequency may go from where it is
    nearby: Moves  # where a scout may go
    close: Moves  # of those, the ones that are not too far from its place
    reach: Tensor  # shape: (axes,): how far a scout may be from its place in the grid


def tables(view: View, dtype: torch.dtype, device: torch.device) -> Tables:
    """Return the constants of a geometry in a real dtype."""
    return _tables(
        view.positions, view.residues, view.strides, view.torus, view.template.dtype.is_complex, dtype, device
    )


@lru_cache(maxsize=128)
def _tables(
    positions: tuple[tuple[int, ...], ...],
    residues: tuple[int, ...],
    strides: tuple[int, ...],
    torus: tuple[int, ...] | None,
    is_complex: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tables:
    classes = torch.tensor(residues, device=device)
    counts = [
        min(2 * -(-(max(axis) + 1) // stride) + 1, 12)
        for axis, stride in zip(zip(*positions, strict=True), strides, strict=True)
    ]
    spacing = [2 * torch.pi / (n * s) for n, s in zip(counts, strides, strict=True)]
    everywhere = _points([[h * i for i in range(n)] for n, h in zip(counts, spacing, strict=True)])
    # A frequency and its shift by a multiple of 2 pi / stride are the same map, up to a rotation; of a real kernel a
    # frequency and its negative are conjugates.
    places = [
        place
        for place in product(*map(range, counts))
        if is_complex or place <= tuple(-i % n for i, n in zip(place, counts, strict=True))
    ]
    grid = [tuple(h * i for i, h in zip(place, spacing, strict=True)) for place in places]
    steps = [point for scale in _SCALES for point in _points([[0.0, h * scale, -h * scale] for h in spacing])]

    def existing(points: Points | list[tuple[float, ...]]) -> list[tuple[float, ...]]:
        if torus is not None:  # only these frequencies exist
            units = [2 * torch.pi / n for n in torus]
            points = [tuple(round(x / u) * u for x, u in zip(point, units, strict=True)) for point in points]
        return list(dict.fromkeys(points))

    def placed(points: list[tuple[float, ...]]) -> Tensor:
        return torch.tensor(points, dtype=torch.float64).to(device, dtype)

    taps = torch.tensor(positions, dtype=dtype, device=device)
    reach = [0.8 * h for h in spacing]
    nearby = existing(steps)
    # Chosen on the host: a selection on the device would make the host wait.
    close = [point for point in nearby if all(abs(x) <= far for x, far in zip(point, reach, strict=True))]
    moves = existing([*steps, *everywhere]) if len(everywhere) <= 256 else nearby
    home = placed(existing(grid))
    lift = classes == torch.arange(max(residues) + 1, device=device)[:, None]
    return Tables(
        taps,
        classes,
        max(residues) + 1,
        lift.to(dtype.to_complex()),
        classes[:, None] == classes[None, :],
        home,
        phases_of(taps, home),
        _moves(taps, placed(moves)),
        _moves(taps, placed(nearby)),
        _moves(taps, placed(close)),
        torch.tensor(reach, dtype=dtype, device=device),
    )


def _moves(positions: Tensor, by: Tensor) -> Moves:
    phases = phases_of(positions, by)
    return Moves(by, phases, phases.mT.contiguous())


def _points(axes: list[list[float]]) -> Points:
    return tuple(product(*axes))


def phases_of(positions: Tensor, omega: Tensor) -> Tensor:
    """`exp(i w.p_j)`, shape (..., taps)."""
    angle = torch.nn.functional.linear(omega, positions)
    return torch.polar(torch.ones_like(angle), angle)
