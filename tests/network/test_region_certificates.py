"""Certificates on a region: they hold, their intervals hold what the network computes, and no false one passes."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import opnorm
from network.networks import DENSE, IMAGES, Lambda, Net, mlp, residual
from network.refused import assert_refused
from opnorm.certificate.network.file import NetworkCertificate, _fingerprint
from opnorm.certificate.network.images import ROUGH, image_of
from opnorm.certificate.network.local import localised
from opnorm.certificate.network.program import Elementwise, Input, Linear, Opaque, Program, Shift
from opnorm.certificate.network.region import around
from opnorm.certificate.network.regional import Regional
from opnorm.certificate.network.values import input_values, normalised_values
from opnorm.errors import CertificateError, CertificateFormatError
from opnorm.graph import export
from opnorm.graph.export import two_samples
from opnorm.network import Ball, Box, NormBall
from opnorm.network.lower import Function
from opnorm.network.rules import program_of

Region = Ball | Box | NormBall
Change = Callable[[NetworkCertificate], NetworkCertificate]


def shaken(model: nn.Module) -> nn.Module:
    """With statistics and biases that a fresh model has as zeros."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
            nn.init.normal_(module.bias)
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
    return model.double().eval()


def tokens(x: Tensor, a: nn.Module, n: nn.Module) -> Tensor:
    place = torch.linspace(-1, 1, 6, dtype=x.dtype).reshape(2, 3)
    return torch.relu(n(a(x + place) - 0.25)).flatten(1)


def gated(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    return a(x) * torch.sigmoid(b(x)) + 0.1 * a(x) ** 2 - 0.1 * torch.exp(b(x))


def joined(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
    token = b.bias[None, :2].expand(x.shape[0], -1)
    return torch.tanh(b(torch.cat([torch.tanh(a(x)), token], 1)))


OWN = [
    Net("tanh", lambda: mlp(5, 8, 8, 3, act=nn.Tanh), (5,)),
    Net("deep residual", lambda: Lambda(residual, *(nn.Linear(6, 6) for _ in range(8)), nn.Linear(6, 3)), (6,)),
    Net("tokens", lambda: Lambda(tokens, nn.Linear(3, 4), nn.LayerNorm(4, eps=0.1)), (2, 3)),
    Net("gated", lambda: Lambda(gated, nn.Linear(5, 4), nn.Linear(5, 4)), (5,)),
    Net("class token", lambda: Lambda(joined, nn.Linear(4, 4), nn.Linear(6, 3)), (4,)),
    Net("gru", lambda: Lambda(lambda x, m: m(x)[0][:, -1], nn.GRU(2, 2, batch_first=True)), (2, 2)),
]
NETS = {n.name: n for n in DENSE + IMAGES} | {n.name: n for n in OWN}
CERTIFIED = [
    *(n.name for n in OWN), "mlp", "concat", "layer norm", "rms norm", "activation 2", "activation 3", "activation 12",
    "cnn", "conv after conv", "leaky resnet", "resnet", "padding layers", "pre-activation", "group norm", "max pool",
]  # fmt: skip


def regions(shape: tuple[int, ...]) -> list[Region]:
    torch.manual_seed(3)
    center = torch.randn(shape)
    return [Ball(center, 0.1), Box(center - 0.01, center + 0.03), NormBall(0.3)]


def points(region: Region, shape: tuple[int, ...], count: int) -> Tensor:
    """Points of a region, half of them at its corners or on its sphere."""
    where = around(region, shape)
    directions = torch.randn(count, len(where.center), dtype=torch.float64)
    directions[::2] = 9 * directions[::2].sign()
    return where.clip(where.center + directions * where.spread)


def steepest(model: nn.Module, region: Region, shape: tuple[int, ...], count: int) -> float:
    """The largest norm of the Jacobian that was met in a region."""
    batch = points(region, shape, count).reshape(-1, *shape)
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda x: model(x[None])[0].reshape(-1), x) for x in batch]
    )
    return float(torch.linalg.matrix_norm(jacobians.reshape(count, jacobians.shape[1], -1), 2).max())


