"""The product of the norms with each channel in units of its own, for networks that are too large for the calculus."""

import torch
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from opnorm.certificate.network.program import Program
from opnorm.certificate.network.rescaled import rescaled
from opnorm.errors import CertificateError
from opnorm.graph import Graph
from opnorm.network.calculus import Candidate
from opnorm.network.multipliers.frames import frames
from opnorm.network.naive import Naive, naive
from opnorm.network.search import Found

_SEARCH, _WHOLE = 1.5, 2.5
"""Seconds of the search, and of that and the proof, in those of the naive rules."""
_MORE = 0.5


def rescaled_bound(
    program: Program,
    graph: Graph,
    plain: Naive,
    *,
    best: Candidate | None,
    once: float,
    seconds: float,
    remarks: list[str],
) -> Candidate | None:
    """The better one of `best` and the rescaled product, proved by the naive rules.

    Args:
        program: what the network computes.
        graph: with its weights.
        plain: its naive bound.
        best: what was found before.
        once: seconds that the naive bound took.
        seconds: budget.
        remarks: told why it was not begun.
    """
    whole = _WHOLE * once + _MORE
    if whole > seconds:
        remarks.append(f"rescaled product: it would take about {whole:.0f} s more; a larger time_budget allows it")
        return best
    try:
        units = frames(program, graph.weights, plain, _SEARCH * once + _MORE)
        if units is None:
            return best
        with torch.no_grad():
            framed = naive(rescaled(program, graph.weights, units), graph.weights)
    except (CertificateError, LinAlgError) as problem:
        remarks.append(f"rescaled product: {problem}")
        return best
    if framed.total >= (plain.total if best is None else best.upper):
        return best
    pairwise = None if best is None else best.pairwise
    found = Found(units, framed.total, "product")
    return Candidate(framed.total, pairwise, found, "rescaled", framed.constants)
