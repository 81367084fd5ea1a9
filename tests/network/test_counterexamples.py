"""Shortcuts that look right and are false: each test fails where one of them is taken."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import opnorm
from network.networks import Lambda
from opnorm.certificate.network.check import chain_of
from opnorm.certificate.network.proof import prove
from opnorm.errors import CertificateError
from opnorm.graph import export
from opnorm.network import Ball, NormBall
from opnorm.network.multipliers.afp import adjoint_fixed_point
from opnorm.network.multipliers.fast import fast
from opnorm.network.rules import program_of


def fourier(model: nn.Module, *shape: int) -> float:
    graph = export(model.eval(), torch.randn(2, *shape))
    chain = chain_of(program_of(graph), graph.weights, "fourier")
    with torch.no_grad():
        best = adjoint_fixed_point(chain, fast(chain), 20)
    return prove(chain, best.multipliers).upper


def norm_of(model: nn.Module, *shape: int) -> float:
    """Of a linear model, from its matrix."""
    size = math.prod(shape)
    with torch.no_grad():
        matrix = copy.deepcopy(model).double()(torch.eye(size).double().reshape(size, *shape)).reshape(size, -1)
    return float(torch.linalg.matrix_norm(matrix, 2))


def conv(kernel: list[list[float]], **options: int) -> nn.Conv2d:
    weight = torch.tensor(kernel)[None, None]
    layer = nn.Conv2d(1, 1, tuple(weight.shape[2:]), bias=False, **options)
    layer.weight.data.copy_(weight)
    return layer


def test_the_crop_between_two_convolutions() -> None:
    # Shift one way and back, less the identity: nothing on a torus. Zero padding on 3 points loses one of them: norm 1.
    first, second = nn.Conv1d(1, 2, 3, padding=1, bias=False), nn.Conv1d(2, 1, 3, padding=1, bias=False)
    first.weight.data = torch.tensor([[[0.0, 0, 1]], [[0, 1, 0]]])
    second.weight.data = torch.tensor([[[1.0, 0, 0], [0, -1, 0]]])
    for between in ([], [nn.LeakyReLU(1.0)]):
        model = nn.Sequential(first, *between, second)
        assert norm_of(model, 1, 3) == pytest.approx(1.0)
        assert fourier(model, 1, 3) >= 1 - 1e-12


def test_a_strided_skip_meets_a_shifted_convolution() -> None:
    # x[2p] + (delta * x)[2p]: the taps' offsets matter; without them the bound is sqrt 2 for a true 2.
    delta = conv([[0, 0, 0], [0, 1, 0], [0, 0, 0]], padding=1, stride=2)
    pick = conv([[1]], stride=2)
    model = Lambda(lambda x, a, b: a(x) + b(x), delta, pick)
    assert norm_of(model, 1, 4, 4) == pytest.approx(2.0)
    assert fourier(model, 1, 4, 4) >= 2.0 * (1 - 1e-12)


def test_global_average_is_not_the_zero_frequency() -> None:
    # H = 2, a centre delta and a ReLU: true 1/2; P(0) / T^2 on T = 3 would give 1/3.
    delta = conv([[0, 0, 0], [0, 1, 0], [0, 0, 0]], padding=1)
    model = nn.Sequential(delta, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert fourier(model, 1, 2, 2) >= 0.5 * (1 - 1e-12)


def test_circular_padding_does_not_bound_zero_padding() -> None:
    kernel = conv([[0, 0, 0], [-1, 0, 1], [0, 0, 0]], padding=1)
    assert norm_of(kernel, 1, 2, 2) == pytest.approx(1.0)
    assert fourier(kernel, 1, 2, 2) >= 1.0 - 1e-12


def test_leaky_relu_lets_what_lies_outside_the_image_through() -> None:
    torch.manual_seed(3)
    for slope in (1.0, 0.9, -1.0):
        model = nn.Sequential(
            nn.Conv2d(1, 1, 3, padding=1, bias=False), nn.LeakyReLU(slope), nn.Conv2d(1, 1, 3, padding=1, bias=False)
        )
        points = torch.randn(50, 1, 3, 3).double()
        upper = fourier(model, 1, 3, 3)
        for x in points:
            jacobian = torch.autograd.functional.jacobian(model.double(), x[None])
            assert float(torch.linalg.matrix_norm(jacobian.reshape(9, 9), 2)) * (1 - 1e-12) <= upper


def test_an_opaque_step_has_one_multiplier_only() -> None:
    class Swap(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(1)[0]

    graph = export(nn.Sequential(nn.Linear(2, 2), Swap(), nn.Linear(2, 1)), torch.randn(2, 2))
    chain = chain_of(program_of(graph), graph.weights, "dense")
    assert [stage.count for stage in chain.choices] == [1]
    with pytest.raises(CertificateError, match="1 positive"):
        prove(chain, [torch.tensor([10.0, 20.0], dtype=torch.float64)])


def test_two_outputs_that_are_nearly_the_same_keep_a_positive_distance() -> None:
    layer = nn.Linear(3, 2, bias=False).double()
    layer.weight.data[1] = layer.weight.data[0]
    layer.weight.data[1, 0] += 1e-8
    bound = opnorm.lipschitz(layer, torch.randn(2, 3).double())
    assert bound.pairwise is not None
    assert float(bound.pairwise[0, 1]) >= 1e-8


def test_activations_beside_relu_have_their_own_slopes() -> None:
    for activation, slope in (
        (nn.GELU(), 1.1289),
        (nn.Hardswish(), 1.499),
        (nn.SiLU(), 1.0998),
        (nn.LeakyReLU(3.0), 2.999),
    ):
        model = nn.Sequential(nn.Linear(1, 1, bias=False), activation)
        model[0].weight.data.fill_(1.0)
        assert opnorm.lipschitz(model, torch.randn(2, 1)).upper >= slope


def test_attention_counts_the_bias_of_its_queries() -> None:
    # X = (.1, -.1), weights 1, b_q = 10: a rule without the bias claims 1.438 for a map of constant 1.551.
    class Attention(nn.Module):
        def __init__(self, bias: float) -> None:
            super().__init__()
            self.bias = bias

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x + self.bias, x, x)

    x = torch.tensor([[[0.1], [-0.1]]])
    bound, plain = (
        opnorm.lipschitz(Attention(b), x, region=NormBall(0.1 * 2**0.5), method="naive") for b in (10.0, 0.0)
    )
    assert 1.55 < bound.lower <= bound.upper < 10
    keys, without = (next(n.constant for n in b.nodes if n.place.endswith("(keys)")) for b in (bound, plain))
    point = torch.tensor([[0.1], [-0.1]], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(
        lambda k: torch.nn.functional.scaled_dot_product_attention(point + 10, k, point), point
    )
    measured = float(torch.linalg.matrix_norm(jacobian.reshape(2, 2), 2))
    assert without < measured <= keys < 4 * measured
    assert math.isinf(opnorm.lipschitz(Attention(10.0), x).upper)


def test_a_region_is_where_the_bound_holds() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU())
    model[0].weight.data.fill_(1.0)
    off = opnorm.lipschitz(model, torch.randn(2, 1), region=Ball(torch.tensor([-1.0]), 0.5))
    across = opnorm.lipschitz(model, torch.randn(2, 1), region=Ball(torch.tensor([-1.0]), 1.5))
    assert off.upper < 1e-6
    assert across.upper >= 1.0


def test_a_single_window_that_leaves_positions_out_is_no_mean() -> None:
    # One window over a corner of 2 x 2 that counts what is inside only: the corner itself, of norm 1; a mean has 1/2.
    pool = nn.AvgPool2d(2, 3, 1, count_include_pad=False)
    assert norm_of(pool, 1, 2, 2) == pytest.approx(1.0)
    assert opnorm.lipschitz(pool, torch.randn(2, 1, 2, 2)).upper >= 1.0


def test_a_scale_of_the_width_is_not_one_of_all_positions() -> None:
    # The pooling's matrix has a row for each of 4 positions; the factors belong to the 2 columns.
    factors = torch.tensor([3.0, 0.5])
    model = Lambda(lambda x, pool: pool(x) * factors, nn.AvgPool2d(2, 2, 1, count_include_pad=False))
    bound = opnorm.lipschitz(model, torch.randn(2, 1, 3, 3), method="naive")
    assert norm_of(model, 1, 3, 3) <= bound.upper <= 3.0001


def test_casts_do_not_turn_rounding_into_slopes() -> None:
    # Pairs are close to each other: evaluated in half precision, their difference would be the rounding's.
    model = Lambda(lambda x: (x.half().float() * 2).to(torch.bfloat16).float())
    bound = opnorm.lipschitz(model, torch.randn(4, 5))
    assert bound.lower <= bound.upper == pytest.approx(2.0)


def test_a_network_that_is_constant_has_no_slope_from_rounding() -> None:
    # Centred, averaged: 0 up to rounding, whose quotient over a small distance is not small beside the bound.
    torch.manual_seed(1161)
    model = Lambda(
        lambda x, conv, norm: (h := norm(conv(x))).sub(h.mean((2, 3), keepdim=True)).mean((2, 3)),
        nn.Conv2d(3, 1, 2, padding=1),
        nn.GroupNorm(1, 1, eps=0.3),
    )
    bound = opnorm.lipschitz(model, torch.randn(3, 3, 5, 5), method="fast", time_budget=0.5)
    assert bound.lower <= bound.upper < 1e-9
