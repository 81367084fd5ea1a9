"""What others ask of a parametrization by opnorm: the one place that lazy weights and compiled graphs know it by."""

from typing import Protocol

from torch import Tensor, nn

from opnorm.norms.casting import Mode
from opnorm.parametrize.blocks import Triple
from opnorm.parametrize.views import View


class Rule(Protocol):
    """By what a weight is divided; `SpectralNormalization` says what the attributes are."""

    view: View
    lipschitz: float
    mode: Mode
    label: str
    training: bool
    scale: nn.Parameter | None

    def value(self, weight: Tensor) -> Tensor:
        """Return the normalised weight as a plain tensor."""

    def triple(self, weight: Tensor) -> Triple:
        """Return the training estimate for this value of the weight."""

    def deployed(self, weight: Tensor, bound: Tensor | None = None) -> Tensor:
        """Return the proved weight."""

    def bound(self) -> Tensor | None:
        """The scale that a learned one has now."""

    def renew(self) -> None:
        """Take the weight for a new one at the next use."""

    def spoilt(self) -> None:
        """Make what is deployed anew, as somebody wrote to it."""


class Handed(Protocol):
    """A deployed weight that is used without asking."""

    def over(self) -> None:
        """Let nobody use it again."""
