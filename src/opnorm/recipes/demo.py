"""The story of `opnorm demo`: claimed norms, true norms, what the difference costs, and the division that mends it."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from opnorm import _rounding as rounding
from opnorm._enclosure import Enclosure
from opnorm.data import Digits, digits
from opnorm.norms import norm
from opnorm.norms.casting import scale_to_bound

EPOCHS, BATCH, RATE = 30, 64, 3e-3
SHARPNESS = 4.0  # of the softmax in training: outputs of a 1-Lipschitz network lie close together
ATTACK_STEPS = 40


class DigitsNet(nn.Sequential):
    """A small convolutional network on images of shape (1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        layers = {
            "conv1": nn.Conv2d(1, 16, 3, padding=1),
            "relu1": nn.ReLU(),
            "conv2": nn.Conv2d(16, 16, 3, padding=1),
            "relu2": nn.ReLU(),
            "conv3": nn.Conv2d(16, 32, 3, stride=2, padding=1),
            "relu3": nn.ReLU(),
            "flatten": nn.Flatten(),
            "linear1": nn.Linear(512, 128),
            "relu4": nn.ReLU(),
            "linear2": nn.Linear(128, 10),
        }
        for name, layer in layers.items():
            self.add_module(name, layer)


@dataclass(frozen=True)
class Layer:
    """One layer: its shape, the norm after torch's division (claimed to be 1), and a proved bound after opnorm's."""

    name: str
    shape: tuple[int, ...]
    true: Enclosure
    divided: Enclosure


@dataclass(frozen=True)
class Promise:
    """What a Lipschitz constant promises: no change of an image within its radius, margin / (sqrt(2) L), flips it.

    Attributes:
        accuracy: share of the test images that are classified correctly.
        lipschitz: the constant that is claimed or proved.
        median_radius: over the test images.
        broken: how many images a simple attack flips within their radius.
    """

    accuracy: float
    lipschitz: float
    median_radius: float
    broken: int


@dataclass(frozen=True)
class Story:
    """All that the demo shows.

    Attributes:
        trained: the network with torch's spectral norm, as plain layers.
        divided: weights divided by their proved norms, biases by the product so far: the same decisions.
        layers: of the network, in order.
        claimed: the promise of `trained` under the claim that its constant is 1.
        kept: the same promise for `divided`, whose constant is proved to be at most 1.
        biases_kept: accuracy where the weights are divided, but not the biases.
        images: number of test images.
    """

    trained: DigitsNet
    divided: DigitsNet
    layers: tuple[Layer, ...]
    claimed: Promise
    kept: Promise
    biases_kept: float
    images: int

    @property
    def product(self) -> float:
        """An upper bound of the product of the true norms: a Lipschitz constant of the trained network."""
        return rounding.mul_up(*(layer.true.upper for layer in self.layers))


def tell(progress: Callable[[int, int, str], None] | None = None, *, epochs: int = EPOCHS, seed: int = 0) -> Story:
    """Train, measure, attack, divide and attack again; about ten seconds.

    Args:
        progress: called with steps done, all steps, and what comes next.
        epochs: of training.
        seed: of the start and of the order of the images; torch's own generator is left as it was.

    Returns:
        The numbers and the two networks.

    Example:
        >>> story = tell(epochs=1)
        >>> all(layer.divided.upper <= 1 for layer in story.layers), story.kept.broken
        (True, 0)
    """
    data = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trained = _train(data, epochs, progress or (lambda done, total, name: None))
    divided, layers, scales = _divide(trained, data.test_images[:1])
    halfway = copy.deepcopy(divided)
    with torch.no_grad():
        for name, scale in scales.items():
            divided.get_parameter(f"{name}.bias").mul_(scale)
    return Story(
        trained,
        divided,
        layers,
        _promise(trained, data),
        _promise(divided, data),
        _accuracy(halfway, data),
        len(data.test_labels),
    )


def _train(data: Digits, epochs: int, progress: Callable[[int, int, str], None]) -> DigitsNet:
    net = DigitsNet()
    for layer in _weighted(net).values():
        spectral_norm(layer)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    for epoch in range(epochs):
        progress(epoch, epochs, "training with torch's spectral_norm")
        for batch in torch.split(torch.randperm(len(data.train_labels)), BATCH):
            outputs = net(data.train_images[batch])
            loss = nn.functional.cross_entropy(SHARPNESS * outputs, data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    net.eval()
    for layer in _weighted(net).values():
        parametrize.remove_parametrizations(layer, "weight")
    return net.requires_grad_(False)


def _weighted(net: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    return {name: layer for name, layer in net.named_children() if isinstance(layer, nn.Conv2d | nn.Linear)}


def _divide(net: DigitsNet, sample: Tensor) -> tuple[DigitsNet, tuple[Layer, ...], dict[str, float]]:
    """Divide every weight by its norm; also return by what the outputs of each layer have become smaller in all."""
    divided = copy.deepcopy(net)
    targets, shapes = _weighted(divided), _input_shapes(net, sample)
    layers, scales, scale = [], {}, 1.0
    for name, layer in _weighted(net).items():
        measured = partial(_norm_with, targets[name], shapes[name])
        true = norm(layer, input_shape=shapes[name])
        weight = scale_to_bound(layer.weight, true, measure=measured)
        layers.append(Layer(name, tuple(weight.shape), true, measured(weight)))
        largest = layer.weight.abs().argmax()
        scale *= float(weight.flatten()[largest] / layer.weight.flatten()[largest])
        scales[name] = scale
    return divided, tuple(layers), scales


def _input_shapes(net: nn.Module, x: Tensor) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, layer in net.named_children():
        shapes[name] = tuple(x.shape[1:])
        x = layer(x)
    return shapes


@torch.no_grad()
def _norm_with(layer: nn.Conv2d | nn.Linear, shape: tuple[int, ...], weight: Tensor) -> Enclosure:
    """The norm of `layer` with another weight, which it keeps."""
    layer.weight.copy_(weight)
    return norm(layer, input_shape=shape)


def _accuracy(net: nn.Module, data: Digits) -> float:
    return float((net(data.test_images).argmax(1) == data.test_labels).double().mean())


def _promise(net: nn.Module, data: Digits) -> Promise:
    """Attack every image within the radius that is promised if the Lipschitz constant of `net` is 1."""
    outputs = net(data.test_images)
    best = outputs.topk(2, 1).values
    radius = (best[:, 0] - best[:, 1]) / math.sqrt(2)
    moved = _attack(net, data.test_images, outputs.argmax(1), 0.999 * radius)
    broken = int((net(moved).argmax(1) != outputs.argmax(1)).sum())
    return Promise(_accuracy(net, data), 1.0, float(radius.median()), broken)


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
