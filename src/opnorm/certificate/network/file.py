"""The certificate of a network as one file: a safetensors file whose metadata states the program."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opnorm.certificate.network import maps, program
from opnorm.certificate.network.maps import Weights
from opnorm.certificate.network.program import Program, Step
from opnorm.errors import CertificateError

FORMAT = "opnorm.network/1"

_STEPS = {
    c.__name__: c
    for c in (program.Input, program.Linear, program.Sum, program.Concat, program.Elementwise, program.Opaque)
}
_MAPS = {c.__name__: c for c in (maps.Matrix, maps.Convolution, maps.TransposedConvolution, maps.Scale, maps.Gather)}


@dataclass(frozen=True, eq=False)
class NetworkCertificate:
    """A claim about a network and what is needed to prove it again from the weights.

    Attributes:
        upper: the Lipschitz constant is at most this, for the Euclidean norm of all inputs and of all outputs.
        calculus: `dense` or `fourier`: how the program becomes stages.
        program: what the network computes, with the constants that are not among its weights.
        multipliers: one tensor for each non-linear step.
        digests: SHA-256 of each weight that the program reads.
    """

    upper: float
    calculus: str
    program: Program
    multipliers: tuple[Tensor, ...]
    digests: dict[str, str]

    @property
    def assumptions(self) -> tuple[str, ...]:
        """Steps whose constants are taken from the rules: what a reader has to accept about the operations."""
        found = []
        for step in self.program.steps:
            if isinstance(step, program.Opaque):
                found.append(f"{step.label}: {step.constant:.6g}-Lipschitz ({step.reason})")
            elif isinstance(step, program.Elementwise) and not step.kind:
                found.append(f"{step.label}: slopes in [{float(step.low.min()):.6g}, {float(step.high.max()):.6g}]")
        return tuple(dict.fromkeys(found))

    def save(self, path: str | Path) -> None:
        """Write the certificate to a file."""
        from safetensors.torch import save_file

        tensors = {f"multiplier.{i}": s.contiguous() for i, s in enumerate(self.multipliers)}
        tensors |= {f"constant.{name}": t.contiguous() for name, t in self.program.constants.items()}
        steps = []
        for i, step in enumerate(self.program.steps):
            if isinstance(step, program.Elementwise):
                tensors |= {f"low.{i}": step.low.contiguous().clone(), f"high.{i}": step.high.contiguous().clone()}
            steps.append(_plain(step))
        metadata = {
            "format": FORMAT,
            "upper": self.upper.hex(),
            "calculus": self.calculus,
            "steps": json.dumps(steps),
            "outputs": json.dumps(self.program.outputs),
            "digests": json.dumps(self.digests),
        }
        save_file(tensors, str(path), metadata=metadata)

    @staticmethod
    def load(path: str | Path) -> "NetworkCertificate":
        """Read a certificate from a file.

        Raises:
            CertificateError: if the file is no certificate of a network.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as problem:
            raise CertificateError(f"{path} cannot be read as a certificate: {problem}") from problem
        if metadata.get("format") != FORMAT:
            raise CertificateError(f"{path} is no certificate of a network (format {metadata.get('format')!r})")
        try:
            steps = tuple(_step(entry, i, tensors) for i, entry in enumerate(json.loads(metadata["steps"])))
            prefix = "constant."
            constants = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            count = sum(1 for name in tensors if name.startswith("multiplier."))
            return NetworkCertificate(
                float.fromhex(metadata["upper"]),
                metadata["calculus"],
                Program(steps, tuple(json.loads(metadata["outputs"])), constants),
                tuple(tensors[f"multiplier.{i}"] for i in range(count)),
                json.loads(metadata["digests"]),
            )
        except (KeyError, TypeError, ValueError) as problem:
            raise CertificateError(f"{path} is damaged: {problem}") from problem


def digest(weight: Tensor) -> str:
    """SHA-256 of a weight's shape and of its values in float64."""
    data = weight.detach().to("cpu", torch.float64).contiguous()
    return hashlib.sha256(str(tuple(data.shape)).encode() + data.numpy().tobytes()).hexdigest()


def read_names(network: Program) -> tuple[str, ...]:
    """The stored weights that a program reads."""
    names: list[str] = []
    for step in network.steps:
        if isinstance(step, program.Linear):
            names.extend(step.map.names)
        elif isinstance(step, program.Elementwise) and step.weight:
            names.append(step.weight)
    return tuple(name for name in dict.fromkeys(names) if name not in network.constants)


def digests(network: Program, weights: Weights) -> dict[str, str]:
    """The digest of each stored weight that a program reads."""
    return {name: digest(weights[name]) for name in read_names(network)}


def _plain(step: Step) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": type(step).__name__}
    for field in dataclasses.fields(step):
        value = getattr(step, field.name)
        if isinstance(value, maps.LinearMap):
            value = {"type": type(value).__name__} | {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if not isinstance(value, Tensor):
            entry[field.name] = value.hex() if isinstance(value, float) else value
    return entry


def _step(entry: dict[str, Any], position: int, tensors: dict[str, Tensor]) -> Step:
    kind = _STEPS[entry.pop("type")]
    values = {k: _tuples(v) for k, v in entry.items() if k != "map"}
    if "map" in entry:
        linear = _MAPS[entry["map"].pop("type")]
        values["map"] = linear(**{k: _tuples(v) for k, v in entry["map"].items()})
    if kind is program.Elementwise:
        values |= {"low": tensors[f"low.{position}"], "high": tensors[f"high.{position}"]}
    if kind is program.Opaque:
        values["constant"] = float.fromhex(values["constant"])
    return kind(**values)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
