"""Power-average pooling, which torch writes as `(k avg_pool(x^p))^(1/p)`: the p-norm of each window."""

import math
from typing import Any

from opnorm import _rounding as rounding
from opnorm.graph import Node, Ref
from opnorm.network.rules.pooling import as_tuple, windows
from opnorm.network.rules.registry import Builder, unsupported


def lp_pooling(node: Node, build: Builder) -> int | None:
    """The position of an lp pooling that ends in this power; None if it is another power.

    A p-norm is 1-Lipschitz in itself, and at most `n^max(0, 1/p - 1/2)` times the Euclidean norm of its n elements.
    An element may be in several windows, as in max pooling. Windows that ceil_mode cuts to n of k elements are
    multiplied by `(k/n)^(1/p)`.

    Raises:
        UnsupportedLayerError: if the batch is not the first axis.
    """  # noqa: DOC501 - made by a helper
    parts = _parts(node, build)
    if parts is None:
        return None
    x, p, pool = parts
    name = "lp pooling"
    if p < 1:
        return build.opaque(node, (build.source(x, node),), math.inf, f"{name} with p < 1 has unbounded slopes")
    if p not in (1, 2) and (p % 2 or not float(p).is_integer()) and build.ranges.of(x)[0] < 0:
        reason = f"{name} with p = {p:g} is Lipschitz only on inputs that are not negative, such as after a ReLU"
        return build.opaque(node, (build.source(x, node),), math.inf, reason)
    before = build.graph[x.name]
    if before.batch_axis != 0 or before.merged != 1:
        raise unsupported(node, "it needs the batch as its first axis")
    dims = len(build.shape(x)) - 1
    kernel = as_tuple(pool.args[1], dims)
    stride = as_tuple(pool.args[2] if len(pool.args) > 2 and pool.args[2] else kernel, dims)
    zeros, ones = (0,) * dims, (1,) * dims
    count, smallest = windows(build.shape(x), node.sample_shape, kernel, stride, padding=zeros, dilation=ones)
    size, least = float(math.prod(kernel)), float(smallest)
    # (k/n)^(1/p) n^max(0, 1/p - 1/2) is largest for the smallest n.
    exponent = max(0.0, 1 / p - 0.5)
    factor = 1.0 if size == least and exponent == 0 else (size / least) ** (1 / p) * least**exponent * (1 + 1e-12)
    constant = rounding.mul_up(rounding.sqrt_up(float(count)), factor)
    reason = f"p-norms of windows, p = {p:g}; an element is in up to {count}"
    return build.opaque(node, (build.source(x, node),), constant, reason)


def _parts(node: Node, build: Builder) -> tuple[Ref, float, Node] | None:
    """The tensor that is pooled, p, and the average pooling, where the power ends torch's pattern."""
    scaled = _made_by(node.args[0], "aten.mul", build)
    if scaled is None or len(scaled.args) != 2 or not isinstance(scaled.args[1], int | float):
        return None
    signed = _made_by(scaled.args[0], "aten.mul", build)
    for sign, size in () if signed is None else (signed.args, signed.args[::-1]):
        first, second = _made_by(sign, "aten.sign", build), _made_by(size, "aten.relu", build)
        inner = None if second is None else _made_by(second.args[0], "aten.abs", build)
        if first is None or inner is None or first.args[0] != inner.args[0]:
            continue
        pool = _made_by(first.args[0], "aten.avg_pool", build)
        power = None if pool is None else _made_by(pool.args[0], "aten.pow.Tensor_Scalar", build)
        if pool is None or power is None or not _plain(pool) or not isinstance(power.args[0], Ref):
            continue
        p = float(power.args[1])
        kernel = math.prod(as_tuple(pool.args[1], len(pool.sample_shape) - 1))
        if scaled.args[1] == kernel and p > 0 and node.args[1] == 1 / p:
            return power.args[0], p, pool
    return None


def _plain(pool: Node) -> bool:
    """Whether an average pooling has neither padding nor a divisor of its own."""
    padding = pool.args[3] if len(pool.args) > 3 else 0
    divisor = pool.args[6] if len(pool.args) > 6 else None
    return not any(as_tuple(padding, 1)) and divisor is None and not pool.kwargs


def _made_by(argument: Any, operation: str, build: Builder) -> Node | None:
    node = build.graph[argument.name] if isinstance(argument, Ref) else None
    return node if node is not None and node.op.startswith(operation) else None
