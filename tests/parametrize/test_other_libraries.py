"""Traps of other libraries for Lipschitz layers: opnorm avoids each; theirs is documented where they are installed."""

import copy
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import opnorm
from parametrize.oracle import layer_norm, matrix_norm

# Libraries that are not ours warn of what they please.
LENIENT = pytest.mark.filterwarnings("ignore")


def first_steps_on_a_rank_one_target(layer, features=512, steps=2):
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    a, b = torch.randn(2, features, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        x = torch.randn(64, features)
        loss = (layer(x) - (x @ a)[:, None] * b / features).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer(torch.randn(2, features))


def test_a_first_step_of_rank_one_does_not_diverge():
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(nn.Linear(512, 512, bias=False))
    assert first_steps_on_a_rank_one_target(layer).isfinite().all()
    assert 1 - 1e-5 < matrix_norm(layer.eval().weight) <= 1.0


@LENIENT
def test_torchlip_diverges_after_one_weak_power_step():
    torchlip = pytest.importorskip("deel.torchlip")
    torch.manual_seed(0)
    assert first_steps_on_a_rank_one_target(torchlip.SpectralLinear(512, 512, bias=False), steps=1).isnan().any()


def evaluated_after_a_step(layer):
    """How far the evaluated outputs are from those of an evaluation that saw a training forward in between."""
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(layer.parameters(), 0.3)
    (layer(x) - 1).square().sum().backward()
    optimizer.step()
    first = layer.eval()(x).detach().clone()
    layer.train()(x)
    return float((layer.eval()(x) - first).detach().abs().max())


def test_evaluation_uses_the_weight_of_the_last_step():
    assert evaluated_after_a_step(opnorm.spectral_norm(nn.Linear(8, 8))) == 0.0


@LENIENT
def test_torchlip_evaluates_the_weight_before_the_last_step():
    torchlip = pytest.importorskip("deel.torchlip")
    assert evaluated_after_a_step(torchlip.SpectralLinear(8, 8)) > 0.1


def slope(model):
    return matrix_norm(torch.func.jacrev(model.eval())(torch.randn(8)))


@pytest.mark.parametrize("total", [0.5, 1.0, 10.0])
def test_a_constant_for_the_whole_model_is_obeyed(total):
    torch.manual_seed(0)
    model = opnorm.normalize(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)), total=total)
    product = matrix_norm(model.eval()[0].weight) * matrix_norm(model[1].weight)
    assert total * (1 - 1e-5) < product <= total * (1 + 1e-12)
    assert opnorm.lipschitz(opnorm.fold(model), torch.randn(2, 8), method="naive").product <= total * (1 + 1e-9)


@LENIENT
def test_torchlips_constant_for_the_whole_model_changes_nothing():
    torchlip = pytest.importorskip("deel.torchlip")
    layers = [torchlip.SpectralLinear(8, 8), torchlip.SpectralLinear(8, 8)]
    assert slope(torchlip.Sequential(*layers, k_coef_lip=10.0)) == pytest.approx(1.0, rel=1e-4)


def changed_by_evaluation(layer, x):
    before = {name: value.clone() for name, value in {**layer.state_dict(), **dict(layer.named_buffers())}.items()}
    layer.eval()(x), layer(x)
    after = {**layer.state_dict(), **dict(layer.named_buffers())}
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


def test_evaluation_changes_no_state():
    layer = opnorm.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))
    assert changed_by_evaluation(layer, torch.randn(1, 4, 8, 8)) == []


@LENIENT
def test_orthogonium_changes_state_in_evaluation():
    conv = pytest.importorskip("orthogonium.layers.conv.AOC").AdaptiveOrthoConv2d
    assert changed_by_evaluation(conv(4, 4, 3, padding=1, bias=False), torch.randn(1, 4, 8, 8)) != []


def reflected():
    return nn.Conv2d(8, 8, 3, padding=1, bias=False, padding_mode="reflect")


def test_reflecting_padding_is_counted_or_asked_about():
    torch.manual_seed(0)
    with pytest.raises(opnorm.errors.InputShapeError, match="input_shape"):
        opnorm.spectral_norm(reflected())
    layer = opnorm.spectral_norm(reflected(), input_shape=(8, 8, 8)).eval()
    assert 0.99 < layer_norm(reflected(), layer.weight, (8, 8, 8)) <= 1.0


