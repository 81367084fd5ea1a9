"""A program on a region: slopes and constants that hold there, from bounds of what each tensor can be.

Each step gets the value at the centre (computed in float64, with a bound of its error) and how far each of its
elements, and the whole tensor, can be from it. With these, a ReLU that cannot switch has one slope, a product is
two functions with bounded slopes, and normalisation and attention have a constant.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.activations import slopes_between
from opnorm.certificate.network.maps import LinearMap, Weights
from opnorm.certificate.network.program import Concat, Elementwise, Input, Linear, Opaque, Program, Step, Sum
from opnorm.certificate.network.stages import concat_order, per_element
from opnorm.graph import Graph, Ref
from opnorm.network.naive import map_norm
from opnorm.network.region import Around

_EVALUATION = 1e-13
"""Relative error allowed for one operation of the evaluation at the centre, far above float64's for short sums."""

_LONGEST_ALIAS = 64

Sharpen = Callable[[Program, int], Tensor | None]
"""(program so far, position of a step) -> a proved Lipschitz constant for each element of the step, or None."""


@dataclass(frozen=True, eq=False)
class _Reach:
    """How far a step's elements can be from their values at the centre: each one, and all together."""

    each: Tensor
    total: float

    @staticmethod
    def of(each: Tensor, total: float) -> "_Reach":
        each = each.clamp(max=total)
        return _Reach(each, min(total, _norm_up(each)))


def localise(
    program: Program,
    graph: Graph,
    weights: Weights,
    values: dict[str, Tensor],
    *,
    region: Around,
    sharpen: Sharpen | None = None,
) -> Program:
    """The program with the slopes and constants that hold on a region; infinite ones stay where nothing is known.

    Args:
        program: with its origins.
        graph: which it comes from.
        weights: by name, the program's constants among them.
        values: of each node at the region's centre in float64, one sample, flattened.
        region: where.
        sharpen: proves constants of single elements, where that is affordable.
    """
    steps: list[Step] = []
    reaches: list[_Reach] = []
    errors: list[Tensor] = []
    moved: dict[int, int] = {}
    norms = lru_cache(maxsize=None)(lambda linear: map_norm(linear, weights))
    for position, step in enumerate(program.steps):
        node = graph[program.origins[position]]
        own = [moved[i] for i in step.sources]
        inputs = [reaches[i] for i in own]
        doubts = [errors[i] for i in own]
        names = [a.name for a in node.args if isinstance(a, Ref) and a.name in values]
        given = [_spread(values[name], graph[name].sample_shape, node.sample_shape, step) for name in names]
        if given and isinstance(step, Elementwise | Opaque):
            # What was added since the source's own step (a bias of its own) was rounded too.
            doubts = [d + _shifted(graph, values, n, d) for d, n in zip(doubts, names, strict=False)]
        new: list[Step] = [replace(step, sources=tuple(own))]
        if isinstance(step, Elementwise) and step.kind and given and given[0].numel() == step.size:
            reach = inputs[0]
            if sharpen is not None and step.kind in ("relu", "leaky_relu", "prelu", "sigmoid", "tanh"):
                so_far = Program(tuple(steps), (own[0],), program.constants)
                constants = sharpen(so_far, own[0])
                if constants is not None:
                    reach = _Reach.of(torch.minimum(reach.each, constants * region.radius * (1 + 1e-12)), reach.total)
            new = [_sloped(step, own[0], given[0], reach, doubts[0])]
        elif isinstance(step, Opaque) and step.kind == "multiply" and len(given) == 2:
            new = _product(step, own, given, inputs, doubts, start=len(steps))
        elif isinstance(step, Opaque) and step.kind and given:
            new = [_tightened(replace(step, sources=tuple(own)), given, inputs, doubts)]
        for item in new:
            sources = [reaches[i] for i in item.sources]
            ceiling = _ceiling(item, given, inputs, doubts)
            reaches.append(_reach_of(item, sources, weights, region, norms, ceiling=ceiling))
            errors.append(
                _error_of(
                    item, [errors[i] for i in item.sources], given, values, name=node.name, weights=weights,
                    ceiling=ceiling,
                )
            )  # fmt: skip
            steps.append(item)
        moved[position] = len(steps) - 1
    return Program(tuple(steps), tuple(moved[i] for i in program.outputs), program.constants)


def _spread(value: Tensor, shape: tuple[int, ...], wanted: tuple[int, ...], step: Step) -> Tensor:
    """An argument's value, enlarged to the shape of a product where it was broadcast."""
    if not (isinstance(step, Opaque) and step.kind == "multiply") or value.numel() == step.size:
        return value
    return value.reshape(shape).expand(wanted).reshape(-1)


