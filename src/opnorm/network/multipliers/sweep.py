"""Sweep: one forward and one backward pass balance the two sides of every neuron."""

import torch
from torch import Tensor

from opnorm.certificate.network.stages import Chain, Stage
from opnorm.network.covariance import Forward, forward, per_group, ratio
from opnorm.network.multipliers.afp import adjoint


def sweep(chain: Chain, begin: Forward) -> Forward:
    """Run the calculus with `S0_j = sqrt(Qf_jj / Qb_jj)`, scaled to twice the smallest feasible size.

    Qf is the covariance before the neuron, Qb that of the outputs' sensitivity to it, both for the multipliers of
    `begin` and all output directions.
    """
    sides = adjoint(chain, begin, directions=chain.out.height, sharpness=0.0)
    shapes = []
    for passed, (_, w) in zip(begin.choices, sides, strict=True):
        stage = passed.stage
        ahead = passed.b.diagonal(dim1=-2, dim2=-1).real.mean(0)
        ahead = per_group(stage.groups, stage.count, ahead)
        behind = per_group(stage.free_groups, stage.count, w.abs().square().sum((0, 2)))
        shapes.append(((ahead + 1e-12 * _peak(ahead)) / (behind + 1e-12 * _peak(behind))).sqrt())

    def choose(number: int, stage: Stage, b: Tensor) -> Tensor:
        times = 1 + 1e-7 if stage.decoupled else 2.0
        return times * shapes[number] * ratio(stage, b, shapes[number]).clamp_min(1e-280)

    return forward(chain, choose)


def _peak(values: Tensor) -> Tensor:
    return values.max() + 1e-290 if values.numel() else torch.zeros(())
