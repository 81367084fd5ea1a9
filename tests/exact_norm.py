"""Spectral norms of small matrices decided in integers, for tests of what must hold without tolerance."""

import math
from fractions import Fraction

import flint
import torch
from torch import Tensor

from opnorm import Enclosure


def real_form(weight: Tensor) -> Tensor:
    """A real float64 matrix with the same singular values; every dtype up to float64 fits exactly."""
    if not weight.is_complex():
        return weight.to(torch.float64)
    re, im = weight.real.to(torch.float64), weight.imag.to(torch.float64)
    return torch.cat([torch.cat([re, -im], 1), torch.cat([im, re], 1)])


def norm_at_most(weight: Tensor, bound: float | Fraction) -> bool:
    """Decide `sigma(weight) <= bound` exactly.

    `bound^2 I - W W^T` is positive semidefinite if and only if the coefficients of its characteristic polynomial
    alternate in sign, because all its roots are real.
    """
    rows = [[Fraction(x) for x in row] for row in real_form(weight).tolist()]
    bound = Fraction(bound)
    scale = math.lcm(bound.denominator, *(x.denominator for row in rows for x in row))
    matrix = flint.fmpz_mat([[int(x * scale) for x in row] for row in rows])
    size = min(matrix.nrows(), matrix.ncols())
    gram = matrix * matrix.transpose() if matrix.nrows() == size else matrix.transpose() * matrix
    identity = flint.fmpz_mat([[int(i == j) for j in range(size)] for i in range(size)])
    coefficients = (identity * int(bound * scale) ** 2 - gram).charpoly().coeffs()  # constant term first
    return all((-1) ** (size - k) * c >= 0 for k, c in enumerate(coefficients))


def enclose_exactly(weight: Tensor) -> Enclosure:
    """The norm to a few units in the last place, both ends decided in integers."""
    matrix = real_form(weight)
    largest = float(matrix.abs().amax())
    if largest == 0.0:
        return Enclosure(0.0, 0.0, "proved", "integers")
    guess = largest * float(torch.linalg.matrix_norm(matrix / largest, 2))
    lower, upper, step = guess, guess, 2.0**-53
    while not norm_at_most(weight, upper):
        upper, step = math.nextafter(upper * (1 + step), math.inf), 2 * step
    step = 2.0**-53
    while lower > 0 and norm_at_most(weight, math.nextafter(lower, 0.0)):
        lower, step = math.nextafter(lower * (1 - step), 0.0), 2 * step
    return Enclosure(lower, upper, "proved", "integers")
