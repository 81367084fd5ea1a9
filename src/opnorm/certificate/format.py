"""A certificate as JSON: which tensors, read as which linear maps, have a norm of at most which bound.

    {"format": "opnorm-certificate", "schema": 1, "opnorm": "0.1.0", "lipschitz": 1.0, "mode": "divide",
     "tensors": [{"name", "shape", "dtype", "sha256", "reading": {"kind": "matrix"}, "bound": 1.0}, ...],
     "untouched": [{"name", "shape", "dtype", "sha256", "reason"}, ...],
     "sha256": "of the canonical JSON of all the rest"}

A reading is `{"kind": "matrix"}`, `{"kind": "slices"}` (each matrix of a 3-D tensor by itself), or
`{"kind": "convolution", "grid": [...], "depth": n}`: the convolution with this kernel (c_out, c_in, *taps), for every
input size, stride, dilation, grouping and zero padding, and its transpose; `grid` and `depth` steer the verifier.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NoReturn, cast, get_args

import torch
from torch import Tensor

from opnorm.errors import CertificateFormatError

FORMAT = "opnorm-certificate"
SCHEMA = 1
LARGEST = 256 * 2**20  # bytes of JSON
MAX_GRID, MAX_DEPTH = 2**16, 12  # of a convolution

Mode = Literal["divide", "clip"]
Kind = Literal["matrix", "slices", "convolution"]

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.complex32,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
        torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Reading:
    """As which linear map a tensor is read; `grid` and `depth` are those of a convolution's search over frequencies."""

    kind: Kind
    grid: tuple[int, ...] = ()
    depth: int = 0


@dataclass(frozen=True)
class Identity:
    """What a tensor is, to the bit."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True)
class Bounded(Identity):
    """A tensor whose norm is at most `bound`."""

    reading: Reading
    bound: float


@dataclass(frozen=True)
class Untouched(Identity):
    """A tensor of which nothing is claimed but its bytes."""

    reason: str


@dataclass(frozen=True)
class Certificate:
    """What is claimed of a set of weights.

    Attributes:
        lipschitz: no entry of `tensors` has a larger bound.
        mode: how the weights were scaled.
        tensors: those with a bound.
        untouched: all the others.
        opnorm: the version that wrote it.
    """

    lipschitz: float
    mode: Mode
    tensors: tuple[Bounded, ...]
    untouched: tuple[Untouched, ...] = ()
    opnorm: str = field(default="")

    def to_json(self) -> str:
        """Write the certificate, its own hash included."""
        body = self._body()
        return json.dumps({**body, "sha256": _digest(body)}, indent=1, allow_nan=False) + "\n"

    def _body(self) -> dict[str, Any]:
        return {"format": FORMAT, "schema": SCHEMA, **_plain(asdict(self))}


def identify(name: str, tensor: Tensor) -> Identity:
    """Return name, shape, dtype and the SHA-256 of the bytes in row-major, little-endian order."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    raw = flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)
    digest = hashlib.sha256(raw.numpy().data).hexdigest()
    return Identity(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), digest)


