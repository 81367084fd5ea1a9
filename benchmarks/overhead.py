"""Training and evaluation time of a step: plain, torch's two spectral norms, opnorm's.

    python benchmarks/overhead.py            # prints a table, writes results/overhead.json

A step is forward, backward and Adam. All variants are timed in turns within one run, on one thread unless --threads
says otherwise, so that a busy machine slows all of them; figures are medians over rounds, of the ratio to the plain
step of the same round. deel-torchlip and orthogonium stand beside where they are installed.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import opnorm

RESULTS = Path(__file__).parent / "results"


def mlp(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Six layers of 1024."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [wrap(nn.Linear(1024, 1024)), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def discriminator(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The SN-GAN discriminator for 32 x 32 images (Miyato et al., Table 3) at half width."""
    plan = [
        (3, 32, 3, 1),
        (32, 64, 4, 2),
        (64, 64, 3, 1),
        (64, 128, 4, 2),
        (128, 128, 3, 1),
        (128, 256, 4, 2),
        (256, 256, 3, 1),
    ]
    layers: list[nn.Module] = []
    for c_in, c_out, k, stride in plan:
        layers += [wrap(nn.Conv2d(c_in, c_out, k, stride, 1)), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Flatten(), wrap(nn.Linear(256 * 4 * 4, 1)))


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda layer: layer,
    "torch parametrization": nn.utils.parametrizations.spectral_norm,
    "torch hook": nn.utils.spectral_norm,
    "opnorm": opnorm.spectral_norm,
    "opnorm reshaped": lambda layer: opnorm.spectral_norm(layer, norm="reshaped"),
    "opnorm adaptive": lambda layer: opnorm.spectral_norm(layer, n_power_iterations="adaptive"),
}


def others() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Layers of other libraries with the same shapes, where they are installed."""
    found: dict[str, Callable[[nn.Module], nn.Module]] = {}
    if importlib.util.find_spec("deel") is not None:
        from deel import torchlip

        def deel(layer: nn.Module) -> nn.Module:
            if isinstance(layer, nn.Linear):
                return torchlip.SpectralLinear(layer.in_features, layer.out_features)
            return torchlip.SpectralConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
            )

        found["deel-torchlip"] = deel
    return found


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    """Forward, backward, Adam."""
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def timed(step: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of a few calls."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - begin)
    return best


def compare(
    build: Callable[..., nn.Module], shape: tuple[int, ...], rounds: int, repeats: int, *, train: bool
) -> dict[str, dict[str, float]]:
    """Median over rounds of every variant's time relative to the plain one's in the same round."""
    x = torch.randn(shape)
    steps = {}
    for name, wrap in {**VARIANTS, **others()}.items():
        torch.manual_seed(0)
        model = build(wrap).train(train)
        optimizer = torch.optim.Adam(model.parameters(), 2e-4)
        if train:
            steps[name] = lambda model=model, optimizer=optimizer: train_step(model, optimizer, x)
        else:
            model.requires_grad_(False)
            steps[name] = lambda model=model: model(x)
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(2):
        for step in steps.values():
            step()
    for _ in range(rounds):
        times = {name: timed(step, repeats) for name, step in steps.items()}
        for name, value in times.items():
            ratios[name].append(value / times["plain"] - 1)
            seconds[name].append(value)
    return {
        name: {"seconds": statistics.median(seconds[name]), "overhead": statistics.median(ratios[name])}
        for name in steps
    }


def main() -> None:
    """Time everything, print a table, write the results with the environment beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = {
        **{f"mlp 6 x 1024, batch {n}": (mlp, (n, 1024), 3, True) for n in (32, 128, 512)},
        **{f"SN-GAN discriminator, batch {n}": (discriminator, (n, 3, 32, 32), 1, True) for n in (1, 8, 64)},
        "mlp 6 x 1024, batch 32, eval": (mlp, (32, 1024), 3, False),
        "SN-GAN discriminator, batch 8, eval": (discriminator, (8, 3, 32, 32), 3, False),
    }
    report: dict[str, object] = {
        "environment": {
            "torch": torch.__version__,
            "threads": arguments.threads,
            "machine": platform.processor() or platform.machine(),
        }
    }
    for title, (build, shape, repeats, train) in cases.items():
        if arguments.only not in title:
            continue
        found = compare(build, shape, arguments.rounds, repeats, train=train)
        report[title] = found
        print(title)
        for name, row in found.items():
            print(f"    {name:24s} {row['seconds'] * 1e3:9.2f} ms  {row['overhead']:+8.1%}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "overhead.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
