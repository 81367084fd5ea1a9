"""A program with the channels of its steps measured in other units, for the naive rules.

With a positive frame D for each step, `|D_out A dx| <= |D_out A D_in^-1| |D_in dx|`, so the naive rules bound `|D dz|`
for every step z from the norms of the rescaled maps. An activation acts on each element alone: |D dv| <= max slope
|D dy| for the same frame, and so does max pooling on each channel. Frames of inputs and outputs are 1, so what is
bounded at the end is the network itself.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from opnorm import _rounding as rounding
from opnorm.certificate.network.maps import Convolution, Matrix, Scale, Weighted, Weights, stored
from opnorm.certificate.network.program import (
    Concat,
    Elementwise,
    Input,
    Linear,
    Opaque,
    Program,
    Step,
    Sum,
    keeps_channels,
)
from opnorm.certificate.network.stages import per_element
from opnorm.errors import CertificateError

_ROUNDINGS = 4
_LARGEST, _SMALLEST = 2.0**200, 2.0**-900


def rescaled(program: Program, weights: Weights, frames: Sequence[Tensor]) -> Program:
    """The program whose steps are those of `program`, each times its frame; rescaled tensors are among its constants.

    Args:
        program: what the network computes.
        weights: its stored weights, by name.
        frames: for each step one positive number, or one for each channel (the leading axis).

    Raises:
        CertificateError: naming a step whose frame does not fit.
    """
    if len(frames) != len(program.steps):
        raise CertificateError(f"{len(frames)} frames are stated for {len(program.steps)} steps")
    weights = {**weights, **program.constants}
    constants = dict(program.constants)
    steps: list[Step] = []
    for position, (step, frame) in enumerate(zip(program.steps, frames, strict=True)):
        _check(step, frame, outermost=isinstance(step, Input) or position in program.outputs)
        before = [frames[i] for i in step.sources]
        if isinstance(step, Linear) and any(f.numel() > 1 or float(f) != 1 for f in (frame, *before)):
            linear, tensor = _map(step, weights, before[0], frame, program.steps[step.sources[0]].shape)
            _check_range(step, tensor)
            name = f"{step.map.names[0]} in the frames of step {position}"
            if name in weights:
                raise CertificateError(f"the name {name!r} is taken by a weight")
            constants[name] = tensor
            steps.append(replace(step, map=replace(linear, weight=name)))
        else:
            steps.append(_other(step, before, frame))
    return replace(program, steps=tuple(steps), constants=constants)


def _check(step: Step, frame: Tensor, *, outermost: bool) -> None:
    fits = frame.dim() == 0 or (frame.dim() == 1 and len(step.shape) > 0 and len(frame) == step.shape[0])
    if frame.dtype != torch.float64 or not fits:
        raise CertificateError(f"{step.label}: its frame is no list of float64 numbers for its channels")
    if not bool(((frame >= 1 / _LARGEST) & (frame <= _LARGEST)).all()):
        raise CertificateError(f"{step.label}: its frame holds a number that is not positive or too large")
    if outermost and not bool((frame == 1).all()):
        raise CertificateError(f"{step.label}: the frame of an input or an output must be 1")


def _other(step: Step, before: list[Tensor], frame: Tensor) -> Step:
    """A step that is no linear map, in its frames."""
    if isinstance(step, Elementwise) and not torch.equal(before[0], frame):
        raise CertificateError(f"{step.label}: an activation keeps the frame of what it reads")
    if isinstance(step, Sum):
        if len({f.numel() for f in (frame, *before)} - {1}) > 1:
            raise CertificateError(f"{step.label}: the frames of its terms do not fit")
        ratios = [float((frame / f).max()) for f in before]
        parts = (rounding.mul_up(abs(c), _up(r)) for c, r in zip(step.coefficients, ratios, strict=True))
        return replace(step, coefficients=tuple(parts))
    if isinstance(step, Concat):
        _check_joined(step, before, frame)
    if isinstance(step, Opaque) and not (keeps_channels(step) and torch.equal(before[0], frame)):
        stretch = max(rounding.div_up(1.0, float(f.min())) for f in before)
        return replace(step, constant=rounding.mul_up(step.constant, float(frame.max()), stretch))
    return step


def _up(ratio: float) -> float:
    """A computed quotient of stored numbers, rounded upward; a frame over itself is exact."""
    return ratio if ratio == 1.0 else rounding.up(ratio)


def _check_joined(step: Concat, before: list[Tensor], frame: Tensor) -> None:
    same = all(torch.equal(f, frame) for f in before) and frame.dim() == 0
    fits = all(f.numel() in (1, shape[0]) for f, shape in zip(before, step.shapes, strict=True))
    parts = [f.expand(shape[0]) for f, shape in zip(before, step.shapes, strict=True)] if fits else []
    if not same and not (fits and step.axis == 0 and torch.equal(torch.cat(parts), frame.expand(step.shape[0]))):
        raise CertificateError(f"{step.label}: its frame is not that of its parts")


def _map(
    step: Linear, weights: Weights, before: Tensor, after: Tensor, shape: tuple[int, ...]
) -> tuple[Weighted, Tensor]:
    """A map of the same kind with the norm of `D_out A D_in^-1`, or more, and its tensor.

    Raises:
        CertificateError: for a map that cannot be rescaled.
    """
    linear = step.map
    if isinstance(linear, Scale):
        channels = linear.axis == 0 and {before.numel(), after.numel()} <= {1, linear.in_shape[0]}
        ratio = after / before if channels else _largest(before, after)
        value = (linear.factors(weights) * ratio).expand(linear.in_shape[linear.axis])
        return replace(linear, variance="", eps=0.0, rounded=linear.units + _ROUNDINGS), value.contiguous()
    if isinstance(linear, Matrix):
        value = _matrix(
            linear, stored(weights, linear.weight), per_element(before, shape), per_element(after, step.shape)
        )
        return replace(linear, rounded=linear.units + _ROUNDINGS), value
    fits = before.numel() in (1, linear.in_shape[0]) and after.numel() in (1, linear.out_shape[0])
    if isinstance(linear, Convolution) and fits:
        kernel = linear.taps(weights)
        taps = [1] * (kernel.dim() - 2)
        columns = before.expand(linear.in_shape[0]).reshape(linear.groups, 1, -1, *taps)
        narrow = (kernel.reshape(linear.groups, -1, *kernel.shape[1:]) / columns).reshape(kernel.shape)
        return replace(linear, rounded=linear.rounded + _ROUNDINGS), narrow * after.reshape(-1, 1, *taps)
    raise CertificateError(f"{step.label}: a {type(linear).__name__} has no such frames")


def _matrix(linear: Matrix, value: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """From the frames of each element."""
    if linear.before == 1 and linear.after == 1:
        return after[:, None] * (value / before)
    if linear.after > 1:
        return value * _largest(before, after)
    # One block for each leading index, as of a mean: a channel's own frames, where they are one number each.
    ins, outs = before.reshape(linear.before, -1), after.reshape(linear.before, -1)
    return value * float((outs.amax(1) / ins.amin(1)).max())


def _largest(before: Tensor, after: Tensor) -> float:
    return float(after.max() / before.min())


def _check_range(step: Linear, tensor: Tensor) -> None:
    """Refuse numbers whose rounding would not be relative."""
    if bool(((tensor != 0) & (tensor.abs() < _SMALLEST)).any()) or not bool(torch.isfinite(tensor).all()):
        raise CertificateError(f"{step.label}: in its frames, weights are too small or too large")
