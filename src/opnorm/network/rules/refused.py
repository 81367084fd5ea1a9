"""Operations that can have no rule: comparisons, positions of extrema, complex numbers."""

from typing import NoReturn

from opnorm.graph import Node
from opnorm.network.rules.registry import Builder, register_rule, unsupported

_COMPARISONS = ("gt", "lt", "ge", "le", "eq", "ne")


@register_rule(
    *(f"aten.{name}.{kind}" for name in _COMPARISONS for kind in ("Scalar", "Tensor")),
    *(f"aten.{name}.default" for name in ("argmax", "argmin", "argsort", "isnan", "logical_not", "bitwise_not")),
    "aten.bucketize.Tensor",
)
def jump(node: Node, build: Builder) -> NoReturn:
    """Comparisons: what they choose jumps, unless both choices agree where they meet."""
    raise unsupported(
        node, "its result jumps; where it chooses between two continuous pieces, write them with relu, clamp or maximum"
    )


@register_rule(
    *(f"aten.fft_{name}.default" for name in ("fft", "ifft", "rfft", "irfft", "fft2", "ifft2", "rfft2", "irfft2")),
    *(f"aten.fft_{name}.default" for name in ("fftn", "ifftn", "rfftn", "irfftn")),
    "aten.view_as_complex.default", "aten.complex.default",
)  # fmt: skip
def complex_numbers(node: Node, build: Builder) -> NoReturn:
    """Complex tensors are not followed."""
    raise unsupported(node, "complex numbers are not followed")
