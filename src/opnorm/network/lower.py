"""Lower bounds: difference quotients of explicit pairs of inputs, found from the data by power iteration and ascent."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opnorm._enclosure import Guarantee
from opnorm.errors import OpnormError
from opnorm.graph import Graph
from opnorm.graph.apart import in_double
from opnorm.graph.batch import evaluate

CAUTION = 1e-7
"""Relative reduction of a measured quotient: usually far above the rounding of a float64 evaluation of it."""

_FAR = (0.1, -0.1, 1.0, -1.0, 10.0, -10.0)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two inputs, flattened and one after the other, and the quotient that they attain.

    Attributes:
        x: one input.
        y: the other.
        quotient: a lower bound of `|f(x) - f(y)| / |x - y|`.
        guarantee: `proved` where the rounding of the evaluation is bounded operation by operation; `estimate` where the
            quotient is the one of a float64 evaluation, reduced by 1e-7 of it and by what a shift of the pair changes,
            because an operation (tanh, say) has only its library's accuracy or the bound of the rounding is too large.
    """

    x: Tensor
    y: Tensor
    quotient: float
    guarantee: Guarantee = "estimate"


Clip = Callable[[Tensor], Tensor]


class Function:
    """The network on flattened inputs in float64: (2, n) -> (2, m)."""

    def __init__(self, graph: Graph, batches: tuple[Tensor, ...]) -> None:
        self.graph = Graph(
            tuple(replace(n, args=in_double(n.args), kwargs=in_double(n.kwargs)) for n in graph.nodes),
            graph.inputs,
            graph.outputs,
            {k: v.double() if v.is_floating_point() else v for k, v in graph.weights.items()},
            graph.derived,
            graph.labels,
        )
        self.batches = batches

    def start(self) -> Tensor:
        """The example, shape (2, n)."""
        return torch.cat([b.reshape(2, -1).double() for b in self.batches if b.is_floating_point()], 1)

    def __call__(self, x: Tensor) -> Tensor:
        """Evaluate the outputs."""
        values = self.values(x)
        return torch.cat([self.graph[n].samples(values[n]).reshape(2, -1) for n in self.graph.outputs], 1)

    def values(self, x: Tensor) -> dict[str, Tensor]:
        """The result of every node."""
        return evaluate(self.graph, self.inputs(x))

    def inputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The batches that flattened inputs stand for, all with the first sample's labels: two inputs share theirs."""
        parts, start = [], 0
        for batch in self.batches:
            if not batch.is_floating_point():
                parts.append(batch[:1].expand_as(batch).contiguous())
                continue
            size = batch[0].numel()
            parts.append(x[:, start : start + size].reshape(batch.shape).contiguous())
            start += size
        return tuple(parts)


def attained(
    function: Function,
    starts: Tensor,
    clip: Clip | None = None,
    power: int = 12,
    ascent: int = 30,
    *,
    seconds: float = math.inf,
) -> Pair | None:
    """The best pair that was found from the rows of `starts`, shape (k, n).

    None where evaluation in float64 fails, or no two inputs that were tried differ in their results.

    Args:
        function: the network.
        starts: inputs to start from.
        clip: projects inputs onto the region that the pair must lie in.
        power: power iterations on the Jacobian at each point.
        ascent: gradient steps on the quotient of a pair.
        seconds: after which no further step is begun; what was found by then is measured.
    """
    deadline = time.monotonic() + seconds
    clip = clip or (lambda x: x)
    generator = torch.Generator().manual_seed(0)
    best: Pair | None = None
    try:
        for chunk in torch.split(starts, 2):
            x = clip(chunk if len(chunk) == 2 else chunk.repeat(2, 1))
            direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            for climb in (False, True) if ascent else (False,):
                if best is not None and time.monotonic() > deadline:
                    return best
                if climb:
                    x, direction = _climbed(function, x, direction, clip, ascent, deadline=deadline)
                direction = _top_direction(function, x, direction, power, deadline)
                best = _better(best, _measured(function, x, direction, clip, deadline))
    except (RuntimeError, OpnormError):  # an operation without a derivative or without float64
        return best or _undirected(function, starts, clip, deadline)
    return best


def _undirected(function: Function, starts: Tensor, clip: Clip, deadline: float) -> Pair | None:
    """A pair of neighbours in any direction, for a network that has no derivative."""
    x = clip(starts[:2] if len(starts) > 1 else starts.repeat(2, 1))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        return _measured(function, x, direction / _norms(direction), clip, deadline)
    except (RuntimeError, OpnormError):
        return None


def _top_direction(function: Function, x: Tensor, direction: Tensor, steps: int, deadline: float) -> Tensor:
    """Power iteration on J^T J at each row; J v by a central difference, which needs no second derivative."""
    pull = torch.func.vjp(function, x)[1]
    width = 1e-6 * _norms(x).clamp_min(1e-3)

    def push(v: Tensor) -> Tensor:
        return (function(x + width * v) - function(x - width * v)) / (2 * width)

    for _ in range(steps):
        if time.monotonic() > deadline:
            break
        direction = direction / _norms(direction)
        new = pull(push(direction))[0]
        if float(_norms(new).min()) == 0.0:
            return direction
        direction = new
    return direction / _norms(direction)


def _climbed(
    function: Function, x: Tensor, direction: Tensor, clip: Clip, steps: int, *, deadline: float
) -> tuple[Tensor, Tensor]:
    """Gradient ascent on the quotient of a pair that is wide enough to see other pieces of the function."""
    width = 0.1 * x.norm(dim=1, keepdim=True).clamp_min(1e-3)
    point = x.clone().requires_grad_()
    gap = (direction / _norms(direction) * width).requires_grad_()
    optimiser = torch.optim.Adam([point, gap], lr=float(width.mean()) / 10 / x.shape[1] ** 0.5)
    for _ in range(steps):
        if time.monotonic() > deadline:
            break
        optimiser.zero_grad()
        with torch.enable_grad():
            quotient = _norms(function(point + gap) - function(point)) / _norms(gap)
            (-quotient.clamp_min(1e-30).log().sum()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        with torch.no_grad():
            point.copy_(clip(point))
    return point.detach(), gap.detach()


def _measured(function: Function, x: Tensor, direction: Tensor, clip: Clip, deadline: float) -> Pair | None:
    """The best quotient along a direction over a few distances, or over the first ones until the deadline.

    Where nothing changes nearby (every ReLU is off, say), from farther off.
    """
    best: Pair | None = None
    size = x.norm(dim=1, keepdim=True).clamp_min(1e-3)
    with torch.no_grad():
        base = function(x)
        for step in (1e-4, 1e-3, 1e-5, -1e-4, *_FAR):
            if best is not None and (step in _FAR or time.monotonic() > deadline):
                break
            wide = size.clamp_min(x.shape[1] ** 0.5) if step in _FAR else size
            y = clip(x + step * wide * direction)
            quotient = _norms(function(y) - base) / _norms(y - x)
            row = int(quotient.nan_to_num(-1).argmax())
            value = float(quotient[row]) * (1 - CAUTION)
            if value > 0 and torch.isfinite(quotient[row]).all():
                best = _better(best, Pair(x[row].clone(), y[row].clone(), value))
    return best


def _better(one: Pair | None, two: Pair | None) -> Pair | None:
    if one is None or two is None:
        return one or two
    return max(one, two, key=lambda pair: pair.quotient)


def _norms(x: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norms
