"""Norms of linear steps for certificates of the naive rules: each proved by the Cholesky lemma, nothing searched.

A run is a linear step, or two of which the second reads the first (a BatchNorm after a convolution). Its matrix is
formed whole where that is small, as a bare matrix where it acts along one axis, and on a torus otherwise: a
convolution on H points with padding is a submatrix of the circular one on enough points.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.affine import Rows
from opnorm.certificate.network.fourier_chain import fourier_chain
from opnorm.certificate.network.maps import (
    Convolution,
    Gather,
    LinearMap,
    Matrix,
    Scale,
    TransposedConvolution,
    Weights,
    stored,
)
from opnorm.certificate.network.program import Input, Linear, Program
from opnorm.certificate.network.stages import Regrid, dense_chain
from opnorm.certificate.posdef import SQRT2, eigenvalue_floor, require_ieee_arithmetic
from opnorm.errors import CertificateError, UnsupportedLayerError

_SMALL = 1024
_DENSE_AT_MOST = 4096
_CHEAP = 2e8
_STEPS = 60
_MARGINS = (2.0**-30, 2.0**-27, 2.0**-24, 2.0**-20, 2.0**-16, 2.0**-12, 2.0**-8)


def proves_run(run: Sequence[LinearMap], weights: Weights, bound: float) -> bool:
    """Try to prove that the composition of linear maps has a norm of at most `bound`.

    Raises:
        CertificateError: if there is no proof for these maps.
    """
    require_ieee_arithmetic()
    closed = _closed_form(run, weights)
    if closed is not None:
        return closed <= bound
    return _within(_rows(run, weights), bound)


def attainable(run: Sequence[LinearMap], weights: Weights, hint: float) -> float:
    """A bound that `proves_run` can prove: about `hint`, or about what a power iteration finds.

    Raises:
        CertificateError: if there is none.
    """
    require_ieee_arithmetic()
    closed = _closed_form(run, weights)
    if closed is not None:
        return closed
    rows = _rows(run, weights)
    for start in (hint, _stretched(rows.value)):
        for margin in _MARGINS:
            if _within(rows, start * (1 + margin)):
                return start * (1 + margin)
    raise CertificateError(f"the norm of {type(run[0]).__name__} could not be proved")


def _closed_form(run: Sequence[LinearMap], weights: Weights) -> float | None:
    """The norm of a single scale or of moving data, which need no factorisation."""
    if len(run) > 1:
        return None
    (linear,) = run
    if isinstance(linear, Scale):
        return rounding.mul_up(float(linear.factors(weights).abs().max()), 1 + (linear.units + 2) * 2 * rounding.U)
    if isinstance(linear, Gather):
        index = weights[linear.index]
        read = index[index >= 0]
        return rounding.sqrt_up(float(torch.bincount(read).max())) if len(read) else 0.0
    return None


def _rows(run: Sequence[LinearMap], weights: Weights) -> Rows:
    matrix = _bare_matrix(run, weights)
    if matrix is not None:
        return matrix
    if isinstance(run[0], TransposedConvolution) and len(run) == 1:
        run = [_adjoint(run[0], weights)]
    program = _alone(run)
    largest = max(step.size for step in program.steps)
    if largest > _SMALL:
        try:
            chain = fourier_chain(program, weights)
        except UnsupportedLayerError as problem:
            if largest > _DENSE_AT_MOST:
                raise CertificateError(f"no proof of the norm of {type(run[0]).__name__}: {problem}") from problem
        else:
            # The cover of the inputs is the identity, and so it is after its aliases were joined.
            assert all(isinstance(stage, Regrid) for stage in chain.stages)
            return chain.out
    return dense_chain(program, weights, _DENSE_AT_MOST).out


def _bare_matrix(run: Sequence[LinearMap], weights: Weights) -> Rows | None:
    """A matrix along one axis of the sample, with a scale along its rows: the axes beside it change no norm."""
    matrix, *after = run
    if not isinstance(matrix, Matrix) or len(after) > 1:
        return None
    if after and not (isinstance(after[0], Scale) and matrix.after == 1 and _scales_last(after[0], matrix)):
        return None
    value = stored(weights, matrix.weight)
    units = matrix.units
    if after:
        assert isinstance(after[0], Scale)
        value = value * after[0].factors(weights).expand(len(value))[:, None]
        units += after[0].units + 1
    return Rows(value[None], value.abs()[None] * (2 * units * rounding.U) if units else None)


def _scales_last(scale: Scale, matrix: Matrix) -> bool:
    return scale.in_shape == matrix.out_shape and scale.axis == len(scale.in_shape) - 1


def _adjoint(conv: TransposedConvolution, weights: Weights) -> Convolution:
    """The convolution whose transpose it is: of the same norm."""
    kernel = tuple(weights[conv.weight].shape[2:])
    padding = tuple((p, p) for p in conv.padding)
    return Convolution(
        conv.out_shape, conv.in_shape, conv.weight, kernel, conv.stride, padding, conv.dilation, conv.groups
    )


def _alone(run: Sequence[LinearMap]) -> Program:
    first = Input((), run[0].in_shape, "input")
    steps = [Linear((i,), linear.out_shape, "map", linear) for i, linear in enumerate(run)]
    return Program((first, *steps), (len(run),))


def _within(rows: Rows, bound: float) -> bool:
    """Whether every matrix within the rows' error has norm at most `bound`: `b^2 I - R R^H >= 0` by Cholesky."""
    value, error = rows.value, rows.error
    if not bool(torch.isfinite(value).all()) or not 0 <= bound < math.inf:
        return False
    if not bool(value.any()) and (error is None or not bool(error.any())):
        return True
    largest = float(value.abs().amax())
    if not bound > 0 or largest > 2 * bound:
        return False
    unit = math.ldexp(1.0, math.frexp(bound)[1])
    value, error = value / unit, None if error is None else error / unit  # exact, or lost to underflow: see `lost`
    if value.shape[-2] > value.shape[-1]:
        value, error = value.mH, None if error is None else error.mT
    terms, height = value.shape[-1], value.shape[-2]
    gram = value @ value.mH
    gram = (gram + gram.mH) / 2
    doubt = _gram_error(value, error, terms)
    lost = rounding.TINY * 8 * (terms + 1) * (height + 1)
    target = rounding.down(rounding.down((bound / unit) ** 2))
    # What the factorisation itself will lose, so that the proof asks for no more than it must.
    loss = SQRT2 * rounding.gamma(2 * height + 6) if value.is_complex() else rounding.gamma(height + 3)
    margin = doubt * 1.001 + 1.01 * loss * height * target + 16 * rounding.U + lost
    diagonal = gram.diagonal(dim1=-2, dim2=-1).real.abs().amax(-1)
    shifted = (target - margin)[:, None, None] * torch.eye(height, dtype=torch.float64) - gram
    rounded = 8 * rounding.U * (target + margin + diagonal)
    floor = eigenvalue_floor(shifted)
    return bool((floor + margin * (1 - 4 * rounding.U) - doubt - rounded - lost >= 0).all())


