"""Large networks: parts of the frequencies give what all of them give, plans follow predicted cost, budgets hold."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, nn

import opnorm
from network.networks import IMAGES, Block, Net
from opnorm.certificate.network.check import chain_of, chains_of, verify_network
from opnorm.certificate.network.cost import dense_cost, fourier_cost
from opnorm.certificate.network.fourier_chain import coarse_frequencies, fourier_chain, fourier_walk
from opnorm.certificate.network.maps import Weights
from opnorm.certificate.network.order import hoisted
from opnorm.certificate.network.program import Elementwise, Program
from opnorm.certificate.network.proof import prove
from opnorm.certificate.network.torus import layout
from opnorm.errors import TooLargeError
from opnorm.graph import export
from opnorm.network import NormBall
from opnorm.network.covariance import bound_squared
from opnorm.network.frequencies import affordable, search_by_parts
from opnorm.network.lockstep import lockstep
from opnorm.network.lower import Function, attained
from opnorm.network.multipliers.afp import adjoint_fixed_point
from opnorm.network.multipliers.fast import closed_form, fast
from opnorm.network.multipliers.sweep import sweep
from opnorm.network.naive import naive
from opnorm.network.rules import program_of

ROUNDING = 1 - 1e-9
COVERED = ("cnn", "conv after conv", "leaky", "stride", "resnet", "leaky resnet", "shortcut pooled", "avg pool")


def traced(net: Net) -> tuple[Program, Weights]:
    graph = export(net.build(), torch.randn(2, *net.shape))
    return program_of(graph), {**graph.weights}


def steepest(net: Net) -> float:
    """The largest norm of the Jacobian at a few points."""
    twin = net.build().double()
    xs = torch.randn(6, *net.shape, dtype=torch.float64)
    jacobians = (torch.autograd.functional.jacobian(lambda v: twin(v[None])[0].reshape(-1), x) for x in xs)
    return max(float(torch.linalg.matrix_norm(j.reshape(-1, xs[0].numel()), 2)) for j in jacobians) * ROUNDING


@pytest.mark.parametrize("net", [n for n in IMAGES if n.name in COVERED], ids=lambda n: n.name)
def test_parts_of_the_frequencies_prove_what_all_of_them_prove(net: Net) -> None:
    program, weights = traced(net)
    count = len(coarse_frequencies(layout(program)))
    parts = list(torch.arange(count).tensor_split((1, 3)))
    with torch.no_grad():
        whole = fast(chain_of(program, weights, "fourier"))
        found = lockstep([fourier_walk(program, weights, part=p) for p in parts], closed_form)
    assert found.squared == pytest.approx(float(bound_squared(whole)), rel=1e-9)
    for one, other in zip(found.multipliers, whole.multipliers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=0)
    together = prove(chain_of(program, weights, "fourier"), found.multipliers).upper
    apart = prove((fourier_chain(program, weights, part=p) for p in parts), found.multipliers)
    assert apart.upper == pytest.approx(together, rel=1e-7)
    assert steepest(net) <= apart.upper


def test_a_part_that_is_left_out_is_missed() -> None:
    net = next(n for n in IMAGES if n.name == "resnet")
    program, weights = traced(net)
    with torch.no_grad():
        found = fast(chain_of(program, weights, "fourier")).multipliers
    one = prove(fourier_chain(program, weights, part=torch.tensor([1])), found).upper
    assert one < 0.9 * prove(chain_of(program, weights, "fourier"), found).upper


def deep(width: int = 3) -> nn.Module:
    blocks = [Block(width, width), Block(width, 2 * width, 2), Block(2 * width, 2 * width)]
    ends = (nn.Conv2d(3, width, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3))
    return nn.Sequential(ends[0], nn.ReLU(), *blocks, *ends[1:])


DEEP = Net("deep", deep, (3, 10, 10))


def test_the_sweep_by_parts_is_that_of_all_frequencies() -> None:
    program, weights = traced(DEEP)
    cost = replace(fourier_cost(program), each=2e8, kept=1e12)
    assert len(cost.parts()) > 2
    chain = fourier_chain(program, weights)
    with torch.no_grad():
        quick = fast(chain)
        swept = float(bound_squared(sweep(chain, quick))) ** 0.5
    assert search_by_parts(program, weights, cost, 1e-3, "adam").method == "fast"
    found = search_by_parts(program, weights, cost, 300.0, "adam")
    assert found.method == "sweep"
    assert found.estimate == pytest.approx(swept, rel=0.05)
    assert found.estimate < 0.6 * float(bound_squared(quick)) ** 0.5
    proved = prove((fourier_chain(program, weights, part=p) for p in cost.parts()), found.multipliers).upper
    assert steepest(DEEP) <= proved <= found.estimate * (1 + 1e-6)


@pytest.mark.parametrize("name", ["leaky resnet", "stride", "avg pool"])
def test_the_fixed_point_on_parts_is_that_of_all_frequencies(name: str) -> None:
    net = next(n for n in IMAGES if n.name == name)
    program, weights = traced(net)
    cost = replace(fourier_cost(program), each=3e7)
    assert len(cost.parts(6e7)) > 2
    chain = fourier_chain(program, weights)
    with torch.no_grad():
        whole = adjoint_fixed_point(chain, fast(chain))
    found = search_by_parts(program, weights, cost, 300.0, "afp")
    assert found.method == "afp"
    assert found.estimate == pytest.approx(whole.squared**0.5, rel=1e-6)
    proved = prove((fourier_chain(program, weights, part=p) for p in cost.parts()), found.multipliers).upper
    assert steepest(net) <= proved <= found.estimate * (1 + 1e-6)


def test_a_shortcut_is_taken_early_and_stages_keep_their_positions() -> None:
    program, weights = traced(DEEP)
    ordered, order = hoisted(program)
    assert sorted(order) == list(range(len(order))) != list(order)
    assert all(max(step.sources, default=-1) < i for i, step in enumerate(ordered.steps))
    assert [ordered.steps[i].label for i in range(len(order))] == [program.steps[i].label for i in order]
    for stage in fourier_chain(program, weights).choices:
        assert isinstance(program.steps[stage.step], Elementwise)


def test_what_takes_too_long_or_too_much_is_not_begun() -> None:
    program, weights = traced(DEEP)
    for calculus in ("dense", "fourier"):
        with pytest.raises(TooLargeError, match="time_budget"):
            affordable(program, weights, calculus, 30.0, "adam", target=0.0, longest=1e-9)
    wide = export(nn.Sequential(nn.Conv2d(3, 2048, 1), nn.ReLU()).eval(), torch.randn(2, 3, 64, 64))
    with pytest.raises(TooLargeError, match="GB"):
        affordable(program_of(wide), wide.weights, "fourier", 30.0, "adam", target=0.0, longest=math.inf)


def test_the_costs_grow_as_the_work_does() -> None:
    costs = [
        fourier_cost(traced(Net("deep", lambda w=w: deep(w), (3, n, n)))[0]) for w, n in ((4, 10), (8, 10), (4, 21))
    ]
    assert 6 < costs[1].search / costs[0].search < 9
    assert 3 < costs[2].search / costs[0].search < 5
    assert costs[1].proof > costs[1].search > 0
    assert dense_cost(traced(DEEP)[0]).search > 0


def test_a_spent_budget_leaves_the_naive_bound_and_says_why() -> None:
    bound = opnorm.lipschitz(DEEP.build(), torch.randn(2, *DEEP.shape), time_budget=1e-6)
    assert bound.method == "naive" and bound.guarantee == "proved"
    assert 0 < bound.lower <= bound.upper == bound.product
    assert sum("calculus" in remark and "time_budget" in remark for remark in bound.remarks) == 2


def test_the_certificate_of_a_large_network_is_verified_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DEEP.build()
    monkeypatch.setattr("opnorm.certificate.network.cost._PART_BYTES", 1.0)
    program, weights = traced(DEEP)
    assert len(list(chains_of(program, weights, "fourier"))) == len(coarse_frequencies(layout(program)))
    bound = opnorm.lipschitz(model, torch.randn(2, *DEEP.shape), method="fourier")
    assert steepest(DEEP) <= bound.upper < bound.product
    assert verify_network(bound.certificate(), model).upper == bound.certificate().upper


def arpack(layer: nn.Module, shape: tuple[int, ...]) -> float:
    layer = layer.double()
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    out, pull = torch.func.vjp(lambda x: layer(x) - layer(zero), zero)
    operator = LinearOperator(
        (out.numel(), zero.numel()),
        matvec=lambda v: (layer(torch.from_numpy(v).reshape(zero.shape)) - layer(zero)).detach().numpy().ravel(),
        rmatvec=lambda v: pull(torch.from_numpy(v).reshape(out.shape))[0].detach().numpy().ravel(),
        dtype=float,
    )
    return float(svds(operator, k=1, return_singular_vectors=False, random_state=0)[0])


CONVOLUTIONS: list[tuple[Callable[[], nn.Module], tuple[int, ...], float]] = [
    (lambda: nn.Conv2d(6, 9, 1), (6, 8, 8), 1.002),
    (lambda: nn.Conv2d(6, 9, 1, stride=2), (6, 9, 9), 1.002),
    (lambda: nn.Conv2d(6, 9, 1, padding=1), (6, 8, 8), 1.002),
    (lambda: nn.Conv2d(6, 6, 1, padding=1, padding_mode="circular"), (6, 5, 5), 1.002),
    (lambda: nn.Conv2d(6, 9, 1, groups=3), (6, 8, 8), 1.002),
    (lambda: nn.ConvTranspose2d(6, 9, 1, stride=2), (6, 6, 6), 1.002),
    (lambda: nn.Conv2d(3, 5, 3, padding=1), (3, 24, 24), 1.01),
    (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (3, 24, 24), 1.03),
    (lambda: nn.Conv2d(5, 5, 3, padding=1, padding_mode="circular"), (5, 16, 16), 1.002),
]


@pytest.mark.parametrize("case", range(len(CONVOLUTIONS)))
def test_tier_zero_of_a_convolution_is_above_arpack_and_close(case: int) -> None:
    make, shape, slack = CONVOLUTIONS[case]
    torch.manual_seed(case)
    layer = make().eval()
    graph = export(layer, torch.randn(2, *shape))
    upper = naive(program_of(graph), graph.weights).total
    truth = arpack(layer, shape)
    assert truth * ROUNDING <= upper <= truth * slack


def test_a_search_for_a_pair_keeps_its_deadline() -> None:
    model = DEEP.build()
    x = torch.randn(16, *DEEP.shape)
    graph = export(model, x)
    calls = 0

    class Counted(Function):
        def __call__(self, x: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return super().__call__(x)

    pair = attained(Counted(graph, (x[:2],)), x.flatten(1).double(), seconds=0.0)
    assert pair is not None and pair.quotient > 0
    assert calls < 8


def test_an_encoder_has_a_finite_bound_on_a_region_however_deep() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False).eval()
    bound = opnorm.lipschitz(model, torch.randn(2, 4, 8), region=NormBall(1.0), time_budget=2.0)
    assert 0 < bound.lower <= bound.upper < math.inf
