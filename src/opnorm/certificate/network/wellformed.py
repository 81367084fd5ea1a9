"""Whether a stated program means anything: every size, index and number is checked before memory is taken for it."""

from math import inf, isfinite, prod

import torch

from opnorm.certificate.network import maps
from opnorm.certificate.network.maps import Weights
from opnorm.certificate.network.program import Concat, Elementwise, Input, Linear, Opaque, Program, Shift, Step, Sum
from opnorm.errors import CertificateError

_LARGEST = 2**31
"""Elements of a step, or of what it reads after padding."""

_MOST_UNITS = 2**20
"""Roundings that the entries of a tensor may be stated to have."""


def check_program(program: Program, weights: Weights) -> None:
    """Refuse a program whose steps do not fit each other, its constants or the weights.

    Args:
        program: as stated.
        weights: the stored weights.

    Raises:
        CertificateError: naming the step.
    """
    if not program.outputs or not all(0 <= o < len(program.steps) for o in program.outputs):
        raise CertificateError("the program's outputs are not among its steps")
    weights = {**weights, **program.constants}
    for position, step in enumerate(program.steps):
        problem = _problem(step, position, program, weights)
        if problem:
            raise CertificateError(f"step {position} ({step.label}): {problem}")


def _problem(step: Step, position: int, program: Program, weights: Weights) -> str:
    if any(not 0 <= s < position for s in step.sources):
        return "it reads a step that does not come before it"
    if not _sizes(step.shape) or step.size > _LARGEST:
        return f"no result can have the shape {step.shape}"
    sources = [program.steps[s] for s in step.sources]
    if isinstance(step, Input):
        # The calculus starts from all inputs together: one that comes later would be taken for something else.
        late = any(not isinstance(before, Input) for before in program.steps[:position])
        return "an input reads nothing and comes first" if sources or late else ""
    if not sources:
        return "it reads nothing"
    if isinstance(step, Opaque):
        return "" if 0 <= step.constant <= inf else f"{step.constant!r} is no Lipschitz constant"
    if isinstance(step, Sum):
        good = len(step.coefficients) == len(sources) and all(map(isfinite, step.coefficients))
        return "" if good and all(s.size == step.size for s in sources) else "its terms do not fit"
    if isinstance(step, Concat):
        return _concat_problem(step, sources)
    if len(sources) != 1:
        return "it reads more than one step"
    if isinstance(step, Shift):
        return _shift_problem(step, sources[0], weights)
    if isinstance(step, Elementwise):
        return _slope_problem(step) if sources[0].size == step.size else "its size is not that of what it reads"
    assert isinstance(step, Linear)
    if prod(step.map.in_shape) != sources[0].size or prod(step.map.out_shape) != step.size:
        return "its map has other sizes"
    missing = [name for name in step.map.names if name not in weights]
    return f"there is no weight {missing[0]!r}" if missing else _map_problem(step.map, weights, program)


def _concat_problem(step: Concat, sources: list[Step]) -> str:
    fits = len(step.shapes) == len(sources) and all(
        _all_tuples(step.shapes) and _sizes(shape) and prod(shape) == s.size and len(shape) == len(step.shape)
        for shape, s in zip(step.shapes, sources, strict=False)
    )
    if not fits or not 0 <= step.axis < len(step.shape):
        return "its parts do not fit"
    others = [tuple(n for i, n in enumerate(shape) if i != step.axis) for shape in (*step.shapes, step.shape)]
    joined = sum(shape[step.axis] for shape in step.shapes)
    return "" if len(set(others)) == 1 and joined == step.shape[step.axis] else "its parts do not fit"


def _shift_problem(step: Shift, source: Step, weights: Weights) -> str:
    if source.size != step.size or not isfinite(step.coefficient):
        return "its size is not that of what it reads"
    if not step.weight:
        return ""
    if step.weight not in weights:
        return f"there is no weight {step.weight!r}"
    fits = step.before * weights[step.weight].numel() * step.after == step.size
    return "" if fits else f"{step.weight!r} of shape {tuple(weights[step.weight].shape)} does not fit"


def _slope_problem(step: Elementwise) -> str:
    low, high = step.low, step.high
    if not low.dtype == high.dtype == torch.float64 or low.shape != high.shape:
        return "its slopes are not two float64 tensors of one shape"
    if low.dim() > 1 and tuple(low.shape) != step.shape:
        return "its slopes do not fit its shape"
    if low.dim() == 1 and low.numel() != 1 and (not step.shape or low.numel() != step.shape[0]):
        return "its slopes do not fit its channels"
    finite = bool(torch.isfinite(low).all() and torch.isfinite(high).all())
    return "" if finite and bool((low <= high).all()) else "its slopes are no intervals"


