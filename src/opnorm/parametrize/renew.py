"""Saying by hand that weights have changed."""

from torch import nn

from opnorm.parametrize.chains import chain_of, normalised
from opnorm.parametrize.sharding import is_sharded


def update(model: nn.Module) -> int:
    """Refresh the training estimate of every normalised weight, and compare the deployed ones in full at the next use.

    On the CPU a write is noticed without it: in place, through `.data` even where that was kept, by fused optimizers,
    and by other processes. Call it after what neither torch nor Python sees, such as a few entries written through
    NumPy or by a compiled fused step; and on accelerators after fused optimizers, `.data` writes, EMA swaps and sharded
    optimizer steps. To do it after every step: `optimizer.register_step_post_hook(lambda *_: opnorm.update(model))`.

    Returns:
        How many weights were refreshed.

    Example:
        >>> import torch, opnorm
        >>> opnorm.update(opnorm.spectral_norm(torch.nn.Linear(3, 3)))
        1
    """
    found = normalised(model)
    for _, module, name, rule in found:
        rule.renew()
        raw = chain_of(module, name).original
        if not is_sharded(raw):  # the next forward refreshes it, where FSDP2 has gathered the weight anyway
            rule.triple(raw)
    return len(found)
