"""Certified accuracy on the digits from one network's bounds: what each step of the calculus adds, up to an attack.

    python benchmarks/certified_accuracy.py [--radii 0.1 0.25 0.5] [--local 60]

Eight layers of norm 1, trained that way and stored as plain weights. A test image is certified at r where its margin
over every other class exceeds r times the bound of that difference of logits. Bounds are for exact arithmetic.
"""

import argparse
import time

import network_builders as build
import torch
from environment import write
from torch import Tensor, nn

import opnorm
from opnorm.data import digits
from opnorm.network import Ball


def radii_of(logits: Tensor, labels: Tensor, pairwise: Tensor) -> Tensor:
    """The certified radius of each image: the least margin over its bound; 0 or less where the label is wrong."""
    margins = logits.gather(1, labels[:, None]) - logits
    ratio = margins / pairwise[labels]
    ratio.scatter_(1, labels[:, None], float("inf"))
    return ratio.amin(1)


def attacked(model: nn.Module, images: Tensor, labels: Tensor, radius: float, steps: int = 100) -> Tensor:
    """Which images projected gradient ascent does not break, from the image and from random points of the ball."""
    standing = torch.ones(len(images), dtype=torch.bool)
    for restart in range(4):
        offset = torch.randn_like(images) * (restart > 0)
        offset = offset / offset.norm(dim=1, keepdim=True).clamp_min(1e-12) * radius
        for _ in range(steps):
            offset.requires_grad_()
            logits = model(images + offset)
            best = logits.scatter(1, labels[:, None], -float("inf")).amax(1) - logits.gather(1, labels[:, None])[:, 0]
            (slope,) = torch.autograd.grad(best.sum(), offset)
            with torch.no_grad():
                offset = offset + slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12) * radius / 10
                offset = offset / (offset.norm(dim=1, keepdim=True) / radius).clamp_min(1.0)
        with torch.no_grad():
            standing &= model(images + offset).argmax(1) == labels
    return standing


def local(model: nn.Module, images: Tensor, logits: Tensor, labels: Tensor, radius: float, certified: Tensor) -> Tensor:
    """Certificates from a bound on the ball, for the images that the global bounds left open."""
    found = certified.clone()
    for i in torch.nonzero(~certified & (logits.argmax(1) == labels)).flatten().tolist():
        bound = opnorm.lipschitz(model, images[i : i + 1], region=Ball(images[i], radius), time_budget=2.0)
        if bound.pairwise is not None:
            found[i] = radii_of(logits[i : i + 1], labels[i : i + 1], bound.pairwise)[0] > radius
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--radii", type=float, nargs="+", default=[0.1, 0.25, 0.5])
    parser.add_argument("--local", type=int, default=60, help="how many test images to bound locally")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds for the searches of all pairs")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = build.unit_norms()
    images, labels = build.images("test"), digits().test_labels
    with torch.no_grad():
        logits = model.double()(images.double())
    model.float()
    started = time.process_time()
    joint = opnorm.lipschitz(model, images[:64])
    each = opnorm.lipschitz(model, images[:64], pairs="each", time_budget=arguments.budget)
    assert joint.pairwise is not None and each.pairwise is not None
    last = torch.cdist(model[-1].weight.double(), model[-1].weight.double()).detach()
    bounds = {
        "sqrt 2 x product": torch.full_like(last, 2**0.5 * joint.product),
        "pairwise last layer": last * joint.product,
        "one covariance, all pairs": joint.pairwise,
        "each pair's own search": each.pairwise,
    }
    rows: dict[str, list[float]] = {name: [] for name in bounds}
    rows |= {"with local bounds": [], "of the first images, without local": [], "attack (upper)": []}
    for radius in arguments.radii:
        for name, pairwise in bounds.items():
            rows[name].append(percent(radii_of(logits, labels, pairwise) > radius))
        few = slice(0, arguments.local)
        certified = radii_of(logits, labels, each.pairwise)[few] > radius
        rows["of the first images, without local"].append(percent(certified))
        rows["with local bounds"].append(
            percent(local(model, images[few], logits[few], labels[few], radius, certified))
        )
        rows["attack (upper)"].append(percent(attacked(model, images, labels, radius)))
    for name, values in rows.items():
        print(f"{name:36} " + "  ".join(f"{v:5.1f}" for v in values), flush=True)
    write(
        "certified_accuracy",
        {
            "radii": arguments.radii,
            "percent certified": rows,
            "clean": percent(logits.argmax(1) == labels),
            "images": len(images),
            "images bounded locally": arguments.local,
            "lower, upper, product": [joint.lower, joint.upper, joint.product],
            "remarks": each.remarks,
            "cpu seconds": time.process_time() - started,
        },
    )


def percent(mask: Tensor) -> float:
    return 100 * float(mask.double().mean())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
