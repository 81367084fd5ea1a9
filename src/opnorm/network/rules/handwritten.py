"""Normalisations and gates that a model writes out in single operations: recognised, and bounded as a whole.

Taken apart, a quotient by a standard deviation or `x * sigmoid(x)` would be unbounded.
"""

import math
from typing import Any

from opnorm import _rounding as rounding
from opnorm.certificate.network.activations import activation_slopes
from opnorm.certificate.network.program import Elementwise, Sum
from opnorm.graph import Node, Ref
from opnorm.network.normalisation import Normalisation
from opnorm.network.rules.registry import Builder, label
from opnorm.network.rules.shape import broadcast

_TANH_GELU = 0.044715 / (2 / math.pi)
"""The coefficient of x^3 over the square of that of x in the tanh approximation of GELU."""


def made_by(argument: Any, operation: str, build: Builder) -> Node | None:
    """The node that computes an argument, where it is this operation, in place or not."""
    node = build.graph[argument.name] if isinstance(argument, Ref) else None
    return node if node is not None and node.op.split(".")[1:2] in ([operation], [f"{operation}_"]) else None


def normalised(node: Node, build: Builder, x: Any, divisor: Any, *, inverse: bool = False) -> int | None:
    """The position of `x / divisor` (or `x * divisor`, with `inverse`) where that normalises x; None elsewhere.

    With r the norm of x over the n elements of a group:
    `x / max(r, eps)` projects x / eps onto the unit ball; `x / (r / c + eps)` has the eigenvalues `1 / (r / c + eps)`
    and `eps / (r / c + eps)^2`: both are 1/eps-Lipschitz. `x / sqrt(r^2 / n + eps)` is 1/sqrt(eps)-Lipschitz, with
    any number in place of n. A variance is r^2 / (n - k) of x itself where x is centred.
    """
    if not isinstance(x, Ref) or not isinstance(divisor, Ref):
        return None
    size = divisor
    while (wide := made_by(size, "expand_as", build) or made_by(size, "expand", build)) is not None:
        size = wide.args[0]
    source = build.source(x, node) if build.shape(x) == node.sample_shape else broadcast(node, build, x)
    root = _root(size, build, inverse=inverse)
    less: float | None
    if root is not None:
        axes, eps, less = _squares(root, x, build)
        if axes is None or eps <= 0:
            return None
        constant = rounding.div_up(1.0, rounding.sqrt_down(eps))
        reason = "normalising by the mean of squares is 1/sqrt(eps)-Lipschitz"
        known = _known(node, x, axes, build, eps=eps, form=0, less=less)
        return build.opaque(node, (source,), constant, reason, **known)
    if inverse:
        return None
    clamped, added = made_by(size, "clamp_min", build) or made_by(size, "clamp", build), made_by(size, "add", build)
    end = clamped or added
    if end is None or len(end.args) != 2 or end.kwargs or not _positive(end.args[1]):
        return None
    eps, less = float(end.args[1]), None
    axes = _norm_of(end.args[0], x, build)
    if axes is None:
        axes, less = (None, 0.0) if clamped else _deviation_of(end.args[0], x, build)
    if axes is None:
        return None
    reason = "normalising by a norm is 1/eps-Lipschitz"
    known = _known(node, x, axes, build, eps=eps, form=1 if clamped else 2, less=less)
    return build.opaque(node, (source,), rounding.div_up(1.0, eps), reason, **known)


def _known(
    node: Node, x: Ref, axes: Any, build: Builder, *, eps: float, form: int, less: float | None
) -> dict[str, Any]:
    """What tightens the constant on a region, where the axes are next to each other; `less` is taken off the size."""
    found = [build.graph[x.name].sample_axis(a) for a in _listed(axes)]
    places = sorted(a for a in found if a is not None)
    shape: tuple[int, ...] = build.shape(x)
    if len(places) != len(found) or places[-1] - places[0] != len(places) - 1:
        return {}
    size = math.prod(shape[places[0] : places[-1] + 1])
    share = 1.0 if less is None else size - less if form == 0 else math.sqrt(max(size - less, 0.0))
    after = math.prod(shape[places[-1] + 1 :])
    norm = Normalisation(size, eps, form=form, share=share, after=after, operand=node.args.index(x))
    return {"kind": "normalize", "parameters": norm.parameters} if share > 0 else {}


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _root(size: Any, build: Builder, *, inverse: bool) -> Any:
    """What is under the root."""
    node = made_by(size, "rsqrt" if inverse else "sqrt", build)
    if node is not None:
        return node.args[0]
    power = made_by(size, "pow", build)
    if power is not None and power.args[1] == (-0.5 if inverse else 0.5):
        return power.args[0]
    turned = made_by(size, "reciprocal", build) if inverse else None
    return None if turned is None else _root(turned.args[0], build, inverse=False)


