"""Training and evaluation time of a step: plain, torch's two spectral norms, opnorm's.

    python benchmarks/overhead.py            # prints a table, writes results/overhead.json; 40 minutes

A step is forward, backward and Adam; a discriminator's in a GAN has two forwards, of real and of fake images, for one
value of the weights. All variants take turns within one run, in a new order each time, on one thread unless --threads
says otherwise, so that a busy machine slows all of them: with whole steps of a matrix network, and with the layers of a
discriminator, whose step takes a second. Memory that was taken once is kept: handing it back and taking it again costs
up to 50 ms of a step, now of one network and now of another.

Every fourth step of opnorm does more, of a convolution every eighth. So rounds come in groups of eight: of each place
in a group the median of the time over the plain one's in the same round is taken, and the figure is the mean over the
places. opnorm makes more iterations for the first hundred values of a weight; a row of its own shows the first eight,
the other rows of opnorm what follows after the hundred.

deel-torchlip and orthogonium stand beside where they are installed, at the first batch size. They and adaptive take
part in the first build only, and in one step where that takes ten times the plain one's; torch's hook, the reshaped
norm and the first values in the first group of each build.

Two equal networks differ by a few percent by where their tensors lie in memory, as a second plain network shows. So the
plain time is the mean of two networks, and for training all are built six times, in a new order; in evaluation the
plain ones hold the very tensors that opnorm hands out. The error of a figure is the standard error of the builds'.
"""

import argparse
import ctypes
import importlib.util
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from environment import RESULTS, environment, write
from torch import Tensor, nn

import opnorm

FIRST_VALUES = 100
GROUP = 8
BUILDS = 6
BATCH = 64
SLOW = 10
YOUNG = "opnorm, first 8 values"
AGAIN = "plain, again"
OVER = object()

Step = Callable[[], Iterator[None]]
"""What begins a step; it goes on from one turn to the next."""


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
    AGAIN: lambda layer: layer,
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


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Iterator[None]:
    """Forward, backward, Adam, at once."""
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    yield


def train_step_by_layer(model: nn.Sequential, optimizer: torch.optim.Optimizer, x: Tensor) -> Iterator[None]:
    """Forward of each batch, backward and Adam; others take their turn after each layer."""
    optimizer.zero_grad()
    done = []
    for part in forwards(x):
        out = part
        for layer in model:
            met = out.detach().requires_grad_(out is not part)
            out = layer(met)
            done.append((met, out))
            yield
    gradient = None
    while done:
        met, out = done.pop()
        out.backward(2 * out.detach() / out.numel() if gradient is None else gradient)  # of the mean square
        gradient = met.grad
        del met, out
        yield
    optimizer.step()
    yield


def forwards(x: Tensor) -> Sequence[Tensor]:
    """The batches of one step: of images, real and fake ones where there are two batches."""
    return x.split(BATCH) if x.ndim == 4 else (x,)


def once(model: nn.Module, x: Tensor) -> Iterator[None]:
    """A forward."""
    model(x)
    yield


def in_turns(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Seconds of every step, the fastest of a few calls; they take turns after each of their parts."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(repeats):
        running = {name: step() for name, step in steps.items()}
        seconds = dict.fromkeys(steps, 0.0)
        while running:
            for name in random.sample(list(running), len(running)):
                begin = time.perf_counter()
                over = next(running[name], OVER) is OVER
                seconds[name] += time.perf_counter() - begin
                if over:
                    del running[name]
        best = {name: min(best[name], taken) for name, taken in seconds.items()}
    return best


def training(build: Callable[..., nn.Module], x: Tensor) -> dict[str, Step]:
    """A training step of every variant."""
    steps: dict[str, Step] = {}
    variants = {**VARIANTS, **(others() if len(x) in {32, BATCH} else {})}
    for name, wrap in random.sample(list(variants.items()), len(variants)):
        model = build(wrap).train()
        if name in {"opnorm", "opnorm reshaped"}:
            for _ in range(FIRST_VALUES + 1):
                opnorm.update(model)
        optimizer = torch.optim.Adam(model.parameters(), 2e-4)
        steps[name] = partial(train_step_by_layer if x.ndim == 4 else train_step, model, optimizer, x)
    return {name: steps[name] for name in variants}


def evaluation(build: Callable[..., nn.Module], x: Tensor) -> dict[str, Step]:
    """A forward of every variant."""
    left_out = {"plain", AGAIN, YOUNG, "opnorm reshaped", "opnorm adaptive"}  # the same weight in another way
    variants = {name: wrap for name, wrap in VARIANTS.items() if name not in left_out}
    models = {name: build(wrap).eval().requires_grad_(False) for name, wrap in variants.items()}
    plain = {name: on_the_same_memory(models["opnorm"]) for name in ("plain", AGAIN)}
    models = {**plain, **models, "opnorm, folded": opnorm.fold(models["opnorm"])}
    return {name: partial(once, model, x) for name, model in models.items()}


def on_the_same_memory(model: nn.Sequential) -> nn.Module:
    """The folded copy, with the very tensors that the layers hand out in evaluation."""
    plain = opnorm.fold(model)
    for layer, normalised in zip(plain, model, strict=True):
        if hasattr(layer, "weight"):
            chain = normalised.parametrizations.weight
            layer.weight = nn.Parameter(chain[0].deployed(chain.original), requires_grad=False)
            layer.bias = normalised.bias
    return plain


def compare(steps: dict[str, Step], rounds: int, repeats: int, few: set[str]) -> dict[str, list[float]]:
    """Seconds of every variant in each round; of `few`, in those of the first group."""
    first = in_turns(steps, 1)  # proofs, caches and lazy initialisation
    again = {name: step for name, step in steps.items() if first[name] < SLOW * first["plain"] or "opnorm" in name}
    in_turns(again, 1)
    found: dict[str, list[float]] = {name: [] if name in again else [first[name]] for name in steps}
    for done in range(rounds):
        turns = {name: step for name, step in again.items() if done < GROUP or name not in few}
        for name, seconds in in_turns(turns, repeats).items():
            found[name].append(seconds)
    return found


def table(builds: list[dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Every variant's time relative to the mean of the plain ones' in the same rounds, and the error of that."""
    rows = {}
    for name in builds[0]:
        taken = [found[name] for found in builds if name in found]
        ratios = [
            [2 * x / (p + q) - 1 for x, p, q in zip(found[name], found["plain"], found[AGAIN], strict=False)]
            for found in builds
            if name in found
        ]
        rows[name] = {"seconds": typical(taken), "overhead": typical(ratios)}
        if len(ratios) > 1:
            rows[name]["error"] = statistics.stdev(typical([one]) for one in ratios) / len(ratios) ** 0.5
    return rows


def typical(builds: list[list[float]]) -> float:
    """The mean over the places in a group of the median at each."""
    places = [[x for found in builds for x in found[place::GROUP]] for place in range(GROUP)]
    return statistics.fmean(statistics.median(found) for found in places if found)


def keep_memory() -> None:
    """Ask the C library, where it is GNU's, to take all memory from one place and to give none back."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-4, 0)  # M_MMAP_MAX


def main() -> None:
    """Time everything, print a table, write the results with the environment beside them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=16, help="for each build: a multiple of eight")
    parser.add_argument(
        "--only", default="", help="a case's name, or a part of several; the stored figures of others stay"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_memory()
    half = partial(discriminator, width=32)
    cases = {
        **{f"mlp 6 x 1024, batch {n}": (mlp, (n, 1024), training, 1, 1) for n in (32, 128)},
        "mlp 6 x 1024, batch 512": (mlp, (512, 1024), training, 1, 1),
        "SN-GAN discriminator, batch 64": (discriminator, (BATCH, 3, 32, 32), training, 1, 2),
        "SN-GAN discriminator, real and fake of 64": (discriminator, (2 * BATCH, 3, 32, 32), training, 1, 1),
        "mlp 6 x 1024, batch 32, eval": (mlp, (32, 1024), evaluation, 2, 18),
        "SN-GAN discriminator, batch 8, eval": (discriminator, (8, 3, 32, 32), evaluation, 3, 3),
    }
    if arguments.only:
        cases |= {f"SN-GAN discriminator, batch {n}": (discriminator, (n, 3, 32, 32), training, 1, 1) for n in (1, 8)}
        cases["SN-GAN discriminator at half width, batch 64"] = (half, (64, 3, 32, 32), training, 1, 1)
    missing = sorted(set(OTHERS) - set(others()))
    stored = json.loads((RESULTS / "overhead.json").read_text())["results"] if arguments.only else {}
    report: dict[str, object] = {**stored, "not installed": missing}
    print(f"not installed: {', '.join(missing) or 'none'}")
    chosen = [arguments.only] if arguments.only in cases else [title for title in cases if arguments.only in title]
    for title in chosen:
        build, shape, steps, repeats, times = cases[title]
        begin = time.perf_counter()
        x, builds, few = torch.randn(shape), [], {*OTHERS, "opnorm adaptive"}
        seldom = few if steps is evaluation else {*few, "torch hook", YOUNG, "opnorm reshaped"}
        for done in range(BUILDS // len(forwards(x)) if steps is training else 1):
            made = {name: step for name, step in steps(build, x).items() if done == 0 or name not in few}
            builds.append(compare(made, times * arguments.rounds, repeats, seldom))
        found = table(builds)
        report[title] = {"measured": environment(), **found}
        print(f"{title}    ({time.perf_counter() - begin:.0f} s)", flush=True)
        for name, row in found.items():
            error = f"+/- {row['error']:.1%}" if "error" in row else ""
            print(f"    {name:24s} {row['seconds'] * 1e3:9.2f} ms  {row['overhead']:+8.1%}  {error}")
    write("overhead", report)


if __name__ == "__main__":
    main()
