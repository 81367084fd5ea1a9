"""Models as their authors write them: above a measured Jacobian norm, or unbounded for a reason that is said."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opnorm
from opnorm.network import Ball


class BasicBlock(nn.Module):
    """torchvision's ResNet-18: a sum in place, a shortcut only where it is needed."""

    def __init__(self, i: int, o: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))
        self.downsample = short if stride > 1 or i != o else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 6, 2), BasicBlock(6, 6))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def vgg() -> nn.Module:
    features: list[nn.Module] = []
    for i, o in ((3, 4), (4, 6)):
        features += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(True), nn.MaxPool2d(2, 2)]
    head = [nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 3)]
    return nn.Sequential(*features, *head)


class UNet(nn.Module):
    """Upsampling, padding to the skip's size, concatenation."""

    def __init__(self, *, learned: bool) -> None:
        super().__init__()
        self.inc, self.down = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        bilinear = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.up = nn.ConvTranspose2d(4, 4, 2, 2) if learned else bilinear
        self.out = nn.Conv2d(7, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.relu(self.inc(x))
        h = self.up(torch.relu(self.down(F.max_pool2d(skip, 2))))
        rows, columns = skip.size(2) - h.size(2), skip.size(3) - h.size(3)
        h = F.pad(h, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.out(torch.cat([skip, h], dim=1))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.n1, self.n2 = nn.Conv2d(3, 6, 4, 4), nn.LayerNorm(6), nn.LayerNorm(6)
        self.tokens = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 4))
        self.channels = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.n1(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.channels(self.n2(x))).mean(dim=1))


class ViT(nn.Module):
    """A class token, positions, heads by reshape and unbind."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.n1, self.n2 = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.LayerNorm(8)
        self.cls, self.position = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp, self.head = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), nn.Linear(8, 3)

    def attention(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1) + self.position
        x = x + self.attention(self.n1(x))
        return self.head((x + self.mlp(self.n2(x)))[:, 0])


class ConvNeXt(nn.Module):
    """The authors' two forms of LayerNorm: one over channels written by hand, one between permutations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scale = nn.Conv2d(3, 4, 4, 4), nn.Parameter(torch.ones(4))
        self.dw, self.norm = nn.Conv2d(4, 4, 7, padding=3, groups=4), nn.LayerNorm(4, eps=1e-6)
        self.p1, self.p2, self.gamma = nn.Linear(4, 8), nn.Linear(8, 4), nn.Parameter(torch.full((4,), 0.1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = self.scale[:, None, None] * ((x - u) / torch.sqrt(s + 1e-6))
        h = self.gamma * self.p2(F.gelu(self.p1(self.norm(self.dw(x).permute(0, 2, 3, 1)))))
        return self.head((x + h.permute(0, 3, 1, 2)).mean([-2, -1]))


class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Conv1d(1, 4, 1), nn.Conv1d(3, 2, 1)
        self.filters = nn.ModuleList(nn.Conv1d(4, 4, 2, dilation=2**i) for i in range(3))
        self.gates = nn.ModuleList(nn.Conv1d(4, 4, 2, dilation=2**i) for i in range(3))
        self.res = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(4, 3, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.inp(x), 0
        for f, g, r, s in zip(self.filters, self.gates, self.res, self.skips, strict=True):
            padded = F.pad(x, (f.dilation[0], 0))
            z = torch.tanh(f(padded)) * torch.sigmoid(g(padded))
            total, x = total + s(z), x + r(z)
        return self.out(F.relu(total))


def dcgan() -> nn.Module:
    convs = [nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.Conv2d(4, 8, 4, 2, 1, bias=False)]
    body = [convs[0], nn.LeakyReLU(0.2, inplace=True), convs[1], nn.BatchNorm2d(8), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*body, nn.Conv2d(8, 1, 4, 1, 0, bias=False), nn.Sigmoid())


def autoencoder() -> nn.Module:
    encoder = [nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 5)]
    up = nn.ConvTranspose2d(3, 1, 3, 2, 1, output_padding=1)
    return nn.Sequential(*encoder, nn.Linear(5, 48), nn.ReLU(), nn.Unflatten(1, (3, 4, 4)), up, nn.Sigmoid())


class Mixture(nn.Module):
    """Views, pieces, products with parameters, interpolation and operations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.conv, self.out = (
            nn.Parameter(torch.randn(8, 8) / 3),
            nn.Conv2d(4, 8, 3, padding=1),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        one, two = torch.chunk(x, 2, dim=1)
        first, second = self.conv(torch.cat([two, one], 1)).split([3, 5], dim=1)
        x = F.interpolate(torch.cat((second.relu(), first), 1), size=(h // 2, w // 2), mode="bilinear")
        x = torch.matmul(x.reshape(b, 8, -1).permute(0, 2, 1) @ self.w, self.w.t())
        x = torch.roll(x, 1, dims=1)[:, ::2].clone()
        x[:, 0].mul_(2.0)
        x.add_(1.0).mul_(0.5)
        return self.out(x).flatten(1)


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    why: str = ""  # why it has no global constant


CASES = {
    "ResNet": Case(ResNet, (3, 32, 32)),
    "VGG": Case(vgg, (3, 12, 12)),
    "UNet": Case(lambda: UNet(learned=False), (1, 9, 9)),
    "UNet, learned": Case(lambda: UNet(learned=True), (1, 9, 9)),
    "MLP-Mixer": Case(Mixer, (3, 8, 8)),
    "ViT": Case(ViT, (3, 8, 8), "attention is not globally Lipschitz"),
    "ConvNeXt": Case(ConvNeXt, (3, 12, 12)),
    "WaveNet": Case(WaveNet, (1, 12)),
    "DCGAN": Case(dcgan, (3, 16, 16)),
    "autoencoder": Case(autoencoder, (1, 8, 8)),
    "mixture": Case(Mixture, (4, 6, 6)),
}


def measured(model: nn.Module, x: Tensor) -> float:
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None].clone()).reshape(-1), x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2)) * (1 - 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_above_the_measured_norm_everywhere_and_in_a_ball(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model, x = case.make().eval(), torch.randn(3, *case.shape)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.3, 2.0)
            module.running_mean.normal_()
    everywhere = opnorm.lipschitz(model, x, method="fast", time_budget=2.0)
    near = opnorm.lipschitz(model, x, method="naive", region=Ball(x[0], 0.01), time_budget=1.0)
    twin = model.double()
    here = measured(twin, x[0].double())
    assert max(here, *(measured(twin, s * x[1].double()) for s in (0.01, 1.0))) <= everywhere.upper
    assert everywhere.lower <= everywhere.upper
    assert here <= near.upper <= everywhere.product * (1 + 1e-6)
    assert near.upper < math.inf
    assert math.isinf(everywhere.upper) == bool(case.why)
    assert not case.why or any(case.why in node.note for node in everywhere.nodes)