@pytest.mark.parametrize(("name", "number"), [(name, i % 3) for i, name in enumerate(CERTIFIED)])
def test_it_holds_and_is_as_good_as_the_bound(name: str, number: int, tmp_path: Path) -> None:
    net = NETS[name]
    model, region = shaken(net.build()), regions(net.shape)[number]
    example = torch.zeros(1, *net.shape, dtype=torch.float64)
    bound = opnorm.lipschitz(model, example, region=region, method="fast", time_budget=0.3)
    bound.certificate().save(tmp_path / "net.cert")
    found = opnorm.verify(tmp_path / "net.cert", model)
    assert steepest(model, region, net.shape, 12) <= found.upper * (1 + 1e-9)
    # What pooling and stored tokens give is not followed: what comes after them has the slopes of all inputs.
    assert bound.lower <= found.upper <= bound.upper * (1.3 if name in ("max pool", "class token") else 1.05)


VALUED = [n.name for n in DENSE + IMAGES + OWN]


@pytest.mark.parametrize("name", VALUED)
def test_no_value_leaves_its_interval(name: str) -> None:
    """Against the network's own evaluation: at the centre, and at points of the region."""
    net = NETS[name]
    model = shaken(net.build())
    example = torch.randn(2, *net.shape, dtype=torch.float64)
    graph = export(model, example)
    program = program_of(graph, split=False, shifts=True)
    function = Function(graph, two_samples(example))
    last = {origin: position for position, origin in enumerate(program.origins)}
    for region in (Ball(example[0], 1.0), Box(example[0] - 0.1, example[0] + 0.3)):
        derived = localised(program, graph.weights, region, constants=lambda *_: None, norm=lambda *_: math.inf)
        center = function.values(around(region, net.shape).center.expand(2, -1))
        for pair in points(region, net.shape, 6).split(2):
            values = function.values(pair)
            for origin, position in last.items():
                node, known = graph[origin], derived.values[position]
                each = node.samples(values[origin]).reshape(2, -1)
                middle = node.samples(center[origin])[0].reshape(-1)
                rough = 1e-12 * (1 + each.abs())
                assert bool((known.low - rough <= each).all() and (each <= known.high + rough).all()), origin
                assert bool(((middle - known.at).abs() <= known.doubt + rough[0]).all()), origin
                assert float((each - middle).norm(dim=1).max()) <= known.total * (1 + 1e-9) + 1e-11, origin


EXACT: dict[str, Callable[[Any], Any]] = {
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "softsign": lambda x: x / (1 + abs(x)),
    "selu": lambda x: mpmath.mpf("1.0507009873554804934193349852946") * (
        x if x > 0 else mpmath.mpf("1.6732632423543772848170429916717") * mpmath.expm1(x)
    ),
    "atan": mpmath.atan,
    "erf": mpmath.erf,
    "log_sigmoid": lambda x: -mpmath.log1p(mpmath.exp(-x)),
    "tanhshrink": lambda x: x - mpmath.tanh(x),
    "hardsigmoid": lambda x: min(max(x + 3, 0), 6) / 6,
    "hardswish": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "gelu": lambda x: x * mpmath.ncdf(x),
    "gelu_tanh": lambda x: x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf(0.044715) * x**3))),
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "mish": lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))),
    "relu": lambda x: max(x, 0),
    "relu6": lambda x: min(max(x, 0), 6),
    "abs": abs,
}  # fmt: skip


@pytest.mark.parametrize("kind", EXACT)
def test_images_against_mpmath(kind: str) -> None:
    flat = torch.zeros((), dtype=torch.float64)
    image = image_of(Elementwise((0,), (1,), "", flat, flat, kind), {})
    assert image is not None
    x = torch.cat(
        [torch.linspace(-12, 12, 97), torch.tensor([-0.7518, -1.2785, -1.1925, -1.5, -60.0, 60.0, 1e-8])]
    ).double()
    with mpmath.workdps(30):
        exact = [EXACT[kind](mpmath.mpf(v)) for v in x.tolist()]
        value, error = image.at(x)
        for found, off, truth in zip(value.tolist(), error.tolist(), exact, strict=True):
            assert abs(found - truth) <= off <= ROUGH * (1 + abs(found))
        order = x.argsort()
        for width in (1, 7, 30):
            low, high = image.of(x[order][:-width], x[order][width:])
            for start, (least, most) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
                inside = [exact[i] for i in order[start : start + width + 1].tolist()]
                assert least <= min(inside)
                assert max(inside) <= most


