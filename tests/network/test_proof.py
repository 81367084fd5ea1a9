"""The proof against python-flint's ball arithmetic, on networks small enough for it."""

import math

import flint
import pytest
import torch
from torch import Tensor, nn

from opnorm.certificate.network.check import chain_of
from opnorm.certificate.network.proof import largest_eigenvalue, prove
from opnorm.graph import export
from opnorm.network.multipliers.afp import adjoint_fixed_point
from opnorm.network.multipliers.fast import fast
from opnorm.network.rules import program_of


def ball(matrix: Tensor) -> flint.arb_mat:
    rows = matrix.double().tolist()
    return flint.arb_mat([[flint.arb(v) for v in row] for row in rows])


def exact_bound(weights: list[Tensor], multipliers: list[Tensor]) -> flint.arb:
    """The ReLU recursion `P <- S (S - Q/4)^-1 S` in ball arithmetic, and the root of the trace norm's top eigenvalue."""
    cover = None
    for weight, s in zip(weights[:-1], multipliers, strict=True):
        w = ball(weight)
        q = w * w.transpose() if cover is None else w * cover * w.transpose()
        diagonal = ball(torch.diag(s))
        cover = diagonal * (diagonal - q * flint.arb(0.25)).inv() * diagonal
    w = ball(weights[-1])
    gram = w * cover * w.transpose()
    values = flint.acb_mat(gram).eig(multiple=True, algorithm="rump")
    return max((v.real for v in values), key=lambda v: float(v.mid())).sqrt()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e8])
def test_the_proved_bound_is_above_the_exact_one_and_close(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    flint.ctx.prec = 300
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.data *= scale
    graph = export(model, torch.randn(2, 3))
    chain = chain_of(program_of(graph), graph.weights, "dense")
    with torch.no_grad():
        found = adjoint_fixed_point(chain, fast(chain), 10)
    exact = exact_bound([model[i].weight.detach() for i in (0, 2, 4)], found.multipliers)
    proved = prove(chain, found.multipliers).upper
    assert flint.arb(proved) > exact
    assert proved <= float(exact.mid()) * (1 + 1e-7)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_largest_eigenvalue_is_above_and_close(size: int) -> None:
    torch.manual_seed(size)
    flint.ctx.prec = 300
    root = torch.randn(size, size, dtype=torch.float64)
    gram = root @ root.mT
    gram = (gram + gram.mT) / 2
    upper = largest_eigenvalue(gram[None], torch.zeros(1, size, size, dtype=torch.float64))
    values = flint.acb_mat(ball(gram)).eig(multiple=True, algorithm="rump")
    exact = max(float(v.real.mid()) for v in values)
    assert exact <= upper <= exact * (1 + 1e-12)
    assert math.isclose(
        largest_eigenvalue(gram[None], torch.full((1, size, size), 0.1, dtype=torch.float64)),
        exact + 0.1 * size,
        rel_tol=1e-9,
    )
