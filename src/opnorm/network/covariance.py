"""The covariance calculus in plain floating point: what the search for multipliers evaluates. Claims nothing.

The formulas are those of `certificate.network.proof`; see there and `docs/guides/network.md` for the mathematics.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opnorm.certificate.network.stages import Chain, Stage, Transition

Chooser = Callable[[int, Stage, Tensor], Tensor]
"""(number of the choice, stage, B = radius Q radius) -> the multipliers, one for each group of rows."""


@dataclass(frozen=True, eq=False)
class Passed:
    """What the forward pass leaves at one stage for the adjoint.

    Attributes:
        stage: the stage.
        cover: of the base before it.
        b: `radius Q radius`, shape (blocks, k, k).
        factor: Cholesky factor of `S - B`.
        multiplier: one for each group of rows.
    """

    stage: Stage
    cover: Tensor
    b: Tensor
    factor: Tensor
    multiplier: Tensor


@dataclass(frozen=True, eq=False)
class Forward:
    """A forward pass: the covariance of the outputs and the state at each stage."""

    output: Tensor  # shape: (blocks, n_out, n_out)
    passed: tuple[Passed | Transition, ...]

    @property
    def choices(self) -> list[Passed]:
        """The state at the stages that have multipliers."""
        return [p for p in self.passed if isinstance(p, Passed)]

    @property
    def multipliers(self) -> list[Tensor]:
        """The multipliers that were used."""
        return [p.multiplier for p in self.choices]

    @cached_property
    def squared(self) -> float:
        """The squared bound; infinite where numbers overflowed."""
        value = float(torch.linalg.eigvalsh(self.output.detach())[..., -1].amax())
        return value if math.isfinite(value) else math.inf


def forward(chain: Chain, choose: Chooser, *, slim: bool = False) -> Forward:
    """Run the calculus with the multipliers that `choose` returns, each feasible (S > B).

    With `slim`, only the multipliers are kept of each stage: enough for a proof, not for the adjoint.
    """
    cover = torch.eye(chain.width, dtype=chain.dtype).expand(chain.blocks, chain.width, chain.width)
    passed: list[Passed | Transition] = []
    number = 0
    for stage in chain.stages:
        if not isinstance(stage, Stage):
            passed.append(stage)
            cover = stage.apply(cover)
            continue
        spread = stage.spread.value
        # The inputs' cover is the identity.
        half = spread @ cover if passed else spread.expand(len(cover), -1, -1)
        b = hermitian(half @ spread.mH)
        s = choose(number, stage, b)
        factor = torch.linalg.cholesky(torch.diag(s[stage.groups]).to(b.dtype) - b)
        passed.append(Passed(stage, cover[:0], b[:0], factor[:0], s) if slim else Passed(stage, cover, b, factor, s))
        cover = update(stage, cover, half, b, s=s, factor=factor)
        number += 1
    out = chain.out.value
    return Forward(hermitian(out @ cover @ out.mH), tuple(passed))


def update(stage: Stage, cover: Tensor, half: Tensor, b: Tensor, *, s: Tensor, factor: Tensor) -> Tensor:
    """The cover after a stage: `Z P Z^H + Z P A^H (S - B)^-1 A P Z^H + S` on the free part."""
    mean = stage.mean.value
    free = torch.diag(stage.free_diagonal(s)).to(cover.dtype)
    if stage.decoupled:
        return free.expand(cover.shape[0], -1, -1)
    selected = stage.selected
    if selected is None:
        kept, across = hermitian(mean @ cover @ mean.mH), half @ mean.mH
    elif len(selected) == 0:
        kept, across = b, b
    else:
        beside = half[:, :, selected]
        across = torch.cat([beside, b], -1)
        kept = torch.cat([torch.cat([cover[:, selected][:, :, selected], beside.mH], -1), across], -2)
    lifted = torch.linalg.solve_triangular(factor, across, upper=False)
    return kept + hermitian(lifted.mH @ lifted) + free


def ratio(stage: Stage, b: Tensor, s: Tensor) -> Tensor:
    """The largest eigenvalue of `S^-1/2 B S^-1/2` over all blocks: below 1 where S is feasible."""
    if not s.numel():
        return torch.zeros((), dtype=s.dtype)
    root = s.rsqrt()[stage.groups].to(b.dtype)
    return largest_eigenvalue(root[:, None] * b * root[None])


def largest_eigenvalue(matrix: Tensor) -> Tensor:
    """The largest over the blocks, differentiable through the eigenvector of the largest."""
    with torch.no_grad():
        if not matrix.requires_grad:
            largest: Tensor = torch.linalg.eigvalsh(matrix.detach())[..., -1].amax()
            return largest
        values, vectors = torch.linalg.eigh(matrix.detach())
        block = int(values[..., -1].argmax())
        top = vectors[block, :, -1]
    value: Tensor = (top.conj() @ (matrix[block] @ top)).real
    return value


def bound_squared(result: Forward) -> Tensor:
    """The squared Lipschitz bound of a forward pass."""
    return largest_eigenvalue(result.output)


def within(stage: Stage, b: Tensor, s: Tensor, margin: float = 1.02) -> Tensor:
    """The multipliers scaled up, where that is needed, to `S >= margin * rho * S0`.

    Where nothing of the new base is linear in the old one, the smallest feasible size is the best.
    """
    if stage.decoupled:
        return (s * ratio(stage, b, s) * (1 + 1e-7)).clamp_min(1e-280)
    return s * torch.clamp(ratio(stage, b, s) * margin, min=1.0)


def per_group(groups: Tensor, count: int, rows: Tensor) -> Tensor:
    """Sums of a value per row over each group, shape (rows,) -> (count,)."""
    return torch.zeros(count, dtype=rows.dtype).index_add(0, groups, rows)


def fixed(multipliers: Sequence[Tensor], margin: float = 1.02) -> Chooser:
    """A chooser that takes given multipliers, scaled to feasibility."""
    return lambda number, stage, b: within(stage, b, multipliers[number], margin)


def given(multipliers: Sequence[Tensor]) -> Chooser:
    """A chooser that takes given feasible multipliers as they are."""
    return lambda number, stage, b: multipliers[number]


def hermitian(matrix: Tensor) -> Tensor:
    """Half the sum with the conjugate transpose, in the form that takes the fewest passes over complex memory."""
    return (matrix + matrix.mT.conj_physical()) * 0.5