def parse(text: str | bytes) -> Certificate:
    """Read a certificate and check everything that can be checked without the weights.

    Raises:
        CertificateFormatError: if it is not JSON of exactly this format, holds a name twice or a bound above K, or if
            its hash is not that of its contents.
    """
    if len(text) > LARGEST:
        _refuse(f"it is larger than {LARGEST} bytes")
    try:
        data = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CertificateFormatError(f"not a certificate: {error}") from error
    keys = {"format", "schema", "opnorm", "lipschitz", "mode", "tensors", "untouched", "sha256"}
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        _refuse(f"its format is not {FORMAT!r}")
    if data.get("schema") != SCHEMA:
        _refuse(f"schema {data.get('schema')!r} is not {SCHEMA}, the one that this version reads")
    _keys(data, keys, "the certificate")
    lipschitz = _bound(data["lipschitz"], "lipschitz")
    if lipschitz == 0.0:
        _refuse("lipschitz is 0")
    if data["mode"] not in get_args(Mode):
        _refuse(f"mode {data['mode']!r} is unknown")
    certificate = Certificate(
        lipschitz,
        data["mode"],
        tuple(_bounded(entry, lipschitz) for entry in _list(data["tensors"], "tensors")),
        tuple(_untouched(entry) for entry in _list(data["untouched"], "untouched")),
        _string(data["opnorm"], "opnorm"),
    )
    names = [entry.name for entry in (*certificate.tensors, *certificate.untouched)]
    if twice := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set():
        _refuse(f"{min(twice)!r} is listed twice")
    if data["sha256"] != _digest(certificate._body()):
        _refuse("its contents were changed after it was written: its own sha256 does not fit")
    return certificate


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Tuples become lists, and a reading keeps only what its kind needs."""
    if isinstance(value, dict):
        bare = value.get("kind") in ("matrix", "slices")
        return {"kind": value["kind"]} if bare else {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _bounded(entry: Any, lipschitz: float) -> Bounded:
    _keys(entry, {"name", "shape", "dtype", "sha256", "reading", "bound"}, "an entry of tensors")
    identity = _identity(entry)
    bound = _bound(entry["bound"], f"the bound of {identity.name!r}")
    if bound > lipschitz:
        _refuse(f"the bound {bound:g} of {identity.name!r} is above lipschitz = {lipschitz:g}")
    return Bounded(**asdict(identity), reading=_reading(entry["reading"], identity), bound=bound)


def _untouched(entry: Any) -> Untouched:
    _keys(entry, {"name", "shape", "dtype", "sha256", "reason"}, "an entry of untouched")
    return Untouched(**asdict(_identity(entry)), reason=_string(entry["reason"], "reason"))


def _identity(entry: dict[str, Any]) -> Identity:
    name = _string(entry["name"], "name")
    shape = tuple(_count(size, f"the shape of {name!r}", 2**48) for size in _list(entry["shape"], "shape"))
    if entry["dtype"] not in DTYPES:
        _refuse(f"the dtype {entry['dtype']!r} of {name!r} is unknown")
    return Identity(name, shape, entry["dtype"], _string(entry["sha256"], "sha256"))


def _reading(value: Any, of: Identity) -> Reading:
    kind = value.get("kind") if isinstance(value, dict) else None
    dims = len(of.shape)
    fits = {"matrix": dims == 2, "slices": dims == 3, "convolution": 3 <= dims <= 5}
    if kind not in fits or not fits[kind]:
        _refuse(f"{of.name!r} of shape {of.shape} cannot be read as {kind!r}")
    if not DTYPES[of.dtype].is_floating_point and not DTYPES[of.dtype].is_complex:
        _refuse(f"{of.name!r} of dtype {of.dtype} is no linear map")
    if kind != "convolution":
        _keys(value, {"kind"}, f"the reading of {of.name!r}")
        return Reading(cast(Kind, kind))
    _keys(value, {"kind", "grid", "depth"}, f"the reading of {of.name!r}")
    grid = tuple(_count(n, f"the grid of {of.name!r}", MAX_GRID) for n in _list(value["grid"], "grid"))
    if len(grid) != dims - 2 or any(n.bit_count() != 1 for n in grid):
        _refuse(f"the grid of {of.name!r} must have one power of two per axis")
    return Reading("convolution", grid, _count(value["depth"], f"the depth of {of.name!r}", MAX_DEPTH))


def _keys(value: Any, expected: set[str], where: str) -> None:
    if not isinstance(value, dict) or value.keys() != expected:
        _refuse(f"{where} must have exactly the keys {', '.join(sorted(expected))}")


def _list(value: Any, where: str) -> list[Any]:
    return value if isinstance(value, list) else _refuse(f"{where} is not a list")


def _string(value: Any, where: str) -> str:
    return value if isinstance(value, str) else _refuse(f"{where} is not a text")


def _count(value: Any, where: str, largest: int) -> int:
    return value if type(value) is int and 0 <= value <= largest else _refuse(f"{where} holds {value!r}")


def _bound(value: Any, where: str) -> float:
    good = type(value) in (int, float) and 0 <= value < math.inf and abs(value) <= torch.finfo(torch.float64).max
    return float(value) if good else _refuse(f"{where} is {value!r}, not a finite number")


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of a certificate")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return dict(pairs)


def _refuse(reason: str) -> NoReturn:
    raise CertificateFormatError(f"not a valid certificate: {reason}")
