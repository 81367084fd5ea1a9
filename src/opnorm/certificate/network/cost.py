"""What the covariance calculus would cost, from the shapes alone: whether to begin it, and in how many parts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from opnorm.certificate.network.fourier_chain import coarse_frequencies
from opnorm.certificate.network.order import hoisted
from opnorm.certificate.network.program import Elementwise, Input, Opaque, Program
from opnorm.certificate.network.stages import last_readers
from opnorm.certificate.network.torus import Layout, layout

_RATE = 8e9
"""Flops a second of one thread in small complex products and factorisations; large real ones take half the time."""
_PART_BYTES = 7e8


@dataclass(frozen=True)
class Cost:
    """Of the covariance calculus on one program.

    Attributes:
        frequencies: number of coarse frequencies, which are independent of each other; 1 for a dense chain.
        search: flops of one pass over all frequencies.
        proof: flops of the proof.
        held: bytes of the largest base of all frequencies together: covers and rows of one stage.
        each: bytes of all stages of one coarse frequency, and of its proof.
        kept: bytes of all stages of all frequencies, with what a pass leaves at each for the adjoint.
    """

    frequencies: int
    search: float
    proof: float
    held: float
    each: float
    kept: float

    @property
    def seconds(self) -> float:
        """About how long one pass and the proof take on the threads that torch uses."""
        return (self.search + self.proof) / (_RATE * torch.get_num_threads())

    def parts(self, size: float | None = None) -> list[Tensor]:
        """The coarse frequencies in parts of so many bytes; by default what a proof may hold."""
        count = max(1, int((_PART_BYTES if size is None else size) / self.each))
        return list(torch.split(torch.arange(self.frequencies), count))


def fourier_cost(program: Program) -> Cost:
    """The cost in Fourier space, where complex products count four times.

    Raises:
        UnsupportedLayerError: if a step has no counterpart on a torus.
    """
    program, _ = hoisted(program)
    plan = layout(program)
    frequencies = len(coarse_frequencies(plan))
    points = prod(t // f for t, f in zip(plan.torus, plan.coarsest, strict=True))
    level = (1,) * len(plan.torus)
    stages: list[_Sizes] = []
    for position, step in enumerate(program.steps):
        place = plan.places[position]
        if place is None:
            break
        level = tuple(max(f, g) for f, g in zip(level, place.level, strict=True))
        if isinstance(step, Elementwise | Opaque | Input):
            blocks = prod(t // f for t, f in zip(plan.torus, level, strict=True)) * frequencies / points
            stages.append(_sizes(program, position, blocks, partial(_height, plan, level)))
    return _total(stages, frequencies, 4.0)


def dense_cost(program: Program) -> Cost:
    """The cost with one dense block."""
    kinds = (Elementwise, Opaque, Input)
    positions = [i for i, step in enumerate(program.steps) if isinstance(step, kinds)]
    return _total([_sizes(program, i, 1.0, lambda j: program.steps[j].size) for i in positions], 1, 0.5)


_Sizes = tuple[float, int, int]
"""Blocks, rows of what a stage acts on (0 for the input), size of the base after it."""


def _sizes(program: Program, position: int, blocks: float, height: Callable[[int], int]) -> _Sizes:
    step = program.steps[position]
    last = last_readers(program)
    kept = sum(height(i) for i in range(position) if last[i] > position)
    return blocks, sum(height(i) for i in step.sources), kept + height(position)


def _height(plan: Layout, level: tuple[int, ...], position: int) -> int:
    """Rows of a step's result where the base is at a level: its channels for each alias."""
    place = plan.places[position]
    if place is None:
        return 0
    return place.channels * prod(max(1, f // g) for f, g in zip(level, place.level, strict=True))


def _total(stages: list[_Sizes], frequencies: int, weight: float) -> Cost:
    """Add up products and factorisations; `weight` is what a real multiplication and addition count for, halved."""
    search = proof = held = stored = working = states = 0.0
    before = 0
    for blocks, rows, after in stages:
        before = before or after
        whole = rows + after
        once = rows * before * (before + rows) + rows**3 / 3 + rows * after * (rows + after)
        search += 2 * weight * blocks * once
        proof += blocks * (2 * weight * (once + whole**3 / 3) + 2 * whole * before * (before + whole))
        held = max(held, 16 * blocks * (2 * after * after + whole * before))
        stored += 16 * blocks * whole * before
        states += 16 * blocks * (before * before + 2 * rows * rows)
        working = max(working, 16 * blocks * 7 * whole * whole)
        before = after
    return Cost(frequencies, search, proof, held, (stored + working) / frequencies, stored + states)
