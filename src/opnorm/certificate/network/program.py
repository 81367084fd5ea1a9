"""The network as a certificate states it: a list of steps on one sample, each from a short vocabulary.

A step reads earlier steps by their position in the list. Biases are left out: they cancel in differences.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

from opnorm.certificate.network.maps import LinearMap

Calculus = Literal["dense", "fourier", "naive", "rescaled"]
"""How a program is bounded: the covariance calculus with one dense block or in Fourier space, or step by step, with the
channels as they are or in other units."""


@dataclass(frozen=True)
class Step:
    """What every step has.

    Attributes:
        sources: positions of the steps that it reads.
        shape: of its result, for one sample.
        label: where it comes from in the model, for people.
    """

    sources: tuple[int, ...]
    shape: tuple[int, ...]
    label: str

    @property
    def size(self) -> int:
        """Number of elements of the result."""
        return prod(self.shape)


@dataclass(frozen=True)
class Input(Step):
    """An input of the network."""


@dataclass(frozen=True)
class Linear(Step):
    """`y = A x` for a linear map of `maps.py`."""

    map: LinearMap


@dataclass(frozen=True)
class Sum(Step):
    """`y = sum_i c_i x_i` for steps of one shape and exact coefficients."""

    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class Concat(Step):
    """The results of the sources, one after the other, along an axis of the sample.

    Attributes:
        axis: of the sample.
        shapes: how each source's elements are to be read, in order.
    """

    axis: int
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Shift(Step):
    """`y = x + c w` for a stored tensor w, such as a bias.

    It cancels in differences, so only a program whose values matter states it: one on a region.

    Attributes:
        weight: name of w, along one axis of the flattened sample, as in `maps.Matrix`; empty where nothing is known of
            what is added.
        before: product of the sizes before that axis.
        after: product of the sizes after it.
        coefficient: c.
    """

    weight: str
    before: int = 1
    after: int = 1
    coefficient: float = 1.0


@dataclass(frozen=True, eq=False)
class Elementwise(Step):
    """A function of each element whose difference quotients lie in [low, high].

    Attributes:
        low: smallest slope, one number or one per channel (leading axis) or per element.
        high: largest slope, of the same form.
        kind: the name of the function where the slopes can be tightened on a region (`relu`, ...).
        parameters: of the function.
        weight: name of a stored tensor of parameters (PReLU), or empty.
    """

    low: Tensor
    high: Tensor
    kind: str = ""
    parameters: tuple[float, ...] = ()
    weight: str = ""


@dataclass(frozen=True)
class Opaque(Step):
    """Any function with `|dy| <= constant * |dx|`, dx the differences of all the sources together; size may change.

    Attributes:
        constant: an upper bound; infinite where there is none.
        reason: why, in one sentence.
        kind: name of the operation where the constant can be tightened on a region (`normalize`, `attention`, ...), or
            where it holds for each channel by itself (`max_pool`).
        parameters: of the operation.
    """

    constant: float
    reason: str
    kind: str = ""
    parameters: tuple[float, ...] = ()


def keeps_channels(step: Step) -> bool:
    """Whether a step is opaque, and its constant holds for each channel (the leading axis) by itself."""
    return isinstance(step, Opaque) and step.kind == "max_pool"


@dataclass(frozen=True)
class Program:
    """Steps in an order in which they can be computed, and which of them are the outputs.

    Attributes:
        steps: in order.
        outputs: positions of the outputs.
        constants: tensors that are not stored in the model, by name.
        origins: for each step, the node of the model's graph that it comes from; empty where that is not known.
    """

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    constants: dict[str, Tensor] = field(default_factory=dict)
    origins: tuple[str, ...] = ()

    def readers(self) -> list[list[int]]:
        """For each step, the later steps that read it."""
        readers: list[list[int]] = [[] for _ in self.steps]
        for position, step in enumerate(self.steps):
            for source in dict.fromkeys(step.sources):
                readers[source].append(position)
        return readers

    @property
    def inputs(self) -> tuple[int, ...]:
        """Positions of the inputs."""
        return tuple(i for i, step in enumerate(self.steps) if isinstance(step, Input))


def slopes(low: float | Tensor, high: float | Tensor) -> tuple[Tensor, Tensor]:
    """Two float64 tensors of one shape from two numbers or tensors."""
    a = torch.as_tensor(low, dtype=torch.float64)
    b = torch.as_tensor(high, dtype=torch.float64)
    zero = torch.zeros_like(a + b)
    return zero + a, zero + b
