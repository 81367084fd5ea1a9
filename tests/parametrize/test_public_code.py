"""Blocks of public code bases, written as there, with `norm` for the spectral norm that they import."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import opnorm
from parametrize.oracle import layer_norm

hook = nn.utils.spectral_norm
param = nn.utils.parametrizations.spectral_norm


class SNGANBlock(nn.Module):
    """mimicry, SN-GAN: the residual block of D, with or without pooling."""

    def __init__(self, norm, i, o, *, first=False, down=False):
        super().__init__()
        self.c1, self.c2 = norm(nn.Conv2d(i, o, 3, 1, 1)), norm(nn.Conv2d(o, o, 3, 1, 1))
        self.c_sc = norm(nn.Conv2d(i, o, 1, 1, 0)) if first else nn.Identity()
        self.first, self.down = first, down

    def forward(self, x):
        h = self.c2(F.relu(self.c1(x if self.first else F.relu(x))))
        if self.down:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        return h + self.c_sc(x)


class SNGAN(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.block1 = SNGANBlock(norm, 3, 6, first=True, down=True)
        self.block2, self.block3 = SNGANBlock(norm, 6, 6), SNGANBlock(norm, 6, 6)
        self.l5 = norm(nn.Linear(6, 1))

    def forward(self, x):
        h = F.relu(self.block3(self.block2(self.block1(x))))
        return self.l5(torch.sum(h, dim=(2, 3)))


class BigGAN(nn.Module):
    """BigGAN-PyTorch: preactivated blocks of D, and a projection on the embedded label."""

    def __init__(self, norm):
        super().__init__()
        self.blocks = nn.ModuleList([SNGANBlock(norm, 3, 6, first=True, down=True), SNGANBlock(norm, 6, 6)])
        self.linear, self.embed = norm(nn.Linear(6, 1)), norm(nn.Embedding(4, 6))

    def forward(self, x):
        y = torch.arange(len(x)) % 4
        for block in self.blocks:
            x = block(x)
        h = torch.sum(F.relu(x), [2, 3])
        return self.linear(h) + torch.sum(self.embed(y) * h, 1, keepdim=True)


class SPADE(nn.Module):
    """SPADE: a residual block of G; its modulation is not normalised."""

    def __init__(self, norm):
        super().__init__()
        self.conv_0, self.conv_1 = norm(nn.Conv2d(3, 4, 3, padding=1)), norm(nn.Conv2d(4, 6, 3, padding=1))
        self.conv_s = norm(nn.Conv2d(3, 6, 1, bias=False))
        self.norm_0, self.norm_1 = nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(4, affine=False)
        self.gamma_0, self.gamma_1 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        seg = torch.sign(x)
        h = self.conv_0(F.leaky_relu(self.norm_0(x) * (1 + self.gamma_0(seg)), 2e-1))
        h = self.conv_1(F.leaky_relu(self.norm_1(h) * (1 + self.gamma_1(seg)), 2e-1))
        return self.conv_s(x) + h


class RealESRGAN(nn.Module):
    """Real-ESRGAN: the U-Net discriminator with skips; its first and last layers are not normalised."""

    def __init__(self, norm):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 4, 3, 1, 1)
        self.conv1 = norm(nn.Conv2d(4, 8, 4, 2, 1, bias=False))
        self.conv2 = norm(nn.Conv2d(8, 4, 3, 1, 1, bias=False))
        self.conv3 = norm(nn.Conv2d(4, 4, 3, 1, 1, bias=False))
        self.conv9 = nn.Conv2d(4, 1, 3, 1, 1)

    def forward(self, x):
        x0 = F.leaky_relu(self.conv0(x), 0.2)
        x1 = F.leaky_relu(self.conv1(x0), 0.2)
        x1 = F.interpolate(x1, scale_factor=2, mode="bilinear", align_corners=False)
        x2 = F.leaky_relu(self.conv2(x1), 0.2) + x0
        return self.conv9(F.leaky_relu(self.conv3(x2), 0.2))


class HiFiGAN(nn.Module):
    """HiFi-GAN: the first scale of the multi-scale discriminator, all feature maps returned."""

    def __init__(self, norm):
        super().__init__()
        self.convs = nn.ModuleList(
            [
                norm(nn.Conv1d(1, 8, 15, 1, padding=7)),
                norm(nn.Conv1d(8, 8, 41, 2, groups=4, padding=20)),
                norm(nn.Conv1d(8, 8, 5, 1, padding=2)),
            ]
        )
        self.conv_post = norm(nn.Conv1d(8, 1, 3, 1, padding=1))

    def forward(self, x):
        fmap = []
        for layer in self.convs:
            x = F.leaky_relu(layer(x), 0.1)
            fmap.append(x)
        fmap.append(self.conv_post(x))
        return torch.cat([f.flatten(1) for f in fmap], 1)


CODE = {
    "SN-GAN D": (SNGAN, (3, 8, 8)),
    "BigGAN D": (BigGAN, (3, 8, 8)),
    "SPADE G": (SPADE, (3, 8, 8)),
    "Real-ESRGAN D": (RealESRGAN, (3, 8, 8)),
    "HiFi-GAN MSD": (HiFiGAN, (1, 64)),
}


def trained(make, norm, shape):
    torch.manual_seed(0)
    model = make(norm)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.0, 0.9))
    for _ in range(5):
        real, fake = torch.randn(4, *shape) + 0.5, torch.randn(4, *shape)
        loss = torch.relu(1 - model(real)).mean() + torch.relu(1 + model(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def norms(make, norm, shape):
    """The true norm of every normalised layer on what it reads, as the evaluated model applies it."""
    model, read = trained(make, norm, shape), {}
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "parametrizations") or hasattr(m, "weight_u")}
    handles = [
        m.register_forward_hook(lambda m, x, y, name=name: read.update({name: x[0].shape[1:]}))
        for name, m in layers.items()
        if not isinstance(m, nn.Embedding)
    ]
    with torch.no_grad():
        model(torch.randn(4, *shape))
    for handle in handles:
        handle.remove()
    torch.manual_seed(0)
    plain = dict(make(lambda layer: layer).named_modules())
    return [layer_norm(plain[name], layers[name].weight, tuple(size)) for name, size in read.items()]


@pytest.mark.parametrize("name", CODE)
def test_the_convolutions_of_public_code(name):
    make, shape = CODE[name]
    assert max(norms(make, hook, shape)) > 1.2
    found = norms(make, opnorm.spectral_norm, shape)
    assert max(found) <= 1.0 and min(found) > 0.6  # valid for every input size, so less at a small one


def test_sngan_composes_to_what_layers_of_norm_one_compose_to():
    # (1/2 + 1/2) for the pooled block, 1 + 1 for each of the two others, and the sum over 4 x 4 positions.
    of_ones = 1.0 * 2 * 2 * 4
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def product(norm) -> float:
        model: nn.Module = trained(SNGAN, norm, (3, 8, 8))
        return opnorm.lipschitz(model if norm is param else opnorm.fold(model), x, method="naive").product

    assert product(param) > 2 * of_ones
    assert product(opnorm.spectral_norm) <= of_ones * (1 + 1e-9)
