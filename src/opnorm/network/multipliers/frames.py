"""The search for the units of channels in which the product of norms is least.

Each log norm is a convex function of the logarithms of the units (Sezginer and Overton, 1990), and the naive rules join
them by sums, maxima and log-sum-exp: the logarithm of the bound is convex, and gradient steps find its minimum.
"""

import math
import time

import torch
from torch import Tensor

from opnorm.certificate.network.maps import Convolution, LinearMap, Matrix, Scale, Weights
from opnorm.certificate.network.program import Linear, Opaque, Program, Sum, keeps_channels
from opnorm.network.multipliers.classes import by_channel, classes
from opnorm.network.multipliers.gains import Factors, Gain, gain_of
from opnorm.network.naive import Naive

_STEPS, _RATE = 60, 0.02
_BALANCINGS = 6

Units = dict[int | None, Tensor]
"""The logarithms of the units of each class, in float32."""

Gains = dict[int, Gain | Factors]
"""What is measured anew, by the step that ends it."""


def frames(program: Program, weights: Weights, plain: Naive, seconds: float) -> list[Tensor] | None:
    """For each step its units, shape () or (channels,), in float64; None where all stay as they are.

    Args:
        program: what the network computes.
        weights: its stored weights, by name.
        plain: its naive bound.
        seconds: after which no further step is begun.
    """
    deadline = time.monotonic() + seconds
    homes = classes(program)
    if not any(home is not None for home in homes):
        return None
    gains = _gains(program, {**weights, **program.constants}, plain, homes)
    units: Units = {None: torch.zeros(())}
    units |= {home: torch.zeros(program.steps[home].shape[0]) for home in homes if home is not None}
    _balanced(program, gains, homes, units, plain)
    free = [u.requires_grad_() for home, u in units.items() if home is not None]
    optimiser = torch.optim.Adam(free, lr=_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _STEPS, eta_min=_RATE / 30)
    for _ in range(_STEPS):
        if time.monotonic() > deadline:
            break
        optimiser.zero_grad()
        with torch.enable_grad():
            _log_bound(program, gains, plain, homes, units).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    return [units[home].detach().double().exp() for home in homes]


def _gains(program: Program, weights: Weights, plain: Naive, homes: list[int | None]) -> Gains:
    """Matrices, convolutions and scales with free units at an end."""
    found: Gains = {}
    for position, step in enumerate(program.steps):
        if not isinstance(step, Linear):
            continue
        ends = (homes[i] for i in _ends(program, plain, position))
        if all(end is None for end in ends):
            continue
        first, scale = step, None
        if position in plain.fused and isinstance(step.map, Scale):
            before = program.steps[step.sources[0]]
            assert isinstance(before, Linear)
            first, scale = before, step.map
        whole = isinstance(first.map, Matrix) and first.map.before == first.map.after == 1
        if isinstance(first.map, Scale) and first.map.axis == 0 and first.map.in_shape == first.shape:
            found[position] = Factors(
                first.map.factors(weights).expand(first.shape[0]).abs().clamp_min(1e-30).log().float()
            )
        elif (whole or isinstance(first.map, Convolution)) and not by_channel(first.map):
            assert isinstance(first.map, Matrix | Convolution)
            found[position] = gain_of(first.map, scale, weights)
    return found


def _ends(program: Program, plain: Naive, position: int) -> tuple[int, int]:
    """The steps whose units a linear step, with the one before it where they are fused, leads from and to."""
    (source,) = program.steps[position].sources
    return (program.steps[source].sources[0] if position in plain.fused else source), position


def _balanced(program: Program, gains: Gains, homes: list[int | None], units: Units, plain: Naive) -> None:
    """Begin where what is written to a channel and what is read from it have the same Frobenius norm (Osborne)."""
    for _ in range(_BALANCINGS):
        written: dict[int | None, list[Tensor]] = {}
        read: dict[int | None, list[Tensor]] = {}
        for position, gain in gains.items():
            before, after = (homes[i] for i in _ends(program, plain, position))
            columns, rows = gain.balance(units[before], units[after])
            read.setdefault(before, []).append(columns)
            written.setdefault(after, []).append(rows)
        for home in set(written) & set(read) - {None}:
            gap = torch.logsumexp(torch.stack(read[home]), 0) - torch.logsumexp(torch.stack(written[home]), 0)
            units[home] = units[home] + gap / 4


def _log_bound(program: Program, gains: Gains, plain: Naive, homes: list[int | None], units: Units) -> Tensor:
    """The logarithm of the naive rules' bound in these units."""
    logs: list[Tensor] = []
    for position, step in enumerate(program.steps):
        after = units[homes[position]]
        reads = torch.stack([logs[i] for i in step.sources]) if step.sources else torch.zeros(1)
        constant = _log(plain.fused.get(position, plain.constants[position]))
        if isinstance(step, Linear):
            first, _ = _ends(program, plain, position)
            before = units[homes[first]]
            if position in gains:
                logs.append(logs[first] + gains[position].log_norm(before, after))
            else:
                logs.append(logs[first] + _other(step.map, before, after, constant))
        elif isinstance(step, Sum):
            logs.append(torch.logsumexp(reads + torch.tensor([_log(abs(c)) for c in step.coefficients]), 0))
        elif isinstance(step, Opaque) and not keeps_channels(step):
            stretched = torch.stack([-units[homes[i]].amin() for i in step.sources])
            logs.append(torch.logsumexp(2 * (reads + stretched), 0) / 2 + constant)
        else:
            logs.append(torch.logsumexp(2 * reads, 0) / 2 + constant)
    return torch.logsumexp(2 * torch.stack([logs[i] for i in program.outputs]), 0) / 2


def _other(linear: LinearMap, before: Tensor, after: Tensor, constant: float) -> Tensor:
    """The logarithm of the norm of what is not measured anew."""
    if by_channel(linear):
        return torch.tensor(constant)
    return constant + after.amax() - before.amin()


def _log(value: float) -> float:
    return math.log(max(value, 1e-30))
