"""The certificate of a network as one file: a safetensors file whose metadata states the program.

The metadata holds `format`, `upper` (hexadecimal), `calculus`, `steps`, `outputs`, `digests` and `norms` as JSON, and
`sha256`, of all the rest and of every tensor. The tensors are the multipliers, the slopes and the constants. A bound on
a region has a format of its own, so that nothing takes it for one that holds everywhere: with `region` beside the rest.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from opnorm.certificate.network import program, regional
from opnorm.certificate.network.encoding import counts, number, parsed, refuse, slopes_of, steps_as_json, steps_from
from opnorm.certificate.network.maps import Gather, Weighted, Weights, exactly
from opnorm.certificate.network.program import Calculus, Program
from opnorm.certificate.network.region import described
from opnorm.certificate.network.regional import Regional
from opnorm.errors import CertificateError, CertificateFormatError

FORMAT = "opnorm.network/2"
REGION_FORMAT = "opnorm.certificate.network.region/1"
LARGEST_HEADER = 64 * 2**20
LARGEST_FILE = 4 * 2**30
_KEYS = {"format", "upper", "calculus", "steps", "outputs", "digests", "norms", "sha256"}
_DTYPES = (torch.float64, torch.int64)

Run = tuple[int, ...]
"""Positions of linear steps, each of which reads the one before it."""


@dataclass(frozen=True, eq=False)
class NetworkCertificate:
    """A claim about a network and what is needed to prove it again from the weights.

    Attributes:
        upper: the Lipschitz constant is at most this, for the Euclidean norm of all inputs and of all outputs.
        calculus: how the program is bounded: `dense` or `fourier`, the covariance calculus, `naive`, or `rescaled`.
        program: what the network computes, with the constants that are not among its weights.
        multipliers: one tensor for each non-linear step; for `rescaled` the frame of each step; none for `naive`.
        digests: SHA-256 of each weight that the program reads.
        norms: for `naive` and `rescaled`, the norm of each linear step, and of pairs that are better taken together; on
            a region of some linear steps, by their position in the program that is derived there.
        on: the region that the claim is about, and what proves the slopes there; None for all inputs.
    """

    upper: float
    calculus: Calculus
    program: Program
    multipliers: tuple[Tensor, ...]
    digests: dict[str, str]
    norms: dict[Run, float] = field(default_factory=dict)
    on: Regional | None = None

    @property
    def where(self) -> str:
        """For which inputs the claim holds, in words; empty for all of them."""
        return "" if self.on is None else described(self.on.region)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the certificate states and the weights do not show: constants of operations, tensors of its own."""
        found = []
        for step in self.program.steps:
            if isinstance(step, program.Opaque):
                apart = ", each channel by itself" if program.keeps_channels(step) else ""
                if self.on is None or step.constant < math.inf:  # on a region the others are derived
                    found.append(f"{step.label}: {step.constant:.6g}-Lipschitz{apart} ({step.reason})")
                if self.on is not None and step.kind == "normalize":
                    stated = ", ".join(f"{p:g}" for p in step.parameters)
                    found.append(f"{step.label}: its parameters (group size, eps, centred, ...) are {stated}")
            elif isinstance(step, program.Elementwise) and not step.kind:
                found.append(f"{step.label}: slopes in [{float(step.low.min()):.6g}, {float(step.high.max()):.6g}]")
            else:
                own = [name for name in weights_of(step) if name in self.program.constants]
                found += [f"{step.label}: its tensor {name!r} is stated in the certificate" for name in own]
        return tuple(dict.fromkeys(found))

    def save(self, path: str | Path) -> None:
        """Write the certificate to a file."""
        from safetensors.torch import save_file

        tensors = {f"multiplier.{i}": s.to(torch.float64).contiguous() for i, s in enumerate(self.multipliers)}
        tensors |= slopes_of(self.program.steps)
        tensors |= {f"constant.{name}": _storable(t) for name, t in self.program.constants.items()}
        place = {}
        if self.on is not None:
            place["region"], more = self.on.written()
            tensors |= more
        metadata = {
            "format": FORMAT if self.on is None else REGION_FORMAT,
            "upper": self.upper.hex(),
            "calculus": self.calculus,
            "steps": steps_as_json(self.program.steps),
            "outputs": json.dumps(self.program.outputs),
            "digests": json.dumps(self.digests),
            "norms": json.dumps([[*run, bound.hex()] for run, bound in self.norms.items()]),
            **place,
        }
        save_file(tensors, str(path), metadata={**metadata, "sha256": _fingerprint(metadata, tensors)})

    @staticmethod
    def load(path: str | Path) -> "NetworkCertificate":
        """Read a certificate from a file. Nothing in it is executed, and it is no larger in memory than on disk.

        Raises:
            CertificateFormatError: if the file is no certificate of a network, or was changed after it was written.
        """
        metadata, tensors = _opened(Path(path))
        keys = _KEYS | ({"region"} if metadata["format"] == REGION_FORMAT else set())
        if metadata.keys() != keys:
            refuse(f"its metadata must have exactly the keys {', '.join(sorted(keys))}")
        if metadata.pop("sha256") != _fingerprint(metadata, tensors):
            refuse("its contents were changed after it was written: its own sha256 does not fit")
        if metadata["calculus"] not in get_args(Calculus):
            refuse(f"there is no calculus {metadata['calculus']!r}")
        upper = number(metadata["upper"], "upper")
        if not 0 <= upper < math.inf:
            refuse(f"upper is {upper!r}, not a finite number")
        on = None
        if "region" in metadata:
            on = regional.read(metadata["region"], {n: t for n, t in tensors.items() if regional.belongs(n)})
            tensors = {n: t for n, t in tensors.items() if not regional.belongs(n)}
        steps = steps_from(metadata["steps"], tensors)
        constants = {n.removeprefix("constant."): t for n, t in tensors.items() if n.startswith("constant.")}
        count = sum(1 for name in tensors if name.startswith("multiplier."))
        known = {f"constant.{name}" for name in constants} | set(slopes_of(steps))
        known |= {f"multiplier.{i}" for i in range(count)}
        if tensors.keys() != known:
            refuse(f"the tensor {min(tensors.keys() ^ known)!r} has no place in it")
        digests = parsed(metadata["digests"])
        if not isinstance(digests, dict) or not all(isinstance(v, str) for v in digests.values()):
            refuse("digests is no table of texts")
        return NetworkCertificate(
            upper,
            metadata["calculus"],  # type: ignore[arg-type]  # it was checked
            Program(steps, counts(parsed(metadata["outputs"]), "outputs"), constants),
            tuple(tensors[f"multiplier.{i}"] for i in range(count)),
            digests,
            _norms(parsed(metadata["norms"])),
            on,
        )


