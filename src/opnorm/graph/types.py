"""The graph of a model: plain data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ref:
    """An argument that depends on the inputs: the result of another node."""

    name: str


@dataclass(frozen=True)
class Weight:
    """An argument that does not depend on the inputs: a parameter, a buffer or a constant computed from them."""

    name: str


@dataclass(frozen=True, eq=False)
class Node:
    """One operation.

    Attributes:
        name: unique in the graph.
        op: the ATen overload as text, such as `aten.conv2d.default`; `input` for an input.
        function: what to call to compute it.
        args: with `Ref` and `Weight` in place of tensors, and plain numbers otherwise.
        kwargs: likewise.
        shape: of the result for a batch of two.
        dtype: of the result; None where it is no tensor.
        batch_axis: where the batch is, and None for a result that is no tensor (a tuple of them).
        merged: how many rows of one sample the batch axis holds; 1 unless an axis was merged into it.
        inner: whether in a merged axis the batch varies fastest.
        path: qualified name of the module that it belongs to; empty for the model itself.
        module: the class of that module, as text.
    """

    name: str
    op: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    batch_axis: int | None
    merged: int
    inner: bool
    path: str
    module: str

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """The shape of one sample's part of the result: the batch axis removed, or reduced to its merged rows."""
        assert self.batch_axis is not None
        rest = [n for i, n in enumerate(self.shape) if i != self.batch_axis]
        return tuple(rest if self.merged == 1 else [self.merged, *rest])

    @property
    def place(self) -> str:
        """Where it is in the model, for messages."""
        return f"{self.op} in {self.path} ({self.module})" if self.path else f"{self.op} in the model's own forward"

    def samples(self, value: Tensor) -> Tensor:
        """A value laid out as this result, as (batch, *sample_shape)."""
        assert self.batch_axis is not None
        front = value.movedim(self.batch_axis, 0)
        if self.merged == 1:
            return front
        if self.inner:
            return front.reshape(self.merged, -1, *front.shape[1:]).transpose(0, 1)
        return front.reshape(-1, self.merged, *front.shape[1:])

    def batched(self, samples: Tensor) -> Tensor:
        """The inverse of `samples`."""
        assert self.batch_axis is not None
        if self.merged > 1:
            samples = (samples.transpose(0, 1) if self.inner else samples).flatten(0, 1)
        return samples.movedim(0, self.batch_axis)

    def sample_axis(self, axis: int) -> int | None:
        """The axis of the sample that an axis of the batched result is; None for the batch axis."""
        axis %= len(self.shape)
        if axis == self.batch_axis:
            return None
        assert self.batch_axis is not None
        return axis - (1 if axis > self.batch_axis else 0) + (1 if self.merged > 1 else 0)


@dataclass(frozen=True, eq=False)
class Graph:
    """A model in evaluation mode.

    Attributes:
        nodes: in the order of computation; inputs first.
        inputs: names of the nodes that are inputs and may be varied.
        outputs: names of the results.
        weights: everything that a `Weight` names.
        derived: names among the weights that are not stored in the model but computed from what is.
        labels: names of integer inputs (class labels), which are not varied.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: dict[str, Tensor]
    derived: frozenset[str]
    labels: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Node:
        """The node of that name."""
        return self._index[name]

    @cached_property
    def _index(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}
