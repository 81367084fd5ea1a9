"""The certificate of a bound on a region: slopes that its verifier derives again, and multipliers for them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from opnorm.certificate.network.composition import composed, stated_norms
from opnorm.certificate.network.file import NetworkCertificate, Run, digests
from opnorm.certificate.network.local import localised
from opnorm.certificate.network.maps import LinearMap
from opnorm.certificate.network.norms import attainable
from opnorm.certificate.network.program import Opaque, Program
from opnorm.certificate.network.proof import prove
from opnorm.certificate.network.region import Region
from opnorm.certificate.network.regional import Regional
from opnorm.certificate.network.stages import dense_chain
from opnorm.errors import CertificateError, TooLargeError, UnsupportedLayerError
from opnorm.graph import Graph
from opnorm.network.calculus import Candidate
from opnorm.network.naive import naive
from opnorm.network.placed import SHARPEN_SECONDS, sharpens
from opnorm.network.search import search

SPARE = 2.0**-26
"""Share of its width by which an interval is made wider than what was derived."""

Calculus = Callable[[Program], Candidate | None]


def certificate_on(program: Program, graph: Graph, region: Region, calculus: Calculus) -> NetworkCertificate:
    """The certificate of a program on a region, with the best multipliers that the calculus finds for its slopes.

    Args:
        program: as a certificate states it, with shifts.
        graph: which it comes from.
        region: where.
        calculus: bounds a program.

    Raises:
        CertificateError: naming a step that has no constant which can be proved from the weights alone.
    """
    weights = {**graph.weights, **program.constants}
    lemmas: dict[int, tuple[Tensor, ...]] = {}
    norms: dict[Run, float] = {}
    sharp = sharpens(program)
    measured = not sharp or any(isinstance(step, Opaque) for step in program.steps)

    def constants(so_far: Program, position: int) -> Tensor | None:
        if not sharp:
            return None
        try:
            chain = dense_chain(so_far, weights)
            multipliers = tuple(s.detach() for s in search(chain, SHARPEN_SECONDS, "afp").multipliers)
            found = prove(chain, multipliers, 0).coordinates
        except (TooLargeError, UnsupportedLayerError, CertificateError, LinAlgError):
            return None
        lemmas[position] = multipliers
        return found

    def norm(position: int, linear: LinearMap) -> float:
        if not measured:
            return math.inf
        norms[position,] = attainable((linear,), weights, 0.0)
        return norms[position,]

    with torch.no_grad():
        derived = localised(program, weights, region, constants=constants, norm=norm, spare=SPARE)
        on, local = Regional(region, derived.slopes, lemmas), derived.result
        hashes = digests(program, graph.weights)
        best, plain = calculus(local), naive(local, graph.weights)
        if best is not None and best.upper <= plain.total:
            multipliers = tuple(s.detach() for s in best.found.multipliers)
            return NetworkCertificate(best.upper, best.calculus, program, multipliers, hashes, norms, on)
        norms = stated_norms(local, weights, plain.constants) | norms
        return NetworkCertificate(composed(local, norms), "naive", program, (), hashes, norms, on)
