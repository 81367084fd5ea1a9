"""The search for multipliers within a time budget: Fast, sweep, the adjoint fixed point, then Adam."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm.certificate.network.stages import Chain
from opnorm.network.covariance import Forward, bound_squared
from opnorm.network.multipliers.adam import adam
from opnorm.network.multipliers.afp import adjoint_fixed_point
from opnorm.network.multipliers.fast import fast
from opnorm.network.multipliers.sweep import sweep

METHODS = ("fast", "sweep", "afp", "adam")
_AFP_ITERATIONS = 30
_ADAM_ITERATIONS = 60
_CLOSE = 1.002


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


def search(chain: Chain, seconds: float, upto: str = "adam", target: float = 0.0) -> Found:
    """The best multipliers found within a budget; every method starts from the best of those before it.

    Args:
        chain: the stages.
        seconds: budget; the first method runs in any case.
        upto: the last of `METHODS` to try.
        target: a lower bound of the constant: the search ends when it is within 0.2 % of it.
    """
    last = METHODS.index(upto)
    started = time.monotonic()
    with torch.no_grad():
        best, name = fast(chain), "fast"
        once = time.monotonic() - started

        def left() -> float:
            return seconds - (time.monotonic() - started)

        if last >= 1 and left() > 3 * once and not _done(best, target):
            best, name = _better(best, name, sweep(chain, best), "sweep")
        rounds = min(_AFP_ITERATIONS, int(left() / (2 * once + 1e-4)))
        if last >= 2 and rounds >= 3 and not _done(best, target):
            best, name = _better(best, name, adjoint_fixed_point(chain, best, rounds), "afp")
        rounds = min(_ADAM_ITERATIONS, int(left() / (5 * once + 1e-4)))
        if last >= 3 and rounds >= 10 and not _done(best, target):
            best, name = _better(best, name, adam(chain, best, rounds, seconds=left()), "adam")
    return Found(best.multipliers, float(bound_squared(best)) ** 0.5, name)


def _done(result: Forward, target: float) -> bool:
    return float(bound_squared(result)) ** 0.5 <= _CLOSE * target


def _better(one: Forward, name: str, two: Forward, other: str) -> tuple[Forward, str]:
    return (two, other) if float(bound_squared(two)) < float(bound_squared(one)) else (one, name)
