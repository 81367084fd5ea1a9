"""Large networks: time, memory and the bound of `opnorm.lipschitz`, each case in a process of its own.

    python benchmarks/network_scale.py                          # all cases, two threads; under 8 minutes
    python benchmarks/network_scale.py resnet50 transformer     # some of them

Weights are random (He's normal initialisation, BatchNorm with the running statistics of noise). Memory is the peak of
the resident set above what it is once everything is imported and the model is built.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import write
from torch import Tensor, nn

import opnorm
from opnorm.network import NormBall

Case = dict[str, Any]


class Residual(nn.Module):
    """Two convolutions beside the identity, or a strided 1 x 1 convolution where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class Bottleneck(nn.Module):
    """ResNet-50's block: 1 x 1, 3 x 3 with the stride, 1 x 1."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inside != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def residual_cnn(widths: tuple[int, ...] = (64, 128, 256), blocks: int = 3) -> nn.Sequential:
    """20 layers for three widths of three blocks: a stem, 18 convolutions in blocks and a linear head."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    inside = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(Residual(inside, width, 2 if stage and not block else 1))
            inside = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))


def resnet50() -> nn.Sequential:
    """Bottleneck blocks 3-4-6-3 behind the stem with its max pooling."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    ]  # fmt: skip
    inside = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(count):
            layers.append(Bottleneck(inside, width, 1 if block else stride))
            inside = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 1000))


def transformer(norm_first: bool, depth: int = 12) -> nn.Module:
    """An encoder of width 384 with 6 heads, as torch has it."""
    layer = nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def prepared(model: nn.Module, sample: Tensor) -> nn.Module:
    """He's initialisation, and running statistics of the model's own activations on noise."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
            model.train()(sample)
    return model.eval()


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "residual-cnn": (residual_cnn, (3, 32, 32), {}),
    "transformer": (lambda: transformer(False), (64, 384), {"region": NormBall(1.0)}),
    "transformer-norm-first": (lambda: transformer(True), (64, 384), {"region": NormBall(1.0)}),
    "resnet50": (resnet50, (3, 224, 224), {}),
    "resnet50-naive": (resnet50, (3, 224, 224), {"method": "naive"}),
}
"""Builder, shape of a sample, arguments of `lipschitz`."""


def run(name: str, threads: int, budget: float | None) -> Case:
    """Bound one network in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    build, shape, arguments = CASES[name]
    model = prepared(build(), torch.randn(4, *shape))
    sample = torch.randn(2, *shape)
    before = _status("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    bound = opnorm.lipschitz(model, sample, time_budget=budget, **arguments)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "case": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "wall s": round(wall, 1),
        "cpu s": round(cpu, 1),
        "peak GB": round((_status("VmHWM") - before) / 1e6, 2),
        "product": bound.product,
        "upper": bound.upper,
        "lower": bound.lower,
        "finite": math.isfinite(bound.upper),
        "guarantee": bound.guarantee,
        "method": bound.method,
        "remarks": bound.remarks,
    }


def _status(field: str) -> int:
    """A line of the kernel's account of this process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def main() -> None:
    """Run each case in a new process, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, help="seconds, instead of the default of `lipschitz`")
    parser.add_argument("--here", action="store_true", help="one case in this process, as JSON")
    options = parser.parse_args()
    names = options.cases or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"unknown cases: {', '.join(unknown)}")
    if options.here:
        print(json.dumps(run(names[0], options.threads, options.budget)))
        return
    rows = []
    for name in names:
        command = [sys.executable, __file__, name, "--here", "--threads", str(options.threads)]
        command += ["--budget", str(options.budget)] if options.budget else []
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        rows.append(row)
        print("  ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    if len(names) == len(CASES):
        print(write("network_scale", rows))


if __name__ == "__main__":
    main()
