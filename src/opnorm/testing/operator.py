"""What every operator promises, one function for each promise."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.norms import norm
from opnorm.operators import LinearOperator
from opnorm.testing.twin import ORACLE, dense_twin, singular_value

Promise = Callable[[LinearOperator], None]


def check_operator(operator: LinearOperator) -> None:
    """Check an operator against its dense twin: shapes, linearity, adjoint, majorant, error terms and enclosure.

    The operator must be small: its matrix is built several times.

    Raises:
        AssertionError: if it breaks a promise; the message says which, and by how much.

    Example:
        >>> import torch
        >>> from opnorm.operators import Dense
        >>> from opnorm.testing import check_operator
        >>> check_operator(Dense(torch.tensor([[1.0, 2.0], [0.0, 3.0]])))
        >>> class Forgetful(Dense):
        ...     def adjoint(self, y):
        ...         return y @ self.weight.to(y.dtype).mT  # not the adjoint, but the map again
        >>> check_operator(Forgetful(torch.tensor([[1.0, 2.0], [0.0, 3.0]])))
        Traceback (most recent call last):
        ...
        AssertionError: Forgetful: adjoint is off the conjugate transpose of apply by 2.0e+00
    """
    for promise in PROMISES.values():
        promise(operator)


def shapes(operator: LinearOperator) -> None:
    """Batches of any size go from `in_shape` to `out_shape` and back, and keep their dtype.

    Raises:
        AssertionError: if one does not.
    """
    for batch in (1, 3):
        x = _random(operator, batch, operator.in_shape)
        y = operator.apply(x)
        _require(
            operator, y.shape == (batch, *operator.out_shape), f"apply gives {tuple(y.shape)} for {tuple(x.shape)}"
        )
        back = operator.adjoint(y)
        _require(operator, back.shape == x.shape, f"adjoint gives {tuple(back.shape)} for {tuple(y.shape)}")
        _require(operator, y.dtype == x.dtype == back.dtype, f"apply and adjoint turn {x.dtype} into {y.dtype}")


def linearity(operator: LinearOperator) -> None:
    """`apply` maps sums to sums and multiples to multiples, without a constant.

    Raises:
        AssertionError: if it does not, or if the samples of a batch influence each other.
    """
    x = _random(operator, 4, operator.in_shape)
    constant = operator.apply(torch.zeros_like(x)).abs().max() if operator.out_size else torch.zeros(())
    _require(operator, float(constant) == 0.0, f"apply adds a constant: {float(constant):.1e} at 0")
    matrix, majorant = _twin(operator), _majorant(operator)
    expected = x.flatten(1) @ matrix.mT
    allowed = ORACLE * (x.abs().flatten(1) @ majorant.mT)
    worst = _excess(operator.apply(x).flatten(1) - expected, allowed)
    _require(operator, worst <= 0, f"apply is not linear, or mixes the samples of a batch: off by {worst:.1e}")


def adjoint(operator: LinearOperator) -> None:
    """`adjoint` is the conjugate transpose of `apply`, entry by entry.

    Raises:
        AssertionError: if it is not.
    """
    matrix, majorant = _twin(operator), _majorant(operator)
    back = dense_twin(operator.adjoint, operator.out_shape, is_complex=operator.dtype.is_complex)
    worst = _excess(back.mH - matrix, ORACLE * majorant)
    _require(operator, worst <= 0, f"adjoint is off the conjugate transpose of apply by {worst:.1e}")


def absolute(operator: LinearOperator) -> None:
    """`absolute` has entries that are real and at least the moduli of the operator's.

    Raises:
        AssertionError: if an entry is smaller, or the shapes differ.
    """
    majorant = operator.absolute()
    same = (majorant.in_shape, majorant.out_shape) == (operator.in_shape, operator.out_shape)
    _require(operator, same, f"absolute maps {majorant.in_shape} to {majorant.out_shape}")
    _require(operator, not majorant.dtype.is_complex, "absolute has complex entries")
    entries = _majorant(operator)
    worst = float((_twin(operator).abs() - entries * (1 + ORACLE)).max()) if entries.numel() else 0.0
    _require(operator, worst <= 0, f"absolute is below the modulus of an entry by {worst:.1e}")


def terms(operator: LinearOperator) -> None:
    """`terms` and `entry_error` account for the rounding errors of `apply`.

    A sum of r products, or sums of sums with t products in all, reach at most exp(t / e) entries of a row: a smaller
    `terms` cannot be right. That it is large enough is tried on random vectors only, against correctly rounded sums.

    Raises:
        AssertionError: if they do not.
    """
    matrix, majorant = _twin(operator), _majorant(operator)
    reached = int((majorant != 0).sum(1).max()) if majorant.numel() else 0
    _require(
        operator,
        reached <= math.exp(operator.terms / math.e),
        f"terms is {operator.terms}, too few for rows of {reached} entries",
    )
    _require(operator, operator.entry_terms >= 1, f"entry_terms is {operator.entry_terms}")
    _require(operator, 0.0 <= operator.entry_error < 1.0, f"entry_error is {operator.entry_error}")
    if operator.dtype.is_complex:
        return
    x = _random(operator, 2, operator.in_shape)
    found = operator.apply(x).flatten(1)
    # The twin's entries carry errors of their own, so that each side gets the bound once.
    share = 2 * (rounding.gamma(operator.terms + operator.entry_terms + 8) + operator.entry_error)
    allowed = share * (x.abs().flatten(1) @ majorant.mT)
    exact = [[_exact_dot(row, sample) for row in matrix] for sample in x.flatten(1)]
    worst = _excess(found - torch.tensor(exact, dtype=found.dtype).reshape(found.shape), allowed)
    _require(operator, worst <= 0, f"apply errs by {worst:.1e} more than terms and entry_error allow")


def enclosure(operator: LinearOperator) -> None:
    """`opnorm.norm` encloses the largest singular value of the dense twin, with proof.

    Raises:
        AssertionError: if it does not.
    """
    truth = singular_value(_twin(operator))
    found = norm(operator)
    _require(operator, found.guarantee == "proved", f"the norm is {found.guarantee}, not proved")
    fits = found.lower <= truth * (1 + ORACLE) and found.upper >= truth * (1 - ORACLE)
    _require(operator, fits, f"the norm {truth!r} of the dense twin is outside [{found.lower!r}, {found.upper!r}]")


PROMISES: dict[str, Promise] = {
    "shapes": shapes,
    "absolute": absolute,
    "linearity": linearity,
    "adjoint": adjoint,
    "terms": terms,
    "enclosure": enclosure,
}
"""Each promise by its name."""


def _twin(operator: LinearOperator) -> Tensor:
    return dense_twin(operator.apply, operator.in_shape, is_complex=operator.dtype.is_complex)


def _majorant(operator: LinearOperator) -> Tensor:
    return dense_twin(operator.absolute().apply, operator.in_shape)


def _random(operator: LinearOperator, batch: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    dtype = torch.complex128 if operator.dtype.is_complex else torch.float64
    return torch.randn(batch, *shape, dtype=dtype, generator=generator)


def _exact_dot(row: Tensor, sample: Tensor) -> float:
    """The inner product with one rounding at the end: each product is split into two floats without error."""
    products = row * sample
    return math.fsum([*products.tolist(), *_product_errors(row, sample, products).tolist()])


def _product_errors(a: Tensor, b: Tensor, products: Tensor) -> Tensor:
    """What rounding took from each product (Dekker 1971; Veltkamp's splitting)."""
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return ((a_high * b_high - products) + a_high * b_low + a_low * b_high) + a_low * b_low


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    scaled = x * (2.0**27 + 1)
    high = scaled - (scaled - x)
    return high, x - high


def _excess(difference: Tensor, allowed: Tensor) -> float:
    """By how much the largest difference exceeds what is allowed; 0 or less where none does."""
    if not difference.numel():
        return 0.0
    over = difference.abs() - allowed
    return float(difference.abs().flatten()[over.argmax()]) if float(over.max()) > 0 else 0.0


def _require(operator: LinearOperator, holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(f"{type(operator).__name__}: {message}")
