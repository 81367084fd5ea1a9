"""The slopes of activation functions: the smallest and the largest difference quotient, rounded outward.

`docs/guides/network-rules.md` has the proofs; the constants are the extrema of the derivatives, checked in the tests
against mpmath.
"""

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.maps import Weights, stored
from opnorm.certificate.network.program import slopes
from opnorm.errors import CertificateError

Slopes = tuple[Tensor, Tensor]

FIXED: dict[str, tuple[float, float]] = {
    "relu": (0.0, 1.0),
    "relu6": (0.0, 1.0),
    "sigmoid": (0.0, 0.25),
    "tanh": (0.0, 1.0),
    "softsign": (0.0, 1.0),
    "log_sigmoid": (0.0, 1.0),
    "hardtanh": (0.0, 1.0),
    "hardsigmoid": (0.0, 0.16666666666666669),
    "hardswish": (-0.5, 1.5),
    "gelu": (-0.1289042, 1.1289042),
    "gelu_tanh": (-0.1289931, 1.1289931),
    "silu": (-0.0998394, 1.0998394),
    "mish": (-0.1125262, 1.0884982),
    "softplus": (0.0, 1.0),
    "selu": (0.0, 1.7580993408473771),
    "celu": (0.0, 1.0),
    "softshrink": (0.0, 1.0),
    "tanhshrink": (0.0, 1.0),
    "abs": (-1.0, 1.0),
    "sin": (-1.0, 1.0),
    "cos": (-1.0, 1.0),
    "atan": (0.0, 1.0),
    "erf": (0.0, 1.1283791670955130),
    "asinh": (0.0, 1.0),
    "clamp": (0.0, 1.0),
}

UNBOUNDED = {
    "square": "the slope of x^2 is unbounded",
    "exp": "the slope of exp is unbounded",
    "sqrt": "the slope of the square root is unbounded at 0",
    "log": "the slope of the logarithm is unbounded at 0",
    "reciprocal": "the slope of 1/x is unbounded at 0",
    "rsqrt": "the slope of 1/sqrt(x) is unbounded at 0",
    "hardshrink": "hardshrink jumps",
    "threshold": "threshold jumps unless its value is its threshold",
    "softplus": "softplus jumps to its argument at a threshold below 20",
    "sign": "the sign jumps",
    "round": "rounding and remainders jump",
    "tan": "the tangent has poles",
    "acos": "its slope is unbounded at the ends of its domain",
    "atan2": "the angle jumps, and its slope is unbounded at the origin",
    "prod": "a product of varying elements has unbounded slopes",
    "power": "the slope of a power above 1 is unbounded",
}


def activation_slopes(kind: str, parameters: tuple[float, ...], weight: str, weights: Weights) -> Slopes:
    """The slopes of an activation on the whole line.

    Args:
        kind: its name.
        parameters: leaky_relu and elu: (alpha, [scale]); multiply: (factor).
        weight: prelu: the name of its parameter.
        weights: the stored weights.

    Raises:
        CertificateError: for a name that is not known.
    """
    if kind in FIXED:
        return slopes(*FIXED[kind])
    if kind == "leaky_relu":
        (alpha,) = parameters
        return slopes(min(alpha, 1.0), max(alpha, 1.0))
    if kind == "prelu":
        left = stored(weights, weight).reshape(-1)
        left = left[0] if left.numel() == 1 else left
        return left.clamp(max=1.0), left.clamp(min=1.0)
    if kind == "elu":
        # x > 0: scale; x <= 0: scale * alpha * input_scale * exp(input_scale x), and the chord between them.
        alpha, scale, input_scale = parameters
        if min(alpha, scale, input_scale) < 0:
            raise CertificateError("elu has a rule for alpha, scale and input_scale of at least 0 only")
        return slopes(0.0, rounding.mul_up(scale, max(1.0, rounding.mul_up(alpha, input_scale))))
    raise CertificateError(f"no slopes are known for the activation {kind!r}")


def slopes_between(kind: str, low: Tensor, high: Tensor, globally: Slopes) -> Slopes:
    """Slopes that hold while each element stays in [low, high]: where the ReLU is on or off, for instance."""
    a, b = (s.expand_as(low).clone() for s in globally)
    if kind in ("relu", "leaky_relu", "prelu"):
        # Of the two ends one is 1, on the right; the other is the slope on the left.
        off = torch.where(globally[0] < 1, globally[0], globally[1]).expand_as(low)
        b = torch.where(high < 0, off, b)
        a = torch.where(low > 0, torch.ones_like(a), a)
        b = torch.where(low > 0, torch.ones_like(b), b)
        a = torch.where(high < 0, off, a)
    elif kind in ("sigmoid", "tanh"):
        near = torch.where((low <= 0) & (high >= 0), torch.zeros_like(low), torch.minimum(low.abs(), high.abs()))
        far = torch.maximum(low.abs(), high.abs())
        b = torch.minimum(b, _even_slope(kind, near) * (1 + 1e-12))
        a = torch.maximum(a, _even_slope(kind, far) * (1 - 1e-9) - 1e-15).clamp_min(0)
    return a, b


def _even_slope(kind: str, x: Tensor) -> Tensor:
    """The derivative at |x|, from formulas without cancellation (relative error far below 1e-12)."""
    if kind == "sigmoid":
        e = torch.exp(-x)
        return e / (1 + e).square()
    e = torch.exp(-2 * x)
    return 4 * e / (1 + e).square()
