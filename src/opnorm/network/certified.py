"""The certificate of a network's bound, and the program that it states."""

import torch
from torch import Tensor, nn

from opnorm._enclosure import Guarantee
from opnorm.certificate.network.composition import composed, stated_norms
from opnorm.certificate.network.file import NetworkCertificate, Run, digests, read_names
from opnorm.certificate.network.program import Program
from opnorm.certificate.network.rescaled import rescaled
from opnorm.errors import CertificateError
from opnorm.graph import Graph, export
from opnorm.graph.export import Example
from opnorm.network.calculus import Candidate
from opnorm.network.folded import folded
from opnorm.network.naive import Naive
from opnorm.network.rules import program_of

_AS_GOOD = 1 + 1e-6


def derived_weights(program: Program, graph: Graph) -> dict[str, Tensor]:
    """What a program reads that is not stored in the model but computed from its weights."""
    return {n: graph.weights[n].detach().to(torch.float64) for n in read_names(program) if n in graph.derived}


def _stated(program: Program, graph: Graph) -> Program:
    """The program as a certificate states it: with every tensor that is not among the model's weights."""
    return Program(program.steps, program.outputs, {**program.constants, **derived_weights(program, graph)})


def program_of_model(model: nn.Module, example_input: Example) -> Program:
    """What the rules read from a model, as a certificate of it would state it."""
    graph = export(folded(model), example_input)
    return _stated(program_of(graph), graph)


def certificate_of(
    program: Program, graph: Graph, plain: Naive, best: Candidate | None, *, guarantee: Guarantee, on_region: bool
) -> NetworkCertificate:
    """The certificate of the calculus' bound, or of the naive rules' where these are as good.

    Raises:
        CertificateError: for an estimate, and for a bound on a region.
    """
    if on_region:
        raise CertificateError("a bound on a region has no certificate; leave the region out to have one")
    if guarantee != "proved":
        raise CertificateError("an estimate has no certificate; ask for guarantee='proved'")
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
