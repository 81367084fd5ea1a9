"""Verify a network's certificate from the weights alone: nothing of the search is used."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from opnorm.certificate.network.activations import activation_slopes
from opnorm.certificate.network.cost import fourier_cost
from opnorm.certificate.network.file import NetworkCertificate, digest, read_names
from opnorm.certificate.network.fourier_chain import fourier_chain
from opnorm.certificate.network.maps import Weights
from opnorm.certificate.network.program import Elementwise, Program
from opnorm.certificate.network.proof import Proof, prove
from opnorm.certificate.network.stages import Chain, dense_chain
from opnorm.errors import CertificateError

SLACK = 1 + 2.0**-30
"""How far above the proved bound a claim is stated, so that another machine's rounding proves it too."""


@dataclass(frozen=True, eq=False)
class Verified:
    """The outcome of a verification that succeeded.

    Attributes:
        upper: the claim, which was proved again.
        proof: with the bound that was proved this time.
        assumptions: what was taken from the certificate about operations: Lipschitz constants of opaque steps.
    """

    upper: float
    proof: Proof
    assumptions: tuple[str, ...]


def verify_network(certificate: NetworkCertificate | str | PathLike[str], weights: Weights | nn.Module) -> Verified:
    """Prove a certificate's claim again.

    Args:
        certificate: or the path of its file.
        weights: tensors by name, or a model with them (in evaluation mode, where its weights are parametrized).

    The certificate states the graph: that the network computes it is what its reader has to accept, together with the
    `assumptions`. Slopes of named activations are looked up here, not believed.

    Raises:
        CertificateError: if the weights are others, a slope is too small, or the bound cannot be proved.

    Example:
        >>> import torch, opnorm
        >>> from opnorm.certificate.network import verify_network
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> certificate = opnorm.lipschitz(net, torch.randn(2, 4), method="fast").certificate()
        >>> verify_network(certificate, net).upper == certificate.upper
        True
    """
    if not isinstance(certificate, NetworkCertificate):
        certificate = NetworkCertificate.load(Path(certificate))
    if isinstance(weights, nn.Module):
        weights = weights_in_use(weights, read_names(certificate.program))
    weights = {name: weight.detach() for name, weight in weights.items()}
    for name in read_names(certificate.program):
        if name not in weights:
            raise CertificateError(f"the weight {name!r} is missing")
        if certificate.digests.get(name) != digest(weights[name]):
            raise CertificateError(f"the weight {name!r} is not the one that was certified")
    check_slopes(certificate.program, weights)
    proof = prove(chains_of(certificate.program, weights, certificate.calculus), certificate.multipliers)
    if not proof.upper <= certificate.upper:
        raise CertificateError(f"the claim is {certificate.upper!r}, but only {proof.upper!r} could be proved")
    return Verified(certificate.upper, proof, certificate.assumptions)


def weights_in_use(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """What a model computes with under these names: of a parametrized layer the result, not what is stored for it."""
    found: dict[str, Tensor] = {}
    for name in names:
        home, _, last = name.rpartition(".")
        try:
            found[name] = getattr(model.get_submodule(home), last)
        except AttributeError:
            continue
    return found


def chain_of(program: Program, weights: Weights, calculus: str) -> Chain:
    """The stages of a program in the named calculus.

    Raises:
        CertificateError: if there is no such calculus.
    """
    if calculus == "dense":
        return dense_chain(program, weights)
    if calculus == "fourier":
        return fourier_chain(program, weights)
    raise CertificateError(f"there is no calculus {calculus!r}")


def chains_of(program: Program, weights: Weights, calculus: str) -> Iterator[Chain]:
    """The same in as many parts, one after the other, as memory asks for; they share their multipliers."""
    parts = fourier_cost(program).parts() if calculus == "fourier" else []
    if len(parts) < 2:
        yield chain_of(program, weights, calculus)
    else:
        yield from (fourier_chain(program, weights, part=part) for part in parts)


def check_slopes(program: Program, weights: Weights) -> None:
    """Refuse stated slopes that are narrower than those of the named activation.

    Raises:
        CertificateError: naming the step.
    """
    for step in program.steps:
        if isinstance(step, Elementwise) and step.kind:
            low, high = activation_slopes(step.kind, step.parameters, step.weight, weights)
            if bool((step.low > _like(low, step.low)).any() or (step.high < _like(high, step.high)).any()):
                raise CertificateError(f"{step.label}: the stated slopes are narrower than those of {step.kind}")


def _like(limit: Tensor, stated: Tensor) -> Tensor:
    return torch.broadcast_to(limit, stated.shape) if limit.numel() == 1 else limit
