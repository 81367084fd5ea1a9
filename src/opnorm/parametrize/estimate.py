"""The estimate of a weight's norm while it trains: from each value of the weight to the next.

What changes from value to value is an `Estimate`, and the vectors, which live in the buffers of the parametrization.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opnorm.parametrize import blocks, frequencies, on_device, sampled, scouts, sharding, values
from opnorm.parametrize.blocks import Block, Triple
from opnorm.parametrize.buffers import held
from opnorm.parametrize.views import View
from opnorm.parametrize.watched import counted

Iterations = int | Literal["adaptive"]

WIDTH = 4
"""Vectors in a block; a matrix with no more than `SMALL` rows or columns is held in full."""

SMALL = 16

SCOUT_WIDTH, ADAPTIVE_SCOUT_WIDTH = 1, 3
"""Vectors at every other frequency of a convolution: where few values are close, the next are there in time."""

YOUNG = 100
"""Values of a weight, from registration or a fresh start, in which the estimate is made with more care: the first steps
of Adam add large new directions, which one power iteration a step meets ten steps late."""

DEPTH = 2
"""Of the Krylov space in which vectors move; of an old convolution's it is one, and of an old matrix' the second power
is of the first two vectors alone."""

EVERY, CONV_EVERY = 4, 8
"""Later, all vectors move at one of so many values. At the others the gain is what one of the triple's sees as it is:
one product with the weight, so that a step of the larger space costs less on average than one power iteration at each
value. Of a matrix the right and the left one take turns, by which the other moves."""

ADAPTIVE_TOLERANCE = 5e-5
ADAPTIVE_LEAST, ADAPTIVE_MOST = 6, 16


class Estimate(NamedTuple):
    """What is known of a weight besides the vectors.

    Attributes:
        key: of the value that the triple is of; None where the next value starts afresh.
        triple: the last good one; None before the first.
        age: values since registration or a fresh start.
        turn: steps so far, in which scouts take turns.
        looks: values since the last one at which vectors moved.
        last: keys of the last sharded value and of the last whole one, which FSDP2 shows in turn.
    """

    key: values.Key | None = None
    triple: Triple | None = None
    age: int = 0
    turn: int = 0
    looks: int = 0
    last: Mapping[bool, values.Key] = {}


class Method(NamedTuple):
    """What does not change: how the weight is read, and how many iterations each value gets."""

    view: View
    iterations: Iterations


def known(weight: Tensor, key: values.Key, before: Estimate) -> Triple | None:
    """Return the triple, if it is of this value of the weight for all processes that share it."""
    unchanged = before.key is not None and values.same(before.key, key)
    return None if before.triple is None or sharding.agreed(weight, not unchanged) else before.triple


def refreshed(
    method: Method, weight: Tensor, key: values.Key, before: Estimate, buffers: Mapping[str, Tensor | None]
) -> tuple[Estimate, Block | None]:
    """Return the estimate of a new value of the weight, and the vectors for the buffers.

    Nothing is learned from a broken weight: the triple stays as it was, without vectors to store, and the next value
    starts afresh.
    """
    dtype = values.compute_dtype(weight)
    elsewhere = before.triple is not None and before.triple.sigma.device != weight.device
    sharded = sharding.is_sharded(weight)
    last = before.last.get(sharded)
    lost = before.triple is None or before.key is None or elsewhere or last is None or values.far(last, key)
    afresh = sharding.agreed(weight, lost)
    age, turns = 0 if afresh else before.age + (method.iterations != "adaptive"), count(before.turn + 1)
    seen = None if afresh else _seen(method, before)
    looks = 0 if seen is None else before.looks + 1
    broken = False
    try:
        with counted(), torch.no_grad(), on_device.without_autocast(weight), on_device.outside_transforms():
            raw = weight.detach().to(dtype)
            raw = raw if sharding.one_matrix(raw, method.view.blocks) else sharding.gathered(raw)
            block: Block | None
            if afresh:
                block, triple = _converged(method, raw)
            elif seen is not None:
                block, triple = None, _looked(method.view, raw, seen, looks)
            else:
                begun = _moved(method.view, before, held(method.view, buffers, dtype))
                block, triple = _advanced(method, raw, begun, age, turns)
            triple = _joined(method.view, triple)
            if afresh or before.triple is None or not on_device.host_waits(raw):
                broken = not all(map(math.isfinite, triple.sigma.tolist()))
            else:
                finite = torch.isfinite(triple.sigma).all()
                if block is not None:
                    block = on_device.chosen(finite, block, held(method.view, buffers, dtype))
                triple = on_device.chosen(finite, triple, before.triple)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        broken = True
    turn = next(turns) - 1
    if broken:
        return Estimate(None, before.triple, age, turn, looks, before.last), None
    return Estimate(key, triple, age, turn, looks, {**before.last, sharded: key}), block


def once_more(
    method: Method, weight: Tensor, before: Estimate, buffers: Mapping[str, Tensor | None]
) -> tuple[Estimate, Triple]:
    """Return the triple after one more step, whose vectors are nowhere stored, and the estimate that takes the turn."""
    dtype, turns = values.compute_dtype(weight), count(before.turn + 1)
    with torch.no_grad():
        _, triple = _step(method, weight.detach().to(dtype), held(method.view, buffers, dtype), before.age, turns)
    return before._replace(turn=next(turns) - 1), _joined(method.view, triple)


def _converged(method: Method, raw: Tensor) -> tuple[Block, Triple]:
    tame, exponent = values.tamed(raw)
    block, triple = _begun(method, tame)
    if exponent:
        triple = triple._replace(sigma=torch.ldexp(triple.sigma, torch.tensor(exponent)))
    return block, triple


def _begun(method: Method, raw: Tensor) -> tuple[Block, Triple]:
    view, iterations = method
    if view.sampled:
        return blocks.iterate(
            lambda block: sampled.step(view, raw, block, DEPTH),
            sampled.start(view, raw, WIDTH),
            tolerance=ADAPTIVE_TOLERANCE,
            most=100,
            least=8,
        )
    matrices = view.matrices(raw)
    if view.frequencies:
        scouts_held = ADAPTIVE_SCOUT_WIDTH if iterations == "adaptive" else SCOUT_WIDTH
        return frequencies.converge(view, matrices, WIDTH, scouts_held)
    return blocks.converge(matrices, SMALL if min(matrices.shape[1:]) <= SMALL else WIDTH)


def _advanced(method: Method, raw: Tensor, block: Block, age: int, turns: Iterator[int]) -> tuple[Block, Triple]:
    if method.iterations == "adaptive":
        if method.view.frequencies:
            block = scouts.home(method.view, block)
        # Whether it has settled is a decision of the host.
        least = ADAPTIVE_MOST if on_device.host_waits(raw) else ADAPTIVE_LEAST
        return blocks.iterate(
            lambda block: _step(method, raw, block, age, turns),
            block,
            tolerance=ADAPTIVE_TOLERANCE,
            most=ADAPTIVE_MOST,
            least=least,
        )
    # A count on the host, which no graph sees: nothing waits for it, and nothing compiles anew.
    for _ in range(max(method.iterations // _every(method), 1) if age > YOUNG else method.iterations):
        block, triple = _step(method, raw, block, age, turns)
    return block, triple


def _every(method: Method) -> int:
    if method.view.sampled:
        return 1
    return CONV_EVERY if method.view.frequencies else EVERY


def _seen(method: Method, before: Estimate) -> Triple | None:
    """Return the triple of an old weight by which this value is looked at, or None where all vectors move."""
    if before.triple is None or before.triple.right is None or before.age < YOUNG or method.iterations == "adaptive":
        return None
    # Of more iterations than one a value, so many times as often.
    return before.triple if before.looks + 1 < _every(method) // method.iterations else None


def _looked(view: View, raw: Tensor, seen: Triple, looks: int) -> Triple:
    matrices = view.matrices(raw)
    if _in_turn(view):
        return blocks.look_in_turn(matrices, seen, back=looks % 2 == 0)
    assert seen.right is not None
    return blocks.look(matrices, seen.right)


def _in_turn(view: View) -> bool:
    """Whether the left vectors are the matrices' own: neither scaled nor of the largest block alone."""
    return not view.frequencies and view.slack == 1 and (view.blocks == 1 or not view.joint)


