"""A program on a region: the slopes and constants that hold there, derived from the weights and the region alone.

The search for a certificate and its verifier both call `localised`. They differ in where its two kinds of help come
from: the search makes them and writes them down, the verifier proves what is written down.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.activations import slopes_between
from opnorm.certificate.network.maps import LinearMap, Weights
from opnorm.certificate.network.program import Elementwise, Input, Linear, Opaque, Program, Shift, Step, Sum
from opnorm.certificate.network.region import Region, around
from opnorm.certificate.network.stages import per_element
from opnorm.certificate.network.values import (
    Values,
    affine_values,
    elementwise_values,
    input_values,
    joined,
    normalised_values,
    product_values,
)
from opnorm.errors import CertificateError

Slopes = tuple[Tensor, Tensor]

MOST_ELEMENTS = 2**26
"""Of all steps on a region together, or of what one reads after padding: all their values are held."""

SLOPED = frozenset({"relu", "leaky_relu", "prelu", "sigmoid", "tanh"})
"""Functions whose slopes are narrower on an interval."""

Constants = Callable[[Program, int], Tensor | None]
"""(the steps so far, with the step whose constants are asked for as output, position of the step that reads it)
-> proved Lipschitz constants of that step's elements, or None."""

Norm = Callable[[int, LinearMap], float]
"""(position, map) -> a proved norm, or infinity."""


@dataclass(eq=False)
class Local:
    """A program on a region, as it is derived step by step.

    Attributes:
        program: as stated.
        weights: by name, the program's constants among them.
        radius: largest distance from the region's centre.
        stated: slopes that are to hold, by position in the new program; others are taken as they are derived.
        constants: proves constants of single elements.
        norm: proves the norms of maps.
        spare: share of its width by which every interval is made wider, so that another machine's fits in.
        steps: of the new program.
        slopes: of its elementwise steps, by position.
        values: of each step of the stated program.
        moved: where each of these steps is in the new one.
    """

    program: Program
    weights: Weights
    radius: float
    stated: Mapping[int, Slopes]
    constants: Constants
    norm: Norm
    spare: float
    steps: list[Step] = field(default_factory=list)
    slopes: dict[int, Slopes] = field(default_factory=dict)
    values: list[Values] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)

    @property
    def result(self) -> Program:
        """The new program, without shifts."""
        outputs = tuple(self.moved[i] for i in self.program.outputs)
        return Program(tuple(self.steps), outputs, self.program.constants)

    def add(self, step: Step, values: Values) -> None:
        """Append a step that stands for the next one of the stated program."""
        self.steps.append(step)
        self.values.append(values)
        self.moved.append(len(self.steps) - 1)

    def sloped(self, source: int, step: Step, slopes: Slopes, label: str) -> Slopes:
        """Append a function with slopes, which are those that are stated, and return these.

        Raises:
            CertificateError: if narrower ones are stated than were derived.
        """
        position = len(self.steps)
        low, high = self.stated.get(position, slopes)
        low, high = low.reshape(-1), high.reshape(-1)
        fits = low.numel() == high.numel() == step.size and low.dtype == high.dtype == torch.float64
        finite = bool(torch.isfinite(low).all() and torch.isfinite(high).all())
        if not fits or not finite or not bool(((low <= slopes[0]) & (slopes[1] <= high)).all()):
            raise CertificateError(f"{label}: the stated slopes are narrower than what can be proved on the region")
        self.slopes[position] = (low, high)
        self.steps.append(Elementwise((source,), step.shape, label, low.reshape(step.shape), high.reshape(step.shape)))
        return low, high

    def interval(self, x: Values) -> tuple[Tensor, Tensor]:
        """The ends of a tensor's elements, a little farther out."""
        wider = (self.spare * (x.high - x.low)).nan_to_num(nan=0.0)  # none of an infinite width
        return x.low - wider, x.high + wider


def localised(
    program: Program,
    weights: Weights,
    region: Region,
    *,
    constants: Constants,
    norm: Norm,
    stated: Mapping[int, Slopes] | None = None,
    spare: float = 0.0,
) -> Local:
    """The program on a region, the slopes of its elementwise steps, and what every step can be there.

    Args:
        program: with the shifts that its values need.
        weights: by name.
        region: of its one input.
        constants: proves constants of single elements.
        norm: proves norms of maps.
        stated: slopes that are to be used, after a check that they are wide enough.
        spare: share of its width by which every interval is made wider.

    Raises:
        ArgumentError: if the region does not fit the input.
        CertificateError: naming a step whose constant cannot be derived, or whose stated slopes are too narrow.
    """
    if len(program.inputs) != 1:
        raise CertificateError(f"a region is one of one input, and the program has {len(program.inputs)}")
    where = around(region, program.steps[program.inputs[0]].shape)
    weights = {**weights, **program.constants}
    state = Local(program, weights, where.radius, stated or {}, constants, norm, spare)
    _require_small(program)
    for step in program.steps:
        if isinstance(step, Input):
            state.add(step, input_values(where))
        elif isinstance(step, Elementwise):
            _elementwise(step, state)
        elif isinstance(step, Opaque):
            _opaque(step, state)
        else:
            _affine(step, state)
    if unused := set(state.stated) - set(state.slopes):
        raise CertificateError(f"slopes are stated for step {min(unused)}, which has none on the region")
    return state


