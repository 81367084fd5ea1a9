"""The linear maps that a program may use, built from the stored weights alone.

Each can be applied in float64 to a batch of samples, and so can its majorant: the same map with the absolute values
of its coefficients. A coefficient is either stored, and then exact, or computed with a relative error of at most
`units` times 2^-53.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from opnorm.errors import CertificateError

Weights = Mapping[str, Tensor]

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def stored(weights: Weights, name: str) -> Tensor:
    """The weight of that name in float64.

    Raises:
        CertificateError: if it is missing or holds NaN or infinite values.
    """
    if name not in weights:
        raise CertificateError(f"the network reads the weight {name!r}, which is not among the weights given")
    weight = exactly(name, weights[name])
    if not bool(torch.isfinite(weight).all()):
        raise CertificateError(f"the weight {name!r} holds NaN or infinite values")
    return weight


def exactly(name: str, weight: Tensor) -> Tensor:
    """The same values in float64, on the CPU.

    Raises:
        CertificateError: if float64 cannot hold them: complex, sparse, quantised, or integers above 2^53.
    """
    if weight.layout != torch.strided or weight.is_quantized or weight.is_complex() or weight.is_meta:
        raise CertificateError(f"the weight {name!r} is no plain tensor of real numbers")
    wide = weight.to(device="cpu", dtype=torch.float64)
    if weight.dtype in (torch.int64, torch.uint64) and bool((wide.abs() >= 2.0**53).any()):
        raise CertificateError(f"the weight {name!r} holds integers of 2^53 and more")
    return wide


@dataclass(frozen=True)
class LinearMap:
    """A linear map of one sample."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def apply(self, x: Tensor, weights: Weights, *, absolute: bool = False) -> Tensor:
        """Apply to (batch, *in_shape); with `absolute`, the majorant."""
        raise NotImplementedError

    def terms(self, weights: Weights) -> int:
        """Upper bound of the number of products summed for one element of the result; 1: no sum at all."""
        raise NotImplementedError

    @property
    def widest(self) -> int:
        """How many elements the largest tensor has that one sample becomes, padding included."""
        return max(prod(self.in_shape), prod(self.out_shape))

    @property
    def units(self) -> int:
        """Relative error of a coefficient, in units of 2^-53."""
        return 0

    @property
    def names(self) -> tuple[str, ...]:
        """The weights that it reads."""
        return ()


@dataclass(frozen=True)
class Weighted(LinearMap):
    """A map with the entries of one tensor.

    Attributes:
        weight: its name.
        rounded: relative error of its entries in units of 2^-53 (a mean's 1/n is rounded once).
    """

    weight: str
    rounded: int = field(default=0, kw_only=True)

    @property
    def units(self) -> int:  # noqa: D102
        return self.rounded

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return (self.weight,)


@dataclass(frozen=True)
class Matrix(Weighted):
    """`(I_before x W x I_after)`: a stored matrix along the middle of the flattened sample.

    Attributes:
        weight: name of a matrix, shape (m, n).
        before: product of the sizes before the axis that it acts on.
        after: product of the sizes after it.
    """

    before: int = 1
    after: int = 1

    def apply(self, x: Tensor, weights: Weights, *, absolute: bool = False) -> Tensor:  # noqa: D102
        matrix = stored(weights, self.weight)
        matrix = matrix.abs() if absolute else matrix
        parts = x.reshape(x.shape[0] * self.before, matrix.shape[1], self.after)
        product = parts.reshape(-1, matrix.shape[1]) @ matrix.mT if self.after == 1 else matrix @ parts
        return product.reshape(x.shape[0], *self.out_shape)

    def terms(self, weights: Weights) -> int:  # noqa: D102
        return int(weights[self.weight].shape[1])


