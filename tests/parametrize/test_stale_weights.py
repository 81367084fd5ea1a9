"""Evaluation uses the weight, bias and scale that a layer has now, and what it uses nobody else can write to."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parametrize

import opnorm
from opnorm.parametrize.spectral import SpectralNormalization

N = 40
X = torch.eye(N)


class Extra(nn.Linear):
    """It has another parametrized tensor, so that its class stays when the weight's parametrization goes."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.extra = nn.Parameter(torch.ones(1))
        parametrize.register_parametrization(self, "extra", nn.Tanh())


def linear(**options):
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(Extra(N, N), **options).eval().requires_grad_(False)
    layer(X), layer(X)
    return layer


def another():
    torch.manual_seed(1)
    return opnorm.spectral_norm(Extra(N, N)).eval().requires_grad_(False)


def raw(layer):
    return layer.parametrizations.weight.original


def afresh(layer):
    """What a layer that was never called before computes."""
    (rule,), held = layer.parametrizations.weight, raw(layer)
    weight = held
    if isinstance(rule, SpectralNormalization):
        fresh = opnorm.spectral_norm(nn.Linear(N, N), lipschitz=rule.lipschitz).eval()
        with torch.no_grad():
            raw(fresh).copy_(held)
        weight = fresh.weight.detach().clone()
    return F.linear(X, weight, layer.bias)


def registered_again(layer):
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    opnorm.spectral_norm(layer, lipschitz=2.0).eval()
    raw(layer).requires_grad_(False)


def storage_made_again(layer):
    storage, values = raw(layer).untyped_storage(), raw(layer).clone()
    storage.resize_(0)
    storage.resize_(values.untyped_storage().nbytes())
    raw(layer).copy_(values * torch.rand(N, N))


def gradients_dropped_in_a_hook(layer):
    optimizer = torch.optim.SGD([raw(layer).requires_grad_()], 50.0, fused=True)
    optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    raw(layer).grad = F.one_hot(torch.tensor(3), N * N).view(N, N).float()
    optimizer.step()
    raw(layer).requires_grad_(False)


def swapped_in_inference_mode(layer):
    with torch.inference_mode():
        torch.utils.swap_tensors(raw(layer), nn.Parameter(torch.randn(N, N), requires_grad=False))


def data_after_set(layer):
    assert raw(layer).data.shape == (N, N)
    raw(layer).set_(torch.randn(N, N))
    raw(layer).data[0, 3] = 50.0
    assert raw(layer)[0, 3] == 50.0


def data_after_transposing(layer):
    assert raw(layer).data.shape == (N, N)
    raw(layer).t_()
    raw(layer).data[0, 3] = 50.0
    assert raw(layer)[0, 3] == 50.0


