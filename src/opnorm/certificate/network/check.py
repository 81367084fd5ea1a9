"""Verify a network's certificate from the weights alone: nothing of the search is used."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from opnorm.certificate.network.activations import activation_slopes
from opnorm.certificate.network.composition import composed, prove_norms
from opnorm.certificate.network.cost import fourier_cost
from opnorm.certificate.network.encoding import described
from opnorm.certificate.network.file import NetworkCertificate, digest, read_names
from opnorm.certificate.network.fourier_chain import fourier_chain
from opnorm.certificate.network.local import localised
from opnorm.certificate.network.maps import LinearMap, Weights
from opnorm.certificate.network.norms import proves_run
from opnorm.certificate.network.program import Elementwise, Program, Shift
from opnorm.certificate.network.proof import prove
from opnorm.certificate.network.region import Region
from opnorm.certificate.network.regional import Regional
from opnorm.certificate.network.rescaled import rescaled
from opnorm.certificate.network.stages import Chain, dense_chain, per_element
from opnorm.certificate.network.wellformed import check_program
from opnorm.errors import ArgumentError, CertificateError, UnsupportedLayerError

SLACK = 1 + 2.0**-30
"""How far above the proved bound a claim is stated, so that another machine's rounding proves it too."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Verified:
    """The outcome of a verification that succeeded.

    Attributes:
        upper: the claim, which was proved again; for the inputs of `where` alone, if it is not empty.
        proved: the bound that was proved this time, at most `upper`.
        steps: of the program, as one line each: what was taken to be the network.
        read: names of the weights that the program reads.
        unread: names of the weights that play no part, such as biases.
        assumptions: what was taken from the certificate: constants of operations, tensors of its own, and, unless it
            was compared with a model, that the steps are what the network computes.
        where: for which inputs the claim holds, in words; empty for all of them.
        region: the same as a region, or None.
    """

    upper: float
    proved: float
    steps: tuple[str, ...]
    read: tuple[str, ...]
    unread: tuple[str, ...]
    assumptions: tuple[str, ...]
    where: str = ""
    region: Region | None = None