@dataclass(frozen=True)
class Convolution(Weighted):
    """torch's convolution with zero or circular padding.

    Attributes:
        weight: name of a kernel, shape (c_out, c_in // groups, *kernel).
        kernel: taps per axis.
        stride: per axis.
        padding: per axis, before and after.
        dilation: per axis.
        groups: blocks of channels.
        circular: whether padding repeats the sample; otherwise it is zero.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1
    circular: bool = False

    @property
    def padded(self) -> tuple[int, ...]:
        """Points per axis after padding."""
        return tuple(n + a + b for n, (a, b) in zip(self.in_shape[1:], self.padding, strict=True))

    @property
    def widest(self) -> int:  # noqa: D102
        return max(self.in_shape[0] * prod(self.padded), prod(self.out_shape))

    @property
    def units(self) -> int:  # noqa: D102
        # Where a circular kernel is wider than the image, taps that meet in one coefficient are added up.
        spans = (d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True))
        wraps = self.circular and any(span >= n for span, n in zip(spans, self.in_shape[1:], strict=True))
        return self.rounded + (2 * prod(self.kernel) if wraps else 0)

    def taps(self, weights: Weights) -> Tensor:
        """The stored kernel.

        Raises:
            CertificateError: if its shape is another one.
        """
        kernel = stored(weights, self.weight)
        if tuple(kernel.shape) != (self.out_shape[0], self.in_shape[0] // self.groups, *self.kernel):
            raise CertificateError(f"the kernel {self.weight!r} has the shape {tuple(kernel.shape)}")
        return kernel

    def apply(self, x: Tensor, weights: Weights, *, absolute: bool = False) -> Tensor:  # noqa: D102
        kernel = self.taps(weights)
        kernel = kernel.abs() if absolute else kernel
        widths = [width for pair in reversed(self.padding) for width in pair]
        if any(widths):
            x = F.pad(x, widths, mode="circular" if self.circular else "constant")
        return _CONV[len(self.stride)](x, kernel, None, self.stride, 0, self.dilation, self.groups)

    def terms(self, weights: Weights) -> int:  # noqa: D102
        return prod(weights[self.weight].shape[1:])


@dataclass(frozen=True)
class TransposedConvolution(Weighted):
    """torch's transposed convolution.

    Attributes:
        weight: name of a kernel, shape (c_in, c_out // groups, *kernel).
        stride: per axis.
        padding: per axis.
        output_padding: per axis.
        dilation: per axis.
        groups: blocks of channels.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def padded(self) -> tuple[int, ...]:
        """Points per axis before its padding is cut off."""
        return tuple(n + 2 * p for n, p in zip(self.out_shape[1:], self.padding, strict=True))

    @property
    def widest(self) -> int:  # noqa: D102
        return max(prod(self.in_shape), self.out_shape[0] * prod(self.padded))

    def apply(self, x: Tensor, weights: Weights, *, absolute: bool = False) -> Tensor:  # noqa: D102
        kernel = stored(weights, self.weight)
        kernel = kernel.abs() if absolute else kernel
        return _CONV_TRANSPOSE[len(self.stride)](
            x, kernel, None, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    def terms(self, weights: Weights) -> int:  # noqa: D102
        kernel = weights[self.weight]
        return int(kernel.shape[0]) // self.groups * prod(kernel.shape[2:])


@dataclass(frozen=True)
class Scale(Weighted):
    """Multiply by a stored tensor along one axis, or by BatchNorm's `weight / sqrt(variance + eps)`.

    Attributes:
        weight: name of the factors, or empty for ones.
        axis: the axis of the sample that the factors belong to.
        variance: name of BatchNorm's running variance, or empty.
        eps: added to the variance.
    """

    axis: int
    variance: str = ""
    eps: float = 0.0

    def factors(self, weights: Weights) -> Tensor:
        """The factors, shape (n,); off by at most `units` of 2^-53 relative."""
        if self.weight:
            factors = stored(weights, self.weight).reshape(-1)
        else:
            factors = torch.ones(self.in_shape[self.axis], dtype=torch.float64)
        if self.variance:
            factors = factors / (stored(weights, self.variance) + self.eps).sqrt()
        if not bool(torch.isfinite(factors).all()):
            raise CertificateError(f"the scale of {self.weight or self.variance!r} is not finite")
        return factors

    def apply(self, x: Tensor, weights: Weights, *, absolute: bool = False) -> Tensor:  # noqa: D102
        factors = self.factors(weights)
        factors = factors.abs() if absolute else factors
        return x * factors.reshape(-1, *([1] * (len(self.in_shape) - self.axis - 1)))

    def terms(self, weights: Weights) -> int:  # noqa: D102
        return 1

    @property
    def units(self) -> int:  # noqa: D102
        return self.rounded + (4 if self.variance else 0)

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return tuple(name for name in (self.weight, self.variance) if name)


@dataclass(frozen=True)
class Gather(LinearMap):
    """Move data: `y[i] = x[index[i]]`, and 0 where the index is -1 (views, slices, permutations, padding, copies).

    Attributes:
        index: name of a constant of integers, as long as the result.
    """

    index: str

    def apply(self, x: Tensor, weights: Weights, *, absolute: bool = False) -> Tensor:  # noqa: D102
        index = weights[self.index].to(torch.int64)
        flat = F.pad(x.reshape(x.shape[0], -1), (0, 1))  # the last column is the zero that -1 reads
        return flat[:, index].reshape(x.shape[0], *self.out_shape)

    def terms(self, weights: Weights) -> int:  # noqa: D102
        return 1

    @property
    def names(self) -> tuple[str, ...]:  # noqa: D102
        return (self.index,)
