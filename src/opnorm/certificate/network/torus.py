"""Which torus a convolutional program fits on, and where its tensors are exact there.

A tensor of `size` points per axis lies on a torus of T points, T / level of them after the strides so far. It is
*clean* where the torus tensor is zero outside `size`; a convolution with zero padding leaves a *dirty* one, of which
only the points inside `size` are the network's.
"""

from dataclasses import dataclass
from math import lcm, prod

from opnorm.certificate.network.maps import Convolution, Gather, LinearMap, Matrix, Scale
from opnorm.certificate.network.program import Concat, Elementwise, Input, Linear, Opaque, Program, Step, Sum
from opnorm.errors import UnsupportedLayerError


@dataclass(frozen=True)
class Place:
    """Where a tensor lives.

    Attributes:
        channels: number of channels.
        size: of its image, per axis.
        level: product of the strides that led to it, per axis.
        dirty: whether the torus tensor may be non-zero outside the image.
    """

    channels: int
    size: tuple[int, ...]
    level: tuple[int, ...]
    dirty: bool


@dataclass(frozen=True)
class Layout:
    """The torus of a program.

    Attributes:
        torus: points per axis at level 1.
        places: of each step that lives in Fourier space; None for those after the images were flattened.
        crops: steps that must read a cropped copy of their source.
        coarsest: a level that all levels divide.
    """

    torus: tuple[int, ...]
    places: tuple[Place | None, ...]
    crops: frozenset[int]
    coarsest: tuple[int, ...]


