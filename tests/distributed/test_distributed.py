"""Several processes: DDP, FSDP2 and tensor parallel agree with one process, and the ranks with each other."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import opnorm
from distributed.processes import bit_identical, spawn, whole

param = nn.utils.parametrizations.spectral_norm

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))


def plain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def normalised(model):
    for layer in (model[0], model[2]):
        opnorm.spectral_norm(layer)
    return model


def train(model, parameters, steps=3):
    optimizer = torch.optim.SGD(parameters, 0.3)
    for _ in range(steps):
        loss = (model(X) - model(-X)).square().mean() - model(X).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def compare(model, owner):
    """Train as one process would, and compare the outputs in training and in evaluation, which see every new step."""
    reference = normalised(plain())
    for _ in range(2):
        if isinstance(owner, FSDPModule):
            owner.reshard()  # after a forward without a backward; the optimizer takes the sharded parameters
        train(reference.train(), reference.parameters())
        train(model.train(), owner.parameters())
        torch.testing.assert_close(whole(model(X)), reference(X))
        scales = torch.cat([owner[i].parametrizations.weight[0]._estimate.triple.sigma for i in (0, 2)])
        assert bit_identical(scales)
        model.eval()
        torch.testing.assert_close(whole(model(X)), reference.eval()(X))


def ddp(broadcast_buffers):
    model = normalised(plain(seed=dist.get_rank()))  # wrapping gives all the weights of the first
    compare(nn.parallel.DistributedDataParallel(model, broadcast_buffers=broadcast_buffers), model)


def tensor_parallel():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = normalised(parallelize_module(plain(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()}))
    assert type(model[0].weight).__name__ == "DTensor"
    compare(model, model)
    with torch.no_grad():  # a change that only one process sees must not leave the others waiting
        if dist.get_rank() == 0:
            model[0].parametrizations.weight.original.to_local().mul_(2)
    assert whole(model.train()(X)).isfinite().all()


STYLES = {
    "columns": (lambda: nn.Linear(8, 16), ColwiseParallel),
    "rows": (lambda: nn.Linear(8, 16), RowwiseParallel),
    "embedding": (lambda: nn.Embedding(8, 4), RowwiseParallel),
}


def tensor_parallel_in_the_wrong_order(style):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    make, plan = STYLES[style]
    with pytest.raises((KeyError, RuntimeError)):
        parallelize_module(param(make()), mesh, plan())
    layer = opnorm.spectral_norm(make())
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(opnorm.errors.ArgumentError, match=r"parallelize_module first, then opnorm\.spectral_norm"):
        parallelize_module(layer, mesh, plan())
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in state.items())
    parallelize_module(opnorm.remove_spectral_norm(layer), mesh, plan())  # nothing is left behind
    assert type(layer.weight).__name__ == "DTensor"


def torch_drifts_without_broadcast():
    """What opnorm's `ddp(False)` is about: torch's u and v follow each process's own number of forwards."""
    layer = param(nn.Linear(8, 16))
    parallel = nn.parallel.DistributedDataParallel(layer, broadcast_buffers=False)
    for _ in range(1 + dist.get_rank()):
        parallel(X)
    mine = layer.eval().weight.detach().contiguous()
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    assert not torch.equal(found[0], found[1])


def torch_cannot_be_sharded_first():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded, parallel = plain(), parallelize_module(plain(), mesh, {"0": ColwiseParallel()})
    fully_shard(sharded)
    for model in (sharded, parallel):
        with pytest.raises(RuntimeError):
            param(model[0])


def torch_weights_cannot_be_read_when_sharded():
    theirs, ours = plain(), normalised(plain())
    param(theirs[0])
    for model in (theirs, ours):
        fully_shard(model)
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        theirs[0].weight  # noqa: B018
    assert whole(ours[0].weight).shape == (16, 8)


def normalise_then_shard():
    model = normalised(plain())
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    compare(model, model)


def one_entry_in_evaluation():
    """A write to an entry that no sample looks at, between two evaluations."""
    models = normalised(plain()).eval(), normalised(plain()).eval()
    fully_shard(models[1])
    change = torch.zeros(16, 8)
    change[3, 5] = 5.0
    for model in models:
        model(X)
        if isinstance(model, FSDPModule):
            model.reshard()
        raw = model[0].parametrizations.weight.original
        with torch.no_grad():
            raw.add_(distribute_tensor(change, raw.device_mesh, raw.placements) if isinstance(raw, DTensor) else change)
    torch.testing.assert_close(whole(models[1](X)), models[0](X))


def shard_then_normalise():
    model = plain()
    fully_shard(model)
    compare(normalised(model), model)


def penalised(method, shard_layers):
    """A penalty that was made before its model was sharded trains as it does in one process."""
    models = normalised(plain()), normalised(plain())
    penalties = [opnorm.LipschitzPenalty(model, X, method=method, refresh=2) for model in models]
    for layer in (models[1][0], models[1][2]) if shard_layers else ():
        fully_shard(layer)
    fully_shard(models[1])
    for model, penalty in zip(models, penalties, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.3)
        for _ in range(3):
            loss = model(X).square().mean() + 0.3 * penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for expected, found in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(whole(found), expected)
    with pytest.raises(opnorm.errors.ArgumentError, match="make the penalty first"):
        opnorm.LipschitzPenalty(models[1], X)


def sharded(model):
    fully_shard(model)
    return model


def parallelised(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def measured_and_projected(spread):
    """Without and with a parametrization the monitor reads, and the projector divides, as in one process."""
    for wrap in (lambda model: model, normalised):
        dense, found = opnorm.Monitor(wrap(plain()))(), opnorm.Monitor(wrap(spread(plain())))()
        assert {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in dense.items()} == found
    for proved in (False, True):
        models = plain(), spread(plain())
        for model in models:
            opnorm.Projector(model, 0.3).step_(proved=proved)
        for expected, found in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(whole(found), expected)


SCENARIOS = [
    (ddp, (True,)),
    (ddp, (False,)),
    (tensor_parallel, ()),
    *((tensor_parallel_in_the_wrong_order, (style,)) for style in STYLES),
    (torch_drifts_without_broadcast, ()),
    (torch_cannot_be_sharded_first, ()),
    (torch_weights_cannot_be_read_when_sharded, ()),
    (normalise_then_shard, ()),
    (one_entry_in_evaluation, ()),
    (shard_then_normalise, ()),
    (measured_and_projected, (sharded,)),
    (measured_and_projected, (parallelised,)),
    (penalised, ("fast", False)),
    (penalised, ("afp", True)),
]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_sharded_equals_dense(world):
    spawn(world, SCENARIOS)
