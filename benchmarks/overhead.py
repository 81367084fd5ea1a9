"""Training and evaluation time of a step: plain, torch's two spectral norms, opnorm's.

    python benchmarks/overhead.py            # prints a table, writes results/overhead.json

A step is forward, backward and Adam. All variants are timed in turns within one run, on one thread unless --threads
says otherwise, so that a busy machine slows all of them; figures are medians over rounds, of the ratio to the plain
step of the same round. opnorm makes more iterations for the first hundred values of a weight, a row of its own; the
other rows of opnorm are what follows. deel-torchlip and orthogonium stand beside where they are installed.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from environment import write
from torch import Tensor, nn

import opnorm

FIRST_VALUES = 100
SLOW = 10
YOUNG = "opnorm, first 100 values"


def mlp(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Six layers of 1024."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [wrap(nn.Linear(1024, 1024)), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def discriminator(wrap: Callable[[nn.Module], nn.Module], width: int = 64) -> nn.Module:
    """The SN-GAN discriminator for 32 x 32 images (Miyato et al., Table 3)."""
    plan = [
        (3, width, 3, 1),
        (width, 2 * width, 4, 2),
        (2 * width, 2 * width, 3, 1),
        (2 * width, 4 * width, 4, 2),
        (4 * width, 4 * width, 3, 1),
        (4 * width, 8 * width, 4, 2),
        (8 * width, 8 * width, 3, 1),
    ]
    layers: list[nn.Module] = []
    for c_in, c_out, k, stride in plan:
        layers += [wrap(nn.Conv2d(c_in, c_out, k, stride, 1)), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Flatten(), wrap(nn.Linear(8 * width * 4 * 4, 1)))


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda layer: layer,
    "torch parametrization": nn.utils.parametrizations.spectral_norm,
    "torch hook": nn.utils.spectral_norm,
    "opnorm": opnorm.spectral_norm,
    YOUNG: opnorm.spectral_norm,
    "opnorm reshaped": lambda layer: opnorm.spectral_norm(layer, norm="reshaped"),
    "opnorm adaptive": lambda layer: opnorm.spectral_norm(layer, n_power_iterations="adaptive"),
}


def deel(layer: nn.Module) -> nn.Module:
    """The layer of deel-torchlip with the same shapes."""
    from deel import torchlip

    if isinstance(layer, nn.Linear):
        return torchlip.SpectralLinear(layer.in_features, layer.out_features)
    return torchlip.SpectralConv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
    )


def orthogonium(layer: nn.Module) -> nn.Module:
    """The layer of orthogonium with the same shapes."""
    from orthogonium.layers.conv.AOC import AdaptiveOrthoConv2d
    from orthogonium.layers.linear import OrthoLinear

    if isinstance(layer, nn.Linear):
        return OrthoLinear(layer.in_features, layer.out_features)
    return AdaptiveOrthoConv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, padding_mode="zeros"
    )


OTHERS = {"deel-torchlip": ("deel", deel), "orthogonium": ("orthogonium", orthogonium)}


def others() -> dict[str, Callable[[nn.Module], nn.Module]]:
    """Layers of other libraries, where they are installed."""
    return {name: wrap for name, (package, wrap) in OTHERS.items() if importlib.util.find_spec(package) is not None}


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
    variants = {**VARIANTS, **others()}
    if train:
        models = {name: build(wrap).train() for name, wrap in variants.items()}
    else:
        for name in (YOUNG, "opnorm reshaped", "opnorm adaptive"):  # the same weight in another way
            del variants[name]
        models = {name: build(wrap).eval().requires_grad_(False) for name, wrap in variants.items()}
        models["opnorm, folded"] = opnorm.fold(models["opnorm"])
    steps = {}
    for name, model in models.items():
        if train and name.startswith("opnorm") and name not in {YOUNG, "opnorm adaptive"}:
            for _ in range(FIRST_VALUES + 1):
                opnorm.update(model)
        if train:
            optimizer = torch.optim.Adam(model.parameters(), 2e-4)
            steps[name] = lambda model=model, optimizer=optimizer: train_step(model, optimizer, x)
        else:
            steps[name] = lambda model=model: model(x)
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # proofs, caches and lazy initialisation
        step()
    first = {name: timed(step, 1) for name, step in steps.items()}
    for name in [name for name in steps if first[name] > SLOW * first["plain"]]:
        del steps[name]  # so much slower that one call says enough
        ratios[name].append(first[name] / first["plain"] - 1)
        seconds[name].append(first[name])
    for _ in range(rounds):
        times = {name: timed(step, repeats) for name, step in steps.items()}
        for name, value in times.items():
            ratios[name].append(value / times["plain"] - 1)
            seconds[name].append(value)
    return {
        name: {"seconds": statistics.median(seconds[name]), "overhead": statistics.median(ratios[name])}
        for name in ratios
    }


def main() -> None:
    """Time everything, print a table, write the results with the environment beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = {
        **{f"mlp 6 x 1024, batch {n}": (mlp, (n, 1024), 2, True) for n in (32, 128, 512)},
        **{f"SN-GAN discriminator, batch {n}": (discriminator, (n, 3, 32, 32), 1, True) for n in (1, 8, 64)},
        "SN-GAN discriminator at half width, batch 64": (partial(discriminator, width=32), (64, 3, 32, 32), 1, True),
        "mlp 6 x 1024, batch 32, eval": (mlp, (32, 1024), 7, False),
        "SN-GAN discriminator, batch 8, eval": (discriminator, (8, 3, 32, 32), 7, False),
    }
    missing = sorted(set(OTHERS) - set(others()))
    report: dict[str, object] = {"not installed": missing}
    print(f"not installed: {', '.join(missing) or 'none'}")
    for title, (build, shape, repeats, train) in cases.items():
        if arguments.only not in title:
            continue
        found = compare(build, shape, arguments.rounds, repeats, train=train)
        report[title] = found
        print(title)
        for name, row in found.items():
            print(f"    {name:24s} {row['seconds'] * 1e3:9.2f} ms  {row['overhead']:+8.1%}")
    write("overhead", report)


if __name__ == "__main__":
    main()
