"""The proof in floating point: each stage of a chain by one Cholesky factorisation per block.

Lemma. Let z be covered by P, `y = read z` with slopes in [m - r, m + r], S > 0 diagonal (a multiple of the identity
where the function is opaque). If, with R the rows of `(keep z, m y)` above those of `r y`,

    blkdiag(P' - S on v's free part, S)  -  R P R^H  >=  0,

then the new base (keep z, v) is covered by P'. (The Schur complement of S - r Q r is the update of the calculus; for
an opaque function m = 0 and S = s I.) The docs give the derivation from the S-procedure.

Every stage starts from the exactly stored P' of the one before, so rounding errors do not compound.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.affine import Rows, stacked
from opnorm.certificate.network.stages import Chain, Collect, Detach, Regrid, Stage, Transition
from opnorm.certificate.posdef import eigenvalue_floor, require_ieee_arithmetic
from opnorm.errors import CertificateError

Progress = Callable[[int, int, str], None]

_FIRST_INFLATION = 1e-10
_LAST_INFLATION = 1e-3


@dataclass(frozen=True, eq=False)
class Proof:
    """What was proved of a chain.

    Attributes:
        upper: of the Lipschitz constant.
        pairwise: upper bounds for the difference of each pair of outputs, shape (n, n); None for many outputs.
        coordinates: upper bounds of each output's own constant, shape (n,).
    """

    upper: float
    pairwise: Tensor | None
    coordinates: Tensor


def prove(
    chain: Chain | Iterable[Chain],
    multipliers: Sequence[Tensor],
    pairs_up_to: int = 1024,
    progress: Progress | None = None,
) -> Proof:
    """Prove a bound from any positive multipliers, one tensor for each stage.

    Args:
        chain: the stages; or those of each part of the frequencies, one after the other, for less memory.
        multipliers: shared by all parts.
        pairs_up_to: how many outputs there may be for pairwise bounds.
        progress: called before each stage with the number of those before it, of those of its part, and its name.

    Raises:
        CertificateError: if a stage cannot be proved, such as for multipliers that are too small.
    """
    require_ieee_arithmetic()
    sums: list[tuple[Tensor, Tensor]] = []
    proofs: list[Proof] = []
    queue: list[Tensor] = []
    for chain_of_part in [chain] if isinstance(chain, Chain) else chain:
        whole, cover, queue = chain_of_part, start(chain_of_part), list(multipliers)
        if len(queue) != len(whole.choices):
            raise CertificateError(f"the network has {len(whole.choices)} non-linear steps, not {len(queue)}")
        cover, rest = _passed(cover, list(whole.stages), queue, progress)
        if rest and isinstance(rest[0], Collect):
            sums.append(summand(cover, rest[0]))
        elif not rest:
            proofs.append(conclude(cover, whole.out, pairs_up_to))
        elif isinstance(rest[0], Detach):
            cover = rest[0].apply(cover)  # every part leaves the same
    if proofs:
        return proofs[0] if len(proofs) == 1 else _largest_of(proofs)
    if sums:
        cover = collected(sums)
    cover, _ = _passed(cover, rest[1:], queue)
    return conclude(cover, whole.out, pairs_up_to)


def _passed(
    cover: Tensor, stages: list[Transition], queue: list[Tensor], progress: Progress | None = None
) -> tuple[Tensor, list[Transition]]:
    """The cover before the stage that joins the blocks, and the stages from that one on; takes from the queue."""
    for number, stage in enumerate(stages):
        if progress is not None:
            progress(number, len(stages), f"proving stage {number + 1}")
        if isinstance(stage, Stage):
            cover = advance(cover, stage, queue.pop(0))
        elif isinstance(stage, Regrid):
            cover = stage.apply(cover)
        else:
            return cover, stages[number:]
    return cover, []


def _largest_of(proofs: list[Proof]) -> Proof:
    """The bounds that hold for the direct sum of the parts."""
    coordinates = torch.stack([proof.coordinates for proof in proofs]).amax(0)
    return Proof(max(proof.upper for proof in proofs), None, coordinates)


def start(chain: Chain) -> Tensor:
    """The cover of the inputs: the identity."""
    return torch.eye(chain.width, dtype=chain.dtype).expand(chain.blocks, chain.width, chain.width)


def summand(cover: Tensor, stage: Collect) -> tuple[Tensor, Tensor]:
    """What some of the frequencies add to the cover of a sum over all of them, and a bound of its error."""
    gram, error = sandwich(stage.rows, cover)
    weights = stage.weights[:, None, None]
    doubt = (weights * (error + gram.abs() * rounding.gamma(len(gram) + 4))).sum(0, keepdim=True)
    return (weights * gram.real).sum(0, keepdim=True), doubt * (1 + rounding.gamma(2 * len(gram)))


def collected(sums: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A proved cover of a sum over the frequencies: what was computed, and the norm of its error on the diagonal."""
    total = torch.cat([value for value, _ in sums]).sum(0, keepdim=True)
    total = (total + total.mT) / 2
    added = torch.cat([value.abs() for value, _ in sums]).sum(0, keepdim=True) * rounding.gamma(len(sums) + 4)
    doubt = torch.cat([error for _, error in sums]).sum(0, keepdim=True) + added
    radius = doubt.sum(-1).amax() * (1 + rounding.gamma(2 * len(sums) + 2 * doubt.shape[-1] + 8))
    size = total.abs().amax()
    return total + torch.eye(total.shape[-1], dtype=torch.float64) * (radius + 4 * rounding.U * (size + radius))


