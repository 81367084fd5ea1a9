"""The networks of the guide's table: every form of the calculus, with proof, beside LipSDP and eclipse-nn.

    python benchmarks/network_figures.py [--rivals rivals/bin/python] [--seeds 10] [--rival-seeds 10] [--only NAME]

Random rows: the stated dimensions, He initialisation, the median over seeds. Trained rows: trained here on the
packaged digits. Times are CPU seconds of one thread, the least of three where they are short; those of `proved` are of
the search and the proof. The rivals run in an interpreter of their own (see network_rivals.py), on the first
`--rival-seeds` networks of each row. Each network is stored as soon as it is measured; what failed, fell back or ran
out of time stands there as text.
"""

import argparse
import json
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import network_builders as build
import numpy as np
import torch
from environment import environment
from torch import Tensor, nn

import opnorm
from opnorm.certificate.network.check import chain_of, chains_of
from opnorm.certificate.network.maps import Weights
from opnorm.certificate.network.program import Calculus, Program
from opnorm.certificate.network.proof import prove
from opnorm.graph import export
from opnorm.network.covariance import Forward, bound_squared
from opnorm.network.frequencies import affordable
from opnorm.network.lower import Function, attained
from opnorm.network.multipliers.adam import adam
from opnorm.network.multipliers.afp import adjoint_fixed_point
from opnorm.network.multipliers.fast import fast
from opnorm.network.naive import naive
from opnorm.network.rules import program_of
from opnorm.network.search import METHODS, search

RESULT = Path(__file__).parent / "results" / "network_figures.json"
RIVALS = Path(__file__).parent / "network_rivals.py"
FORMS = ("fast", "afp15", "adam60", "proved")
_ANSWERS = ("optimal", "ECLipsE", "ECLipsE_Fast")
_SHORT, _REPEATS = 0.2, 3
Row = dict[str, object]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        make: builds the network.
        shape: of one sample; () for the digits as rows, (1, 8, 8) for the digits as images.
        count: number of seeds; 1 for trained networks.
        rivals: which of them can read it.
        calculus: the form to use.
        seconds: budget of the search.
        thorough: how many of the networks have Adam and the whole search too.
        budget: of `opnorm.lipschitz`, for a figure of its own.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = ()
    count: int = 10
    rivals: tuple[str, ...] = ("lipsdp", "eclipse", "eclipse_fast")
    calculus: Calculus = "dense"
    seconds: float = 60.0
    thorough: int = 10
    budget: float | None = None


CASES = {
    "random 16-24x3-4": Case(lambda: build.he(build.mlp(16, 24, 24, 24, 4)), (16,)),
    "random 20-40x5-3": Case(lambda: build.he(build.mlp(20, *[40] * 5, 3)), (20,), rivals=("eclipse_fast",)),
    "random 64-64x10-10": Case(lambda: build.he(build.mlp(*[64] * 11, 10)), (64,), rivals=("eclipse_fast",)),
    "digits MLP 64-64-64-10": Case(lambda: build.trained(build.mlp(64, 64, 64, 10)), count=1),
    "digits MLP 64-64x8-10": Case(
        lambda: build.trained(build.mlp(*[64] * 9, 10)), count=1, rivals=("eclipse", "eclipse_fast")
    ),
    "digits CNN 64-512-256-10": Case(lambda: build.trained(build.cnn()), (1, 8, 8), 1, ()),
    "digits, 8 layers, norms 1": Case(build.unit_norms, count=1, rivals=("eclipse_fast",)),
    "residual MLP, 3 blocks (12/16)": Case(lambda: build.he(build.ResidualMLP()), (12,), rivals=("lipsdp",)),
    "residual MLP, variance 1 / fan in": Case(lambda: build.he(build.ResidualMLP(), 1.0), (12,), rivals=("lipsdp",)),
    "residual CNN 32x6 at 32 x 32, circular": Case(build.residual_cnn, (32, 32, 32), 1, (), "fourier", 90.0),
    "residual CNN 32x6, without its head": Case(build.ResidualCNN, (32, 32, 32), 1, (), "fourier", 90.0),
    "random 784-128x8-10": Case(
        lambda: build.he(build.mlp(784, *[128] * 8, 10)), (784,), rivals=("eclipse_fast",), thorough=3, budget=1.0
    ),
}


def example(case: Case) -> Tensor:
    if case.shape and case.shape[0] != 1:
        return torch.randn(4 if len(case.shape) > 1 else 64, *case.shape)
    return build.images("test", flat=not case.shape)


def measure(model: nn.Module, case: Case, thorough: bool) -> Row:
    batch = example(case)
    graph = export(model, batch)
    program = program_of(graph)
    pair = attained(Function(graph, (batch[:2],)), batch[:32].flatten(1).double(), ascent=60, seconds=60.0)
    target = pair.quotient if pair else 0.0
    row: Row = {"LB": target, "product": naive(program, graph.weights).total}
    if case.budget is not None:
        bound = opnorm.lipschitz(model, batch, time_budget=case.budget)
        row |= {f"in {case.budget:g} s": bound.upper, f"in {case.budget:g} s by": bound.method}
    if case.calculus == "fourier":
        return row | by_frequencies(program, graph.weights, case.seconds)
    chain, ready = timed(lambda: chain_of(program, graph.weights, case.calculus))
    with torch.no_grad():
        quick, fast_s = timed(lambda: fast(chain))
        better, afp_s = timed(lambda: adjoint_fixed_point(chain, quick, 15))
        certain, proof_s = timed(lambda: prove(chain, better.multipliers))
    row |= {"fast": size(quick), "fast s": fast_s, "afp15": size(better), "afp15 s": afp_s, "proof s": proof_s}
    row |= {"afp15 proved": certain.upper, "afp15 total s": ready + fast_s + afp_s + proof_s}
    if not thorough:
        return row
    polished, row["adam60 s"] = timed(lambda: adam(chain, better, 60))
    row["adam60"] = size(polished)
    found, spent = timed(lambda: search(chain, case.seconds, target=target))
    proof, proof_s = timed(lambda: prove(chain, found.multipliers))
    row |= {"proved": proof.upper, "proved s": ready + spent + proof_s, "method": found.method}
    if found.method == "afp":
        found, row["to the optimum s"] = timed(lambda: search(chain, case.seconds))
        row["to the optimum"] = prove(chain, found.multipliers).upper
    return row


