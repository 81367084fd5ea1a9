"""A search on a few frequencies comes close to one on all, and what it gives holds for all."""

import pytest
import torch
from torch import Tensor, nn

from opnorm.certificate.network.cost import fourier_cost
from opnorm.certificate.network.fourier_chain import fourier_chain
from opnorm.certificate.network.maps import Weights
from opnorm.certificate.network.program import Program
from opnorm.certificate.network.proof import prove
from opnorm.certificate.network.stages import Chain
from opnorm.graph import export
from opnorm.network.covariance import fixed
from opnorm.network.frequencies import search_by_parts
from opnorm.network.lockstep import lockstep
from opnorm.network.multipliers.afp import adjoint_fixed_point
from opnorm.network.multipliers.fast import closed_form, fast
from opnorm.network.rules import program_of
from opnorm.network.working_set import by_working_sets

SHAPE = (5, 16, 16)


class Trunk(nn.Module):
    """Blocks `x + relu(conv(x))` on a torus, where every frequency counts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(5, 5, 3, padding=1, padding_mode="circular") for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + torch.relu(conv(x))
        return x


def traced(head: bool) -> tuple[Program, Weights]:
    torch.manual_seed(0)
    model = nn.Sequential(Trunk(), nn.Flatten(), nn.Linear(1280, 4)) if head else Trunk()
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        conv.weight.data *= torch.logspace(0.6, -0.6, 5)[:, None, None, None]
    graph = export(model.eval(), torch.randn(2, *SHAPE))
    return program_of(graph), {**graph.weights}


@pytest.mark.parametrize("head", [False, True], ids=["largest", "sum"])
def test_working_sets_come_close_to_all_frequencies(head: bool) -> None:
    program, weights = traced(head)
    cost = fourier_cost(program)
    chain = fourier_chain(program, weights)
    sets: list[int] = []

    def build(few: Tensor) -> Chain:
        sets.append(len(few))
        return fourier_chain(program, weights, part=few)

    every = fourier_chain(program, weights, part=torch.arange(cost.frequencies))
    with torch.no_grad():
        quick = fast(chain)
        whole = adjoint_fixed_point(chain, quick, 40).squared
        begin = lockstep([every], closed_form, keep=True)
        found = by_working_sets(
            begin, cost.frequencies, build, lambda s: lockstep([every], fixed(s), keep=True), lambda few: True
        )
    assert len(sets) == 1 if head else len(sets) > 1
    assert max(sets) < cost.frequencies * 0.6
    assert whole < 0.8 * quick.squared
    assert found.squared <= (1.25 if head else 1.01) * whole  # a head's sum is only sampled
    assert prove(chain, found.multipliers).upper == pytest.approx(found.squared**0.5, rel=1e-6)
    best = search_by_parts(program, weights, cost, 60.0, "afp")
    assert best.method == "afp" and best.estimate <= 1.005 * whole**0.5


def test_without_time_the_first_pass_is_kept() -> None:
    program, weights = traced(False)
    assert search_by_parts(program, weights, fourier_cost(program), 1e-3, "afp").method == "fast"
