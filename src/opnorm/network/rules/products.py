"""Products with stored matrices, on either side; of two varying tensors, unbounded outside a region."""

from math import inf, prod

import torch
from torch import Tensor

from opnorm.certificate.network.maps import Convolution, Gather, Matrix
from opnorm.graph import Node, Ref, Weight
from opnorm.network.rules.registry import Builder, register_rule, unsupported
from opnorm.network.rules.shape import gathered, one_sample
from opnorm.network.rules.shifts import shifted


@register_rule("aten.matmul.default", "aten.mm.default", "aten.bmm.default")
def matmul(node: Node, build: Builder) -> int:
    """A product with a stored matrix, or with one for each head; of two tensors that vary, see the attention rules."""
    left, right = node.args[:2]
    if isinstance(left, Ref) and isinstance(right, Ref):
        positions = tuple(build.source(a, node) for a in (left, right))
        reason = "a product of two varying tensors has unbounded slopes; give a region"
        apart = not {build.graph[a.name].sample_axis(axis) for a in (left, right) for axis in (-1, -2)} & {None}
        kind, inner = ("matrices", build.shape(left)[-1]) if apart else ("", 0)
        return build.opaque(node, positions, inf, reason, kind=kind, parameters=(float(inner),))
    if isinstance(left, Ref):
        weight = build.tensor(right)
        columns = weight[:, None] if weight.dim() == 1 else weight
        return _product(node, build, left, columns.mT, right.name if weight.dim() == 1 else f"{right.name} transposed")
    weight = build.tensor(left)
    if weight.dim() == 1:
        return _product(node, build, right, weight[None], f"{left.name} as a row", from_left=True)
    return _product(node, build, right, weight, left.name, from_left=True)


@register_rule("aten.addmm.default")
def addmm(node: Node, build: Builder) -> int:
    """`bias + x W` with stored W and bias."""
    bias, x, weight = node.args[:3]
    if not isinstance(weight, Weight):
        raise unsupported(node, "its weight depends on the inputs")
    if isinstance(bias, Ref):
        raise unsupported(node, "its bias depends on the inputs")
    if node.kwargs:
        raise unsupported(node, "alpha and beta have no rule")
    position = _product(node, build, x, build.tensor(weight).mT, f"{weight.name} transposed")
    return shifted(node, build, position, bias)


def _product(node: Node, build: Builder, x: Ref, matrix: Tensor, name: str, *, from_left: bool = False) -> int:
    """`x` times a matrix of shape (..., rows, columns) along its last axis, or along the one before (from the left)."""
    before = build.graph[x.name]
    contracted = -2 if from_left and len(before.shape) > 1 else -1
    axis = before.sample_axis(contracted)
    if axis is None:
        raise unsupported(node, "it acts on the batch axis")
    one = _one_matrix(matrix)
    if one is None:
        return _heads(node, build, x, matrix, name, contracted=contracted)
    source, shape = build.source(x, node), before.sample_shape
    stored = (
        name if torch.equal(build.weights.get(name, torch.empty(0)), one) else build.constant(one.contiguous(), name)
    )
    linear = Matrix(shape, node.sample_shape, stored, prod(shape[:axis]), prod(shape[axis + 1 :]))
    return build.linear(node, source, linear)


def _one_matrix(matrix: Tensor) -> Tensor | None:
    """The matrix, where it is the same everywhere along its leading axes; None where there are several."""
    each = matrix.reshape(-1, *matrix.shape[-2:])
    return each[0] if bool((each == each[:1]).all()) else None


def _heads(node: Node, build: Builder, x: Ref, matrix: Tensor, name: str, *, contracted: int) -> int:
    """A matrix of its own for each head: a convolution of width 1 with a group for each head."""
    before = build.graph[x.name]
    if len(before.shape) < 2:
        raise unsupported(node, "a vector is multiplied with several matrices")
    # The layout of the result, with the axis that is summed over in place of the one that comes from it.
    wide = list(node.shape)
    wide[contracted] = before.shape[contracted]
    size, lead, rows = prod(before.sample_shape), len(node.shape) - 2, matrix.shape[-2]
    each = matrix.expand(*node.shape[:-2], *matrix.shape[-2:])
    different = [i for i in range(lead) if not bool((each == each.narrow(i, 0, 1)).all())]
    if node.batch_axis in different:
        raise unsupported(node, "its matrices differ between the samples of a batch")
    same = [i for i in range(lead) if i not in different]
    kernels = each.permute(*different, *same, lead, lead + 1).reshape(
        prod(node.shape[i] for i in different), -1, *matrix.shape[-2:]
    )[:, 0]  # shape: (heads, rows, columns)
    numbered = before.batched(torch.arange(1, 2 * size + 1, dtype=torch.float64).reshape(2, *before.sample_shape))
    spread = numbered.expand(wide)
    shape = tuple(node.samples(spread).shape[1:])
    axes = [node.sample_axis(i) for i in (*different, contracted)]
    order = [a for a in axes if a is not None]
    order += [i for i in range(len(shape)) if i not in order]
    index = one_sample(node, spread, size).reshape(shape).permute(order)
    heads, rest = len(kernels), prod(index.shape[len(axes) :])
    channels = (heads * matrix.shape[-1], rest)
    first = Gather(before.sample_shape, channels, build.constant(index.reshape(-1).contiguous(), f"{node.name} index"))
    kernel = build.constant(kernels.reshape(heads * rows, -1, 1).contiguous(), name)
    width = Convolution(channels, (heads * rows, rest), kernel, (1,), (1,), ((0, 0),), (1,), heads)
    position = build.linear(node, build.linear(node, build.source(x, node), first), width)
    sizes = [rows if i == axes[-1] else shape[i] for i in order]
    back = torch.arange(prod(sizes)).reshape(sizes).permute([order.index(i) for i in range(len(order))])
    return gathered(node, build, position, back.reshape(-1).contiguous(), width.out_shape)
