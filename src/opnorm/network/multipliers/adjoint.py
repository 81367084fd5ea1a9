"""The adjoint of a pass: how the outputs answer to each stage, from the last one to the first."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opnorm.certificate.network.stages import Chain, Collect, Detach, Regrid, Transition
from opnorm.network.covariance import Forward, Passed

Respond = Callable[[Sequence[Passed], Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]
"""(states of a stage, one for each part; w; h = mean^H w) -> g, all of shape (blocks, rows, directions)."""


def adjoint(
    chains: Sequence[Chain], passes: Sequence[Forward], directions: int, sharpness: float, respond: Respond
) -> None:
    """Go back through the stages with the top output directions; `respond` is asked for g at each choice.

    Args:
        chains: the parts of a program, or the one chain.
        passes: of each.
        directions: how many of each block's outputs to follow.
        sharpness: of their weights, which are 1 for the largest eigenvalue of all.
        respond: takes what it wants, and returns `g = (S - B)^-1 A P h` or what is to stand for it.
    """
    peak = max(result.squared for result in passes)
    joined = len(passes) > 1 and passes[0].output is passes[-1].output
    ends = list(zip(chains, passes, strict=True))[: 1 if joined else None]
    ws = [_outputs(chain, result, directions, sharpness, peak) for chain, result in ends]
    for states in zip(*(reversed(result.passed) for result in passes), strict=True):
        if isinstance(states[0], Passed):
            here = [state for state in states[: len(ws)] if isinstance(state, Passed)]
            # Real, where the blocks end before it.
            ws = [w.to(state.stage.mean.value.dtype) for state, w in zip(here, ws, strict=True)]
            hs = [state.stage.mean.value.mH @ w for state, w in zip(here, ws, strict=True)]
            gs = respond(here, ws, hs)
            ws = [h + state.stage.spread.value.mH @ g for state, h, g in zip(here, hs, gs, strict=True)]
            continue
        if isinstance(states[0], Collect | Detach) and len(ws) < len(states):
            ws = ws * len(states)
        ws = [_back(state, w) for state, w in zip(states, ws, strict=True) if not isinstance(state, Passed)]


def pulled(state: Passed, h: Tensor) -> Tensor:
    """`A P h`."""
    half: Tensor = state.stage.spread.value @ (state.cover @ h)
    return half


def squares(rows: Tensor) -> Tensor:
    """The sum of the squares of each row over blocks and directions."""
    return rows.abs().square().sum((0, 2))


def _outputs(chain: Chain, result: Forward, directions: int, sharpness: float, peak: float) -> Tensor:
    values, vectors = torch.linalg.eigh(result.output)
    count = min(directions, values.shape[-1])
    weight = torch.exp(sharpness * (values[..., -count:] / max(peak, 1e-300) - 1)).sqrt()
    w: Tensor = chain.out.value.mH @ (vectors[..., -count:] * weight[:, None, :])
    return w


def _back(transition: Transition, w: Tensor) -> Tensor:
    if isinstance(transition, Collect):
        value = transition.rows.value
        return value.mH @ w.to(value.dtype) * transition.weights.sqrt()[:, None, None]
    if isinstance(transition, Regrid):
        return _spread_back(transition, w)
    return w


def _spread_back(regrid: Regrid, w: Tensor) -> Tensor:
    """The sensitivities of the aliases, each at its own block of the finer grid."""
    new, aliases = regrid.blocks.shape
    parts = w.reshape(new, aliases, -1, w.shape[-1])
    parts = torch.where(regrid.conjugate[..., None, None], parts.conj(), parts)
    fine = parts.new_zeros(int(regrid.blocks.max()) + 1, *parts.shape[2:])
    return fine.index_put((regrid.blocks.reshape(-1),), parts.flatten(0, 1), accumulate=False)
