"""How far the training estimate is from the proved norm that evaluation divides by.

    python benchmarks/train_eval_gap.py      # prints a table, writes results/train_eval_gap.json

DCGAN-style discriminator and an MLP, Adam 2e-4, on noise. The gap of a layer is the norm of its weight in training
over that in evaluation, minus one; the largest layer is reported. The proof itself leaves 1e-4 of it, for a convolution
of any input size.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import opnorm

RESULTS = Path(__file__).parent / "results"
STEPS = (1, 3, 10, 30, 100)


def dcgan(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 32), (32, 64), (64, 128)):
        layers += [wrap(nn.Conv2d(c_in, c_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, wrap(nn.Conv2d(128, 1, 4)))


def mlp(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [wrap(nn.Linear(512, 512)), nn.ReLU()]
    return nn.Sequential(*layers, wrap(nn.Linear(512, 10)))


def gap(model: nn.Module) -> float:
    """The largest relative difference between the weights of the two modes, over the layers."""
    trained = [layer.weight.detach().clone() for layer in model if isinstance(layer, nn.Linear | nn.Conv2d)]
    twin = copy.deepcopy(model).eval()
    deployed = [layer.weight.detach().clone() for layer in twin if isinstance(layer, nn.Linear | nn.Conv2d)]
    return max(abs(float(a.norm() / b.norm()) - 1) for a, b in zip(trained, deployed, strict=True))


def run(
    build: Callable[..., nn.Module], batch: Callable[[], tuple[Tensor, Tensor]], iterations: object
) -> dict[str, float]:
    """Train a hundred steps; the gaps on the way, and the milliseconds of a step."""
    torch.manual_seed(0)
    model = build(lambda layer: opnorm.spectral_norm(layer, n_power_iterations=iterations))
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, betas=(0.5, 0.999))
    found, seconds = {}, 0.0
    for step in range(1, max(STEPS) + 1):
        real, fake = batch()
        begin = time.perf_counter()
        loss = torch.relu(1 - model(real)).mean() + torch.relu(1 + model(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seconds += time.perf_counter() - begin
        if step in STEPS:
            found[f"gap after {step}"] = gap(model)
    return {**found, "ms per step": 1e3 * seconds / max(STEPS)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    cases = {
        "DCGAN discriminator": (dcgan, lambda: (torch.randn(16, 3, 32, 32) + 0.5, torch.randn(16, 3, 32, 32))),
        "MLP 512": (mlp, lambda: (torch.randn(64, 512) + 0.5, torch.randn(64, 512))),
    }
    report: dict[str, object] = {"torch": torch.__version__}
    for title, (build, batch) in cases.items():
        for iterations in (1, 2, "adaptive"):
            row = run(build, batch, iterations)
            report[f"{title}, n_power_iterations={iterations}"] = row
            print(f"{title}, {iterations}: " + ", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "train_eval_gap.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
