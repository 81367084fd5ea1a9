"""The fixed point on a few frequencies that stand for all: a coarse grid, and those where the bound is attained.

Symbols are trigonometric polynomials of low degree, so that neighbouring frequencies ask for much the same multipliers.
A network that ends in Fourier space has the largest bound over all frequencies, and few attain it; where a head sums
over them, a regular grid samples the sum.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from opnorm.certificate.network.stages import Chain
from opnorm.network.covariance import fixed
from opnorm.network.lockstep import Lockstep, lockstep
from opnorm.network.multipliers.afp import DIRECTIONS, descend, moved

FEW = 20
"""Frequencies of the first set, and how many may join in a round."""
ITERATIONS = 30
_GAIN = 2e-3


def by_working_sets(
    begin: Lockstep,
    count: int,
    build: Callable[[Tensor], Chain],
    run: Callable[[list[Tensor]], Lockstep],
    affordable: Callable[[int], bool],
) -> Lockstep:
    """Search on a set of frequencies, run on all of them, let those join where the bound is largest, and so on.

    Args:
        begin: a pass over all frequencies.
        count: number of coarse frequencies.
        build: the chain of some of them, by position.
        run: a pass over all of them with multipliers scaled to feasibility, its parts kept.
        affordable: whether there is time for a round on so many of them.

    Returns:
        The best pass over all frequencies, `begin` included.
    """
    few = set(range(0, count, max(1, count // FEW)))
    best = begin
    while affordable(len(few)):
        try:
            trial = run(_searched(build(torch.tensor(sorted(few))), best.multipliers))
        except LinAlgError:  # multipliers so far apart that S - B is singular in floating point
            break
        gained = trial.squared < (1 - _GAIN) * best.squared
        best = min(best, trial, key=lambda found: found.squared)
        more = _largest(trial) - few if apart(trial, count) else set()
        few |= more
        if not (gained or more) or not apart(trial, count):
            break
    return best


def apart(found: Lockstep, count: int) -> bool:
    """Whether the outputs are in Fourier space, so that the bound is the largest over the frequencies."""
    return sum(len(result.output) for result in found.passes) == count


def _searched(chain: Chain, multipliers: list[Tensor]) -> list[Tensor]:
    found = descend(
        lockstep([chain], fixed(multipliers), keep=True),
        lambda new: lockstep([chain], fixed(new), keep=True),
        lambda best, sharpness, step: moved([chain], best.passes, DIRECTIONS, sharpness, step),
        ITERATIONS,
    )
    return found.multipliers


def _largest(found: Lockstep) -> set[int]:
    """The frequencies with the largest bounds."""
    tops = torch.cat([torch.linalg.eigvalsh(result.output)[:, -1] for result in found.passes])
    return set(tops.topk(FEW).indices.tolist())
