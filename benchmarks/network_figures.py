"""The networks of the guide's table: lower bound, product, and each form of the calculus, with the proof.

    python benchmarks/network_figures.py [--seeds 10] [--out benchmarks/results/network_figures.json]

Random rows: the stated dimensions, He initialisation, the median over seeds. Trained rows: trained here on the
packaged digits. Times are CPU seconds of one thread.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from opnorm.certificate.network.check import chain_of
from opnorm.certificate.network.proof import prove
from opnorm.data import digits
from opnorm.graph import export
from opnorm.network.covariance import bound_squared
from opnorm.network.lower import Function, attained
from opnorm.network.multipliers.adam import adam
from opnorm.network.multipliers.afp import adjoint_fixed_point
from opnorm.network.multipliers.fast import fast
from opnorm.network.multipliers.sweep import sweep
from opnorm.network.naive import naive
from opnorm.network.rules import program_of

Row = dict[str, float]


class ResidualMLP(nn.Module):
    def __init__(self, width: int = 12, inner: int = 16, blocks: int = 3, out: int = 4) -> None:
        super().__init__()
        self.a = nn.ModuleList(nn.Linear(width, inner) for _ in range(blocks))
        self.b = nn.ModuleList(nn.Linear(inner, width) for _ in range(blocks))
        self.out = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        for a, b in zip(self.a, self.b, strict=True):
            x = x + b(torch.relu(a(x)))
        return self.out(x)


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def he(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=math.sqrt(2 / module.in_features))
            nn.init.zeros_(module.bias)
    return model


def trained(model: nn.Module, epochs: int = 30) -> nn.Module:
    data = digits()
    images, labels = data.train_images.flatten(1), data.train_labels
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimiser.step()
    return model.eval()


def measure(model: nn.Module, example: Tensor, adam_rounds: int) -> Row:
    graph = export(model, example)
    program = program_of(graph)
    pair = attained(Function(graph, (example[:2],)), example[:64].double(), ascent=60)
    row: Row = {"LB": pair.quotient if pair else 0.0, "product": naive(program, graph.weights).total}
    started = time.process_time()
    chain = chain_of(program, graph.weights, "dense")
    with torch.no_grad():
        quick = fast(chain)
        row["fast"], row["fast s"] = bound_squared(quick).item() ** 0.5, time.process_time() - started
        start = min((quick, sweep(chain, quick)), key=lambda r: bound_squared(r).item())
        better = adjoint_fixed_point(chain, start, 15)
        row["afp15"], row["afp15 s"] = bound_squared(better).item() ** 0.5, time.process_time() - started
        ready = time.process_time()
        row["proved"], row["proof s"] = prove(chain, better.multipliers).upper, time.process_time() - ready
        if adam_rounds:
            row[f"adam{adam_rounds}"] = prove(chain, adam(chain, better, adam_rounds).multipliers).upper
    return row


def table(seeds: int) -> dict[str, tuple[Callable[[], nn.Module], int, int, int]]:
    """Name -> (builder, input size, number of seeds, Adam rounds)."""
    return {
        "random 16-24x3-4": (lambda: he(mlp(16, 24, 24, 24, 4)), 16, seeds, 60),
        "random 20-40x5-3": (lambda: he(mlp(20, 40, 40, 40, 40, 40, 3)), 20, seeds, 60),
        "random 64-64x10-10": (lambda: he(mlp(*[64] * 11, 10)), 64, seeds, 60),
        "digits MLP 64-64-64-10": (lambda: trained(mlp(64, 64, 64, 10)), 64, 1, 60),
        "digits MLP 64-64x8-10": (lambda: trained(mlp(*[64] * 9, 10)), 64, 1, 60),
        "residual MLP, 3 blocks (12/16)": (lambda: he(ResidualMLP()), 12, seeds, 60),
        "random 784-128x8-10": (lambda: he(mlp(784, *[128] * 8, 10)), 784, min(seeds, 3), 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "network_figures.json")
    arguments = parser.parse_args()
    results: dict[str, Row] = {}
    for name, (build, size, count, rounds) in table(arguments.seeds).items():
        rows = []
        for seed in range(count):
            torch.manual_seed(seed)
            model = build()
            example = digits().test_images.flatten(1) if name.startswith("digits") else torch.randn(64, size)
            rows.append(measure(model, example, rounds))
        results[name] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        shown = "  ".join(f"{key} {value:.4g}" for key, value in results[name].items())
        print(f"{name:32} {shown}", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(
        json.dumps({"torch": torch.__version__, "seeds": arguments.seeds, "rows": results}, indent=1)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
