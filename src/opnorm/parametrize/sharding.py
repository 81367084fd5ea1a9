"""Weights that are spread over several processes (DTensor): products of the shards, never of a gathered weight.

In training only vectors travel: the images of the block under the shards. In evaluation the proof needs the whole
weight, which is gathered once for each new value.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from opnorm.errors import ArgumentError
from opnorm.parametrize.on_device import TensorsT

if dist.is_available():
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a DTensor."""
    return dist.is_available() and isinstance(weight, DTensor)


def several_processes() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized()


def local(weight: Tensor) -> Tensor:
    """Return what this process holds of a weight."""
    return weight.detach().to_local() if is_sharded(weight) else weight  # type: ignore[attr-defined]


def agreed(weight: Tensor, changed: bool) -> bool:
    """Whether any of the processes that share a weight sees a change; one number travels."""
    if not is_sharded(weight):
        return changed
    mesh = weight.device_mesh  # type: ignore[attr-defined]
    flag = torch.tensor([int(changed)], device=local(weight).device)
    for axis in range(mesh.ndim):
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=mesh.get_group(axis))
    return bool(flag.item())


def replicated(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that every process holds, on the mesh of a weight."""
    mesh = like.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def beside(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return a tensor that every process holds, such that it can be multiplied with a weight."""
    return replicated(tensor, weight) if is_sharded(weight) else tensor


def whole(parameter: Tensor) -> Tensor:
    """Return what all processes hold of a parameter, with its gradient."""
    return cast(Tensor, cast(Any, parameter).full_tensor()) if is_sharded(parameter) else parameter


def product(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Return `matrix @ vectors` in full on every process, bit for bit the same."""
    whole: Tensor = (matrix @ replicated(vectors, matrix)).full_tensor()  # type: ignore[attr-defined]
    return whole


def spread(tensors: TensorsT, like: Tensor) -> TensorsT:
    """Return a tuple of tensors, a triple for one, on the mesh of a weight, for products with its shards."""
    return cast("Any", type(tensors))(*(None if part is None else replicated(part, like) for part in tensors))  # type: ignore[no-any-return]


def gathered(weight: Tensor) -> Tensor:
    """Return the whole weight."""
    return weight.detach().full_tensor() if is_sharded(weight) else weight  # type: ignore[attr-defined]


def one_matrix(weight: Tensor, blocks: int) -> bool:
    """Whether shards of a weight are rows or columns of the matrix that it is read as."""
    return blocks == 1 and weight.ndim == 2


def divisible(weight: Tensor, blocks: int) -> Tensor:
    """Return a weight that may be reshaped to matrices: shards may be rows or columns of one, not of several."""
    if not is_sharded(weight) or one_matrix(weight, blocks):
        return weight
    return cast(Tensor, weight.redistribute(placements=[Replicate()] * weight.device_mesh.ndim))  # type: ignore[attr-defined]


def placed(value: Tensor, like: Tensor) -> Tensor:
    """Spread what may be whole on every process as a weight is; nothing travels."""
    if not is_sharded(like):
        return value
    return cast(Tensor, cast(Any, value).redistribute(placements=cast(Any, like).placements))


def as_before(value: Tensor, like: Tensor) -> Tensor:
    """Spread a whole weight as another one is; the first process's bits are everyone's."""
    if not is_sharded(like):
        return value
    mesh = like.device_mesh  # type: ignore[attr-defined]
    # To scatter it, torch asks for equal parts where one axis is cut by two axes of the mesh.
    return placed(distribute_tensor(value, mesh, [Replicate()] * mesh.ndim), like)


def lie_alike(value: Tensor, like: Tensor) -> bool:
    """Whether two tensors are spread over the same processes in the same way."""
    if not is_sharded(value) or not is_sharded(like):
        return is_sharded(value) == is_sharded(like)
    a, b = cast(Any, value), cast(Any, like)
    return bool(a.device_mesh == b.device_mesh and a.placements == b.placements)


PARALLELISED = "_distribute_module_applied"
"""Where `parallelize_module` looks first, whatever the style: it sets this on what it has parallelised."""


class ParallelizeFirst:
    """Stands in that place on the class of a normalised layer, and raises where `parallelize_module` asks for it.

    A layer that was parallelised before holds torch's own answer, which hides this one.
    """

    def __init__(self, label: str) -> None:
        """Hold the layer and the weight, for the message."""
        self.label = label

    def __bool__(self) -> bool:
        """Refuse to answer.

        Raises:
            ArgumentError: always.
        """
        raise ArgumentError(
            f"{self.label} is normalised already: call parallelize_module first, then opnorm.spectral_norm"
        )
