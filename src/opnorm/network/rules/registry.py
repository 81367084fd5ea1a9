"""The table of rules, and what a rule may use."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opnorm.certificate.network.maps import LinearMap, Weighted
from opnorm.certificate.network.program import Concat, Elementwise, Input, Linear, Opaque, Program, Shift, Step, Sum
from opnorm.errors import UnsupportedLayerError
from opnorm.graph import Graph, Node, Ref, Weight
from opnorm.network.rules.followed import whole
from opnorm.network.rules.ranges import Ranges


@dataclass(eq=False)
class Builder:
    """The program under construction, as the rules see it.

    Attributes:
        graph: the graph of the model.
        weights: its weights by name, constants of the rules among them.
        steps: what was added so far.
        at: where the result of each node is.
        constants: tensors that the rules made; they travel with the program.
        split: whether a product of bounded factors becomes two functions with bounded slopes; on a region it stays one
            step, which is tightened there.
        shifts: whether what is added to a linear operation is a step; a certificate on a region needs the values.
    """

    graph: Graph
    weights: dict[str, Tensor]
    steps: list[Step] = field(default_factory=list)
    at: dict[str, int] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    split: bool = True
    shifts: bool = False

    @cached_property
    def ranges(self) -> Ranges:
        """Between which numbers the elements of each node's result lie."""
        return Ranges(self.graph, self.weights)

    def add(self, step: Step) -> int:
        """Append a step and return its position."""
        self.steps.append(step)
        return len(self.steps) - 1

    def source(self, argument: Any, node: Node) -> int:
        """The position of an argument that must depend on the inputs."""
        if not isinstance(argument, Ref):
            raise unsupported(node, "its first argument does not depend on the inputs")
        if argument.name not in self.at:
            raise unsupported(node, f"it reads {self.graph[argument.name].place}, which is not varied or has no value")
        return self.at[argument.name]

    def shape(self, argument: Ref) -> tuple[int, ...]:
        """The sample shape of an argument."""
        return self.graph[argument.name].sample_shape

    def tensor(self, weight: Weight) -> Tensor:
        """The value of a weight in float64."""
        return self.weights[weight.name].detach().to("cpu", torch.float64)

    def constant(self, value: Tensor, name: str) -> str:
        """Store a tensor of the rules' own and return its name; equal constants are stored once."""
        for known, tensor in self.constants.items():
            if tensor.dtype == value.dtype and torch.equal(tensor, value):
                return known
        unique = f"{name} #{len(self.constants)}"
        self.constants[unique] = value
        self.weights[unique] = value
        return unique

    def linear(self, node: Node, source: int, linear: LinearMap) -> int:
        """Append `y = A x`."""
        return self.add(Linear((source,), linear.out_shape, label(node), linear))

    def elementwise(self, node: Node, source: int, slopes: tuple[Tensor, Tensor], **kind: Any) -> int:
        """Append a function of each element."""
        return self.add(Elementwise((source,), node.sample_shape, label(node), *slopes, **kind))

    def opaque(
        self,
        node: Node,
        sources: tuple[int, ...],
        constant: float,
        reason: str,
        *,
        kind: str = "",
        parameters: tuple[float, ...] = (),
    ) -> int:
        """Append a function that is known by its Lipschitz constant alone."""
        return self.add(Opaque(sources, node.sample_shape, label(node), constant, reason, kind, parameters))

    def unknown(self, node: Node, position: int) -> int:
        """Append a step that adds something unknown to an earlier one."""
        return self.add(Shift((position,), self.steps[position].shape, label(node), ""))


Rule = Callable[[Node, Builder], int]

_RULES: dict[str, Rule] = {}


