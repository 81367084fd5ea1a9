"""How far the figures of random networks spread: product over bound, one draw and the median of ten.

    python benchmarks/network_spread.py [--draws 300]

The first two rows of network_figures.py with normal and uniform He initialisation. `reached` is the share of draws, and
of medians of ten, that come up to the ratios of a published table, whose draws and initialisation are not known.
"""

import argparse
import math

import network_builders as build
import torch
from environment import write
from torch import Tensor, nn

from opnorm.certificate.network.check import chain_of
from opnorm.graph import export
from opnorm.network.covariance import bound_squared
from opnorm.network.multipliers.afp import adjoint_fixed_point
from opnorm.network.multipliers.fast import fast
from opnorm.network.naive import naive
from opnorm.network.rules import program_of
from opnorm.network.search import search

SIZES = {"16-24x3-4": (16, 24, 24, 24, 4), "20-40x5-3": (20, *[40] * 5, 3)}
TABLE = {"16-24x3-4": (33.0 / 15.3, 33.0 / 8.69, 33.0 / 8.55), "20-40x5-3": (273 / 81.4, 273 / 42.6, 273 / 35.2)}
FORMS = ("fast", "afp15", "search")


def uniform(model: nn.Module) -> nn.Module:
    """Uniform weights of variance 2 / fan in, and no biases."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.uniform_(module.weight, -math.sqrt(6 / module.in_features), math.sqrt(6 / module.in_features))
            nn.init.zeros_(module.bias)
    return model


def ratios(model: nn.Module, width: int) -> list[float]:
    graph = export(model, torch.randn(4, width))
    program = program_of(graph)
    product = naive(program, graph.weights).total
    chain = chain_of(program, graph.weights, "dense")
    with torch.no_grad():
        quick = fast(chain)
        better = adjoint_fixed_point(chain, quick, 15)
    bounds = [bound_squared(found).item() ** 0.5 for found in (quick, better)]
    return [product / bound for bound in (*bounds, search(chain, 60.0).estimate)]


def spread(values: Tensor, table: float) -> dict[str, object]:
    """Quantiles 5, 50 and 95 % of draws and of medians of ten, and the shares that reach the table's."""
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=values.dtype)
    medians = values[torch.randint(len(values), (20000, 10))].quantile(0.5, 1)
    shown: dict[str, object] = {"table": round(table, 3)}
    for name, sample in (("draws", values), ("medians", medians)):
        shown[name] = [round(quantile, 3) for quantile in sample.quantile(levels).tolist()]
        shown[f"{name} reached"] = round(float((sample >= table).double().mean()), 3)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=300)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, sizes in SIZES.items():
        for kind, initialise in (("normal", build.he), ("uniform", uniform)):
            found = []
            for seed in range(arguments.draws):
                torch.manual_seed(seed)
                found.append(ratios(initialise(build.mlp(*sizes)), sizes[0]))
            table = torch.tensor(found, dtype=torch.float64)
            torch.manual_seed(0)
            for i, form in enumerate(FORMS):
                row = {"network": name, "weights": kind, "form": form, **spread(table[:, i], TABLE[name][i])}
                rows.append(row)
                print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    print(write("network_spread", rows))


if __name__ == "__main__":
    main()