def _map_problem(linear: maps.LinearMap, weights: Weights, program: Program) -> str:
    if not _sizes(linear.in_shape) or not _sizes(linear.out_shape):
        return "its map has no sizes"
    if isinstance(linear, maps.Gather):
        return _gather_problem(linear, program)
    if not isinstance(linear, maps.Weighted) or not 0 <= linear.rounded <= _MOST_UNITS:
        return "its stated rounding is no count"
    if isinstance(linear, maps.Matrix):
        shape = tuple(weights[linear.weight].shape)
        if len(shape) != 2 or linear.before < 1 or linear.after < 1:
            return f"{linear.weight!r} of shape {shape} is no matrix"
        inner, outer = linear.before * shape[1] * linear.after, linear.before * shape[0] * linear.after
        return "" if (inner, outer) == (prod(linear.in_shape), prod(linear.out_shape)) else "its matrix does not fit"
    if isinstance(linear, maps.Scale):
        return _scale_problem(linear, weights)
    if isinstance(linear, maps.Convolution):
        return _convolution_problem(linear, weights)
    assert isinstance(linear, maps.TransposedConvolution)
    return _transposed_problem(linear, weights)


def _gather_problem(linear: maps.Gather, program: Program) -> str:
    index = program.constants.get(linear.index)
    if index is None or index.dtype != torch.int64 or index.dim() != 1:
        return "its index is no list of integers of the certificate"
    size = prod(linear.in_shape)
    inside = index.numel() == prod(linear.out_shape) and bool(((index >= -1) & (index < size)).all())
    return "" if inside else "its index does not fit"


def _scale_problem(linear: maps.Scale, weights: Weights) -> str:
    if linear.in_shape != linear.out_shape or not 0 <= linear.axis < len(linear.in_shape):
        return "its factors do not fit"
    wanted = linear.in_shape[linear.axis]
    if any(weights[name].numel() not in (1, wanted) for name in linear.names):
        return "its factors do not fit"
    return "" if isfinite(linear.eps) and linear.eps >= 0 else "its eps is no small number"


def _convolution_problem(conv: maps.Convolution, weights: Weights) -> str:
    dims = len(conv.kernel)
    lists = (conv.stride, conv.padding, conv.dilation, conv.in_shape[1:], conv.out_shape[1:])
    pairs = _all_tuples(conv.padding) and all(len(p) == 2 for p in conv.padding)
    if dims not in (1, 2, 3) or any(len(x) != dims for x in lists) or not pairs:
        return "its axes do not fit"
    if not _sizes((*conv.kernel, *conv.stride, *conv.dilation, conv.groups)) or min(map(min, conv.padding)) < 0:
        return "its geometry holds a number that is none"
    wanted = (conv.out_shape[0], conv.in_shape[0] // conv.groups, *conv.kernel)
    whole = conv.in_shape[0] % conv.groups == 0 and conv.out_shape[0] % conv.groups == 0
    if not whole or tuple(weights[conv.weight].shape) != wanted:
        return f"its kernel has the shape {tuple(weights[conv.weight].shape)}, not {wanted}"
    if conv.widest > _LARGEST:
        return "its padding is too large"
    if conv.circular and any(max(pair) > n for n, pair in zip(conv.in_shape[1:], conv.padding, strict=True)):
        return "its circular padding is wider than its images"
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel, strict=True)]
    out = tuple((n - span) // s + 1 for n, span, s in zip(conv.padded, spans, conv.stride, strict=True))
    return "" if out == conv.out_shape[1:] else f"its images have the size {out}, not {conv.out_shape[1:]}"


def _transposed_problem(conv: maps.TransposedConvolution, weights: Weights) -> str:
    kernel = tuple(weights[conv.weight].shape)
    dims = len(kernel) - 2
    lists = (conv.stride, conv.padding, conv.output_padding, conv.dilation, conv.in_shape[1:], conv.out_shape[1:])
    plain = not _all_tuples(conv.padding)
    if dims not in (1, 2, 3) or any(len(x) != dims for x in lists) or not plain:
        return "its axes do not fit"
    if not _sizes((*kernel, *conv.stride, *conv.dilation, conv.groups)) or min(*conv.padding, *conv.output_padding) < 0:
        return "its geometry holds a number that is none"
    whole = kernel[0] % conv.groups == 0
    if not whole or kernel[0] != conv.in_shape[0] or kernel[1] * conv.groups != conv.out_shape[0]:
        return f"its kernel of shape {kernel} does not fit"
    if any(o >= max(s, d) for o, s, d in zip(conv.output_padding, conv.stride, conv.dilation, strict=True)):
        return "its output padding is too large"
    full = [
        (n - 1) * s + d * (k - 1) + 1 + o
        for n, s, d, k, o in zip(
            conv.in_shape[1:], conv.stride, conv.dilation, kernel[2:], conv.output_padding, strict=True
        )
    ]
    if kernel[1] * conv.groups * prod(full) > _LARGEST:
        return "its stride is too large"
    out = tuple(n - 2 * p for n, p in zip(full, conv.padding, strict=True))
    return "" if out == conv.out_shape[1:] else f"its images have the size {out}, not {conv.out_shape[1:]}"


def _all_tuples(values: tuple[object, ...]) -> bool:
    """Whether lists were stated where lists are meant: JSON does not say."""
    return all(isinstance(value, tuple) for value in values)


def _sizes(values: tuple[int, ...]) -> bool:
    return all(n >= 1 for n in values)
