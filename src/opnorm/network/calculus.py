"""The covariance calculus on a program: the form that fits it, the search for multipliers, and the proof."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from opnorm._enclosure import Guarantee
from opnorm.certificate.network.check import SLACK, chains_of
from opnorm.certificate.network.program import Calculus, Opaque, Program
from opnorm.certificate.network.proof import prove
from opnorm.errors import CertificateError, TooLargeError, UnsupportedLayerError
from opnorm.graph import Graph
from opnorm.network.frequencies import affordable
from opnorm.network.pairs import each_pair
from opnorm.network.search import METHODS, Found

_DENSE_FIRST = 1100
_FORMS: dict[str, tuple[Calculus, ...]] = {"dense": ("dense",), "fourier": ("fourier",)}
PARTS = 4
"""Of the work on a network, as its progress is told: reading it, a lower bound, its steps' norms, the calculus."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A bound better than the naive one, of the network and of each pair of outputs, and the multipliers that give it.

    Attributes:
        upper: of the network.
        pairwise: of each pair of outputs.
        found: multipliers; for the rescaled product the units of each step.
        calculus: which form.
        constants: for the rescaled product, of each step in its units.
    """

    upper: float
    pairwise: Tensor | None
    found: Found
    calculus: Calculus
    constants: tuple[float, ...] = ()


def calculus_bound(
    program: Program,
    *,
    graph: Graph,
    method: str,
    guarantee: Guarantee,
    seconds: float,
    longest: float,
    pairs: str,
    target: float,
    remarks: list[str],
    progress: Progress,
) -> Candidate | None:
    """The covariance calculus, in the first form that the network fits."""
    if method in ("naive", "rescaled"):
        return None
    if any(isinstance(step, Opaque) and math.isinf(step.constant) for step in program.steps):
        remarks.append("an operation is unbounded, so only the naive rules apply")
        return None
    upto = method if method in METHODS else METHODS[-1]
    forms = _FORMS.get(method) or _forms(program)
    for calculus in forms:
        try:
            progress(3, PARTS, f"{calculus} calculus: choosing multipliers")
            share = seconds if pairs == "joint" else seconds / 2
            found, chain = affordable(program, graph.weights, calculus, share, upto, target=target, longest=longest)
            if guarantee == "estimate":
                return Candidate(found.estimate, None, found, calculus)
            parts = chain or chains_of(program, graph.weights, calculus)
            proof = prove(parts, found.multipliers, progress=_after(progress))
        except (TooLargeError, UnsupportedLayerError, CertificateError, LinAlgError) as problem:
            remarks.append(f"{calculus} calculus: {problem}")
            continue
        pairwise = proof.pairwise
        if pairs == "each" and pairwise is not None and chain is None:
            remarks.append("the network is proved in parts, so its pairs of outputs keep the joint bound")
        elif pairs == "each" and pairwise is not None and chain is not None:
            pairwise, missed = each_pair(chain, found.multipliers, pairwise, seconds / 2)
            if missed:
                remarks.append(f"{missed} pairs of outputs were not reached in time and keep the joint bound")
        return Candidate(proof.upper * SLACK, None if pairwise is None else pairwise * SLACK, found, calculus)
    return None


def _after(progress: Progress) -> Progress:
    """The proof's progress, once the search is over, which takes about four times as long."""
    return lambda done, total, what: progress(4 * total + done, 5 * total, what)


def _forms(program: Program) -> tuple[Calculus, ...]:
    """Dense where it is affordable, because its multipliers are finer; otherwise Fourier space first."""
    largest = max(step.size for step in program.steps)
    return ("dense", "fourier") if largest <= _DENSE_FIRST else ("fourier", "dense")
