"""`opnorm.lipschitz`: the Lipschitz constant of a network, bounded from both sides."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from opnorm._enclosure import Guarantee
from opnorm.certificate.network.check import SLACK, chain_of, chains_of
from opnorm.certificate.network.composition import composed, stated_norms
from opnorm.certificate.network.file import NetworkCertificate, digests, read_names
from opnorm.certificate.network.program import Calculus, Concat, Elementwise, Input, Linear, Opaque, Program, Step, Sum
from opnorm.certificate.network.proof import prove
from opnorm.errors import ArgumentError, CertificateError, TooLargeError, UnsupportedLayerError, WeightError
from opnorm.graph import Graph, export
from opnorm.graph.export import Example, two_samples
from opnorm.network.folded import folded, is_parametrized
from opnorm.network.frequencies import affordable
from opnorm.network.local import Sharpen, localise
from opnorm.network.lower import Function, Pair, attained, settled
from opnorm.network.naive import Naive, naive
from opnorm.network.pairs import each_pair
from opnorm.network.region import Around, Region, around
from opnorm.network.rules import program_of
from opnorm.network.search import METHODS, Found, search
from opnorm.network.table import table_of

_DEFAULT_SECONDS, _LONGEST = 30.0, 300.0
_LOWER_SHARE, _LOWER_SECONDS = 0.25, 10.0
_DENSE_FIRST = 1100
_AS_GOOD = 1 + 1e-6
_FORMS: dict[str, tuple[Calculus, ...]] = {"dense": ("dense",), "fourier": ("fourier",)}
_PARTS = 4
_SHARPEN_SIZE, _SHARPEN_STEPS, _SHARPEN_SECONDS = 600, 12, 0.1
_FOLDED = (
    "bounded as it is deployed: parametrized weights (spectral normalisation, say) with their values in evaluation "
    "mode, in the certificate under their plain names"
)
_METHODS = ("auto", "naive", "dense", "fourier", *METHODS)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class NodeBound:
    """One step of the network.

    Attributes:
        place: where it comes from: qualified module name and operation.
        kind: `input`, `linear`, `activation`, `join` (sums and concatenations), or `opaque` where only its constant is
            known.
        shape: of its result, for one sample.
        sources: positions among the nodes of what it reads.
        constant: how much the step can stretch what it reads.
        contribution: by how much it changes the running bound: `bound` over the largest bound of its sources. Smaller
            than `constant` where a BatchNorm is better taken together with the convolution before it.
        bound: of the step as a function of the network's inputs, by the naive rules.
        note: why the constant is what it is, where that is not obvious.
    """

    place: str
    kind: str
    shape: tuple[int, ...]
    sources: tuple[int, ...]
    constant: float
    contribution: float
    bound: float
    note: str = ""


@dataclass(frozen=True, eq=False)
class NetworkBound:
    """An enclosure of a network's Lipschitz constant in the Euclidean norms of all its inputs and outputs.

    Attributes:
        upper: the best upper bound.
        lower: attained by `pair`; 0 where none was found. `pair.guarantee` says whether the rounding of its evaluation
            was bounded (`proved`), or the quotient is that of a float64 evaluation, less 1e-7 of it (`estimate`).
        product: the composition of the naive rules.
        pairwise: upper bounds for the difference of each pair of outputs, shape (n, n); None where the calculus did
            not reach the outputs one by one.
        nodes: one for each step, in the order of computation.
        guarantee: of `upper`, `product` and `pairwise`.
        method: what gave `upper`.
        pair: two inputs that attain `lower`, or None.
        remarks: what a reader should know, such as why a tighter method was not used.
    """

    upper: float
    lower: float
    product: float
    pairwise: Tensor | None
    nodes: tuple[NodeBound, ...]
    guarantee: Guarantee
    method: str
    pair: Pair | None
    remarks: tuple[str, ...]
    _certify: Callable[[], NetworkCertificate]

    def certificate(self) -> NetworkCertificate:
        """The certificate of the bound, to be saved and verified by others.

        Its claim is `upper`, or a little more: the verifier proves norms in its own way.

        Raises:
            CertificateError: if the bound is an estimate, infinite, or holds on a region only.
        """
        return self._certify()

    @property
    def gap(self) -> float:
        """Upper over lower, minus 1; infinite where no lower bound was found."""
        return 0.0 if self.upper == 0.0 else self.upper / self.lower - 1 if self.lower > 0 else math.inf

    def __float__(self) -> float:
        """The upper bound."""
        return self.upper

    def __str__(self) -> str:
        """A table that follows the model's structure."""
        return table_of(self)


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
            its samples. Integer inputs are not varied.
        method: `auto`; `naive`; `dense` or `fourier`, a form of the calculus; or the last search to try: `fast`,
            `sweep`, `afp`, `adam`, `newton`.
        guarantee: `proved` (rounding errors included), or `estimate` for the plain floating-point value.
        region: bound the differences of inputs inside a `Ball`, `Box` or `NormBall` only; one input, no certificate.
        pairs: how `pairwise` is found: `joint`, from the one covariance that gives `upper`; `each`, from a search for
            each pair of outputs in half of the time, which is tighter. A certificate is of `upper` only.
        time_budget: about how many seconds to spend beyond the naive rules; a form of the calculus whose single pass
            and proof would take longer is not begun, and a remark says so. By default 30 for the searches, while one
            pass and its proof may take up to 300.
        progress: called before each part of the work with how much is done, of how much, and what comes.

    Returns:
        The bounds; printing gives a table.

    Raises:
        ArgumentError: for an unknown method, guarantee or pairs, or a model in training mode.
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
    tell = progress or _silent
    tell(0, _PARTS, "reading the model")
    _require_finite(model)
    graph = export(folded(model), example_input)
    program = program_of(graph)
    tell(1, _PARTS, "looking for a lower bound")
    where = None if region is None else _placed(program, region)
    seconds, longest = (_DEFAULT_SECONDS, _LONGEST) if time_budget is None else (time_budget, time_budget)
    remarks = [_FOLDED] if is_parametrized(model) else []
    look = min(seconds * _LOWER_SHARE, _LOWER_SECONDS)
    pair = _lower(graph, example_input, where, look)
    seconds -= look
    target = pair.quotient if pair else 0.0
    tell(2, _PARTS, "norms of the steps")
    calculus = partial(
        _calculus, graph=graph, method=method, guarantee=guarantee, pairs=pairs, target=target, progress=tell
    )
    if where is None:
        plain = naive(program, graph.weights)
        best = calculus(program, seconds=seconds, longest=longest, remarks=remarks)
        return _assembled(program, graph, plain, best, pair, guarantee=guarantee, remarks=remarks)
    local = _localised(program_of(graph, split=False), graph, example_input, where)
    plain = naive(local, graph.weights)
    best = calculus(local, seconds=seconds / 2, longest=longest / 2, remarks=remarks)
    anywhere = calculus(program, seconds=seconds / 2, longest=longest / 2, remarks=[])
    remarks.append("holds for inputs inside the region; a bound on a region has no certificate")
    best = min((c for c in (best, anywhere) if c is not None), key=lambda c: c.upper, default=None)
    return _assembled(local, graph, plain, best, pair, guarantee=guarantee, remarks=remarks, on_region=True)


