"""Plain torch again, with the normalised weights."""

import copy

from torch import nn

from opnorm.errors import ArgumentError
from opnorm.parametrize.chains import normalised
from opnorm.parametrize.register import remove_spectral_norm


def fold(model: nn.Module) -> nn.Module:
    """Return a copy in plain torch whose weights are those of evaluation, with nothing of opnorm left.

    The copy's outputs, state dict and exported graph are those of a plain model; its weights have the proved norms.

    Raises:
        ArgumentError: if nothing in the model is normalised by opnorm.
        WeightError: if a weight holds NaN or infinite values.

    Example:
        >>> import torch, opnorm
        >>> model = torch.nn.Sequential(opnorm.spectral_norm(torch.nn.Linear(8, 4)), torch.nn.ReLU())
        >>> opnorm.fold(model)
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
          (1): ReLU()
        )
    """
    plain = copy.deepcopy(model)
    found = normalised(plain)
    if not found:
        raise ArgumentError(f"nothing in this {type(model).__name__} is normalised by opnorm; there is nothing to fold")
    for _, module, name, _ in found:
        remove_spectral_norm(module, name)
    return plain
