"""Time proved norms against the routines that people use: SVD, Gram eigenvalues, FFT and SVD.

    python benchmarks/speed.py            # 2048, 4096 and a 256-256-3-3 kernel; a few minutes
    python benchmarks/speed.py --quick    # 1024 and a 64-64-3-3 kernel

All cases take turns in one run; the ratios are what counts. opnorm's figures include both ends of the enclosure, the
proof of its rounding errors, and every conversion from the float32 weight.
"""

import argparse
from functools import partial

import torch
from environment import alternate, write

from opnorm.norms import norm
from opnorm.operators import Conv, Dense


def matrices(size: int, rounds: int) -> dict[str, object]:
    """Time one Gaussian matrix."""
    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(size))
    found = norm(Dense(weight))

    def gram() -> torch.Tensor:
        wide = weight.double()
        return wide @ wide.mT

    def eigenvalue() -> torch.Tensor:
        return torch.linalg.eigvalsh(gram())[-1].sqrt()

    seconds = alternate(
        {
            "opnorm": lambda: norm(Dense(weight)),
            "svd": lambda: torch.linalg.matrix_norm(weight, 2),
            "eigvalsh": eigenvalue,
            "product": gram,
        },
        rounds,
    )
    return {
        "case": f"float32 {size} x {size}",
        "gap": found.gap,
        "seconds": seconds,
        "svd / opnorm": seconds["svd"] / seconds["opnorm"],
        "eigvalsh / opnorm": seconds["eigvalsh"] / seconds["opnorm"],
    }


def fourier_svd(weight: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """The norm on the torus as Sedghi, Gupta and Long compute it, on half of the spectrum, in float64."""
    symbol = torch.fft.rfft2(weight.double(), s=sizes).permute(2, 3, 0, 1)
    return torch.linalg.svdvals(symbol.reshape(-1, *weight.shape[:2])).max()


def kernels(channels: int, size: int, rounds: int) -> list[dict[str, object]]:
    """Time one Gaussian kernel on the torus itself, and zero-padded, where the lower end is searched as well."""
    weight = torch.randn(channels, channels, 3, 3, generator=torch.Generator().manual_seed(channels))
    torus = (size + 1, size + 1)
    circular = Conv(weight, torus, (1, 1), ((1, 1),) * 2, (1, 1), mode="circular")
    zeros = Conv(weight, (size, size), (1, 1), ((1, 1),) * 2, (1, 1))
    runs = {"circular": circular, "zeros": zeros}
    found = {name: norm(operator, method="torus") for name, operator in runs.items()}
    seconds = alternate(
        {name: partial(norm, operator, method="torus") for name, operator in runs.items()}
        | {"rfft2 + svdvals": lambda: fourier_svd(weight, torus)},
        rounds,
    )
    return [
        {
            "case": f"float32 {channels}-{channels}-3-3 on {torus[0]} x {torus[1]}, {name} padding",
            "gap": found[name].gap,
            "seconds": seconds,
            "svd / opnorm": seconds["rfft2 + svdvals"] / seconds[name],
        }
        for name in runs
    ]


def report(row: dict[str, object]) -> dict[str, object]:
    """Print a row as soon as it is known."""
    ratios = ", ".join(f"{key} {value:.2f}" for key, value in row.items() if "/" in key)
    print(f"{row['case']}: gap {row['gap']:.1e}; {ratios}", flush=True)
    return row


def main() -> None:
    """Run, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sizes, channels = ((1024,), 64) if options.quick else ((2048, 4096), 256)
    rows: list[dict[str, object]] = []
    for size in sizes:
        rows.append(report(matrices(size, options.rounds)))
    for row in kernels(channels, 32, min(3, options.rounds)):
        rows.append(report(row))
    if not options.quick:
        print(write("speed", rows))


if __name__ == "__main__":
    main()
