"""The adjoint fixed point: good multipliers without autograd and without a solver."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from opnorm.certificate.network.stages import Chain
from opnorm.network.covariance import Forward, Passed, fixed, forward, per_group, within
from opnorm.network.multipliers.adjoint import adjoint, pulled, squares

_SHARPNESS = (2.0, 8.0, 30.0)
_STEP, _SHRINK, _SHORTEST = 0.8, 0.6, 0.02
_LEAST_GAIN = 1e-5
DIRECTIONS = 10
"""Of the outputs, that the adjoint follows."""


class Pass(Protocol):
    """A pass of the calculus: of one chain, or of the parts of a program."""

    @property
    def multipliers(self) -> list[Tensor]:
        """Those that were used."""

    @property
    def squared(self) -> float:
        """The squared bound."""


AnyPass = TypeVar("AnyPass", bound=Pass)
Move = Callable[[AnyPass, float, float], list[Tensor]]
"""(a pass, sharpness, length of the step) -> the next multipliers."""


def adjoint_fixed_point(
    chain: Chain, begin: Forward, iterations: int = 30, directions: int = DIRECTIONS, margin: float = 1.02
) -> Forward:
    """Lower the bound by `S <- S (|g| / |w|)^a` with backtracking; never returns a worse one.

    With w the adjoint of the top output directions, the derivative of the bound in `S_j` is `|w_j|^2 - |g_j|^2`,
    where `g = (S - B)^-1 A P h`; so at a minimum `|g_j| = |w_j|`. The stages take their steps from the last to the
    first, each with the adjoint of those after it as they are now: that needs a third of the iterations of a step of
    all at once. The soft maximum over output directions sharpens in three steps.
    """
    return descend(
        begin,
        lambda multipliers: forward(chain, fixed(multipliers, margin)),
        lambda best, sharpness, step: moved([chain], [best], directions, sharpness, step),
        iterations,
    )


def descend(begin: AnyPass, run: Callable[[list[Tensor]], AnyPass], move: Move[AnyPass], iterations: int) -> AnyPass:
    """The iteration itself: `run` makes a pass, `move` the next multipliers; where it is stuck, it sharpens."""
    best, step, phase = begin, _STEP, 0
    for done in range(iterations - 1):
        phase = max(phase, done * len(_SHARPNESS) // (iterations - 1))
        if phase == len(_SHARPNESS):
            break
        trial = _tried(run, move, best, _SHARPNESS[phase], step)
        if trial is None or trial.squared >= best.squared:
            step *= _SHRINK
            if step < _SHORTEST:
                phase, step = phase + 1, _STEP
            continue
        phase += trial.squared > (1 - _LEAST_GAIN) * best.squared
        best = trial
    return best


def _tried(
    run: Callable[[list[Tensor]], AnyPass], move: Move[AnyPass], best: AnyPass, sharpness: float, step: float
) -> AnyPass | None:
    try:
        return run(move(best, sharpness, step))
    except LinAlgError:  # multipliers so far apart that S - B is singular in floating point
        return None


def moved(
    chains: Sequence[Chain], passes: Sequence[Forward], directions: int, sharpness: float, step: float
) -> list[Tensor]:
    """Multipliers a step nearer to what each stage's stationarity asks for, over all parts of a program."""
    new: list[Tensor] = []

    def respond(states: Sequence[Passed], ws: Sequence[Tensor], hs: Sequence[Tensor]) -> list[Tensor]:
        stage = states[0].stage
        pulls = [pulled(state, h) for state, h in zip(states, hs, strict=True)]
        gs = [torch.cholesky_solve(pull, state.factor) for state, pull in zip(states, pulls, strict=True)]
        top = torch.stack([squares(g) for g in gs]).sum(0)
        bottom = torch.stack([squares(w[:, stage.free]) for w in ws]).sum(0)
        ratio = _log_ratio(per_group(stage.groups, stage.count, top), per_group(stage.free_groups, stage.count, bottom))
        s = states[0].multiplier * (step * ratio).exp()
        if stage.decoupled:  # g is zero
            new.append(s)
            return gs
        s, factors = _factored(states, s)
        new.append(s)
        return [torch.cholesky_solve(pull, factor) for pull, factor in zip(pulls, factors, strict=True)]

    adjoint(chains, passes, directions, sharpness, respond)
    return new[::-1]


def _factored(states: Sequence[Passed], s: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Cholesky factors of `S - B`, with S scaled up where it is too small."""
    stage = states[0].stage
    tried = [torch.linalg.cholesky_ex(torch.diag(s[stage.groups]).to(state.b.dtype) - state.b) for state in states]
    if not any(bool(info.any()) for _, info in tried):
        return s, [factor for factor, _ in tried]
    s = within(stage, torch.cat([state.b for state in states]), s)
    return s, [torch.linalg.cholesky(torch.diag(s[stage.groups]).to(state.b.dtype) - state.b) for state in states]


def _log_ratio(top: Tensor, bottom: Tensor) -> Tensor:
    """Half the logarithm of the quotient, kept finite."""
    if not top.numel():
        return top
    above, below = top.sqrt(), bottom.sqrt()
    return ((above + 1e-6 * above.max() + 1e-290) / (below + 1e-6 * below.max() + 1e-290)).log()
