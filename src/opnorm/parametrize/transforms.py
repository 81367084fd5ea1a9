"""Where a weight is more than its values: transforms of torch.func, forward-mode differentiation, symbolic tracing."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace


def has_tangent(weight: Tensor) -> bool:
    """Whether forward-mode differentiation asks how the result depends on a weight."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(weight).tangent is not None  # type: ignore[no-untyped-call]


def transformed(weight: Tensor) -> bool:
    """Whether more than the values of a weight is asked for, or what is computed now may be of use within that only."""
    return torch._C._are_functorch_transforms_active() or has_tangent(weight)


def traced() -> bool:
    """Whether what is computed now would become a constant of a graph."""
    return torch._C._is_tracing() or _symbolic_trace._is_fx_tracing_flag
