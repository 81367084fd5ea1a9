"""Models that a careless reader gets wrong: odd arguments, writes, states, layouts of the batch."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opnorm
from network.networks import Lambda
from opnorm.errors import ArgumentError, UnsupportedLayerError, WeightError


class Counting(nn.Module):
    """What it gives changes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Several(nn.Module):
    """A forward that takes any number of inputs."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat([2 * x for x in inputs], 1)


def through_data(x: Tensor) -> Tensor:
    y = x.clone()
    y.data = 3 * x
    return y


def into_integers(x: Tensor) -> Tensor:
    y = torch.zeros_like(x, dtype=torch.int64)
    y[:, 0] = 5 * x[:, 0]
    return y / 5.0


def into_the_input(x: Tensor) -> Tensor:
    x.mul_(2)
    return x[:, :1]


def into_out(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    torch.add(x, x, out=y)
    return x + y


def one_by_one(x: Tensor) -> Tensor:
    y = x * 1.0
    y.t_()
    y.mul_(2).clamp_min_(-1e9)
    return y.t()


def each_in_place(x: Tensor) -> Tensor:
    y = x * 1.0
    torch._foreach_mul_([y], 3.0)
    return y


def into_parts(x: Tensor) -> Tensor:
    y = x * 1.0
    y.unbind(1)[0].mul_(5)
    return y


def added_at(x: Tensor) -> Tensor:
    return torch.zeros(4, x.shape[0]).index_put((torch.tensor([0, 0, 1, 1]),), x.t(), accumulate=True).t()


VECTOR, LINE, IMAGE = (4,), (8,), (6, 6)
_JUMPS = "its result is of integers"
_MIXES = "mixes the samples of a batch"

# name: (model, shape of a sample, reason)
REFUSED: dict[str, tuple[nn.Module | Callable[[Tensor], Tensor], tuple[int, ...], str]] = {
    "max pooling without channels": (nn.MaxPool1d(3, 1), LINE, "batch, channels, 1 spatial"),
    "max pooling of images without channels": (nn.MaxPool2d(3, 1), IMAGE, "batch, channels, 2 spatial"),
    "adaptive pooling without channels": (nn.AdaptiveMaxPool1d(4), (6,), "batch, channels, 1 spatial"),
    "average pooling without channels": (nn.AvgPool2d(2), IMAGE, r"x\.unsqueeze\(1\)"),
    "cast to the type of another": (lambda x: x.type_as(torch.zeros(1, dtype=torch.int64)) / 5.0, VECTOR, _JUMPS),
    "sum of integers": (lambda x: x.sum(1, keepdim=True, dtype=torch.int64) / 5.0, VECTOR, _JUMPS),
    "running sum of integers": (lambda x: x.cumsum(1, dtype=torch.int64) / 5.0, VECTOR, _JUMPS),
    "write into integers": (into_integers, VECTOR, _JUMPS),
    "times a complex number": (lambda x: (x * (1 + 5j)).imag, VECTOR, "complex"),
    "over a complex number": (lambda x: (x / (1 + 5j)).imag, VECTOR, "complex"),
    "plus a complex number": (lambda x: (x + 5j).abs(), VECTOR, "complex"),
    "CELU of a negative integer": (nn.CELU(-1), VECTOR, "negative parameter"),
    "ELU of a negative number": (nn.ELU(-1.0), VECTOR, "aten.elu.*negative parameter"),
    "two samples on": (lambda x: x + x.roll(2, 0), VECTOR, _MIXES),
    "every second sample": (lambda x: x[torch.arange(x.shape[0]) % 2], VECTOR, _MIXES),
    "the size of the batch": (lambda x: x / x.shape[0], VECTOR, "or depends on how many they are"),
    "the place in the batch": (lambda x: x + torch.arange(x.shape[0])[:, None], VECTOR, _MIXES),
    "a little of another sample": (
        lambda x: (x.reshape(-1) + 1e-5 * x.t().reshape(-1)).reshape(-1, 4), VECTOR, "different orders"
    ),
    "a little of another sample, joined": (
        lambda x: torch.cat([x.reshape(-1, 1), 1e-5 * x.t().reshape(-1, 1)], 1), VECTOR, "different orders"
    ),
    "a batch in the middle": (lambda x: x.permute(1, 0, 2).reshape(-1, 3).reshape(-1), (2, 3), _MIXES),
    "a counter": (Counting(), VECTOR, "changes from call to call"),
    "a write that is not traced": (through_data, VECTOR, "computes something else"),
    "a write to a list": (each_in_place, VECTOR, "_foreach_mul"),
    "several at one place": (added_at, VECTOR, "adds to what is there"),
    "a write into parts": (into_parts, VECTOR, "fixes the size of the batch"),
    "nothing comes out": (lambda x: x[:, :0], (3,), "no output"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    model, shape, reason = REFUSED[name]
    model = model if isinstance(model, nn.Module) else Lambda(model)
    with pytest.raises(UnsupportedLayerError, match=reason):
        opnorm.lipschitz(model, torch.randn(3, *shape), method="naive", time_budget=0.2)


KNOWN: dict[str, tuple[Callable[[Tensor], object], float]] = {
    "a write into the input is no output": (into_the_input, 2.0),
    "a result that is given": (into_out, 3.0),
    "reshaped in place": (one_by_one, 2.0),
    "merged in another order": (lambda x: (2 * x).reshape(-1, 2, 2).transpose(0, 1).reshape(-1, 2), 2.0),
    "merged twice": (lambda x: (2 * x).reshape(-1, 2, 2).transpose(0, 1).reshape(-1, 2).reshape(2, -1, 2).sin(), 2.0),
    "times a larger tensor": (lambda x: x[:, :1] * torch.tensor([[3.0, 4.0]]), 5.0),
    "over a larger tensor": (lambda x: x[:, :1] / torch.tensor([[0.25], [0.5], [0.5]]).mT, 24**0.5),
    "normalised, in copies": (lambda x: (x := x[:, None]) / (x.norm(dim=2, keepdim=True) + 0.1).expand(-1, 4, 4), 20.0),
    "a part without elements": (lambda x: (3 * x, x[:, :0]), 3.0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_as_computed_by_hand(name: str) -> None:
    function, truth = KNOWN[name]
    bound = opnorm.lipschitz(Lambda(function), 0.1 * torch.randn(3, 4), time_budget=0.2)
    assert truth * (1 - 1e-6) <= bound.upper
    assert bound.lower <= truth
    assert bound.upper <= truth * 1.01


def test_a_forward_of_any_number_of_inputs() -> None:
    bound = opnorm.lipschitz(Several(), (torch.randn(3, 2), torch.randn(3, 4)), time_budget=0.3)
    assert bound.upper == pytest.approx(2.0)


def test_samples_without_elements() -> None:
    with pytest.raises(ArgumentError, match="without elements"):
        opnorm.lipschitz(nn.Identity(), torch.randn(3, 0))


@pytest.mark.parametrize("threshold", [0, 1.0, -5])
def test_softplus_with_a_low_threshold_jumps(threshold: float) -> None:
    assert opnorm.lipschitz(nn.Softplus(1, threshold), torch.randn(3, 4), time_budget=0.2).upper == math.inf
    assert opnorm.lipschitz(nn.Softplus(0.1), torch.randn(3, 4), time_budget=0.2).upper == 1.0


def test_several_labels_choose_a_factor_for_each_column() -> None:
    class Labelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding.from_pretrained(torch.tensor([[1.0, 2.0, 30.0], [-1.0, 2.0, 5.0]]))

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return (x * self.table(label))[:, 0]

    labels = torch.tensor([[0, 1, 1], [1, 0, 0]])
    bound = opnorm.lipschitz(Labelled(), (torch.randn(2, 3, 3), labels), time_budget=0.3)
    assert bound.upper == pytest.approx(30.0)


def test_attention_with_weights_and_a_write() -> None:
    def forward(x: Tensor, attention: nn.Module) -> Tensor:
        out = attention(x, x, x)[0].clone()
        out[:, 0] = 0
        return out

    torch.manual_seed(0)
    model = Lambda(forward, nn.MultiheadAttention(6, 3, batch_first=True)).eval()
    region = opnorm.network.NormBall(1.0)
    bound = opnorm.lipschitz(model, torch.randn(3, 3, 6), method="naive", region=region, time_budget=0.5)
    assert 0 < bound.lower <= bound.upper


REGIONS: dict[str, tuple[nn.Module, opnorm.network.Ball | opnorm.network.Box, float]] = {
    "a view that merges the batch": (
        Lambda(lambda x: (3 * x.view(-1, 2)).abs().view(-1, 4)), opnorm.network.Ball(torch.zeros(4), 1.0), 3.0
    ),
    "a BatchNorm in its functional form": (
        Lambda(lambda x, norm: written(norm(x)), nn.BatchNorm1d(4)).eval(), opnorm.network.Ball(torch.zeros(4), 1), 1.0
    ),
    "one point": (nn.ReLU(), opnorm.network.Box(3 * torch.ones(4), 3 * torch.ones(4)), 0.0),
}  # fmt: skip


def written(y: Tensor) -> Tensor:
    y[:, 0] = 0
    return y


@pytest.mark.parametrize("name", REGIONS)
def test_on_a_region(name: str) -> None:
    model, region, truth = REGIONS[name]
    bound = opnorm.lipschitz(model, torch.randn(3, 4), region=region, time_budget=0.3)
    assert bound.lower <= truth
    assert truth * (1 - 1e-4) <= bound.upper <= max(1.0, truth) * 1.01


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf, "1"])
def test_a_time_that_is_none(seconds: float) -> None:
    with pytest.raises(ArgumentError, match="time_budget"):
        opnorm.lipschitz(nn.ReLU(), torch.randn(3, 4), time_budget=seconds)


@pytest.mark.parametrize(
    "region",
    [
        opnorm.network.Ball(0.0, 1.0),  # type: ignore[arg-type]
        opnorm.network.Ball(torch.zeros(4), "1"),  # type: ignore[arg-type]
    ],
)
def test_a_region_that_is_none(region: opnorm.network.Ball) -> None:
    with pytest.raises(ArgumentError, match="region"):
        opnorm.lipschitz(nn.ReLU(), torch.randn(3, 4), region=region)


def test_a_variance_below_zero() -> None:
    norm = nn.BatchNorm1d(4).eval()
    norm.running_var[1] = -5.0
    with pytest.raises(WeightError, match=r"variance.*not positive.*batch_norm"):
        opnorm.lipschitz(norm, torch.randn(3, 4))


def test_huge_weights_have_a_bound() -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(4, 4).double(), nn.ReLU())]
    for layer in layers[::2]:
        layer.weight.data.mul_(1e80)
    bound = opnorm.lipschitz(nn.Sequential(*layers), torch.randn(3, 4).double(), method="rescaled", time_budget=0.3)
    assert bound.upper == math.inf


def test_the_functional_form_is_the_same_network() -> None:
    def forward(x: Tensor, conv: nn.Module, norm: nn.Module, linear: nn.Module) -> Tensor:
        h = conv(x)
        h[:, :, 0] = 0  # the graph is made functional
        h = F.max_pool2d(F.relu(norm(h)), 2)
        return linear(h.flatten(1))

    torch.manual_seed(0)
    model = Lambda(forward, nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Linear(8, 3)).eval()
    bound = opnorm.lipschitz(model, torch.randn(3, 1, 4, 4), time_budget=0.5)
    assert 0.3 * bound.upper < bound.lower <= bound.upper <= bound.product
