"""Multipliers of its own for each pair of outputs: tighter than the differences that one covariance gives."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from opnorm import _rounding as rounding
from opnorm.certificate.network.affine import Rows
from opnorm.certificate.network.proof import prove
from opnorm.certificate.network.stages import Chain
from opnorm.errors import CertificateError
from opnorm.network.covariance import fixed, forward
from opnorm.network.multipliers.afp import adjoint_fixed_point
from opnorm.network.multipliers.newton import applies, newton, seconds_per_step

_AFP_ITERATIONS = 20
_NEWTON_TYPICAL = 30


def each_pair(chain: Chain, multipliers: Sequence[Tensor], joint: Tensor, seconds: float) -> tuple[Tensor, int]:
    """Proved bounds of the difference of each pair of outputs, from a search for each pair.

    Args:
        chain: the stages, with the outputs as its last rows.
        multipliers: to start from.
        joint: the proved bounds of one covariance, shape (n, n); nothing gets worse than these.
        seconds: for all pairs; those that it does not reach keep the joint bound.

    Returns:
        The bounds, shape (n, n), and how many pairs were not reached.
    """
    started = time.monotonic()
    best = joint.clone()
    pairs = [(i, j) for i in range(len(joint)) for j in range(i)]
    for done, (i, j) in enumerate(pairs):
        left = seconds - (time.monotonic() - started)
        if left <= 0:
            return best, len(pairs) - done
        upper = _searched(replace(chain, out=difference(chain.out, i, j)), multipliers, left / (len(pairs) - done))
        best[i, j] = best[j, i] = min(float(best[i, j]), upper)
    return best, 0


def difference(rows: Rows, i: int, j: int) -> Rows:
    """Row i minus row j, with the rounding of the subtraction."""
    value = rows.value[..., i : i + 1, :] - rows.value[..., j : j + 1, :]
    error = value.abs() * (2 * rounding.U)
    if rows.error is not None:
        error = (error + rows.error[..., i : i + 1, :] + rows.error[..., j : j + 1, :]) * (1 + 4 * rounding.U)
    return Rows(value, error)


def _searched(chain: Chain, multipliers: Sequence[Tensor], seconds: float) -> float:
    try:
        with torch.no_grad():
            best = adjoint_fixed_point(chain, forward(chain, fixed(multipliers)), _AFP_ITERATIONS)
            if applies(chain) and _NEWTON_TYPICAL * seconds_per_step(chain) < seconds:
                best = newton(chain, best, seconds=seconds)
        return prove(chain, best.multipliers, pairs_up_to=0).upper
    except (LinAlgError, CertificateError):  # the joint bound stays
        return float("inf")
