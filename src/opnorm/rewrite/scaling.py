"""One tensor: read as its matrices or as a kernel, divided, and proved as stored by the verifier's own code."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opnorm._enclosure import Enclosure
from opnorm.auditing import measure, roles
from opnorm.certificate.format import Mode, Reading
from opnorm.certificate.weights import proves, reading_of_kernel
from opnorm.norms.casting import scale_to_bound

RTOL = 1e-6
KERNEL_RTOL = 4e-3
"""The verifier proves a kernel's bound over coarse cells where it has room for them."""
_MARGINS = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-2, 1e-2, 1e-2)
"""By how much a weight is shrunk, one after the other, while its bound holds by too little for the verifier."""


def reading_of(shape: tuple[int, ...], read: roles.Reading) -> Reading:
    """Return how the verifier reads a tensor that the audit reads as `read`."""
    if read.kernel:
        return reading_of_kernel(shape)
    if not read.parts:
        return Reading("matrix")
    return Reading("blocks", rows=tuple(len(range(shape[0])[part]) for _, part in read.parts))


def scale(weight: Tensor, reading: Reading, lipschitz: float, mode: Mode) -> tuple[Tensor, Enclosure]:
    """Scale a tensor so that its bound holds as stored, and is proved by what `opnorm verify` runs.

    Args:
        weight: finite, of a dtype that a norm is defined for.
        reading: of the tensor; each block by itself.
        lipschitz: K > 0.
        mode: see `scale_to_bound`.

    Returns:
        The new tensor (`weight` itself where nothing changed) and the enclosure of the norm that it had.

    Raises:
        WeightError: if it is not finite.
        ArgumentError: if its dtype cannot hold a weight of norm K.
    """
    if reading.kind != "blocks":
        flat = weight if reading.kind == "convolution" else weight.reshape(weight.shape[-2:])
        new, before = _scale_one(flat, reading, lipschitz, mode)
        return (weight if new is flat else new.reshape(weight.shape)), before
    blocks = [part.reshape(part.shape[-2:]) for part in torch.split(weight, list(reading.rows))]
    done = [_scale_one(block, Reading("matrix"), lipschitz, mode) for block in blocks]
    before = Enclosure.maximum(enclosure for _, enclosure in done)
    if all(new is block for (new, _), block in zip(done, blocks, strict=True)):
        return weight, before
    return torch.cat([new for new, _ in done]).reshape(weight.shape), before


def _scale_one(weight: Tensor, reading: Reading, lipschitz: float, mode: Mode) -> tuple[Tensor, Enclosure]:
    kernel = reading.kind == "convolution"
    before = measure.enclose(weight, kernel=kernel, rtol=KERNEL_RTOL if kernel else RTOL, guarantee="proved")
    if not bool(weight.any()):
        return weight, before
    if mode == "clip" and before.upper <= lipschitz and proves(weight, reading, lipschitz):
        return weight, before
    ceiling = max(before.upper, lipschitz) if mode == "clip" else before.upper
    enclosure = replace(before, upper=ceiling)
    return scale_to_bound(weight, enclosure, lipschitz, measure=_verifiable(reading, lipschitz)), before


def _verifiable(reading: Reading, lipschitz: float) -> Callable[[Tensor], Enclosure]:
    """An enclosure whose upper end is `lipschitz` if the verifier proves that, and a little more if not."""
    margins = iter(_MARGINS)

    def enclose(candidate: Tensor) -> Enclosure:
        margin = 0.0 if proves(candidate, reading, lipschitz) else next(margins, 1e-2)
        return Enclosure(0.0, lipschitz * (1 + margin), "proved", "verifier")

    return enclose
