"""Normalised layers inside what people use around them: compilers, transforms, optimizers, averaging, autocast."""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import opnorm
from parametrize.oracle import matrix_norm


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        opnorm.spectral_norm(nn.Conv2d(3, 4, 3, padding=1)),
        nn.ReLU(),
        nn.Flatten(),
        opnorm.spectral_norm(nn.Linear(4 * 36, 4)),
    )


def raws(model):
    return [p for name, p in model.named_parameters() if name.endswith("original")]


def hinge(model, optimizer, steps):
    real, fake = torch.ones(2, 3, 6, 6), -torch.ones(2, 3, 6, 6)
    for _ in range(steps):
        loss = torch.relu(1 - model(real)).mean() + torch.relu(1 + model(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def counted(model):
    """Count the refreshes of each estimate from now on."""

    def ages():
        chains = [c for module in model.modules() for c in getattr(module, "parametrizations", {}).values()]
        return [chain[0]._estimate.age for chain in chains]

    before = ages()
    return lambda: [now - then for now, then in zip(ages(), before, strict=True)]


def test_two_forwards_and_accumulation_refresh_once():
    model = network()
    count = counted(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    hinge(model, optimizer, 5)
    assert count() == [4, 4]  # the first step uses the estimate of registration


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}])
def test_a_step_that_moves_nothing_does_not_begin_again(dtype, options):
    """The start takes a hundred times what a value takes: at a learning rate of zero every step would."""
    model = network().to(dtype)
    model(torch.ones(2, 3, 6, 6, dtype=dtype))
    count = counted(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.0 if dtype == torch.float32 else 1e-9, **options)
    for _ in range(3):
        model(torch.ones(2, 3, 6, 6, dtype=dtype)).sum().backward()
        optimizer.step()
    model(torch.ones(2, 3, 6, 6, dtype=dtype))
    assert count() == [3, 3]


