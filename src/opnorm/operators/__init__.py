"""Linear maps acting on activations: apply, adjoint, shapes. They know tensors, not `nn.Module`."""

from opnorm.operators.base import LinearOperator
from opnorm.operators.composed import Composed, Scaled
from opnorm.operators.conv import Conv, ConvTranspose
from opnorm.operators.dense import Dense
from opnorm.operators.diagonal import Diagonal
from opnorm.operators.permutation import Isometry, Permutation
from opnorm.operators.separable import Separable

__all__ = [
    "Composed",
    "Conv",
    "ConvTranspose",
    "Dense",
    "Diagonal",
    "Isometry",
    "LinearOperator",
    "Permutation",
    "Scaled",
    "Separable",
]