@dataclass(frozen=True, eq=False)
class _Candidate:
    upper: float
    pairwise: Tensor | None
    found: Found
    calculus: Calculus


def _calculus(
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
) -> _Candidate | None:
    """The covariance calculus, in the first form that the network fits."""
    if method == "naive":
        return None
    if any(isinstance(step, Opaque) and math.isinf(step.constant) for step in program.steps):
        remarks.append("an operation is unbounded, so only the naive rules apply")
        return None
    upto = method if method in METHODS else METHODS[-1]
    forms = _FORMS.get(method) or _forms(program)
    for calculus in forms:
        try:
            progress(3, _PARTS, f"{calculus} calculus: choosing multipliers")
            share = seconds if pairs == "joint" else seconds / 2
            found, chain = affordable(program, graph.weights, calculus, share, upto, target=target, longest=longest)
            if guarantee == "estimate":
                return _Candidate(found.estimate, None, found, calculus)
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
        return _Candidate(proof.upper * SLACK, None if pairwise is None else pairwise * SLACK, found, calculus)
    return None


def _require_finite(model: nn.Module) -> None:
    """Refuse weights that are no numbers, by name; minus infinity is what masks of attention hold.

    Raises:
        WeightError: naming the first.
    """
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if weight.is_floating_point() and not bool((weight < math.inf).all()):
            raise WeightError(f"the weight {name!r} holds NaN or infinite values, so the network has no constant")


def _silent(done: int, total: int, what: str) -> None:
    """Where nobody asked for progress."""


def _after(progress: Progress) -> Progress:
    """The proof's progress, once the search is over, which takes about four times as long."""
    return lambda done, total, what: progress(4 * total + done, 5 * total, what)


def _forms(program: Program) -> tuple[Calculus, ...]:
    """Dense where it is affordable, because its multipliers are finer; otherwise Fourier space first."""
    largest = max(step.size for step in program.steps)
    return ("dense", "fourier") if largest <= _DENSE_FIRST else ("fourier", "dense")


def _assembled(
    program: Program,
    graph: Graph,
    plain: Naive,
    best: _Candidate | None,
    pair: Pair | None,
    *,
    guarantee: Guarantee,
    remarks: list[str],
    on_region: bool = False,
) -> NetworkBound:
    nodes = _nodes(program, plain)
    upper, method = plain.total, "naive"
    if best is not None and best.upper < upper:
        upper, method = best.upper, f"{best.calculus} {best.found.method}"
    if derived := _derived(program, graph):
        remarks.append(
            f"{len(derived)} tensors that the model computes from its weights are stored in a certificate as they are"
        )
    lower = pair.quotient if pair is not None else 0.0
    if lower > upper:
        raise AssertionError(f"a pair attains {lower!r}, above the bound {upper!r} ({method}): please report this")
    return NetworkBound(
        upper,
        lower,
        plain.total,
        best.pairwise if best is not None else None,
        nodes,
        guarantee if method != "naive" else "proved",
        method,
        pair,
        tuple(remarks),
        lambda: _certificate(program, graph, plain, best, guarantee=guarantee, on_region=on_region),
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


def _derived(program: Program, graph: Graph) -> dict[str, Tensor]:
    """What a program reads that is not stored in the model but computed from its weights."""
    return {n: graph.weights[n].detach().to(torch.float64) for n in read_names(program) if n in graph.derived}


def _stated(program: Program, graph: Graph) -> Program:
    """The program as a certificate states it: with every tensor that is not among the model's weights."""
    return Program(program.steps, program.outputs, {**program.constants, **_derived(program, graph)})


def program_of_model(model: nn.Module, example_input: Example) -> Program:
    """What the rules read from a model, as a certificate of it would state it."""
    graph = export(folded(model), example_input)
    return _stated(program_of(graph), graph)


def _certificate(
    program: Program, graph: Graph, plain: Naive, best: _Candidate | None, *, guarantee: Guarantee, on_region: bool
) -> NetworkCertificate:
    if on_region:
        raise CertificateError("a bound on a region has no certificate; leave the region out to have one")
    if guarantee != "proved":
        raise CertificateError("an estimate has no certificate; ask for guarantee='proved'")
    whole = _stated(program, graph)
    hashes = digests(whole, graph.weights)
    if best is not None and best.upper <= plain.total * _AS_GOOD:
        multipliers = tuple(s.detach() for s in best.found.multipliers)
        return NetworkCertificate(best.upper, best.calculus, whole, multipliers, hashes)
    with torch.no_grad():
        norms = stated_norms(whole, {**graph.weights, **whole.constants}, plain.constants)
    return NetworkCertificate(composed(whole, norms), "naive", whole, (), hashes, norms)


def _placed(program: Program, region: Region) -> Around:
    if len(program.inputs) != 1:
        raise ArgumentError("a region needs a model with one input that is varied")
    return around(region, program.steps[program.inputs[0]].shape)


def _localised(program: Program, graph: Graph, example_input: Example, where: Around) -> Program:
    """The program on a region, with its values at the centre computed in float64."""
    function = Function(graph, two_samples(example_input))
    with torch.no_grad():
        values = function.values(where.center.expand(2, -1))
    samples = {
        node.name: node.samples(values[node.name])[0].reshape(-1)
        for node in graph.nodes
        if node.batch_axis is not None and values[node.name].is_floating_point()
    }
    weights = {**graph.weights, **program.constants}
    small = max(step.size for step in program.steps) <= _SHARPEN_SIZE
    few = sum(isinstance(step, Elementwise) for step in program.steps) <= _SHARPEN_STEPS
    return localise(program, graph, weights, samples, region=where, sharpen=_sharpen(graph) if small and few else None)


def _sharpen(graph: Graph) -> Sharpen:
    """Constants of single elements from the calculus up to that step."""

    def constants(program: Program, position: int) -> Tensor | None:
        try:
            chain = chain_of(program, graph.weights, "dense")
            return prove(chain, search(chain, _SHARPEN_SECONDS, "afp").multipliers, pairs_up_to=0).coordinates
        except (TooLargeError, UnsupportedLayerError, CertificateError, LinAlgError):
            return None

    return constants


def _lower(graph: Graph, example_input: Example, where: Around | None, seconds: float) -> Pair | None:
    function = Function(graph, two_samples(example_input))
    inputs = example_input if isinstance(example_input, tuple | list) else (example_input,)
    floats = [b for b in inputs if b.is_floating_point()]
    count = min(16, *(len(b) for b in floats))
    starts = torch.cat([b[:count].detach().reshape(count, -1).double() for b in floats], 1)
    if where is None:
        found = attained(function, starts, seconds=seconds)
    else:
        inside = torch.cat([where.center[None], where.clip(starts)])
        found = attained(function, inside, where.clip, seconds=seconds)
    return None if found is None else settled(function, found)
