"""When is a weight new? Keys and fingerprints of the values of a tensor."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from opnorm.norms.scaling import largest_part, normalised
from opnorm.parametrize.on_device import host_waits
from opnorm.parametrize.sharding import is_sharded, local
from opnorm.parametrize.watched import Stamp, carried, only_stepped, stamp

_SAMPLE = 64


class Key(NamedTuple):
    """What tells whether a weight is new.

    Attributes:
        watched: whether it tells for certain; on accelerators, as certain as it gets without making them wait.
    """

    version: Stamp | int
    pointer: int
    epoch: int
    kind: tuple[object, ...]
    sample: tuple[float, ...] | None
    watched: bool


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the estimate is computed: at least single precision."""
    return torch.promote_types(weight.dtype, torch.float32)


_ORDINARY = 1e-30, 1e30


def tamed(raw: Tensor) -> tuple[Tensor, int]:
    """Return `(scaled, exponent)` with `raw = scaled * 2**exponent`: itself and 0 for all but extreme weights."""
    largest = 1.0 if is_sharded(raw) else largest_part(raw)
    if largest == 0 or not math.isfinite(largest) or _ORDINARY[0] < largest < _ORDINARY[1]:
        return raw, 0
    scaled, exponent = normalised(raw)
    return scaled.to(raw.dtype), exponent


class Sampler:
    """Reads a few entries spread over a weight; not where reading them would make an accelerator wait.

    It sees what the version counter does not: fused optimizers, writes through `.data`, sharded parameters.

    Attributes:
        place: where the weight lay when `picked` was made: a view, so that values are read as they are now.
    """

    def __init__(self) -> None:
        """Begin without a view."""
        self.place: tuple[object, ...] | None = None
        self.picked: Tensor | None = None

    def key(self, weight: Tensor, epoch: int) -> Key:
        """Return what stays the same as long as nobody wrote to the weight."""
        sharded, weight = is_sharded(weight), local(weight)
        seen = stamp(weight)
        version = seen or (-1 if weight.is_inference() else weight._version)
        kind, pointer = (weight.dtype, weight.device, sharded), weight.data_ptr()
        if host_waits(weight):
            return Key(version, pointer, epoch, kind, None, True)
        place = (pointer, weight.dtype, weight.shape, weight.stride())
        if self.picked is None or self.place != place or not weight.is_contiguous() or weight.is_complex():
            self.place, self.picked = place, _picked(weight)
        return Key(version, pointer, epoch, kind, tuple(self.picked.tolist()), seen is not None)


def _picked(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    picked = flat[:: flat.numel() // _SAMPLE + 1 | 1]
    return torch.view_as_real(picked.resolve_conj()).flatten() if picked.is_complex() else picked


def same(old: Key, new: Key) -> bool:
    """Whether nobody wrote to a weight: neither in place nor, as far as the sample tells, in any other way.

    A weight that moved in memory with its values, as sharded parameters do before every forward and copies of a model
    have done, is the same.
    """
    if old.epoch != new.epoch or old.kind != new.kind or old.sample != new.sample:
        return False
    if old.pointer != new.pointer:
        return old.sample is not None and carried(old.version, new.version)
    return old.version == new.version


def far(old: Key, new: Key) -> bool:
    """Whether a new value is another weight rather than the next step of training: then the estimate starts afresh.

    That is one that moved by more than half of its size, or one that was written but whose sample did not move at
    all: the same weight loaded again, so that every process that loads it computes the same estimate. A step that moves
    nothing (a learning rate or a gradient of zero, one too small for the dtype) is a step all the same.
    """
    if old.sample == new.sample and (old.epoch != new.epoch or only_stepped(old.version, new.version)):
        return False
    before, after = old.sample, new.sample
    if before is None or after is None or len(before) != len(after):
        return before is not after
    return not 0 < math.dist(before, after) <= 0.5 * math.hypot(*before)


def fingerprint(weight: Tensor) -> tuple[int, ...]:
    """A checksum of every bit of a weight; rows and columns that change places change it.

    Two passes over the weight, as integers, so that nothing is rounded away.
    """
    weight = local(weight)
    real = torch.view_as_real(weight.detach().resolve_conj()) if weight.is_complex() else weight.detach()
    bits = as_integers(real.contiguous()).flatten(1)  # a process may hold no row
    sums = []
    for axis in (0, 1):
        total = bits.sum(axis, dtype=torch.int64)
        odd = 2 * torch.arange(len(total), device=total.device) + 1
        sums.append(int((total * odd * odd).sum()))
    return tuple(sums)


def as_integers(real: Tensor) -> Tensor:
    """Show the bits of real numbers as integers of their size, in the same memory."""
    return real.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()])
