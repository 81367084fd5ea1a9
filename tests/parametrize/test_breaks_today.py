"""What breaks with torch's two spectral norms, each as a pair: torch's fails, opnorm's holds.

`hook` is `nn.utils.spectral_norm`, `param` is `nn.utils.parametrizations.spectral_norm`. The tests of torch document
the failure; one that starts to fail means that torch was mended.
"""

import copy
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import opnorm
from parametrize.oracle import layer_norm, matrix_norm

hook = nn.utils.spectral_norm
param = nn.utils.parametrizations.spectral_norm
ours = opnorm.spectral_norm
TORCH = pytest.mark.parametrize("wrap", [hook, param], ids=["hook", "param"])


def seeded(make, seed=0):
    torch.manual_seed(seed)
    return make()


def raw(layer):
    return layer.weight_orig if hasattr(layer, "weight_orig") else layer.parametrizations.weight.original


def deployed_norm(layer):
    """The norm of the map that an evaluated linear layer applies; for torch's hook the weight is set by the call."""
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(1, layer.in_features))
        return matrix_norm(layer.weight)


CONVS = {
    "zero padding": (lambda: nn.Conv2d(8, 8, 3, padding=1), (8, 8, 8)),
    "circular": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"), (8, 8, 8)),
    "replicate": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="replicate"), (8, 8, 8)),
    "reflect": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), (8, 8, 8)),
    "7 x 7": (lambda: nn.Conv2d(4, 8, 7, padding=3), (4, 8, 8)),
    "stride 2": (lambda: nn.Conv2d(8, 8, 3, 2, 1), (8, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(16, 16, 3, padding=1), (16, 16)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 3, padding=1), (3, 4, 4, 4)),
}


@pytest.mark.parametrize("case", CONVS)
def test_convolutions_are_divided_by_the_norm_of_a_reshaped_kernel(case):
    make, shape = CONVS[case]
    plain = seeded(make)
    theirs = param(copy.deepcopy(plain), n_power_iterations=100).eval()
    assert layer_norm(plain, theirs.weight, shape) > 1.1
    layer = ours(copy.deepcopy(plain), input_shape=shape).eval()
    assert 0.98 < layer_norm(plain, layer.weight, shape) <= 1.0


def test_constant_kernel():
    plain = seeded(lambda: nn.Conv2d(1, 1, 3, padding=1))
    nn.init.constant_(plain.weight, 1.0)
    assert layer_norm(plain, param(copy.deepcopy(plain), n_power_iterations=9).eval().weight, (1, 16, 16)) > 2.9
    assert layer_norm(plain, ours(copy.deepcopy(plain), input_shape=(1, 16, 16)).eval().weight, (1, 16, 16)) <= 1.0


GROUPED = [lambda: nn.Conv2d(96, 96, 3, padding=1, groups=96), lambda: nn.ConvTranspose2d(32, 32, 4, 2, 1, groups=8)]


@pytest.mark.parametrize("make", GROUPED, ids=["depthwise", "transposed"])
def test_grouped_layers_are_needlessly_small(make):
    plain = seeded(make)
    shape = (plain.in_channels, 3, 3)
    theirs = layer_norm(plain, param(copy.deepcopy(plain), n_power_iterations=100).eval().weight, shape)
    found = layer_norm(plain, ours(copy.deepcopy(plain), input_shape=shape).eval().weight, shape)
    assert theirs < 0.9 < 0.98 < found <= 1.0


def adam(layer, steps, lr, x):
    optimizer = torch.optim.Adam(layer.parameters(), lr)
    for _ in range(steps):
        loss = torch.relu(1 - layer(x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("lr", "steps", "features"), [(2e-4, 5, 512), (1e-2, 3, 256)])
def test_power_iteration_lags_behind_the_optimizer(lr, steps, features):
    x = seeded(lambda: torch.randn(64, features).abs())
    norms = []
    for wrap in (hook, param, ours):
        layer = seeded(lambda wrap=wrap: wrap(nn.Linear(features, features)))
        adam(layer, steps, lr, x)
        norms.append(deployed_norm(layer))
    assert min(norms[:2]) > 1.02
    assert 1 - 1e-5 < norms[2] <= 1.0


TRAINED = {
    "conv2d": (lambda: nn.Conv2d(8, 8, 3, padding=1), (8, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 3, padding=1), (3, 4, 4, 4)),
}


@pytest.mark.parametrize(("lr", "steps", "least"), [(2e-4, 30, 1.4), (1e-2, 3, 2.0)])
@pytest.mark.parametrize("case", TRAINED)
def test_convolutions_after_steps_of_adam(case, lr, steps, least):
    make, shape = TRAINED[case]
    plain = seeded(make)
    norms = []
    for wrap in (hook, param, ours):
        layer = wrap(seeded(make))
        adam(layer, steps, lr, torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)).abs())
        with torch.no_grad():
            layer.eval()(torch.randn(1, *shape))
        norms.append(layer_norm(plain, layer.weight, shape))
    assert min(norms[:2]) > least and 0.6 < norms[2] <= 1.0