def _stretched(value: Tensor) -> float:
    """About the largest singular value, from below."""
    if value.shape[0] * min(value.shape[-2:]) ** 3 <= _CHEAP:
        return float(torch.linalg.matrix_norm(value, 2).amax())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(value.shape[0], value.shape[-1], 1, generator=generator, dtype=torch.float64).to(value.dtype)
    length = torch.ones(())
    for _ in range(_STEPS):
        y = value @ (x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min(rounding.TINY))
        length = torch.linalg.vector_norm(y, dim=-2).amax()
        x = value.mH @ y
    return float(length)


def _gram_error(value: Tensor, error: Tensor | None, terms: int) -> Tensor:
    """Upper bounds of the norm of `gram - R R^H`, one for each block, from row sums of its entrywise bound."""
    constant = 3 * rounding.gamma(4 * terms + 16) if value.is_complex() else rounding.gamma(2 * terms + 8)
    size = value.abs()
    # Row sums of |R| |R|^T, without the product.
    sums = (size @ size.sum(-2)[..., None])[..., 0] * constant
    if error is not None:
        wide = size + error
        across = (error @ wide.sum(-2)[..., None])[..., 0] + (wide @ error.sum(-2)[..., None])[..., 0]
        sums = sums + across
    bound: Tensor = sums.amax(-1) * (1 + rounding.gamma(4 * (terms + value.shape[-2]) + 32))
    return bound


def fused(first: LinearMap, second: LinearMap) -> bool:
    """Whether the two are better taken together: a scale after a convolution or a matrix."""
    if not isinstance(second, Scale) or second.in_shape != first.out_shape:
        return False
    if isinstance(first, Matrix):
        return first.after == 1 and _scales_last(second, first)
    return isinstance(first, Convolution) and second.axis == 0
