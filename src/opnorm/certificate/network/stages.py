"""A program as a chain of stages on covariances: what is to be proved once its multipliers are chosen.

A vector z (the base: the tensors that are live, one under the other) is *covered* by P when, for any two inputs,
the difference of z lies in `{ P^(1/2) w : |w| <= |dx| }`. A stage reads `y = read z`, passes it through a function
with slopes in [middle - radius, middle + radius] (or any function with `|dv| <= radius |dy|` where it is opaque),
and leaves the new base `(keep z, v)`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.affine import (
    Rows,
    exact_identity,
    mapped,
    permuted,
    scaled_rows,
    stacked,
    summed,
)
from opnorm.certificate.network.maps import Weights
from opnorm.certificate.network.program import Concat, Elementwise, Input, Linear, Opaque, Program, Step, Sum
from opnorm.errors import TooLargeError, UnsupportedLayerError

_MOST_LIVE = 16
"""How many times the limit the rows of all affine results that wait to be read may be."""


@dataclass(frozen=True, eq=False)
class Stage:
    """One non-linear step.

    Attributes:
        mean: rows of `(keep z, middle * y)`, the part of the new base that is linear in the old one.
        spread: rows of `radius * y` where the radius is positive.
        groups: for each row of `spread`, the number of its multiplier: one per neuron, or per channel where the base
            is in Fourier space, or one for all where the step is opaque.
        free: positions in the new base of the free part of v.
        free_groups: for each of them, the number of its multiplier.
        step: position of the step in the program.
        keeps: whether other tensors stay live beside v.
        lean: the largest |middle| / radius of an element.
    """

    mean: Rows
    spread: Rows
    groups: Tensor
    free: Tensor
    free_groups: Tensor
    step: int
    keeps: bool = False
    lean: float = 0.0

    @cached_property
    def count(self) -> int:
        """Number of multipliers."""
        return int(self.groups.max()) + 1 if self.groups.numel() else 0

    @cached_property
    def decoupled(self) -> bool:
        """Whether nothing of the new base is linear in the old one."""
        error = self.mean.error
        return not bool((self.mean.value != 0).any()) and (error is None or not bool((error != 0).any()))

    @cached_property
    def selected(self) -> Tensor | None:
        """Which elements of the old base are kept, where they are kept as they are and v's linear part is `spread`.

        Then the products for the tensors beside v are parts of those for v. None otherwise.
        """
        kept = self.mean.height - self.spread.height
        if kept < 0 or not torch.equal(self.mean.value[:, kept:], self.spread.value):
            return None
        if kept == 0:
            return torch.arange(0)
        rows = self.mean.value[:, :kept]
        error = self.mean.error
        first = rows[0].real
        same = bool((rows == rows[:1]).all()) and bool((rows[0].imag == 0).all() if rows.is_complex() else True)
        one = bool(((first == 0) | (first == 1)).all()) and bool((first.sum(-1) == 1).all())
        clean = error is None or not bool(error[:, :kept].any())
        return first.argmax(-1) if same and one and clean else None

    def free_diagonal(self, multipliers: Tensor) -> Tensor:
        """What the free part adds to the diagonal of the new base's cover."""
        diagonal = torch.zeros(self.mean.height, dtype=multipliers.dtype)
        return diagonal.index_put((self.free,), multipliers[self.free_groups])


@dataclass(frozen=True, eq=False)
class Answer:
    """How a non-linear step answers to `y`, before it is known what stays live beside it.

    Attributes:
        mean: rows of `middle * y`.
        spread: rows of `radius * y` where the radius is positive.
        groups: the number of each row's multiplier.
        free: which elements of v have a free part.
        free_groups: the number of each one's multiplier.
        lean: the largest |middle| / radius.
    """

    mean: Rows
    spread: Rows
    groups: Tensor
    free: Tensor
    free_groups: Tensor
    lean: float


@dataclass(frozen=True, eq=False)
class Detach:
    """After an opaque step whose result is no image: its cover, the same in every block, in one real block."""

    def apply(self, cover: Tensor) -> Tensor:
        """The first block."""
        return cover[:1].real.contiguous()


@dataclass(frozen=True, eq=False)
class Regrid:
    """Blocks of a finer grid of frequencies joined to those of a coarser one: a stride, before it acts.

    Attributes:
        blocks: for each new block, the old blocks that are its aliases, shape (new, aliases).
        conjugate: whether the old block is to be conjugated, of the same shape.
    """

    blocks: Tensor
    conjugate: Tensor

    def apply(self, cover: Tensor) -> Tensor:
        """The block-diagonal cover of the aliases; exact."""
        parts = cover[self.blocks]  # shape: (new, aliases, n, n)
        parts = torch.where(self.conjugate[..., None, None], parts.conj(), parts)
        new, aliases, n, _ = parts.shape
        return _block_diagonal(parts).reshape(new, aliases * n, aliases * n)