def by_frequencies(program: Program, weights: Weights, seconds: float) -> Row:
    """One pass over all frequencies, and the whole search, each with its proof."""
    row: Row = {}
    for form, upto in (("fast", "fast"), ("search", METHODS[-1])):
        run = partial(affordable, program, weights, "fourier", seconds, upto, target=0.0, longest=seconds)
        (found, chain), row[f"{form} s"] = timed(run, once=True)
        parts = chain or chains_of(program, weights, "fourier")
        proof, row[f"{form} proof s"] = timed(partial(prove, parts, found.multipliers), once=True)
        row |= {form: found.estimate, f"{form} proved": proof.upper, "method": found.method}
    return row | {"proved": row["search proved"]}


def size(result: Forward) -> float:
    return bound_squared(result).item() ** 0.5


def timed(run: Callable[[], Result], once: bool = False) -> tuple[Result, float]:
    """What it returns, and its CPU seconds: the least of three where they are short."""
    spent: list[float] = []
    while not spent or (not once and spent[0] < _SHORT and len(spent) < _REPEATS):
        started = time.process_time()
        result = run()
        spent.append(time.process_time() - started)
    return result, min(spent)


def rival(python: str | None, which: str, model: nn.Module, limit: float) -> Row:
    """What one of the others says, or why it says nothing."""
    if python is None:
        return {which: "not installed"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.npz"
        np.savez(path, **build.stacked(model))
        command = [python, str(RIVALS), str(path), which, str(limit)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=4 * limit + 60)
        except (subprocess.TimeoutExpired, OSError) as problem:
            return {which: f"no answer: {type(problem).__name__}"}
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {which: f"no answer in {limit:g} s of CPU time"}
    if done.returncode:
        last = (done.stderr.splitlines() or [f"ended with {done.returncode}"])[-1]
        return {which: "not installed" if "ModuleNotFoundError" in last else last}
    answer = json.loads(done.stdout.splitlines()[-1])
    good = answer["value"] is not None and answer["status"] in _ANSWERS
    return {which: answer["value"] if good else answer["status"], f"{which} s": answer["seconds"]}


def compared(row: Row) -> Row:
    """The ratios of what is there."""
    forms = {form: row.get(form) for form in (*FORMS, "lipsdp", "product")}
    numbers = {form: value for form, value in forms.items() if isinstance(value, float)}
    product, lipsdp, best = (numbers.get(form) for form in ("product", "lipsdp", "proved"))
    ratios = {f"product / {form}": product / numbers[form] for form in FORMS if product and form in numbers}
    return row | ratios | ({"proved / lipsdp": best / lipsdp} if best and lipsdp else {})


def median_of(rows: list[Row]) -> Row:
    """Medians of what is a number in some rows, and the first of the rest."""
    out: Row = {}
    for key in dict.fromkeys(k for row in rows for k in row):
        values = [row[key] for row in rows if key in row]
        numbers = [v for v in values if isinstance(v, int | float)]
        out[key] = statistics.median(numbers) if numbers else values[0]
    ratios = [row["proved / lipsdp"] for row in rows if "proved / lipsdp" in row]
    if ratios:
        out["largest proved / lipsdp"] = max(ratios)  # type: ignore[type-var]
    searched = sum("proved" in row for row in rows)
    return out | {"networks": len(rows), "networks searched": searched, "networks with lipsdp": len(ratios)}


def save(path: Path, rows: dict[str, Row]) -> None:
    """After every network, so that an interrupted run leaves what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", help="the interpreter that has cvxpy and eclipse-nn")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--rival-seeds", type=int, default=10)
    parser.add_argument("--limit", type=float, default=300.0, help="CPU seconds for one answer of a rival")
    parser.add_argument("--budget", type=float, help="seconds of each search, by the clock: more on a busy machine")
    parser.add_argument("--only", action="append", help="part of a row's name; the other rows keep their figures")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() and arguments.only else {}
    for name, case in CASES.items():
        if arguments.only and not any(part in name for part in arguments.only):
            continue
        if arguments.budget:
            case = replace(case, seconds=arguments.budget)  # noqa: PLW2901 - the same row
        rows: list[Row] = []
        began = time.monotonic()
        for seed in range(min(case.count, arguments.seeds)):
            torch.manual_seed(seed)
            model = case.make()
            try:
                row = measure(model, case, seed < case.thorough)
            except Exception as problem:
                row = {"failed": f"{type(problem).__name__}: {problem}"}
            for which in case.rivals if seed < arguments.rival_seeds else ():
                if which == "eclipse" and seed:  # its accurate form takes minutes: once for each row
                    continue
                row |= rival(arguments.rivals, which, model, arguments.limit)
            rows.append(compared(row))
            results[name] = median_of(rows) | {"minutes": (time.monotonic() - began) / 60}
            save(arguments.out, results)
        shown = "  ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in results[name].items())
        print(f"{name:32} {shown}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
