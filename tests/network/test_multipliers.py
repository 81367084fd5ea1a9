"""The searches for multipliers against LipSDP's optimum, which cvxpy computed once for weights that a formula gives."""

import pytest
import torch
from torch import nn

import opnorm
from network.networks import DENSE, Lambda, Net, mlp, residual
from opnorm.certificate.network.check import chain_of
from opnorm.certificate.network.proof import prove
from opnorm.graph import export
from opnorm.network.covariance import bound_squared
from opnorm.network.multipliers.fast import fast
from opnorm.network.multipliers.newton import newton
from opnorm.network.rules import program_of

# `benchmarks/network_rivals.py FILE lipsdp` (cvxpy 1.9.3, Clarabel) on these weights.
CHAIN, RESIDUAL = 10.280824017, 7.682517023


def waves(model: nn.Module, order: tuple[int, ...]) -> nn.Module:
    """Fill the linear layers' weights, in this order, with values of a sine."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    for number, position in enumerate(order):
        weight = weights[position].data
        index = torch.arange(weight.numel(), dtype=torch.float64).reshape(weight.shape)
        weight.copy_(torch.sin(12.9898 * (index + 1) + 78.233 * number))
    return model


def two_blocks() -> nn.Module:
    return Lambda(residual, *(nn.Linear(a, b) for a, b in [(4, 6), (6, 4)] * 2), nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("model", "width", "optimum"),
    [
        (lambda: waves(mlp(5, 8, 6, 3), (0, 1, 2)), 5, CHAIN),
        (lambda: waves(two_blocks(), (0, 2, 1, 3, 4)), 4, RESIDUAL),
    ],
    ids=["chain", "residual"],
)
@pytest.mark.parametrize("method", ["auto", "adam"])
def test_the_bound_is_lipsdps_optimum(model: object, width: int, optimum: float, method: str) -> None:
    bound = opnorm.lipschitz(model(), torch.randn(4, width), method=method)  # type: ignore[operator]
    # Where the fixed point ends at the same bound to the last digit, Adam has nothing to add.
    assert bound.method in (("dense newton",) if method == "auto" else ("dense adam", "dense afp"))
    assert optimum * (1 - 1e-6) <= bound.upper <= optimum * (1 + (1e-4 if method == "auto" else 1e-2))


@pytest.mark.parametrize("net", DENSE, ids=lambda n: n.name)
def test_newton_is_never_above_where_it_began_and_can_be_proved(net: Net) -> None:
    graph = export(net.build(), torch.randn(2, *net.shape))
    chain = chain_of(program_of(graph), graph.weights, "dense")
    with torch.no_grad():
        begin = fast(chain)
        found = newton(chain, begin) if chain.choices else begin
    assert float(bound_squared(found)) <= float(bound_squared(begin))
    assert prove(chain, found.multipliers).upper ** 2 == pytest.approx(float(bound_squared(found)), rel=1e-5)


def test_each_pair_is_between_the_measured_differences_and_the_joint_bound() -> None:
    net = DENSE[0]
    model = net.build()
    example = torch.randn(8, *net.shape)
    joint = opnorm.lipschitz(model, example).pairwise
    each = opnorm.lipschitz(model, example, pairs="each").pairwise
    assert joint is not None
    assert each is not None
    assert bool((each <= joint * (1 + 1e-9)).all())
    assert float((each / joint).nan_to_num(1.0).min()) < 0.99
    jacobians = torch.func.vmap(torch.func.jacrev(model.double()))(torch.randn(200, *net.shape).double())
    differences = (jacobians[:, :, None] - jacobians[:, None]).norm(dim=-1).amax(0)
    assert bool((differences * (1 - 1e-9) <= each).all())


@pytest.mark.parametrize("bad", ["all", None])
def test_an_unknown_choice_of_pairs_is_an_error(bad: str) -> None:
    with pytest.raises(opnorm.errors.ArgumentError, match="'joint' or 'each'"):
        opnorm.lipschitz(nn.Linear(2, 2), torch.randn(2, 2), pairs=bad)  # type: ignore[arg-type]
