"""Weights that are stored in parts: weight norm, spectral norm, pruning, and other parametrizations.

What is measured is the weight in use. It is computed here as torch computes it, in the stored dtype.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from opnorm.checkpoint.entry import Entry

Table = dict[str, Entry]

_PARAMETRIZED = re.compile(r"^(?P<base>(?:.*\.)?)parametrizations\.(?P<name>[^.]+)\.(?P<rest>.+)$")

MATRIX = 2

ALIGNED, APART = 0.9, 0.8
"""The last power iteration left u = W v / |W v|: this much of it must still hold under one reading of the axes, and
less under the other, for the reading to be believed."""


@dataclass(frozen=True)
class _Recipe:
    """The weight `name` is `compute(*parts)`; the first part is the one whose elements it accounts for."""

    name: str
    parts: tuple[Entry, ...]
    compute: Callable[..., Tensor]
    derived: str
    roles: tuple[str, ...]


def recompose(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Replace stored parts by the weights that they make; the other parts stay, marked as such.

    Understood are `weight_g`/`weight_v` and `original0`/`original1` (weight norm), `weight_orig` with `weight_u` and
    `weight_v` and `original` with `0._u` and `0._v` (torch's spectral norm), and `weight_orig` with `weight_mask`
    (pruning). Any other `original` keeps its values under the canonical name, with a remark.
    """
    table = {entry.name: entry for entry in entries}
    recipes = [recipe for name in table if (recipe := _recipe(name, table)) is not None]
    result = dict(table)
    for recipe in recipes:
        if recipe.name in table:
            continue
        main, *others = recipe.parts
        result[main.name] = _composed(recipe)
        for part, role in zip(others, recipe.roles, strict=True):
            result[part.name] = replace(part, unusable=f"{role} of {recipe.name}")
    taken = {entry.name for entry in result.values()}
    return tuple(_settled(entry, taken) for entry in result.values())


def _composed(recipe: _Recipe) -> Entry:
    main = recipe.parts[0]
    loads = [part.load for part in recipe.parts]

    def load() -> Tensor:
        return recipe.compute(*(one() for one in loads))

    keys = tuple(key for part in recipe.parts for key in part.keys)
    aliases = tuple(map(_plain, main.aliases))
    return replace(main, name=recipe.name, keys=keys, load=load, aliases=aliases, derived=recipe.derived)


def _recipe(name: str, table: Table) -> _Recipe | None:
    entry = table[name]
    if entry.unusable:
        return None
    match = _PARAMETRIZED.match(name)
    if match:
        return _parametrized(match, table)
    stem, _, suffix = name.rpartition("_")
    if suffix == "v" and f"{stem}_g" in table:
        return _weight_norm(stem, table[f"{stem}_g"], entry)
    if suffix == "orig":
        return _legacy(stem, entry, table)
    return None


def _parametrized(match: re.Match[str], table: Table) -> _Recipe | None:
    target = match["base"] + match["name"]
    stem = f"{match['base']}parametrizations.{match['name']}"
    siblings = {name.removeprefix(stem + ".") for name in table if name.startswith(stem + ".")}
    if match["rest"] == "original1" and siblings == {"original0", "original1"}:
        return _weight_norm(target, table[f"{stem}.original0"], table[f"{stem}.original1"])
    if match["rest"] == "original" and siblings == {"original", "0._u", "0._v"}:
        return _spectral(target, *(table[f"{stem}.{rest}"] for rest in ("original", "0._u", "0._v")))
    return None


def _legacy(stem: str, entry: Entry, table: Table) -> _Recipe | None:
    mask = table.get(f"{stem}_mask")
    if mask is not None and mask.shape == entry.shape:
        derived = f"{stem}_orig times {stem}_mask, as pruned"
        return _Recipe(stem, (entry, mask), _pruned, derived, ("pruning mask",))
    u, v = table.get(f"{stem}_u"), table.get(f"{stem}_v")
    return _spectral(stem, entry, u, v) if u is not None and v is not None else None


def _weight_norm(name: str, g: Entry, v: Entry) -> _Recipe | None:
    axes = [axis for axis, size in enumerate(g.shape) if size != 1]
    fits = len(g.shape) == len(v.shape) and len(axes) <= 1 and all(g.shape[axis] == v.shape[axis] for axis in axes)
    if g.shape and not fits:
        return None
    # One magnitude is that of the whole tensor, or of the only slice there is along an axis of length one.
    whole = v.shape.index(1) if g.shape and 1 in v.shape else -1
    dim = axes[0] if axes else whole

    def compute(direction: Tensor, magnitude: Tensor) -> Tensor:
        return torch._weight_norm(direction, magnitude, dim)

    return _Recipe(name, (v, g), compute, "weight norm g v/|v|", ("magnitude (weight norm)",))


def _spectral(name: str, original: Entry, u: Entry, v: Entry) -> _Recipe | None:
    shape = original.shape
    if len(shape) < MATRIX or len(u.shape) != 1 or len(v.shape) != 1:
        return None
    # torch flattens with the output axis first: axis 0, or axis 1 of a transposed convolution.
    axes = range(1) if len(shape) == MATRIX else range(2)
    dims = [axis for axis in axes if (shape[axis], prod(shape) // max(1, shape[axis])) == (*u.shape, *v.shape)]
    if not dims:
        return None
    dim = dims[0]
    if len(dims) > 1:
        found = [_alignment(original.load(), u.load(), v.load(), axis) for axis in dims]
        if max(found) < ALIGNED or min(found) > APART:
            return None
        dim = dims[found.index(max(found))]

    def compute(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return weight / _quotient(weight, left, right, dim)

    derived = "spectral norm: W / (u^T W v) with the stored u and v, as in eval mode"
    return _Recipe(
        name, (original, u, v), compute, derived, ("left vector (spectral norm)", "right vector (spectral norm)")
    )


def _alignment(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> float:
    image = torch.mv(weight.movedim(dim, 0).flatten(1), v)
    length = float(torch.linalg.vector_norm(image) * torch.linalg.vector_norm(u))
    return abs(float(torch.dot(u, image))) / length if length > 0.0 else 0.0


def _quotient(weight: Tensor, u: Tensor, v: Tensor, dim: int) -> Tensor:
    matrix = weight.movedim(dim, 0).flatten(1)  # shape: (len(u), len(v))
    return torch.dot(u, torch.mv(matrix, v))


def _pruned(weight: Tensor, mask: Tensor) -> Tensor:
    return weight * mask.to(weight.dtype)


def _settled(entry: Entry, taken: set[str]) -> Entry:
    """Give what no recipe made use of its canonical name, and say that it is not the weight in use."""
    match = _PARAMETRIZED.match(entry.name)
    if match and not match["rest"].startswith("original") and not entry.unusable:
        return replace(entry, unusable=f"state of a parametrization of {match['base']}{match['name']}")
    name = _plain(entry.name)
    if name == entry.name or entry.derived or entry.unusable or name in taken:
        return entry
    remark = "what a parametrization starts from; the weight in use is computed from it"
    return replace(entry, name=name, aliases=tuple(map(_plain, entry.aliases)), remark=remark)


def _plain(name: str) -> str:
    match = _PARAMETRIZED.match(name)
    if match and match["rest"] in {"original", "original1"}:
        return match["base"] + match["name"]
    return name.removesuffix("_orig")
