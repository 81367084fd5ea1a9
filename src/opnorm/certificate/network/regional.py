"""What a certificate on a region states beside its program, as text and tensors, and back."""

import json
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opnorm.certificate.network.encoding import counts, number, parsed, refuse
from opnorm.certificate.network.local import Slopes
from opnorm.certificate.network.region import Ball, Box, NormBall, Region

_TENSORS = {"ball": ("center",), "box": ("lo", "hi"), "norm ball": ()}
_PREFIXES = ("region.", "slope.", "lemma.")


@dataclass(frozen=True, eq=False)
class Regional:
    """A region, and what helps to derive the slopes on it.

    Positions are those of the program that `local.localised` derives.

    Attributes:
        region: of inputs.
        slopes: of elementwise steps, one for each element, a little wider than what was derived. They are used as they
            stand once the verifier has derived narrower ones.
        lemmas: for an elementwise step the multipliers that prove how far each element of what it reads can move.
    """

    region: Region
    slopes: dict[int, Slopes] = field(default_factory=dict)
    lemmas: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def written(self) -> tuple[str, dict[str, Tensor]]:
        """As text and tensors."""
        region = self.region
        text: dict[str, object] = {"lemmas": sorted(self.lemmas)}
        if isinstance(region, NormBall):
            text |= {"kind": "norm ball", "radius": float(region.radius).hex()}
            tensors = {}
        elif isinstance(region, Ball):
            text |= {"kind": "ball", "radius": float(region.eps).hex()}
            tensors = {"region.center": region.center}
        else:
            text |= {"kind": "box", "radius": (0.0).hex()}
            tensors = {"region.lo": region.lo, "region.hi": region.hi}
        for position, ends in self.slopes.items():
            tensors |= {f"slope.{position}.{name}": end for name, end in zip(("low", "high"), ends, strict=True)}
        for position, multipliers in self.lemmas.items():
            tensors |= {f"lemma.{position}.{i}": s for i, s in enumerate(multipliers)}
        plain = {name: t.detach().to("cpu", torch.float64).contiguous().clone() for name, t in tensors.items()}
        return json.dumps(text), plain


def belongs(name: str) -> bool:
    """Whether a tensor's name is one of those that `written` gives."""
    return name.startswith(_PREFIXES)


def read(text: str, tensors: dict[str, Tensor]) -> Regional:
    """The inverse of `written`; nothing of what it states is believed yet.

    Raises:
        CertificateFormatError: if it states something else.
    """
    stated = parsed(text)
    kind = stated.get("kind") if isinstance(stated, dict) else None
    if not isinstance(kind, str) or kind not in _TENSORS or stated.keys() != {"kind", "radius", "lemmas"}:
        refuse(f"{text[:100]!r} is no region")
    ends = [_float(tensors, f"region.{name}") for name in _TENSORS[kind]]
    radius = number(stated["radius"], "the region's radius")
    region: Region = NormBall(radius)
    if kind != "norm ball":
        region = Ball(ends[0], radius) if kind == "ball" else Box(ends[0], ends[1])
    if not (radius == 0 if kind == "box" else 0 < radius < math.inf):
        refuse(f"{radius!r} is no radius of a {kind}")
    if not all(bool(torch.isfinite(end).all()) for end in ends):
        refuse("its region holds NaN or infinite values")
    slopes: dict[int, Slopes] = {}
    lemmas: dict[int, dict[int, Tensor]] = {i: {} for i in counts(stated["lemmas"], "the region's lemmas")}
    known = {f"region.{name}" for name in _TENSORS[kind]}
    for name in tensors.keys() - known:
        what, position, part = _taken_apart(name)
        if what == "slope":
            slopes[position] = (_float(tensors, f"slope.{position}.low"), _float(tensors, f"slope.{position}.high"))
            if part not in ("low", "high"):
                refuse(f"the tensor {name!r} has no place in it")
        else:
            if position not in lemmas:
                refuse(f"the tensor {name!r} has no place in it")
            lemmas[position][_count(part, name)] = _float(tensors, name)
    for position, parts in lemmas.items():
        if sorted(parts) != list(range(len(parts))):
            refuse(f"the multipliers of the lemma for step {position} are not numbered in order")
    ordered = {position: tuple(parts[i] for i in range(len(parts))) for position, parts in lemmas.items()}
    return Regional(region, slopes, ordered)


def _taken_apart(name: str) -> tuple[str, int, str]:
    parts = name.split(".")
    if len(parts) != 3 or parts[0] not in ("slope", "lemma"):
        refuse(f"the tensor {name!r} has no place in it")
    return parts[0], _count(parts[1], name), parts[2]


def _count(text: str, name: str) -> int:
    """A number that is written in one way only."""
    if not (text.isascii() and text.isdigit() and len(text) < 8 and text == str(int(text))):
        refuse(f"the tensor {name!r} has no place in it")
    return int(text)


def _float(tensors: dict[str, Tensor], name: str) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None or tensor.dtype != torch.float64:
        refuse(f"it has no tensor {name!r} of float64")
    return tensor