def register_rule(*operations: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations of the exported graph; the last one registered for a name is used.

    A rule takes the node and a `Builder`, appends the steps that the operation amounts to, and returns the position
    of the one that holds its result.

    Args:
        operations: names of overloads, such as `aten.relu.default` or `mylib.myop.default`.

    Example:
        >>> import torch
        >>> from opnorm.network import register_rule
        >>> @torch.library.custom_op("doctest_rules::halve_abs", mutates_args=())
        ... def halve_abs(x: torch.Tensor) -> torch.Tensor:
        ...     return x.abs() / 2
        >>> @halve_abs.register_fake
        ... def _(x):
        ...     return torch.empty_like(x)
        >>> @register_rule("doctest_rules.halve_abs.default")
        ... def rule(node, build):
        ...     source = build.source(node.args[0], node)
        ...     return build.opaque(node, (source,), 0.5, "| |x| - |y| | / 2 <= |x - y| / 2")
    """

    def decorate(rule: Rule) -> Rule:
        for operation in operations:
            _RULES[operation] = rule
        return rule

    return decorate


def known_operations() -> frozenset[str]:
    """The names that have a rule."""
    return frozenset(_RULES)


def unsupported(node: Node, reason: str) -> UnsupportedLayerError:
    """The error that names an operation, its place in the model, the reason and the way out."""
    return UnsupportedLayerError(
        f"no Lipschitz rule for {node.place}: {reason}. A rule of your own can be registered with "
        f"opnorm.network.register_rule({node.op!r})"
    )


def label(node: Node) -> str:
    """Where a step comes from, for tables."""
    name = node.op.removeprefix("aten.").rsplit(".", 1)[0]
    return f"{node.path}: {name}" if node.path else name


def program_of(graph: Graph, *, split: bool = True, shifts: bool = False) -> Program:
    """The program of a graph; `split` and `shifts` as in `Builder`.

    Raises:
        UnsupportedLayerError: naming the first operation without a rule.
    """  # noqa: DOC501 - made by a helper
    build = Builder(graph, dict(graph.weights), split=split, shifts=shifts)
    needed = _needed(graph)
    origins: list[str] = []
    for node in graph.nodes:
        if node.name not in needed:
            continue
        if node.op == "input":
            if node.name in graph.inputs:
                build.at[node.name] = build.add(Input((), node.sample_shape, node.name))
                origins.append(node.name)
            continue
        if not _depends(node, build, graph):
            continue
        if node.batch_axis is None:
            build.at[node.name] = -1  # a tuple: its parts are read by getitem
            continue
        if node.op not in _RULES:
            raise unsupported(node, "the operation is not known")
        if node.dtype is not None and node.dtype.is_complex:
            raise unsupported(node, "complex numbers are not followed")
        rule = _RULES[node.op]
        build.at[node.name] = rule(node, build)
        if node.dtype is not None and not node.dtype.is_floating_point:
            raise unsupported(node, "its result is of integers, and casting to them jumps")
        if shifts and not (rule.__module__.startswith(__package__) and whole(node, build.at)):
            build.at[node.name] = build.unknown(node, build.at[node.name])
        origins += [node.name] * (len(build.steps) - len(origins))
    outputs = [build.at[name] for name in graph.outputs if name in build.at]
    if not outputs:
        raise UnsupportedLayerError(
            f"the output {graph.outputs[0]!r} does not depend on an input that may be varied: integers are not; where "
            "the inputs are tokens, bound the model from their embeddings on"
        )
    steps = _without_zeros(build.steps, {*graph.derived, *build.constants}, build.weights, values=shifts)
    return _without_unread(steps, outputs, build.constants, origins)


def _without_zeros(steps: list[Step], made: set[str], weights: dict[str, Tensor], *, values: bool) -> list[Step]:
    """The steps with sums that leave out what is zero times something, such as a gate times the first state.

    Only tensors that the forward or a rule makes are looked at: a stored weight may be zero now and not later. With
    `values` what is left out is zero itself, not only what it differs by.
    """
    zero: set[int] = set()
    kept: list[Step] = []
    for position, step in enumerate(steps):
        rest = [i for i, source in enumerate(step.sources) if source not in zero]
        names = step.map.names if isinstance(step, Linear) and isinstance(step.map, Weighted) else ()
        nothing = bool(made.intersection(names)) and not any(bool(weights[name].any()) for name in names)
        still = not rest and bool(step.sources) and (not values or isinstance(step, Linear | Sum | Concat))
        if nothing or still:
            zero.add(position)
        shorter = isinstance(step, Sum) and 0 < len(rest) < len(step.sources)
        kept.append(_some_of(step, rest) if isinstance(step, Sum) and shorter else step)
    return kept


def _some_of(step: Sum, terms: list[int]) -> Sum:
    sources = tuple(step.sources[i] for i in terms)
    return replace(step, sources=sources, coefficients=tuple(step.coefficients[i] for i in terms))


def _without_unread(steps: list[Step], outputs: list[int], constants: dict[str, Tensor], origins: list[str]) -> Program:
    """The program without steps (and constants) that no output depends on; inputs stay."""
    alive = set(outputs)
    for position in range(len(steps) - 1, -1, -1):
        if position in alive:
            alive.update(steps[position].sources)
    kept = [i for i, step in enumerate(steps) if i in alive or isinstance(step, Input)]
    new = {old: i for i, old in enumerate(kept)}
    moved = tuple(replace(steps[i], sources=tuple(new[s] for s in steps[i].sources)) for i in kept)
    used = {name for step in moved if isinstance(step, Linear) for name in step.map.names}
    used |= {step.weight for step in moved if isinstance(step, Shift)}
    named = {n: t for n, t in constants.items() if n in used}
    return Program(moved, tuple(new[i] for i in outputs), named, tuple(origins[i] for i in kept))


def _needed(graph: Graph) -> set[str]:
    """Nodes on which an output depends, and the inputs."""
    needed = {*graph.outputs, *graph.inputs}
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed.update(references(node))
    return needed


def references(node: Node) -> list[str]:
    """Names of the nodes that a node reads."""
    found: list[str] = []

    def visit(argument: Any) -> None:
        if isinstance(argument, Ref):
            found.append(argument.name)
        elif isinstance(argument, list | tuple):
            for part in argument:
                visit(part)

    visit(node.args)
    visit(list(node.kwargs.values()))
    return found


def _depends(node: Node, build: Builder, graph: Graph) -> bool:
    return any(name in build.at for name in references(node))
