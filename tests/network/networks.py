"""Networks as users write them: each a function that builds the model, and the shape of one sample."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Net:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        model = self.make().eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_var.uniform_(0.2, 3.0)
                nn.init.uniform_(module.weight, -2.0, 2.0)
        return model


class Lambda(nn.Module):
    """Layers and a forward in one expression."""

    def __init__(self, forward: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int = 1, act: nn.Module | None = None) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.c2, self.b2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.act = act or nn.ReLU(inplace=True)
        self.short = nn.Conv2d(i, o, 1, stride) if stride > 1 or i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.b1(self.c1(x)))
        return self.act(self.b2(self.c2(h)) + self.short(x))


class MaxMin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


class GroupSort(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 4)).sort(2)[0].flatten(1, 2)


def mlp(*sizes: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


def head(channels: int, points: int, out: int = 3) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(channels * points, out)]


def residual(x: Tensor, *layers: nn.Module) -> Tensor:
    for a, b in zip(layers[:-1:2], layers[1:-1:2], strict=True):
        x = x + b(torch.relu(a(x)))
    return layers[-1](x)


def badly_scaled(net: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        for factor, layer in zip((1e-6, 1e7, 1e-3, 30.0), (m for m in net if isinstance(m, nn.Linear)), strict=False):
            layer.weight.mul_(factor * torch.logspace(-3, 3, len(layer.weight))[:, None])
    return net


def near_rank_one(net: nn.Sequential) -> nn.Sequential:
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                m, n = layer.weight.shape
                layer.weight.copy_(torch.ones(m, n) + 1e-4 * torch.randn(m, n))
    return net


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, lambda: nn.GELU("tanh"), nn.SiLU,
    nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.LogSigmoid, nn.Softsign,
    nn.Tanhshrink, nn.Softshrink, nn.RReLU, lambda: nn.LeakyReLU(1.7), lambda: nn.ELU(2.0),
]  # fmt: skip

DENSE = [
    Net("mlp", lambda: mlp(6, 12, 12, 4), (6,)),
    Net("badly scaled", lambda: badly_scaled(mlp(6, 10, 10, 4)), (6,)),
    Net("near rank one", lambda: near_rank_one(mlp(6, 10, 10, 4)), (6,)),
    Net("one neuron", lambda: mlp(1, 1, 1), (1,)),
    Net("linear", lambda: nn.Linear(5, 3), (5,)),
    Net("dead", lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).apply(lambda m: m.weight.data.zero_() if isinstance(m, nn.Linear) else None), (4,)),
    Net("residual", lambda: Lambda(residual, *(nn.Linear(a, b) for a, b in [(6, 8), (8, 6)] * 3), nn.Linear(6, 3)), (6,)),
    Net("maxmin", lambda: nn.Sequential(nn.Linear(6, 8), MaxMin(), nn.Linear(8, 8), MaxMin(), nn.Linear(8, 3)), (6,)),
    Net("groupsort", lambda: nn.Sequential(nn.Linear(6, 8), GroupSort(), nn.Linear(8, 3)), (6,)),
    Net("concat", lambda: Lambda(lambda x, a, b, c: c(torch.cat([torch.relu(a(x)), x, torch.tanh(b(x))], 1)), nn.Linear(5, 4), nn.Linear(5, 3), nn.Linear(12, 3)), (5,)),
    Net("dense block", lambda: Lambda(lambda x, a, b: torch.cat([h := torch.cat([x, torch.relu(a(x))], 1), torch.relu(b(h))], 1), nn.Linear(4, 4), nn.Linear(8, 4)), (4,)),
    Net("layer norm", lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, eps=0.1), nn.Linear(8, 3)), (6,)),
    Net("rms norm", lambda: nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8, eps=0.1), nn.Linear(8, 3)), (6,)),
    Net("softmax", lambda: nn.Sequential(nn.Linear(6, 8), nn.Softmax(1), nn.Linear(8, 3)), (6,)),
    Net("log softmax", lambda: nn.Sequential(nn.Linear(6, 8), nn.LogSoftmax(1)), (6,)),
    Net("subtract", lambda: Lambda(lambda x, a: 2 * x - 0.3 * torch.relu(a(x)) / 7 + 1, nn.Linear(5, 5)), (5,)),
    Net("same twice", lambda: Lambda(lambda x, a: x + x - a(x), nn.Linear(5, 5)), (5,)),
    Net("slices", lambda: Lambda(lambda x, a: torch.relu(a(x))[:, 2:6].flip(1) * 3, nn.Linear(5, 8)), (5,)),
    Net("stack", lambda: Lambda(lambda x, a: torch.stack([torch.relu(a(x)), x], 1).sum(1), nn.Linear(5, 5)), (5,)),
    Net("tokens", lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4), nn.Flatten(), nn.Linear(12, 2)), (3, 4)),
    Net("matmul", lambda: Lambda(lambda x, a: torch.relu(x @ a.weight.T) @ a.weight, nn.Linear(5, 5)), (5,)),
    Net("maximum with zero", lambda: Lambda(lambda x, a: torch.maximum(a(x), torch.zeros(1)), nn.Linear(5, 5)), (5,)),
    Net("clamp", lambda: Lambda(lambda x, a: a(x).clamp(-0.3, 0.5).abs(), nn.Linear(5, 5)), (5,)),
    Net("amax", lambda: Lambda(lambda x, a: a(x).amax(1, keepdim=True), nn.Linear(5, 5)), (5,)),
    *(Net(f"activation {i}", lambda act=act: mlp(4, 6, 3, act=act), (4,)) for i, act in enumerate(ACTIVATIONS)),
]  # fmt: skip

IMAGES = [
    Net("cnn", lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), *head(4, 25)), (2, 5, 5)),
    Net("circular", lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.ReLU(), *head(4, 25)), (2, 5, 5)),
    Net("conv after conv", lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), *head(2, 16)), (1, 4, 4)),
    Net("leaky", lambda: nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.LeakyReLU(0.3), nn.Conv2d(3, 2, 3, padding=1), nn.LeakyReLU(1.5), *head(2, 16)), (1, 4, 4)),
    Net("stride", lambda: nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), (2, 7, 7)),
    Net("stride 3, kernel 5", lambda: nn.Sequential(nn.Conv2d(1, 2, 5, 3, 2, dilation=1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=2, dilation=2), nn.ReLU()), (1, 8, 8)),
    Net("resnet", lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), Block(3, 3), Block(3, 4, 2), Block(4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), (2, 6, 6)),
    Net("leaky resnet", lambda: nn.Sequential(Block(2, 3, 2, nn.LeakyReLU(0.2)), Block(3, 3, 1, nn.GELU()), *head(3, 9)), (2, 6, 6)),
    Net("max pool", lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), *head(3, 4)), (2, 8, 8)),
    Net("avg pool", lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d(2), *head(3, 4)), (2, 6, 6)),
    Net("avg pool uneven", lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.AvgPool2d(2, ceil_mode=True), *head(3, 9)), (2, 7, 7)),
    Net("avg pool edges", lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1, count_include_pad=False), nn.Flatten()), (1, 5, 5)),
    Net("adaptive", lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(2), nn.Flatten()), (1, 7, 7)),
    Net("groups", lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1, groups=4), nn.ReLU(), *head(8, 16)), (4, 4, 4)),
    Net("transposed", lambda: nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(2, 1, 4, 2, 1)), (1, 6, 6)),
    Net("upsample", lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Upsample(scale_factor=2), nn.ReLU(), nn.Conv2d(2, 1, 3)), (1, 4, 4)),
    Net("bilinear", lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Upsample(scale_factor=2, mode="bilinear")), (1, 4, 4)),
    Net("pixel shuffle", lambda: nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(1, 1, 3)), (1, 4, 4)),
    Net("padding layers", lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(1, 2, 3), nn.ReplicationPad2d(2), nn.ReLU(), nn.ConstantPad2d(1, 0.7), nn.Conv2d(2, 1, 3)), (1, 4, 4)),
    Net("1d", lambda: nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv1d(3, 3, 3, 2, 1), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(6, 2)), (2, 8)),
    Net("3d", lambda: nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.ReLU(), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(16, 2)), (1, 4, 4, 4)),
    Net("group norm", lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4, eps=0.05), nn.ReLU(), nn.InstanceNorm2d(4, eps=0.05, affine=True), *head(4, 9)), (1, 5, 5)),
    Net("channels joined", lambda: Lambda(lambda x, a, b, c: c(torch.cat([torch.relu(a(x)), torch.relu(b(x)), x], 1)).mean((2, 3)), nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(2, 2, 1), nn.Conv2d(7, 3, 3, padding=1)), (2, 5, 5)),
    Net("pre-activation", lambda: Lambda(lambda x, b, c, d, s: d(F.relu(c(F.relu(b(x))))) + s(x), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.Conv2d(2, 3, 1, 2)), (2, 6, 6)),
    Net("shortcut pooled", lambda: Lambda(lambda x, a, b: F.avg_pool2d(b(F.relu(a(F.relu(x)))), 2) + F.avg_pool2d(x, 2), nn.Conv2d(2, 2, 3, 1, 1), nn.Conv2d(2, 2, 3, 1, 1)), (2, 6, 6)),
]  # fmt: skip
