"""Whole models: normalize, coverage, fold, removal, Projector, Monitor, update; and which layers there are."""

import copy
import re
import warnings
from collections import UserDict

import pytest
import torch
from torch import nn

import opnorm
from opnorm.parametrize.chains import normalised
from parametrize.oracle import matrix_norm


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.side = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x + self.norm(self.conv(x)) + self.side(x)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), Residual(), nn.Flatten(), nn.Linear(64, 2)
    )
    for _ in range(3):
        model(torch.randn(8, 3, 4, 4) * 2 + 1)
    return model.eval()


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5))


def test_normalize_covers_every_parameter():
    model = opnorm.normalize(network(), X, lipschitz=2.0)
    coverage = opnorm.coverage(model)
    assert [row.name for row in coverage.rows] == [name for name, _ in model.named_parameters()]
    assert len(coverage.where("normalised")) == 4
    assert coverage.where("skipped") == ["1.norm.weight"] and "fold_batch_norm" in str(coverage)
    assert set(coverage.where("bounded")) == {name for name, _ in model.named_parameters() if "bias" in name}
    folded = opnorm.fold(model)
    assert opnorm.norm(folded[0], input_shape=(3, 4, 4)).upper <= 2.001
    assert matrix_norm(folded[3].weight) <= 2.0


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.position_bias, self.bias = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3))


def changed_later():
    layer = opnorm.spectral_norm(nn.Linear(3, 3, bias=False))
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


UNPROVED = {
    "another parametrization later": (changed_later, {"parametrizations.weight.original": "skipped"}),
    "biases within a softmax": (Attention, {"position_bias": "skipped", "bias": "skipped"}),
    "biases in the sequence": (
        lambda: nn.MultiheadAttention(4, 2, bias=False, add_bias_kv=True),
        {"in_proj_weight": "skipped", "bias_k": "skipped", "bias_v": "skipped", "out_proj.weight": "skipped"},
    ),
    "biases of gates": (
        lambda: nn.GRUCell(3, 2),
        {"weight_ih": "skipped", "weight_hh": "skipped", "bias_ih": "bounded", "bias_hh": "bounded"},
    ),
}


@pytest.mark.parametrize("case", UNPROVED)
def test_coverage_claims_nothing_that_is_not_known(case):
    make, expected = UNPROVED[case]
    assert {row.name: row.status for row in opnorm.coverage(make()).rows} == expected


def test_normalize_needs_the_sizes_only_where_the_norm_does():
    with pytest.raises(opnorm.errors.InputShapeError):
        opnorm.normalize(network())


