"""Layers, weights and moments that are out of the ordinary: the bound holds, the modes agree, or an error says why."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import opnorm
from opnorm.errors import ArgumentError, WeightError
from parametrize.oracle import layer_norm, matrix_norm


def raw(layer):
    return layer.parametrizations.weight.original


@pytest.mark.parametrize("size", [None, (3, 24)])
def test_circular_padding_with_a_stride_trains_with_what_is_deployed(size):
    torch.manual_seed(0)
    plain = nn.Conv1d(3, 4, 4, 2, 1, padding_mode="circular")
    layer = opnorm.spectral_norm(copy.deepcopy(plain), input_shape=size)
    trained, deployed = layer.weight.clone(), layer.eval().weight.clone()
    torch.testing.assert_close(trained, deployed, rtol=2e-3, atol=0.0)
    # Where the stride does not divide the length, the blocks of the strided symbol are none.
    assert max(layer_norm(plain, deployed, (3, n)) for n in ((24,) if size else range(4, 12))) <= 1.0


@pytest.mark.parametrize("size", [8, 10])
def test_zero_padding_trains_on_the_torus_of_the_proof(size):
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(nn.Conv2d(128, 128, 3, padding=1), input_shape=(128, size, size))
    trained = layer.weight.clone()
    torch.testing.assert_close(trained, layer.eval().weight.clone(), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_complex_convolutions_of_a_small_size(kind):
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(kind(2, 3, 3, 2, 1, dtype=torch.complex64, bias=False), input_shape=(2, 6))
    x = torch.eye(12, dtype=torch.complex64).reshape(12, 2, 6)
    assert matrix_norm(layer(x).flatten(1)) == pytest.approx(1.0, rel=1e-3)
    (slope,) = torch.autograd.grad(layer(x[:3]).abs().square().sum(), raw(layer))
    probe, step = torch.randn_like(slope), 1e-3
    values = []
    for sign in (1, -1):
        moved = opnorm.spectral_norm(copy.deepcopy(opnorm.fold(layer)), input_shape=(2, 6), n_power_iterations=50)
        with torch.no_grad():
            raw(moved).copy_(raw(layer) + sign * step * probe)
        values.append(float(moved(x[:3]).abs().square().sum().detach()))
    expected = float((slope.conj() * probe).sum().real)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(expected, rel=0.02, abs=1e-3)
    assert matrix_norm(layer.eval()(x).flatten(1)) <= 1.0 + 1e-6  # the weight is within 1; the output is rounded


@pytest.mark.parametrize("factor", [1e-38, 1e37])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 6), lambda: nn.Conv2d(2, 3, 3)], ids=["linear", "convolution"])
def test_extreme_weights_are_registered(make, factor):
    torch.manual_seed(0)
    layer = make()
    with torch.no_grad():
        layer.weight.mul_(factor)
    opnorm.spectral_norm(layer)
    trained, deployed = layer.weight.clone(), layer.eval().weight.clone()
    torch.testing.assert_close(trained, deployed, rtol=1e-3, atol=0.0)


REFUSED = {
    "sparse gradients": (lambda: nn.Embedding(5, 3, sparse=True), ArgumentError, "sparse=False"),
    "written when read": (lambda: nn.Embedding(5, 3, max_norm=1.0), ArgumentError, "max_norm=1.*max_norm=None"),
    "written by a bag": (lambda: nn.EmbeddingBag(5, 3, max_norm=2.0), ArgumentError, "max_norm=None"),
    "stored in parts": (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), ArgumentError, "WeightNorm.*remove_p"),
    "pruned": (lambda: prune.identity(nn.Linear(3, 3), "weight"), ArgumentError, r"weight_mask.*prune\.remove"),
    "empty": (lambda: nn.Embedding(0, 3), WeightError, r"shape \(0, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_normalised_is_refused_before_anything_is_changed(case):
    make, error, message = REFUSED[case]
    layer = make()
    before = type(layer), list(layer.state_dict())
    with pytest.raises(error, match=message):
        opnorm.spectral_norm(layer)
    assert (type(layer), list(layer.state_dict())) == before


@pytest.mark.parametrize("computed", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_projector_does_not_write_to_weights_that_are_computed(computed):
    model = nn.Sequential(computed(nn.Linear(3, 3)), nn.Linear(3, 3))
    with pytest.raises(ArgumentError, match=r"^0\.weight is computed.*skip=\['0'\]"):
        opnorm.Projector(model)


def test_a_projector_divides_tied_weights_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    projector = opnorm.Projector(nn.Sequential(*model), 3.0)
    assert list(projector.step_()) == ["0.weight"]
    assert matrix_norm(model[0].weight) == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize("other", ["plain", "another K"])
def test_folding_unties_what_is_used_with_other_values(other):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    opnorm.spectral_norm(model[0], lipschitz=2.0)
    if other == "another K":
        opnorm.spectral_norm(model[1], lipschitz=0.5)
    plain, x = opnorm.fold(model.eval()), torch.randn(3, 4)
    assert torch.equal(plain(x), model(x))


def test_folding_keeps_ties():
    embedding, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = embedding.weight
    plain = opnorm.fold(opnorm.normalize(nn.Sequential(embedding, head)))
    assert plain[0].weight is plain[1].weight


def test_no_parameter_can_be_made_of_a_computed_weight():
    layer = opnorm.spectral_norm(nn.Linear(3, 3))
    for weight in (layer.weight, layer.weight.data):
        with pytest.raises(ArgumentError, match=r"layer\.weight\.detach\(\)\.clone\(\)"):
            nn.Parameter(weight)
    assert not isinstance(layer.weight, nn.Parameter)
    assert type(nn.Parameter(layer.weight.detach().clone())) is nn.Parameter


def test_gradients_after_inference_mode():
    layer = opnorm.spectral_norm(nn.Linear(3, 3))
    x = torch.ones(2, 3, requires_grad=True)
    for training in (True, False):
        layer.train(training)
        with torch.no_grad():
            raw(layer).add_(torch.eye(3))
        with torch.inference_mode():
            layer(x)
        layer(x).sum().backward()


def test_copies_made_in_inference_mode():
    layer = opnorm.spectral_norm(nn.Linear(3, 3)).eval()
    with torch.inference_mode():
        twin, plain = copy.deepcopy(layer), opnorm.fold(layer)
        assert torch.equal(twin(torch.eye(3)), layer(torch.eye(3))) and torch.equal(plain.weight, layer.weight.clone())


class Decoder(nn.Module):
    """Told its size, as U-Nets do, and called by keyword."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(1, 1, 3, 2, 1, bias=False)
        self.smooth = nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect", bias=False)

    def forward(self, x, size=5):
        return self.smooth(input=self.up(x, output_size=(size,)))


