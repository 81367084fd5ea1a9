"""How a tensor of a state dict is read as a linear map, from its name, its shape and its neighbours.

Nothing is guessed: where several matrices could be meant, the tensor is ambiguous, and a role can be given by hand.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from opnorm.auditing.report import SkipKind
from opnorm.errors import ArgumentError

Shape = tuple[int, ...]

ROLES = ("linear", "conv", "slices", "skip")
"""What can be given by hand: a matrix (leading axes of length one dropped), a convolution of c_out x c_in x kernel,
each slice along the first axis a matrix, or not measured."""

CONV_NOTE = (
    "kernel alone, valid for every input size: the upper end holds for every stride, zero padding, dilation, grouping "
    "and transposition, and for circular padding where the output is no larger than the input; not for reflect or "
    "replicate padding; the lower end is that of stride 1, one group"
)
EMBEDDING_NOTE = "as a matrix on vectors; looking one row up gives at most the largest row norm"
SLICE_NOTE = "one slice of the tensor; slices are measured one by one"

MATRIX, CONV_AXES = 2, (3, 4, 5)

_EMBEDDING = re.compile(r"(^|[._])(embed\w*|emb|wte|wpe|tok(en)?_emb\w*|\w*embeddings?|lookup\w*)($|[._])", re.I)
_CONV = re.compile(r"conv", re.I)
_EXPERTS = re.compile(r"expert", re.I)
_MASK = re.compile(r"mask", re.I)
_RECURRENT = re.compile(r"^(?P<stem>.*\bweight)_(?P<kind>ih|hh|hr)(?P<layer>(_l\d+)?(_reverse)?)$")
_STATISTIC = re.compile(r"^(running_mean|running_var|num_batches_tracked)$")
_SCALE = re.compile(r"(^|_)(scales?|scale_inv|absmax|scb|zeros|zero_points?)$", re.I)
_GATES = {4: "lstm", 3: "gru", 1: "rnn"}


@dataclass(frozen=True)
class Reading:
    """A tensor read as one linear map, or as several along its first axis.

    Attributes:
        role: what it is.
        parts: of the first axis that are measured one by one, with their labels; empty for the whole.
        note: what the numbers are valid for.
        kernel: whether it is a convolution's kernel; else it is a matrix once its leading axes of length one are gone.
    """

    role: str
    parts: tuple[tuple[str, slice], ...] = ()
    note: str = ""
    kernel: bool = False


@dataclass(frozen=True)
class Unread:
    """A tensor that is not measured, and why."""

    kind: SkipKind
    reason: str


def parse_roles(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Read roles given by hand as PATTERN=ROLE.

    Raises:
        ArgumentError: if one is not of that form.

    Example:
        >>> parse_roles(["ups.*.weight=conv"])
        (('ups.*.weight', 'conv'),)
    """
    pairs = []
    for text in texts:
        pattern, _, role = text.rpartition("=")
        if not pattern or role not in ROLES:
            raise ArgumentError(f"the role {text!r} is not PATTERN=ROLE with a role of {', '.join(ROLES)}")
        pairs.append((pattern, role))
    return tuple(pairs)


def read(
    name: str, shape: Shape, shapes: Mapping[str, Shape], given: Iterable[tuple[str, str]] = ()
) -> Reading | Unread:
    """Decide how a tensor is read.

    Args:
        name: canonical.
        shape: its shape.
        shapes: of all tensors of the checkpoint, by canonical name.
        given: patterns and roles set by hand; the first that matches decides.
    """
    if 0 in shape:
        return Unread("empty", f"no elements (shape {tuple(shape)})")
    for pattern, role in given:
        if fnmatchcase(name, pattern):
            return _by_hand(name, shape, role)
    leaf = name.rpartition(".")[2]
    if len(shape) >= MATRIX and _MASK.search(leaf):
        return Unread("mask", "a mask, not a weight")
    if len(shape) < MATRIX:
        return Unread("vector", _vector(leaf))
    if _SCALE.search(leaf):
        return Unread("part", "scales or zero points of a quantised tensor")
    if len(shape) == MATRIX:
        return _matrix(name, leaf, shape, shapes)
    return _several_axes(name, leaf, shape)


def _by_hand(name: str, shape: Shape, role: str) -> Reading | Unread:
    if role == "skip":
        return Unread("left", "skipped on request")
    if role == "conv" and len(shape) in CONV_AXES:
        return Reading(f"conv{len(shape) - 2}d", note=CONV_NOTE, kernel=True)
    if role == "slices" and len(_squeezed(shape[1:])) == MATRIX:
        return _slices("slices", shape)
    if role == "linear" and len(_squeezed(shape)) == MATRIX:
        return Reading("linear")
    raise ArgumentError(f"{name}: a tensor of shape {tuple(shape)} cannot be read as {role!r}")


def _vector(leaf: str) -> str:
    if _STATISTIC.match(leaf):
        return "a running statistic: not a matrix"
    return "a bias: not a matrix" if "bias" in leaf else "a vector or number (bias, scale): not a matrix"


def _matrix(name: str, leaf: str, shape: Shape, shapes: Mapping[str, Shape]) -> Reading:
    if leaf == "in_proj_weight" and shape[0] == 3 * shape[1]:
        step = shape[1]
        parts = tuple((label, slice(i * step, (i + 1) * step)) for i, label in enumerate("qkv"))
        return Reading("attention", parts, note="one of the three stacked projections")
    if leaf in {"q_proj_weight", "k_proj_weight", "v_proj_weight"}:
        return Reading("attention")
    recurrent = _RECURRENT.match(name)
    if recurrent:
        return Reading(_recurrent(recurrent, shapes), note="the gates' weights stacked, as one matrix")
    if _EMBEDDING.search(name):
        return Reading("embedding", note=EMBEDDING_NOTE)
    return Reading("linear" if leaf in {"weight", "kernel"} else "matrix")


def _recurrent(match: re.Match[str], shapes: Mapping[str, Shape]) -> str:
    projection = shapes.get(f"{match['stem']}_hr{match['layer']}")
    hidden = shapes.get(f"{match['stem']}_hh{match['layer']}", ())
    if match["kind"] == "hr" or projection:
        return "lstm"
    return _GATES.get(hidden[0] // hidden[1], "recurrent") if len(hidden) == MATRIX and 0 not in hidden else "recurrent"


def _several_axes(name: str, leaf: str, shape: Shape) -> Reading | Unread:
    if _EXPERTS.search(name) and len(shape) == MATRIX + 1:
        return _slices("experts", shape)
    if len(shape) in CONV_AXES and (_CONV.search(name) or (leaf in {"weight", "kernel"} and len(shape) > MATRIX + 1)):
        return Reading(f"conv{len(shape) - 2}d", note=CONV_NOTE, kernel=True)
    rest = _squeezed(shape)
    if len(rest) < MATRIX:
        return Unread("vector", f"a vector of shape {tuple(shape)}: not a matrix")
    if len(rest) == MATRIX and _EMBEDDING.search(name):
        return Reading("embedding", note=EMBEDDING_NOTE)
    return Unread(
        "ambiguous",
        f"{len(shape)} axes and no sign of a convolution: which matrix is meant cannot be told; "
        f"say it with --role '{name}=conv', =slices or =skip",
    )


def _slices(role: str, shape: Shape) -> Reading:
    return Reading(role, tuple((str(i), slice(i, i + 1)) for i in range(shape[0])), note=SLICE_NOTE)


def _squeezed(shape: Shape) -> Shape:
    """Drop leading axes of length one, but keep a matrix a matrix."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape
