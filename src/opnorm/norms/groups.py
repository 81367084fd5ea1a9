"""Grouped convolutions: the norm is the largest of the groups', and most groups need no proof of their own."""

from collections.abc import Callable
from dataclasses import replace

from opnorm._enclosure import Enclosure
from opnorm.norms.fourier import frobenius_by_group
from opnorm.norms.materialised import majorant_norm
from opnorm.operators import Conv, ConvTranspose

Convolution = Conv | ConvTranspose


def norm_over_groups(operator: Convolution, prove: Callable[[Convolution], Enclosure]) -> Enclosure:
    """Enclose the norm of a convolution by that of its groups.

    They are taken in the order of a cheap bound, and those that cannot reach what is already attained are left out.

    Args:
        operator: at a given input size.
        prove: how to enclose the norm of one group.
    """
    if _conv(operator).groups == 1:
        return prove(operator)
    parts = groups_of(operator)
    bounds = _cheap_bounds(operator, parts)
    order = sorted(range(len(parts)), key=lambda i: -bounds[i])
    best = prove(parts[order[0]])
    for i in order[1:]:
        if bounds[i] <= best.lower:
            break
        best = Enclosure.maximum([best, prove(parts[i])])
    return best


def groups_of(operator: Convolution) -> list[Convolution]:
    """Return the ungrouped convolutions that a grouped one consists of."""
    conv = _conv(operator)
    parts = [replace(conv, weight=weight, groups=1) for weight in conv.weight.chunk(conv.groups)]
    if isinstance(operator, ConvTranspose):
        return [replace(operator, conv=part) for part in parts]
    return list(parts)


def _conv(operator: Convolution) -> Conv:
    return operator.conv if isinstance(operator, ConvTranspose) else operator


def _cheap_bounds(operator: Convolution, parts: list[Convolution]) -> list[float]:
    """A proved bound of each group's norm that costs no factorisation."""
    conv = _conv(operator)
    if conv.mode == "zeros":
        return frobenius_by_group(conv)
    return [majorant_norm(part) for part in parts]
