"""A small convolutional network on the packaged digits, trained plain or under one of the two spectral norms."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from opnorm.data import Digits
from opnorm.parametrize import fold, normalize

BATCH, RATE = 64, 3e-3
SHARPNESS = 8.0
"""Of the softmax in training, the same for all: the outputs of a 1-Lipschitz network lie close together."""


class DigitsNet(nn.Sequential):
    """A small convolutional network on images of shape (1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        layers = {
            "conv1": nn.Conv2d(1, 8, 3, padding=1),
            "relu1": nn.ReLU(),
            "conv2": nn.Conv2d(8, 8, 3, padding=1),
            "relu2": nn.ReLU(),
            "conv3": nn.Conv2d(8, 16, 3, stride=2, padding=1),
            "relu3": nn.ReLU(),
            "flatten": nn.Flatten(),
            "linear1": nn.Linear(256, 64),
            "relu4": nn.ReLU(),
            "linear2": nn.Linear(64, 10),
        }
        for name, layer in layers.items():
            self.add_module(name, layer)


def weighted(net: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return the layers that have weights, by name, in order."""
    return {name: layer for name, layer in net.named_children() if isinstance(layer, nn.Conv2d | nn.Linear)}


def train_plain(data: Digits, epochs: int, step: Callable[[], None]) -> nn.Module:
    """Train without any normalisation."""
    return _deployed(_fitted(DigitsNet(), data, epochs, step))


def train_with_torch(data: Digits, epochs: int, step: Callable[[], None]) -> nn.Module:
    """Train under torch's `spectral_norm`; the result has the weights that torch evaluates with."""
    net = DigitsNet()
    for layer in weighted(net).values():
        spectral_norm(layer)
    _fitted(net, data, epochs, step)
    for layer in weighted(net).values():
        parametrize.remove_parametrizations(layer, "weight")
    return _deployed(net)


def train_with_opnorm(data: Digits, epochs: int, step: Callable[[], None]) -> nn.Module:
    """Train under `opnorm.normalize`; the result has the proved weights."""
    net = normalize(DigitsNet(), data.train_images[:1])
    return _deployed(fold(_fitted(net, data, epochs, step)))


def _fitted(net: DigitsNet, data: Digits, epochs: int, step: Callable[[], None]) -> DigitsNet:
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    for _ in range(epochs):
        step()
        for batch in torch.split(torch.randperm(len(data.train_labels)), BATCH):
            outputs = net(data.train_images[batch])
            loss = nn.functional.cross_entropy(SHARPNESS * outputs, data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net.eval()


def _deployed(net: nn.Module) -> nn.Module:
    return net.eval().requires_grad_(False)
