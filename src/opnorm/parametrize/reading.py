"""What `layer.weight` is in eager mode, past torch's parametrization, whose steps cost more than a small product."""

from typing import Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from opnorm.parametrize.chains import alone
from opnorm.parametrize.lazy import NormalizedWeight
from opnorm.parametrize.transforms import traced


def read_directly(module: nn.Module, name: str) -> None:
    """Replace torch's property on the layer's own class, which its copies share, by one that comes to the same."""
    known: Any = getattr(type(module), name)

    def read(module: nn.Module) -> Tensor:
        if is_dynamo_compiling() or traced():
            return known.fget(module)  # type: ignore[no-any-return]
        chain: Any = module._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        pair = alone(chain)
        return known.fget(module) if pair is None else NormalizedWeight(*pair)

    setattr(type(module), name, property(read, known.fset))