def layout(program: Program) -> Layout:
    """Find the torus, level by level.

    Raises:
        UnsupportedLayerError: if a step has no counterpart on a torus.
    """  # noqa: DOC501 - made by a helper
    first = program.steps[program.inputs[0]]
    if len(program.inputs) != 1 or len(first.shape) < 2:
        raise _unfit(first, "the Fourier calculus needs one input of images")
    torus = first.shape[1:]
    for _ in range(2):  # the second pass decides what is dirty on the torus that the first one asked for
        places: list[Place | None] = []
        crops: set[int] = set()
        needs = list(first.shape[1:])
        coarsest = [1] * len(needs)
        for position, step in enumerate(program.steps):
            place = _place(step, position, places, crops=crops, torus=torus, needs=needs)
            places.append(place)
            if place is not None:
                if step.shape != (place.channels, *place.size):
                    raise _unfit(step, f"its shape {step.shape} is not that of its images")
                needs = [max(n, s * f) for n, s, f in zip(needs, place.size, place.level, strict=True)]
                coarsest = [lcm(c, f) for c, f in zip(coarsest, place.level, strict=True)]
        circular = any(
            isinstance(s, Linear) and isinstance(s.map, Convolution) and s.map.circular for s in program.steps
        )
        torus = tuple(-(-n // c) * c for n, c in zip(needs, coarsest, strict=True))
        if circular and torus != first.shape[1:]:
            raise _unfit(
                first, "circular padding together with zero padding, or with a size that strides do not divide"
            )
    return Layout(torus, tuple(places), frozenset(crops), tuple(coarsest))


def _place(
    step: Step, position: int, places: list[Place | None], *, crops: set[int], torus: tuple[int, ...], needs: list[int]
) -> Place | None:
    """The place of a step's result; `needs` and `crops` grow on the way."""
    if isinstance(step, Input):
        return Place(step.shape[0], step.shape[1:], (1,) * (len(step.shape) - 1), False)
    sources = [places[i] for i in step.sources]
    if any(s is None for s in sources):
        if any(s is not None for s in sources):
            raise _unfit(step, "it joins images with what is no image")
        return None
    here = [s for s in sources if s is not None]
    source = here[0]
    if isinstance(step, Linear):
        return _after_linear(step, position, source, crops=crops, torus=torus, needs=needs)
    if isinstance(step, Sum):
        _same_level(step, here)
        return Place(source.channels, source.size, source.level, any(s.dirty for s in here))
    if isinstance(step, Concat):
        _same_level(step, here)
        if step.axis != 0 or any(s.size != source.size for s in here):
            raise _unfit(step, "it concatenates along another axis than the channels")
        return Place(sum(s.channels for s in here), source.size, source.level, any(s.dirty for s in here))
    if isinstance(step, Elementwise):
        if step.low.dim() > 1 or step.low.numel() not in (1, source.channels):
            raise _unfit(step, "its slopes differ within a channel")
        return Place(source.channels, source.size, source.level, False)
    assert isinstance(step, Opaque)
    return _after_opaque(step, here)


def _after_linear(
    step: Linear, position: int, source: Place, *, crops: set[int], torus: tuple[int, ...], needs: list[int]
) -> Place | None:
    linear = step.map
    if isinstance(linear, Scale) and linear.in_shape == (source.channels, *source.size):
        if linear.axis != 0:
            raise _unfit(step, "its factors differ within a channel")
        return source
    if isinstance(linear, Convolution):
        return _after_convolution(step, linear, position, source, crops=crops, torus=torus, needs=needs)
    if isinstance(linear, Gather) and linear.out_shape[1:] == source.size:
        return Place(linear.out_shape[0], source.size, source.level, source.dirty)
    if isinstance(linear, Matrix) and is_head(linear, source):
        return None
    raise _unfit(step, f"{type(linear).__name__} has no counterpart on a torus")


def is_head(linear: LinearMap, source: Place) -> bool:
    """Whether a matrix acts on whole images: flattened, or channel by channel."""
    if not isinstance(linear, Matrix) or linear.after != 1:
        return False
    return linear.before in (1, source.channels) and prod(linear.in_shape) == source.channels * prod(source.size)


def _after_convolution(
    step: Linear, conv: Convolution, position: int, source: Place, *, crops: set[int], torus: tuple[int, ...],
    needs: list[int],
) -> Place:  # fmt: skip
    if conv.in_shape != (source.channels, *source.size):
        raise _unfit(step, "it reads its images in another shape")
    size = conv.out_shape[1:]
    level = tuple(f * s for f, s in zip(source.level, conv.stride, strict=True))
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel, strict=True)]
    if conv.circular:
        whole = all(
            a + b == span and n % s == 0 and n // s == out
            for (a, b), span, n, s, out in zip(conv.padding, spans, source.size, conv.stride, size, strict=True)
        )
        if not whole or source.dirty:
            raise _unfit(step, "its circular padding does not give an output of the input's size")
        return Place(conv.out_shape[0], size, level, False)
    pointwise = not any(spans) and not any(a or b for a, b in conv.padding)
    if source.dirty and not pointwise:
        crops.add(position)
    last = [(o - 1) * s + span - a for o, s, span, (a, _) in zip(size, conv.stride, spans, conv.padding, strict=True)]
    for axis, f in enumerate(source.level):
        reach = max(source.size[axis] + conv.padding[axis][0], last[axis] + 1)
        needs[axis] = max(needs[axis], reach * f)
    return Place(
        conv.out_shape[0], size, level, _leaves_dirt(conv, source, size, spans, torus=torus, pointwise=pointwise)
    )


def _leaves_dirt(
    conv: Convolution,
    source: Place,
    size: tuple[int, ...],
    spans: list[int],
    *,
    torus: tuple[int, ...],
    pointwise: bool,
) -> bool:
    """Whether some point outside the result's image reads a point where the torus tensor may be non-zero."""
    for axis, (out, s, span) in enumerate(zip(size, conv.stride, spans, strict=True)):
        points = torus[axis] // source.level[axis]
        left = conv.padding[axis][0]
        if points // s == out:
            continue  # every point of the torus is inside the image
        first, last = s * out - left, s * (points // s - 1) + span - left
        if (source.dirty and pointwise) or first < source.size[axis] or last > points - 1:
            return True
    return False


def _after_opaque(step: Opaque, here: list[Place]) -> Place | None:
    source = here[0]
    _same_level(step, here)
    if len(step.shape) != len(source.size) + 1:
        return None
    ratios = [max(1, round(n / m)) for n, m in zip(source.size, step.shape[1:], strict=True)]
    level = tuple(f * r for f, r in zip(source.level, ratios, strict=True))
    return Place(step.shape[0], step.shape[1:], level, False)


def _same_level(step: Step, here: list[Place]) -> None:
    if any(p.level != here[0].level or p.size != here[0].size for p in here):
        raise _unfit(step, "it joins images of different sizes")


def _unfit(step: Step, reason: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(f"the Fourier calculus does not cover {step.label}: {reason}")
