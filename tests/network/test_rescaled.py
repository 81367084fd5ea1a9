"""The rescaled product: a bound in whatever units, the naive one at worst, and a certificate that holds no others."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import opnorm
from network.networks import DENSE, IMAGES, Net
from opnorm.certificate.network.check import verify_network
from opnorm.certificate.network.file import NetworkCertificate
from opnorm.certificate.network.maps import LinearMap, Matrix, Weights
from opnorm.certificate.network.program import Input, Linear, Program, Sum
from opnorm.certificate.network.rescaled import rescaled
from opnorm.errors import CertificateError
from opnorm.graph import export
from opnorm.network.multipliers.classes import by_channel, classes
from opnorm.network.naive import naive
from opnorm.network.rules import program_of

ROUNDING = 1 - 1e-9


def traced(model: nn.Module, shape: tuple[int, ...]) -> tuple[Program, Weights]:
    graph = export(model, torch.randn(2, *shape))
    return program_of(graph), {**graph.weights}


def drawn(program: Program, spread: float = 2.0) -> list[Tensor]:
    """Random units for every class of steps that may have some."""
    generator = torch.Generator().manual_seed(1)
    homes = classes(program)
    units = {
        h: torch.exp(spread * torch.randn(program.steps[h].shape[0], generator=generator, dtype=torch.float64))
        for h in dict.fromkeys(homes)
        if h is not None
    }
    return [torch.ones((), dtype=torch.float64) if h is None else units[h] for h in homes]


def steepest(net: Net) -> float:
    """The largest norm of the Jacobian at a few points."""
    twin = net.build().double()
    xs = torch.randn(2, *net.shape, dtype=torch.float64)
    jacobians = (torch.autograd.functional.jacobian(lambda v: twin(v[None])[0].reshape(-1), x) for x in xs)
    return max(float(torch.linalg.matrix_norm(j.reshape(-1, xs[0].numel()), 2)) for j in jacobians) * ROUNDING


RESCALED = (
    "mlp", "badly scaled", "near rank one", "residual", "maxmin", "dense block", "subtract", "cnn", "conv after conv",
    "leaky", "stride", "resnet", "leaky resnet", "shortcut pooled", "avg pool", "max pool", "groups", "circular",
    "preactivation", "flatten", "concat", "transposed", "3d", "layer norm",
)  # fmt: skip
PICKED = [n for n in DENSE + IMAGES if n.name in RESCALED]


@pytest.mark.parametrize("net", PICKED, ids=lambda n: n.name)
def test_any_units_give_a_bound(net: Net) -> None:
    program, weights = traced(net.build(), net.shape)
    total = naive(rescaled(program, weights, drawn(program)), weights).total
    assert steepest(net) <= total


@pytest.mark.parametrize("net", PICKED, ids=lambda n: n.name)
def test_every_map_is_that_of_its_units(net: Net) -> None:
    program, weights = traced(net.build(), net.shape)
    frames = drawn(program)
    framed = rescaled(program, weights, frames)
    for position, (old, new) in enumerate(zip(program.steps, framed.steps, strict=True)):
        if isinstance(old, Linear) and isinstance(new, Linear) and max(old.size, _inputs(old.map)) <= 1500:
            source = program.steps[old.sources[0]]
            after, before = _each(frames[position], old.shape), _each(frames[old.sources[0]], source.shape)
            truth = after[:, None] * _dense(old.map, {**weights, **program.constants}) / before
            found = _dense(new.map, {**weights, **framed.constants})
            if by_channel(old.map) or frames[position].numel() == frames[old.sources[0]].numel() == 1:
                assert _norm(truth) <= _norm(found) * (1 + 1e-9)
            else:
                torch.testing.assert_close(found, truth, rtol=1e-12, atol=0)


def test_the_terms_of_a_sum_may_have_other_units() -> None:
    torch.manual_seed(0)
    weights = {name: torch.randn(4, 4, dtype=torch.float64) for name in "abc"}
    maps = [Matrix((4,), (4,), name) for name in "abc"]
    steps = (
        Input((), (4,), "x"),
        *(Linear((0,), (4,), name, maps[i]) for i, name in enumerate("ab")),
        Sum((1, 2), (4,), "sum", (1.0, -2.0)),
        Linear((3,), (4,), "c", maps[2]),
    )
    program, one = Program(steps, (4,)), torch.ones((), dtype=torch.float64)
    truth = _norm(weights["c"] @ (weights["a"] - 2 * weights["b"]))
    for _ in range(20):
        frames = [one, *(torch.exp(torch.randn(4, dtype=torch.float64)) for _ in range(3)), one]
        framed = naive(rescaled(program, weights, frames), weights)
        assert truth <= framed.total
        a, b, c = frames[1][:, None] * weights["a"], frames[2][:, None] * weights["b"], weights["c"]
        joined = _norm(a) * float((frames[3] / frames[1]).max()) + 2 * _norm(b) * float((frames[3] / frames[2]).max())
        assert framed.total == pytest.approx(_norm(c / frames[3]) * joined, rel=2e-3)


def _inputs(linear: LinearMap) -> int:
    return int(torch.tensor(linear.in_shape).prod())


def _each(frame: Tensor, shape: tuple[int, ...]) -> Tensor:
    size = int(torch.tensor(shape).prod())
    return frame.reshape(-1).repeat_interleave(size // frame.numel())


def _dense(linear: LinearMap, weights: Weights) -> Tensor:
    columns = torch.eye(_inputs(linear), dtype=torch.float64).reshape(-1, *linear.in_shape)
    return linear.apply(columns, weights).flatten(1).mT


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def chain(sizes: list[int], spread: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight)
    for first, second in pairwise(layers):
        units = torch.exp(spread * torch.randn(first.out_features))
        first.weight.data *= units[:, None]
        second.weight.data /= units
    return nn.Sequential(*[m for layer in layers[:-1] for m in (layer, nn.ReLU())], layers[-1]).eval()


def images(width: int = 12, depth: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth):
        conv = nn.Conv2d(width if i else 3, width, 3, 2 if i == 2 else 1, 1)
        nn.init.kaiming_normal_(conv.weight)
        layers += [conv, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)).eval()


def pooled() -> nn.Sequential:
    """Units that max pooling carries on."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
    units = torch.exp(torch.randn(8))
    first.weight.data *= units[:, None, None, None]
    second.weight.data /= units[:, None, None]
    return nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(3, 2, 1), second, nn.ReLU()).eval()


