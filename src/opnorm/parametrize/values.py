"""When is a weight new? Keys and fingerprints of the values of a tensor."""

import torch
from torch import Tensor

_SAMPLE = 64

Key = tuple[object, ...]


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the estimate is computed: at least single precision."""
    return torch.promote_types(weight.dtype, torch.float32)


def sample(weight: Tensor) -> tuple[float, ...] | None:
    """A few entries spread over a weight; None where reading them would make an accelerator wait.

    It sees what the version counter does not: fused optimizers, writes through `.data`, sharded parameters.
    """
    if weight.device.type != "cpu":
        return None
    flat = weight.detach().reshape(-1)
    step = flat.numel() // _SAMPLE + 1
    picked = flat[:: step | 1]
    return tuple((torch.view_as_real(picked.resolve_conj()) if picked.is_complex() else picked).flatten().tolist())


def key(weight: Tensor, epoch: int) -> Key:
    """What stays the same as long as nobody wrote to the weight."""
    version = -1 if weight.is_inference() else weight._version
    return (version, weight.data_ptr(), epoch, weight.dtype, weight.device, sample(weight))


def far(old: Key, new: Key) -> bool:
    """Whether a weight moved by more than half of its size: another weight, rather than a step of training."""
    before, after = old[-1], new[-1]
    if before is None and after is None:
        return False
    if not isinstance(before, tuple) or not isinstance(after, tuple) or len(before) != len(after):
        return True
    size = sum(x * x for x in before)
    moved = sum((x - y) ** 2 for x, y in zip(before, after, strict=True))
    return not moved <= 0.25 * size


def fingerprint(weight: Tensor) -> tuple[int, ...]:
    """A checksum of every bit of a weight; rows and columns that change places change it.

    Two passes over the weight, as integers, so that nothing is rounded away.
    """
    real = torch.view_as_real(weight.detach().resolve_conj()) if weight.is_complex() else weight.detach()
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()]
    bits = real.contiguous().view(size).reshape(real.shape[0], -1)
    sums = []
    for axis in (0, 1):
        total = bits.sum(axis, dtype=torch.int64)
        odd = 2 * torch.arange(len(total), device=total.device) + 1
        sums.append(int((total * odd * odd).sum()))
    return tuple(sums)
