"""A certificate as JSON: which tensors, read as which linear maps, have a norm of at most which bound.

    {"format": "opnorm-certificate", "schema": 1, "opnorm": "0.1.0", "lipschitz": 1.0, "mode": "divide",
     "tensors": [{"name", "shape", "dtype", "sha256", "reading": {"kind": "matrix"}, "bound": 1.0}, ...],
     "untouched": [{"name", "shape", "dtype", "sha256", "reason"}, ...],
     "sha256": "of the canonical JSON of all the rest"}

A reading is one of

* `{"kind": "matrix"}`: a matrix; leading axes of length one are dropped;
* `{"kind": "blocks", "rows": [m1, m2, ...]}`: consecutive blocks of the first axis, each a matrix by itself;
* `{"kind": "convolution", "grid": [...], "depth": n}`: the convolution with this kernel (c_out, c_in, *taps) and its
  transpose, for every input size, stride, dilation, grouping and zero padding; `grid` and `depth` steer the verifier.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

from opnorm.errors import CertificateError, CertificateFormatError

FORMAT = "opnorm-certificate"
SCHEMA = 1
LARGEST = 256 * 2**20  # bytes of JSON
MAX_GRID, MAX_DEPTH = 2**16, 12  # of a convolution
READING_KEYS = {"matrix": {"kind"}, "blocks": {"kind", "rows"}, "convolution": {"kind", "grid", "depth"}}

Mode = Literal["divide", "clip"]
Kind = Literal["matrix", "blocks", "convolution"]

DTYPES = frozenset({"float64", "float32", "float16", "bfloat16", "complex64", "complex128"})
"""Of tensors with a bound; what is untouched may have any."""


@dataclass(frozen=True)
class Reading:
    """As which linear map a tensor is read.

    Attributes:
        kind: see above.
        rows: of each block.
        grid: how many cells the frequencies of a convolution are cut into at first, per axis; powers of two.
        depth: how often a cell may be halved.
    """

    kind: Kind
    rows: tuple[int, ...] = ()
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
    """Return name, shape, dtype and the SHA-256 of the bytes in row-major order.

    Raises:
        CertificateError: if the tensor has no plain bytes (sparse, quantised, on the meta device).
    """
    try:
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        raw = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)
        digest = hashlib.sha256(raw.numpy().data).hexdigest()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise CertificateError(f"{name!r} is no plain tensor, and its bytes cannot be certified ({error})") from error
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
        wanted = READING_KEYS[value["kind"]] if "kind" in value else value.keys()
        return {key: _plain(item) for key, item in value.items() if key in wanted}
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
    return Identity(name, shape, _string(entry["dtype"], "dtype"), _string(entry["sha256"], "sha256"))


def _reading(value: Any, of: Identity) -> Reading:
    kind: Any = value.get("kind") if isinstance(value, dict) else None
    if kind not in get_args(Kind):
        _refuse(f"{of.name!r} is read as {kind!r}, not as one of {', '.join(get_args(Kind))}")
    if of.dtype not in DTYPES:
        _refuse(f"{of.name!r} of dtype {of.dtype} is no linear map")
    _keys(value, READING_KEYS[kind], f"the reading of {of.name!r}")

    def counts(key: str, largest: int) -> tuple[int, ...]:
        return tuple(_count(n, f"{key} of {of.name!r}", largest) for n in _list(value.get(key, []), key))

    depth = _count(value.get("depth", 0), f"depth of {of.name!r}", MAX_DEPTH)
    reading = Reading(kind, counts("rows", 2**48), counts("grid", MAX_GRID), depth)
    if not _fits(reading, of.shape):
        _refuse(f"{of.name!r} of shape {of.shape} cannot be read as {value!r}")
    return reading


def _fits(reading: Reading, shape: tuple[int, ...]) -> bool:
    dims = len(shape)
    if reading.kind == "matrix":
        return dims >= 2 and all(size == 1 for size in shape[:-2])
    if reading.kind == "blocks":
        matrices = dims == 2 or (dims == 3 and set(reading.rows) == {1})
        return matrices and sum(reading.rows) == shape[0] and 0 not in reading.rows
    return dims in (3, 4, 5) and len(reading.grid) == dims - 2 and all(n.bit_count() == 1 for n in reading.grid)


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