def verify_network(
    certificate: NetworkCertificate | str | PathLike[str],
    weights: Weights | nn.Module,
    progress: Progress | None = None,
) -> Verified:
    """Prove a certificate's claim again.

    Args:
        certificate: or the path of its file.
        weights: tensors by name, or a model with them (in evaluation mode, where its weights are parametrized).
        progress: called before each stage with the number of those before it, of all, and its name.

    The certificate states the graph: that the network computes it is what its reader has to accept, together with the
    `assumptions`. Slopes of named activations are looked up here, not believed; on a region they are derived.

    Raises:
        CertificateFormatError: if the file cannot be read.
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
    read = read_names(certificate.program)
    stored = weights.state_dict() if isinstance(weights, nn.Module) else weights
    names = tuple(stored)
    check_names(certificate, stored)
    used = weights_in_use(weights, read) if isinstance(weights, nn.Module) else weights
    weights = {name: used[name].detach() for name in read if name in used}
    check_weights(certificate, weights)
    check_program(certificate.program, weights)
    check_slopes(certificate.program, weights)
    try:
        proved = _proved(certificate, weights, progress)
    except UnsupportedLayerError as problem:
        raise CertificateError(f"the {certificate.calculus} calculus cannot prove it: {problem}") from problem
    if not proved <= certificate.upper:
        raise CertificateError(f"the claim is {certificate.upper!r}, but only {proved!r} could be proved")
    return Verified(
        certificate.upper,
        proved,
        tuple(map(described, certificate.program.steps)),
        read,
        tuple(name for name in names if name not in read),
        ("the steps of the certificate are what the network computes", *certificate.assumptions),
        certificate.where,
        None if certificate.on is None else certificate.on.region,
    )


def _proved(certificate: NetworkCertificate, weights: Weights, progress: Progress | None) -> float:
    program = certificate.program
    if certificate.on is not None:
        program = on_region(certificate, certificate.on, weights)
    elif any(isinstance(step, Shift) for step in program.steps):
        raise CertificateError("the certificate states shifts, which belong to a region, and no region")
    if certificate.calculus == "naive":
        if certificate.multipliers:
            raise CertificateError("the naive rules have no multipliers")
        prove_norms(program, {**weights, **program.constants}, certificate.norms, progress)
        return composed(program, certificate.norms)
    if certificate.calculus == "rescaled":
        framed = rescaled(program, weights, certificate.multipliers)
        prove_norms(framed, {**weights, **framed.constants}, certificate.norms, progress)
        return composed(framed, certificate.norms)
    if certificate.norms and certificate.on is None:
        raise CertificateError("the covariance calculus has no norms of steps")
    return prove(chains_of(program, weights, certificate.calculus), certificate.multipliers, 0, progress).upper


def on_region(certificate: NetworkCertificate, on: Regional, weights: Weights) -> Program:
    """The program on the region: every interval is derived here, and what the file states for it is proved first.

    Raises:
        CertificateError: if something that is stated cannot be proved.
    """
    weights = {**weights, **certificate.program.constants}
    unread = set(on.lemmas)

    def constants(so_far: Program, position: int) -> Tensor | None:
        if position not in on.lemmas:
            return None
        unread.remove(position)
        return prove(dense_chain(so_far, weights), on.lemmas[position], 0).coordinates

    def norm(position: int, linear: LinearMap) -> float:
        bound = certificate.norms.get((position,), inf)
        if bound < inf and not proves_run((linear,), weights, bound):
            raise CertificateError(f"step {position}: could not prove that its norm is at most {bound!r}")
        return bound

    try:
        local = localised(certificate.program, weights, on.region, constants=constants, norm=norm, stated=on.slopes)
    except ArgumentError as problem:
        raise CertificateError(f"the region is none: {problem}") from problem
    if unread:
        raise CertificateError(f"a lemma is stated for step {min(unread)}, which needs none")
    return local.result


def check_names(certificate: NetworkCertificate, weights: Weights) -> None:
    """Refuse a certificate that brings a tensor of its own under the name of a weight.

    Raises:
        CertificateError: naming it.
    """
    for name in certificate.program.constants:
        if name in weights:
            raise CertificateError(f"the certificate brings its own {name!r}, which is one of the weights")


def check_weights(certificate: NetworkCertificate, weights: Weights) -> None:
    """Refuse weights that are not those of the certificate.

    Raises:
        CertificateError: naming the weight.
    """
    names = read_names(certificate.program)
    for name in names:
        if name not in weights:
            raise CertificateError(f"the weight {name!r} is missing")
        if certificate.digests.get(name) != digest(name, weights[name]):
            raise CertificateError(f"the weight {name!r} is not the one that was certified")
    if extra := set(certificate.digests) - set(names):
        raise CertificateError(f"the certificate names {min(extra)!r}, which its program does not read")


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
            try:
                low, high = activation_slopes(step.kind, step.parameters, step.weight, weights)
                least, most = _per_element(low, step), _per_element(high, step)
            except (ValueError, RuntimeError) as problem:
                raise CertificateError(
                    f"{step.label}: the parameters of {step.kind} do not fit: {problem}"
                ) from problem
            low, high = _per_element(step.low, step), _per_element(step.high, step)
            if not bool(((low <= least) & (most <= high)).all()):
                raise CertificateError(f"{step.label}: the stated slopes are narrower than those of {step.kind}")


def _per_element(values: Tensor, step: Elementwise) -> Tensor:
    if values.dim() == 1 and values.numel() == 1:
        values = values.reshape(())
    if values.numel() > 1 and values.dim() == 1 and not torch.Size(step.shape):
        raise ValueError("one slope is needed")
    return values if values.dim() == 0 else per_element(values, step.shape)