@LENIENT
def test_orthogonium_accepts_reflecting_padding():
    conv = pytest.importorskip("orthogonium.layers.conv.AOC").AdaptiveOrthoConv2d
    torch.manual_seed(0)
    layer = conv(8, 8, 3, padding=1, bias=False, padding_mode="reflect")
    for _ in range(20):
        layer(torch.randn(1, 8, 8, 8))
    assert layer_norm(reflected(), layer.eval().weight, (8, 8, 8)) > 1.5


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)


@DTYPES
def test_other_dtypes(dtype):
    layer = opnorm.spectral_norm(nn.Conv2d(4, 4, 3, padding=1, bias=False)).to(dtype)
    layer(torch.randn(1, 4, 8, 8, dtype=dtype)).sum().backward()
    layer.eval()
    assert layer(torch.randn(1, 4, 8, 8, dtype=dtype)).dtype == dtype
    assert layer_norm(nn.Conv2d(4, 4, 3, padding=1, bias=False), layer.weight, (4, 8, 8)) <= 1.0


@LENIENT
@DTYPES
def test_orthogonium_fails_in_other_dtypes(dtype):
    conv = pytest.importorskip("orthogonium.layers.conv.AOC").AdaptiveOrthoConv2d
    with pytest.raises(RuntimeError):
        conv(4, 4, 3, padding=1, bias=False).to(dtype)(torch.randn(1, 4, 8, 8, dtype=dtype))


def moved_by_training(layer):
    x = torch.randn(4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    before = layer.weight.detach().clone()
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    for _ in range(3):
        loss = (layer(x) - 3).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((layer.weight.detach() - before).abs().max())


def test_depthwise_convolutions_learn():
    layer = opnorm.spectral_norm(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False))
    assert moved_by_training(layer) > 0.01
    assert layer_norm(nn.Conv2d(8, 8, 3, padding=1, groups=8), layer.eval().weight, (8, 8, 8)) <= 1.0


@LENIENT
def test_orthogoniums_depthwise_convolutions_are_frozen():
    conv = pytest.importorskip("orthogonium.layers.conv.AOC").AdaptiveOrthoConv2d
    assert moved_by_training(conv(8, 8, 3, padding=1, groups=8, bias=False)) < 1e-5


class Doubling(nn.Module):
    """A layer that nobody has a rule for, and whose constant is not 1."""

    def forward(self, x):
        return torch.special.i0(x)


def test_an_unknown_layer_never_counts_as_one():
    model = nn.Sequential(nn.Linear(4, 4), Doubling(), nn.Linear(4, 2))
    with pytest.raises(opnorm.errors.UnsupportedLayerError, match="i0"):
        opnorm.lipschitz(model, torch.randn(2, 4))
    with pytest.raises(opnorm.errors.UnsupportedLayerError, match="Doubling"):
        opnorm.norm(copy.deepcopy(model[1]))


def test_tied_logits_are_never_certified(monkeypatch):
    """By the bound of each pair of logits and the formula of the benchmark; there is no public radius yet."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    radii_of = importlib.import_module("certified_accuracy").radii_of
    torch.manual_seed(0)
    model = opnorm.normalize(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))).eval()
    model = opnorm.fold(model).double()
    with torch.no_grad():
        model[2].weight[1], model[2].bias[1] = model[2].weight[0], model[2].bias[0]
        x = torch.randn(64, 4, dtype=torch.float64)
        logits = model(x)
    pairwise = opnorm.lipschitz(model, x).pairwise
    assert pairwise is not None and pairwise[0, 2] > 0
    tied = logits.argmax(1) != 2
    assert torch.equal(logits[:, 0], logits[:, 1]) and 0 < tied.sum() < 64
    for label in (0, 1):
        assert not (radii_of(logits, torch.full((64,), label), pairwise)[tied] > 0).any()
    assert (radii_of(logits, torch.full((64,), 2), pairwise)[~tied] > 0).all()
