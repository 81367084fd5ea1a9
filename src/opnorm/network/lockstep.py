"""A forward pass over all frequencies, stage by stage, that holds one stage at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from opnorm.certificate.network.fourier_chain import Walk
from opnorm.certificate.network.stages import Collect, Detach, Regrid, Stage
from opnorm.network.covariance import Chooser, largest_eigenvalue, update


def lockstep(walks: Sequence[Walk], choose: Chooser) -> tuple[list[Tensor], float]:
    """Run the calculus on the parts of a program, with multipliers that fit all of them.

    Args:
        walks: one for each part of the frequencies.
        choose: as in `covariance.forward`; it sees the blocks of all parts.

    Returns:
        The multipliers, and the bound that they promise.
    """
    sources = [walk.transitions() for walk in walks]
    covers = [torch.eye(w.width, dtype=torch.complex128).expand(w.blocks, w.width, w.width) for w in walks]
    multipliers: list[Tensor] = []
    while group := [transition for source in sources if (transition := next(source, None)) is not None]:
        first = group[0]
        if isinstance(first, Regrid):
            covers = [t.apply(c) for t, c in zip(group, covers, strict=True) if isinstance(t, Regrid)]
        elif isinstance(first, Collect):
            parts = [t.apply(c) for t, c in zip(group, covers, strict=True) if isinstance(t, Collect)]
            covers, sources = [torch.cat(parts).sum(0, keepdim=True)], sources[:1]
        elif isinstance(first, Detach):
            covers, sources = [first.apply(covers[0])], sources[:1]
        else:
            stages = [t for t in group if isinstance(t, Stage)]
            covers, s = _stage(stages, covers, choose, len(multipliers))
            multipliers.append(s)
    outs = [walk.out.value for walk in walks[: len(covers)]]
    gram = torch.cat([_hermitian(out @ cover @ out.mH) for out, cover in zip(outs, covers, strict=True)])
    return multipliers, max(0.0, float(largest_eigenvalue(gram))) ** 0.5


def _stage(stages: list[Stage], covers: list[Tensor], choose: Chooser, number: int) -> tuple[list[Tensor], Tensor]:
    halves = [stage.spread.value @ cover for stage, cover in zip(stages, covers, strict=True)]
    blocks = [_hermitian(half @ stage.spread.value.mH) for stage, half in zip(stages, halves, strict=True)]
    s = choose(number, stages[0], torch.cat(blocks))
    for i, stage in enumerate(stages):
        b = blocks[i]
        factor = torch.linalg.cholesky(torch.diag(s[stage.groups]).to(b.dtype) - b)
        covers[i] = update(stage, covers[i], halves[i], b, s=s, factor=factor)
    return covers, s


def _hermitian(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mH) / 2
