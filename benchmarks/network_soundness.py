"""1,000 random networks: no bound below a Jacobian norm or a difference quotient that was measured.

    python benchmarks/network_soundness.py [--count 1060] [--seed 0] [--out benchmarks/results/network_soundness.json]

Every network is bounded by each form of the calculus that it fits, with the proof, and compared without tolerance
with the Jacobians at random points of many scales (their own rounding, 1e-9, is subtracted) and with the pairs that
the search for a lower bound finds.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from opnorm.certificate.network.check import chain_of
from opnorm.certificate.network.proof import prove
from opnorm.errors import CertificateError, TooLargeError, UnsupportedLayerError
from opnorm.graph import export
from opnorm.network import Ball, lipschitz
from opnorm.network.naive import naive
from opnorm.network.rules import program_of
from opnorm.network.search import search

ROUNDING = 1 - 1e-9


class Residual(nn.Module):
    def __init__(self, inner: nn.Module, join: bool) -> None:
        super().__init__()
        self.inner, self.join = inner, join

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return torch.cat([x, y], 1) if self.join else x + y


class MaxMin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.norm = nn.Linear(width, 3 * width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + torch.nn.functional.scaled_dot_product_attention(q, k, v)


def pick(generator: torch.Generator, *choices: object) -> object:
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def activation(g: torch.Generator) -> nn.Module:
    kinds = (nn.ReLU, nn.ReLU, nn.LeakyReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.ELU, nn.Hardswish, nn.Sigmoid)
    return pick(g, *kinds)()  # type: ignore[operator]


def dense(g: torch.Generator) -> tuple[nn.Module, tuple[int, ...]]:
    width, start = int(torch.randint(2, 9, (), generator=g)) * 2, int(torch.randint(1, 8, (), generator=g))
    layers: list[nn.Module] = [nn.Linear(start, width)]
    for _ in range(int(torch.randint(1, 5, (), generator=g))):
        kind = pick(g, "plain", "plain", "residual", "concat", "maxmin", "norm")
        if kind == "plain":
            layers += [activation(g), nn.Linear(width, width)]
        elif kind == "residual":
            layers.append(Residual(nn.Sequential(activation(g), nn.Linear(width, width), activation(g)), False))
        elif kind == "concat":
            layers += [Residual(nn.Sequential(nn.Linear(width, 3), activation(g)), True), nn.Linear(width + 3, width)]
        elif kind == "maxmin":
            layers += [MaxMin(), nn.Linear(width, width)]
        else:
            layers += [nn.LayerNorm(width, eps=0.1), nn.Linear(width, width)]
    net = nn.Sequential(*layers, activation(g), nn.Linear(width, int(torch.randint(1, 5, (), generator=g))))
    return net, (start,)


def convolutional(g: torch.Generator) -> tuple[nn.Module, tuple[int, ...]]:
    size, c = int(torch.randint(3, 7, (), generator=g)), int(torch.randint(1, 4, (), generator=g))
    layers: list[nn.Module] = []
    for _ in range(int(torch.randint(1, 4, (), generator=g))):
        kernel, stride = int(pick(g, 1, 2, 3, 3, 5)), int(pick(g, 1, 1, 2))  # type: ignore[call-overload]
        padding = int(torch.randint(0, kernel, (), generator=g))
        inner = nn.Conv2d(c, c, 3, padding=1)
        if pick(g, True, False):
            layers.append(Residual(nn.Sequential(inner, activation(g)), bool(pick(g, True, False))))
            c = 2 * c if layers[-1].join else c  # type: ignore[assignment, union-attr]
        layers += [nn.Conv2d(c, 3, kernel, stride, padding), *([activation(g)] if pick(g, True, True, False) else [])]
        c = 3
    head = pick(g, [], [nn.AdaptiveAvgPool2d(1), nn.Flatten()], [nn.Flatten()], [nn.MaxPool2d(2)])
    first = next(m for m in nn.Sequential(*layers).modules() if isinstance(m, nn.Conv2d))
    return nn.Sequential(*layers, *head), (first.in_channels, size, size)  # type: ignore[misc]


def attention(g: torch.Generator) -> tuple[nn.Module, tuple[int, ...]]:
    width, tokens = int(torch.randint(2, 6, (), generator=g)), int(torch.randint(1, 5, (), generator=g))
    return nn.Sequential(nn.Linear(width, width), Attention(width)), (tokens, width)


def spoil(model: nn.Module, g: torch.Generator) -> None:
    """Badly scaled or nearly rank-one weights."""
    how = pick(g, "plain", "plain", "scaled", "rank one")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and how == "scaled":
                weight.mul_(10.0 ** float(torch.randn((), generator=g)))
                weight.mul_(10.0 ** torch.randn(len(weight), *([1] * (weight.dim() - 1)), generator=g))
            elif weight.dim() > 1 and how == "rank one":
                weight.mul_(1e-4).add_(torch.randn((), generator=g))


def worst(model: nn.Module, points: Tensor) -> float:
    twin = model.double()
    best = 0.0
    for x in points:
        jacobian = torch.autograd.functional.jacobian(lambda v: twin(v[None])[0].reshape(-1), x).reshape(-1, x.numel())
        best = max(best, float(torch.linalg.matrix_norm(jacobian, 2)) * ROUNDING)
    return best


def study(seed: int) -> dict[str, object]:
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    kind = pick(g, "dense", "dense", "convolutional", "convolutional", "attention", "ball")
    makers = {"dense": dense, "ball": dense, "convolutional": convolutional, "attention": attention}
    model, shape = makers[str(kind)](g)
    model.eval()
    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape))
    except RuntimeError:  # the picture became smaller than the kernel
        return {"seed": seed, "kind": kind, "skipped": "no output"}
    spoil(model, g)
    center = torch.randn(shape, generator=g)
    if kind in ("attention", "ball"):
        eps = 10.0 ** float(torch.empty(()).uniform_(-3, 0.5, generator=g))
        bound = lipschitz(model, center[None], region=Ball(center, eps), time_budget=0.5)
        offsets = torch.randn(12, *shape, generator=g).double()
        offsets = offsets / offsets.flatten(1).norm(dim=1).reshape(-1, *([1] * len(shape)))
        radii = eps * torch.rand(12, generator=g).double().reshape(-1, *([1] * len(shape))) * (1 - 1e-9)
        measured = max(worst(model, center.double() + offsets * radii), bound.lower)
        uppers = {"local": bound.upper, "local product": bound.product}
    else:
        graph = export(model, center[None])
        program = program_of(graph)
        uppers = {"product": naive(program, graph.weights).total}
        for form in ("dense", "fourier"):
            try:
                chain = chain_of(program, graph.weights, form)
                uppers[form] = prove(chain, search(chain, 0.3).multipliers).upper
            except (UnsupportedLayerError, TooLargeError, CertificateError, torch.linalg.LinAlgError):
                continue
        scales = torch.logspace(-2, 2, 12, dtype=torch.float64).reshape(-1, *([1] * len(shape)))
        measured = worst(model, torch.randn(12, *shape, generator=g).double() * scales)
    violated = [name for name, upper in uppers.items() if not measured <= upper]
    return {"seed": seed, "kind": kind, "measured": measured, **uppers, "violated": violated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1060)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "network_soundness.json")
    arguments = parser.parse_args()
    started = time.time()
    rows = [study(seed) for seed in range(arguments.seed, arguments.seed + arguments.count)]
    done = [row for row in rows if "skipped" not in row]
    bad = [row for row in done if row["violated"]]
    summary = {
        "networks": len(done),
        "violations": len(bad),
        "proved by the calculus": sum("dense" in r or "fourier" in r or "local" in r for r in done),
        "median ratio of the best bound to the measured norm": _median(done),
        "seconds": round(time.time() - started, 1),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"summary": summary, "violations": bad}, indent=1, default=str))
    print(json.dumps(summary, indent=1))
    raise SystemExit(1 if bad else 0)


def _median(rows: list[dict[str, object]]) -> float:
    ratios = []
    for row in rows:
        uppers = [v for k, v in row.items() if k in ("product", "dense", "fourier", "local", "local product")]
        if float(row["measured"]) > 0:  # type: ignore[arg-type]
            ratios.append(min(float(u) for u in uppers) / float(row["measured"]))  # type: ignore[arg-type]
    finite = sorted(r for r in ratios if math.isfinite(r))
    return round(finite[len(finite) // 2], 4) if finite else math.nan


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
