"""Linear maps acting on activations: apply, adjoint, shapes. They know tensors, not `nn.Module`."""

from opnorm.operators.base import LinearOperator
from opnorm.operators.conv import Conv, ConvTranspose
from opnorm.operators.dense import Dense

__all__ = ["Conv", "ConvTranspose", "Dense", "LinearOperator"]
