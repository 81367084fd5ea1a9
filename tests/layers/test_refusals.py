"""What has no operator norm is refused by name, with a reason and a way out."""

import warnings

import pytest
import torch
from torch import nn

from opnorm.errors import NotLinearError, SeveralMatricesError, UnsupportedLayerError, WeightError
from opnorm.layers import matrices, register_layer, to_operator
from opnorm.operators import Dense


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Renamed(nn.Linear):
    """Keeps forward, so the rule holds."""


class GrandChild(Scaled):
    pass


class Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_subclasses_that_keep_forward_are_found() -> None:
    assert isinstance(to_operator(Renamed(3, 2)), Dense)


@pytest.mark.parametrize(
    "layer", [Scaled(3, 2), Standardised(2, 2, 3), GrandChild(3, 2)], ids=lambda m: type(m).__name__
)
def test_subclasses_that_override_forward_are_refused(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"overrides.*register_layer\(" + type(layer).__name__):
        to_operator(layer)


def test_a_forward_set_on_the_instance_is_refused() -> None:
    layer = nn.Linear(3, 2)
    layer.forward = lambda x: x
    with pytest.raises(UnsupportedLayerError, match="this Linear has its own forward"):
        to_operator(layer)


def test_registering_is_the_way_out() -> None:
    class Tripled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(x)

    class Child(Tripled):
        pass

    @register_layer(Tripled)
    def tripled(module: Tripled, input_shape: tuple[int, ...] | None) -> Dense:
        return Dense(3 * module.weight.detach())

    layer = Child(3, 2, bias=False)
    x = torch.randn(4, 3)
    torch.testing.assert_close(to_operator(layer).apply(x), layer(x))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_user_hooks_are_refused(register: str) -> None:
    def doubles(module, inputs, outputs=None):
        return 2 * (inputs[0] if outputs is None else outputs)

    layer = nn.Linear(3, 2)
    handle = getattr(layer, register)(doubles)
    with pytest.raises(UnsupportedLayerError, match=r"this Linear has forward hooks \(.*doubles\)"):
        to_operator(layer)
    handle.remove()
    assert to_operator(layer).in_shape == (3,)


def test_unknown_modules_are_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"no rule for Unknown: register one .*register_layer\(Unknown\)"):
        to_operator(Unknown())
    with pytest.raises(UnsupportedLayerError, match=r"measure the wrapped module, \.module"):
        to_operator(nn.DataParallel(nn.Linear(2, 2)))


def test_quantised_layers_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        layer = torch.ao.nn.quantized.dynamic.Linear(3, 2)
    with pytest.raises(UnsupportedLayerError, match="Linear is a quantised layer"):
        to_operator(layer)


