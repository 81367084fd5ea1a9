"""How far rounding errors inside a network can move its outputs, by the norms of the operations after them."""

import math
from collections.abc import Mapping

from opnorm._rounding import add_up
from opnorm.certificate.network.program import Program
from opnorm.graph import Graph, Node
from opnorm.network.forward_error import Reach
from opnorm.network.naive import Naive, composed, root_of_squares
from opnorm.network.rules.registry import references

_SHIFTS = ("aten.add.", "aten.add_.", "aten.sub.", "aten.sub_.")


def reach_of(graph: Graph, program: Program, plain: Naive) -> Reach:
    """What carries the errors of the nodes of a graph to its outputs: the naive rules.

    They hold between any two inputs of an operation, and so between the exact one and the computed one.

    Args:
        graph: of the model.
        program: of that graph, without a region.
        plain: the naive rules' constants of the program.
    """
    last = {name: position for position, name in enumerate(program.origins)}

    def outputs(rounding: dict[str, float]) -> float:
        added: dict[int, float] = {}
        for name, size in rounding.items():
            position = _position(graph[name], graph, last)
            if position is None:
                return math.inf
            added[position] = add_up(added.get(position, 0.0), size)
        moved = composed(program, plain.constants, plain.fused, added)
        return root_of_squares([moved[i] for i in program.outputs])

    return outputs


def _position(node: Node, graph: Graph, last: Mapping[str, int]) -> int | None:
    """The step that holds the node's result: a shift has none of its own, it is the step that is shifted."""
    while node.name not in last:
        read = [name for name in references(node) if name in last or graph[name].op.startswith(_SHIFTS)]
        if not node.op.startswith(_SHIFTS) or len(read) != 1:
            return None
        node = graph[read[0]]
    return last[node.name]