@TORCH
def test_torch_weight_overwritten_then_eval(wrap):
    assert _overwritten(wrap) > 10


def _overwritten(wrap):
    layer = seeded(lambda: wrap(nn.Linear(64, 64)))
    layer(torch.randn(2, 64))
    with torch.no_grad():
        raw(layer).copy_(torch.outer(torch.ones(64), torch.linspace(-1, 1, 64)))
    return deployed_norm(layer)


def test_weight_overwritten_then_eval():
    assert _overwritten(ours) <= 1.0


def test_eval_before_any_training_forward():
    assert deployed_norm(seeded(lambda: hook(nn.Linear(256, 256)))) > 2
    assert deployed_norm(seeded(lambda: param(nn.Linear(256, 256)))) > 1.003
    assert 1 - 1e-5 < deployed_norm(seeded(lambda: ours(nn.Linear(256, 256)))) <= 1.0


def _averaged(wrap, use_buffers):
    model = seeded(lambda: nn.Sequential(*(wrap(nn.Linear(32, 32)) for _ in range(3))))
    # The two copies drift apart, as those of an exponential moving average do.
    average = AveragedModel(model, use_buffers=use_buffers)
    x = torch.randn(8, 32).abs()
    for _ in range(8):
        adam(model, 3, 3e-2, x)
        average.update_parameters(model)
    return max(deployed_norm(layer) for layer in average.module)


@pytest.mark.parametrize("use_buffers", [True, False])
def test_moving_averages(use_buffers):
    assert max(_averaged(hook, use_buffers), _averaged(param, use_buffers)) > 1.02
    assert _averaged(ours, use_buffers) <= 1.0


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e30])
def test_zero_and_extreme_weights(value):
    def recovers(wrap):
        layer = seeded(lambda: wrap(nn.Linear(8, 8)))
        good = raw(layer).detach().clone()
        with torch.no_grad():
            raw(layer).mul_(value)
        during = layer(torch.randn(2, 8))
        with torch.no_grad():
            raw(layer).copy_(good)
        after = layer(torch.randn(2, 8))
        return bool(during.isfinite().all() and after.isfinite().all()) and deployed_norm(layer) <= 1.2

    assert not recovers(hook) and not recovers(param)
    assert recovers(ours)


def test_one_nan_forward_poisons_torch_for_ever():
    for wrap, poisoned in ((hook, True), (param, True), (ours, False)):
        layer = seeded(lambda wrap=wrap: wrap(nn.Linear(8, 8)))
        good = raw(layer).detach().clone()
        with torch.no_grad():
            raw(layer).fill_(float("nan"))
        layer(torch.randn(2, 8))
        with torch.no_grad():
            raw(layer).copy_(good)
        for _ in range(3):
            y = layer(torch.randn(2, 8))
        assert bool(y.isnan().any()) == poisoned


def test_start_vector_orthogonal_to_the_top_one():
    weight = torch.diag(torch.tensor([10.0, 1.0, 1.0, 1.0]))
    theirs = param(seeded(lambda: nn.Linear(4, 4, bias=False)))
    rule = theirs.parametrizations.weight[0]
    with torch.no_grad():
        raw(theirs).copy_(weight)
        rule._u.copy_(torch.eye(4)[1])
        rule._v.copy_(torch.eye(4)[1])
    for _ in range(1000):
        theirs(torch.randn(1, 4))
    assert deployed_norm(theirs) > 9.9
    layer = ours(seeded(lambda: nn.Linear(4, 4, bias=False)))
    layer.weight = weight
    assert matrix_norm(layer.weight) == pytest.approx(1, rel=1e-5) and deployed_norm(layer) <= 1.0


