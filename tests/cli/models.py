"""Factories for `opnorm bound`, good and bad."""

import sys

import torch
from torch import Tensor, nn


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))


def gelu() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def nan() -> nn.Module:
    model = mlp()
    model[0].weight.data[0, 0] = float("nan")  # type: ignore[index, operator]
    return model


def raises() -> nn.Module:
    raise ValueError("two\nlines")


def leaves() -> nn.Module:
    sys.exit(0)


def no_module() -> int:
    return 3


def empty() -> nn.Module:
    return nn.Sequential()


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Cumulative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumprod(1)


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) ** 2
