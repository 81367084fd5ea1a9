"""Decisions of a training step that are made where the tensors are: an accelerator is never waited for."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

TensorsT = TypeVar("TensorsT", bound="tuple[Tensor | None, ...]")

_SQUARINGS = 16
"""Powers up to 2^16: of two values that are closer than that can tell apart, either is the largest to 1e-5."""


def host_waits(tensor: Tensor) -> bool:
    """Whether a number of this tensor reaches the host only after everything that was asked of its device is done."""
    return tensor.device.type != "cpu"


def autocasting(tensor: Tensor) -> bool:
    """Whether operations on the tensor's device are cast now; there are devices where that is not known."""
    kind = tensor.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Compute in the dtypes of the tensors."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasting(tensor) else nullcontext()


def outside_transforms() -> AbstractContextManager[object]:
    """Compute outside the transforms of torch.func, which would wrap what is found, if there are any."""
    return temporarily_clear_interpreter_stack() if torch._C._are_functorch_transforms_active() else nullcontext()


def chosen(finite: Tensor, new: TensorsT, old: TensorsT) -> TensorsT:
    """Return the tensors of `new` where `finite`, a scalar tensor, holds, and those of `old` elsewhere."""

    def one(n: Tensor | None, o: Tensor | None) -> Tensor | None:
        return n if n is None or o is None else torch.where(finite, n, o.to(n.dtype))

    return cast("Any", type(new))(*map(one, new, old))  # type: ignore[no-any-return]


def read(numbers: dict[str, Tensor]) -> dict[str, float]:
    """Bring many scalar tensors to the host, waiting once for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, number in numbers.items():
        groups.setdefault((number.device, number.dtype), []).append(name)
    found: dict[str, float] = {}
    for names in groups.values():
        found.update(zip(names, torch.stack([numbers[name] for name in names]).tolist(), strict=True))
    return {name: found[name] for name in numbers}


def leading_rotation(gram: Tensor) -> Tensor:
    """Return unitary matrices whose first column is the leading eigenvector of each positive semidefinite matrix.

    An eigendecomposition would make the host wait (`torch.linalg.eigh` checks for errors). A high power of the matrix
    has the eigenvector in every column, and a reflection has any unit vector as its first column.
    """
    power = gram
    for _ in range(_SQUARINGS):
        power = power / _trace(power)
        power = power @ power
    lengths = torch.linalg.vector_norm(power, dim=-2, keepdim=True)
    place = lengths.argmax(-1, keepdim=True).expand(*power.shape[:-1], 1)
    column = power.gather(-1, place)
    vector = column / torch.linalg.vector_norm(column, dim=-2, keepdim=True).clamp_min(_tiny(gram))
    first = vector[..., :1, :]
    phase = torch.where(first == 0, torch.ones_like(first), torch.sgn(first))
    normal = vector.clone()
    normal[..., :1, :] += phase
    size = (normal.mH @ normal).real
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    reflection: Tensor = eye - 2 * normal @ (normal / size).mH
    return reflection


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).real.sum(-1).clamp_min(_tiny(matrices))[..., None, None]


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
