"""What a Lipschitz constant promises about decisions, and whether a simple attack breaks the promise."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opnorm.data import Digits

ATTACK_STEPS = 40


@dataclass(frozen=True)
class Promise:
    """No change of an image within its radius, margin / (sqrt(2) L), flips its decision.

    Attributes:
        constant: L.
        median_radius: over the test images.
        broken: how many images a simple attack flips within their radius; none where L is true.
    """

    constant: float
    median_radius: float
    broken: int


def accuracy(net: nn.Module, data: Digits) -> float:
    """Return the share of the test images that are classified correctly."""
    return float((net(data.test_images).argmax(1) == data.test_labels).double().mean())


def promise(net: nn.Module, data: Digits, constant: float) -> Promise:
    """Attack every test image within the radius that is promised if the Lipschitz constant of `net` is `constant`."""
    outputs = net(data.test_images)
    best = outputs.topk(2, 1).values
    radius = (best[:, 0] - best[:, 1]) / (math.sqrt(2) * constant)
    moved = _attack(net, data.test_images, outputs.argmax(1), 0.999 * radius)
    broken = int((net(moved).argmax(1) != outputs.argmax(1)).sum())
    return Promise(constant, float(radius.median()), broken)


def _attack(net: nn.Module, images: Tensor, labels: Tensor, radius: Tensor) -> Tensor:
    """Climb the gradient of the best other output, staying within `radius` of each image in the l2 norm."""
    limit = radius[:, None, None, None]
    shift = torch.zeros_like(images)
    for _ in range(ATTACK_STEPS):
        shift.requires_grad_(True)
        outputs = net(images + shift)
        own = outputs.gather(1, labels[:, None])[:, 0]
        others = outputs.scatter(1, labels[:, None], -math.inf).amax(1)
        (slope,) = torch.autograd.grad((others - own).sum(), shift)
        step = slope / _lengths(slope).clamp_min(1e-30) * (limit / 5)
        shift = shift.detach() + step
        shift = shift * (limit / _lengths(shift).clamp_min(1e-30)).clamp_max(1.0)
    return images + shift


def _lengths(x: Tensor) -> Tensor:
    return x.square().sum((1, 2, 3), keepdim=True).sqrt()
