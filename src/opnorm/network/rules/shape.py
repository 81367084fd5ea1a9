"""Operations that move data: views, permutations, slices, padding, concatenation, copies."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from opnorm.certificate.network.maps import Gather
from opnorm.certificate.network.program import Concat, Linear
from opnorm.graph import Node, Ref, Weight
from opnorm.graph.batch import filled
from opnorm.network.rules.registry import Builder, label, references, register_rule, unsupported

_MOVES = (
    "view.default", "_unsafe_view.default", "reshape.default", "flatten.using_ints", "unflatten.int",
    "permute.default", "transpose.int", "t.default", "unsqueeze.default", "squeeze.default", "squeeze.dim",
    "squeeze.dims", "slice.Tensor", "select.int", "narrow.default", "expand.default", "flip.default", "roll.default",
    "pixel_shuffle.default", "pixel_unshuffle.default", "channel_shuffle.default", "movedim.int", "swapaxes.default",
    "numpy_T.default", "mT.default", "repeat.default", "tile.default", "repeat_interleave.self_int",
    "upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec", "expand_as.default",
    "upsample_nearest1d.default", "upsample_nearest2d.default", "upsample_nearest3d.default",
    "constant_pad_nd.default", "reflection_pad1d.default", "reflection_pad2d.default", "replication_pad1d.default",
    "replication_pad2d.default", "pad.default", "diagonal.default", "view_as.default", "index_select.default",
    "ravel.default", "moveaxis.int", "movedim.intlist", "unfold.default", "im2col.default", "tril.default",
    "triu.default", "fliplr.default", "flipud.default", "rot90.default", "adjoint.default", "atleast_1d.default",
    "atleast_2d.default", "atleast_3d.default", "broadcast_to.default", "index.Tensor", "gather.default",
    "take_along_dim.default", "diag_embed.default", "_upsample_nearest_exact1d.vec", "_upsample_nearest_exact2d.vec",
    "_upsample_nearest_exact3d.vec", "reflection_pad3d.default", "replication_pad3d.default", "swapdims.int",
)  # fmt: skip


_SHAPED_AS = frozenset({"aten.expand_as.default", "aten.view_as.default"})
"""What a second tensor gives is its shape."""


@register_rule(*(f"aten.{name}" for name in _MOVES))
def move(node: Node, build: Builder) -> int:
    """Each result is one element of the source or a constant: read off from a run on numbered elements."""
    return moved(node, build, node)


@register_rule("getitem")
def getitem(node: Node, build: Builder) -> int:
    """A part of an operation with several results: chunk, split, unbind, sort, max."""
    whole, index = build.graph[node.args[0].name], int(node.args[1])
    if whole.op in _PIECES:
        return moved(node, build, whole, lambda parts: parts[index])
    rule = _PARTS.get(whole.op)
    if rule is None or index != 0:
        raise unsupported(node, f"part {index} of {whole.place} has no rule")
    return rule(whole, node, build)


_PIECES = frozenset(
    f"aten.{n}" for n in (
        "chunk.default", "split.Tensor", "split.sizes", "split_with_sizes.default", "unbind.int",
        "tensor_split.sections", "unsafe_split.Tensor", "unsafe_chunk.default",
    )
)  # fmt: skip

_PARTS: dict[str, Callable[[Node, Node, Builder], int]] = {}
"""Operations whose first result has a rule: (the operation, its part, builder) -> position."""


def part_rule(*operations: str) -> Callable[[Callable[[Node, Node, Builder], int]], Callable[..., int]]:
    """Register a rule for the first of several results."""

    def decorate(rule: Callable[[Node, Node, Builder], int]) -> Callable[..., int]:
        for operation in operations:
            _PARTS[operation] = rule
        return rule

    return decorate


def moved(node: Node, build: Builder, operation: Node, pick: Callable[[Any], Tensor] = lambda x: x) -> int:
    """A `Gather` that does to one sample what `operation` does to each sample of a batch."""
    x = operation.args[0]
    source = build.source(x, node)
    size = prod(build.shape(x))
    before = build.graph[x.name]
    numbered = before.batched(torch.arange(1, 2 * size + 1, dtype=torch.float64).reshape(2, *before.sample_shape))
    result = pick(_run(operation, build, {x.name: numbered}, node))
    index = one_sample(node, result, size)
    return gathered(node, build, source, index, before.sample_shape)


def gathered(node: Node, build: Builder, source: int, index: Tensor, before: tuple[int, ...]) -> int:
    """A `Gather` by an index, or the source itself where nothing moves."""
    if torch.equal(index, torch.arange(prod(before))):
        return source
    name = build.constant(index, f"{node.name} index")
    return build.linear(node, source, Gather(before, node.sample_shape, name))


def one_sample(node: Node, result: Tensor, size: int) -> Tensor:
    """The index of a sample's elements from a run on two numbered samples; -1 for constants.

    Raises:
        UnsupportedLayerError: if a sample's result holds elements of the other one.
    """  # noqa: DOC501 - made by a helper
    rows = node.samples(result).reshape(2, -1).round().to(torch.int64)
    own = torch.where(rows[0] > 0, rows[0] + size, rows[0])
    if not torch.equal(own, rows[1]) or bool((rows[0] > size).any()):
        raise unsupported(node, "it mixes the samples of a batch")
    return rows[0] - 1


def _run(operation: Node, build: Builder, values: dict[str, Tensor], node: Node) -> Any:
    """Run an operation on numbered elements, with zeros where it would fill in constants."""
    name = operation.op
    others = [other for other in references(operation) if other not in values]
    if others and name not in _SHAPED_AS:
        raise unsupported(node, "its indices depend on the inputs")
    values = values | {other: torch.zeros(build.graph[other].shape, dtype=torch.float64) for other in others}
    args = list(filled(operation.args, values, build.weights))
    kwargs = {k: filled(v, values, build.weights) for k, v in operation.kwargs.items() if k != "value"}
    function = torch.reshape if name in ("aten.view.default", "aten._unsafe_view.default") else operation.function
    if name in ("aten.pad.default", "aten.constant_pad_nd.default"):
        keep = 3 if name == "aten.pad.default" else 2
        args = args[:keep]  # without the value: zero
    try:
        return function(*args, **kwargs)
    except RuntimeError as problem:
        raise unsupported(node, f"it cannot be followed element by element ({problem})") from problem


def broadcast(node: Node, build: Builder, x: Ref) -> int:
    """The position of x enlarged to the shape of the node's result."""
    source, before = build.source(x, node), build.graph[x.name]
    if before.shape == node.shape and before.batch_axis == node.batch_axis:
        return source
    size = prod(before.sample_shape)
    numbered = before.batched(torch.arange(1, 2 * size + 1, dtype=torch.float64).reshape(2, *before.sample_shape))
    index = one_sample(node, numbered.expand(node.shape), size)
    return gathered(node, build, source, index, before.sample_shape)


