"""The stages of a convolutional program in Fourier space: one block of channels for each frequency.

A base tensor of `c` channels at a level finer than the base's grid of frequencies has `c` rows for each of its
aliases (frequencies of its own grid that a stride folds onto one of the base's). Multipliers are constant over
positions, so they are one per channel, for all frequencies and aliases. Only half of the frequencies of the last axis
are kept: the others are conjugates.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product as cartesian
from math import prod

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network import symbols
from opnorm.certificate.network.affine import Rows, expanded, permuted, scaled_rows, stacked, summed
from opnorm.certificate.network.maps import Convolution, Gather, Matrix, Scale, Weights, stored
from opnorm.certificate.network.order import hoisted
from opnorm.certificate.network.program import Concat, Elementwise, Input, Linear, Opaque, Program, Step, Sum
from opnorm.certificate.network.stages import (
    Answer,
    Chain,
    Collect,
    Detach,
    Regrid,
    Transition,
    affine_rows,
    centre_and_radius,
    last_readers,
    lean_of,
    opaque_answer,
    response,
    staged,
)
from opnorm.certificate.network.torus import Layout, Place, layout
from opnorm.errors import TooLargeError, UnsupportedLayerError

Axes = tuple[int, ...]

_MOST_FREQUENCIES = 2**24


def fourier_chain(program: Program, weights: Weights, limit: float = 6e9, part: Tensor | None = None) -> Chain:
    """The stages of a convolutional program.

    Args:
        program: what the network computes.
        weights: its stored weights, by name.
        limit: largest number of bytes of one cover.
        part: positions among the `coarse_frequencies`, whose blocks alone are kept; all by default.

    Raises:
        UnsupportedLayerError: if a step has no counterpart on a torus.
        TooLargeError: if a cover would exceed the limit.
    """
    walk = fourier_walk(program, weights, limit, part)
    stages = tuple(walk.transitions())
    return Chain(walk.width, stages, walk.out, walk.blocks)


def fourier_walk(program: Program, weights: Weights, limit: float = 6e9, part: Tensor | None = None) -> "Walk":
    """The same, stage by stage, for networks whose stages together would fill the memory."""
    program, order = hoisted(program)
    return Walk(program, order, {**weights, **program.constants}, layout(program), limit, part)


def coarse_frequencies(plan: Layout) -> Tensor:
    """Half the spectrum of the coarsest grid, shape (f, d): nothing couples one of them to another before the head.

    The frequencies of finer grids are aliases of these.
    """
    return _half_spectrum(tuple(t // f for t, f in zip(plan.torus, plan.coarsest, strict=True)))


def _half_spectrum(points: Axes) -> Tensor:
    if prod(points) > _MOST_FREQUENCIES:
        raise TooLargeError(f"the Fourier calculus needs {prod(points)} frequencies")
    axes = [torch.arange(n) for n in points[:-1]] + [torch.arange(points[-1] // 2 + 1)]
    return torch.cartesian_prod(*axes).reshape(-1, len(points))


@dataclass(eq=False)
class Walk:
    """A program's stages, built one after the other; `out` is there once `transitions` has ended."""

    program: Program
    order: tuple[int, ...]
    weights: Weights
    plan: Layout
    limit: float
    part: Tensor | None = None
    rows: dict[int, Rows] = field(default_factory=dict)
    stages: list[Transition] = field(default_factory=list)
    level: Axes = ()
    flat: bool = False
    cropped: set[int] = field(default_factory=set)
    base: list[Place | None] = field(default_factory=list)

    @property
    def first(self) -> Place:
        """Where the input lives."""
        place = self.plan.places[self.program.inputs[0]]
        assert place is not None
        return place

    @property
    def width(self) -> int:
        """Channels of the input."""
        return self.first.channels

    @property
    def blocks(self) -> int:
        """Blocks of the first base."""
        return len(self.frequencies(self.first.level))

    @property
    def out(self) -> Rows:
        """The outputs over the last base."""
        out = stacked([self.rows[i] for i in self.program.outputs])
        untouched = not self.flat and out.value.shape[0] == 1
        return expanded(out, len(self.frequencies(self.level))) if untouched else out

    def transitions(self) -> Iterator[Transition]:
        """Build the stages, each when it is asked for."""
        last = last_readers(self.program)
        self.level, self.base = self.first.level, [self.first]
        _require(self.blocks, self.width, self.limit)
        for position, step in enumerate(self.program.steps):
            if isinstance(step, Input):
                self.rows[position] = self.identity(self.width, 0, self.width)
            elif self.plan.places[position] is None and not self.flat:
                self.flatten(position, step, last)
            elif isinstance(step, Elementwise | Opaque):
                self.respond(position, step, last)
            elif self.plan.places[position] is None:
                self.rows[position] = affine_rows(step, [self.rows[i] for i in step.sources], self.weights)
            else:
                self.rows[position] = self.linear(position, step, last)
            self.rows = {i: r for i, r in self.rows.items() if last[i] > position}
            yield from self.stages
            self.stages.clear()

    def identity(self, width: int, start: int, size: int) -> Rows:
        """Rows of the base itself; complex in Fourier space."""
        eye = torch.eye(width, dtype=torch.float64 if self.flat else torch.complex128)
        return Rows(eye[None, start : start + size])

    # ---------------------------------------------------------------- the grid of frequencies

    def grid(self, level: Axes) -> Axes:
        """Points of the torus at a level."""
        return tuple(t // f for t, f in zip(self.plan.torus, level, strict=True))

    def frequencies(self, level: Axes) -> Tensor:
        """The frequencies whose blocks are kept, shape (blocks, d): half of all, or the aliases of the part's."""
        points = self.grid(level)
        if self.part is None:
            return _half_spectrum(points)
        coarse = torch.tensor(self.grid(self.plan.coarsest))
        ratios = [f // g for f, g in zip(self.plan.coarsest, level, strict=True)]
        shifts = torch.tensor(list(cartesian(*(range(r) for r in ratios)))).reshape(-1, len(level)) * coarse
        return (coarse_frequencies(self.plan)[self.part][:, None] + shifts).flatten(0, 1)

    def aliases(self, level: Axes) -> Tensor:
        """The aliases of a tensor at a level on the base's grid, in multiples of that grid's size, shape (a, d)."""
        ratios = [f // g for f, g in zip(self.level, level, strict=True)]
        return torch.tensor(list(cartesian(*(range(r) for r in ratios)))).reshape(-1, len(level))

    def alias_frequencies(self, level: Axes) -> Tensor:
        """The frequencies of a tensor's rows on its own grid, shape (blocks, aliases, d)."""
        points = torch.tensor(self.grid(self.level))
        return self.frequencies(self.level)[:, None] + self.aliases(level)[None] * points

    def reach(self, place: Place) -> None:
        """Fold all live tensors together, before a stride acts."""
        if any(f > g for f, g in zip(place.level, self.level, strict=True)):
            self.coarsen(tuple(max(f, g) for f, g in zip(place.level, self.level, strict=True)))

    def coarsen(self, level: Axes) -> None:
        """Fold the base onto the grid of a coarser level."""
        old_level = self.level
        if any(place is None or place.level != old_level for place in self.base):
            raise UnsupportedLayerError("the Fourier calculus does not cover a skip over two strides")
        old = self.grid(old_level)
        kept = {tuple(k): i for i, k in enumerate(self.frequencies(old_level).tolist())}
        self.level = level
        fine = self.alias_frequencies(old_level)  # shape: (new, aliases, d)
        blocks = torch.empty(fine.shape[:2], dtype=torch.int64)
        conjugate = torch.zeros(fine.shape[:2], dtype=torch.bool)
        for i, line in enumerate(fine.tolist()):
            for a, k in enumerate(line):
                found = kept.get(tuple(k))
                if found is None:
                    found, conjugate[i, a] = kept[tuple(-x % n for x, n in zip(k, old, strict=True))], True
                blocks[i, a] = found
        self.stages.append(Regrid(blocks, conjugate))
        self.rows = {i: _folded(r, blocks, conjugate) for i, r in self.rows.items()}
        self._check(sum(p.channels for p in self.base if p is not None) * blocks.shape[1], len(blocks))

    def _check(self, width: int, blocks: int) -> None:
        _require(blocks, width, self.limit)

    # ---------------------------------------------------------------- affine steps

    def linear(self, position: int, step: Step, last: list[int]) -> Rows:
        """Rows of an affine step whose result is an image."""
        place = self.plan.places[position]
        assert place is not None
        if position in self.plan.crops and step.sources[0] not in self.cropped:
            self.crop(step.sources[0], position, last)
        self.reach(place)
        parts = [self.rows[i] for i in step.sources]
        if isinstance(step, Sum):
            return summed(parts, step.coefficients)
        if isinstance(step, Concat):
            return self._concatenated(step, parts, place)
        assert isinstance(step, Linear)
        source = self.plan.places[step.sources[0]]
        assert source is not None
        rows = parts[0]
        if isinstance(step.map, Convolution):
            return self._convolved(step.map, rows, source, place)
        count = len(self.aliases(source.level))
        if isinstance(step.map, Scale):
            factors = step.map.factors(self.weights).expand(source.channels)
            scaled = scaled_rows(rows, factors.repeat(count))
            if step.map.units:
                size = scaled.value.abs() * (step.map.units * 2 * rounding.U)
                scaled = Rows(scaled.value, size if scaled.error is None else scaled.error * (1 + 1e-14) + size)
            return scaled
        assert isinstance(step.map, Gather)
        order = _channel_order(self.weights[step.map.index], source, place, step)
        offsets = torch.arange(count)[:, None] * source.channels
        return permuted(rows, (offsets + order[None]).reshape(-1))

    def _concatenated(self, step: Concat, parts: list[Rows], place: Place) -> Rows:
        count = len(self.aliases(place.level))
        sizes = [p.height // count for p in parts]
        starts = torch.tensor([0, *(p.height for p in parts)]).cumsum(0)
        order = [
            torch.arange(size) + int(start) + a * size
            for a in range(count)
            for size, start in zip(sizes, starts, strict=False)
        ]
        return permuted(stacked(parts), torch.cat(order))

    def _convolved(self, conv: Convolution, rows: Rows, source: Place, place: Place) -> Rows:
        """Rows of a convolution: one symbol for each alias, those that a stride joins side by side."""
        fine = self.alias_frequencies(source.level)  # shape: (blocks, aliases, d)
        ins, outs = self.aliases(source.level), self.aliases(place.level)
        ratios = torch.tensor([f // g for f, g in zip(self.level, place.level, strict=True)])
        blocks = len(fine)
        self._check(max(len(ins) * source.channels, len(outs) * place.channels), blocks)
        kernel = symbols.symbol(conv, self.weights, fine.reshape(-1, fine.shape[-1]), self.grid(source.level))
        assert kernel.error is not None
        value = kernel.value.reshape(blocks, len(ins), place.channels, source.channels)
        strided = prod(conv.stride)
        scale = 1 / strided**0.5
        joined = value.new_zeros(blocks, len(outs), place.channels, len(ins), source.channels)
        doubt = kernel.error.new_zeros(1, *joined.shape[1:])  # the same at every frequency
        for b, out in enumerate(outs.tolist()):
            for a, alias in enumerate(ins.tolist()):
                if [x % r for x, r in zip(alias, ratios.tolist(), strict=True)] == out:
                    joined[:, b, :, a] = value[:, a] * scale
                    doubt[:, b, :, a] = kernel.error * scale * (1 + 8 * rounding.U)
        shape = (blocks, len(outs) * place.channels, len(ins) * source.channels)
        joined, doubt = joined.reshape(shape), doubt.reshape(1, *shape[1:])
        if strided > 1:
            doubt = doubt + joined.abs().amax(0, keepdim=True) * (8 * rounding.U)
        return symbols.product(Rows(joined, doubt * (1 + 1e-14)), rows)

    # ---------------------------------------------------------------- non-linear steps

    def respond(self, position: int, step: Elementwise | Opaque, last: list[int]) -> None:
        """Append the stage of a non-linear step, and start the next base from what is live."""
        place = self.plan.places[position]
        if place is None:
            self._stage(position, response(step, stacked([self.rows[i] for i in step.sources])), place, position, last)
            return
        self.reach(place)
        source = stacked([self.rows[i] for i in step.sources])
        if isinstance(step, Opaque):
            answer = opaque_answer(step, source, place.channels * len(self.aliases(place.level)))
        else:
            origin = self.plan.places[step.sources[0]]
            answer = self._elementwise(source, step.low, step.high, place, origin is None or origin.dirty)
        self._stage(position, answer, place, position, last)

    def crop(self, source: int, now: int, last: list[int]) -> None:
        """Put zeros outside the image of a dirty tensor, by a step with slopes 0 and 1."""
        place = self.plan.places[source]
        assert place is not None
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        answer = self._elementwise(self.rows.pop(source), zero, one, place, True)
        self._stage(source, answer, place, now, last)
        self.cropped.add(source)

    def _elementwise(self, rows: Rows, low: Tensor, high: Tensor, place: Place, dirty: bool) -> Answer:
        if dirty:
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        middle, radius = centre_and_radius(low.expand(place.channels), high.expand(place.channels))
        count = len(self.aliases(place.level))
        channels = torch.nonzero(radius > 0).flatten()
        offsets = torch.arange(count)[:, None] * place.channels
        free = (offsets + channels[None]).reshape(-1)
        groups = torch.arange(len(channels)).repeat(count)
        mean = scaled_rows(rows, middle.repeat(count))
        spread = scaled_rows(permuted(rows, free), radius[channels].repeat(count))
        return Answer(mean, spread, groups, free, groups, lean_of(middle[channels], radius[channels]))

    def _stage(self, key: int, answer: Answer, place: Place | None, now: int, last: list[int]) -> None:
        keep = [i for i in self.rows if last[i] > now]
        stage = staged(answer, [self.rows[i] for i in keep], self.order[now])
        self.stages.append(stage)
        blocks = 1 if self.flat else len(self.frequencies(self.level))
        self._check(stage.mean.height + stage.spread.height, blocks)
        start, width = 0, stage.mean.height
        new: dict[int, Rows] = {}
        for i in keep:
            new[i] = self.identity(width, start, self.rows[i].height)
            start += self.rows[i].height
        new[key] = self.identity(width, start, answer.mean.height)
        self.base = [*(self.plan.places[i] for i in keep), place]
        self.rows = new

    # ---------------------------------------------------------------- the end of Fourier space

    def flatten(self, position: int, step: Step, last: list[int]) -> None:
        """A head: a linear map of whole images, or an opaque step whose result is no image."""
        others = [i for i in self.rows if last[i] > position and i not in step.sources]
        again = [i for i in step.sources if last[i] > position]
        if others or again:
            raise UnsupportedLayerError(f"the Fourier calculus does not cover {step.label} beside other live images")
        source = self.plan.places[step.sources[0]]
        assert source is not None
        if isinstance(step, Opaque):
            rows = stacked([self.rows[i] for i in step.sources])
            self.stages += [staged(opaque_answer(step, rows, step.size), [], self.order[position]), Detach()]
        else:
            assert isinstance(step, Linear) and isinstance(step.map, Matrix)
            head = self._head(step.map, source)
            rows = symbols.product(head, self.rows[step.sources[0]])
            self.stages.append(Collect(rows, self._weights()))
        self.rows = {position: Rows(torch.eye(step.size, dtype=torch.float64)[None])}
        self.flat = True
        self.base = [None]

    def _weights(self) -> Tensor:
        """How often each block counts in a sum over the torus: 2 where its conjugate is left out."""
        points = self.grid(self.level if self.part is None else self.plan.coarsest)[-1]
        last = self.frequencies(self.level)[:, -1] % points
        return torch.where((last == 0) | (2 * last == points), 1.0, 2.0).to(torch.float64)

    def _head(self, matrix: Matrix, source: Place) -> Rows:
        """`sum_p W_p exp(i w p) / sqrt(points)` for each alias: rows over the source's rows."""
        stored_matrix = stored(self.weights, matrix.weight)
        outs = stored_matrix.shape[0]
        points = prod(source.size)
        per_channel = matrix.before != 1
        kernels = stored_matrix.reshape(outs, -1, points)  # shape: (out, channels or 1, points)
        positions = torch.cartesian_prod(*(torch.arange(n) for n in source.size)).reshape(points, -1)
        fine = self.alias_frequencies(source.level)
        grid = self.grid(source.level)
        wave = symbols.waves(fine.reshape(-1, fine.shape[-1]), positions, grid)
        scale = 1 / prod(grid) ** 0.5
        value = torch.einsum("ocp,fp->foc", kernels.to(torch.complex128), wave) * scale
        relative = symbols.wave_error(len(grid)) + 2 * rounding.gamma(points + 8) + matrix.units * 2 * rounding.U
        error = (kernels.abs().sum(-1) * (scale * relative * (1 + 1e-6)))[None].expand(value.shape)
        blocks, count = fine.shape[:2]
        if per_channel:
            # The same functional on every channel: result (channel, out).
            eye = torch.eye(source.channels, dtype=torch.float64)
            value = torch.einsum("fo,cd->fcod", value[:, :, 0], eye.to(torch.complex128)).flatten(1, 2)
            error = torch.einsum("fo,cd->fcod", error[:, :, 0], eye).flatten(1, 2)
        rows = value.shape[1]
        value = value.reshape(blocks, count, rows, source.channels).transpose(1, 2).flatten(2)
        error = error.reshape(blocks, count, rows, source.channels).transpose(1, 2).flatten(2)
        return Rows(value, error)


def _require(blocks: int, width: int, limit: float) -> None:
    if 16.0 * blocks * width * width > limit:
        raise TooLargeError(f"the Fourier calculus needs {blocks} blocks of {width} x {width} numbers")


def _folded(rows: Rows, blocks: Tensor, conjugate: Tensor) -> Rows:
    """The rows of all aliases, block-diagonal over the aliases of the base."""
    return Rows(_fold(rows.value, blocks, conjugate), None if rows.error is None else _fold(rows.error, blocks, None))


def _fold(value: Tensor, blocks: Tensor, conjugate: Tensor | None) -> Tensor:
    if value.shape[0] == 1:
        parts = value[None].expand(blocks.shape[0], blocks.shape[1], -1, -1)
    else:
        parts = value[blocks]
        if conjugate is not None:
            parts = torch.where(conjugate[..., None, None], parts.conj(), parts)
    new, aliases, m, n = parts.shape
    eye = torch.eye(aliases, dtype=torch.float64).to(parts.dtype)
    return (parts[:, :, :, None, :] * eye[None, :, None, :, None]).reshape(new, aliases * m, aliases * n)


def _channel_order(index: Tensor, source: Place, place: Place, step: Step) -> Tensor:
    points = prod(source.size)
    lines = index.reshape(place.channels, points)
    order = lines[:, 0] // points
    if bool((order < 0).any()) or not torch.equal(lines, order[:, None] * points + torch.arange(points)):
        raise UnsupportedLayerError(f"the Fourier calculus does not cover {step.label}: it moves points")
    return order
