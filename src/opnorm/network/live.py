"""Programs whose weights change: what must hold so that a bound can be computed anew from other weights."""

import torch
from torch import Tensor

from opnorm.certificate.network.activations import activation_slopes
from opnorm.certificate.network.file import read_names
from opnorm.certificate.network.program import Elementwise, Opaque, Program
from opnorm.errors import UnsupportedLayerError
from opnorm.graph import Graph
from opnorm.network.rules import program_of


def require_bounded(program: Program) -> None:
    """Refuse a program with an operation that has no Lipschitz constant.

    Raises:
        UnsupportedLayerError: naming the operation.
    """
    for step in program.steps:
        if isinstance(step, Opaque) and not step.constant < float("inf"):
            raise UnsupportedLayerError(f"{step.label} has no Lipschitz constant to penalise: {step.reason}")


def require_live(program: Program, graph: Graph) -> None:
    """Refuse a program in which a rule has stored a number that training changes: it would be the one of today.

    Raises:
        UnsupportedLayerError: naming the operation.
    """  # noqa: DOC501 - made by a helper
    generator = torch.Generator().manual_seed(0)
    weights = {
        n: w + 0.1 * torch.rand(w.shape, generator=generator).to(w) if w.is_floating_point() else w
        for n, w in graph.weights.items()
    }
    other = program_of(Graph(graph.nodes, graph.inputs, graph.outputs, weights, graph.derived, graph.labels))
    if len(other.steps) != len(program.steps):
        raise _stale("a state that begins with zeros")
    pairs = zip(with_slopes(program, weights).steps, other.steps, strict=True)
    for one, two in pairs:
        if not (isinstance(one, Elementwise) and isinstance(two, Elementwise)):
            continue
        if not (torch.equal(one.low, two.low) and torch.equal(one.high, two.high)):
            raise _stale(one.label)
    for name, value in program.constants.items():
        if name not in other.constants or not torch.equal(value, other.constants[name]):
            raise _stale(name)
    computed = [name for name in read_names(program) if name in graph.derived]
    if computed:
        raise _stale(computed[0])


def _stale(what: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        f"the penalty cannot follow {what}: the forward computes it from weights by operations of its own; use the "
        "layers of torch.nn, or a parametrization"
    )


def with_slopes(program: Program, weights: dict[str, Tensor]) -> Program:
    """The program with the slopes that PReLU's weights have now."""
    steps = list(program.steps)
    for position, step in enumerate(steps):
        if isinstance(step, Elementwise) and step.weight:
            low, high = activation_slopes(step.kind, step.parameters, step.weight, weights)
            shape, label = step.shape, step.label
            steps[position] = Elementwise(step.sources, shape, label, low, high, step.kind, weight=step.weight)
    return Program(tuple(steps), program.outputs, program.constants, program.origins)