@pytest.mark.parametrize("offset", [0.0, 1e9])
def test_normalisation_against_mpmath(offset: float) -> None:
    """Tight where the variance hardly changes: the Jacobian has norm 1 / sqrt(var + eps). At 1e9 digits are lost."""
    center, radius, eps = torch.tensor([0.1, -1.3, 2.7, 0.77], dtype=torch.float64) + offset, 1e-6, 0.01
    step = Opaque((0,), (4,), "norm", 10.0, "", "normalize", (4.0, eps, 1.0))
    constant, values = normalised_values(step, input_values(around(Ball(center, radius), (4,))))
    with mpmath.workdps(40):
        exact = [mpmath.mpf(v) for v in center.tolist()]
        mean = mpmath.fsum(exact) / 4
        deviation = mpmath.sqrt(mpmath.fsum((v - mean) ** 2 for v in exact) / 4 + mpmath.mpf(eps))
        truth = [(v - mean) / deviation for v in exact]
        off = [abs(found - true) for found, true in zip(values.at.tolist(), truth, strict=True)]
        assert all(o <= d for o, d in zip(off, values.doubt.tolist(), strict=True))
        assert 1 / deviation <= constant <= (1 + 1e-4) / deviation
        assert radius / deviation <= values.total * (1 + 1e-9)


# ------------------------------------------------------------------ nothing false


CENTER = torch.tensor([0.3, -0.2, 0.5, 0.1, -0.4, 0.6])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3))


def certified(region: Region | None = None) -> NetworkCertificate:
    where = Ball(CENTER, 0.2) if region is None else region
    found = opnorm.lipschitz(model(), CENTER[None], region=where, method="afp", time_budget=0.5).certificate()
    assert found.on is not None
    return found


def on(**changed: Any) -> Change:
    def change(c: NetworkCertificate) -> NetworkCertificate:
        assert c.on is not None
        return dataclasses.replace(c, on=dataclasses.replace(c.on, **changed))

    return change


