"""Plain torch again, with the normalised weights."""

from collections import Counter, defaultdict

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from opnorm.errors import ArgumentError
from opnorm.parametrize.chains import chain_of, normalised
from opnorm.parametrize.fully_sharded import whole_copy
from opnorm.parametrize.register import proved_value, settle


def fold(model: nn.Module) -> nn.Module:
    """Return a copy in plain torch whose weights are those of evaluation, with nothing of opnorm left.

    What FSDP2 shards is gathered, by all processes together, and the copy is whole on each; a weight that is parallel
    by `parallelize_module` stays so.

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
    plain = whole_copy(model)
    found = normalised(plain)
    if not found:
        raise ArgumentError(f"nothing in this {type(model).__name__} is normalised by opnorm; there is nothing to fold")
    values = [proved_value(module, name) for _, module, name, _ in found]
    _untie(plain, [(chain_of(module, name), value) for (_, module, name, _), value in zip(found, values, strict=True)])
    for (_, module, name, _), value in zip(found, values, strict=True):
        settle(module, name, value)
    return plain


def _untie(model: nn.Module, found: list[tuple[ParametrizationList, Tensor]]) -> None:
    """Give each weight a raw tensor of its own where tied ones are used with other values, or as they are."""
    holders = Counter(
        id(held) for module in model.modules() for held in {**module._parameters, **module._buffers}.values()
    )
    tied: dict[int, list[tuple[ParametrizationList, Tensor]]] = defaultdict(list)
    for chain, value in found:
        tied[id(chain.original)].append((chain, value))
    for place, group in tied.items():
        if holders[place] > len(group) or not all(torch.equal(value, group[0][1]) for _, value in group):
            for chain, value in group:
                if isinstance(chain.original, nn.Parameter):
                    chain._parameters["original"] = nn.Parameter(value.clone(), chain.original.requires_grad)
                else:
                    chain._buffers["original"] = value.clone()
