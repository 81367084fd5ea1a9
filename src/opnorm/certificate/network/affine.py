"""Matrices known up to an entrywise error, and the affine steps of a program in terms of them."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.maps import LinearMap, Weights


@dataclass(frozen=True, eq=False)
class Rows:
    """A matrix whose exact value differs from `value` by at most `error`, entry by entry.

    Attributes:
        value: shape (blocks, m, n), real or complex; one block for dense networks, one per frequency otherwise.
        error: of the same shape, or of one block that holds for all; real; None where the value is exact.
    """

    value: Tensor
    error: Tensor | None = None

    @property
    def height(self) -> int:
        """Number of rows."""
        return int(self.value.shape[-2])


def exact_identity(size: int) -> Rows:
    """The identity, in one block."""
    return Rows(torch.eye(size, dtype=torch.float64)[None])


def mapped(rows: Rows, linear: LinearMap, weights: Weights) -> Rows:
    """The rows of `A x` from those of `x` (one block).

    Where `x` is a base tensor itself, its rows are those of an identity and every entry of the result is one
    coefficient of `A`, copied without rounding; otherwise the sums are bounded by `gamma(terms) |A| |rows|`.
    """
    columns = rows.value[0].mT  # shape: (base, size): each column of the rows is a sample
    samples = columns.reshape(columns.shape[0], *linear.in_shape)
    value = linear.apply(samples, weights).reshape(columns.shape[0], -1).mT[None]
    selects = rows.error is None and is_selection(rows.value)
    if selects and linear.units == 0:
        return Rows(value)
    terms = 1 if selects else linear.terms(weights)
    relative = rounding.gamma(terms + linear.units + 2)
    majorant = linear.apply(samples.abs(), weights, absolute=True).reshape(columns.shape[0], -1).mT[None]
    error = majorant * relative
    if rows.error is not None:
        spread = rows.error[0].mT.reshape(columns.shape[0], *linear.in_shape)
        error = error + linear.apply(spread, weights, absolute=True).reshape(columns.shape[0], -1).mT[None]
    return Rows(value, error * (1 + rounding.gamma(2 * terms + 8)))


def is_selection(value: Tensor) -> bool:
    """Whether each row and each column holds at most one entry, which is 1: no product with it is ever summed."""
    nonzero = value != 0
    ones = bool((value[nonzero] == 1).all())
    return ones and int(nonzero.sum(-1).max()) <= 1 and int(nonzero.sum(-2).max()) <= 1


def summed(parts: list[Rows], coefficients: tuple[float, ...]) -> Rows:
    """`sum_i c_i rows_i`, with the roundings of the products and of the sums."""
    if len(parts) == 1 and coefficients[0] in (1.0, -1.0):
        return Rows(coefficients[0] * parts[0].value, parts[0].error)
    value = sum_of(c * p.value for c, p in zip(coefficients, parts, strict=True))
    majorant = sum_of(abs(c) * p.value.abs() for c, p in zip(coefficients, parts, strict=True))
    # Disjoint supports with coefficients of one, as in x + f(x) at a fresh base, are exact.
    clash = sum_of((p.value != 0).to(torch.int8) for p in parts).max() > 1
    scaled = any(c not in (1.0, -1.0) for c in coefficients)
    errors = [abs(c) * p.error for c, p in zip(coefficients, parts, strict=True) if p.error is not None]
    if not clash and not scaled and not errors:
        return Rows(value)
    relative = rounding.gamma(len(parts) + 3)
    total = majorant * relative + (sum_of(errors) if errors else 0.0)
    return Rows(value, total * (1 + rounding.gamma(len(parts) + 8)))


def sum_of(items: Iterable[Tensor]) -> Tensor:
    """The sum of a non-empty sequence of tensors."""
    total, *others = items
    for other in others:
        total = total + other
    return total


def stacked(parts: list[Rows]) -> Rows:
    """The rows of all parts, one under the other; a part of one block stands for as many as the others have."""
    blocks = max(p.value.shape[0] for p in parts)
    parts = [expanded(p, blocks) for p in parts]
    value = torch.cat([p.value for p in parts], -2)
    if all(p.error is None for p in parts):
        return Rows(value)
    nothing = [torch.zeros(1, *p.value.shape[1:], dtype=torch.float64) for p in parts]
    errors = [e if p.error is None else p.error for p, e in zip(parts, nothing, strict=True)]
    shared = max(e.shape[0] for e in errors)  # an error may be the same in every block
    return Rows(value, torch.cat([e.expand(shared, -1, -1) for e in errors], -2))


def expanded(rows: Rows, blocks: int) -> Rows:
    """The same rows in each of `blocks` blocks."""
    if rows.value.shape[0] == blocks:
        return rows
    return Rows(rows.value.expand(blocks, -1, -1), rows.error)


def permuted(rows: Rows, order: Tensor) -> Rows:
    """The rows in another order."""
    return Rows(rows.value[:, order], None if rows.error is None else rows.error[:, order])


def scaled_rows(rows: Rows, factors: Tensor) -> Rows:
    """Each row times an exact factor; powers of two (ReLU's 1/2) round nothing."""
    value = rows.value * factors[:, None]
    if bool((torch.frexp(factors)[0].abs() == 0.5).logical_or(factors == 0).all()):
        return Rows(value, None if rows.error is None else rows.error * factors.abs()[:, None])
    error = value.abs() * (4 * rounding.U)
    if rows.error is not None:
        error = error + rows.error * factors.abs()[:, None]
    return Rows(value, error * (1 + 8 * rounding.U))
