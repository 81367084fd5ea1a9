"""Does `lower <= truth <= upper` hold? Thousands of random and adversarial cases against independent oracles.

Truth comes from elsewhere: characteristic polynomials in exact integers (python-flint) for small matrices, where there
is no tolerance; SciPy's dense singular values in float64 for the others, whose own error is far below `ORACLE`; sums in
rational arithmetic for the other norms; the symbol on a fine grid for the suprema over all input sizes. Layers are
materialised by applying the module itself to unit vectors in float64.

    python benchmarks/soundness.py                 # 20,000 cases, five to ten minutes on one thread
    python benchmarks/soundness.py --cases 500     # half a minute, nothing stored

It exits with 1 if there is a violation. An exception that nothing expects counts as one.
"""

import argparse
import math
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import flint
import scipy
import torch
from environment import write
from oracles import (
    TRANSPOSED,
    against_fraction,
    against_matrix,
    against_number,
    against_vectors,
    largest_singular_value,
    supremum,
)
from torch import Tensor, nn

import opnorm
from cases import LAYERS, WEIGHTED, WEIGHTS, converted, module_matrix
from opnorm import Enclosure
from opnorm.errors import InputShapeError
from opnorm.layers import to_operator
from opnorm.norms.banded import banded_fits

FULL = 20_000
REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (*REAL, torch.complex64, torch.complex128)
GUARANTEES = ("proved",) * 6 + ("probable", "estimate")