def is_network_certificate(path: Path) -> bool:
    """Whether a file looks like a safetensors file rather than JSON text.

    Raises:
        CertificateFormatError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CertificateFormatError(f"{path}: cannot be read ({error.strerror})") from error
    # JSON text has no zero bytes, a header's size in eight bytes always has.
    return len(start) == 9 and start[7] == 0 and start[8:] == b"{"


def digest(name: str, weight: Tensor) -> str:
    """SHA-256 of a weight's shape and of its values in float64."""
    data = exactly(name, weight).contiguous()
    return hashlib.sha256(str(tuple(data.shape)).encode() + data.numpy().tobytes()).hexdigest()


def read_names(network: Program) -> tuple[str, ...]:
    """The stored weights that a program reads."""
    names: list[str] = []
    for step in network.steps:
        names.extend(weights_of(step))
        if isinstance(step, program.Linear) and isinstance(step.map, Gather):
            names.append(step.map.index)
    return tuple(name for name in dict.fromkeys(names) if name not in network.constants)


def weights_of(step: program.Step) -> tuple[str, ...]:
    """The names of the tensors whose values a step uses; an index moves data and has none."""
    if isinstance(step, program.Linear):
        return step.map.names if isinstance(step.map, Weighted) else ()
    return (step.weight,) if isinstance(step, program.Elementwise | program.Shift) and step.weight else ()


def digests(network: Program, weights: Weights) -> dict[str, str]:
    """The digest of each stored weight that a program reads."""
    return {name: digest(name, weights[name]) for name in read_names(network)}


def _opened(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    _check_sizes(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata, names = dict(file.metadata() or {}), list(file.keys())
            if metadata.get("format") not in (FORMAT, REGION_FORMAT):
                refuse(f"{path} has the format {metadata.get('format')!r}, not {FORMAT!r} or {REGION_FORMAT!r}")
            wrong = [name for name in names if file.get_slice(name).get_dtype() not in ("F64", "I64")]
            if wrong:
                refuse(f"the tensor {wrong[0]!r} is neither float64 nor int64")
            return metadata, {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError, RuntimeError, ValueError) as problem:
        if isinstance(problem, CertificateError):
            raise
        raise CertificateFormatError(f"{path} cannot be read as a certificate: {problem}") from problem


def _check_sizes(path: Path) -> None:
    """Refuse what states more than the file holds, before anything is read for it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise CertificateFormatError(f"{path}: cannot be read ({error.strerror})") from error
    if len(start) < 8 or not path.is_file():
        refuse(f"{path} is too short")
    (header,) = struct.unpack("<Q", start)
    if header > min(LARGEST_HEADER, size - 8) or size > LARGEST_FILE:
        refuse(f"{path} of {size} bytes states a header of {header}")


def _fingerprint(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def _norms(entries: object) -> dict[Run, float]:
    if not isinstance(entries, list) or not all(isinstance(e, list) and len(e) > 1 for e in entries):
        refuse("norms is no list of steps and bounds")
    return {counts(entry[:-1], "norms"): number(entry[-1], "norms") for entry in entries}


def _storable(tensor: Tensor) -> Tensor:
    return (tensor if tensor.dtype in _DTYPES else tensor.to(torch.float64)).contiguous()
