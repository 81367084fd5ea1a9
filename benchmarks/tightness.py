"""Tabulate how tight the proved enclosures are: gaps of dense matrices and convolutions, over geometries and sizes.

    python benchmarks/tightness.py        # about five minutes

The table "gap of the symbol" of the guide on norms comes from here.
"""

import argparse
import math
from dataclasses import replace

import torch
from environment import write

from opnorm.norms import measure
from opnorm.operators import Conv, Dense


def gaussian(*shape: int) -> torch.Tensor:
    """Independent entries of variance one."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def smooth(channels: int, taps: int) -> torch.Tensor:
    """A kernel of one sign: what embeds worst."""
    line = torch.hann_window(taps + 2, periodic=False)[1:-1]
    return torch.outer(line, line) * (1 + 0.1 * gaussian(channels, channels, 1, 1))


def matrices(sizes: tuple[int, ...]) -> list[dict[str, object]]:
    """Gaussian, orthogonal, low-rank and badly scaled matrices."""
    rows = []
    for n in sizes:
        basis = torch.linalg.qr(gaussian(n, n)).Q
        decay = basis * torch.logspace(0, -6, n) @ basis.mT
        for name, weight in {
            "gaussian": gaussian(n, n),
            "orthogonal": basis,
            "rank 8 and noise": gaussian(n, 8) @ gaussian(8, n) + 0.01 * gaussian(n, n),
            "decaying spectrum": decay,
            "wide": gaussian(n // 4, n),
        }.items():
            rows.append({"case": f"{name} {n}", "gap": measure(Dense(weight), 1e-6).gap})
    return rows


def kernels() -> list[dict[str, object]]:
    """The symbol on a torus against the tight proof, over sizes, kernels, strides and dilations."""
    rows = []
    for size in (8, 16, 32):
        for name, weight, stride, dilation in (
            ("3x3 gaussian", gaussian(8, 8, 3, 3), 1, 1),
            ("3x3 constant", torch.ones(8, 8, 3, 3), 1, 1),
            ("5x5 gaussian", gaussian(8, 8, 5, 5), 1, 1),
            ("7x7 smooth", smooth(8, 7), 1, 1),
            ("3x3 gaussian stride 2", gaussian(8, 8, 3, 3), 2, 1),
            ("3x3 gaussian dilation 2", gaussian(8, 8, 3, 3), 1, 2),
        ):
            pad = dilation * (weight.shape[-1] // 2)
            conv = Conv(weight, (size, size), (stride,) * 2, ((pad, pad),) * 2, (dilation,) * 2)
            symbol = measure(conv, 1e-6, method="torus")
            tight = measure(conv, 1e-6)
            free = measure(replace(conv, spatial=None), 1e-6)
            rows.append(
                {
                    "case": f"{name} at {size} x {size}",
                    "symbol above the norm": symbol.upper / tight.lower - 1,
                    "gap of auto": tight.gap,
                    "method of auto": tight.method,
                    "size-free above the supremum": free.gap,
                    "size-free above the norm": free.upper / tight.lower - 1,
                }
            )
    return rows


def wide_kernels() -> list[dict[str, object]]:
    """The sizes of real layers, by the symbol alone, and the tight proof on request."""
    rows = []
    for channels, size in ((64, 8), (64, 16), (64, 32), (128, 16)):
        conv = Conv(gaussian(channels, channels, 3, 3), (size, size), (1, 1), ((1, 1),) * 2, (1, 1))
        rows.append(
            {
                "case": f"{channels}-{channels}-3-3 at {size}",
                "gap of the symbol": measure(conv, 1e-6, method="torus").gap,
            }
        )
        if channels * size * size <= 2**14:
            rows[-1]["gap of the banded proof"] = measure(conv, 1e-6, method="banded").gap
        circular = replace(conv, mode="circular")
        rows[-1]["gap, circular padding"] = measure(circular, 1e-6).gap
    return rows


def main() -> None:
    """Run, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="matrices up to 1024 only")
    options = parser.parse_args()
    sizes = (256, 1024) if options.quick else (256, 1024, 2048, 4096)
    rows = [*matrices(sizes), *kernels(), *wide_kernels()]
    for row in rows:
        figures = ", ".join(f"{k} {v:.1e}" if isinstance(v, float) else f"{v}" for k, v in row.items() if k != "case")
        print(f"{row['case']:34s} {figures}")
    if not options.quick:
        print(write("tightness", rows))


if __name__ == "__main__":
    main()
