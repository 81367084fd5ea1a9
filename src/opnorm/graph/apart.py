"""Samples do not touch: what one gives is the same beside others, at another place and in a batch of another size."""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from opnorm.errors import UnsupportedLayerError
from opnorm.graph.batch import MixedSamplesError
from opnorm.graph.types import Node

_SHAPED_LIKE = frozenset({
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty",
})  # fmt: skip

Wide = Callable[[Any], Any]
Near = tuple[float, float]
"""How far results may differ: relative to their size, and to the size of what the operation reads."""

_IN_DOUBLE: Near = (1e-6, 1e-12)
_AS_IT_IS: Near = (1e-3, 1e-5)
_PLACES = ((0, 0), (1, 1), (3, 0), (4, 1))
"""Where in the batch of five which of the two samples is."""


def check_samples_apart(
    program: torch.export.ExportedProgram, nodes: Sequence[Node], batches: Sequence[Tensor]
) -> None:
    """Refuse a program in which other samples, their order or their number have an influence on a result.

    A numerical check, beside the structural ones of the rules: two samples are computed by themselves, and twice in
    a batch of five with another one. In float64, so that a small influence shows; where an operation has no float64,
    in the model's own arithmetic. Each operation is judged by itself, from the same two samples.

    Args:
        program: as exported.
        nodes: what was read from it.
        batches: two samples of each input.

    Raises:
        MixedSamplesError: naming the first operation whose result for a sample changes.
        UnsupportedLayerError: if the program fails for another number of samples.
    """
    try:
        changed = _first_change(program, nodes, batches, in_double, _IN_DOUBLE)
    except RuntimeError:  # an operation that has no float64
        try:
            changed = _first_change(program, nodes, batches, _as_it_is, _AS_IT_IS)
        except RuntimeError as problem:
            raise UnsupportedLayerError(f"the exported graph fails for a batch of five samples: {problem}") from problem
    if changed is not None:
        raise MixedSamplesError(
            f"{changed.place} mixes the samples of a batch, or depends on how many they are: the network has no "
            "Lipschitz constant for one sample"
        )


def _first_change(
    program: torch.export.ExportedProgram, nodes: Sequence[Node], batches: Sequence[Tensor], wide: Wide, near: Near
) -> Node | None:
    """The first node that gives something else for a sample, the two batches computed side by side."""
    known = {node.name: node for node in nodes}
    samples = [wide(_different(batch)) for batch in batches]
    two, five = [three[:2] for three in samples], [torch.cat([three, three[:2]]) for three in samples]
    stored = stored_of(program)
    last = {source.name: node.name for node in program.graph.nodes for source in node.all_input_nodes}
    one: dict[str, Any] = {}
    other: dict[str, Any] = {}
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                if node.name in stored:
                    one[node.name] = other[node.name] = wide(stored[node.name].detach())
                else:
                    one[node.name], other[node.name] = two.pop(0), five.pop(0)
            elif node.op == "call_function":
                room = _room([one[source.name] for source in node.all_input_nodes], near)
                one[node.name], other[node.name] = computed(node, one, wide), computed(node, other, wide)
                found = known.get(node.name)
                if found is not None and found.batch_axis is not None:
                    other[node.name] = other[node.name].clone()
                    alone, beside = found.samples(one[node.name]), found.samples(other[node.name])
                    for place, sample in _PLACES:
                        if not _alike(alone[sample], beside[place], room, near):
                            return found
                        beside[place].copy_(alone[sample])  # so that rounding does not build up
            for source in node.all_input_nodes:
                if last[source.name] == node.name:
                    del one[source.name], other[source.name]
    return None


def _different(batch: Tensor) -> Tensor:
    """Three samples: the first of the batch, and two that are not the same."""
    if not batch.is_floating_point():
        return torch.cat([batch, batch[:1]])
    noise = torch.randn((2, *batch.shape[1:]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.cat([batch[:1], (batch[[1, 0]] + noise.to(batch)).to(batch.dtype)])


def _alike(first: Tensor, second: Tensor, room: float, near: Near) -> bool:
    if not first.is_floating_point():
        return first.is_complex() or bool(torch.equal(first, second))
    return torch.allclose(first, second, rtol=near[0], atol=near[0] * largest(first) + room, equal_nan=True)


def _room(sources: Sequence[Any], near: Near) -> float:
    """What rounding may leave where terms of the sizes that an operation reads cancel."""
    sizes = [largest(s) for s in sources if isinstance(s, Tensor) and s.is_floating_point()]
    return near[1] * max(math.prod(sizes), *sizes, 0.0)


def largest(value: Tensor) -> float:
    """The largest finite magnitude of an entry; 0 where there is none."""
    return float(value.detach().abs().nan_to_num(0.0, 0.0, 0.0).max()) if value.numel() else 0.0


def stored_of(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """The tensor that each placeholder holds, of those that are no inputs."""
    names, state = stored_names(program), {**program.state_dict, **program.constants}
    return {placeholder: state[name] for placeholder, name in names.items()}


def stored_names(program: torch.export.ExportedProgram) -> dict[str, str]:
    """The names of parameters, buffers and constants by their placeholders."""
    signature = program.graph_signature
    return {
        **signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants
    }  # fmt: skip


def computed(node: torch.fx.Node, values: dict[str, Any], wide: Wide | None = None) -> Any:
    """The result of a traced operation; zeros for whatever is in memory that was not written.

    Args:
        node: the operation.
        values: of the nodes before it.
        wide: what to do to its dtype arguments.
    """
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: values[n.name])
    if wide is not None:
        args, kwargs = wide(args), wide(kwargs)
    result = node.target(*args, **kwargs)  # type: ignore[operator]
    operation = operation_of(node)
    return torch.zeros_like(result) if is_shaped_like(node) and "empty" in operation else result


def is_shaped_like(node: torch.fx.Node) -> bool:
    """Whether a traced operation gives a constant in the shape of another tensor."""
    return operation_of(node) in _SHAPED_LIKE


def operation_of(node: torch.fx.Node) -> str:
    """The name of a traced operation without its namespace and its overload; empty where it has none."""
    if node.target is operator.getitem:
        return ""
    parts = str(node.target).split(".")
    return parts[1] if len(parts) > 1 else ""


def in_double(argument: Any) -> Any:
    """Tensors and dtypes of floats in float64: a cast between floats is the identity, as the bounds take it."""
    if isinstance(argument, Tensor):
        return argument.double() if argument.is_floating_point() else argument
    if isinstance(argument, dict):
        return {key: in_double(value) for key, value in argument.items()}
    if isinstance(argument, list | tuple):
        return type(argument)(in_double(part) for part in argument)
    return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument


def _as_it_is(argument: Any) -> Any:
    return argument
