"""The norm of one linear step in the units of its ends, as a function of them that can be differentiated.

A few vectors follow its top singular directions from call to call. Claims nothing.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from opnorm.certificate.network.maps import Convolution, Matrix, Scale, Weights, stored

_VECTORS = 8
_SHARPNESS = 30.0
_EXACT = 256
_POINTS = 6
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(eq=False)
class Gain:
    """A matrix or a convolution, and perhaps a scale after it.

    Attributes:
        map: what is measured; an image is cut to a few points, which changes the norm of a convolution a little.
        weight: its tensor in float32, with the scale.
        x: the vectors, shape (k, *in_shape).
    """

    map: Matrix | Convolution
    weight: Tensor
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Draw the first vectors."""
        generator = torch.Generator().manual_seed(0)
        count = min(_VECTORS, len(self.weight))  # no more than its results have elements
        self.x = _orthonormal(torch.randn(count, *self._shape(), generator=generator))

    def _shape(self) -> tuple[int, ...]:
        if isinstance(self.map, Matrix):
            return (self.weight.shape[1],)
        spans = (d * (k - 1) + 1 for d, k in zip(self.map.dilation, self.map.kernel, strict=True))
        sizes = zip(self.map.in_shape[1:], self.map.stride, spans, strict=True)
        points = _POINTS if max(self.map.kernel) > 1 else 1
        return (self.map.in_shape[0], *(min(n, max(points * s, span)) for n, s, span in sizes))

    def log_norm(self, before: Tensor, after: Tensor) -> Tensor:
        """A smooth maximum of the top singular values' logarithms, after one step of the power iteration.

        Args:
            before: logarithms of the units of what it reads, one number, or one for each channel or element.
            after: of its result.
        """
        if isinstance(self.map, Matrix) and min(self.weight.shape) <= _EXACT:
            inner, outer = _spread(before, self.weight.shape[1]), _spread(after, len(self.weight))
            return _smooth(torch.linalg.svdvals(self.weight * (-inner).exp() * outer.exp()[:, None]))
        x = self.x.requires_grad_()
        y = self._applied(x, before, after)
        with torch.no_grad():
            q, r = torch.linalg.qr(y.flatten(1).mT)
            u, _, v = torch.linalg.svd(r)
            left = (q @ u).mT.reshape(y.shape)
        (back,) = torch.autograd.grad(y, x, left, retain_graph=True)
        values = (torch.tensordot(v, y, 1) * left).flatten(1).sum(1)
        self.x = _orthonormal(back.detach())
        return _smooth(values)

    def _applied(self, x: Tensor, before: Tensor, after: Tensor) -> Tensor:
        if isinstance(self.map, Matrix):
            y = (x * (-_spread(before, x.shape[1])).exp()) @ self.weight.mT
            return y * _spread(after, y.shape[1]).exp()
        ones = [1] * (x.dim() - 2)
        x = x * (-before).exp().reshape(-1, *ones)
        widths = [min(w, n) for pair, n in zip(reversed(self.map.padding), reversed(x.shape[2:])) for w in pair]  # noqa: B905
        x = F.pad(x, widths, mode="circular" if self.map.circular else "constant")
        convolve = _CONV[len(ones)]
        y = convolve(x, self.weight, None, self.map.stride, 0, self.map.dilation, self.map.groups)
        return y * after.exp().reshape(-1, *ones)

    def balance(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the Frobenius norms of what each channel or element is read with, and of what writes it."""
        if isinstance(self.map, Matrix):
            inner, outer = _spread(before, self.weight.shape[1]), _spread(after, len(self.weight))
            square = (self.weight * (-inner).exp() * outer.exp()[:, None]).square()
            return _folded(square.sum(0), before), _folded(square.sum(1), after)
        groups, rest = self.map.groups, (1,) * (self.weight.dim() - 2)
        columns = before.expand(self.map.in_shape[0]).reshape(groups, 1, -1, *rest)
        square = self.weight.square().reshape(groups, -1, *self.weight.shape[1:]) * (-2 * columns).exp()
        square = square * (2 * after.expand(len(self.weight))).exp().reshape(groups, -1, 1, *rest)
        taps = tuple(range(3, square.dim()))
        square = square.sum(taps) if taps else square
        return _folded(square.sum(1).reshape(-1), before), _folded(square.sum(2).reshape(-1), after)


@dataclass(frozen=True, eq=False)
class Factors:
    """A scale of channels by itself.

    Attributes:
        logs: of its factors' sizes, shape (channels,).
    """

    logs: Tensor

    def log_norm(self, before: Tensor, after: Tensor) -> Tensor:
        """The logarithm of the norm."""
        largest: Tensor = (self.logs + after - before).amax()
        return largest

    def balance(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """As of a `Gain`."""
        square = (2 * (self.logs + after - before)).exp()
        return _folded(square, before), _folded(square, after)


def gain_of(first: Matrix | Convolution, scale: Scale | None, weights: Weights) -> Gain:
    """The norm of a map, with a scale of its results' channels after it."""
    weight = stored(weights, first.weight)
    if scale is not None:
        factors = scale.factors(weights).expand(len(weight))
        weight = weight * factors.reshape(-1, *[1] * (weight.dim() - 1))
    return Gain(first, weight.float())


def _smooth(values: Tensor) -> Tensor:
    """Above the logarithm of the largest by at most log(count) / sharpness: its gradient counts near ties."""
    most: Tensor = torch.logsumexp(_SHARPNESS * values.clamp_min(1e-30).log(), 0) / _SHARPNESS
    return most


def _spread(values: Tensor, size: int) -> Tensor:
    """Of channels, one number for each of their elements."""
    return values.reshape(-1).repeat_interleave(size // values.numel())


def _folded(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(like.numel(), -1).sum(1).clamp_min(1e-30).log()


def _orthonormal(x: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(x.flatten(1).mT)[0]
    return q.mT.reshape(-1, *x.shape[1:])
