"""What whole-model functions refuse: the message names the layer and the way out, and the model is as it was."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import opnorm
from opnorm.errors import ArgumentError, InputShapeError, UnsupportedLayerError, WeightError
from parametrize.oracle import matrix_norm

hook, param = nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def reflecting():
    return nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")


def broken(layer):
    nn.init.constant_(next(iter(layer.parameters())), float("nan"))
    return layer


def norm_first():
    return nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)).eval()


EXAMPLE = torch.randn(2, 3)
CASES = {
    "no size": (reflecting, opnorm.normalize, InputShapeError, r"1: .*normalize\(model, example_input\)"),
    "NaN": (lambda: broken(nn.Linear(3, 3)), opnorm.normalize, WeightError, r"1: .*NaN.*skip=\['1'\]"),
    "overridden": (lambda: Doubled(3, 3), opnorm.normalize, UnsupportedLayerError, r"1: Doubled overrides.*skip"),
    "torch's": (lambda: param(nn.Linear(3, 3)), opnorm.normalize, ArgumentError, r"1: .*opnorm\.convert"),
    "lazy": (lambda: nn.LazyLinear(3), opnorm.normalize, WeightError, r"1: .*call the model once"),
    "a matrix of several": (
        lambda: broken(nn.LSTM(3, 3)), lambda model: opnorm.spectral_norm(model[1], None), WeightError, "weight_ih_l0",
    ),
    "convert, no size": (
        lambda: param(reflecting()), lambda model: opnorm.convert(model, norm="operator"), InputShapeError,
        r"1: .*convert\(model, example_input\)",
    ),
    "convert, NaN": (lambda: broken(param(nn.Linear(3, 3, bias=False))), opnorm.convert, WeightError, r"1: .*NaN"),
    "convert, NaN, hook": (lambda: broken(hook(nn.Linear(3, 3, bias=False))), opnorm.convert, WeightError, r"1: .*NaN"),
    "convert, other parametrization": (
        lambda: parametrize.register_parametrization(param(nn.Linear(3, 3)), "weight", nn.Identity()), opnorm.convert,
        ArgumentError, r"1\.weight has other",
    ),
    "no BatchNorm to fold": (
        norm_first, lambda model: opnorm.normalize(model, EXAMPLE, fold_batch_norm=True), ArgumentError,
        "folds nothing",
    ),
    "a container": (nn.ReLU, opnorm.spectral_norm, ArgumentError, r"opnorm\.normalize\(model\)"),
    "K of a model": (nn.ReLU, lambda model: opnorm.normalize(model, lipschitz=-1), ArgumentError, r"^lipschitz=-1"),
    "K in words": (nn.ReLU, lambda model: opnorm.normalize(model, lipschitz="one"), ArgumentError, "lipschitz='one'"),
    "half an iteration": (
        nn.ReLU, lambda model: opnorm.normalize(model, n_power_iterations=1.5), ArgumentError, r"iterations=1\.5",
    ),
    "one name to skip": (nn.ReLU, lambda model: opnorm.normalize(model, skip="head"), ArgumentError, r"\['head'\]"),
    "no such axis": (
        nn.ReLU, lambda model: opnorm.spectral_norm(model[0], dim=2, norm="reshaped"), ArgumentError, "has 2 axes",
    ),
    "unknown mode": (nn.ReLU, lambda model: opnorm.Projector(model, mode="cut"), ArgumentError, "mode='cut'"),
    "K of 0": (nn.ReLU, lambda model: opnorm.Projector(model, 0.0), ArgumentError, r"lipschitz=0\.0"),
    "unknown norm": (nn.ReLU, lambda model: opnorm.Monitor(model, norm="l1"), ArgumentError, "norm='l1'"),
    "nothing to skip": (nn.ReLU, lambda model: opnorm.Monitor(model, skip=["x"]), ArgumentError, r"\['x'\]"),
    "monitor, no size": (reflecting, opnorm.Monitor, InputShapeError, r"1: .*input_shapes=\{'1': \.\.\.\}"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_refusal_names_the_layer_and_changes_nothing(case):
    make, act, error, message = CASES[case]
    first = param(nn.Linear(3, 3)) if case.startswith("convert") else nn.Linear(3, 3)
    model = nn.Sequential(first, make())
    kinds = [type(module) for module in model.modules()]
    parameters = dict(model.named_parameters())
    with pytest.raises(error, match=message):
        act(model)
    assert [type(module) for module in model.modules()] == kinds
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_a_batch_norm_that_stays_is_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    with pytest.warns(UserWarning, match=r"^3 not folded"):
        opnorm.normalize(model, EXAMPLE, fold_batch_norm=True)
    assert isinstance(model[1], nn.Identity) and isinstance(model[3], nn.BatchNorm1d)


@pytest.mark.parametrize("total", [0.1, 3.0, 7.0])
def test_a_total_is_kept_exactly_and_counts_what_is_normalised_already(total):
    layers = [nn.Linear(4, 4, bias=False) for _ in range(5)]
    opnorm.spectral_norm(layers[0], lipschitz=1.7)
    model = opnorm.normalize(nn.Sequential(*layers), total=total)
    bounds = [Fraction(layer.parametrizations.weight[0].lipschitz) for layer in model]
    assert bounds[0] == Fraction(1.7)
    assert Fraction(total) * (1 - Fraction(1, 10**14)) < math.prod(bounds) <= Fraction(total)


def test_a_projector_divides_nothing_where_a_weight_is_broken():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    projector = opnorm.Projector(model, 0.1)
    projector.step_()
    with torch.no_grad():
        model[0].weight.mul_(9)
        model[1].weight[1, 2] = float("inf")
    kept = model[0].weight.detach().clone()
    with pytest.raises(WeightError, match=r"^1\.weight holds NaN"):
        projector.step_()
    assert torch.equal(model[0].weight, kept)


def test_the_monitor_shows_broken_weights_and_the_largest_of_stacked_matrices():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 3), nn.MultiheadAttention(4, 2)])
    with torch.no_grad():
        model[1].in_proj_weight[4:8] = torch.outer(torch.ones(4), torch.arange(4.0))  # k is of rank one
    monitor = opnorm.Monitor(model)
    monitor()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    found = monitor()
    assert math.isnan(found["0.weight/norm"]) and math.isnan(found["0.weight/stable_rank"])
    assert found["1.in_proj_weight/norm"] == pytest.approx(matrix_norm(model[1].in_proj_weight[4:8]), rel=1e-5)
    assert found["1.in_proj_weight/stable_rank"] == pytest.approx(1.0, rel=1e-5)
    assert found["1.in_proj_weight/gap"] < 1e-5
    assert math.isnan(opnorm.Monitor(model)()["0.weight/gap"])  # from the first call on
    broken = opnorm.spectral_norm(nn.Linear(3, 3)).eval()
    nn.init.constant_(broken.parametrizations.weight.original, math.nan)
    assert math.isnan(opnorm.Monitor(broken)()["weight/norm"])
