"""A forward pass over all frequencies in parts, stage by stage, with multipliers that fit all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opnorm.certificate.network.fourier_chain import Walk
from opnorm.certificate.network.stages import Chain, Collect, Detach, Regrid, Stage, Transition
from opnorm.network.covariance import Chooser, Forward, Passed, hermitian, update


@dataclass(frozen=True, eq=False)
class Lockstep:
    """What a pass over all parts gives.

    Attributes:
        multipliers: shared by all parts.
        squared: the square of the bound that they promise.
        passes: of each part, for the adjoint, where they were kept; stages after the parts are joined are in each.
    """

    multipliers: list[Tensor]
    squared: float
    passes: tuple[Forward, ...] = ()


def lockstep(parts: Sequence[Walk | Chain], choose: Chooser, *, keep: bool = False) -> Lockstep:
    """Run the calculus on the parts of a program in Fourier space.

    Args:
        parts: one walk for each part of the frequencies, so that one stage is held at a time; or chains.
        choose: as in `covariance.forward`; it sees the blocks of all parts.
        keep: whether to keep the passes.
    """
    sources = [part.transitions() for part in parts]
    covers = [torch.eye(p.width, dtype=torch.complex128).expand(p.blocks, p.width, p.width) for p in parts]
    multipliers: list[Tensor] = []
    logs: list[list[Passed | Transition]] = [[] for _ in parts]
    while group := [transition for source in sources if (transition := next(source, None)) is not None]:
        first = group[0]
        states: Sequence[Passed | Transition] = group
        if isinstance(first, Regrid):
            covers = [t.apply(c) for t, c in zip(group, covers, strict=True) if isinstance(t, Regrid)]
        elif isinstance(first, Collect):
            sums = [t.apply(c) for t, c in zip(group, covers, strict=True) if isinstance(t, Collect)]
            covers, sources = [torch.cat(sums).sum(0, keepdim=True)], sources[:1]
        elif isinstance(first, Detach):
            covers, sources = [first.apply(covers[0])], sources[:1]
        else:
            stages = [t for t in group if isinstance(t, Stage)]
            covers, states, s = _stage(stages, covers, choose, len(multipliers), keep=keep)
            multipliers.append(s)
        if keep:
            for i, log in enumerate(logs):
                log.append(states[min(i, len(states) - 1)])
    outs = [part.out.value for part in parts[: len(covers)]]
    grams = [hermitian(out @ cover @ out.mH) for out, cover in zip(outs, covers, strict=True)]
    passes = [Forward(grams[min(i, len(grams) - 1)], tuple(log)) for i, log in enumerate(logs)] if keep else []
    squared = max(0.0, *(float(torch.linalg.eigvalsh(gram)[..., -1].amax()) for gram in grams))
    return Lockstep(multipliers, squared, tuple(passes))


def _stage(
    stages: list[Stage], covers: list[Tensor], choose: Chooser, number: int, *, keep: bool
) -> tuple[list[Tensor], list[Passed], Tensor]:
    halves = [stage.spread.value @ cover for stage, cover in zip(stages, covers, strict=True)]
    blocks = [hermitian(half @ stage.spread.value.mH) for stage, half in zip(stages, halves, strict=True)]
    s = choose(number, stages[0], torch.cat(blocks))
    after, passed = [], []
    for stage, cover, half, b in zip(stages, covers, halves, blocks, strict=True):
        factor = torch.linalg.cholesky(torch.diag(s[stage.groups]).to(b.dtype) - b)
        after.append(update(stage, cover, half, b, s=s, factor=factor))
        if keep:
            passed.append(Passed(stage, cover, b, factor, s))
    return after, passed, s