@dataclass(frozen=True, eq=False)
class Collect:
    """The end of Fourier space: a linear map of the whole sample, summed over the frequencies.

    Attributes:
        rows: of the result over the base, shape (blocks, n_out, base).
        weights: how often each block counts (2 where its conjugate is left out).
    """

    rows: Rows
    weights: Tensor

    def apply(self, cover: Tensor) -> Tensor:
        """The cover of the result, in one real block, without any claim."""
        value = self.rows.value
        gram = (value @ cover @ value.mH).real
        total = (self.weights[:, None, None] * gram).sum(0, keepdim=True)
        return (total + total.mT) / 2


def _block_diagonal(parts: Tensor) -> Tensor:
    aliases = parts.shape[1]
    eye = torch.eye(aliases, dtype=parts.real.dtype)
    return parts[:, :, :, None, :] * eye[None, :, None, :, None].to(parts.dtype)


Transition = Stage | Regrid | Collect | Detach


@dataclass(frozen=True, eq=False)
class Chain:
    """All stages, and the outputs in terms of the last base.

    Attributes:
        width: size of a block of the first base, covered by the identity.
        stages: in order.
        out: rows of the outputs over the last base.
        blocks: number of blocks of the first base.
    """

    width: int
    stages: tuple[Transition, ...]
    out: Rows
    blocks: int = 1

    def transitions(self) -> Iterator[Transition]:
        """The stages, one after the other."""
        return iter(self.stages)

    @property
    def choices(self) -> tuple[Stage, ...]:
        """The stages that need multipliers."""
        return tuple(s for s in self.stages if isinstance(s, Stage))

    @property
    def dtype(self) -> torch.dtype:
        """Of the first base."""
        first = self.stages[0] if self.stages else None
        if isinstance(first, Stage):
            return first.mean.value.dtype
        return torch.complex128 if first is not None else self.out.value.dtype


