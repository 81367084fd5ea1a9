"""The lower end: proved where every rounding is bounded, checked against exact rational arithmetic."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

import opnorm
from network.networks import DENSE, IMAGES
from opnorm.errors import ArgumentError
from opnorm.graph import Node, export
from opnorm.network import register_rule
from opnorm.network.forward_error import distance_up, evaluation_error, proved_quotient
from opnorm.network.lower import Function, Pair, attained
from opnorm.network.naive import naive
from opnorm.network.reach import reach_of
from opnorm.network.rules import program_of
from opnorm.network.rules.registry import Builder
from opnorm.network.settled import settled

NETS = {n.name: n for n in DENSE + IMAGES}
PROVED = [
    "mlp", "badly scaled", "near rank one", "residual", "maxmin", "dense block", "subtract", "slices", "stack",
    "cnn", "resnet", "stride", "max pool", "avg pool", "groups", "transposed", "padding layers", "3d", "pixel shuffle",
]  # fmt: skip


@pytest.mark.parametrize("name", PROVED)
def test_piecewise_linear_networks_have_a_proved_lower_end(name: str) -> None:
    net = NETS[name]
    bound = opnorm.lipschitz(net.build(), torch.randn(4, *net.shape), method="naive", time_budget=1.0)
    assert bound.pair is not None
    assert bound.pair.guarantee == "proved"
    assert 0 < bound.lower <= bound.upper


@pytest.mark.parametrize("name", ["softmax", "tokens", "layer norm"])
def test_library_functions_leave_an_estimate(name: str) -> None:
    net = NETS[name]
    bound = opnorm.lipschitz(net.build(), torch.randn(4, *net.shape), method="naive", time_budget=1.0)
    assert bound.pair is not None
    assert bound.pair.guarantee == "estimate"


def exact_value(model: nn.Sequential, v: Tensor) -> list[Fraction]:
    h = [Fraction(t) for t in v.tolist()]
    for layer in model:
        if isinstance(layer, nn.Linear):
            rows = [[Fraction(w) for w in row] for row in layer.weight.double().tolist()]
            bias = [Fraction(b) for b in layer.bias.double().tolist()]
            h = [sum((w * t for w, t in zip(row, h, strict=True)), b) for row, b in zip(rows, bias, strict=True)]
        elif isinstance(layer, nn.LeakyReLU):
            h = [t if t > 0 else Fraction(layer.negative_slope) * t for t in h]
        else:
            h = [max(t, Fraction(0)) for t in h]
    return h


def exact_squared_quotient(model: nn.Sequential, x: Tensor, y: Tensor) -> Fraction:
    """The squared quotient in rational arithmetic."""

    top = sum((a - b) ** 2 for a, b in zip(exact_value(model, x), exact_value(model, y), strict=True))
    return top / sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True))


@pytest.mark.parametrize("step", [1.0, 1e-4, 1e-10])
@pytest.mark.parametrize(("offset", "act"), [(0.0, nn.LeakyReLU(0.3)), (1e4, nn.ReLU()), (1e4, nn.LeakyReLU(-1.5))])
def test_below_the_exact_quotient_of_the_pair_and_close(step: float, offset: float, act: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4), act, nn.Linear(4, 2)).double()
    x = torch.randn(3, dtype=torch.float64) + offset
    model[4].bias.data -= model(x).detach()  # large terms that cancel: the output's size hides no error
    function = Function(export(model, torch.randn(2, 3).double()), (torch.randn(2, 3),))
    for _ in range(20):
        y = x + step * torch.randn(3, dtype=torch.float64)
        with torch.no_grad():
            below = proved_quotient(function.graph, function.inputs(torch.stack([x, y])), distance_up(x, y))
        exact = exact_squared_quotient(model, x, y)
        assert below is not None
        assert Fraction(below) ** 2 <= exact
        if step >= 1e-4 and offset == 0:
            assert below >= float(exact) ** 0.5 * (1 - 1e-7)


class Steep(nn.Module):
    """Slope 1 around the origin, and 100 in the first direction where the first input is above 5."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 99 * torch.relu(x - 5) * torch.tensor([1.0, 0.0])


def test_the_search_starts_from_the_data_that_is_given() -> None:
    data = torch.zeros(12, 2)
    data[9, 0] = 6.0
    without = opnorm.lipschitz(Steep(), data[:9], method="naive")
    with_it = opnorm.lipschitz(Steep(), data, method="naive")
    assert without.lower < 2
    assert 99 < with_it.lower <= 100


def test_a_gradient_ascent_from_the_data_finds_steeper_pairs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3)).double()
    data = torch.randn(2, 6, dtype=torch.float64) * 3
    function = Function(export(model, data), (data,))
    still = attained(function, data, ascent=0)
    climbed = attained(function, data, ascent=30)
    assert still is not None and climbed is not None
    assert climbed.quotient > 1.05 * still.quotient


