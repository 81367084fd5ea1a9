"""The regulariser: its value is the bound, its gradient that of finite differences, and it lowers the proved bound."""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import opnorm
from network.networks import Block, Lambda, residual
from opnorm.errors import ArgumentError, OpnormError, UnsupportedLayerError

EXAMPLE = Path(__file__).parents[2] / "examples" / "lipschitz_regulariser.py"


def digits_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.GELU(), nn.Flatten(), nn.Linear(96, 5)
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)), (6,)),
    "prelu residual": (
        lambda: Lambda(lambda x, a, p, b, o: o(x + b(p(a(x)))), nn.Linear(6, 8), nn.PReLU(8), *_pair()),
        (6,),
    ),
    "residual": (lambda: Lambda(residual, *(nn.Linear(a, b) for a, b in [(6, 8), (8, 6)] * 2), nn.Linear(6, 3)), (6,)),
    "normalised": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, 0.1), nn.ReLU(), nn.Linear(6, 2)), (4,)),
    "dense cnn": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(50, 3)),
        (1, 5, 5),
    ),
    "fourier cnn": (digits_cnn, (1, 12, 12)),
    "fourier resnet": (
        lambda: nn.Sequential(Block(2, 4), Block(4, 4, 2), nn.Flatten(), nn.Linear(4 * 36, 2)),
        (2, 12, 12),
    ),
}  # fmt: skip


def _pair() -> tuple[nn.Module, nn.Module]:
    return nn.Linear(8, 6), nn.Linear(6, 3)


def built(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = NETS[name]
    model = make()
    if "fourier cnn" in name:
        model[5] = nn.Linear(6 * 36, 5)
    return model.double(), torch.randn(2, *shape, dtype=torch.float64)


@pytest.mark.parametrize("method", ["fast", "afp"])
@pytest.mark.parametrize("name", NETS)
def test_the_gradient_is_that_of_finite_differences(name: str, method: str) -> None:
    model, x = built(name)
    penalty = opnorm.LipschitzPenalty(model, x, method=method, refresh=1000)
    assert penalty.calculus == ("fourier" if "fourier" in name else "dense")
    penalty()
    # Away from the edge of feasibility, where they would be scaled up with a kink.
    penalty._multipliers = [1.5 * s for s in penalty._multipliers]
    penalty().backward()
    weights = [(n, w) for n, w in model.named_parameters() if n in penalty.names]
    assert len(weights) >= 2
    for label, weight in weights:
        if method == "fast" and label == "layers.1.weight":
            continue  # a PReLU's share in the closed form of S counts as constant
        direction = torch.randn_like(weight)
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight.add_(step * direction)
                ends.append(float(penalty()))
                weight.sub_(step * direction)
        expected = (ends[0] - ends[1]) / 2e-6
        assert float((weight.grad * direction).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("method", ["fast", "afp"])
def test_the_value_is_just_below_what_is_proved_with_its_multipliers(method: str) -> None:
    for name in ("mlp", "residual", "dense cnn"):
        model, x = built(name)
        value = opnorm.LipschitzPenalty(model, x, method=method, iterations=30)().item()
        proved = opnorm.lipschitz(model.eval(), x, method=method).upper
        assert proved <= value * 1.03
        if method == "fast":
            assert value == pytest.approx(proved, rel=1e-6)


def test_a_float32_training_loop_lowers_the_proved_bound_as_one_compiled_graph() -> None:
    torch.manual_seed(0)
    model, x = NETS["mlp"][0](), torch.randn(64, 6)
    before = opnorm.lipschitz(model, x, method="fast").upper
    penalty = opnorm.LipschitzPenalty(model, x, method="afp", refresh=5)

    def loss(batch: Tensor) -> Tensor:
        return (model(batch)[:, 0] - batch[:, 0]).square().mean() + penalty()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    twin = loss(x)
    assert twin.dtype == torch.float32
    assert torch.allclose(compiled(x), twin)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(20):
        optimizer.zero_grad()
        compiled(x).backward()
        optimizer.step()
    assert opnorm.lipschitz(model, x, method="fast").upper < before / 1.5


def test_multipliers_are_kept_and_scaled_up_where_weights_outgrow_them() -> None:
    model, x = built("mlp")
    penalty = opnorm.LipschitzPenalty(model, x, method="afp", refresh=1000)
    small = penalty().item()
    with torch.no_grad():
        model[0].weight.mul_(10)
    assert 9.9 * small < penalty().item() < 100 * small


def test_parametrized_weights_are_read_through_their_parametrization() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(opnorm.spectral_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 3))
    stored = copy.deepcopy(model.state_dict())
    penalty = opnorm.LipschitzPenalty(model, torch.randn(2, 6))
    assert model.training
    assert all(torch.equal(v, stored[k]) for k, v in model.state_dict().items())
    penalty().backward()
    gradient = model[0].parametrizations.weight.original.grad
    assert gradient is not None
    assert float(gradient.norm()) > 0


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Linear(4, 4), Lambda(torch.square)), "unbounded"),
        (Lambda(lambda x, a: x @ (a.weight * a.weight).T, nn.Linear(4, 4)), "cannot follow"),
        (Lambda(lambda x, a: x @ a.weight, nn.Linear(4, 4)), "cannot follow"),
        (nn.ReLU(), "no weight"),
    ],
)
def test_what_cannot_be_penalised_is_refused(model: nn.Module, reason: str) -> None:
    with pytest.raises((UnsupportedLayerError, ArgumentError), match=reason):
        opnorm.LipschitzPenalty(model, torch.randn(2, 4))


def test_arguments_are_checked() -> None:
    for options in ({"method": "adam"}, {"refresh": 0}):
        with pytest.raises(OpnormError):
            opnorm.LipschitzPenalty(nn.Linear(4, 4), torch.randn(2, 4), **options)


def test_the_example_trades_accuracy_for_a_smaller_bound() -> None:
    spec = importlib.util.spec_from_file_location("lipschitz_regulariser", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    results = example.main(epochs=1)
    assert results[0.1][1] < results[0.0][1]
    assert results[0.1][0] > 0.3