GAINS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "random": (lambda: chain([24, 64, 64, 64, 64, 64, 10]), (24,), 1.4),
    "badly scaled": (lambda: chain([16, 32, 32, 32, 32, 4], 1.5), (16,), 1e6),
    "convolutions": (images, (3, 12, 12), 1.15),
    "max pooling": (pooled, (3, 12, 12), 1.5),
}


@pytest.mark.parametrize("name", GAINS)
def test_it_gains_on_the_product_and_its_certificate_holds(name: str, tmp_path: Path) -> None:
    make, shape, gain = GAINS[name]
    model = make()
    bound = opnorm.lipschitz(model, torch.randn(4, *shape), method="rescaled")
    assert bound.method == "rescaled product" and bound.guarantee == "proved"
    assert bound.lower <= bound.upper < bound.product / gain
    bound.certificate().save(tmp_path / "net.cert")
    again = NetworkCertificate.load(tmp_path / "net.cert")
    verified = verify_network(again, model)
    assert again.calculus == "rescaled"
    assert bound.upper * ROUNDING <= verified.proved <= verified.upper <= bound.upper * (1 + 1e-6)


def test_few_channels_and_single_points() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 1, 2), nn.ReLU())
    bound = opnorm.lipschitz(
        nn.Sequential(*layers, nn.Conv2d(1, 2, 1)).eval(), torch.randn(2, 2, 3, 3), method="rescaled"
    )
    assert 0 < bound.lower <= bound.upper < bound.product


def test_where_no_units_are_free_the_naive_bound_stays() -> None:
    bound = opnorm.lipschitz(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.randn(2, 4), method="rescaled")
    assert bound.method == "naive" and bound.upper == bound.product


def test_what_does_not_fit_the_calculus_is_rescaled() -> None:
    model = chain([16, 32, 32, 4])
    x = torch.randn(2, 16)
    spent = opnorm.lipschitz(model, x, time_budget=1e-6)
    assert spent.method == "naive" and any("rescaled product" in r for r in spent.remarks)


Change = Callable[[NetworkCertificate], NetworkCertificate]


def _framed(position: int, change: Callable[[Tensor], Tensor]) -> Change:
    def changed(certificate: NetworkCertificate) -> NetworkCertificate:
        frames = list(certificate.multipliers)
        frames[position] = change(frames[position])
        return replace(certificate, multipliers=tuple(frames))

    return changed


HOSTILE: dict[str, tuple[Change, str]] = {
    "a frame too few": (lambda c: replace(c, multipliers=c.multipliers[:-1]), "frames are stated for"),
    "a negative unit": (_framed(1, lambda f: -f), "not positive"),
    "a unit of zero": (_framed(1, lambda f: f * 0), "not positive"),
    "no number": (_framed(1, lambda f: f * torch.nan), "not positive"),
    "an input in other units": (_framed(0, lambda f: f * 2), "must be 1"),
    "an output in other units": (_framed(-1, lambda f: f / 2), "must be 1"),
    "too many channels": (_framed(1, lambda f: torch.cat([f, f])), "for its channels"),
    "an activation that changes units": (_framed(2, lambda f: f / 2), "keeps the frame"),
    "a smaller claim": (lambda c: replace(c, upper=c.upper / 1.01), "only"),
    "a smaller norm": (lambda c: replace(c, norms={r: n / 1.01 for r, n in c.norms.items()}), "could not prove"),
    "without norms": (lambda c: replace(c, norms={}), "no norm is stated"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_certificate_is_refused(name: str) -> None:
    change, words = HOSTILE[name]
    model = chain([6, 8, 8, 3], 1.0)
    good = opnorm.lipschitz(model, torch.randn(2, 6), method="rescaled").certificate()
    verify_network(good, model)
    with pytest.raises(CertificateError, match=words):
        verify_network(change(good), model)