def test_sizes_that_are_told_by_name():
    model = Decoder()
    nn.init.ones_(model.up.weight)
    opnorm.normalize(model, torch.ones(1, 1, 3)).eval()
    columns = [model.up(x[None, None], output_size=(6,)).flatten() for x in torch.eye(3)]
    assert matrix_norm(torch.stack(columns)) <= 1.0
    assert model.smooth.parametrizations.weight[0].view.template.spatial == (5,)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches(shape, training):
    layer = opnorm.spectral_norm(nn.Linear(3, 4)).train(training)
    assert layer(torch.empty(shape)).shape == (*shape[:-1], 4)


def made_on_meta(**options):
    with torch.device("meta"):
        return nn.Sequential(
            opnorm.spectral_norm(nn.Conv2d(3, 2, 3), **options), nn.Flatten(),
            opnorm.spectral_norm(nn.Linear(32, 3), **options),
        )  # fmt: skip


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("route", ["assigned", "initialised", "plain"])
def test_models_made_on_the_meta_device(route, scale):
    torch.manual_seed(0)
    model = made_on_meta(learn_scale=scale)
    for training in (True, False):
        assert model.train(training)(torch.empty(5, 3, 6, 6, device="meta")).shape == (5, 3)
    plain = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 3))
    if route == "initialised":
        model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    else:
        full = opnorm.normalize(copy.deepcopy(plain), learn_scale=scale)
        state = plain.state_dict() if route == "plain" else full.state_dict()
        model.load_state_dict(state, assign=True)
    x = torch.randn(2, 3, 6, 6)
    model(x).sum().backward()
    trained, deployed = model.train()[2].weight.clone(), model.eval()[2].weight.clone()
    torch.testing.assert_close(trained, deployed, rtol=1e-3, atol=0.0)
    assert 0.99 < matrix_norm(deployed) <= 1.0


