"""The value of each tensor at the centre of a region, as computed in float64, and how far it is from the exact one."""

import math

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.maps import Scale, Weights
from opnorm.certificate.network.program import Concat, Elementwise, Input, Linear, Opaque, Step, Sum
from opnorm.certificate.network.region import norm_up
from opnorm.certificate.network.stages import per_element
from opnorm.graph import Graph, Node, Ref, Weight
from opnorm.network.distance import Distance

EVALUATION = 1e-13
"""Relative error allowed for one operation of the evaluation, far above float64's for short sums."""


def relative(terms: int) -> float:
    """The same for an operation that sums as many terms."""
    return max(EVALUATION, rounding.gamma(terms + 8))


def shifted(graph: Graph, values: dict[str, Tensor], name: str, start: str) -> Tensor:
    """The rounding on the way from a step to what reads it: operations that are no steps, such as adding a bias.

    Args:
        graph: of the model.
        values: of its nodes.
        name: the node that is read.
        start: the node of the step.
    """
    total = torch.zeros_like(values[name])
    while name != start:
        total = total + EVALUATION * values[name].abs()
        before = [a.name for a in graph[name].args if isinstance(a, Ref) and a.name in values]
        if len(before) != 1 or values[before[0]].numel() != total.numel():
            return torch.full_like(total, math.inf)
        name = before[0]
    return total


def rounding_of(step: Step, given: list[Tensor], value: Tensor | None, *, node: Node, weights: Weights) -> Distance:
    """How far the computed value of a step at the centre can be from the exact one for what it reads.

    Args:
        step: the step.
        given: the values that the step's node reads.
        value: of the node.
        node: the operation.
        weights: by name.
    """
    size = value.abs() if value is not None and value.numel() == step.size else None
    top = max((float(g.abs().max()) for g in given if g.numel()), default=0.0)
    own = (size if size is not None else torch.full((step.size,), top, dtype=torch.float64)) * EVALUATION
    if isinstance(step, Input):
        return Distance(torch.zeros(step.size, dtype=torch.float64), 0.0)
    if isinstance(step, Linear):
        width = math.prod(step.map.in_shape)
        read = given[0].abs() if given and given[0].numel() == width else torch.full((width,), top, dtype=torch.float64)
        count = step.map.terms(weights) + step.map.units
        lost = relative(count) * read
        if not bool(torch.isfinite(lost).all()):
            return Distance(torch.full((step.size,), math.inf, dtype=torch.float64), math.inf)
        moved = step.map.apply(lost.reshape(1, *step.map.in_shape), weights, absolute=True).reshape(-1)
        each = moved * (1 + relative(count)) + own + _hidden(step, node, weights) + (count + 1) * rounding.TINY
        return Distance.of(each, math.inf)
    if isinstance(step, Sum):
        most = max(1.0, *(abs(c) for c in step.coefficients)) * len(step.sources)
        return Distance.of(own + EVALUATION * top * most + rounding.TINY, math.inf)
    if isinstance(step, Concat):
        return Distance.of(own, math.inf)
    if isinstance(step, Elementwise):
        rough = 0 if step.label.endswith("relu") else EVALUATION * (1 + top)
        return Distance.of(own + rough + rounding.TINY, math.inf)
    assert isinstance(step, Opaque)
    around = relative(step.size) * math.hypot(*(norm_up(g.abs()) for g in given))
    error = rounding.mul_up(step.constant, around) * (1 + 1e-9) + EVALUATION * (1 + top) * step.size
    return Distance.of(torch.full((step.size,), error, dtype=torch.float64), error)


def _hidden(step: Linear, node: Node, weights: Weights) -> Tensor | float:
    """The rounding of BatchNorm's shift, whose two parts may cancel."""
    if not (isinstance(step.map, Scale) and step.map.variance):
        return 0.0
    bias, mean = (weights[a.name].double().abs() if isinstance(a, Weight) else 0.0 for a in node.args[2:4])
    per_channel = step.map.factors(weights).abs() * mean + bias
    return per_element(torch.as_tensor(per_channel) * EVALUATION, step.shape)
