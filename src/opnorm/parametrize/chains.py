"""Finding the parametrizations of a weight."""

from typing import cast

from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrize import ParametrizationList

from opnorm.parametrize.spectral import SpectralNormalization
from opnorm.parametrize.watched import Watched


def chain_of(module: nn.Module, name: str) -> ParametrizationList:
    """Return the parametrizations of a parametrized weight."""
    return cast(ParametrizationList, cast(nn.ModuleDict, module.parametrizations)[name])


def chain_at_hand(module: nn.Module) -> ParametrizationList | None:
    """Return the parametrizations of `weight`, or None, past what `nn.Module.__getattr__` costs."""
    lists = module._modules.get("parametrizations")
    return None if lists is None else cast("ParametrizationList | None", lists._modules.get("weight"))


def rule_of(module: nn.Module, name: str = "weight") -> SpectralNormalization | None:
    """Return opnorm's parametrization of a weight, or None."""
    if not parametrize.is_parametrized(module, name):
        return None
    return next((rule for rule in chain_of(module, name) if isinstance(rule, SpectralNormalization)), None)


def alone(chain: ParametrizationList) -> tuple[SpectralNormalization, Watched] | None:
    """Return opnorm's parametrization and the raw weight, where there is no other and every write is noticed."""
    rule, raw = chain._modules.get("0"), chain._parameters.get("original")
    if type(raw) is Watched and type(rule) is SpectralNormalization and len(chain._modules) == 1:
        return rule, raw
    return None


def is_stored(module: nn.Module, name: str) -> bool:
    """Whether a weight is a tensor of the module; if not, a parametrization, weight norm or pruning computes it."""
    return name in module._parameters or name in module._buffers


def normalised(model: nn.Module) -> list[tuple[str, nn.Module, str, SpectralNormalization]]:
    """Return every weight that opnorm normalises: its module's path, the module, its name and the rule."""
    return [
        (path, module, name, rule)
        for path, module in model.named_modules()
        for name in getattr(module, "parametrizations", {})
        if (rule := rule_of(module, name)) is not None
    ]