@dataclass
class Tally:
    """What was seen of one family of cases."""

    cases: int = 0
    exact: int = 0
    refused: int = 0
    violations: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def add(self, outcome: "Outcome") -> None:
        """Count a case."""
        self.cases += 1
        self.exact += outcome.exact
        if outcome.enclosure is not None and outcome.enclosure.guarantee == "proved":
            self.gaps.append(outcome.enclosure.gap)
        if outcome.fault:
            self.violations.append(f"{outcome.name}: {outcome.fault}")

    def summary(self) -> dict[str, object]:
        """The numbers that are written."""
        finite = sorted(gap for gap in self.gaps if math.isfinite(gap))
        return {
            "cases": self.cases,
            "decided_exactly": self.exact,
            "refused": self.refused,
            "violations": self.violations,
            "proved_gap_median": finite[len(finite) // 2] if finite else None,
            "proved_gap_worst": finite[-1] if finite else None,
            "proved_gap_infinite": len(self.gaps) - len(finite),
        }


@dataclass(frozen=True)
class Outcome:
    """One enclosure held against the truth."""

    family: str
    name: str
    enclosure: Enclosure | None
    fault: str = ""
    exact: bool = False


def draw_weight(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[str, Tensor]:
    """A named weight, random or adversarial, at an ordinary scale or at an end of what the dtype holds."""
    kind = rng.choice([*WEIGHTS, "mixed", "faint", "integers"])
    real = torch.float64 if dtype.is_complex else dtype
    if kind == "mixed":
        base = torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.randint(-12, 1, shape)
    elif kind == "faint":  # most entries beside one are so small that their squares underflow
        base = torch.randn(shape, dtype=torch.float64) * 10.0 ** torch.randint(-310, -100, shape).double()
        base.view(-1)[rng.randrange(base.numel())] = 1.0
    elif kind == "integers":
        base = torch.randint(-2, 3, shape).to(torch.float64)
    else:
        base = WEIGHTS["gaussian" if kind in {"tiny", "huge"} else kind](torch.empty(shape)).to(torch.float64)
    if dtype.is_complex:
        base = torch.complex(base, base.flip(0) * rng.choice([0.0, 1.0, 1e-9]))
        real = torch.float32 if dtype == torch.complex64 else torch.float64
    limits = torch.finfo(real)
    if kind == "tiny":
        base = base * (limits.smallest_normal / 64)
    elif kind == "huge":
        parts = torch.view_as_real(base) if base.is_complex() else base
        base = base / parts.abs().max().clamp_min(1e-9) * limits.max * (0.7 if limits.bits < 64 else 1e-4)
    return kind, base.to(dtype)


def draw_guarantee(rng: random.Random) -> str:
    """Mostly proved."""
    return rng.choice(GUARANTEES)


def matrices(rng: random.Random) -> Outcome:
    """Plain matrices of a few rows, or of up to 300."""
    large = rng.random() < 0.06
    limit = 300 if large else rng.choice([1, 3, 5, 5, 12, 40])
    shape = (rng.randint(1, limit), rng.randint(1, limit))
    dtype = rng.choice(DTYPES)
    kind, weight = draw_weight(rng, shape, dtype)
    found = opnorm.norm(weight, guarantee=draw_guarantee(rng), rtol=rng.choice([None, 1e-9, 1e-3]))
    wide = weight.to(torch.complex128 if dtype.is_complex else torch.float64)
    fault, exact = against_matrix(found, wide, entries_exact=True)
    return Outcome("matrices", f"{kind} {shape} {dtype} {found.guarantee}", found, fault, exact)


def orders(rng: random.Random) -> Outcome:
    """Norms from lp to lq of matrices, corners in rational arithmetic, the others against many vectors."""
    corners = [(1, 1), (math.inf, math.inf), (1, 2), (2, math.inf), (1, math.inf)]
    shape = (rng.randint(1, 6), rng.randint(1, 6))
    kind, weight = draw_weight(rng, shape, rng.choice(REAL))
    order = rng.choice(corners) if rng.random() < 0.5 else tuple(sorted(rng.choice(POWERS) for _ in range(2)))
    found = opnorm.norm(weight, ord=order)
    rows = [[abs(Fraction(x)) for x in row] for row in weight.to(torch.float64).tolist()]
    name = f"{kind} {shape} {weight.dtype} {order}"
    if order in corners:
        return Outcome("orders", name, found, against_fraction(found, rows, order), True)
    return Outcome("orders", name, found, against_vectors(found, weight.to(torch.float64), order))


POWERS = (1.0, 1.2, 1.5, 2.0, 2.0, 3.0, 5.0, 40.0, 700.0, math.inf)


def layer_table(rng: random.Random) -> Outcome:
    """Every layer of the tests' table, with every kind of weight."""
    case = rng.choice(LAYERS)
    weighted = case in WEIGHTED
    module = case.build()
    if weighted:
        dtype = rng.choice(DTYPES)
        module = converted(module, dtype)
        kind, weight = draw_weight(rng, tuple(module.weight.shape), dtype)
        set_weight(module, weight)
    else:
        kind = str(module.to(rng.choice(REAL)).__class__.__name__)
    return measured(rng, "layers", f"{case.name} {kind}", module, case.shape)


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Copy a weight into a layer and drop its bias."""
    with torch.no_grad():
        module.weight.copy_(weight)
        if module.bias is not None:
            module.bias.zero_()


def measured(rng: random.Random, family: str, name: str, module: nn.Module, shape: tuple[int, ...]) -> Outcome:
    """One layer at one size, by a method that fits it, against its own matrix."""
    guarantee, method = draw_guarantee(rng), "auto"
    if isinstance(module, CONVS) and guarantee == "proved" and rng.random() < 0.6:
        method = rng.choice(methods_for(module, shape))
    name = f"{name} {shape} {getattr(getattr(module, 'weight', None), 'dtype', '')} {guarantee} {method}"
    found = opnorm.norm(module, input_shape=shape, guarantee=guarantee, method=method)
    summed = getattr(module, "padding_mode", "zeros") != "zeros"
    copies = isinstance(module, (*CONVS, nn.Linear)) and not summed and not module.weight.is_complex()
    fault, exact = against_matrix(found, module_matrix(module, shape), entries_exact=copies)
    return Outcome(family, name, found, fault, exact)


PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
CONVS = (*PLAIN, *TRANSPOSED)


def methods_for(module: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """The methods that a convolution may be asked for."""
    names = ["torus", "dense"]
    operator = to_operator(module, shape)
    if banded_fits(operator):
        names.append("banded")
    conv = getattr(operator, "conv", operator)
    grows = any(sum(pair) > reach for pair, reach in zip(conv.padding, conv.reach, strict=True))
    if conv.mode == "zeros" or (conv.mode == "circular" and not grows):
        names.append("size-free")
    return names


def draw_convolution(rng: random.Random) -> tuple[nn.Module, tuple[int, ...]]:
    """A convolution of any geometry that torch takes, and the shape of a sample for it."""
    dims = rng.choice([1, 1, 2, 2, 2, 3])
    groups = rng.choice([1, 1, 1, 2, 3])
    large = rng.random() < 0.04
    c_in, c_out = (groups * rng.randint(1, (3 if dims < 3 else 2) * (1 + large)) for _ in range(2))
    axes = range(dims)
    kernel = tuple(rng.randint(1, 6 if dims == 1 else 4 if dims == 2 else 3) for _ in axes)
    dilation = tuple(rng.choice([1, 1, 1, 2, 3]) for _ in axes)
    stride = tuple(rng.choice([1, 1, 1, 2, 3]) for _ in axes)
    sizes = tuple(rng.randint(1, (10 if dims == 1 else 6 if dims == 2 else 4) * (1 + large)) for _ in axes)
    padding = tuple(rng.choice([0, rng.randint(0, 6)]) for _ in axes)
    options = {"dilation": dilation, "groups": groups, "bias": False}
    if rng.random() < 0.3:
        extra = tuple(rng.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True))
        module = TRANSPOSED[dims - 1](c_in, c_out, kernel, stride, padding, extra, **options)
    else:
        mode = rng.choice(["zeros", "zeros", "circular", "circular", "reflect", "replicate"])
        width: object = padding
        if rng.random() < 0.15:
            width, stride = "same", (1,) * dims
        module = PLAIN[dims - 1](c_in, c_out, kernel, stride, width, padding_mode=mode, **options)
    return module.eval(), (c_in, *sizes)


def convolutions(rng: random.Random) -> Outcome:
    """Random geometries, at a given size."""
    module, shape = draw_convolution(rng)
    dtype = rng.choice(DTYPES)
    module = converted(module, dtype)
    kind, weight = draw_weight(rng, tuple(module.weight.shape), dtype)
    set_weight(module, weight)
    name = f"{kind} {module}"
    try:
        to_operator(module, shape)
    except InputShapeError:
        return Outcome("convolutions", name, None)
    return measured(rng, "convolutions", name, module, shape)


def size_free(rng: random.Random) -> Outcome:
    """Bounds for every input size: above the layer at a size, and around the supremum of its symbol."""
    module, shape = draw_convolution(rng)
    kind, weight = draw_weight(rng, tuple(module.weight.shape), torch.float64)
    set_weight(module.to(torch.float64), weight)
    name = f"{kind} {module} {shape}"
    try:
        found = opnorm.norm(module)
        to_operator(module, shape)
    except InputShapeError:
        return Outcome("size-free", name, None)
    here = largest_singular_value(module_matrix(module, shape))
    fault = against_number(0.0, found.upper, here)
    if not fault:
        below, above = supremum(module)
        fault = against_number(found.lower, math.inf, above) or against_number(0.0, found.upper, below)
    return Outcome("size-free", name, found, fault)


FAMILIES: dict[str, tuple[float, Callable[[random.Random], Outcome]]] = {
    "matrices": (0.3, matrices),
    "orders": (0.15, orders),
    "layers": (0.2, layer_table),
    "convolutions": (0.25, convolutions),
    "size-free": (0.1, size_free),
}


def attempt(family: str, generate: Callable[[random.Random], Outcome], rng: random.Random) -> Outcome:
    """One case; an exception that nothing expects counts as a violation."""
    try:
        return generate(rng)
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        return Outcome(family, "raised", None, f"{type(error).__name__}: {error}\n{where}")


def study(cases: int, seed: int) -> dict[str, object]:
    """Hold at least so many enclosures against the oracles and say what was seen."""
    torch.manual_seed(seed)
    started = time.perf_counter()
    tallies = {family: Tally() for family in FAMILIES}
    for family, (share, generate) in FAMILIES.items():
        rng, tally, wanted = random.Random(f"{family} {seed}"), tallies[family], math.ceil(cases * share)
        while tally.cases < wanted:
            outcome = attempt(family, generate, rng)
            if outcome.enclosure is None and not outcome.fault:
                tally.refused += 1
                continue
            tally.add(outcome)
            if outcome.fault:
                print(f"VIOLATION {family} {outcome.name}: {outcome.fault} {outcome.enclosure!r}", file=sys.stderr)
            if tally.cases % 1000 == 0:
                print(f"{family}: {tally.cases}/{wanted}, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return {
        "claim": "lower <= truth <= upper, without tolerance but for the float64 oracles' own relative 1e-12",
        "cases": sum(tally.cases for tally in tallies.values()),
        "decided_exactly": sum(tally.exact for tally in tallies.values()),
        "violations": sum(len(tally.violations) for tally in tallies.values()),
        "families": {name: tally.summary() for name, tally in tallies.items()},
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "oracles": {"scipy": scipy.__version__, "python-flint": flint.__version__},
    }


def main() -> None:
    """Run, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", type=int, default=FULL, help=f"how many to measure; fewer than {FULL} are not stored"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    found = study(options.cases, options.seed)
    print(f"{found['cases']} cases, {found['decided_exactly']} decided exactly, {found['violations']} violations")
    if options.cases >= FULL:
        print(write("soundness", found))
    sys.exit(1 if found["violations"] else 0)


if __name__ == "__main__":
    main()