def test_initialisation_after_wrapping_is_a_silent_no_op():
    for wrap, works in ((param, False), (ours, True)):
        layer = seeded(lambda wrap=wrap: wrap(nn.Linear(6, 6)))
        before = raw(layer).detach().clone()
        nn.init.normal_(layer.weight)
        assert torch.equal(before, raw(layer)) != works
        before = raw(layer).detach().clone()
        layer.reset_parameters()
        assert torch.equal(before, raw(layer)) != works


def test_attention_projection():
    def trained(wrap_all):
        attention = seeded(lambda: nn.MultiheadAttention(16, 2, batch_first=True))
        wrap_all(attention)
        x = torch.randn(4, 5, 16)
        optimizer = torch.optim.Adam(attention.parameters(), 1e-1)
        for _ in range(20):
            loss = (attention(x, x, x)[0] - 3).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return attention.eval()

    theirs = trained(lambda attention: hook(attention.out_proj))
    # Its hook is never run: what it divides is neither trained nor divided.
    assert theirs.out_proj.weight_orig.grad is None and matrix_norm(theirs.out_proj.weight) > 1.05
    found = trained(lambda attention: ours(attention, None))
    for weight in (*found.in_proj_weight.chunk(3), found.out_proj.weight):
        assert 1 - 1e-5 < matrix_norm(weight) <= 1.0


def test_the_projections_of_attention_are_iterated_once_a_step():
    def refreshed(wrap, watched=lambda rule: None):
        attention = seeded(lambda: nn.MultiheadAttention(16, 2, batch_first=True))
        wrap(attention, "in_proj_weight")
        chain = attention.parametrizations.in_proj_weight
        watched(chain[0])
        with torch.no_grad():
            chain.original.add_(1e-3)
        x = torch.randn(2, 3, 16)
        attention(x, x, x)
        return chain[0]

    calls = []

    def count(rule):
        step = rule._power_method
        rule._power_method = lambda *a: calls.append(1) or step(*a)

    refreshed(param, count)
    assert len(calls) == 3 and refreshed(ours)._estimate.age == 1


def test_several_forwards_without_a_step_drift():
    for wrap, drifts in ((hook, True), (param, True), (ours, False)):
        layer = seeded(lambda wrap=wrap: wrap(nn.Linear(64, 64)))
        x = torch.randn(2, 64)
        first = layer(x).detach()
        assert torch.equal(layer(x), first) != drifts


def test_activation_checkpointing_on_the_first_step():
    def error(wrap):
        layer = seeded(lambda: wrap(nn.Linear(64, 64)))
        twin = copy.deepcopy(layer)
        x = torch.randn(4, 64)
        layer(x).square().sum().backward()
        checkpoint(twin, x, use_reentrant=False).square().sum().backward()
        return float((raw(twin).grad - raw(layer).grad).norm() / raw(layer).grad.norm())

    assert error(hook) > 0.05 and error(param) > 1e-4
    assert error(ours) <= 1e-6


def test_copies_and_pickles():
    layer = hook(seeded(lambda: nn.Linear(4, 4)))
    layer(torch.randn(1, 4))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(layer)
    layer = ours(seeded(lambda: nn.Linear(4, 4)))
    layer(torch.randn(1, 4)).sum().backward()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight.clone(), layer.weight.clone())
    for refused in (param(nn.Linear(4, 4)), layer):  # by torch's parametrization, with the way out
        with pytest.raises(RuntimeError, match="state_dict"):
            pickle.dumps(refused)
    assert pickle.loads(pickle.dumps(opnorm.fold(layer))).weight.norm() > 0


def test_vmap_ensembles():
    def ensemble(wrap):
        models = [seeded(lambda: nn.Sequential(wrap(nn.Linear(6, 4))), seed) for seed in range(3)]
        parameters, buffers = torch.func.stack_module_state(models)
        x = torch.randn(5, 6)

        def call(parameters, buffers):
            return torch.func.functional_call(copy.deepcopy(models[0]).to("meta"), (parameters, buffers), (x,))

        found = torch.vmap(call)(parameters, buffers)
        return float((found - torch.stack([model(x) for model in models])).detach().abs().max())

    for wrap in (hook, param):
        with pytest.raises(RuntimeError):
            ensemble(wrap)
    assert ensemble(ours) < 1e-5