@register_rule("aten.cat.default", "aten.stack.default", "aten.concat.default", "aten.hstack.default")
def cat(node: Node, build: Builder) -> int:
    """Concatenation along an axis; stored parts (a class token) are constant and cancel."""
    parts = list(node.args[0])
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    varied = [p for p in parts if isinstance(p, Ref) and p.name in build.at]
    if "cat.default" in node.op and len(varied) == len(parts):
        along = build.graph[parts[0].name].sample_axis(axis)
        if along is None:
            raise unsupported(node, "it concatenates along the batch axis")
        shapes = tuple(build.shape(p) for p in parts)
        sources = tuple(build.source(p, node) for p in parts)
        return joined(node, build, sources, shapes, axis=along, shape=node.sample_shape)
    return picked(node, build)


_MASKED = {"aten.masked_fill_.Scalar": 2, "aten.fill_.Scalar": 1}
"""Where the constant is that is written."""


def _choosing(node: Node) -> list[Any]:
    """The masks and indices among the arguments."""
    name = node.op.split(".")[1].removesuffix("_")
    if name == "index_put":
        return list(node.args[1])
    return list({"where": node.args[:1], "masked_fill": node.args[1:2]}.get(name, ()))


@register_rule(
    "aten.where.self", "aten.where.ScalarSelf", "aten.where.ScalarOther", "aten.slice_scatter.default",
    "aten.select_scatter.default", "aten.copy.default", "aten.copy_.default", "aten.index_put.default",
    "aten.masked_fill_.Tensor", "aten.fill_.Tensor", "aten.dstack.default", "aten.column_stack.default",
    "aten.concatenate.default", "aten.vstack.default", *_MASKED,
)  # fmt: skip
def picked(node: Node, build: Builder) -> int:
    """Each result is one element of one of several tensors, or a constant: read off from a run on numbered elements."""
    varied = [name for name in dict.fromkeys(references(node)) if name in build.at]
    sizes = [prod(build.graph[name].sample_shape) for name in varied]
    total, start = sum(sizes), 0
    values: dict[str, Tensor] = {}
    for name, size in zip(varied, sizes, strict=True):
        before = build.graph[name]
        first = torch.arange(start + 1, start + size + 1, dtype=torch.float64)
        values[name] = before.batched(torch.stack([first, first + total]).reshape(2, *before.sample_shape))
        start += size
    if any(isinstance(argument, Ref) for argument in _choosing(node)):
        raise unsupported(node, "what it chooses depends on the inputs")
    if "index_put" in node.op and True in (*node.args[3:4], node.kwargs.get("accumulate")):
        raise unsupported(node, "it adds to what is there; a product with a stored matrix does the same")
    numbers = list(node.args)
    if node.op.startswith("aten.where"):
        numbers = [0.0 if isinstance(a, int | float) else a for a in numbers]
    elif node.op in _MASKED:
        numbers[_MASKED[node.op]] = 0.0
    args = [_numbered(a, values, build) for a in numbers]
    kwargs = {k: _numbered(a, values, build) for k, a in node.kwargs.items()}
    index = one_sample(node, node.function(*args, **kwargs), total)
    sources = tuple(build.at[name] for name in varied)
    flat = tuple((size,) for size in sizes)
    return gathered(node, build, joined(node, build, sources, flat, axis=0, shape=(total,)), index, (total,))


