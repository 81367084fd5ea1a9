"""Discriminators as their users write them: bounded, or refused with a reason that a person understands."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import opnorm
from opnorm.certificate.network import verify_network
from opnorm.errors import UnsupportedLayerError


class DownBlock(nn.Module):
    """Residual downsampling with average pooling, as in SN-GAN."""

    def __init__(self, i: int, o: int, *, first: bool = False, down: bool = True) -> None:
        super().__init__()
        self.c1, self.c2 = spectral_norm(nn.Conv2d(i, o, 3, padding=1)), spectral_norm(nn.Conv2d(o, o, 3, padding=1))
        self.short, self.first, self.down = spectral_norm(nn.Conv2d(i, o, 1)), first, down

    def forward(self, x: Tensor) -> Tensor:
        h = self.c2(F.relu(self.c1(x if self.first else F.relu(x))))
        x = self.short(x)
        return F.avg_pool2d(h, 2) + F.avg_pool2d(x, 2) if self.down else h + x


class Projection(nn.Module):
    """A discriminator with the inner product of an embedding, as in BigGAN."""

    def __init__(self, classes: int = 0, width: int = 6) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            DownBlock(3, width, first=True), DownBlock(width, width), DownBlock(width, width, down=False)
        )
        self.out = spectral_norm(nn.Linear(width, 1))
        self.embed = spectral_norm(nn.Embedding(classes, width)) if classes else None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        h = F.relu(self.blocks(x)).sum((2, 3))
        score = self.out(h)
        return score if self.embed is None else score + (self.embed(y) * h).sum(1, keepdim=True)


class MultiScale(nn.Module):
    """Two PatchGANs on two scales with InstanceNorm, all features returned, as in SPADE."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(self._one() for _ in range(2))
        self.down = nn.AvgPool2d(3, 2, 1, count_include_pad=False)

    @staticmethod
    def _one() -> nn.ModuleList:
        first = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 2), nn.LeakyReLU(0.2, inplace=True))
        second = nn.Sequential(
            spectral_norm(nn.Conv2d(4, 8, 4, 2, 2)), nn.InstanceNorm2d(8), nn.LeakyReLU(0.2, inplace=True)
        )
        return nn.ModuleList([first, second, nn.Conv2d(8, 1, 4, 1, 2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for scale in self.scales:
            h = x
            for layer in scale:
                h = layer(h)
                features.append(h)
            x = self.down(x)
        return features


def slope(model: nn.Module, *inputs: Tensor) -> float:
    x = inputs[0][:1]
    labels = [i[:1] for i in inputs[1:]]

    def flat(v: Tensor) -> Tensor:
        out = model(v, *labels)
        return torch.cat([o.reshape(-1) for o in out]) if isinstance(out, list) else out.reshape(-1)

    jacobian = torch.autograd.functional.jacobian(flat, x)
    return float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()).double(), 2)) * (1 - 1e-4)  # float32


def test_residual_downsampling() -> None:
    torch.manual_seed(0)
    model, x = Projection().eval(), torch.randn(2, 3, 16, 16)
    bound = opnorm.lipschitz(model, x, method="fourier", time_budget=2.0)
    assert slope(model, x) <= bound.upper < bound.product / 3
    assert bound.method.startswith("fourier")
    assert any("parametrized" in remark for remark in bound.remarks)
    assert verify_network(bound.certificate(), model).upper == bound.certificate().upper


def test_projection_on_a_label() -> None:
    torch.manual_seed(0)
    model, x, y = Projection(classes=5).eval(), torch.randn(2, 3, 8, 8), torch.tensor([1, 3])
    bound = opnorm.lipschitz(model, (x, y), method="fast")
    for label in range(5):
        assert slope(model, x, torch.full((2,), label)) <= bound.upper < float("inf")


def test_multi_scale_with_instance_norm_is_bounded_by_its_eps() -> None:
    torch.manual_seed(0)
    model, x = MultiScale().eval(), torch.randn(2, 3, 16, 16)
    bound = opnorm.lipschitz(model, x, method="naive")
    assert slope(model, x) <= bound.upper < float("inf")
    assert any("normalising" in node.note for node in bound.nodes)


def test_self_attention_needs_a_region() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x.mean((2, 3), keepdim=True))

    bound = opnorm.lipschitz(nn.Sequential(nn.Conv2d(3, 4, 1), Gate()), torch.randn(1, 3, 4, 4))
    assert bound.upper == float("inf")
    assert any("give a region" in node.note for node in bound.nodes)
    small = opnorm.network.Ball(torch.zeros(3, 4, 4), 0.1)
    assert opnorm.lipschitz(nn.Sequential(nn.Conv2d(3, 4, 1), Gate()), torch.randn(1, 3, 4, 4), region=small).upper < 10


def test_minibatch_statistics_are_refused() -> None:
    class MinibatchDeviation(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + (x - x.mean(0, keepdim=True)).square().mean()

    with pytest.raises(UnsupportedLayerError, match="mixes the samples"):
        opnorm.lipschitz(MinibatchDeviation(), torch.randn(4, 3, 4, 4))
