"""The normalised weight itself, differentiable: out of the raw one, the triple, and in evaluation the proved value."""

from typing import NamedTuple

from torch import Tensor

from opnorm.parametrize.blocks import Triple
from opnorm.parametrize.division import Divide, composed, times
from opnorm.parametrize.rule import Rule
from opnorm.parametrize.sharding import beside, is_sharded, spread
from opnorm.parametrize.transforms import transformed
from opnorm.parametrize.views import View


class Division(NamedTuple):
    """By what a weight is divided, and how it is read as matrices."""

    view: View
    triple: Triple
    lipschitz: float
    clip: bool


def division(rule: Rule, triple: Triple) -> Division:
    """Return by what a rule divides; a learned scale is multiplied afterwards, and it divides by the norm alone."""
    return Division(rule.view, triple, 1.0 if rule.scale is not None else rule.lipschitz, rule.mode == "clip")


def divided(weight: Tensor, division: Division, scale: Tensor | None, stored: Tensor | None) -> Tensor:
    """Return `W / d`, or the proved value `stored` of it, times a learned scale.

    A stored value is that of the scaled weight; its gradient is that of the estimate.
    """
    view, triple, lipschitz, clip = division
    if is_sharded(weight):
        return divided_anywhere(weight, division._replace(triple=spread(triple, weight)), scale, stored)
    if weight.is_complex() or view.axis or transformed(weight):
        return divided_anywhere(weight, division, scale, stored)
    held = None if stored is None else view.matrices(stored)
    if stored is not None and scale is not None:
        lipschitz = float(scale.detach())  # what is stored is scaled already, and so is its gradient
    matrices: Tensor = Divide.apply(view.matrices(weight), triple, lipschitz, clip, held)  # type: ignore[no-untyped-call]
    return _scaled(view.weight(matrices, weight.shape), scale, stored)


def divided_anywhere(
    weight: Tensor, division: Division, scale: Tensor | None = None, stored: Tensor | None = None
) -> Tensor:
    """Return the same out of differentiable operations, for shards, graphs and every transform."""
    view, triple, lipschitz, clip = division
    plain = view.weight(composed(view.matrices(weight), triple, lipschitz, clip), weight.shape)
    if stored is not None:  # the proved value, with the gradient of the estimate
        plain = plain if scale is None else times(plain, beside(scale.detach(), plain))
        plain = stored + (plain - plain.detach())
    return _scaled(plain, scale, stored)


def _scaled(weight: Tensor, scale: Tensor | None, stored: Tensor | None) -> Tensor:
    if scale is None:
        return weight
    return times(weight, beside(scale if stored is None else scale / scale.detach(), weight))