def test_compiled_training_and_evaluation_are_one_graph_each():
    model, eager = network(), network()
    count = counted(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for run, owner in ((compiled, model), (eager, eager)):
        hinge(run, torch.optim.SGD(owner.parameters(), 0.01), 5)
    assert counter.frame_count == 1 and count() == [4, 4]
    for a, b in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    model.eval(), eager.eval()
    with torch.no_grad():
        x = torch.randn(2, 3, 6, 6)
        torch.testing.assert_close(compiled(x), eager(x))
        raws(model)[1].mul_(torch.rand(4, 1))  # a new value is seen by the same graph
        assert not torch.allclose(compiled(x), eager(x))
    assert counter.frame_count == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(nn.Linear(16, 16))
    x = torch.randn(4, 16, requires_grad=True)
    hinge_step = torch.optim.SGD(layer.parameters(), 0.5)
    layer(x).sum().backward()
    hinge_step.step()
    layer.zero_grad()
    twin = copy.deepcopy(layer)
    layer(x).square().sum().backward()
    checkpoint(twin, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(raws(twin)[0].grad, raws(layer)[0].grad, rtol=1e-6, atol=1e-7)


def test_autocast():
    model = network()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(2, 3, 6, 6))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and all(p.grad.dtype == torch.float32 for p in raws(model))


def test_transforms_over_the_input():
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(nn.Linear(6, 4))
    x = torch.randn(6)
    for mode in (True, False):
        layer.train(mode)
        assert matrix_norm(torch.func.jacrev(layer)(x)) == pytest.approx(1.0, rel=1e-4)
        torch.testing.assert_close(torch.vmap(layer)(torch.ones(2, 6)), layer(torch.ones(2, 6)))


def test_ensembles_differentiate_and_refuse_unproved_evaluation():
    models = [network() for _ in range(2)]
    base = copy.deepcopy(models[0])
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(2, 3, 6, 6)

    def total(parameters):
        def call(p, b):
            return torch.func.functional_call(base, (p, b), (x,))

        return torch.vmap(call)(parameters, buffers).sum()

    found = torch.func.grad(total)(parameters)
    models[1](x).sum().backward()
    for name, parameter in models[1].named_parameters():
        torch.testing.assert_close(found[name][1], parameter.grad, rtol=1e-3, atol=1e-4)
    base.eval()
    with pytest.raises(opnorm.errors.ArgumentError, match="fold"):
        total(parameters)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_no_optimizer_leaves_anything_stale(name, options):
    model = network()
    optimizer = getattr(torch.optim, name)(model.parameters(), 3e-2, **options)
    for _ in range(3):
        hinge(model, optimizer, 1)
        before = [layer.weight.clone() for layer in (model[0], model[3])]
        model.eval()
        deployed = [layer.weight.clone() for layer in (model[0], model[3])]
        model.train()
        fresh = copy.deepcopy(model)
        opnorm.update(fresh)
        for trained, proved, layer in zip(before, deployed, (fresh[0], fresh[3]), strict=True):
            torch.testing.assert_close(trained, layer.weight.clone(), rtol=0.1, atol=0.0)
            assert torch.equal(proved, layer.eval().weight.clone())


def inference(p):
    with torch.inference_mode():
        p.data[0, 3] = 50.0


def fused(p):
    p.grad = torch.zeros_like(p)
    p.grad[0, 3] = 1.0
    torch.optim.SGD([p], 50.0, fused=True).step()


ONE = {  # one entry, which a sample of the entries misses
    "data": lambda p: p.data.view(-1)[3:4].fill_(50.0),
    "in place": lambda p: p[0, 3:4].fill_(50.0),
    "detached": lambda p: p.detach()[0, 3:4].fill_(50.0),
    "inference mode": inference,
    "fused optimizer": fused,
    "foreach": lambda p: torch._foreach_add_([p], [one_entry(p)]),
    "new data": lambda p: setattr(p, "data", p.data + one_entry(p)),
    "vector": lambda p: nn.utils.vector_to_parameters((p + one_entry(p)).view(-1), [p]),
    "set_": lambda p: p.set_(p + one_entry(p)),
    "swap": lambda p: torch.utils.swap_tensors(p, nn.Parameter(p + one_entry(p))),
    "moving average": lambda p: p.data.lerp_(p.data + one_entry(p), 0.5),
}
WHOLE = {
    "data": lambda p: p.data.mul_(torch.rand_like(p)),
    "NumPy": lambda p: p.detach().numpy().__imul__(torch.rand(p.shape).numpy()),
}
WRITES = {**{f"one entry, {k}": f for k, f in ONE.items()}, **{f"whole, {k}": f for k, f in WHOLE.items()}}


def one_entry(p):
    return 50.0 * nn.functional.one_hot(torch.tensor(3), p.numel()).view_as(p)


def deployed_afresh(layer):
    fresh = opnorm.spectral_norm(nn.Linear(40, 40)).eval()
    fresh.load_state_dict(layer.state_dict())
    return fresh


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("copied", [False, True], ids=["", "copy"])
def test_no_write_leaves_a_stale_weight(write, copied):
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(nn.Linear(40, 40)).eval()
    x = torch.eye(40)
    with torch.no_grad():
        layer(x)
        layer = copy.deepcopy(layer) if copied else layer
        layer(x), layer(x)
        raw = raws(layer)[0]
        WRITES[write](raw)
        assert torch.equal(layer(x), deployed_afresh(layer)(x))
        assert torch.equal(layer.weight.clone(), deployed_afresh(layer).weight.clone())
        raw.data[0, 3] = 20.0
    assert matrix_norm(layer.train().weight) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("source", ["data", "assigned"])
def test_writes_through_an_alias_that_is_kept_are_seen(source):
    layer = opnorm.spectral_norm(nn.Linear(40, 40)).eval()
    alias, x = torch.rand(40, 40), torch.eye(40)
    with torch.no_grad():
        if source == "assigned":
            raws(layer)[0].data = alias
        else:
            alias = raws(layer)[0].data
        layer(x), layer(x)
        alias[0, 3] = 50.0
        assert torch.equal(layer(x), deployed_afresh(layer)(x))


def test_writes_of_other_processes_are_seen():
    layer = opnorm.spectral_norm(nn.Linear(40, 40)).eval()
    x = torch.eye(40)
    with torch.no_grad():
        layer(x)
        raw = layer.share_memory() and raws(layer)[0]
        layer(x), layer(x)
        # What another process does: the same memory, no tensor that this one knows of.
        torch.frombuffer(memoryview(raw.detach().numpy()), dtype=torch.float32)[3] = 50.0
        assert torch.equal(layer(x), deployed_afresh(layer)(x))


def test_a_watched_weight_is_an_ordinary_parameter():
    layer = opnorm.spectral_norm(nn.Linear(4, 4))
    raw = raws(layer)[0]
    assert isinstance(raw, nn.Parameter) and repr(raw) == repr(nn.Parameter(raw.detach()))
    assert type(raw + 0) is type(raw.detach()) is type(raw.data) is torch.Tensor
    assert raw.data.data_ptr() == raw.data_ptr() and not raw.data.requires_grad
    version = raw._version
    raw.data.mul_(2)
    assert raw._version == version  # as in torch: such a write is between a backward and its forward if it likes
    file = io.BytesIO()
    torch.save([raw], file)
    file.seek(0)
    (loaded,) = torch.load(file)
    assert type(loaded) is nn.Parameter and torch.equal(loaded, raw) and not vars(loaded)
    assert all(type(p) is nn.Parameter for p in opnorm.fold(layer).parameters())
    assert all(type(p) is nn.Parameter for p in opnorm.remove_spectral_norm(layer).parameters())


def test_another_tensor_with_the_same_sample_is_another_weight():
    layer = opnorm.spectral_norm(nn.Linear(40, 40)).eval()
    x = torch.randn(1, 40)
    layer(x)
    other = raws(layer)[0].detach().clone()
    other.view(-1)[3:4] = 50.0
    found = torch.func.functional_call(layer, {"parametrizations.weight.original": other}, (torch.eye(40),))
    assert matrix_norm(found - layer.bias) <= 1.0 + 1e-6


def test_evaluation_after_eval_compares_every_bit():
    layer = opnorm.spectral_norm(nn.Linear(40, 40)).eval()
    layer(torch.randn(1, 40))
    raws(layer)[0].data.view(-1)[3:4].fill_(50.0)
    assert matrix_norm(layer.eval().weight) <= 1.0


@pytest.mark.parametrize("use_buffers", [True, False])
def test_moving_average_keeps_the_bound(use_buffers):
    model = network()
    average = AveragedModel(model, use_buffers=use_buffers)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(3):
        hinge(model, optimizer, 2)
        average.update_parameters(model)
    assert 1 - 1e-5 < matrix_norm(average.module.eval()[3].weight) <= 1.0


def test_evaluation_depends_on_the_weight_alone():
    model = network()
    hinge(model, torch.optim.Adam(model.parameters(), 1e-2), 7)
    fresh = network()
    fresh.load_state_dict(model.state_dict())
    for buffer in fresh.buffers():
        buffer.fill_(float("nan"))
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(model.eval()(x), fresh.eval()(x))
    assert torch.equal(opnorm.fold(model)(x), model(x))
    assert fresh.train()(x).isnan().sum() == 0 or opnorm.update(fresh)


def test_frozen_and_shared_layers():
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(nn.Linear(5, 5)).requires_grad_(False)
    twice = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(2, 5, requires_grad=True)
    twice(x).sum().backward()
    assert x.grad is not None and raws(layer)[0].grad is None
    tied = nn.Linear(5, 5)
    tied.weight = raws(layer)[0].requires_grad_()
    opnorm.spectral_norm(tied)
    assert raws(tied)[0] is raws(layer)[0]


@torch.no_grad()
def test_a_frozen_layer_reads_the_deployed_weight_in_evaluation_only():
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(nn.Conv2d(3, 8, 3, padding=1)).requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    trained = layer(x)
    deployed = layer.eval()(x)
    assert torch.equal(layer(x), deployed) and not torch.equal(deployed, trained)
    assert torch.equal(layer.train()(x), trained)