def slopes(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Change:
    def changed(c: NetworkCertificate) -> NetworkCertificate:
        assert c.on is not None
        return on(slopes={i: change(low.clone(), high.clone()) for i, (low, high) in c.on.slopes.items()})(c)

    return changed


def lemmas(change: Callable[[dict[int, tuple[Tensor, ...]]], dict[int, tuple[Tensor, ...]]]) -> Change:
    def changed(c: NetworkCertificate) -> NetworkCertificate:
        assert c.on is not None
        return on(lemmas=change(dict(c.on.lemmas)))(c)

    return changed


def steps(c: NetworkCertificate, kind: type, **changed: Any) -> NetworkCertificate:
    """The certificate with other fields in all its steps of a kind."""
    new = tuple(dataclasses.replace(s, **changed) if isinstance(s, kind) else s for s in c.program.steps)
    return dataclasses.replace(c, program=dataclasses.replace(c.program, steps=new))


def shifts(**changed: Any) -> Change:
    return lambda c: steps(c, Shift, **changed)


def _fill(end: Tensor, value: float) -> Tensor:
    end[0] = value
    return end


FALSE: dict[str, Change] = {
    "a smaller bound": lambda c: dataclasses.replace(c, upper=c.upper * (1 - 1e-6)),
    "a larger radius": on(region=Ball(CENTER, 0.3)),
    "a radius that is a little larger": on(region=Ball(CENTER, 0.2 * (1 + 1e-5))),
    "no radius": on(region=Ball(CENTER, math.nan)),
    "an infinite radius": on(region=Ball(CENTER, math.inf)),
    "a centre that is a little off": on(region=Ball(CENTER + 1e-5, 0.2)),
    "another centre": on(region=Ball(CENTER + 0.3 * torch.eye(6)[1], 0.2)),
    "a centre of NaN": on(region=Ball(CENTER * math.nan, 0.2)),
    "a centre of another shape": on(region=Ball(CENTER[:5], 0.2)),
    "all inputs of that norm": on(region=NormBall(2.0)),
    "a box around it": on(region=Box(CENTER - 0.2, CENTER + 0.2)),
    "a box without inside": on(region=Box(CENTER + 0.2, CENTER - 0.2)),
    "slopes of zero": slopes(lambda low, high: (low * 0, high * 0)),
    "slopes that are a little narrower": slopes(lambda low, high: (low, high - 1e-9)),
    "slopes of NaN": slopes(lambda low, high: (low, _fill(high, math.nan))),
    "infinite slopes": slopes(lambda low, high: (low, _fill(high, math.inf))),
    "slopes of fewer neurons": slopes(lambda low, high: (low[1:], high[1:])),
    "slopes in another dtype": slopes(lambda low, high: (low.float(), high.float())),
    "slopes of a linear step": lambda c: on(slopes={**c.on.slopes, 1: c.on.slopes[2]})(c),  # type: ignore[union-attr]
    "slopes of no step": lambda c: on(slopes={**c.on.slopes, 77: c.on.slopes[2]})(c),  # type: ignore[union-attr]
    "no lemma": lemmas(lambda old: {}),
    "a lemma for no step": lemmas(lambda old: {**old, 77: old[4]}),
    "a lemma with multipliers that are too small": lemmas(
        lambda old: {i: tuple(s * 0.1 for s in m) for i, m in old.items()}
    ),
    "a lemma with negative multipliers": lemmas(lambda old: {i: tuple(-s for s in m) for i, m in old.items()}),
    "a lemma of another stage": lemmas(lambda old: {i: () for i in old}),
    "a norm that is too small": lambda c: dataclasses.replace(c, norms={(1,): 0.1}),
    "the rescaled product": lambda c: dataclasses.replace(c, calculus="rescaled"),
    "no multipliers": lambda c: dataclasses.replace(c, multipliers=()),
    "multipliers that are too small": lambda c: dataclasses.replace(
        c, multipliers=tuple(s * 0.1 for s in c.multipliers)
    ),
    "for all inputs": lambda c: dataclasses.replace(c, on=None),
    "a smaller bias": shifts(coefficient=0.1),
    "biases of another layer": shifts(weight="2.bias"),
    "biases of another size": shifts(after=2),
    "biases of NaN": shifts(coefficient=math.nan),
    "biases that nobody knows": shifts(weight=""),
}


def test_what_is_falsified_below_holds() -> None:
    assert opnorm.verify(certified(), model().state_dict()).where.startswith("inputs within 0.2 of the centre")


@pytest.mark.parametrize("name", FALSE)
def test_a_false_certificate_is_not_accepted(name: str, tmp_path: Path) -> None:
    net = model()
    false = FALSE[name](certified())
    with pytest.raises(CertificateError):
        opnorm.verify(false, net)
    as_float64 = name == "slopes in another dtype"  # so it is true once it is written
    assert_refused(false, net.state_dict(), tmp_path / "false.cert", written_is_false=not as_float64)


def test_a_bias_is_one_of_the_weights() -> None:
    state = model().state_dict()
    state["2.bias"] = state["2.bias"] + 1e-6
    with pytest.raises(CertificateError, match=r"'2\.bias' is not the one"):
        opnorm.verify(certified(), state)


REGIONS: dict[str, str] = {
    "no region": "null",
    "another kind": '{"kind": "torus", "radius": "0x1p-1", "lemmas": [2, 4]}',
    "a list for a kind": '{"kind": ["ball"], "radius": "0x1p-1", "lemmas": [2, 4]}',
    "no radius": '{"kind": "ball", "lemmas": [2, 4]}',
    "a radius in decimals": '{"kind": "ball", "radius": 0.5, "lemmas": [2, 4]}',
    "a negative radius": '{"kind": "ball", "radius": "-0x1p-1", "lemmas": [2, 4]}',
    "an infinite radius": '{"kind": "ball", "radius": "inf", "lemmas": [2, 4]}',
    "a field too many": '{"kind": "ball", "radius": "0x1p-1", "lemmas": [2, 4], "code": "1"}',
    "a box with the tensors of a ball": '{"kind": "box", "radius": "0x0p0", "lemmas": [2, 4]}',
    "a norm ball with a centre": '{"kind": "norm ball", "radius": "0x1p-1", "lemmas": [2, 4]}',
    "lemmas that it does not list": '{"kind": "ball", "radius": "0x1p-1", "lemmas": []}',
    "lemmas of text": '{"kind": "ball", "radius": "0x1p-1", "lemmas": ["2"]}',
    "a number that is none": '{"kind": "ball", "radius": "0x1p-1", "lemmas": 4}',
}
TENSORS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "no centre": lambda t: {n: v for n, v in t.items() if n != "region.center"},
    "a centre of integers": lambda t: {**t, "region.center": t["region.center"].long()},
    "a centre of NaN": lambda t: {**t, "region.center": t["region.center"] * math.nan},
    "half of the slopes": lambda t: {n: v for n, v in t.items() if n != "slope.2.high"},
    "another part": lambda t: {**t, "slope.2.middle": t["slope.2.low"]},
    "another number": lambda t: {**t, "slope.02.low": t["slope.2.low"], "slope.02.high": t["slope.2.high"]},
    "no number": lambda t: {**t, "slope.two.low": t["slope.2.low"], "slope.two.high": t["slope.2.high"]},
    "a lemma with a gap": lambda t: {**t, "lemma.4.7": t["lemma.4.0"]},
    "no place": lambda t: {**t, "region.other": t["region.center"]},
}


