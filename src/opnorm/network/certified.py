"""The certificate of a network's bound, and the program that it states."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from opnorm._enclosure import Guarantee
from opnorm.certificate.network.composition import composed, stated_norms
from opnorm.certificate.network.file import NetworkCertificate, Run, digests, read_names
from opnorm.certificate.network.program import Program
from opnorm.certificate.network.region import Region
from opnorm.certificate.network.rescaled import rescaled
from opnorm.errors import CertificateError
from opnorm.graph import Graph, export
from opnorm.graph.export import Example
from opnorm.network.calculus import Candidate
from opnorm.network.folded import folded
from opnorm.network.naive import Naive
from opnorm.network.on_region import certificate_on
from opnorm.network.rules import program_of

_AS_GOOD = 1 + 1e-6


def derived_weights(program: Program, graph: Graph) -> dict[str, Tensor]:
    """What a program reads that is not stored in the model but computed from its weights."""
    return {n: graph.weights[n].detach().to(torch.float64) for n in read_names(program) if n in graph.derived}


def _stated(program: Program, graph: Graph) -> Program:
    """The program as a certificate states it: with every tensor that is not among the model's weights."""
    return Program(program.steps, program.outputs, {**program.constants, **derived_weights(program, graph)})


def program_of_model(model: nn.Module, example_input: Example, *, on_region: bool = False) -> Program:
    """What the rules read from a model, as a certificate of it would state it."""
    return _program_of(export(folded(model), example_input), on_region=on_region)


def _program_of(graph: Graph, *, on_region: bool) -> Program:
    """On a region products stay whole, and what is added to linear operations is stated."""
    return _stated(program_of(graph, split=not on_region, shifts=on_region), graph)


def certificate_on_region(
    graph: Graph,
    region: Region,
    calculus: Callable[[Program], Candidate | None],
    everywhere: Callable[[], NetworkCertificate],
    *,
    guarantee: Guarantee,
    helps: bool,
) -> NetworkCertificate:
    """The certificate of a bound on a region, or of the one for all inputs where that is no larger.

    Args:
        graph: of the model.
        region: where.
        calculus: bounds a program.
        everywhere: the certificate for all inputs.
        guarantee: of the bound.
        helps: whether the bound on the region is smaller.

    Raises:
        CertificateError: for an estimate, or naming an operation that has no constant which can be proved there.
    """
    if not helps:
        return everywhere()
    _require_proved(guarantee)
    there = certificate_on(_program_of(graph, on_region=True), graph, region, calculus)
    try:
        anywhere = everywhere()
    except CertificateError:  # unbounded
        return there
    return there if there.upper < anywhere.upper else anywhere


def _require_proved(guarantee: Guarantee) -> None:
    if guarantee != "proved":
        raise CertificateError("an estimate has no certificate; ask for guarantee='proved'")


def certificate_of(
    program: Program, graph: Graph, plain: Naive, best: Candidate | None, *, guarantee: Guarantee
) -> NetworkCertificate:
    """The certificate of the calculus' bound, or of the naive rules' where these are as good.

    Raises:
        CertificateError: for an estimate, or an infinite bound.
    """
    _require_proved(guarantee)
    whole = _stated(program, graph)
    hashes = digests(whole, graph.weights)
    if best is not None and best.upper <= plain.total * _AS_GOOD:
        multipliers = tuple(s.detach() for s in best.found.multipliers)
        if best.calculus == "rescaled":
            framed = rescaled(whole, graph.weights, multipliers)
            norms = _norms(framed, graph, best.constants)
            return NetworkCertificate(composed(framed, norms), "rescaled", whole, multipliers, hashes, norms)
        return NetworkCertificate(best.upper, best.calculus, whole, multipliers, hashes)
    norms = _norms(whole, graph, plain.constants)
    return NetworkCertificate(composed(whole, norms), "naive", whole, (), hashes, norms)


def _norms(program: Program, graph: Graph, hints: tuple[float, ...]) -> dict[Run, float]:
    with torch.no_grad():
        return stated_norms(program, {**graph.weights, **program.constants}, hints)