class Repeated(nn.Module):
    """One layer that is called three times, by attention too, and one that is called once."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x):
        for _ in range(3):
            x = self.attention(x, x, x)[0]
            x = torch.relu(self.inner(x))
        return self.last(x)


def test_a_total_counts_every_call():
    shared = nn.Linear(6, 6)
    twice = opnorm.normalize(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(6, 2)), total=8.0)
    assert [rule.lipschitz for *_, rule in normalised(twice)] == pytest.approx([2.0, 2.0])
    shared = nn.Linear(6, 6)
    held = nn.Sequential(opnorm.spectral_norm(shared, lipschitz=2.0), nn.ReLU(), shared, nn.Linear(6, 2))
    assert opnorm.normalize(held, total=12.0)[3].parametrizations.weight[0].lipschitz == pytest.approx(3.0)
    repeated = opnorm.normalize(Repeated(), torch.randn(4, 6), total=2.0**10)
    assert {rule.lipschitz for *_, rule in normalised(repeated)} == {2.0}  # 3 x (in_proj, out_proj, inner) and last


def test_total_skip_and_errors():
    model = opnorm.normalize(network(), X, total=16.0, skip=["3", "1.s*"])
    rows = [row for row in opnorm.coverage(model).rows if row.status == "normalised"]
    assert len(rows) == 2 and all("norm 4" in row.reason for row in rows)
    with pytest.raises(opnorm.errors.ArgumentError, match="nowhere"):
        opnorm.normalize(network(), X, skip=["nowhere"])
    with pytest.raises(opnorm.errors.ArgumentError, match="not both"):
        opnorm.normalize(network(), X, total=2.0, lipschitz=3.0)
    with pytest.raises(opnorm.errors.ArgumentError, match="no linear layer"):
        opnorm.normalize(nn.ReLU())


def test_batch_norm_is_folded_in_when_that_changes_nothing():
    model = network()
    expected = model(X).detach()
    opnorm.normalize(model, X, lipschitz=1e3, mode="clip", fold_batch_norm=True)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    assert isinstance(model[1].norm, nn.Identity)

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=1.0)

        def forward(self, x):
            y = self.layer(x)
            return self.norm(y) + 3 * y

    shared = Shared()
    shared(torch.randn(9, 4) * 5)
    with pytest.raises(opnorm.errors.ArgumentError, match="used elsewhere"):
        opnorm.normalize(shared, torch.randn(3, 4), fold_batch_norm=True)
    assert isinstance(shared.norm, nn.BatchNorm1d)


@pytest.mark.parametrize(
    "norm",
    [nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False)],
    ids=lambda norm: type(norm).__name__,
)
def test_inert_layers_are_named(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), norm)
    with pytest.warns(UserWarning, match="0 is inert"):
        opnorm.normalize(model)
    row = next(row for row in opnorm.coverage(model).rows if row.status == "inert")
    assert type(norm).__name__ in row.reason
    with pytest.warns(UserWarning, match="0 is inert"):
        opnorm.normalize(nn.Sequential(nn.Conv2d(3, 4, 3), norm), torch.randn(1, 3, 8, 8))
    assert not opnorm.coverage(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).where("inert")


class Conv1D(nn.Module):
    """As that of `transformers`: a linear layer whose weight is stored the other way round."""

    def __init__(self, columns, rows):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(columns, rows)), nn.Parameter(torch.zeros(rows))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.token, self.scale = nn.Parameter(torch.zeros(1, 1, 6)), nn.Parameter(torch.ones(6, 1, 1))
        self.norms = nn.Sequential(nn.LayerNorm((6, 6)), nn.BatchNorm1d(6), nn.GroupNorm(2, 6))


LEFT_OUT = {
    "a layer of another library": (
        [Conv1D(6, 6)],
        (),
        r"^not normalised: 1\.weight \(no rule for Conv1D\.weight\); .*skip",
    ),
    "one output": ([Conv1D(6, 1)], (), r"1\.weight \(no rule"),
    "inside": ([nn.Sequential(nn.ReLU(), Conv1D(6, 6))], (), r"1\.1\.weight \(no rule"),
    "several": (
        [Conv1D(6, 6) for _ in range(9)],
        (),
        r"1\.weight \(.*5\.weight \([^,]*\) and 4 more, which opnorm\.cov",
    ),
    "skipped as a module": ([Conv1D(6, 6)], ["1"], None),
    "skipped as a parameter": ([Conv1D(6, 6)], "1.weight", None),
    "one of two skipped": ([Conv1D(6, 6), Conv1D(6, 6)], ["2"], r": 1\.weight \([^,]*\);"),
    "its matrix is divided": ([opnorm.spectral_norm(Conv1D(6, 6), norm="reshaped")], (), None),
    "factors, not maps": ([Scaled()], (), None),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_not_normalised_is_told_once(case):
    layers, skip, message = LEFT_OUT[case]
    model = nn.Sequential(nn.Linear(6, 6), *layers)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        opnorm.normalize(model, skip=skip)
    assert len(told) == (message is not None)
    assert not told or (re.search(message, str(told[0].message)) and told[0].filename == __file__)
    assert "0.parametrizations.weight.original" in opnorm.coverage(model).where("normalised")


def test_coverage_of_a_layer_that_has_no_weights_yet():
    rows = opnorm.coverage(nn.Sequential(nn.LazyLinear(3))).rows
    assert {(row.status, row.reason) for row in rows} == {("skipped", "no shape before the first call")}


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)

    def forward(self, image, scale=1.0):
        image, scale = (image["image"], image["scale"]) if isinstance(image, dict) else (image, scale)
        return self.norm(self.conv(image * scale))


EXAMPLES = {
    "one batch": X,
    "a tuple": (X, 2.0),
    "a dict": {"scale": 2.0, "image": X},
    "the dict of a tokenizer": UserDict(image=X),
    "a dict that is an argument": ({"image": X, "scale": 2.0},),
}


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_an_example_is_what_the_model_is_called_with(example):
    model = opnorm.normalize(Pair().eval(), example, fold_batch_norm=True)
    assert opnorm.coverage(model, example).where("normalised") and isinstance(model.norm, nn.Identity)
    theirs = Pair()
    nn.utils.parametrizations.spectral_norm(theirs.conv)
    assert opnorm.convert(theirs, example, norm="operator").conv.parametrizations.weight[0].norm == "operator"


@pytest.mark.parametrize("example", [{"picture": X}, {}, (X, 1.0, 2.0), {1: X}], ids=["name", "none", "many", "number"])
@pytest.mark.parametrize("act", [opnorm.normalize, opnorm.coverage])
def test_an_example_that_the_model_does_not_take_is_refused(act, example):
    with pytest.raises(opnorm.errors.ArgumentError, match=r"^example_input does not fit Pair\.forward\(image, scale=1"):
        act(Pair(), example)


def test_fold_leaves_the_original_alone():
    model = opnorm.normalize(network(), X)
    before = model(X)
    plain = opnorm.fold(model)
    assert torch.equal(plain(X), before) and torch.equal(model(X), before)
    assert not any("opnorm" in type(module).__module__ for module in plain.modules())
    assert [type(module) for module in plain.modules()] == [type(module) for module in network().modules()]
    assert not any(module._load_state_dict_pre_hooks for module in plain.modules())
    with pytest.raises(opnorm.errors.ArgumentError, match="nothing"):
        opnorm.fold(plain)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(make):
    torch.manual_seed(0)
    layer = make(6, 5, 2, bidirectional=True)
    opnorm.spectral_norm(layer, None)
    x = torch.randn(4, 2, 6)
    layer(x)[0].sum().backward()
    assert layer.parametrizations.weight_hh_l1.original.grad.norm() > 0
    twin = copy.deepcopy(layer)
    for module in (layer, twin):
        module.eval()
    torch.testing.assert_close(twin(x)[0], layer(x)[0])
    plain = opnorm.fold(layer)
    torch.testing.assert_close(plain(x)[0], layer(x)[0])
    norms = [matrix_norm(p) for name, p in plain.named_parameters() if name.startswith("weight")]
    assert len(norms) == 8 and all(1 - 1e-5 < norm <= 1.0 for norm in norms)
    opnorm.remove_spectral_norm(layer, "weight_ih_l0")
    torch.testing.assert_close(plain(x)[0], layer(x)[0])


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 7}])
def test_attention(sizes):
    torch.manual_seed(0)
    attention = opnorm.spectral_norm(nn.MultiheadAttention(8, 2, batch_first=True, **sizes), None)
    q, k, v = (torch.randn(2, 3, n) for n in (8, sizes.get("kdim", 8), sizes.get("vdim", 8)))
    attention(q, k, v)[0].square().sum().backward()
    attention.eval()
    expected = opnorm.fold(attention)(q, k, v)[0]
    torch.testing.assert_close(attention(q, k, v)[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(attention(q, k, v)[0], expected)
    opnorm.remove_spectral_norm(attention, None)
    parts = attention.in_proj_weight.chunk(3) if not sizes else [attention.q_proj_weight, attention.v_proj_weight]
    assert all(1 - 1e-5 < matrix_norm(part) <= 1.0 for part in (*parts, attention.out_proj.weight))


def test_embeddings():
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(nn.Embedding(9, 4))
    layer(torch.tensor([1, 2])).sum().backward()
    assert 1 - 1e-5 < matrix_norm(layer.eval()(torch.arange(9))) <= 1.0


@pytest.mark.parametrize(
    ("layer", "options", "error"),
    [
        (nn.Bilinear(2, 3, 4), {}, opnorm.errors.UnsupportedLayerError),
        (nn.LayerNorm(4), {}, opnorm.errors.WeightError),
        (nn.ReLU(), {}, opnorm.errors.ArgumentError),
        (nn.Linear(3, 3), {"name": "bias"}, opnorm.errors.WeightError),
        (nn.Linear(3, 3), {"dim": 1}, opnorm.errors.ArgumentError),
        (nn.Linear(3, 3), {"lipschitz": 0.0}, opnorm.errors.ArgumentError),
        (nn.Linear(3, 3), {"mode": "cut"}, opnorm.errors.ArgumentError),
        (nn.Linear(3, 3), {"norm": "nuclear"}, opnorm.errors.ArgumentError),
        (nn.Linear(3, 3), {"n_power_iterations": 0}, opnorm.errors.ArgumentError),
        (nn.Linear(3, 3), {"mode": "clip", "learn_scale": True}, opnorm.errors.ArgumentError),
        (nn.MultiheadAttention(4, 2), {}, opnorm.errors.ArgumentError),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), {}, opnorm.errors.InputShapeError),
    ],
)
def test_refusals(layer, options, error):
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(error):
        opnorm.spectral_norm(layer, **options)
    assert list(layer.state_dict()) == list(before) and not hasattr(layer, "parametrizations")


def test_torch_call_works_unchanged():
    layer = opnorm.spectral_norm(nn.Linear(20, 40), "weight", 2, 1e-12, 0)
    assert layer.parametrizations.weight[0].iterations == 2
    assert opnorm.spectral_norm(nn.ConvTranspose2d(2, 3, 3), norm="reshaped", dim=0).weight.shape == (2, 3, 3, 3)


@pytest.mark.parametrize("mode", ["divide", "clip"])
def test_projector(mode):
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(0.1 / matrix_norm(model[3].weight))
    projector = opnorm.Projector(model, 0.5, mode=mode, input_shapes={"0": (3, 4, 4)})
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(3):
        model(X).square().sum().backward()
        optimizer.step()
        before = projector.step_()
    assert set(before) == {"0.weight", "1.conv.weight", "1.side.weight", "3.weight"}
    assert matrix_norm(model[1].side.weight[:, :, 0, 0]) <= 0.5 * 1.02
    projector.step_(proved=True)
    assert matrix_norm(model[1].side.weight[:, :, 0, 0]) <= 0.5
    assert matrix_norm(model[3].weight) == pytest.approx(0.5 if mode == "divide" else 0.1, rel=0.05)
    assert opnorm.norm(model[0], input_shape=(3, 4, 4)).lower <= 0.5
    with pytest.raises(opnorm.errors.ArgumentError, match="plain"):
        opnorm.Projector(opnorm.spectral_norm(nn.Linear(2, 2)))


def test_monitor_measures_plain_and_normalised_models():
    model = network()
    found = opnorm.Monitor(model, input_shapes={"0": (3, 4, 4)})()
    weight = model[3].weight
    assert found["3.weight/norm"] == pytest.approx(matrix_norm(weight), rel=1e-4)
    assert found["3.weight/stable_rank"] == pytest.approx(
        float(weight.detach().norm()) ** 2 / matrix_norm(weight) ** 2, rel=1e-3
    )
    assert found["1.side.weight/gap"] < 0.05 and all(isinstance(value, float) for value in found.values())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    opnorm.normalize(model, X, lipschitz=3.0)
    monitor = opnorm.Monitor(model, skip=["0"])
    for _ in range(3):
        found = monitor()
    assert found["3.weight/norm"] == pytest.approx(3.0, rel=1e-2) and "0.weight/norm" not in found
    assert list(state) == list(network().state_dict())
    with pytest.raises(opnorm.errors.ArgumentError, match="input_shapes"):
        opnorm.Monitor(model, skip=["0"], input_shapes={"nothing": (3,)})


def test_update_counts_what_it_refreshes():
    model = opnorm.normalize(network(), X)
    assert opnorm.update(model) == 4 and opnorm.update(nn.Linear(2, 2)) == 0
