"""`opnorm.lipschitz`: the Lipschitz constant of a network, bounded from both sides."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from opnorm._enclosure import Guarantee
from opnorm.certificate.network.file import NetworkCertificate
from opnorm.certificate.network.program import Concat, Elementwise, Input, Linear, Opaque, Program, Step, Sum
from opnorm.certificate.network.region import Around, Region
from opnorm.errors import ArgumentError, WeightError
from opnorm.graph import Graph, export
from opnorm.graph.export import Example, two_samples
from opnorm.network.attention.recognise import with_attention
from opnorm.network.calculus import PARTS, Candidate, Progress, calculus_bound
from opnorm.network.certified import certificate_of, certificate_on_region, derived_weights
from opnorm.network.folded import folded, is_parametrized
from opnorm.network.lower import Function, Pair, attained
from opnorm.network.naive import Naive, naive
from opnorm.network.placed import localised, placed
from opnorm.network.reach import reach_of
from opnorm.network.rescaling import rescaled_bound
from opnorm.network.result import NetworkBound, NodeBound
from opnorm.network.rules import program_of
from opnorm.network.search import METHODS
from opnorm.network.settled import settled

_DEFAULT_SECONDS, _LONGEST = 30.0, 300.0
_LOWER_SHARE, _LOWER_SECONDS = 0.25, 10.0
_FOLDED = (
    "bounded as it is deployed: parametrized weights (spectral normalisation, say) with their values in evaluation "
    "mode, in the certificate under their plain names"
)
_METHODS = ("auto", "naive", "rescaled", "dense", "fourier", *METHODS)


def lipschitz(
    model: nn.Module,
    example_input: Example,
    *,
    method: str = "auto",
    guarantee: Guarantee = "proved",
    region: Region | None = None,
    pairs: Literal["joint", "each"] = "joint",
    time_budget: float | None = None,
    progress: Progress | None = None,
) -> NetworkBound:
    """Bound the Lipschitz constant of a network, per sample, in the Euclidean norm.

    Args:
        model: in evaluation mode; its weights as they are deployed. A parametrized model is bounded as its folded copy.
        example_input: a batch, or a tuple of batches where the model has several inputs; the lower bound starts from
            its first 16 samples, so give data. Integer inputs are not varied.
        method: `auto`; `naive`; `rescaled`, the naive rules with each channel in units of its own; `dense` or
            `fourier`, a form of the calculus; or the last search to try: `fast`, `sweep`, `afp`, `adam`, `newton`.
        guarantee: `proved` (rounding errors included), or `estimate` for the plain floating-point value.
        region: bound the differences of inputs inside a `Ball`, `Box` or `NormBall` only; of one input.
        pairs: how `pairwise` is found: `joint`, from the one covariance that gives `upper`; `each`, from a search for
            each pair of outputs in half of the time, which is tighter. A certificate is of `upper` only.
        time_budget: about how many seconds to spend beyond the naive rules; a form of the calculus whose single pass
            and proof would take longer is not begun, and a remark says so. By default 30 for the searches, while one
            pass and its proof may take up to 300.
        progress: called before each part of the work with how much is done, of how much, and what comes.

    Returns:
        The bounds; printing gives a table.

    Raises:
        ArgumentError: for an unknown method, guarantee or pairs, a model in training mode, or an input that the model
            does not take.
        UnsupportedLayerError: naming the first operation without a rule, or one that mixes samples.
        WeightError: naming a weight with NaN or infinite values.

    Source: LipSDP (Fazlyab et al., NeurIPS 2019) without a solver; see the guide "From layers to the network".

    Example:
        >>> import torch, opnorm
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> bound = opnorm.lipschitz(net, torch.randn(16, 4))
        >>> bound.lower <= bound.upper <= bound.product
        True
        >>> bound.guarantee
        'proved'
    """
    if method not in _METHODS:
        raise ArgumentError(f"method={method!r}: it is one of {', '.join(_METHODS)}")
    if guarantee not in ("proved", "estimate"):
        raise ArgumentError(f"guarantee={guarantee!r}: a network's bound is 'proved' or an 'estimate'")
    if pairs not in ("joint", "each"):
        raise ArgumentError(f"pairs={pairs!r}: it is 'joint' or 'each'")
    _require_seconds(time_budget)
    tell = progress or _silent
    tell(0, PARTS, "reading the model")
    _require_finite(model)
    graph = export(folded(model), example_input)
    program = program_of(graph)
    tell(1, PARTS, "looking for a lower bound")
    where = None if region is None else placed(program, region)
    seconds, longest = (_DEFAULT_SECONDS, _LONGEST) if time_budget is None else (time_budget, time_budget)
    remarks = [_FOLDED] if is_parametrized(model) else []
    look = min(seconds * _LOWER_SHARE, _LOWER_SECONDS)
    pair = _lower(graph, example_input, where, look)
    seconds -= look
    tell(2, PARTS, "norms of the steps")
    calculus = partial(calculus_bound, graph=graph, method=method, guarantee=guarantee, pairs=pairs, progress=tell)
    if where is None:
        begun = time.monotonic()
        plain = naive(program, graph.weights)
        once = time.monotonic() - begun
        pair = _settled(graph, example_input, pair, program=program, plain=plain, remarks=remarks)
        begun = time.monotonic()
        best = calculus(program, seconds=seconds, longest=longest, target=_quotient(pair), remarks=remarks)
        if method == "rescaled" or (method == "auto" and (best is None or best.found.method == METHODS[0])):
            left = math.inf if method == "rescaled" else seconds - (time.monotonic() - begun)
            best = rescaled_bound(program, graph, plain, best=best, once=once, seconds=left, remarks=remarks)
        return _assembled(program, graph, plain, best, pair, guarantee=guarantee, remarks=remarks)
    assert region is not None
    pair = _settled(graph, example_input, pair, remarks=remarks)
    calculus = partial(calculus, seconds=seconds / 2, longest=longest / 2, target=_quotient(pair))
    whole = with_attention(graph)
    local = localised(program_of(whole, split=False), whole, example_input, where)
    plain, plain_anywhere = naive(local, graph.weights), naive(program, graph.weights)
    near, anywhere = calculus(local, remarks=remarks), calculus(program, remarks=[])
    remarks.append("holds for inputs inside the region")
    best = min((c for c in (near, anywhere) if c is not None), key=lambda c: c.upper, default=None)
    least = min(plain_anywhere.total, math.inf if anywhere is None else anywhere.upper)
    certify = partial(
        certificate_on_region,
        graph,
        region,
        partial(calculus, remarks=[], progress=_silent),
        partial(certificate_of, program, graph, plain_anywhere, anywhere, guarantee=guarantee),
        guarantee=guarantee,
        helps=min(plain.total, math.inf if near is None else near.upper) < least,
    )
    if plain_anywhere.total < plain.total:
        local, plain = program, plain_anywhere
    return _assembled(local, graph, plain, best, pair, guarantee=guarantee, remarks=remarks, certify=certify)


def _require_seconds(given: Any) -> None:
    if given is not None and not (isinstance(given, int | float) and 0 <= given < math.inf):
        raise ArgumentError(f"time_budget={given!r}: it is a number of seconds, at least 0 and finite")


def _require_finite(model: nn.Module) -> None:
    """Refuse weights that are no numbers, by name; minus infinity is what masks of attention hold.

    Raises:
        ArgumentError: if the model is no module.
        WeightError: naming the first.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"the model is a torch.nn.Module, not {type(model).__name__}; wrap a function in one")
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if weight.is_floating_point() and not bool((weight < math.inf).all()):
            raise WeightError(f"the weight {name!r} holds NaN or infinite values, so the network has no constant")