@pytest.mark.parametrize("name", [*REGIONS, *TENSORS])
def test_files_that_state_no_region(name: str, tmp_path: Path) -> None:
    certified().save(tmp_path / "net.cert")
    with safe_open(str(tmp_path / "net.cert"), framework="pt") as opened:
        metadata, tensors = dict(opened.metadata()), {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118
    del metadata["sha256"]
    metadata["region"] = REGIONS.get(name, metadata["region"])
    tensors = {n: v.contiguous().clone() for n, v in TENSORS.get(name, lambda t: t)(tensors).items()}
    save_file(tensors, tmp_path / "net.cert", metadata={**metadata, "sha256": _fingerprint(metadata, tensors)})
    with pytest.raises(CertificateFormatError):
        opnorm.verify(tmp_path / "net.cert", model().state_dict())


def test_a_flipped_byte_anywhere_is_found(tmp_path: Path) -> None:
    certified().save(tmp_path / "net.cert")
    whole = (tmp_path / "net.cert").read_bytes()
    for position in (*range(0, len(whole), 97), len(whole) - 1):
        (tmp_path / "net.cert").write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(CertificateError):
            opnorm.verify(tmp_path / "net.cert", model().state_dict())


def test_stated_sizes_take_no_memory() -> None:
    """The input is as large as its region; what is read from it need not be."""
    narrow = Input((), (1, 3, 3), "x")
    wide = opnorm.certificate.network.maps.Convolution(
        (1, 3, 3), (1, 1, 1), "k", (1, 1), (2**15,) * 2, ((2**14, 2**14 - 3),) * 2, (1, 1)
    )
    for step in (Linear((0,), (1, 1, 1), "conv", wide), Opaque((0,), (2**30,), "f", 1.0, "")):
        lie = NetworkCertificate(9.0, "naive", Program((narrow, step), (1,)), (), {}, {}, Regional(NormBall(1.0)))
        weights = {"k": torch.ones(1, 1, 1, 1)}
        hashes = {"k": opnorm.certificate.network.file.digest("k", weights["k"])} if isinstance(step, Linear) else {}
        with pytest.raises(CertificateError, match="too many"):
            opnorm.verify(dataclasses.replace(lie, digests=hashes), weights)


UNCERTIFIED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "attention": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        (3, 8),
        "self_attn: scaled_dot_product_attention has no constant for all inputs",
    ),
    "logarithm": (lambda: Lambda(lambda x: torch.relu(torch.log(x + 9))), (3,), "the slope of the logarithm"),
}


@pytest.mark.parametrize("name", UNCERTIFIED)
def test_what_has_no_certificate_is_named(name: str) -> None:
    make, shape, said = UNCERTIFIED[name]
    torch.manual_seed(0)
    center = torch.randn(shape)
    bound = opnorm.lipschitz(make().eval(), center[None], region=Ball(center, 0.1), method="fast", time_budget=0.3)
    with pytest.raises(CertificateError, match=said):
        bound.certificate()


def test_an_estimate_on_a_region_has_none() -> None:
    bound = opnorm.lipschitz(model(), CENTER[None], region=Ball(CENTER, 0.1), guarantee="estimate", method="fast")
    with pytest.raises(CertificateError, match="estimate"):
        bound.certificate()


def test_where_the_region_does_not_help_the_certificate_is_one_for_all_inputs() -> None:
    bound = opnorm.lipschitz(model(), CENTER[None], region=NormBall(1e4), method="fast", time_budget=0.3)
    found = opnorm.verify(bound.certificate(), model())
    assert (found.where, found.region) == ("", None)
