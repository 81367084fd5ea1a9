"""Which algorithm encloses an operator's norm, why, and at what cost."""

import math
from dataclasses import dataclass

from opnorm._enclosure import Guarantee
from opnorm.errors import ArgumentError, InputShapeError
from opnorm.norms.banded import banded_cost, banded_fits
from opnorm.norms.fourier import torus_flops
from opnorm.norms.memory import require_memory
from opnorm.norms.probable import steps_needed
from opnorm.norms.size_free import size_free_flops
from opnorm.norms.structured import STRUCTURED
from opnorm.operators import Conv, ConvTranspose, Dense, LinearOperator, Scaled

METHODS: dict[str, str] = {
    "dense": "one Gram matrix and one Cholesky factorisation; exact for every geometry, for what fits memory",
    "torus": "a convolution at its input size by its Fourier symbol; exact for circular padding, else slightly loose",
    "size-free": "a convolution at every input size by the supremum of its symbol",
    "banded": "a convolution at its input size by a factorisation over image rows; tight, on request",
    "structured": "read off the structure: diagonal, permutation, separable and composed maps",
    "lanczos": "Krylov space from a random start; needs applications only, `probable` or `estimate`",
}
DENSE_LIMIT = 4096
"""Up to this many inputs or outputs an operator without structure is proved by its own matrix."""
_AFFORDABLE = 6e10
"""Flops, about a second, that "auto" spends on a convolution to be tighter than its symbol."""
_LOOSE = 1e-3
"""A target from which on the symbol of a convolution may do alone."""


@dataclass(frozen=True)
class Plan:
    """What `opnorm.norm` would do.

    Attributes:
        method: a key of `METHODS`; several joined by `+` are tried in turn until the gap is met.
        reason: why, in a sentence.
        flops: about how many floating-point operations it takes.
        bytes: about how much memory.
    """

    method: str
    reason: str
    flops: float
    bytes: float

    def __str__(self) -> str:
        """One line for people."""
        return f"{self.method}: {self.reason} (about {self.flops:.1e} flops, {self.bytes / 2**20:.0f} MiB)"


def select(
    operator: LinearOperator, *, rtol: float = 1e-6, guarantee: Guarantee = "proved", method: str = "auto"
) -> Plan:
    """Say which algorithm would enclose the spectral norm of an operator, why and at what cost. Nothing is computed.

    Args:
        operator: of `opnorm.operators`, or `opnorm.layers.to_operator(module, input_shape)`.
        rtol: target for the gap.
        guarantee: what is asked for.
        method: "auto", or a key of `METHODS`.

    Raises:
        ArgumentError: if the method is unknown, or does not fit the operator or the guarantee.
        TooLargeError: if no proved method fits; the message names the guarantee that does.

    Example:
        >>> import torch
        >>> from opnorm.norms import select
        >>> from opnorm.operators import Dense
        >>> select(Dense(torch.ones(10, 20))).method
        'dense'
    """
    check_guarantee(guarantee)
    if method != "auto" and method not in METHODS:
        raise ArgumentError(f"method={method!r}: it is 'auto', {', '.join(map(repr, METHODS))}")
    if method == "lanczos" and guarantee == "proved":
        raise ArgumentError("method='lanczos' proves no upper end; ask for guarantee='probable' or 'estimate'")
    if method != "auto":
        return _plan(operator, method, "asked for", rtol)
    inner = operator.operator if isinstance(operator, Scaled) else operator
    if isinstance(inner, Conv | ConvTranspose) and inner.spatial is None:
        return _plan(inner, "size-free", "no input size was given", rtol)
    if isinstance(operator, STRUCTURED):
        return _plan(operator, "structured", "its norm can be read off its structure", rtol)
    if guarantee != "proved":
        return _plan(operator, "lanczos", f"{guarantee} asks for applications only", rtol)
    if isinstance(operator, Conv | ConvTranspose):
        return _for_convolution(operator, rtol)
    plan = _plan(operator, "dense", "one factorisation proves it", rtol)
    require_memory(plan.bytes, "a proof")
    return plan


def check_guarantee(guarantee: str) -> None:
    """Refuse what is no guarantee.

    Raises:
        ArgumentError: if it is none of the three.
    """
    if guarantee not in {"proved", "probable", "estimate"}:
        raise ArgumentError(f"guarantee={guarantee!r}: it is 'proved', 'probable' or 'estimate'")


def _for_convolution(operator: Conv | ConvTranspose, rtol: float) -> Plan:
    conv = operator.conv if isinstance(operator, ConvTranspose) else operator
    if conv.mode == "circular" and all(
        sum(pair) == reach and n % s == 0
        for pair, reach, n, s in zip(conv.padding, conv.reach, conv.sizes, conv.stride, strict=True)
    ):
        return _plan(operator, "torus", "circular padding makes the symbol exact", rtol)
    side = min(operator.in_size, operator.out_size) // conv.groups
    tight = _plan(operator, "dense", "its own matrix is exact", rtol)
    if banded_fits(operator):
        banded = _plan(operator, "banded", "a factorisation over image rows is exact", rtol)
        tight = banded if banded.flops < tight.flops else tight
    if side > DENSE_LIMIT and tight.flops > _AFFORDABLE:
        reason = f"{side} unknowns a group take too long for a tight proof; method='{tight.method}' makes it"
        return _plan(operator, "torus", reason, rtol)
    if rtol >= _LOOSE:
        return _plan(operator, f"torus+{tight.method}", f"the symbol first; if that is loose, {tight.reason}", rtol)
    return tight


def _plan(operator: LinearOperator, method: str, reason: str, rtol: float) -> Plan:
    flops, memory = 0.0, 0.0
    for part in method.split("+"):
        more, held = _cost(operator, part, rtol)
        flops, memory = flops + more, max(memory, held)
    return Plan(method, reason, flops, memory)


def _cost(operator: LinearOperator, method: str, rtol: float) -> tuple[float, float]:
    """About the flops and the bytes of one method, or a refusal where it does not fit the operator."""
    if method in {"torus", "size-free", "banded"}:
        if not isinstance(operator, Conv | ConvTranspose):
            raise ArgumentError(f"method={method!r} is for convolutions, not for {type(operator).__name__}")
        if method == "banded":
            return banded_cost(operator)
        return torus_flops(operator) if method == "torus" else size_free_flops(operator), 2.0**27
    if method == "structured":
        if not isinstance(operator, STRUCTURED):
            raise ArgumentError(f"method='structured' does not know {type(operator).__name__}")
        try:
            length = float(operator.in_size + operator.out_size)
        except InputShapeError:  # it stands for every input size
            length = 1.0
        return length, 8.0 * length
    rows, columns = operator.out_size, operator.in_size
    if method == "lanczos":
        steps = min(steps_needed(min(rows, columns), rtol, 1e-12), rows, columns)
        return 4.0 * steps * operator.terms * rows, 8.0 * min(rows, columns) * (steps + 8)
    groups = operator.conv.groups if isinstance(operator, ConvTranspose) else getattr(operator, "groups", 1)
    rows, columns = rows // groups, columns // groups
    side, length = min(rows, columns), max(rows, columns)
    held = 8.0 * rows * columns * (2 if isinstance(operator, Dense) else 5) + 24.0 * side * side
    return groups * (side * side * float(length) + math.pow(side, 3) / 3), held