def _silent(done: int, total: int, what: str) -> None:
    """Where nobody asked for progress."""


def _assembled(
    program: Program,
    graph: Graph,
    plain: Naive,
    best: Candidate | None,
    pair: Pair | None,
    *,
    guarantee: Guarantee,
    remarks: list[str],
    certify: Callable[[], NetworkCertificate] | None = None,
) -> NetworkBound:
    nodes = _nodes(program, plain)
    upper, method = plain.total, "naive"
    if best is not None and best.upper < upper:
        upper, method = best.upper, f"{best.calculus} {best.found.method}"
    if derived := derived_weights(program, graph):
        remarks.append(
            f"{len(derived)} tensors that the model computes from its weights are stored in a certificate as they are"
        )
    lower = _quotient(pair)
    if pair is not None and pair.guarantee == "estimate":
        lower = min(lower, upper)
    if lower > upper:
        raise AssertionError(f"a pair attains {lower!r}, above the bound {upper!r} ({method}): please report this")
    return NetworkBound(
        upper,
        lower,
        plain.total,
        best.pairwise if best is not None else None,
        nodes,
        guarantee if method not in ("naive", "rescaled product") else "proved",
        method,
        pair,
        tuple(remarks),
        certify or partial(certificate_of, program, graph, plain, best, guarantee=guarantee),
    )


_KINDS: dict[type[Step], str] = {
    Input: "input", Linear: "linear", Sum: "join", Concat: "join", Elementwise: "activation", Opaque: "opaque"
}  # fmt: skip


def _nodes(program: Program, plain: Naive) -> tuple[NodeBound, ...]:
    nodes = []
    for step, constant, bound in zip(program.steps, plain.constants, plain.bounds, strict=True):
        before = max((plain.bounds[i] for i in step.sources), default=1.0)
        nodes.append(
            NodeBound(
                step.label,
                _KINDS[type(step)],
                step.shape,
                step.sources,
                constant,
                bound / before if 0 < before < math.inf else constant,
                bound,
                step.reason if isinstance(step, Opaque) else "",
            )
        )
    return tuple(nodes)


def _lower(graph: Graph, example_input: Example, where: Around | None, seconds: float) -> Pair | None:
    function = Function(graph, two_samples(example_input))
    inputs = example_input if isinstance(example_input, tuple | list) else (example_input,)
    floats = [b for b in inputs if b.is_floating_point()]
    count = min(16, *(len(b) for b in floats))
    starts = torch.cat([b[:count].detach().reshape(count, -1).double() for b in floats], 1)
    if where is None:
        return attained(function, starts, seconds=seconds)
    return attained(function, torch.cat([where.center[None], where.clip(starts)]), where.clip, seconds=seconds)


def _settled(
    graph: Graph,
    example_input: Example,
    pair: Pair | None,
    *,
    program: Program | None = None,
    plain: Naive | None = None,
    remarks: list[str],
) -> Pair | None:
    if pair is None:
        remarks.append("no lower bound: the model cannot be evaluated in float64, or its result did not change")
        return None
    function = Function(graph, two_samples(example_input))
    if program is None or plain is None:
        return settled(function, pair)
    return settled(function, pair, reach_of(graph, program, plain), plain.total)


def _quotient(pair: Pair | None) -> float:
    return 0.0 if pair is None else pair.quotient
