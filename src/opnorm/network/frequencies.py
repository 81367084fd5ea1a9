"""The search in Fourier space where all stages of all frequencies together would fill the memory."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from opnorm.certificate.network.check import chain_of
from opnorm.certificate.network.cost import Cost, dense_cost, fourier_cost
from opnorm.certificate.network.fourier_chain import fourier_chain, fourier_walk
from opnorm.certificate.network.maps import Weights
from opnorm.certificate.network.program import Program
from opnorm.certificate.network.stages import Chain
from opnorm.errors import TooLargeError
from opnorm.network.covariance import fixed
from opnorm.network.lockstep import Lockstep, lockstep
from opnorm.network.multipliers.afp import DIRECTIONS, descend, moved
from opnorm.network.multipliers.fast import closed_form
from opnorm.network.multipliers.sweep import shapes_by_parts, twice_least
from opnorm.network.search import METHODS, Found, search
from opnorm.network.working_set import ITERATIONS, apart, by_working_sets

_HELD_BYTES = 3e9
_KEPT_BYTES = 2e9
_SMALL_BYTES = 6e7  # small blocks of memory are used again and stay in the cache
_SWEEP = 2.5
"""Cost of a sweep by parts in passes of Fast."""
_AFP = 1.4
"""Cost of an iteration of the adjoint fixed point in passes of Fast."""
_AFP_ITERATIONS, _LEAST = 30, 3
_SETS = 100
"""Fewer frequencies than this are searched on together."""


def affordable(
    program: Program,
    weights: Weights,
    calculus: str,
    seconds: float,
    upto: str,
    *,
    target: float,
    longest: float,
) -> tuple[Found, Chain | None]:
    """Search for multipliers in the way that time and memory allow.

    Args:
        program: what the network computes.
        weights: its stored weights, by name.
        calculus: `dense` or `fourier`.
        seconds: budget of the search.
        upto: the last method to try.
        target: a lower bound of the constant.
        longest: seconds that one pass and the proof may take.

    Returns:
        What was found, and the chain that it was found on; None where that is too large to be held, and is to be
        proved in the parts that `chains_of` makes.

    Raises:
        TooLargeError: if the calculus would take too long or too much memory; nothing was begun then.
    """
    cost = dense_cost(program) if calculus == "dense" else fourier_cost(program)
    if cost.held > _HELD_BYTES:
        raise TooLargeError(f"it would hold about {cost.held / 1e9:.0f} GB, more than {_HELD_BYTES / 1e9:.0f} GB")
    if cost.seconds > longest:
        raise TooLargeError(
            f"one pass and its proof would take about {cost.seconds:.0f} s here, more than {longest:.0f} s; "
            "a larger time_budget allows it"
        )
    if calculus == "dense" or len(cost.parts()) == 1:
        chain = chain_of(program, weights, calculus)
        return search(chain, seconds, upto, target), chain
    return search_by_parts(program, weights, cost, seconds, upto), None


def search_by_parts(program: Program, weights: Weights, cost: Cost, seconds: float, upto: str) -> Found:
    """Fast over all frequencies; then, where there is time, the adjoint fixed point on parts that are held together.

    Parts that are too large to be held are made anew for each pass, one stage at a time, and a sweep has to do.

    Args:
        program: what the network computes.
        weights: its stored weights, by name.
        cost: of the calculus on it.
        seconds: budget, the proof included; Fast runs in any case.
        upto: the last method to try.
    """
    started = time.monotonic()
    with torch.no_grad():
        if cost.kept <= _KEPT_BYTES and METHODS.index(upto) >= METHODS.index("afp"):
            chains = [fourier_chain(program, weights, part=p) for p in cost.parts(_SMALL_BYTES)]
            left = seconds - (time.monotonic() - started)
            return _fixed_point(chains, left, cost, partial(fourier_chain, program, weights))
        parts = cost.parts()
        best = _found(lockstep([fourier_walk(program, weights, part=p) for p in parts], closed_form), "fast")
        once = time.monotonic() - started
        if upto == "fast" or seconds - once < once * (_SWEEP + cost.proof / cost.search):
            return best
        try:
            shapes = shapes_by_parts((fourier_chain(program, weights, part=p) for p in parts), best.multipliers)
            walks = [fourier_walk(program, weights, part=p) for p in parts]
            found = _found(lockstep(walks, twice_least(shapes)), "sweep")
        except LinAlgError:  # numbers so far apart that a factorisation fails: no claim is lost
            return best
    return min(best, found, key=lambda f: f.estimate)


def _fixed_point(chains: list[Chain], seconds: float, cost: Cost, build: Callable[..., Chain]) -> Found:
    """Fast; then the fixed point on working sets, and on all frequencies for as long as there is time."""
    started = time.monotonic()

    def run(multipliers: list[Tensor]) -> Lockstep:
        return lockstep(chains, fixed(multipliers), keep=True)

    begin = lockstep(chains, closed_form, keep=True)
    once = time.monotonic() - started

    def passes() -> float:
        """How many passes of Fast there is time for, beside the proof."""
        return (seconds - (time.monotonic() - started)) / once - cost.proof / cost.search

    best, count = begin, cost.frequencies
    if count >= _SETS:

        def time_for(few: int) -> bool:
            return passes() > _AFP * (1 + ITERATIONS * few / count)

        best = by_working_sets(begin, count, lambda few: build(part=few), run, time_for)
    rounds = min(_AFP_ITERATIONS, int(passes() / _AFP))
    if rounds >= _LEAST and not (count >= _SETS and apart(begin, count)):  # what so many ask for a few ask for too
        best = descend(
            best, run, lambda found, sharpness, step: moved(chains, found.passes, DIRECTIONS, sharpness, step), rounds
        )
    return _found(best, "fast" if best is begin else "afp")


def _found(result: Lockstep, method: str) -> Found:
    return Found(result.multipliers, result.squared**0.5, method)