def centre_and_radius(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Floats m and r with `[low, high]` inside `[m - r, m + r]` in exact arithmetic."""
    middle = (low + high) / 2
    gap = torch.maximum(high - middle, middle - low)
    exact = (gap + middle == high) & (middle - gap == low) & (torch.frexp(gap)[0].abs() == 0.5)
    return middle, torch.where(exact | (gap == 0), gap, gap * (1 + 4 * rounding.U) + rounding.TINY)


def per_element(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """One number, one per channel (leading axis) or one per element, as one per element, flattened."""
    if values.dim() == 1 and len(shape) > 1:
        values = values.reshape(-1, *([1] * (len(shape) - 1)))
    return values.expand(shape).reshape(-1).contiguous()


def dense_chain(
    program: Program,
    weights: Weights,
    limit: int = 4096,
    slopes: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> Chain:
    """The stages of a program with one dense block.

    Args:
        program: what the network computes.
        weights: its stored weights, by name.
        limit: largest number of elements in a base.
        slopes: slopes of elementwise steps that hold on a region, instead of the global ones.

    Raises:
        TooLargeError: if a base would exceed `limit`.
    """
    weights = {**weights, **program.constants}
    last = last_readers(program)
    width = sum(program.steps[i].size for i in program.inputs)
    _require(width, limit)
    rows: dict[int, Rows] = {}
    waiting = first_of_two(program)
    slopes = dict(slopes or {})
    start = 0
    stages: list[Stage] = []
    for position, step in enumerate(program.steps):
        if isinstance(step, Input):
            rows[position] = _slice_of_identity(width, start, step.size)
            start += step.size
        elif position in waiting:
            assert isinstance(step, Elementwise)
            rows[position] = rows[step.sources[0]]
            slopes[waiting[position]] = composite(program, position, waiting[position], slopes)
        elif isinstance(step, Elementwise | Opaque):
            stage, rows = _stage(program, position, rows, last, limit=limit, local=slopes.get(position))
            stages.append(stage)
        else:
            _require(step.size, limit)
            _require(sum(r.height for r in rows.values()), _MOST_LIVE * limit)
            rows[position] = affine_rows(step, [rows[i] for i in step.sources], weights)
        rows = {i: r for i, r in rows.items() if last[i] > position or isinstance(program.steps[i], Input)}
    return Chain(width, tuple(stages), stacked([rows[i] for i in program.outputs]))


def first_of_two(program: Program) -> dict[int, int]:
    """Elementwise functions that one other elementwise function alone reads, such as a gate and its factor, and which.

    Both are one function, whose slopes are products of theirs: it takes one stage instead of two.
    """
    readers = program.readers()
    pairs = {
        position: readers[position][0]
        for position, step in enumerate(program.steps)
        if isinstance(step, Elementwise) and len(readers[position]) == 1 and position not in program.outputs
    }
    return {first: second for first, second in pairs.items() if isinstance(program.steps[second], Elementwise)}


def composite(
    program: Program, first: int, second: int, slopes: dict[int, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The slopes of two functions, one after the other: between the smallest and the largest product, rounded outward.

    Args:
        program: with both.
        first: position of the inner one.
        second: position of the outer one.
        slopes: those that hold instead of the steps' own, by position.
    """
    ends = []
    for position in (first, second):
        step = program.steps[position]
        assert isinstance(step, Elementwise)
        ends.append([per_element(e, step.shape) for e in slopes.get(position, (step.low, step.high))])
    products = torch.stack([a * b for a in ends[0] for b in ends[1]])
    low, high = products.amin(0), products.amax(0)
    plain = torch.stack([(end == 0) | (end.abs() == 1) for end in ends[0] + ends[1]])
    exact = plain[:2].all(0) | plain[2:].all(0)
    low = torch.where(exact, low, low - low.abs() * (2 * rounding.U) - rounding.TINY)
    high = torch.where(exact, high, high + high.abs() * (2 * rounding.U) + rounding.TINY)
    shape = program.steps[second].shape
    return low.reshape(shape), high.reshape(shape)


def affine_rows(step: Step, parts: list[Rows], weights: Weights) -> Rows:
    """The rows of an affine step from those of its sources."""
    if isinstance(step, Linear):
        return mapped(parts[0], step.map, weights)
    if isinstance(step, Sum):
        return summed(parts, step.coefficients)
    assert isinstance(step, Concat)
    return permuted(stacked(parts), concat_order(step.shapes, step.axis))


def concat_order(shapes: tuple[tuple[int, ...], ...], axis: int) -> Tensor:
    """Where each element of the concatenation lies among the flattened parts."""
    parts, start = [], 0
    for shape in shapes:
        size = int(torch.Size(shape).numel())
        parts.append(torch.arange(start, start + size).reshape(shape))
        start += size
    return torch.cat(parts, axis).reshape(-1)


def _stage(
    program: Program,
    position: int,
    rows: dict[int, Rows],
    last: list[int],
    *,
    limit: int,
    local: tuple[Tensor, Tensor] | None,
) -> tuple[Stage, dict[int, Rows]]:
    step = program.steps[position]
    keep = [i for i in rows if last[i] > position]
    kept = sum(rows[i].height for i in keep)
    _require(kept + step.size, limit)
    source = stacked([rows[i] for i in step.sources]) if len(step.sources) > 1 else rows[step.sources[0]]
    answer = response(step, source, local)
    new: dict[int, Rows] = {}
    start, width = 0, kept + step.size
    for i in keep:
        new[i] = _slice_of_identity(width, start, rows[i].height)
        start += rows[i].height
    new[position] = _slice_of_identity(width, start, step.size)
    return staged(answer, [rows[i] for i in keep], position), new


def staged(answer: Answer, keep: list[Rows], position: int) -> Stage:
    """The stage of a step beside the tensors that stay live."""
    kept = sum(r.height for r in keep)
    mean = stacked([*keep, answer.mean])
    return Stage(
        mean, answer.spread, answer.groups, answer.free + kept, answer.free_groups, position, bool(keep), answer.lean
    )


def response(step: Step, source: Rows, local: tuple[Tensor, Tensor] | None = None) -> Answer:
    """How a non-linear step answers to its source, in one dense block."""
    if isinstance(step, Opaque):
        return opaque_answer(step, source, step.size)
    assert isinstance(step, Elementwise)
    low, high = local if local is not None else (step.low, step.high)
    middle, radius = centre_and_radius(per_element(low, step.shape), per_element(high, step.shape))
    free = torch.nonzero(radius > 0).flatten()
    groups = torch.arange(len(free))
    spread = scaled_rows(permuted(source, free), radius[free])
    return Answer(scaled_rows(source, middle), spread, groups, free, groups, lean_of(middle[free], radius[free]))


def opaque_answer(step: Opaque, source: Rows, height: int) -> Answer:
    """Nothing linear, one multiplier for all rows.

    Raises:
        UnsupportedLayerError: if the step has no Lipschitz constant.
    """
    constant = step.constant
    if not constant < float("inf"):
        raise UnsupportedLayerError(f"{step.label} has no Lipschitz constant: {step.reason}")
    radius = torch.full((source.height,), constant, dtype=torch.float64)
    mean = Rows(source.value.new_zeros(1, height, source.value.shape[-1]))
    zeros = torch.zeros(source.height + height, dtype=torch.int64)
    spread = scaled_rows(source, radius)
    return Answer(mean, spread, zeros[: source.height], torch.arange(height), zeros[source.height :], 0.0)


def lean_of(middle: Tensor, radius: Tensor) -> float:
    """The largest |middle| / radius."""
    return float((middle.abs() / radius).detach().max()) if len(radius) else 0.0


def _slice_of_identity(width: int, start: int, size: int) -> Rows:
    return Rows(exact_identity(width).value[:, start : start + size])


def last_readers(program: Program) -> list[int]:
    """The last step that reads each step; past the end for outputs."""
    last = [max(readers, default=-1) for readers in program.readers()]
    for output in program.outputs:
        last[output] = len(program.steps)
    return last


def _require(size: int, limit: int) -> None:
    if size > limit:
        raise TooLargeError(
            f"the dense calculus would hold {size} live elements, more than the limit of {limit}; "
            "use method='fourier' for convolutions, or method='naive'"
        )