def _shifted(graph: Graph, values: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The rounding of the values on the way from a step to what reads it: shifts, which are no steps."""
    total = torch.zeros_like(like)
    for _ in range(_LONGEST_ALIAS):
        node = graph[name]
        if values[name].numel() == like.numel():
            total = total + _EVALUATION * values[name].abs()
        before = [a.name for a in node.args if isinstance(a, Ref) and a.name in values]
        if not node.op.startswith(("aten.add", "aten.sub")) or len(before) != 1:
            return total
        name = before[0]
    return torch.full_like(like, math.inf)


def _sloped(step: Elementwise, source: int, value: Tensor, reach: _Reach, doubt: Tensor) -> Elementwise:
    """An activation with the slopes that it has near its value at the centre."""
    width = (reach.each + doubt + _EVALUATION * value.abs()) * (1 + 1e-12) + 1e-300
    wide = (per_element(step.low, step.shape), per_element(step.high, step.shape))
    low, high = slopes_between(step.kind, value - width, value + width, wide)
    # The slopes are per element now, and hold on the region only: the kind no longer vouches for them.
    return replace(step, sources=(source,), low=low.reshape(step.shape), high=high.reshape(step.shape), kind="")


def _product(
    step: Opaque, own: list[int], given: list[Tensor], inputs: list[_Reach], doubts: list[Tensor], *, start: int
) -> list[Step]:
    """`d(x g) = g dx + x dg` with g and x halfway between two points: two functions with bounded slopes, added."""
    shape = step.shape
    ranges = []
    for value, reach, doubt in zip(given, inputs, doubts, strict=True):
        if value.numel() != reach.each.numel() or not bool(torch.isfinite(reach.each + doubt).all()):
            return [replace(step, sources=tuple(own))]
        width = (reach.each + doubt + _EVALUATION * value.abs()) * (1 + 1e-12)
        ranges.append(((value - width).reshape(shape), (value + width).reshape(shape)))
    (x_low, x_high), (g_low, g_high) = ranges
    return [
        Elementwise((own[0],), shape, f"{step.label} (first factor)", g_low, g_high),
        Elementwise((own[1],), shape, f"{step.label} (second factor)", x_low, x_high),
        Sum((start, start + 1), shape, step.label, (1.0, 1.0)),
    ]


def _tightened(step: Opaque, given: list[Tensor], inputs: list[_Reach], doubts: list[Tensor]) -> Step:
    """A constant that holds on the region, where the operation is known."""
    value, reach, doubt = given[0], inputs[0], doubts[0]
    if step.kind == "normalize" and value.numel() == reach.each.numel():
        constant = _normalising(step.parameters, value, reach, doubt)
        return replace(
            step, constant=min(step.constant, constant), reason="normalising, with the variance of the region"
        )
    if step.kind in ("square", "exp") and value.numel() == reach.each.numel():
        width = reach.each + doubt + _EVALUATION * value.abs()
        top, bottom = value + width, value - width
        if step.kind == "exp":
            low, high = bottom.exp() * (1 - 1e-9), top.exp() * (1 + 1e-9)
        else:
            low, high = 2 * bottom, 2 * top
        if bool(torch.isfinite(high).all() and torch.isfinite(low).all()):
            shape = step.shape
            return Elementwise(
                step.sources, shape, f"{step.label} on the region", low.reshape(shape), high.reshape(shape)
            )
    if step.kind == "attention" and len(given) == len(inputs) == 3:
        return replace(
            step, constant=_attention(step.parameters, given, inputs, doubts), reason="attention on the region"
        )
    return step


def _normalising(parameters: tuple[float, ...], value: Tensor, reach: _Reach, doubt: Tensor) -> float:
    """`1 / sqrt(var + eps)` with the standard deviation reduced by what the region can take from it."""
    size, eps, centred = int(parameters[0]), parameters[1], parameters[2] > 0
    groups = value.reshape(-1, size)
    middle = groups - groups.mean(1, keepdim=True) if centred else groups
    deviation = middle.norm(dim=1) / math.sqrt(size) * (1 - 1e-9)
    moved = (reach.each + doubt + _EVALUATION * value.abs()).reshape(-1, size).norm(dim=1) * (1 + 1e-9)
    moved = moved.clamp(max=reach.total + _norm_up(doubt) + _EVALUATION * _norm_up(value))
    least = (deviation - moved / math.sqrt(size) - _EVALUATION * groups.abs().amax(1)).clamp_min(0)
    under = float((least.square() + eps).min()) * (1 - 1e-9)
    return math.inf if under <= 0 else rounding.div_up(1.0, rounding.sqrt_down(under))


def _attention(parameters: tuple[float, ...], given: list[Tensor], inputs: list[_Reach], doubts: list[Tensor]) -> float:
    """`sqrt(n + (s V K)^2 + n (s V Q)^2)` with the largest norms of a query, a key and a value in the region."""
    queries, _, width, value_width, scale = parameters
    largest = []
    for value, reach, doubt, size in zip(given, inputs, doubts, (width, width, value_width), strict=True):
        around = (value.abs() + reach.each + doubt + _EVALUATION * value.abs()).reshape(-1, int(size)).norm(dim=1)
        at_most = value.reshape(-1, int(size)).norm(dim=1) + reach.total + _norm_up(doubt)
        largest.append(float(torch.minimum(around, at_most).max()) * (1 + 1e-9))
    query, key, content = (s * size for s, size in zip((1.0, 1.0, scale * (1 + 1e-12)), largest, strict=True))
    by_keys, by_queries = content * key, content * query
    total = (queries + by_keys * by_keys + queries * by_queries * by_queries) * (1 + 1e-9)
    return rounding.sqrt_up(total) if math.isfinite(total) else math.inf


def _ceiling(step: Step, given: list[Tensor], inputs: list[_Reach], doubts: list[Tensor]) -> float:
    """What no element of a step's result exceeds in size, anywhere in the region; infinite where that is not known."""
    if not isinstance(step, Opaque):
        return math.inf
    if step.kind == "normalize":
        return math.sqrt(step.parameters[0]) * (1 + 1e-9)
    if step.kind == "attention" and len(given) == len(inputs) == 3 and given[2].numel() == inputs[2].each.numel():
        # Weighted averages of the values.
        return float((given[2].abs() + inputs[2].each + doubts[2]).max()) * (1 + 1e-9)
    return math.inf


def _reach_of(
    step: Step,
    sources: list[_Reach],
    weights: Weights,
    region: Around,
    norms: Callable[[LinearMap], float],
    *,
    ceiling: float,
) -> _Reach:
    """How far the elements of a step's result can be from the centre's."""
    if isinstance(step, Input):
        return _Reach(region.spread, region.radius)
    each = torch.cat([s.each for s in sources])
    total = math.hypot(*(s.total for s in sources)) * (1 + 1e-12)
    if isinstance(step, Linear):
        spread = sources[0].each.reshape(1, *step.map.in_shape)
        finite = bool(torch.isfinite(spread).all())
        moved = (
            step.map.apply(spread, weights, absolute=True).reshape(-1) if finite else torch.full((step.size,), math.inf)
        )
        slack = 1 + rounding.gamma(step.map.terms(weights) + step.map.units + 8)
        return _Reach.of(moved.double() * slack, rounding.mul_up(norms(step.map), total) if total else 0.0)
    if isinstance(step, Sum):
        added = torch.stack([abs(c) * s.each for c, s in zip(step.coefficients, sources, strict=True)]).sum(0)
        reached = sum(abs(c) * s.total for c, s in zip(step.coefficients, sources, strict=True))
        return _Reach.of(added * (1 + 1e-12), reached * (1 + 1e-12))
    if isinstance(step, Concat):
        return _Reach.of(each[concat_order(step.shapes, step.axis)], total)
    if isinstance(step, Elementwise):
        steep = torch.maximum(per_element(step.low, step.shape).abs(), per_element(step.high, step.shape).abs())
        return _Reach.of(steep * sources[0].each * (1 + 1e-12), float(steep.max()) * total * (1 + 1e-12))
    assert isinstance(step, Opaque)
    top = rounding.mul_up(step.constant, total) if total else 0.0
    # The values at two points differ by no more than twice what each can be, wherever the points are.
    return _Reach.of(torch.full((step.size,), min(top, 2 * ceiling), dtype=torch.float64), top)


def _error_of(
    step: Step, sources: list[Tensor], given: list[Tensor], values: dict[str, Tensor], *, name: str, weights: Weights,
    ceiling: float,
) -> Tensor:  # fmt: skip
    """How far the computed value at the centre can be from the exact one."""
    value = values.get(name)
    size = value.abs() if value is not None and value.numel() == step.size else None
    top = max((float(g.abs().max()) for g in given if g.numel()), default=0.0)
    own = (size if size is not None else torch.full((step.size,), top, dtype=torch.float64)) * _EVALUATION
    if isinstance(step, Input):
        return torch.zeros(step.size, dtype=torch.float64)
    if isinstance(step, Linear):
        read = given[0].abs() if given and given[0].numel() == sources[0].numel() else torch.full_like(sources[0], top)
        carried = sources[0] + _EVALUATION * read
        if not bool(torch.isfinite(carried).all()):
            return torch.full((step.size,), math.inf, dtype=torch.float64)
        moved = step.map.apply(carried.reshape(1, *step.map.in_shape), weights, absolute=True).reshape(-1)
        return moved * (1 + 1e-9) + own
    if isinstance(step, Sum):
        total = torch.stack([abs(c) * s for c, s in zip(step.coefficients, sources, strict=True)]).sum(0)
        return total * (1 + 1e-12) + own + _EVALUATION * top
    if isinstance(step, Concat):
        return torch.cat(sources)[concat_order(step.shapes, step.axis)] + own
    if isinstance(step, Elementwise):
        steep = torch.maximum(per_element(step.low, step.shape).abs(), per_element(step.high, step.shape).abs())
        return steep * sources[0] * (1 + 1e-12) + own + _EVALUATION * (0 if step.label.endswith("relu") else 1 + top)
    assert isinstance(step, Opaque)
    joined = _norm_up(torch.cat(sources))
    spread = step.constant * joined if joined else 0.0
    error = spread * (1 + 1e-9) + _EVALUATION * (1 + top) * step.size
    return torch.full((step.size,), min(error, 2 * ceiling * (1 + 1e-6)), dtype=torch.float64)


def _norm_up(values: Tensor) -> float:
    return float(values.norm()) * (1 + rounding.gamma(values.numel() + 8)) if values.numel() else 0.0