def _moved(view: View, before: Estimate, block: Block) -> Block:
    """The vectors, the first as looks have moved it since."""
    if before.looks == 0 or before.triple is None or before.triple.right is None or not _in_turn(view):
        return block
    return block._replace(y=torch.cat([before.triple.right, block.y[..., 1:]], -1))


def _step(method: Method, raw: Tensor, block: Block, age: int, turns: Iterator[int]) -> tuple[Block, Triple]:
    """Advance the vectors once, and of the scouts of a convolution those whose turn it is."""
    view, old = method.view, age > YOUNG
    if view.sampled:
        return sampled.step(view, raw, block, 1 if old else DEPTH)
    matrices = view.matrices(raw)
    if not view.frequencies:
        return blocks.step(matrices, block, DEPTH, 2 if old else None)
    if method.iterations == "adaptive":
        return frequencies.sweep(view, matrices, block, DEPTH)
    first, last = scouts.on_turn(block, next(turns), old=old)
    if old:
        return frequencies.at_once(view, matrices, block, first, last)
    block = scouts.scout(view, matrices, scouts.home(view, block), first, last, DEPTH)
    return frequencies.step(view, matrices, block, DEPTH)


def _joined(view: View, triple: Triple) -> Triple:
    """The deployed bound's triple; where that is the largest of the blocks', of the largest block alone."""
    if view.slack != 1:
        triple = triple._replace(sigma=view.slack * triple.sigma, left=view.slack * triple.left)
    if not view.joint or view.blocks == 1 or view.sampled:
        return triple
    top = triple.sigma.argmax()
    which = (torch.arange(view.blocks, device=top.device) == top).to(triple.left.dtype)
    return Triple(triple.sigma.amax().expand(1), triple.left * which[:, None, None], triple.right)