def _squares(root: Any, x: Ref, build: Builder) -> tuple[Any, float, float]:
    """Axes, eps and correction of the size where an argument is `mean(x^2) + eps` or `var(...) + eps`, or no axes."""
    added = made_by(root, "add", build)
    if added is None or len(added.args) != 2 or added.kwargs or not _positive(added.args[1]):
        return None, 0.0, 0.0
    inside, eps = added.args[0], float(added.args[1])
    mean = made_by(inside, "mean", build)
    if mean is not None and len(mean.args) > 2 and mean.args[2] and _square_of(mean.args[0], x, build):
        return mean.args[1], eps, 0.0
    variance = made_by(inside, "var", build)
    axes = None if variance is None else _centred(variance, x, build)
    return axes, eps, 0.0 if variance is None else _correction(variance)


def _square_of(argument: Any, x: Ref, build: Builder) -> bool:
    power = made_by(argument, "pow", build)
    if power is not None:
        return bool(power.args[1] == 2) and _alike(power.args[0], x, build)
    square, product = made_by(argument, "square", build), made_by(argument, "mul", build)
    factors = square.args[:1] if square is not None else product.args if product is not None else ()
    return bool(factors) and all(_alike(factor, x, build) for factor in factors)


def _alike(one: Any, two: Any, build: Builder, depth: int = 4) -> bool:
    """Whether two arguments are the same tensor, or the same few operations on the same tensors, computed twice."""
    if not isinstance(one, Ref) or not isinstance(two, Ref) or one == two or depth == 0:
        return bool(one == two)
    first, second = build.graph[one.name], build.graph[two.name]
    if first.op != second.op or first.op == "input" or len(first.args) != len(second.args):
        return False
    pairs = zip(first.args, second.args, strict=True)
    return first.kwargs == second.kwargs and all(_alike(a, b, build, depth - 1) for a, b in pairs)


def _norm_of(argument: Any, x: Ref, build: Builder) -> Any:
    """The axes where an argument is the Euclidean norm of x with its axes kept."""
    norm = made_by(argument, "linalg_vector_norm", build)
    kept = norm is not None and len(norm.args) > 3 and norm.args[3] and norm.args[1] == 2
    return norm.args[2] if norm is not None and kept and _alike(norm.args[0], x, build) else None


def _deviation_of(argument: Any, x: Ref, build: Builder) -> tuple[Any, float]:
    deviation = made_by(argument, "std", build)
    return (None, 0.0) if deviation is None else (_centred(deviation, x, build), _correction(deviation))


def _correction(statistic: Node) -> float:
    """What is taken off the number of elements in a variance or a deviation."""
    if statistic.op.endswith(".dim"):
        return 1.0 if len(statistic.args) < 3 or statistic.args[2] else 0.0
    correction = statistic.kwargs.get("correction")
    return 1.0 if correction is None else float(correction)


def _centred(statistic: Node, x: Ref, build: Builder) -> Any:
    """The axes of a variance or a deviation of y with its axes kept, where x is `y - mean(y)` over the same axes."""
    axes = statistic.args[1] if len(statistic.args) > 1 else None
    kept = statistic.kwargs.get("keepdim", statistic.args[3] if len(statistic.args) > 3 else False)
    difference = made_by(x, "sub", build)
    if axes is None or not kept or difference is None or difference.kwargs or len(difference.args) != 2:
        return None
    mean = made_by(difference.args[1], "mean", build)
    if mean is None or len(mean.args) < 3 or not mean.args[2] or mean.args[0] != difference.args[0]:
        return None
    if statistic.args[0] != difference.args[0]:
        return None
    rank = len(build.graph[x.name].shape)
    same = {a % rank for a in _listed(mean.args[1])} == {a % rank for a in _listed(axes)}
    return axes if same else None


def _listed(axes: Any) -> list[int]:
    return [axes] if isinstance(axes, int) else list(axes)


def gated(node: Node, build: Builder) -> int | None:
    """The position of a product that is a multiple of SiLU, GELU, Mish or hardswish; None elsewhere.

    `x sigmoid(b x)` is `silu(b x) / b`, so that its slopes are those of SiLU for every b; likewise
    `x (1 + erf(b x))` has twice the slopes of GELU.
    """
    factor, leaves = _factors(node, build)
    if len(leaves) != 2:
        return None
    for x, gate in (leaves, leaves[::-1]):
        found = _gate(gate, x, build)
        if found is not None:
            kind, times = found
            shape = node.sample_shape
            if build.shape(x) != shape:
                return None
            limits = activation_slopes(kind, (), "", {})
            position = build.add(Elementwise((build.source(x, node),), shape, label(node), *limits, kind=kind))
            coefficient = factor * times
            if coefficient == 1:
                return position
            # One more unit in the last place than the product of the stated factors could have lost.
            coefficient *= 1 + 16 * rounding.U if abs(factor) != 0.5 and factor != 1 else 1
            return build.add(Sum((position,), shape, label(node), (coefficient,)))
    return None