def _affine(step: Step, state: Local) -> None:
    own, sources = _sources(step, state)
    norm = state.norm(len(state.steps), step.map) if isinstance(step, Linear) else math.inf
    values = affine_values(step, sources, state.weights, norm)
    if isinstance(step, Shift):
        state.values.append(values)
        state.moved.append(own[0])
    else:
        state.add(replace(step, sources=own), values)


def _elementwise(step: Elementwise, state: Local) -> None:
    """Between the ends of what it reads; the kind no longer vouches for the slopes that it has there."""
    (source,), (x,) = _sources(step, state)
    slopes = (per_element(step.low, step.shape), per_element(step.high, step.shape))
    if step.kind in SLOPED:
        so_far = Program(tuple(state.steps), (source,), state.program.constants)
        proved = state.constants(so_far, len(state.steps))
        if proved is not None:
            x = x.within(proved * state.radius * (1 + 4 * rounding.U) + rounding.TINY)
        slopes = slopes_between(step.kind, *state.interval(x), slopes)
    slopes = state.sloped(source, step, slopes, step.label)
    state.values.append(elementwise_values(step, slopes, x, state.weights))
    state.moved.append(len(state.steps) - 1)


def _opaque(step: Opaque, state: Local) -> None:
    """A tighter constant, or functions of each element, where the operation is known.

    Raises:
        CertificateError: if it has no constant on the region either.
    """
    own, sources = _sources(step, state)
    same = all(x.known and x.at.numel() == step.size for x in sources)
    if step.kind == "normalize" and _in_rows(step, sources):
        constant, values = normalised_values(step, sources[0])
        if constant < math.inf:
            state.add(replace(step, sources=own, constant=constant), values)
            return
    if step.kind == "multiply" and same and len(sources) == 2:
        _product(step, own, sources, state)
        return
    if step.kind in ("square", "exp") and same and len(sources) == 1:
        _steep(step, own[0], sources[0], state)
        return
    if not step.constant < math.inf:
        raise CertificateError(
            f"{step.label} has no constant for all inputs, and the verifier of certificates cannot derive one on a "
            "region from the weights alone. The bound that was found is proved, but no file can prove it to others"
        )
    total = rounding.mul_up(step.constant, joined(sources))
    state.add(replace(step, sources=own), Values.unknown(step.size, total))


def _steep(step: Opaque, source: int, x: Values, state: Local) -> None:
    """The square, or a function with the slopes of exp: they are known where what it reads is bounded."""
    low, high = state.interval(x)
    if step.kind == "square":
        slopes, values = (2 * low, 2 * high), product_values(x, x)
    else:
        slopes = (low.exp() * (1 - 1e-9), high.exp() * (1 + 1e-9) + rounding.TINY)
        values = Values.unknown(step.size, rounding.mul_up(float(slopes[1].max()), x.total))
    state.sloped(source, step, slopes, f"{step.label} on the region")
    state.values.append(values)
    state.moved.append(len(state.steps) - 1)


def _product(step: Opaque, own: tuple[int, ...], sources: list[Values], state: Local) -> None:
    """`d(x g) = g dx + x dg` with g and x halfway between two points: two functions with bounded slopes, added."""
    x, g = sources
    first = len(state.steps)
    for source, other, name in ((own[0], g, "first"), (own[1], x, "second")):
        state.sloped(source, step, state.interval(other), f"{step.label} ({name} factor)")
    state.add(Sum((first, first + 1), step.shape, step.label, (1.0, 1.0)), product_values(x, g))


def _sources(step: Step, state: Local) -> tuple[tuple[int, ...], list[Values]]:
    return tuple(state.moved[i] for i in step.sources), [state.values[i] for i in step.sources]


def _in_rows(step: Opaque, sources: list[Values]) -> bool:
    """Whether it divides by the root of the mean of squares plus eps, in groups of neighbours."""
    if len(sources) != 1 or len(step.parameters) != 7 or not all(map(math.isfinite, step.parameters)):
        return False
    size, eps, _, form, share, after, operand = step.parameters
    plain = (form, share, after, operand) == (0.0, size, 1.0, 0.0) and eps >= 0
    return plain and size >= 1 and step.size % size == 0 and sources[0].at.numel() == step.size


def _require_small(program: Program) -> None:
    total = sum(step.size for step in program.steps)
    widest = max(step.map.widest if isinstance(step, Linear) else 0 for step in program.steps)
    if max(total, widest) > MOST_ELEMENTS:
        raise CertificateError(f"{max(total, widest)} elements are too many for a certificate on a region")