def test_lazy_layers_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match="uninitialized"):
        hook(nn.LazyLinear(4))
    with pytest.raises(opnorm.errors.WeightError, match="call the model once"):
        ours(nn.LazyLinear(4))


def test_state_dict_of_the_hook_into_the_parametrization():
    state = hook(seeded(lambda: nn.Linear(4, 4))).state_dict()
    with pytest.raises(RuntimeError):
        param(nn.Linear(4, 4)).load_state_dict(state)
    theirs = param(nn.Linear(4, 4))
    theirs.load_state_dict(state, strict=False)
    assert not torch.equal(raw(theirs), state["weight_orig"])
    layer = ours(nn.Linear(4, 4))
    layer.load_state_dict(state)
    assert torch.equal(raw(layer), state["weight_orig"])


def test_removal_in_training_mode_keeps_the_deployed_function():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))

    def change(wrap, remove):
        layer = seeded(lambda: wrap(nn.Linear(16, 16)))
        adam(layer, 3, 1e-2, x)
        deployed = copy.deepcopy(layer).eval()(x)
        remove(layer)
        assert type(layer) is nn.Linear
        return float((layer(x) - deployed).detach().abs().max())

    assert change(param, lambda layer: parametrize.remove_parametrizations(layer, "weight")) > 1e-3
    assert change(ours, opnorm.remove_spectral_norm) == 0.0


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_differentiates_real_minus_fake():
    def gradient(wrap, compiled):
        torch._dynamo.reset()
        net = seeded(lambda: wrap(nn.Linear(6, 1)))
        run = torch.compile(net) if compiled else net
        real, fake = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
        (run(real).sum() - run(fake).sum()).backward()
        return raw(net).grad

    with pytest.raises(RuntimeError, match="inplace operation"):
        gradient(hook, True)
    torch.testing.assert_close(gradient(ours, True), gradient(ours, False))


def test_complex_weights():
    def norm(wrap):
        layer = seeded(lambda: wrap(nn.Linear(8, 8, dtype=torch.complex64)))
        x = torch.randn(1, 8, dtype=torch.complex64)
        for _ in range(50):
            layer(x)
        layer.eval()(x)
        return matrix_norm(layer.weight)

    assert norm(hook) > 2
    assert 1 - 1e-5 < norm(ours) <= 1.0


def test_casting_to_bfloat16():
    layer = seeded(lambda: param(nn.Linear(256, 256), n_power_iterations=50)).eval()
    assert matrix_norm(layer.to(torch.bfloat16).weight) > 1.0005
    layer = seeded(lambda: ours(nn.Linear(256, 256))).eval()
    assert matrix_norm(layer.to(torch.bfloat16).weight) <= 1.0


def test_export_is_as_small_as_a_plain_layer():
    example = (torch.randn(2, 4),)
    plain = len(torch.export.export(nn.Linear(4, 4), example).graph.nodes)
    theirs = len(torch.export.export(param(nn.Linear(4, 4)).eval(), example).graph.nodes)
    assert theirs > 2 * plain
    layer = ours(nn.Linear(4, 4)).eval()
    assert len(torch.export.export(opnorm.fold(layer), example).graph.nodes) == plain
    with pytest.raises(Exception, match="fold"):
        torch.export.export(layer, example)


def test_critic_of_a_wasserstein_gan():
    def gradient(wrap):
        torch.manual_seed(0)
        critic = nn.Sequential(*(part for _ in range(3) for part in (wrap(nn.Conv2d(4, 4, 3, padding=1)), nn.ReLU())))
        optimizer = torch.optim.Adam(critic.parameters(), 1e-2, betas=(0.0, 0.9))
        real, fake = torch.randn(8, 4, 8, 8) + 1, torch.randn(8, 4, 8, 8)
        for _ in range(30):
            loss = critic(fake).mean() - critic(real).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        critic.eval()
        x, dx = real, 1e-2 * torch.ones_like(real)
        with torch.no_grad():
            return float(((critic(x + dx) - critic(x)).flatten(1).norm(dim=1) / dx.flatten(1).norm(dim=1)).max())

    assert gradient(hook) > 1.5
    assert gradient(ours) <= 1.0
