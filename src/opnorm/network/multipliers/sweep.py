"""Sweep: one forward and one backward pass balance the two sides of every neuron."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from opnorm.certificate.network.stages import Chain, Stage
from opnorm.network.covariance import Chooser, Forward, Passed, forward, given, per_group, ratio
from opnorm.network.multipliers.adjoint import adjoint, pulled, squares


def sweep(chain: Chain, begin: Forward) -> Forward:
    """Run the calculus with `S0_j = sqrt(Qf_jj / Qb_jj)`, scaled to twice the smallest feasible size.

    Qf is the covariance before the neuron, Qb that of the outputs' sensitivity to it, both for the multipliers of
    `begin` and all output directions.
    """
    return forward(chain, twice_least(_shapes(*_balance(chain, begin))))


def shapes_by_parts(chains: Iterable[Chain], multipliers: Sequence[Tensor]) -> list[Tensor]:
    """The same S0 from the parts of a chain, one after the other, with feasible multipliers for all of them."""
    ahead: list[Tensor] = []
    behind: list[Tensor] = []
    for chain in chains:
        more = _balance(chain, forward(chain, given(multipliers)))
        ahead, behind = _added(ahead, more[0]), _added(behind, more[1])
    return _shapes(ahead, behind)


def twice_least(shapes: Sequence[Tensor]) -> Chooser:
    """A chooser that scales S0 to twice the smallest feasible size."""

    def choose(number: int, stage: Stage, b: Tensor) -> Tensor:
        times = 1 + 1e-7 if stage.decoupled else 2.0
        return times * shapes[number] * ratio(stage, b, shapes[number]).clamp_min(1e-280)

    return choose


def _balance(chain: Chain, begin: Forward) -> tuple[list[Tensor], list[Tensor]]:
    """For each choice and group, the sums over all blocks of Qf and of Qb."""
    ahead: list[Tensor] = []
    behind: list[Tensor] = []

    def respond(states: Sequence[Passed], ws: Sequence[Tensor], hs: Sequence[Tensor]) -> list[Tensor]:
        state, stage = states[0], states[0].stage
        diagonal = state.b.diagonal(dim1=-2, dim2=-1).real.sum(0)
        ahead.append(per_group(stage.groups, stage.count, diagonal))
        behind.append(per_group(stage.free_groups, stage.count, squares(ws[0][:, stage.free])))
        return [torch.cholesky_solve(pulled(state, hs[0]), state.factor)]

    adjoint([chain], [begin], chain.out.height, 0.0, respond)
    return ahead[::-1], behind[::-1]


def _added(one: list[Tensor], two: list[Tensor]) -> list[Tensor]:
    """Sums, where nothing counts as zeros."""
    return [a + b for a, b in zip(one, two, strict=True)] if one else two


def _shapes(ahead: list[Tensor], behind: list[Tensor]) -> list[Tensor]:
    return [((a + 1e-12 * _peak(a)) / (b + 1e-12 * _peak(b))).sqrt() for a, b in zip(ahead, behind, strict=True)]


def _peak(values: Tensor) -> Tensor:
    return values.max() + 1e-290 if values.numel() else torch.zeros(())
