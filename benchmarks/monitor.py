"""What `opnorm.Monitor` adds to a training step when it is called after each.

    python benchmarks/monitor.py             # prints a table, writes results/monitor.json; about two minutes

Two equal models take turns in one run, one of them monitored, on one thread: CPU time of a step with the call over
that of a step without, eight steps to one measurement, as of convolutions an eighth of the later calls do most; figures
are medians of these. The first hundred calls take more care. In a normalised model the layers use the monitor's
estimate, so that only what goes beyond it is added.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from environment import write
from overhead import GROUP, mlp, train_step
from torch import nn

import opnorm

PHASES = {"first 20": 0, "to 100": 20, "later": 100}


def discriminator(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A DCGAN discriminator for 32 x 32 images."""
    layers: list[nn.Module] = []
    for c_in, c_out in ((3, 64), (64, 128), (128, 256)):
        layers += [wrap(nn.Conv2d(c_in, c_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, wrap(nn.Conv2d(256, 1, 4)))


def seconds(call: Callable[[], object]) -> float:
    """CPU time of one call."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def aged(model: nn.Module, count: int) -> opnorm.Monitor:
    """A monitor that has been called as often, each time for new values."""
    monitor = opnorm.Monitor(model)
    for _ in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0001)
        monitor()
    return monitor


def added(build: Callable[[], nn.Module], shape: tuple[int, ...], groups: int, calls: int) -> float:
    """The share that the monitor adds to a step, from that call on."""
    models = [build(), build()]
    monitors = [aged(model, calls) for model in models]
    x = torch.randn(shape)
    steps = [partial(train_step, model, torch.optim.Adam(model.parameters(), 2e-4), (x,)) for model in models]
    for step in steps:
        step()
    shares = []
    for _ in range(groups):
        plain = monitored = 0.0
        for _ in range(GROUP):
            plain += seconds(steps[0])
            monitored += seconds(steps[1]) + seconds(monitors[1])
        shares.append(monitored / plain - 1)
    return statistics.median(shares)


def main() -> None:
    """Time everything, print a table, write the results with the environment beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=5, help="measurements of eight steps each; the first 20 have two")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = {
        "mlp 6 x 1024, batch 128": (mlp, (128, 1024)),
        "DCGAN discriminator, batch 32": (discriminator, (32, 3, 32, 32)),
    }
    report: dict[str, object] = {}
    for title, (build, shape) in cases.items():
        for kind, wrap in {"plain": lambda layer: layer, "normalised": opnorm.spectral_norm}.items():
            found = {
                phase: added(partial(build, wrap), shape, arguments.groups if calls else 2, calls)
                for phase, calls in PHASES.items()
            }
            report[f"{title}, {kind}"] = found
            print(
                f"{title}, {kind:10s}", "  ".join(f"{phase} {share:+.1%}" for phase, share in found.items()), flush=True
            )
    write("monitor", report)


if __name__ == "__main__":
    main()