def test_lazy_modules_are_refused_until_called() -> None:
    layer = nn.LazyLinear(2)
    with pytest.raises(UnsupportedLayerError, match="LazyLinear has no weights before its first call"):
        to_operator(layer)
    layer(torch.zeros(1, 5))
    assert to_operator(layer).in_shape == (5,)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(),
        nn.Softmax(dim=1),
        nn.PReLU(),
        nn.MaxPool2d(2),
        nn.LPPool2d(2, 2),
        nn.AdaptiveMaxPool1d(2),
        nn.Bilinear(2, 2, 2),
        nn.LayerNorm(3),
        nn.GroupNorm(1, 3),
        nn.RMSNorm(3),
        nn.LocalResponseNorm(2),
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, track_running_stats=False).eval(),
        nn.InstanceNorm1d(3).eval(),
        nn.Dropout(),
        nn.Embedding(3, 2, max_norm=1.0),
        nn.EmbeddingBag(3, 2, mode="max"),
    ],
    ids=str,
)
def test_not_linear(layer: nn.Module) -> None:
    with pytest.raises(NotLinearError, match=type(layer).__name__):
        to_operator(layer, (3, 4, 4))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Flatten(0), "merges the samples"),
        (nn.EmbeddingBag(3, 2, mode="mean"), "size of the bag"),
        (nn.TransformerEncoderLayer(4, 1, 4), r"one by one: self_attn"),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "layer 1: ReLU is not linear"),
        (nn.Sequential(nn.Linear(3, 2)), "last axis"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_unsupported(layer: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=message):
        to_operator(layer, (2, 3) if "last" in message else (2,))


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.MultiheadAttention(4, 2), ["q", "k", "v", "out_proj"]),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=5), ["q", "k", "v", "out_proj"]),
        (nn.LSTM(3, 2), ["weight_ih_l0", "weight_hh_l0"]),
        (nn.LSTM(3, 4, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (nn.GRU(3, 2, num_layers=2), ["weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"]),
        (
            nn.RNN(3, 2, bidirectional=True),
            ["weight_ih_l0", "weight_hh_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"],
        ),
        (nn.LSTMCell(3, 2), ["weight_ih", "weight_hh"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_several_matrices_are_listed(layer: nn.Module, names: list[str]) -> None:
    with pytest.raises(SeveralMatricesError) as raised:
        to_operator(layer)
    assert list(matrices(layer)) == names
    for name in names:
        assert f"{name} (" in str(raised.value)


def test_attention_matrices_are_the_ones_that_are_applied() -> None:
    layer = nn.MultiheadAttention(4, 1, bias=False, batch_first=True).eval()
    found = matrices(layer)
    x = torch.randn(1, 3, 4)
    scores = (x @ found["q"].mT) @ (x @ found["k"].mT).mT / 2
    expected = scores.softmax(-1) @ (x @ found["v"].mT) @ found["out_proj"].mT
    torch.testing.assert_close(layer(x, x, x)[0], expected)


def test_gates_are_split_in_torchs_order() -> None:
    layer = nn.LSTMCell(3, 2, bias=False)
    found = matrices(layer, gates=True)
    x, h, c = torch.randn(1, 3), torch.randn(1, 2), torch.randn(1, 2)
    gate = {
        g: x @ found[f"weight_ih.{g}"].mT + h @ found[f"weight_hh.{g}"].mT
        for g in ("input", "forget", "cell", "output")
    }
    cell = gate["forget"].sigmoid() * c + gate["input"].sigmoid() * gate["cell"].tanh()
    torch.testing.assert_close(layer(x, (h, c))[0], gate["output"].sigmoid() * cell.tanh())


def test_gru_gates_are_split_in_torchs_order() -> None:
    layer = nn.GRUCell(3, 2, bias=False)
    found = matrices(layer, gates=True)
    x, h = torch.randn(1, 3), torch.randn(1, 2)
    inner = {g: x @ found[f"weight_ih.{g}"].mT for g in ("reset", "update", "new")}
    outer = {g: h @ found[f"weight_hh.{g}"].mT for g in ("reset", "update", "new")}
    reset, update = ((inner[g] + outer[g]).sigmoid() for g in ("reset", "update"))
    new = (inner["new"] + reset * outer["new"]).tanh()
    torch.testing.assert_close(layer(x, h), (1 - update) * new + update * h)


def test_projection_and_plain_recurrent_weights_have_no_gates() -> None:
    assert "weight_hr_l0" in matrices(nn.LSTM(3, 4, proj_size=2), gates=True)
    assert list(matrices(nn.RNNCell(3, 2), gates=True)) == ["weight_ih", "weight_hh"]


def test_modules_of_one_matrix_are_not_split() -> None:
    with pytest.raises(UnsupportedLayerError, match="Linear is none of the modules with several matrices"):
        matrices(nn.Linear(2, 2))


def _linear(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(2, 2)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinite"),
        (torch.tensor([[1.0, float("-inf")]]), "NaN or infinite"),
        (torch.tensor([[1.0 + 1j * float("inf")]]), "NaN or infinite"),
        (torch.ones(2, 2, dtype=torch.int8), "torch.int8"),
        (torch.ones(2, 2, dtype=torch.bool), "torch.bool"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), "float8"),
        (torch.ones(2, 2, device="meta"), "meta device"),
        (torch.eye(2).to_sparse(), "to_dense"),
    ],
    ids=str,
)
def test_weights_without_a_norm(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(WeightError, match=rf"Linear: weight.*{message}"):
        to_operator(_linear(weight))


def test_variances_that_cannot_be_divided_by() -> None:
    layer = nn.BatchNorm1d(2).eval()
    layer.running_var[0] = -1.0
    with pytest.raises(WeightError, match="BatchNorm1d: running_var"):
        to_operator(layer)


def test_missing_weights() -> None:
    layer = nn.Linear(2, 2)
    layer.weight = None
    with pytest.raises(WeightError, match="Linear has no tensor 'weight'"):
        to_operator(layer)
