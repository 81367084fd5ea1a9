"""The networks of the guide's table: random ones with He initialisation, and ones trained on the packaged digits."""

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn

import opnorm
from opnorm.data import digits


class ResidualMLP(nn.Module):
    """Blocks `x + b(relu(a(x)))`."""

    def __init__(self, width: int = 12, inner: int = 16, blocks: int = 3, out: int = 4) -> None:
        super().__init__()
        self.a = nn.ModuleList(nn.Linear(width, inner) for _ in range(blocks))
        self.b = nn.ModuleList(nn.Linear(inner, width) for _ in range(blocks))
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        for a, b in zip(self.a, self.b, strict=True):
            x = x + b(torch.relu(a(x)))
        return self.out(x)


class ResidualCNN(nn.Module):
    """Blocks `x + relu(conv(x))` with circular padding; each convolution's norm is `norm` by its largest symbol."""

    def __init__(self, channels: int = 32, blocks: int = 6, size: int = 32, norm: float = 0.7) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular") for _ in range(blocks)
        )
        for conv in self.convs:
            he(conv)
            symbol = torch.fft.fft2(conv.weight.detach().double(), (size, size)).permute(2, 3, 0, 1)
            conv.weight.data *= norm / float(torch.linalg.matrix_norm(symbol, 2).max())

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + torch.relu(conv(x))
        return x


def residual_cnn() -> nn.Sequential:
    """The same with a linear head of ten outputs on the whole images."""
    return nn.Sequential(ResidualCNN(), nn.Flatten(), he(nn.Linear(32 * 32 * 32, 10)))


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    """64-512-256-10 on images of 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def he(model: nn.Module, gain: float = 2.0) -> nn.Module:
    """Gaussian weights of variance gain / fan in, and no biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=math.sqrt(gain / module.weight[0].numel()))
            nn.init.zeros_(module.bias)
    return model


def images(split: str, flat: bool = True) -> Tensor:
    """The digits' images as rows, or as pictures of one channel."""
    pictures = getattr(digits(), f"{split}_images")
    return pictures.flatten(1) if flat else pictures.reshape(-1, 1, 8, 8)


def trained(model: nn.Module, epochs: int = 30, temperature: float = 1.0, rate: float = 1e-3) -> nn.Module:
    flat = not isinstance(model[0], nn.Conv2d)
    data, labels = images("train", flat), digits().train_labels
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs, eta_min=rate / 10)
    for _ in range(epochs):
        for batch in torch.randperm(len(data)).split(64 if temperature == 1.0 else 128):
            optimiser.zero_grad()
            nn.functional.cross_entropy(temperature * model(data[batch]), labels[batch]).backward()
            optimiser.step()
        schedule.step()
    return model.eval()


def unit_norms(layers: int = 8, temperature: float = 12.0) -> nn.Module:
    """A chain whose layers have norm 1 each, trained that way and stored as plain weights."""
    model = mlp(*[64] * layers, 10)
    for module in model:
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)
            nn.init.zeros_(module.bias)
    opnorm.normalize(model, images("train")[:2])
    return opnorm.fold(trained(model, 40, temperature, 4e-3)).eval()


def stacked(model: nn.Module) -> dict[str, np.ndarray]:
    """A chain or a residual MLP as rows over (x, v_1, v_2, ...), for a solver that knows no networks."""
    matrices = [m.weight.detach().double().numpy() for m in model.modules() if isinstance(m, nn.Linear)]
    if isinstance(model, ResidualMLP):
        blocks = len(model.a)
        first, second, last = matrices[:blocks], matrices[blocks:-1], matrices[-1]
    else:
        first, second, last = matrices[:-1], [np.eye(len(w)) for w in matrices[:-1]], matrices[-1]
    inputs = first[0].shape[1]
    identity = np.eye(inputs + sum(len(w) for w in first))
    state, at, reads = identity[:inputs], inputs, []
    for before, after in zip(first, second, strict=True):
        reads.append(before @ state)
        added = after @ identity[at : at + len(before)]
        state = state + added if isinstance(model, ResidualMLP) else added
        at += len(before)
    chain = {} if isinstance(model, ResidualMLP) else {f"w{i}": w for i, w in enumerate(matrices)}
    return {"reads": np.concatenate(reads), "out": last @ state, "inputs": np.array(inputs), **chain}