def advance(cover: Tensor, stage: Stage, multiplier: Tensor) -> Tensor:
    """The proved cover after a stage.

    Raises:
        CertificateError: if no cover within the last inflation can be proved.
    """
    s = checked(stage, multiplier)
    if stage.decoupled:
        return _decoupled(cover, stage, s)
    gram, error = _stage_gram(stage, cover)
    candidate = _candidate(gram, stage, s)
    if candidate is not None:
        inflation = _FIRST_INFLATION
        while inflation <= _LAST_INFLATION:
            inflated = _inflated(candidate, inflation)
            if _holds(inflated, stage, s, gram, error):
                return inflated
            inflation *= 10
    raise CertificateError(f"step {stage.step} could not be proved: its multipliers are too small")


def _stage_gram(stage: Stage, cover: Tensor) -> tuple[Tensor, Tensor]:
    """`R P R^H` for the rows R of `mean` above those of `spread`, with the products that repeat taken once."""
    selected = stage.selected
    if selected is None:
        return sandwich(stacked([stage.mean, stage.spread]), cover)
    b, doubt = sandwich(stage.spread, cover)
    half, across = half_product(stage.spread, cover)
    half, across = half[:, :, selected], across[:, :, selected]
    kept = cover[:, selected][:, :, selected]
    nothing = torch.zeros_like(kept.abs())
    gram = _bordered(kept, half, b)
    return gram, _bordered(nothing, across, doubt)


def _bordered(corner: Tensor, side: Tensor, block: Tensor) -> Tensor:
    """The matrix of `(kept, v, v again)`: v's block stands four times."""
    row = torch.cat([side, block, block], -1)
    top = torch.cat([corner, side.mH, side.mH], -1)
    return torch.cat([top, row, row], -2)


def half_product(rows: Rows, cover: Tensor) -> tuple[Tensor, Tensor]:
    """`R P` in floating point, and a bound of the distance of each entry from the exact one."""
    value = rows.value
    inner = value.shape[-1]
    constant = 3 * rounding.gamma(4 * inner + 16) if value.is_complex() else rounding.gamma(2 * inner + 8)
    weight = cover.abs()
    error = (value.abs() @ weight) * constant
    if rows.error is not None:
        error = error + rows.error @ weight
    return value @ cover, error * (1 + 4 * rounding.gamma(2 * inner + 16)) + rounding.TINY * (inner + 1)


