"""The search for multipliers within a time budget: Fast, sweep, the adjoint fixed point, then Newton or Adam."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from opnorm.certificate.network.stages import Chain
from opnorm.network.covariance import Forward, bound_squared
from opnorm.network.multipliers.adam import adam
from opnorm.network.multipliers.afp import adjoint_fixed_point
from opnorm.network.multipliers.fast import fast
from opnorm.network.multipliers.newton import applies, newton, seconds_per_step
from opnorm.network.multipliers.sweep import sweep

METHODS = ("fast", "sweep", "afp", "adam", "newton")
_AFP_ITERATIONS = 30
_ADAM_ITERATIONS = 60
_NEWTON_STEPS = 80
_NEWTON_TYPICAL = 30
_CLOSE = 1.005
_ADJOINT_BYTES = 1.5e9


@dataclass(frozen=True, eq=False)
class Found:
    """Multipliers and what they promise before the proof.

    Attributes:
        multipliers: one tensor for each stage.
        estimate: of the bound, in plain floating point.
        method: which search gave them.
    """

    multipliers: list[Tensor]
    estimate: float
    method: str


def search(chain: Chain, seconds: float, upto: str = METHODS[-1], target: float = 0.0) -> Found:
    """The best multipliers found within a budget; every method starts from the best of those before it.

    Args:
        chain: the stages.
        seconds: budget; the first method runs in any case.
        upto: the last of `METHODS` to try.
        target: a lower bound of the constant: the search ends when it is within 0.5 % of it.
    """
    last = METHODS.index(upto)
    started = time.monotonic()
    with torch.no_grad():
        slim = memory_of(chain) > _ADJOINT_BYTES
        best, name = fast(chain, slim=slim), "fast"
        once = time.monotonic() - started
        last = 0 if slim else last

        def attempt(level: int, cost: float, limit: int, least: int, run: Callable[[int, float], Forward]) -> None:
            nonlocal best, name
            left = seconds - (time.monotonic() - started)
            rounds = min(limit, int(left / (cost * once + 1e-4)))
            if last < level or rounds < least or _size(best) <= _CLOSE * target:
                return
            try:
                trial = run(rounds, left)
            except LinAlgError:  # numbers so far apart that a factorisation fails: no claim is lost
                return
            if _size(trial) < _size(best):
                best, name = trial, METHODS[level]

        attempt(1, 3, 1, 1, lambda rounds, left: sweep(chain, best))
        attempt(2, 2, _AFP_ITERATIONS, 3, lambda rounds, left: adjoint_fixed_point(chain, best, rounds))
        step = seconds_per_step(chain)
        left = seconds - (time.monotonic() - started)
        if applies(chain) and last == len(METHODS) - 1 and _NEWTON_TYPICAL * step < left:
            attempt(4, 0, _NEWTON_STEPS, 1, lambda rounds, left: newton(chain, best, rounds, seconds=left))
        else:
            attempt(3, 5, _ADAM_ITERATIONS, 10, lambda rounds, left: adam(chain, best, rounds, seconds=left))
    return Found(best.multipliers, _size(best), name)


def memory_of(chain: Chain) -> float:
    """Bytes that a forward pass with everything the adjoint needs would hold."""
    numbers = 0
    for stage in chain.choices:
        rows, columns = stage.spread.value.shape[-2:]
        numbers += max(stage.spread.value.shape[0], 1) * (2 * rows * rows + columns * columns)
    return 16.0 * numbers


def _size(result: Forward) -> float:
    squared = float(bound_squared(result))
    return squared**0.5 if squared >= 0 else math.inf
