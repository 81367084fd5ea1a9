"""Recurrent layers of a fixed length: bounded everywhere by their gates, and closely on a region."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import opnorm
from network.networks import Lambda
from opnorm.graph import Ref, export
from opnorm.network import Ball
from opnorm.network.rules import Builder


def sequences(layer: nn.Module) -> nn.Module:
    return Lambda(lambda x, layer: layer(x)[0], layer)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "rnn": (lambda: sequences(nn.RNN(3, 4, batch_first=True)), (2, 3), 0.1),
    "rnn relu, two layers": (lambda: sequences(nn.RNN(3, 4, 2, "relu", batch_first=True)), (2, 3), 0.1),
    "lstm": (lambda: sequences(nn.LSTM(3, 4, batch_first=True)), (2, 3), 0.1),
    "lstm both ways": (lambda: sequences(nn.LSTM(3, 2, batch_first=True, bidirectional=True)), (2, 3), 0.1),
    "lstm projected": (lambda: sequences(nn.LSTM(3, 4, proj_size=2, batch_first=True)), (2, 3), 0.1),
    "lstm's last state": (lambda: Lambda(lambda x, m: m(x)[1][1][0], nn.LSTM(3, 4, batch_first=True)), (2, 3), 0.1),
    "gru": (lambda: sequences(nn.GRU(3, 4, batch_first=True)), (2, 3), 0.1),
    "lstm cell": (lambda: sequences(nn.LSTMCell(3, 4)), (3,), 0.1),
    "gru cell": (lambda: nn.GRUCell(3, 4), (3,), 0.1),
    "rnn cell": (lambda: nn.RNNCell(3, 4), (3,), 0.1),
    "gated sum": (lambda: Lambda(lambda x, a, b: torch.tanh(a(x)) * torch.sigmoid(b(x)), *_pair()), (4,), 0.1),
    "gate of one channel": (
        lambda: Lambda(lambda x, a, b: a(x).clamp(-2, 3) * torch.sigmoid(b(x)).mean(1, keepdim=True), *_pair()),
        (4,),
        0.1,
    ),
}


def _pair() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(4, 4), nn.Linear(4, 4)


def slope(model: nn.Module, x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0].reshape(-1), x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2)) * (1 - 1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_bounds_hold_everywhere_and_on_a_region(name: str) -> None:
    torch.manual_seed(0)
    make, shape, radius = LAYERS[name]
    model = make().eval()
    for weight in model.parameters():
        weight.data.mul_(2)
    center = torch.randn(shape)
    everywhere = opnorm.lipschitz(model, center[None], method="fast", time_budget=0.5)
    near = opnorm.lipschitz(model, center[None], method="fast", region=Ball(center, radius), time_budget=0.5)
    assert everywhere.guarantee == near.guarantee == "proved"
    twin = model.double()
    for scale in (0.0, 0.3, 3.0, 30.0):
        assert slope(twin, scale * torch.randn(shape).double()) <= everywhere.upper < math.inf
    for _ in range(5):
        offset = torch.randn(shape).double()
        assert slope(twin, center + radius * offset / offset.norm()) <= near.upper
    assert near.upper < 40 * near.lower


def test_a_region_is_needed_where_a_factor_is_not_bounded() -> None:
    model = Lambda(lambda x, a, b: a(x) * torch.sigmoid(b(x)), *_pair())
    bound = opnorm.lipschitz(model, torch.randn(1, 4), method="fast")
    assert bound.upper == math.inf
    assert any("give a region" in node.note for node in bound.nodes)


RANGED: dict[str, Callable[..., Tensor]] = {
    "linear of tanh": lambda x, a: a(torch.tanh(x)),
    "sum": lambda x, a: torch.sigmoid(x) - 2 * torch.tanh(x) + 3,
    "product": lambda x, a: torch.tanh(x) * x.clamp(-2, 0.5),
    "pieces": lambda x, a: torch.cat([torch.tanh(x).chunk(2, 1)[1], torch.sigmoid(x)[:, :1].flip(1)], 1),
    "convex": lambda x, a: (torch.tanh(x) - x.clamp(0, 2)) * torch.sigmoid(a(x)) + x.clamp(0, 2),
    "one end": lambda x, a: torch.relu(x).clamp_max(3.0),
    "scaled": lambda x, a: -1.5 * torch.softmax(x, 1),
}


@pytest.mark.parametrize("name", RANGED)
def test_ranges_hold_what_is_met_and_are_close(name: str) -> None:
    torch.manual_seed(0)
    model = Lambda(RANGED[name], nn.Linear(4, 4)).eval().double()
    graph = export(model, torch.randn(2, 4).double())
    low, high = Builder(graph, graph.weights).ranges.of(Ref(graph.outputs[0]))
    with torch.no_grad():
        values = model(10 * torch.randn(20000, 4).double())
    assert low <= float(values.min())
    assert float(values.max()) <= high
    assert high - low <= 2.6 * float(values.max() - values.min())
