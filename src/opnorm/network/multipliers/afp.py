"""The adjoint fixed point: good multipliers without autograd and without a solver."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from opnorm.certificate.network.stages import Chain, Collect, Regrid
from opnorm.network.covariance import Forward, Passed, fixed, forward, per_group

_SHARPNESS = (2.0, 8.0, 30.0)


class Pass(Protocol):
    """A pass of the calculus: of one chain, or of the parts of a program."""

    @property
    def multipliers(self) -> list[Tensor]:
        """Those that were used."""

    @property
    def squared(self) -> float:
        """The squared bound."""


AnyPass = TypeVar("AnyPass", bound=Pass)


def adjoint_fixed_point(
    chain: Chain, begin: Forward, iterations: int = 30, directions: int = 10, margin: float = 1.02
) -> Forward:
    """Lower the bound by `log S <- (1 - a) log S + a log target` with backtracking; never returns a worse one.

    With w the adjoint of the top output directions, the derivative of the bound in `S_j` is `|w_j|^2 - |g_j|^2`,
    where `g = (S - B)^-1 A P h`; so at a minimum `|g_j| = |w_j|`, and the target is `S_j |g_j| / |w_j|`.
    The soft maximum over output directions sharpens in three steps.
    """
    return descend(
        begin,
        lambda multipliers: forward(chain, fixed(multipliers, margin)),
        lambda best, sharpness: targets([chain], [best], directions, sharpness),
        iterations,
    )


def descend(
    begin: AnyPass,
    run: Callable[[list[Tensor]], AnyPass],
    aim: Callable[[AnyPass, float], list[Tensor]],
    iterations: int,
) -> AnyPass:
    """The iteration itself: `run` makes a pass, `aim` gives the logarithms of its targets at a sharpness."""
    best = begin
    done = 0
    for phase, sharpness in enumerate(_SHARPNESS):
        aims = aim(best, sharpness)
        step, first = 0.5, done
        budget = max(6, iterations * (phase + 1) // len(_SHARPNESS) - first)
        while done < iterations - 1 and done - first < budget:
            current = [s.log() for s in best.multipliers]
            trial = _tried(run, [((1 - step) * c + step * t).exp() for c, t in zip(current, aims, strict=True)])
            done += 1
            gain = 1.0
            if trial is not None and trial.squared < best.squared:
                gain = 1 - trial.squared / best.squared
                best = trial
                aims = aim(best, sharpness)
                step = min(1.3 * step, 0.9)
            else:
                step *= 0.4
            if step < 2e-2 or gain < 1e-5:
                break
    return best


def _tried(run: Callable[[list[Tensor]], AnyPass], multipliers: list[Tensor]) -> AnyPass | None:
    try:
        return run(multipliers)
    except LinAlgError:  # multipliers so far apart that S - B is singular in floating point
        return None


def targets(chains: Sequence[Chain], passes: Sequence[Forward], directions: int, sharpness: float) -> list[Tensor]:
    """The logarithm of the multipliers that each stage's stationarity asks for, over all parts of a program."""
    peak = max(result.squared for result in passes)
    pulled: list[Tensor] = []
    pushed: list[Tensor] = []
    for chain, result in zip(chains, passes, strict=True):
        sides = adjoint(chain, result, directions, sharpness, peak)
        energies = [_energies(passed, g, w) for passed, (g, w) in zip(result.choices, sides, strict=True)]
        pulled = added(pulled, [top for top, _ in energies])
        pushed = added(pushed, [bottom for _, bottom in energies])
    multipliers = passes[0].multipliers
    return [s.log() + _log_ratio(g, w) for s, g, w in zip(multipliers, pulled, pushed, strict=True)]


def added(one: list[Tensor], two: list[Tensor]) -> list[Tensor]:
    """Sums, where nothing counts as zeros."""
    return [a + b for a, b in zip(one, two, strict=True)] if one else two


def adjoint(
    chain: Chain, result: Forward, directions: int, sharpness: float, peak: float
) -> list[tuple[Tensor, Tensor]]:
    """For each choice the rows g and w, shape (blocks, k, directions), of the weighted top output directions.

    `peak` is the eigenvalue whose direction has weight 1: the largest of all parts.
    """
    values, vectors = torch.linalg.eigh(result.output)
    count = min(directions, values.shape[-1])
    top = values[..., -count:]
    weight = torch.exp(sharpness * (top / max(peak, 1e-300) - 1)).sqrt()
    w = chain.out.value.mH @ (vectors[..., -count:] * weight[:, None, :])
    found: list[tuple[Tensor, Tensor]] = []
    for passed in reversed(result.passed):
        if isinstance(passed, Collect):
            value = passed.rows.value
            w = value.mH @ w.to(value.dtype) * passed.weights.sqrt()[:, None, None]
        elif isinstance(passed, Regrid):
            w = _spread_back(passed, w)
        elif isinstance(passed, Passed):
            stage = passed.stage
            w = w.to(stage.mean.value.dtype)  # of one real block, where the blocks end before it
            h = stage.mean.value.mH @ w
            g = _pulled(stage.spread.value, passed, h)
            found.append((g, w[:, stage.free]))
            w = h + stage.spread.value.mH @ g
    return found[::-1]


def _spread_back(regrid: Regrid, w: Tensor) -> Tensor:
    """The sensitivities of the aliases, each at its own block of the finer grid."""
    new, aliases = regrid.blocks.shape
    parts = w.reshape(new, aliases, -1, w.shape[-1])
    parts = torch.where(regrid.conjugate[..., None, None], parts.conj(), parts)
    fine = parts.new_zeros(int(regrid.blocks.max()) + 1, *parts.shape[2:])
    return fine.index_put((regrid.blocks.reshape(-1),), parts.flatten(0, 1), accumulate=False)


def _pulled(spread: Tensor, passed: Passed, h: Tensor) -> Tensor:
    return torch.cholesky_solve(spread @ (passed.cover @ h), passed.factor)


def _energies(passed: Passed, g: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of |g|^2 and of |w|^2 for each multiplier."""
    stage = passed.stage
    top = per_group(stage.groups, stage.count, g.abs().square().sum((0, 2)))
    return top, per_group(stage.free_groups, stage.count, w.abs().square().sum((0, 2)))


def _log_ratio(pulled: Tensor, pushed: Tensor) -> Tensor:
    top, bottom = pulled.sqrt(), pushed.sqrt()
    if not top.numel():
        return top
    return ((top + 1e-6 * top.max() + 1e-290) / (bottom + 1e-6 * bottom.max() + 1e-290)).log()