def test_where_all_is_flat_nearby_a_pair_farther_off_is_found() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Hardtanh(), nn.Softshrink(0.9), nn.Linear(3, 2))
    bound = opnorm.lipschitz(model, torch.zeros(4, 3) + 1e-2, method="naive")
    assert 0 < bound.lower <= bound.upper


class NoDerivative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.test_lower.twice(x)


@torch.library.custom_op("test_lower::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@register_rule("test_lower.twice.default")
def twice_rule(node: Node, build: Builder) -> int:
    return build.opaque(node, (build.source(node.args[0], node),), 2.0, "x is doubled")


def test_an_operation_without_a_derivative_still_leaves_a_quotient() -> None:
    bound = opnorm.lipschitz(NoDerivative(), torch.randn(4, 3), method="naive")
    assert bound.pair is not None
    assert bound.lower == pytest.approx(2.0, rel=1e-6) and bound.lower <= 2.0


def deep(width: int, layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU()))).double()
    for part in model:
        if isinstance(part, nn.Linear):
            nn.init.kaiming_normal_(part.weight)
    return model


def test_a_deep_network_has_a_proved_quotient_by_the_norms_of_its_layers() -> None:
    model = deep(40, 16)
    x = torch.randn(2, 40, dtype=torch.float64)
    graph = export(model, x)
    function, program = Function(graph, (x,)), program_of(graph)
    plain = naive(program, graph.weights)
    pair = attained(function, x, ascent=0)
    assert pair is not None
    alone = settled(function, pair)  # element by element the errors are larger than the difference
    assert alone.guarantee == "estimate" and alone.quotient > 0.99 * pair.quotient
    wide = settled(function, pair, reach_of(graph, program, plain), plain.total)
    assert wide.guarantee == "proved" and wide.quotient > 0.5 * pair.quotient
    exact = exact_squared_quotient(model, wide.x, wide.y)
    assert Fraction(wide.quotient) ** 2 <= exact


def test_the_errors_that_reach_the_outputs_are_above_those_of_exact_arithmetic() -> None:
    model = deep(12, 6)
    x = torch.randn(2, 12, dtype=torch.float64)
    graph = export(model, x)
    program = program_of(graph)
    doubt = evaluation_error(graph, (x,), reach_of(graph, program, naive(program, graph.weights)))
    exact = [exact_value(model, v) for v in x]
    with torch.no_grad():
        computed = model(x).tolist()
    off = [
        math.sqrt(sum((Fraction(a) - b) ** 2 for a, b in zip(row, truth, strict=True)))
        for row, truth in zip(computed, exact, strict=True)
    ]
    assert doubt is not None
    assert 0 < sum(off) <= doubt < 1e-9


class Coarse(nn.Module):
    """Below 1-Lipschitz, but evaluated through numbers between which float64 leaves gaps of 0.002."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) + 1e13 - 1e13


def test_noise_of_the_evaluation_is_no_quotient() -> None:
    data = torch.full((2, 50), 2.0**-10)
    graph = export(Coarse(), data)
    function = Function(graph, (data,))
    x, y = torch.full((2, 50), 2.0**-10, dtype=torch.float64) + torch.tensor([[0.0], [2e-4]]) * torch.randn(50)
    moved = torch.linalg.vector_norm(torch.sub(*function(torch.stack([x, y]))))
    measured = float(moved / torch.linalg.vector_norm(x - y))
    assert measured > 2
    assert settled(function, Pair(x, y, measured)).quotient <= 1
    bound = opnorm.lipschitz(Coarse(), data, method="naive")
    assert bound.lower <= bound.upper == 1.0


@pytest.mark.parametrize(
    "wrong", [torch.randn(4, 3), torch.randn(4), torch.ones(4, 5, dtype=torch.int64), torch.randn(4, 5).double()]
)
def test_data_of_a_wrong_shape_or_dtype_is_refused_in_words(wrong: Tensor) -> None:
    given = str(wrong.dtype).removeprefix("torch.")
    with pytest.raises(ArgumentError, match=f"Sequential does not take the example input: .*{given}") as found:
        opnorm.lipschitz(nn.Sequential(nn.Linear(5, 2), nn.ReLU()), wrong)
    assert str(tuple(wrong.shape[1:])) in str(found.value)


def test_what_is_no_tensor_is_refused() -> None:
    with pytest.raises(ArgumentError, match="type list"):
        opnorm.lipschitz(nn.Linear(2, 2), [[1.0, 2.0]])  # type: ignore[arg-type]
