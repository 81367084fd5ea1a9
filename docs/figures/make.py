"""Draws the figures of the documentation with NumPy and matplotlib alone, so that they owe nothing to opnorm.

Usage: `python docs/figures/make.py` writes gain.svg, reshaped.svg and power.svg beside this file.
"""

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

HERE = Path(__file__).parent
INK, BLUE, ORANGE, GREEN = "#7f7f7f", "#4c78a8", "#f58518", "#54a24b"
STYLE = {
    "svg.hashsalt": "opnorm",
    "svg.fonttype": "none",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def save(name: str, width: float, height: float) -> None:
    """Writes the current figure as an SVG that is the same byte for byte on every run."""
    plt.gcf().set_size_inches(width, height)
    plt.tight_layout()
    plt.savefig(HERE / f"{name}.svg", transparent=True, metadata={"Date": None})
    plt.close()


def gain() -> None:
    """A matrix maps the unit circle to an ellipse; its longest half-axis is the spectral norm."""
    w = np.array([[1.5, 0.7], [0.1, 0.8]])
    u, s, vt = np.linalg.svd(w)
    u, vt = (-u, -vt) if vt[0, 0] < 0 else (u, vt)
    angle = np.linspace(0, 2 * np.pi, 361)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    _, axes = plt.subplots(1, 2, sharex=True, sharey=True)
    for ax, points, tip, title, label in (
        (axes[0], circle, vt[0], "inputs of energy 1", "z"),
        (axes[1], w @ circle, u[:, 0] * s[0], "what W makes of them", f"Wz,  |Wz| = σ = {s[0]:.2f}"),
    ):
        ax.plot(*points, color=BLUE)
        ax.annotate("", xy=tip, xytext=(0, 0), arrowprops={"arrowstyle": "->", "color": ORANGE, "lw": 2})
        ax.annotate(label, xy=tip, xytext=tip + np.array([0.05, 0.1]), color=ORANGE)
        ax.set_title(title, fontsize=11)
        ax.set_aspect("equal")
        ax.axis("off")
    save("gain", 7, 2.4)


def convolution_norm(kernel: np.ndarray, size: int, steps: int = 300) -> float:
    """Gain of the zero-padded convolution on size x size images, from below, by power iteration on the real map.

    Args:
        kernel: the taps.  # shape: (c_out, c_in, k, k)
        size: image height and width.
        steps: power iterations.

    Returns:
        The gain of the last iterate, in float64.
    """
    k = kernel.shape[-1]
    torus = size + k - 1
    symbol = np.fft.rfft2(kernel, (torus, torus))
    x = np.random.default_rng(1).standard_normal((kernel.shape[1], size, size))
    value = 0.0
    for _ in range(steps):
        x /= np.linalg.norm(x)
        y = np.fft.irfft2(np.einsum("oiab,iab->oab", symbol, np.fft.rfft2(x, (torus, torus))), (torus, torus))
        keep = np.zeros_like(y)
        window = slice(k // 2, k // 2 + size)
        keep[:, window, window] = y[:, window, window]
        value = float(np.linalg.norm(keep))
        back = np.einsum("oiab,oab->iab", symbol.conj(), np.fft.rfft2(keep, (torus, torus)))
        x = np.fft.irfft2(back, (torus, torus))[:, :size, :size]
    return value


def reshaped() -> None:
    """Convolutions whose reshaped kernel has norm exactly 1, and what they do to images."""
    rng = np.random.default_rng(0)
    kernels = {
        "random 3 x 3, 16 channels": rng.standard_normal((16, 16, 3, 3)),
        "blur: constant 3 x 3": np.ones((1, 1, 3, 3)),
    }
    sizes = [2, 3, 4, 6, 8, 12, 16, 24, 32]
    _, ax = plt.subplots()
    for (name, kernel), colour in zip(kernels.items(), (BLUE, ORANGE), strict=True):
        unit = kernel / np.linalg.norm(kernel.reshape(kernel.shape[0], -1), 2)
        ax.plot(sizes, [convolution_norm(unit, n) for n in sizes], "o-", color=colour, label=name)
    ax.axhline(1, color=GREEN, ls="--", label="norm of the reshaped kernel: what is divided by")
    ax.axhline(3, color=INK, ls=":", lw=1)
    ax.annotate("√9: no 3 x 3 kernel goes beyond", (32, 3), (32, 3.04), ha="right", fontsize=9)
    finish(ax, "image height and width", "norm of the convolution", (0.8, 3.3))
    ax.legend(frameon=False, loc="center right", fontsize=9)
    save("reshaped", 7, 3.4)


def power() -> None:
    """Power iteration on a Gaussian matrix: always below, for long by a visible amount."""
    rng = np.random.default_rng(0)
    _, ax = plt.subplots()
    for size, colour in ((64, ORANGE), (1024, BLUE)):
        w = rng.standard_normal((size, size))
        true = float(np.linalg.norm(w, 2))
        x = rng.standard_normal(size)
        remaining = []
        for _ in range(100):
            x /= np.linalg.norm(x)
            y = w @ x
            remaining.append(true / np.linalg.norm(y) - 1)
            x = w.T @ y
        ax.plot(range(1, 101), remaining, color=colour, label=f"Gaussian {size} x {size}")
    ax.set_yscale("log")
    finish(ax, "power iterations", "norm left after dividing, minus 1", (1e-6, 1))
    ax.legend(frameon=False, fontsize=9)
    save("power", 7, 3)


def finish(ax: Axes, x_label: str, y_label: str, y_range: tuple[float, float]) -> None:
    """Labels the axes."""
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.set_ylim(*y_range)


if __name__ == "__main__":
    with plt.rc_context(STYLE):
        gain()
        reshaped()
        power()
