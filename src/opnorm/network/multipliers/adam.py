"""Adam on the logarithms of the multipliers: slower than the fixed point, and often a little better."""

import time

import torch
from torch import Tensor

from opnorm.certificate.network.stages import Chain, Stage
from opnorm.network.covariance import Forward, bound_squared, forward, given, ratio


def adam(
    chain: Chain, begin: Forward, iterations: int = 60, rate: float = 0.1, seconds: float | None = None
) -> Forward:
    """Minimise the bound over `S = t rho S0`, in (log S0, log(t - 1)), from the multipliers of `begin`.

    Returns the best pass that was met, `begin` included.
    """
    shapes: list[Tensor] = []
    excess: list[Tensor] = []
    for passed in begin.choices:
        s = passed.multiplier.detach()
        rho = float(ratio(passed.stage, passed.b.detach(), s)) if s.numel() else 0.5
        room = torch.tensor(1 / min(max(rho, 1e-3), 0.999) - 1, dtype=torch.float64)
        shapes.append(s.log().requires_grad_())
        excess.append(room.log().requires_grad_())
    if not shapes:
        return begin
    best, value = begin.multipliers, float(bound_squared(begin))
    optimiser = torch.optim.Adam([*shapes, *excess], lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations, eta_min=rate * 0.05)
    started = time.monotonic()

    def choose(number: int, stage: Stage, b: Tensor) -> Tensor:
        shape = shapes[number].exp()
        t = 1 + (1e-7 if stage.decoupled else excess[number].exp())
        return t * ratio(stage, b, shape).clamp_min(1e-280) * shape

    for _ in range(iterations):
        optimiser.zero_grad()
        with torch.enable_grad():
            result = forward(chain, choose)
            objective = bound_squared(result)
            if objective.item() < value:
                best, value = [s.detach() for s in result.multipliers], objective.item()
            objective.log().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if seconds is not None and time.monotonic() - started > seconds:
            break
    with torch.no_grad():
        return forward(chain, given(best))