def _factors(node: Node, build: Builder) -> tuple[float, list[Ref]]:
    """A product of numbers and tensors, taken apart."""
    factor, leaves, open_nodes = 1.0, [], [node]
    while open_nodes:
        current = open_nodes.pop()
        quotient = current.op.startswith("aten.div")
        for place, argument in enumerate(current.args[:2]):
            inner = made_by(argument, "mul", build) or made_by(argument, "div", build)
            if isinstance(argument, int | float):
                factor = factor / argument if quotient and place == 1 else factor * argument
            elif inner is not None and _numeric(inner) and not (quotient and place == 1):
                open_nodes.append(inner)
            elif isinstance(argument, Ref) and argument.name in build.at and not (quotient and place == 1):
                leaves.append(argument)
            else:
                return 1.0, []
    return factor, leaves


def _numeric(node: Node) -> bool:
    """Whether one of the factors is a number, or it is a product of two varying tensors without more options."""
    return not node.kwargs and any(isinstance(a, int | float) for a in node.args[:2])


def _gate(gate: Ref, x: Ref, build: Builder) -> tuple[str, float] | None:
    """The activation that x times the gate is a multiple of, and the multiple."""
    sigmoid, tanh = made_by(gate, "sigmoid", build), made_by(gate, "tanh", build)
    if sigmoid is not None and _multiple(sigmoid.args[0], x, build):
        return "silu", 1.0
    soft = None if tanh is None else made_by(tanh.args[0], "softplus", build)
    if soft is not None and soft.args == (x,) and not soft.kwargs:
        return "mish", 1.0
    hard = made_by(gate, "hardsigmoid", build)
    if hard is not None and hard.args[0] == x:
        return "hardswish", 1.0
    clipped = made_by(gate, "relu6", build) or made_by(gate, "hardtanh", build)
    if clipped is not None and (clipped.op.startswith("aten.relu6") or clipped.args[1:] in ((0.0, 6.0), (0, 6))):
        shifted = made_by(clipped.args[0], "add", build)
        if shifted is not None and shifted.args == (x, 3) and not shifted.kwargs:
            return "hardswish", 6.0
    plus = made_by(gate, "add", build)
    if plus is None or plus.kwargs or len(plus.args) != 2 or 1 not in plus.args:
        return None
    inner = plus.args[0] if plus.args[1] == 1 else plus.args[1]
    erf, tanh = made_by(inner, "erf", build), made_by(inner, "tanh", build)
    if erf is not None and _multiple(erf.args[0], x, build):
        return "gelu", 2.0
    if tanh is not None and _cubic(tanh.args[0], x, build):
        return "gelu_tanh", 2.0
    return None


def _multiple(argument: Any, x: Ref, build: Builder) -> bool:
    """Whether an argument is x times numbers."""
    while argument != x:
        node = made_by(argument, "mul", build) or made_by(argument, "div", build)
        if node is None or node.kwargs or len(node.args) != 2:
            return False
        numbers = [a for a in node.args if isinstance(a, int | float)]
        turned = node.op.startswith("aten.div") and not isinstance(node.args[1], int | float)
        if len(numbers) != 1 or turned or not math.isfinite(numbers[0]) or numbers[0] == 0:
            return False
        argument = next(a for a in node.args if not isinstance(a, int | float))
    return True


def _cubic(argument: Any, x: Ref, build: Builder) -> bool:
    """Whether an argument is `a (x + b x^3)` with the b / a^2 of GELU's approximation.

    A relative change of 1e-9 in it moves the extreme slope by less than 1e-10, and the table is rounded by 7e-9.
    """
    outer = made_by(argument, "mul", build)
    if outer is None:
        return False
    scale = [a for a in outer.args if isinstance(a, int | float)]
    total = made_by(next((a for a in outer.args if isinstance(a, Ref)), None), "add", build)
    if len(scale) != 1 or total is None or total.kwargs or len(total.args) != 2 or x not in total.args:
        return False
    cube = made_by(total.args[1] if total.args[0] == x else total.args[0], "mul", build)
    if cube is None:
        return False
    weight = [a for a in cube.args if isinstance(a, int | float)]
    power = made_by(next((a for a in cube.args if isinstance(a, Ref)), None), "pow", build)
    if len(weight) != 1 or power is None or power.args != (x, 3) or scale[0] == 0:
        return False
    return abs(weight[0] / scale[0] ** 2 / _TANH_GELU - 1) < 1e-9
