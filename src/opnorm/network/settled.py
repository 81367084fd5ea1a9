"""The quotient of a pair of inputs, proved where the rounding of its evaluation can be bounded, careful otherwise."""

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.network.forward_error import Reach, distance_up, evaluation_error, proved_quotient
from opnorm.network.lower import CAUTION, Function, Pair

_STRETCHES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4)
_WORTH = 0.5
"""Share of the measured quotient that a proved one must reach to be preferred."""
_SHIFT = 1e-3
_LEAST_ROUNDING = 1e3 * rounding.U
"""About the bound of the relative rounding error of one operation of a large network."""


def settled(function: Function, pair: Pair, reach: Reach | None = None, total: float = 0.0) -> Pair:
    """The pair with a proved quotient, or a wider one along it whose quotient can be proved, or an estimate.

    Args:
        function: the network.
        pair: as it was found.
        reach: as for `proved_quotient`; pairs are made wider only with it.
        total: the bound that the naive rules give; with a large one no proof is tried by `reach`.
    """
    with torch.no_grad():
        batches = function.inputs(torch.stack([pair.x, pair.y]))
        proved = proved_quotient(function.graph, batches, distance_up(pair.x, pair.y))
        if proved is not None and proved > _WORTH * pair.quotient:
            return Pair(pair.x, pair.y, proved, "proved")
        measured = _careful(function, pair)
        if proved is None or reach is None or total * _LEAST_ROUNDING > pair.quotient:
            return measured
        wider = _wider(function, pair, reach)
        return wider if wider is not None and wider.quotient > _WORTH * measured.quotient else measured


def _wider(function: Function, pair: Pair, reach: Reach) -> Pair | None:
    """The pair along the same line of which most is left once the errors are taken off."""
    doubt = evaluation_error(function.graph, function.inputs(torch.stack([pair.x, pair.y])), reach)
    if doubt is None:
        return None
    ends = [pair.x + stretch * (pair.y - pair.x) for stretch in _STRETCHES]
    left = [(_moved(function, pair.x, y) - doubt) / float((y - pair.x).norm()) for y in ends]
    y = ends[max(range(len(ends)), key=left.__getitem__)]
    both = function.inputs(torch.stack([pair.x, y]))
    proved = proved_quotient(function.graph, both, distance_up(pair.x, y), reach)
    return None if proved is None else Pair(pair.x, y, proved, "proved")


def _moved(function: Function, x: Tensor, y: Tensor) -> float:
    first, second = function(torch.stack([x, y]))
    return float(torch.linalg.vector_norm(second - first))


def _careful(function: Function, pair: Pair) -> Pair:
    """The measured quotient, less twice what it changes by where both inputs move about as far as they are apart."""
    generator = torch.Generator().manual_seed(1)
    gap = pair.y - pair.x
    shift = torch.randn(gap.shape, generator=generator, dtype=gap.dtype)
    shift *= min(float(gap.norm()), _SHIFT * max(1.0, float(pair.x.norm()))) / shift.norm()
    first, second = function(torch.stack([pair.x, pair.y]))
    third, fourth = function(torch.stack([pair.x + shift, pair.y + shift]))
    noise = torch.linalg.vector_norm((second - first) - (fourth - third))
    quotient = float((torch.linalg.vector_norm(second - first) - 2 * noise) / gap.norm()) * (1 - CAUTION)
    return Pair(pair.x, pair.y, max(0.0, min(quotient, pair.quotient)))
