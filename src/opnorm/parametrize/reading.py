"""What `layer.weight` is in eager mode, past torch's parametrization, whose steps cost more than a small product."""

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from opnorm.parametrize.lazy import NormalizedWeight
from opnorm.parametrize.spectral import SpectralNormalization
from opnorm.parametrize.transforms import traced
from opnorm.parametrize.watched import Watched


def read_directly(module: nn.Module, name: str) -> None:
    """Replace torch's property on the layer's own class, which its copies share, by one that comes to the same."""
    known: Any = getattr(type(module), name)

    def read(module: nn.Module) -> Tensor:
        if is_dynamo_compiling() or traced():
            return known.fget(module)  # type: ignore[no-any-return]
        chain: Any = module._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        rule, raw = chain._modules["0"], chain._parameters.get("original")
        if type(raw) is Watched and type(rule) is SpectralNormalization and len(chain._modules) == 1:
            return NormalizedWeight(rule, raw)
        return known.fget(module)  # type: ignore[no-any-return]

    setattr(type(module), name, property(read, known.fset))
