"""The vectors of an estimate as buffers of a module, which a cast of the model changes to any dtype."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from opnorm.parametrize.blocks import Block
from opnorm.parametrize.views import View

NAMES = Block._fields


def held(view: View, buffers: Mapping[str, Tensor | None], dtype: torch.dtype) -> Block:
    """Return the vectors that the buffers hold, for a weight that is estimated in this dtype."""
    real = dtype.to_real()
    y, omega, scouts = (cast(Tensor, buffers[name]).to(real) for name in NAMES)
    if dtype.is_complex or view.frequencies:
        y, scouts = torch.view_as_complex(y), torch.view_as_complex(scouts)
    return Block(y, omega, scouts)


def stored(block: Block) -> dict[str, Tensor]:
    """Return what the buffers are to hold.

    As pairs of real numbers: casting a model to bfloat16 drops the imaginary part of a complex buffer.
    """
    y, scouts = (torch.view_as_real(part) if part.is_complex() else part for part in (block.y, block.scouts))
    return {"y": y.contiguous(), "omega": block.omega, "scouts": scouts.contiguous()}
