"""Finding the weights in what `torch.save` held: nested dicts with optimizer state, averages and counters."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from opnorm.errors import CheckpointError

MAX_DEPTH = 64

Path = tuple[str, ...]
"""The keys that lead to a part of the object."""

NO_TENSORS = "no tensors in it"
AVERAGE = "an average of the weights, beside the weights themselves"
NOT_ASKED = "not the part that was asked for"

_NOT_WEIGHTS = (
    (re.compile(r"optim|(^|_)opt(_|$)", re.I), "optimizer state"),
    (re.compile(r"sched|scaler|(^|_)amp(_|$)|rng|random|callback|loops|metric|history|loss", re.I), "training state"),
)
_AVERAGE = re.compile(r"(^|[_.])(ema|swa|averaged?|shadow)([_.]|$)", re.I)
_WRAPPER = re.compile(
    r"state_?dict|^(model|net|network|module|state|weights?|params?|parameters|checkpoint)$|"
    r"(^|_)(model|net|params|ema)(_|$)",
    re.I,
)


class Choice(NamedTuple):
    """Which part of a loaded object holds the model's weights, and why the other parts do not."""

    prefix: Path
    left: dict[Path, str]


def children(tree: Any) -> list[tuple[str, Any]]:
    """Return the named parts of a container; none for anything else."""
    if isinstance(tree, Mapping):
        return [(str(key), value) for key, value in tree.items()]
    if isinstance(tree, list | tuple):
        return [(str(index), value) for index, value in enumerate(tree)]
    return []


def leaves(tree: Any, path: Path = (), seen: set[int] | None = None) -> Iterator[tuple[Path, Tensor]]:
    """Yield the tensors of nested containers with their paths; a container that is reached twice is walked once.

    Raises:
        CheckpointError: if the nesting is deeper than any checkpoint's.
    """
    seen = set() if seen is None else seen
    if isinstance(tree, Tensor):
        yield path, tree
        return
    items = children(tree)
    if not items or id(tree) in seen:
        return
    if len(path) >= MAX_DEPTH:
        raise CheckpointError(f"nested more than {MAX_DEPTH} levels deep at {'.'.join(path[:3])}...: no checkpoint is")
    seen.add(id(tree))
    for key, value in items:
        yield from leaves(value, (*path, key), seen)


def choose(tree: Any, part: str = "") -> Choice:
    """Choose the part that holds the weights: by the name asked for, or else by the names that training loops use.

    Args:
        tree: what the file held.
        part: a dotted path such as "ema" or "state.model"; "" lets the names decide.

    Raises:
        CheckpointError: if there is no such part, or nothing but optimizer and training state.
    """
    return _asked(tree, part) if part else _descend(tree, (), {})


def _asked(tree: Any, part: str) -> Choice:
    prefix: Path = ()
    left: dict[Path, str] = {}
    rest = part
    while rest:
        items = dict(children(tree))
        # Keys may hold dots themselves: the longest that fits is meant.
        fits = [key for key in items if rest == key or rest.startswith(key + ".")]
        if not fits:
            names = ", ".join(sorted(items)[:20]) or "nothing"
            raise CheckpointError(f"no part {part!r}; {'.'.join(prefix) or 'the file'} holds {names}")
        key = max(fits, key=len)
        left |= {(*prefix, other): NOT_ASKED for other in items if other != key}
        prefix, tree, rest = (*prefix, key), items[key], rest[len(key) + 1 :]
    return Choice(prefix, left)


def _descend(tree: Any, prefix: Path, left: dict[Path, str]) -> Choice:
    holders = []
    for key, value in children(tree):
        if next(leaves(value), None) is None:
            left[(*prefix, key)] = NO_TENSORS
        else:
            holders.append((key, value, _reason(key, value)))
    weights = [(key, value) for key, value, reason in holders if not reason]
    if not weights:
        weights = [(key, value) for key, value, reason in holders if reason == AVERAGE][:1]
    if holders and not weights:
        raise CheckpointError(
            f"holds only {' and '.join(sorted({reason for *_, reason in holders}))} "
            f"({', '.join(key for key, *_ in holders[:20])}); name the part to take if one of them is meant"
        )
    chosen = {key for key, _ in weights}
    left |= {(*prefix, key): reason for key, _, reason in holders if key not in chosen}
    if len(weights) == 1 and not isinstance(weights[0][1], Tensor) and _WRAPPER.search(weights[0][0]):
        key, value = weights[0]
        return _descend(value, (*prefix, key), left)
    return Choice(prefix, left)


def _reason(key: str, value: Any) -> str:
    """Return why a part is not the model's weights; "" where it is. A tensor is judged later, by its own name."""
    if isinstance(value, Tensor):
        return ""
    if isinstance(value, Mapping) and "param_groups" in value:
        return "optimizer state"
    if _AVERAGE.search(key):
        return AVERAGE
    return next((reason for pattern, reason in _NOT_WEIGHTS if pattern.search(key)), "")
