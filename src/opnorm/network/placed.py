"""A program on a region of inputs, with its values at the region's centre."""

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from opnorm.certificate.network.check import chain_of
from opnorm.certificate.network.program import Elementwise, Program
from opnorm.certificate.network.proof import prove
from opnorm.certificate.network.region import Around, Region, around
from opnorm.errors import ArgumentError, CertificateError, TooLargeError, UnsupportedLayerError
from opnorm.graph import Graph
from opnorm.graph.export import Example, two_samples
from opnorm.network.local import Sharpen, localise
from opnorm.network.lower import Function
from opnorm.network.search import search

_SHARPEN_SIZE, _SHARPEN_STEPS = 600, 12
SHARPEN_SECONDS = 0.1


def placed(program: Program, region: Region) -> Around:
    """The region around its centre, in the shape of the program's one input.

    Raises:
        ArgumentError: if several inputs are varied.
    """
    if len(program.inputs) != 1:
        raise ArgumentError("a region needs a model with one input that is varied")
    return around(region, program.steps[program.inputs[0]].shape)


def localised(program: Program, graph: Graph, example_input: Example, where: Around) -> Program:
    """The program on a region, with its values at the centre computed in float64."""
    function = Function(graph, two_samples(example_input))
    with torch.no_grad():
        values = function.values(where.center.repeat(2, 1))
    samples = {
        node.name: node.samples(values[node.name])[0].reshape(-1)
        for node in graph.nodes
        if node.batch_axis is not None and values[node.name].is_floating_point()
    }
    weights = {**graph.weights, **program.constants}
    sharpen = _sharpen(graph) if sharpens(program) else None
    return localise(program, graph, weights, samples, region=where, sharpen=sharpen)


def sharpens(program: Program) -> bool:
    """Whether a calculus for each activation is affordable."""
    small = max(step.size for step in program.steps) <= _SHARPEN_SIZE
    return small and sum(isinstance(step, Elementwise) for step in program.steps) <= _SHARPEN_STEPS


def _sharpen(graph: Graph) -> Sharpen:
    """Constants of single elements from the calculus up to that step."""

    def constants(program: Program, position: int) -> Tensor | None:
        try:
            chain = chain_of(program, graph.weights, "dense")
            return prove(chain, search(chain, SHARPEN_SECONDS, "afp").multipliers, pairs_up_to=0).coordinates
        except (TooLargeError, UnsupportedLayerError, CertificateError, LinAlgError):
            return None

    return constants
