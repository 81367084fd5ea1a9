"""No bound is below a Jacobian norm or a difference quotient that was measured, without tolerance."""

import math

import pytest
import torch
from torch import Tensor, nn

import opnorm
from network.networks import DENSE, IMAGES, Net
from opnorm.certificate.network.check import chain_of
from opnorm.certificate.network.proof import prove
from opnorm.errors import UnsupportedLayerError
from opnorm.graph import export
from opnorm.network.multipliers.afp import adjoint_fixed_point
from opnorm.network.multipliers.fast import fast
from opnorm.network.naive import naive
from opnorm.network.rules import program_of

ROUNDING = 1 - 1e-9  # of the Jacobian and of its singular values, in float64


def jacobians(model: nn.Module, points: Tensor) -> list[Tensor]:
    twin = model.double()
    out = []
    for x in points:
        jacobian = torch.autograd.functional.jacobian(lambda v: twin(v[None])[0].reshape(-1), x)
        out.append(jacobian.reshape(-1, x.numel()))
    return out


def points(net: Net, count: int = 12) -> Tensor:
    scale = torch.logspace(-2, 2, count, dtype=torch.float64).reshape(-1, *([1] * len(net.shape)))
    return torch.randn(count, *net.shape, dtype=torch.float64) * scale


@pytest.mark.parametrize("net", DENSE + IMAGES, ids=lambda n: n.name)
def test_every_form_of_the_calculus_is_above_measured_jacobians(net: Net) -> None:
    model = net.build()
    example = points(net)
    graph = export(model, example[:2].float())
    program = program_of(graph)
    product = naive(program, graph.weights).total
    uppers = {"product": product}
    pairwise = None
    for form in ("dense", "fourier"):
        try:
            chain = chain_of(program, graph.weights, form)
        except UnsupportedLayerError:
            assert form == "fourier"
            continue
        with torch.no_grad():
            quick = fast(chain)
            better = adjoint_fixed_point(chain, quick, 8)
        uppers[f"{form} fast"] = prove(chain, quick.multipliers).upper
        proof = prove(chain, better.multipliers)
        uppers[f"{form} afp"] = proof.upper
        assert proof.upper <= uppers[f"{form} fast"] * (1 + 1e-6)
        pairwise = proof.pairwise if pairwise is None else pairwise
    for jacobian in jacobians(model, example):
        measured = float(torch.linalg.matrix_norm(jacobian, 2)) * ROUNDING
        for name, upper in uppers.items():
            assert measured <= upper, name
        if pairwise is not None:
            differences = (jacobian[:, None] - jacobian[None]).norm(dim=-1) * ROUNDING
            assert bool((differences <= pairwise).all())


@pytest.mark.parametrize("name", ["cnn", "resnet", "stride", "circular", "leaky resnet", "shortcut pooled", "avg pool"])
def test_images_are_covered_in_fourier_space(name: str) -> None:
    net = next(n for n in IMAGES if n.name == name)
    graph = export(net.build(), torch.randn(2, *net.shape))
    assert len(chain_of(program_of(graph), graph.weights, "fourier").stages) > 0


@pytest.mark.parametrize("name", ["mlp", "residual", "cnn", "maxmin", "tokens", "concat"])
def test_lower_and_upper_of_the_public_call(name: str) -> None:
    net = next(n for n in DENSE + IMAGES if n.name == name)
    bound = opnorm.lipschitz(net.build(), torch.randn(8, *net.shape), time_budget=1.0)
    assert 0 < bound.lower <= bound.upper <= bound.product
    assert bound.guarantee == "proved"
    assert bound.pair is not None
    assert math.isclose(bound.pair.quotient, bound.lower)
    assert len(str(bound).splitlines()) >= len(bound.nodes)


def test_the_lower_bound_is_attained_by_its_pair() -> None:
    net = DENSE[0]
    model = net.build()
    bound = opnorm.lipschitz(model, torch.randn(8, *net.shape), method="fast")
    assert bound.pair is not None
    with torch.no_grad():
        gap = model.double()(bound.pair.x[None]) - model(bound.pair.y[None])
    assert float(gap.norm() / (bound.pair.x - bound.pair.y).norm()) >= bound.lower


def test_fourier_and_dense_agree_on_a_torus() -> None:
    net = next(n for n in IMAGES if n.name == "circular")
    graph = export(net.build(), torch.randn(2, *net.shape))
    program = program_of(graph)
    values = []
    for form in ("dense", "fourier"):
        chain = chain_of(program, graph.weights, form)
        with torch.no_grad():
            values.append(prove(chain, fast(chain).multipliers).upper)
    assert math.isclose(values[0], values[1], rel_tol=1e-6)
