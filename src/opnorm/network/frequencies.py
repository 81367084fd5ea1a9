"""The search in Fourier space where all stages of all frequencies together would fill the memory."""

import time
from collections.abc import Iterator

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from opnorm.certificate.network.check import chain_of, chains_of
from opnorm.certificate.network.cost import Cost, dense_cost, fourier_cost
from opnorm.certificate.network.fourier_chain import fourier_chain, fourier_walk
from opnorm.certificate.network.maps import Weights
from opnorm.certificate.network.program import Program
from opnorm.certificate.network.stages import Chain
from opnorm.errors import TooLargeError
from opnorm.network.covariance import fixed
from opnorm.network.lockstep import lockstep
from opnorm.network.multipliers.fast import closed_form
from opnorm.network.search import METHODS, Found, search

_HELD_BYTES = 3e9
_SAMPLE = 6
_LAST = METHODS.index("afp")


def affordable(
    program: Program,
    weights: Weights,
    calculus: str,
    seconds: float,
    upto: str,
    *,
    target: float,
    longest: float,
) -> tuple[Found, tuple[Chain] | Iterator[Chain]]:
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
        What was found, and the chains that are to be proved with it, in parts where they are large.

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
        return search(chain, seconds, upto, target), (chain,)
    return search_by_parts(program, weights, cost, seconds, upto), chains_of(program, weights, calculus)


def search_by_parts(program: Program, weights: Weights, cost: Cost, seconds: float, upto: str) -> Found:
    """Fast over all frequencies; then a search on a few of them, whose multipliers one more pass makes fit all.

    Args:
        program: what the network computes.
        weights: its stored weights, by name.
        cost: of the calculus on it.
        seconds: budget; Fast runs in any case.
        upto: the last method to try; Adam's tape would take too much memory.
    """
    parts = cost.parts()
    started = time.monotonic()
    with torch.no_grad():
        multipliers, bound = lockstep([fourier_walk(program, weights, part=p) for p in parts], closed_form)
        best = Found(multipliers, bound, "fast")
        once = time.monotonic() - started
        sample = cost.sample(_SAMPLE)
        upto = METHODS[min(METHODS.index(upto), _LAST)]
        # Two passes to come, and a few rounds on the sample, or there is nothing to gain.
        left = seconds - 2 * once
        if upto == "fast" or left < 10 * once * len(sample) / cost.frequencies:
            return best
        try:
            found = search(fourier_chain(program, weights, part=sample), left, upto)
            walks = [fourier_walk(program, weights, part=p) for p in parts]
            multipliers, bound = lockstep(walks, fixed(found.multipliers))
        except LinAlgError:  # numbers so far apart that a factorisation fails: no claim is lost
            return best
    return min(best, Found(multipliers, bound, f"{found.method} on {len(sample)} of {cost.frequencies} frequencies"),
               key=lambda f: f.estimate)  # fmt: skip
