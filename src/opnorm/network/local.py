"""A program on a region: slopes and constants that hold there, from bounds of what each tensor can be.

Each step gets the value at the centre (computed in float64, with a bound of its error) and how far each of its
elements, and the whole tensor, can be from it. With these, a ReLU that cannot switch has one slope, a product is
two functions with bounded slopes, and normalisation and attention have a constant.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.maps import Weights
from opnorm.certificate.network.program import Elementwise, Opaque, Program, Step
from opnorm.certificate.network.region import Around
from opnorm.graph import Graph, Node, Ref
from opnorm.network.attention.scores import Scores
from opnorm.network.centre import rounding_of, shifted
from opnorm.network.distance import Distance, distance_of
from opnorm.network.local_step import limits_of, on_region
from opnorm.network.naive import map_norm
from opnorm.network.normalisation import Normalisation
from opnorm.network.read import Read
from opnorm.network.rules.ranges import Ranges

Sharpen = Callable[[Program, int], Tensor | None]
"""(program so far, position of a step) -> a proved Lipschitz constant for each element of the step, or None."""


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
    distances: list[Distance] = []
    errors: list[Distance] = []
    moved: dict[int, int] = {}
    norms = lru_cache(maxsize=None)(lambda linear: map_norm(linear, weights))
    ranges = Ranges(graph, dict(graph.weights))
    for position, step in enumerate(program.steps):
        node = graph[program.origins[position]]
        own = tuple(moved[i] for i in step.sources)
        operation = _operation(node, graph, values)
        names = [a.name for a in _operands(step, operation) if a.name in values]
        given = [_spread(values[name], graph[name].sample_shape, node.sample_shape, step) for name in names]
        reads: list[Read] = []
        if isinstance(step, Elementwise | Opaque) and step.kind and len(names) == len(own):
            for name, value, source, at in zip(names, given, step.sources, own, strict=True):
                far = distances[at]
                if sharpen is not None and step.kind in _SHARPENED:
                    far = _sharpened(far, sharpen(Program(tuple(steps), (at,), program.constants), at), region)
                if value.numel() == far.each.numel():
                    rounded = shifted(graph, values, name, _origin(program, source, node.name))
                    lost = _spread(rounded, graph[name].sample_shape, node.sample_shape, step)
                    doubt = errors[at] + Distance.of(lost, math.inf)
                    reads.append(Read.of(value, far, doubt, ranges.of(Ref(name))))
        scores = next((a for a in node.args if isinstance(a, Scores)), None)
        local = on_region(replace(step, sources=own), reads if len(reads) == len(own) else [], scores, start=len(steps))
        result = values.get(node.name)
        last = position + 1 == len(program.steps) or program.origins[position + 1] != node.name
        for item in local.steps:
            end = item is local.steps[-1]
            doubt = distance_of(item, [errors[i] for i in item.sources], weights, None, norms)
            far = distance_of(item, [distances[i] for i in item.sources], weights, region, norms)
            if end:
                doubt += local.rounding or rounding_of(item, given, result, node=operation, weights=weights)
            if end and local.each is not None:
                far = Distance.of(torch.minimum(far.each, local.each), far.total)
            if last and end and result is not None and result.numel() == item.size:
                ends = limits_of(step, reads, ranges.of(Ref(node.name)), result)
                doubt = doubt.within(result, torch.zeros_like(result), *ends)
                far = far.within(result, doubt.each, *ends)
            distances.append(far)
            errors.append(doubt)
            steps.append(item)
        moved[position] = len(steps) - 1
    outputs = [moved[i] for i in program.outputs]
    for number, at in enumerate(outputs):
        if not bool((distances[at].each > 0).any()):
            none = torch.zeros(steps[at].shape, dtype=torch.float64)
            steps.append(Elementwise((at,), steps[at].shape, "constant on the region", none, none))
            outputs[number] = len(steps) - 1
    return Program(tuple(steps), tuple(outputs), program.constants)


_SHARPENED = ("relu", "leaky_relu", "prelu", "sigmoid", "tanh")


def _sharpened(far: Distance, constants: Tensor | None, region: Around) -> Distance:
    if constants is None:
        return far
    at_most = constants * region.radius * (1 + 1e-12) + rounding.TINY
    return Distance.of(torch.where(far.each > 0, torch.minimum(far.each, at_most), 0.0), far.total)


def _operation(node: Node, graph: Graph, values: dict[str, Tensor]) -> Node:
    """The operation that computes a node: of a part of several results, the whole."""
    if node.op == "getitem" and node.args[0].name not in values:
        return graph[node.args[0].name]
    return node


def _operands(step: Step, node: Node) -> list[Ref]:
    """The arguments that a step reads: of a normalisation that is written out, what is normalised."""
    refs = [a for a in node.args if isinstance(a, Ref)]
    if isinstance(step, Opaque) and step.kind == "normalize" and len(refs) > 1:
        refs = [node.args[int(Normalisation.of(step.parameters).operand)]]
    return refs


def _origin(program: Program, position: int, name: str) -> str:
    """The node of a step, or of what it enlarges for the node that reads it."""
    while program.origins[position] == name:
        position = program.steps[position].sources[0]
    return program.origins[position]


def _spread(value: Tensor, shape: tuple[int, ...], wanted: tuple[int, ...], step: Step) -> Tensor:
    """What belongs to an argument, enlarged to the shape of a product where that was broadcast."""
    if not (isinstance(step, Opaque) and step.kind == "multiply") or value.numel() in (1, step.size):
        return value
    return value.reshape(shape).expand(wanted).reshape(-1)
