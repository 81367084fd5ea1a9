"""Writing to `layer.weight`: initialisation and assignment reach the raw weight, everything else says so."""

import pytest
import torch
from torch import nn

import opnorm
from parametrize.oracle import matrix_norm

INITS = {
    **{
        name: getattr(nn.init, name)
        for name in (
            "normal_", "uniform_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_",
            "trunc_normal_", "orthogonal_", "eye_", "zeros_", "ones_",
        )
    },
    "constant_": lambda w: nn.init.constant_(w, 0.3),
    "sparse_": lambda w: nn.init.sparse_(w, 0.2),
    "init of .data": lambda w: nn.init.normal_(w.data, 0.0, 0.02),
    ".data.normal_": lambda w: w.data.normal_(0.0, 0.02),
    ".data.copy_": lambda w: w.data.copy_(torch.eye(6)),
}  # fmt: skip


def linear():
    torch.manual_seed(0)
    return opnorm.spectral_norm(nn.Linear(6, 6))


@pytest.mark.parametrize("name", INITS)
def test_initialisation_writes_the_raw_weight(name):
    layer, plain = linear(), nn.Linear(6, 6)
    torch.manual_seed(3)
    INITS[name](plain.weight)
    torch.manual_seed(3)
    weight = layer.weight
    INITS[name](weight)
    assert torch.equal(layer.parametrizations.weight.original, plain.weight)
    # The handle that was written to and a fresh one show the new value.
    for seen in (weight, layer.weight):
        assert matrix_norm(seen) == pytest.approx(0.0 if name == "zeros_" else 1.0, abs=1e-4)


def test_dirac_on_a_convolution():
    layer = opnorm.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))
    nn.init.dirac_(layer.weight)
    assert float(layer.parametrizations.weight.original.detach().sum()) == 4.0
    assert float(layer.weight.detach().sum()) == pytest.approx(4.0, rel=1e-4)


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(2),
        lambda w: w.data.mul_(2),
        lambda w: w.clamp_(-0.1, 0.1),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.data.add_(1),
        lambda w: w.data.__imul__(2),
    ],
)
def test_other_writes_are_refused_with_the_way_out(write):
    layer = linear()
    with torch.no_grad(), pytest.raises(opnorm.errors.ArgumentError, match=r"assign.*layer\.weight"):
        write(layer.weight)


def test_assignment():
    layer = linear()
    layer.weight = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0, 1.0, 1.0]))
    assert layer.weight[1, 1].item() == pytest.approx(0.5, rel=1e-4)
    layer.weight = torch.eye(6) * 7
    assert matrix_norm(layer.eval().weight) <= 1.0


def test_the_weight_describes_itself_without_being_computed():
    layer = linear()
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.ndim, weight.requires_grad) == ((6, 6), torch.float32, 2, True)
    assert weight._value is None
    assert isinstance(weight + 0, torch.Tensor) and type(weight + 0) is torch.Tensor
    assert weight._value is not None and "tensor(" in repr(weight)


def test_freezing_reaches_the_raw_weight():
    layer = linear()
    layer.weight.requires_grad_(False)
    assert not layer.parametrizations.weight.original.requires_grad