def _decoupled(cover: Tensor, stage: Stage, s: Tensor) -> Tensor:
    """A stage that leaves nothing linear: `S >= R P R^H` is all there is to prove, and the new cover is exact.

    Raises:
        CertificateError: if it cannot be proved.
    """
    gram, error = sandwich(stage.spread, cover)
    root = s.sqrt()
    scale = (torch.frexp(root)[0] / root)[stage.groups]
    joint = scale[:, None] * scale[None]
    if (
        not stage.count
        or largest_eigenvalue(
            gram * joint - torch.diag(s[stage.groups]) * joint + torch.eye(len(scale), dtype=torch.float64),
            error * joint + 4 * rounding.U * (gram.abs() * joint + 4 * torch.eye(len(scale), dtype=torch.float64)),
        )
        <= 1.0
    ):
        free = torch.diag(stage.free_diagonal(s)).to(cover.dtype)
        return free.expand(max(len(cover), len(gram)), -1, -1)
    raise CertificateError(f"step {stage.step} could not be proved: its multipliers are too small")


def conclude(cover: Tensor, out: Rows, pairs_up_to: int) -> Proof:
    """Bounds of the outputs from the last cover."""
    gram, error = sandwich(out, cover)
    diagonal = gram.diagonal(dim1=-2, dim2=-1).real
    spread = error.diagonal(dim1=-2, dim2=-1)
    coordinates = ((diagonal + spread) * (1 + 4 * rounding.U)).amax(0).clamp_min(0).sqrt() * (1 + 4 * rounding.U)
    pairwise = None
    if gram.shape[0] == 1 and gram.shape[-1] <= pairs_up_to:
        variance = diagonal[0][:, None] + diagonal[0][None] - 2 * gram[0].real
        doubt = spread[0][:, None] + spread[0][None] + 2 * error[0]
        size = diagonal[0].abs()[:, None] + diagonal[0].abs()[None] + 2 * gram[0].abs()
        above = variance + doubt * (1 + 8 * rounding.U) + 8 * rounding.U * size
        pairwise = (above.clamp_min(0) * (1 + 4 * rounding.U)).sqrt() * (1 + 4 * rounding.U)
        pairwise.fill_diagonal_(0.0)
    return Proof(rounding.sqrt_up(largest_eigenvalue(gram, error)), pairwise, coordinates)


def largest_eigenvalue(gram: Tensor, error: Tensor) -> float:
    """A proved upper bound of the largest eigenvalue of all Hermitian matrices within `error` of `gram`.

    Raises:
        CertificateError: if the matrix is not finite.
    """
    if not bool(torch.isfinite(gram).all() and torch.isfinite(error).all()):
        raise CertificateError("the covariance is not finite")
    scale = float(gram.abs().sum(-1).amax())
    if scale == 0.0:
        return float(error.sum(-1).amax()) * (1 + rounding.gamma(gram.shape[-1] + 2))
    unit = math.ldexp(1.0, math.frexp(scale)[1] - 1)
    gram, error = gram / unit, error / unit
    top = float(torch.linalg.eigvalsh(gram)[..., -1].amax())
    doubt = float(error.sum(-1).amax()) * (1 + rounding.gamma(gram.shape[-1] + 2))
    identity = torch.eye(gram.shape[-1], dtype=torch.float64)
    margin = 1e-14
    while margin < 1.0:
        target = rounding.up(top + margin)
        shifted = target * identity - gram
        floor = float(eigenvalue_floor(shifted).amin())
        if floor > -float("inf"):
            # Each entry of the difference was rounded once.
            rounded = 2 * rounding.U * float(shifted.abs().sum(-1).amax())
            return rounding.mul_up(rounding.add_up(target, max(-floor, 0.0), rounded, doubt), unit)
        margin *= 4
    raise CertificateError("the largest eigenvalue of the last covariance could not be proved")


def sandwich(rows: Rows, cover: Tensor) -> tuple[Tensor, Tensor]:
    """`R P R^H` in floating point, exactly Hermitian, and a bound of the distance of each entry from the exact one."""
    value = rows.value
    if value.shape[-1] == value.shape[-2] and rows.error is None and _is_identity(value):
        return cover, torch.zeros_like(cover.abs())
    product = value @ cover @ value.mH
    gram = (product + product.mH) / 2
    inner = value.shape[-1]
    # Complex: each part of an entry is a sum of twice as many real products; sqrt 2 joins the parts, 2 to spare.
    constant = 3 * rounding.gamma(4 * inner + 16) if value.is_complex() else rounding.gamma(2 * inner + 8)
    size, weight = value.abs(), cover.abs()
    half = size @ weight
    error = (half @ size.mT) * constant
    if rows.error is not None:
        outer = (rows.error @ weight) @ (size + rows.error).mT
        error = error + outer + outer.mT
    error = (error + error.mT) * (0.5 * (1 + 4 * rounding.gamma(2 * inner + 16))) + rounding.TINY * (inner + 1) ** 2
    return gram, error


