"""How close the ends are, with proof: the figures that the documentation promises."""

import pytest
import torch
from torch import nn

import opnorm
from opnorm.layers import to_operator


def convolution(channels, n, seed=0, **options):
    torch.manual_seed(seed)
    layer = nn.Conv2d(channels, channels, 3, bias=False, **{"padding": 1, **options})
    with torch.no_grad():
        layer.weight.normal_()
    return to_operator(layer, (channels, n, n))


@pytest.mark.parametrize("n, slack", [(16, 0.01), (24, 0.01), (8, 0.03)])
@pytest.mark.parametrize("channels", [16, 32])
def test_the_torus_embeds_tightly(n, slack, channels):
    found = opnorm.norm(convolution(channels, n), method="torus")
    assert found.gap <= slack and found.guarantee == "proved" and found.method == "torus"


@pytest.mark.parametrize(
    "channels, n, options",
    [
        (4, 16, {}),
        (4, 8, {}),
        (4, 16, {"padding_mode": "reflect"}),
        (4, 16, {"padding_mode": "replicate"}),
        (16, 16, {"padding_mode": "circular"}),
        (4, 12, {"padding_mode": "circular", "padding": 2}),
        (4, 16, {"stride": 2}),
        (4, 12, {"dilation": 2, "padding": 2}),
        (8, 12, {"groups": 4}),
    ],
    ids=str,
)
def test_small_and_circular_convolutions_meet_one_in_a_million(channels, n, options):
    found = opnorm.norm(convolution(channels, n, **options))
    assert found.gap <= 1e-6 and found.met and found.guarantee == "proved"


def test_the_banded_proof_is_tight_on_request():
    found = opnorm.norm(convolution(8, 20), method="banded")
    assert found.gap <= 1e-6 and found.method == "banded"


@pytest.mark.parametrize("stride", [1, 2])
def test_every_size_is_as_tight(stride):
    torch.manual_seed(3)
    assert opnorm.norm(nn.Conv2d(8, 8, 3, stride=stride)).gap <= 1e-6


def test_transposed_convolutions_are_as_tight():
    torch.manual_seed(4)
    layer = nn.ConvTranspose2d(4, 4, 4, stride=2, padding=1)
    assert opnorm.norm(layer, input_shape=(4, 8, 8)).gap <= 1e-6