CHANGES = {
    "rule": lambda layer: layer.parametrizations.weight.__setitem__(0, nn.Identity()),
    "chain": lambda layer: setattr(layer.parametrizations, "weight", another().parametrizations.weight),
    "parametrizations": lambda layer: setattr(layer, "parametrizations", another().parametrizations),
    "parameters": lambda layer: setattr(layer, "_parameters", {"bias": nn.Parameter(torch.ones(N))}),
    "everything": lambda layer: setattr(layer, "__dict__", dict(another().__dict__)),
    "bias hidden": lambda layer: layer.__dict__.update(bias=torch.ones(N)),
    "scale": lambda layer: setattr(layer.parametrizations.weight[0], "lipschitz", 2.0),
    "negative bit": lambda layer: setattr(raw(layer), "data", torch.randn(N, N, dtype=torch.complex64).conj().imag),
    **{f.__name__: f for f in (registered_again, storage_made_again, gradients_dropped_in_a_hook)},
    **{f.__name__: f for f in (swapped_in_inference_mode, data_after_set, data_after_transposing)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_evaluation_uses_what_is_there_now(change):
    layer = linear()
    with torch.no_grad():
        CHANGES[change](layer)
        assert torch.equal(layer(X), afresh(layer)) and torch.equal(layer(X), afresh(layer))


@torch.no_grad()
def test_a_transposed_view_of_the_weight_is_another_weight():
    layer = linear()
    raw(layer).copy_(torch.eye(N))[0, 3] = 5.0  # which the sample of the entries misses, on either side
    layer(X)
    name = "parametrizations.weight.original"
    found = functional_call(layer, {name: raw(layer).detach().t()}, (X,))
    raw(layer).copy_(raw(layer).t().clone())
    assert torch.equal(found, afresh(layer))


FAMILIES = {
    "linear": (nn.Linear, (N, N), X),
    "convolution": (nn.Conv1d, (2, 2, 3), torch.ones(1, 2, 8)),
    "transposed": (nn.ConvTranspose1d, (2, 2, 3), torch.ones(1, 2, 8)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_forward_that_is_replaced_later_is_used(family, everywhere, monkeypatch):
    base, sizes, x = FAMILIES[family]
    cls = base if everywhere else type("Mine", (base,), {})
    layer = opnorm.spectral_norm(cls(*sizes)).eval().requires_grad_(False)
    layer(x)
    monkeypatch.setattr(cls, "forward", lambda self, *_: self.bias, raising=False)
    assert layer(x) is layer.bias


def test_training_set_on_every_module_is_training():
    """As Lightning does after a validation."""
    layer = another().train()
    trained, deployed = layer(X), layer.eval()(X)
    for module in layer.modules():
        module.training = True
    assert torch.equal(layer(X), trained) and not torch.equal(trained, deployed)
    for module in layer.modules():
        module.training = False
    assert torch.equal(layer(X), deployed)


TRANSFORMS = {
    "jacrev": lambda layer: torch.func.jacrev(layer)(X[0]),
    "jacfwd": lambda layer: torch.func.jacfwd(layer)(X[0]),
    "vmap": lambda layer: torch.vmap(layer)(X).mT - layer.bias[:, None],
    "vmap of grad": lambda layer: torch.vmap(torch.func.grad(lambda x, y: layer(x) @ y), (None, 0))(X[0], X),
    "vmap of jvp": lambda layer: torch.vmap(lambda x: torch.func.jvp(layer, (X[0],), (x,))[1])(X).mT,
    "bias": lambda layer: torch.vmap(lambda b, x: functional_call(layer, {"bias": b}, (x,)))(torch.zeros(N, N), X).mT,
}
TORCH_SCRIPTS = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # for its forward mode


@TORCH_SCRIPTS
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("frozen", [True, False])
def test_the_first_call_may_be_in_a_transform(name, frozen):
    layer = another().requires_grad_(not frozen)
    with torch.set_grad_enabled(frozen):
        found = TRANSFORMS[name](layer)
        torch.testing.assert_close(found, layer.weight.clone(), rtol=1e-5, atol=1e-6)
        raw(layer).detach().numpy()[...] *= np.linspace(0.5, 1, N, dtype="f4")
        assert torch.equal(layer(X), afresh(layer))


@TORCH_SCRIPTS
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("called", [True, False])
def test_forward_mode_sees_the_weight(in_place, called):
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(nn.Linear(6, 6, dtype=torch.float64)).eval().requires_grad_(False)
    x, weight, tangent = torch.eye(6, dtype=torch.float64), raw(layer).clone(), torch.randn(6, 6, dtype=torch.float64)
    if called:
        layer(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, tangent)
        if in_place:
            raw(layer).copy_(dual)
            y = layer(x)
        else:
            y = functional_call(layer, {"parametrizations.weight.original": dual}, (x,))
        found = forward_ad.unpack_dual(y).tangent
    u, s, vt = torch.linalg.svd(weight)
    expected = tangent / s[0] - (u[:, 0] @ tangent @ vt[0]) / s[0] ** 2 * weight
    torch.testing.assert_close(found.mT, expected, rtol=1e-4, atol=1e-5)


GIVEN_AWAY = {
    "numpy": lambda w: w.numpy().__imul__(2),
    "detach cpu numpy": lambda w: w.detach().cpu().numpy().__imul__(2),
    "asarray": lambda w: np.asarray(w).__imul__(2),
    "dlpack": lambda w: torch.from_dlpack(w.detach()).mul_(2),
    "storage": lambda w: w.untyped_storage().fill_(0),
    "cpu": lambda w: w.cpu().mul_(2),
    "float": lambda w: w.float().mul_(2),
    "T": lambda w: w.T.mul_(2),
    "unbind": lambda w: w.unbind()[0].mul_(2),
    "iterated": lambda w: next(iter(w)).mul_(2),
    "ravel": lambda w: w.ravel().mul_(2),
    "copy": lambda w: copy.copy(w).mul_(2),
    "foreach": lambda w: torch._foreach_mul_([w.float()], 2.0),
    "out": lambda w: torch.mul(X, 2, out=w.cpu()),
    "relu": lambda w: F.relu(w, inplace=True),
    "assigned": lambda w: raw_of_another_with(w).mul_(2),
}


def raw_of_another_with(weight):
    other = another()
    other.weight = weight
    return raw(other)


@pytest.mark.parametrize("write", GIVEN_AWAY)
@pytest.mark.parametrize("gradient", [True, False])
def test_what_is_deployed_is_not_given_away(write, gradient):
    layer = linear().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        weight = layer.weight
        weight.norm()
    with torch.no_grad():
        GIVEN_AWAY[write](weight)
        assert torch.equal(layer(X), afresh(layer))
        assert torch.equal(F.linear(X, layer.weight, layer.bias), afresh(layer))


@pytest.mark.parametrize("training", [True, False])
def test_a_weight_that_was_read_without_gradient_still_has_one(training):
    layer = another().train(training).requires_grad_()
    weight = layer.weight
    with torch.no_grad():
        weight.norm()
    F.linear(X, weight).square().sum().backward()
    found = raw(layer).grad.clone()
    layer.zero_grad()
    F.linear(X, layer.weight).square().sum().backward()
    torch.testing.assert_close(found, raw(layer).grad)


@pytest.mark.parametrize("called", [True, False])
def test_a_symbolic_graph_follows_the_weight(called):
    layer = linear() if called else another()
    graph = torch.fx.symbolic_trace(layer)
    for _ in range(2):
        raw(layer).mul_(torch.rand(N, N))
        torch.testing.assert_close(graph(X), afresh(layer))


def test_memory_is_free_when_a_copy_is():
    layer = linear()
    copied = copy.deepcopy(layer)
    copied(X)
    gc.collect()
    gc.disable()
    try:
        held = weakref.ref(raw(copied)), weakref.ref(copied.parametrizations.weight[0].deployed(raw(copied)))
        del copied
        assert held[0]() is None and held[1]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("by_torch", [True, False])
def test_memory_is_free_when_the_normalisation_is_removed(by_torch):
    layer = linear()
    copied = copy.deepcopy(layer)  # keeps the class
    held = weakref.ref(layer.parametrizations.weight[0].deployed(raw(layer)))
    if by_torch:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    else:
        opnorm.remove_spectral_norm(layer)
        assert torch.equal(layer(X), copied(X))
    layer(X)
    gc.collect()
    assert held() is None
