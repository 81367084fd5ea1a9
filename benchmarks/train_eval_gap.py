"""How far the training estimate is from the proved norm that evaluation divides by.

    python benchmarks/train_eval_gap.py      # prints a table, writes results/train_eval_gap.json

DCGAN-style discriminator and an MLP, Adam 2e-4, on noise, from several seeds. The gap of a layer is the norm of its
weight in training over that in evaluation, minus one; the largest over layers and seeds is reported. The proof itself
leaves 1e-4 of it, for a convolution of any input size. Cost is CPU time of a step, measured in turns, over the plain
network's. Folded and evaluated outputs are compared bit by bit.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from environment import write
from torch import Tensor, nn

import opnorm

STEPS = (1, 3, 10, 20, 50, 100, 150, 200)
SEEDS = (0, 1, 2)


Wrap = Callable[[nn.Module], nn.Module]
Build = Callable[[Wrap], nn.Module]

PLAIN = "plain"
VARIANTS: dict[str, Wrap] = {
    PLAIN: lambda layer: layer,
    "n_power_iterations=1": opnorm.spectral_norm,
    "n_power_iterations=adaptive": lambda layer: opnorm.spectral_norm(layer, n_power_iterations="adaptive"),
}


def dcgan(wrap: Wrap) -> nn.Module:
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 32), (32, 64), (64, 128)):
        layers += [wrap(nn.Conv2d(c_in, c_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, wrap(nn.Conv2d(128, 1, 4)))


def mlp(wrap: Wrap) -> nn.Module:
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


def step(model: nn.Module, optimizer: torch.optim.Optimizer, real: Tensor, fake: Tensor) -> float:
    """Train on one batch; the CPU time it took, in milliseconds."""
    begin = time.process_time()
    loss = torch.relu(1 - model(real)).mean() + torch.relu(1 + model(fake)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return 1e3 * (time.process_time() - begin)


def folded_is_evaluated(model: nn.Module, x: Tensor) -> bool:
    """Whether the folded model gives the outputs of the evaluated one, bit for bit."""
    twin = copy.deepcopy(model).eval()
    return torch.equal(twin(x), opnorm.fold(twin)(x))


def run(build: Build, batch: Callable[[], tuple[Tensor, Tensor]], seed: int) -> dict[str, dict[str, float]]:
    """Train the variants side by side; the gaps on the way, and the milliseconds of a step."""
    models = {}
    for name, wrap in VARIANTS.items():
        torch.manual_seed(seed)
        models[name] = build(wrap)
    optimizers = {
        name: torch.optim.Adam(model.parameters(), 2e-4, betas=(0.5, 0.999)) for name, model in models.items()
    }
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    times: dict[str, list[float]] = {name: [] for name in models}
    for count in range(1, max(STEPS) + 1):
        real, fake = batch()
        for name, model in models.items():
            times[name].append(step(model, optimizers[name], real, fake))
            if count in STEPS and name != PLAIN:
                found[name][f"gap after {count}"] = gap(model)
    for name, model in models.items():
        found[name]["ms per step"] = statistics.median(times[name])
        if name != PLAIN:
            found[name]["folded is evaluated"] = float(folded_is_evaluated(model, real))
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    cases = {
        "DCGAN discriminator": (dcgan, lambda: (torch.randn(16, 3, 32, 32) + 0.5, torch.randn(16, 3, 32, 32))),
        "MLP 512": (mlp, lambda: (torch.randn(64, 512) + 0.5, torch.randn(64, 512))),
    }
    report: dict[str, object] = {"seeds": len(SEEDS)}
    for title, (build, batch) in cases.items():
        runs = [run(build, batch, seed) for seed in SEEDS]
        for name in VARIANTS:
            row = {key: worst([found[name][key] for found in runs], key) for key in runs[0][name]}
            report[f"{title}, {name}"] = row
            print(f"{title}, {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in row.items()), flush=True)
    write("train_eval_gap", report)


def worst(values: list[float], key: str) -> float:
    """Over the seeds: the largest gap, the median time, and whether all of them were the same."""
    if key == "ms per step":
        return statistics.median(values)
    return max(values) if key.startswith("gap") else min(values)


if __name__ == "__main__":
    main()
