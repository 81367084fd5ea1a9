"""The forward of a normalised layer in evaluation: the plain layer's with the proved weight, whatever happened."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import opnorm
from opnorm.errors import ArgumentError

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 6)),
    "without bias": (lambda: nn.Linear(6, 5, bias=False), (2, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 8)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 8, 8)),
    "groups": (lambda: nn.Conv2d(4, 4, 3, stride=2, groups=2), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 3), (1, 2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), (2, 3, 4, 4)),
    "channels last": (lambda: nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last), (2, 3, 8, 8)),
    "gaps in memory": (lambda: _with_gaps(nn.Linear(6, 5)), (2, 6)),
}


def _with_gaps(layer):
    layer.weight = nn.Parameter(torch.randn(5, 12)[:, :6])
    return layer


def written_by_numpy(layer):
    layer.parametrizations.weight.original.detach().numpy()[...] *= 3
    layer.parametrizations.weight.original.detach().numpy()[...] += 0.5


def bias_written(layer):
    if layer.bias is not None:
        layer.bias.data = torch.randn_like(layer.bias)


def bias_replaced(layer):
    out = layer.weight.shape[1 if isinstance(layer, nn.ConvTranspose2d) else 0]
    layer.bias = nn.Parameter(torch.randn(out), requires_grad=False)


def bias_parametrized(layer):
    if layer.bias is not None:
        parametrize.register_parametrization(layer, "bias", nn.Tanh())


def bias_computed(layer):
    if layer.bias is not None:
        bias = layer.bias.detach()
        del layer.bias
        layer.register_buffer("bias", 2 * bias)


CHANGES = {
    change.__name__.replace("_", " "): change
    for change in (written_by_numpy, bias_written, bias_replaced, bias_parametrized, bias_computed)
}


@pytest.mark.parametrize(("name", "change"), [*itertools.product(LAYERS, CHANGES)])
def test_evaluation_is_the_folded_layer(name, change):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    layer, x = opnorm.spectral_norm(build()).eval().requires_grad_(False), torch.randn(shape)

    def follows():
        fresh = copy.deepcopy(layer).train().eval()  # looks at every bit again
        weight = fresh.parametrizations.weight
        bias = fresh.bias
        plain = build()
        plain.weight = nn.Parameter(weight[0].deployed(weight.original), requires_grad=False)
        plain.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        # Twice, as the second call takes what the first one kept; and by the argument's own name.
        return all(torch.equal(y, plain(x)) for y in (layer(x), layer(x), layer(input=x)))

    assert follows()
    CHANGES[change](layer)
    assert follows()


class Clipping(nn.Conv2d):
    """It changes the weight that it is given, which would be the one that is kept."""

    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight.clamp_(-0.1, 0.1), bias)


class Halving(nn.Linear):
    """What it does with the product is its own affair."""

    def forward(self, input):
        return super().forward(input) / 2


def test_a_subclass_keeps_its_own():
    halving = opnorm.spectral_norm(Halving(6, 5), norm="reshaped").eval().requires_grad_(False)
    clipping = opnorm.spectral_norm(Clipping(3, 4, 3), norm="reshaped").eval().requires_grad_(False)
    x = torch.randn(2, 6)
    for _ in range(2):
        assert torch.equal(halving(x), nn.functional.linear(x, halving.weight.clone(), halving.bias) / 2)
        with pytest.raises(ArgumentError, match="would be lost"):
            clipping(torch.randn(2, 3, 8, 8))


def test_a_transposed_convolution_takes_the_output_size():
    layer, x = (
        opnorm.spectral_norm(nn.ConvTranspose1d(3, 4, 3, stride=2)).eval().requires_grad_(False),
        torch.ones(3, 5),
    )
    plain, x = opnorm.fold(layer), torch.ones(3, 5)
    for size in ([11], [12], [11]):
        assert torch.equal(layer(x, output_size=size), plain(x, size))


def test_removal_leaves_the_layers_own_forward():
    layer = opnorm.spectral_norm(nn.Linear(6, 5)).eval().requires_grad_(False)
    x = torch.randn(2, 6)
    before = layer(x)
    parametrize.register_parametrization(layer, "bias", nn.Identity())  # so that the class stays
    opnorm.remove_spectral_norm(layer)
    assert torch.equal(layer(x), before)
    layer.weight.data = torch.zeros(5, 6)
    assert torch.equal(layer(x), layer.bias.expand(2, 5))
    assert type(layer).forward is nn.Linear.forward


def test_torch_can_take_the_raw_weight_back():
    layer, x = opnorm.spectral_norm(nn.Linear(6, 5)), torch.randn(2, 6)
    layer.extra = nn.Parameter(torch.ones(1))
    parametrize.register_parametrization(layer, "extra", nn.Tanh())  # so that the class stays
    layer.eval().requires_grad_(False)(x)
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
