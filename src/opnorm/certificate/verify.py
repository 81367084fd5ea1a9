"""Checking a certificate against weights, tensor by tensor, by the proofs of `weights.py`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from opnorm.certificate.format import Bounded, Certificate, Untouched, identify, parse
from opnorm.certificate.weights import proves
from opnorm.errors import CertificateError

Weights = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


@dataclass(frozen=True)
class Verification:
    """What was checked and holds.

    Attributes:
        lipschitz: every tensor of `proved` has norm at most this.
        proved: names of the tensors whose bound was proved again.
        untouched: names of those whose bytes are the certificate's, and of which it claims nothing else.
    """

    lipschitz: float
    proved: tuple[str, ...]
    untouched: tuple[str, ...]


def verify_weights(
    certificate: Certificate | str | bytes,
    weights: Weights,
    progress: Callable[[int, int, str], None] | None = None,
) -> Verification:
    """Prove again everything that a certificate claims of `weights`.

    Args:
        certificate: as parsed, or its JSON text.
        weights: a state dict, or pairs of name and tensor, read one after another.
        progress: called before each tensor with the elements done, all elements, and its name.

    Returns:
        What was proved. The call returns only if all of it holds.

    Raises:
        CertificateFormatError: if the certificate cannot be read.
        CertificateError: if a tensor is not the one that was certified, is missing or is not mentioned, or if its
            bound cannot be proved; the message names it.

    Example:
        >>> import torch
        >>> from opnorm.certificate.format import Bounded, Certificate, Reading, identify
        >>> weights = {"fc.weight": torch.eye(3) / 2}
        >>> entry = Bounded(**vars(identify("fc.weight", weights["fc.weight"])), reading=Reading("matrix"), bound=0.51)
        >>> verify_weights(Certificate(1.0, "divide", (entry,)), weights).proved
        ('fc.weight',)
    """
    if not isinstance(certificate, Certificate):
        certificate = parse(certificate)
    claims: dict[str, Bounded | Untouched] = {c.name: c for c in certificate.tensors}
    claims |= {c.name: c for c in certificate.untouched}
    total, done = sum(prod(claim.shape) for claim in claims.values()), 0
    checked: list[str] = []
    for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
        if progress is not None:
            progress(done, total, name)
        claim = claims.pop(name, None)
        if claim is None:
            twice = "comes twice" if name in checked else "is not mentioned in the certificate"
            raise CertificateError(f"{name!r} {twice}; the certificate is not of these weights")
        _check(claim, tensor, certificate.lipschitz)
        checked.append(name)
        done += prod(claim.shape)
    if claims:
        raise CertificateError(f"{min(claims)!r} is in the certificate, but not among the weights")
    return Verification(
        certificate.lipschitz, tuple(c.name for c in certificate.tensors), tuple(c.name for c in certificate.untouched)
    )


def _check(claim: Bounded | Untouched, tensor: Tensor, lipschitz: float) -> None:
    found = identify(claim.name, tensor)
    for what in ("shape", "dtype", "sha256"):
        if getattr(found, what) != getattr(claim, what):
            raise CertificateError(
                f"{claim.name!r} is not the tensor that was certified: its {what} is {getattr(found, what)}, "
                f"the certificate says {getattr(claim, what)}"
            )
    if isinstance(claim, Untouched):
        return
    if claim.bound > lipschitz:
        raise CertificateError(f"the bound {claim.bound!r} of {claim.name!r} is above lipschitz = {lipschitz!r}")
    with torch.no_grad():
        holds = proves(tensor, claim.reading, claim.bound)
    if not holds:
        raise CertificateError(f"{claim.name!r}: could not prove that its norm is at most {claim.bound!r}")