def checked(stage: Stage, multiplier: Tensor) -> Tensor:
    """The multipliers in float64.

    Raises:
        CertificateError: if they do not fit or are not positive.
    """
    s = multiplier.detach().to(torch.float64).reshape(-1)
    if s.numel() != stage.count or not bool(((s > 0) & torch.isfinite(s)).all()):
        raise CertificateError(f"step {stage.step} needs {stage.count} positive multipliers")
    return s


def _candidate(gram: Tensor, stage: Stage, s: Tensor) -> Tensor | None:
    """The update in floating point, without any claim."""
    p = stage.mean.height
    cover = gram[:, :p, :p] + torch.diag(stage.free_diagonal(s)).to(gram.dtype)
    if stage.spread.height:
        factor, info = torch.linalg.cholesky_ex(torch.diag(s[stage.groups]) - gram[:, p:, p:])
        if bool((info != 0).any()):
            return None
        half = torch.linalg.solve_triangular(factor, gram[:, p:, :p], upper=False)
        cover = cover + half.mH @ half
    return (cover + cover.mH) / 2 if bool(torch.isfinite(cover).all()) else None


def _inflated(cover: Tensor, inflation: float) -> Tensor:
    """A slightly larger Hermitian matrix: the diagonal grows by a relative amount, and a little everywhere."""
    diagonal = cover.diagonal(dim1=-2, dim2=-1).real
    floor = diagonal.amax(-1, keepdim=True) * 1e-3 + rounding.TINY
    return cover * (1 + inflation) + torch.diag_embed((diagonal + floor) * inflation)


def _holds(cover: Tensor, stage: Stage, s: Tensor, gram: Tensor, error: Tensor) -> bool:
    """Prove `blkdiag(P' - S_v, S) - R P R^H >= 0` for every R P R^H within `error` of `gram`."""
    p, k = stage.mean.height, stage.spread.height
    block = torch.zeros_like(gram)
    block[:, :p, :p] = cover
    block[:, range(p, p + k), range(p, p + k)] = s[stage.groups].to(block.dtype)
    diagonal = block.diagonal(dim1=-2, dim2=-1).real
    # Powers of two near 1/sqrt(diagonal): an exact congruence that brings every entry to the order of one.
    root = diagonal.clamp_min(rounding.TINY).sqrt()
    scale = torch.frexp(root)[0] / root  # mantissa over number: a power of two, and the division is exact
    joint = scale[:, :, None] * scale[:, None, :]
    free = torch.zeros_like(diagonal[0])
    free[:p] = stage.free_diagonal(s)
    difference = (block - torch.diag(free) - gram) * joint
    # Two roundings for each entry of the difference, on terms no larger than these.
    rounded = (block.abs() + torch.diag(free) + gram.abs()) * joint * (4 * rounding.U)
    spread = (error * joint + rounded).sum(-1).amax(-1) * (1 + rounding.gamma(2 * (p + k) + 8))
    size = p + k
    shift = spread * (1 + 1e-3) + rounding.gamma(3 * size + 16) * 4 * difference.diagonal(
        dim1=-2, dim2=-1
    ).real.abs().sum(-1)
    shifted = difference - shift[:, None, None] * torch.eye(size, dtype=torch.float64)
    lost = 4 * rounding.U * (shift + difference.diagonal(dim1=-2, dim2=-1).real.abs().amax(-1))
    return bool((eigenvalue_floor(shifted) + shift * (1 - 4 * rounding.U) - spread - lost >= 0).all())


def _is_identity(value: Tensor) -> bool:
    return bool((value == torch.eye(value.shape[-1], dtype=value.dtype)).all())