def _numbered(argument: Any, values: dict[str, Tensor], build: Builder) -> Any:
    """An argument with numbered elements for what varies, zeros for other numbers, and stored masks and indices."""
    if isinstance(argument, Ref) and argument.name in values:
        return values[argument.name]
    if isinstance(argument, Ref):
        return torch.zeros(build.graph[argument.name].shape, dtype=torch.float64)
    if isinstance(argument, Weight):
        weight = build.weights[argument.name]
        return torch.zeros(weight.shape, dtype=torch.float64) if weight.is_floating_point() else weight
    if isinstance(argument, list | tuple):
        return type(argument)(_numbered(part, values, build) for part in argument)
    return argument


def joined(
    node: Node, build: Builder, sources: tuple[int, ...], shapes: tuple[tuple[int, ...], ...], *, axis: int,
    shape: tuple[int, ...],
) -> int:  # fmt: skip
    """A concatenation; of pieces of one tensor, a single `Gather` of it, or the tensor itself."""
    roots = [_root(build, source) for source in sources]
    if len({root for root, _ in roots}) == 1:
        parts = [index.reshape(s) for (_, index), s in zip(roots, shapes, strict=True)]
        index = torch.cat(parts, axis).reshape(-1)
        root = roots[0][0]
        before = build.steps[root].shape
        if torch.equal(index, torch.arange(prod(before))):
            return root
        name = build.constant(index, f"{node.name} index")
        return build.add(Linear((root,), shape, label(node), Gather(before, shape, name)))
    return build.add(Concat(sources, shape, label(node), axis, shapes))


def _root(build: Builder, position: int) -> tuple[int, Tensor]:
    """The tensor that a step is a part of, and which part."""
    step = build.steps[position]
    if isinstance(step, Linear) and isinstance(step.map, Gather):
        return step.sources[0], build.constants[step.map.index]
    return position, torch.arange(step.size)