def test_vectors_without_values_are_not_believed():
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(nn.Conv2d(4, 8, 3))
    state, expected = {k: v.clone() for k, v in layer.state_dict().items()}, layer.weight.clone()
    layer.to_empty(device="cpu")
    for buffer in layer.buffers():
        nn.init.ones_(buffer)
    layer.load_state_dict(state)
    torch.testing.assert_close(layer.weight.clone(), expected, rtol=1e-4, atol=0.0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_tracing_says_what_to_trace():
    layer = opnorm.spectral_norm(nn.Linear(3, 3)).eval().requires_grad_(False)
    for _ in range(2):  # the second time there is a weight that could be handed out
        with pytest.raises(ArgumentError, match=r"trace opnorm\.fold"):
            torch.jit.trace(layer, torch.ones(1, 3))
        layer(torch.ones(1, 3))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parametrization_that_comes_after_evaluation_is_used():
    layer = opnorm.spectral_norm(nn.Linear(3, 3, bias=False)).eval().requires_grad_(False)
    before = layer(torch.eye(3)).clone()
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert torch.equal(layer(torch.eye(3)), 2 * before)


def test_torchs_removal_names_opnorms_or_leaves_a_plain_layer():
    layer = opnorm.spectral_norm(nn.Linear(3, 3))
    with pytest.raises(ArgumentError, match=r"opnorm\.remove_spectral_norm\(layer\)"):
        parametrize.remove_parametrizations(layer, "weight")
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    state = nn.Linear(3, 3).state_dict()
    layer.load_state_dict(state)
    assert torch.equal(layer.weight, state["weight"])


GEOMETRIES = {
    "stride": (nn.Conv2d(2, 3, 3, padding=1), (2, 2)),
    "padding": (nn.Conv1d(2, 3, 3), (1,)),
    "padding_mode": (nn.Conv2d(2, 3, 3, padding=1), "circular"),
    "dilation": (nn.Conv3d(2, 3, 2), (2, 1, 1)),
    "groups": (nn.Conv2d(1, 4, 1, stride=2), 2),
    "output_padding": (nn.ConvTranspose2d(2, 3, 3, stride=2), (1, 1)),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_normalised_convolution_keeps_its_geometry(name):
    layer, other = GEOMETRIES[name]
    opnorm.spectral_norm(layer)
    before = getattr(layer, name)
    for normalised in (layer.eval(), copy.deepcopy(layer)):
        with pytest.raises(ArgumentError, match=rf"{name}=.*remove_spectral_norm\(layer\), set {name}"):
            setattr(normalised, name, other)
        setattr(normalised, name, before)
        assert getattr(normalised, name) == before
    for free in (opnorm.fold(layer), opnorm.remove_spectral_norm(layer), opnorm.spectral_norm(layer, norm="reshaped")):
        setattr(free, name, other)
        assert getattr(free, name) == other


@pytest.mark.parametrize(
    "remove", [opnorm.remove_spectral_norm, partial(parametrize.remove_parametrizations, leave_parametrized=False)]
)
def test_a_geometry_is_free_where_only_another_weight_is_parametrized(remove):
    layer = opnorm.spectral_norm(nn.Conv2d(2, 3, 3)).eval()
    parametrize.register_parametrization(layer, "bias", nn.Identity())
    remove(layer, "weight")
    layer.stride = (2, 2)
    assert layer(torch.randn(1, 2, 5, 5)).shape == (1, 3, 2, 2)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_a_learned_scale_stays_real_in_a_complex_layer():
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(nn.Linear(4, 4), learn_scale=True)
    layer(torch.randn(3, 4)).sum().backward()
    layer.to(torch.complex64)
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    for _ in range(3):
        layer(torch.randn(3, 4, dtype=torch.complex64)).abs().sum().backward()
        optimizer.step()
    scale = layer.parametrizations.weight[0].scale
    assert scale.dtype is torch.float32 and scale.grad is not None
    bound = torch.sigmoid(scale).item()
    assert bound * (1 - 1e-5) < torch.linalg.matrix_norm(layer.eval().weight.clone(), 2) <= bound * (1 + 1e-6)
