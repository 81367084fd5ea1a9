"""Sharded training equals one process for what shards cut badly: rows that do not divide, empty shards, several
matrices in one weight, kernels, layers that are sharded one by one; and for all that reads or writes such weights."""

import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import opnorm
from distributed.processes import Collectives, bit_identical, spawn, whole
from opnorm.parametrize import estimate


def uneven():
    return nn.Sequential(nn.Linear(9, 17), nn.ReLU(), nn.Linear(17, 1)), torch.randn(8, 9)


def images():
    layers = nn.Conv2d(4, 10, 3, padding=1, groups=2), nn.ReLU(), nn.ConvTranspose2d(10, 15, 3, 2, 1, groups=5)
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(15, 1, 3, bias=False)), torch.randn(8, 4, 5, 5)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attend = nn.Embedding(11, 6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.follow, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        return self.head(self.follow(self.attend(x, x, x)[0])[0][:, -1])


def tokens():
    return Tokens(), torch.randint(11, (8, 4))


def made(kind):
    torch.manual_seed(0)
    return kind()


LEAVES = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding, nn.MultiheadAttention, nn.LSTM)


def spread(model, layers=True, **options):
    for layer in [layer for layer in model.modules() if isinstance(layer, LEAVES)] if layers else ():
        if not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):  # attention reads its parameters
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def both(kind, order, layers=True, normalise=opnorm.normalize, **options):
    """A dense model, a sharded one, and a batch."""
    (dense, x), (sharded, _) = made(kind), made(kind)
    normalise(dense)
    if order == "normalise first":
        return dense, spread(normalise(sharded), layers, **options), x
    return dense, normalise(spread(sharded, layers, **options)), x


def part(x, parts=None):
    """What this process trains on: neighbours share one part where there are fewer parts than processes."""
    world = dist.get_world_size()
    count = len(x) // (parts or world)
    return x[dist.get_rank() * (parts or world) // world * count :][:count]


def train(model, x, steps=5):
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, eps=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x).float().square().mean() - model(x.flip(-1)).float().mean()
        loss.backward()
        optimizer.step()


def trained(dense, sharded, x, parts=None, steps=5, **close):
    train(dense.train(), x, steps)
    train(sharded.train(), part(x, parts), steps)
    close = {"rtol": 1e-4, "atol": 2e-5} | close
    for (name, expected), found in zip(dense.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(whole(found), expected, msg=lambda text, name=name: f"{name}: {text}", **close)
    for rule in (module for module in sharded.modules() if hasattr(module, "iterations")):
        assert bit_identical(rule._estimate.triple.sigma)


def reshard(model):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def evaluated(dense, sharded, x):
    dense.eval()
    sharded.eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(sharded(x)), dense(x), rtol=1e-4, atol=1e-5)
    reshard(sharded)


def weights(model):
    return {f"{path}.{name}": getattr(module, name) for path, module in model.named_modules()
            for name in getattr(module, "parametrizations", {})}  # fmt: skip


def fsdp(kind, order, layers, reshard_after_forward):
    """Training, evaluation, reading outside of forward, the monitor, folding, and training without opnorm again."""
    dense, sharded, x = both(kind, order, layers, reshard_after_forward=reshard_after_forward)
    trained(dense, sharded, x)
    for training in (True, False):
        dense.train(training), sharded.train(training)
        expected, found = weights(dense), weights(sharded)
        for name, value in expected.items():
            torch.testing.assert_close(whole(found[name]).detach(), value.detach(), rtol=1e-3, atol=1e-4)
        expected, found = opnorm.Monitor(dense)(), opnorm.Monitor(sharded)()
        assert {name: pytest.approx(value, rel=1e-3, abs=1e-3) for name, value in expected.items()} == found
        assert opnorm.update(sharded) == opnorm.update(dense)
    evaluated(dense, sharded, x)
    folded, expected = opnorm.fold(sharded), opnorm.fold(dense)
    assert [type(module) for module in folded.modules()] == [type(module) for module in expected.modules()]
    assert not any(isinstance(value, DTensor) for value in folded.state_dict().values())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), expected(x), rtol=1e-4, atol=1e-5)
    trained(dense, sharded, x, steps=2, rtol=1e-3)
    for model in (dense, sharded):
        for layer in list(model.modules()):
            if hasattr(layer, "parametrizations"):
                opnorm.remove_spectral_norm(layer, None)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    evaluated(dense, sharded, x)
    trained(dense, sharded, x, steps=2, rtol=1e-3)


def in_bfloat16(kind, order):
    """The weight that FSDP2 casts is divided in that dtype, and within K in it."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    dense, sharded, x = both(kind, order, mp_policy=policy)
    trained(dense, sharded, x, rtol=0.1, atol=2e-2)
    used = []
    for layer in (layer for layer in sharded.eval().modules() if isinstance(layer, nn.Linear)):
        layer.register_forward_pre_hook(lambda layer, _: used.append(layer.weight.detach().clone()))
    with torch.no_grad():
        sharded(x)
    assert used
    for weight in used:
        assert weight.dtype is torch.bfloat16
        assert 0.98 < np.linalg.norm(weight.double().numpy(), 2) <= 1


def with_learned_scale():
    def scaled(model):
        return opnorm.normalize(model, learn_scale=True)

    dense, sharded, x = both(uneven, "normalise first", normalise=scaled)
    trained(dense, sharded, x)
    evaluated(dense, sharded, x)
    torch.testing.assert_close(whole(sharded[2].weight), dense[2].weight.materialised())
    with pytest.raises(opnorm.errors.ArgumentError, match="normalise first, then fully_shard"):
        both(uneven, "shard first", normalise=scaled)


def after_a_forward(kind):
    """A dense and a sharded model, in which a forward has left whole parameters, and the batch."""
    (dense, x), (sharded, _) = made(kind), made(kind)
    spread(sharded, layers=False)
    with torch.no_grad():
        dense(x), sharded(x)
    return dense, sharded, x


def normalised_after_a_forward(kind, example):
    """The run of `normalize` leaves whole parameters in the model too."""
    dense, sharded, x = after_a_forward(kind)
    for model in (dense, sharded):
        opnorm.normalize(model, x) if example else opnorm.normalize(model)
    if not example:
        reshard(sharded)
    trained(dense, sharded, x)
    evaluated(dense, sharded, x)


def projected_after_a_forward(kind, proved):
    dense, sharded, _ = after_a_forward(kind)
    for model in (dense, sharded):
        opnorm.Projector(model, 0.3).step_(proved=proved)
    reshard(sharded)
    for expected, found in zip(dense.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(whole(found), expected, rtol=1e-4, atol=1e-5)


def tied(order):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x).mean(1))

    def normalise(model):
        opnorm.spectral_norm(model.head)
        return model

    dense, sharded, x = both(lambda: (Model(), torch.randint(11, (8, 4))), order, layers=False, normalise=normalise)
    trained(dense, sharded, x)
    evaluated(dense, sharded, x)


def accumulated(order):
    dense, sharded, x = both(uneven, order)
    for last in (False, False, True):
        sharded.set_requires_gradient_sync(last)
        sharded(part(x)).square().mean().backward()
        dense(x).square().mean().backward()
    for expected, found in zip(dense.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(whole(found.grad), expected.grad, rtol=1e-4, atol=1e-5)


def saved_and_loaded(kind, order):
    dense, sharded, x = both(kind, order)
    trained(dense, sharded, x)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    dcp.save(get_model_state_dict(sharded), checkpoint_id=folder[0])
    _, other, _ = both(kind, order)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=folder[0])
    set_model_state_dict(other, state)
    evaluated(dense, other, x)
    full = {name: whole(value) for name, value in get_model_state_dict(other).items()}
    alone = opnorm.normalize(made(kind)[0])
    alone.load_state_dict(full)
    evaluated(dense, alone, x)


def ddp(options):
    dense, model = opnorm.normalize(made(tokens)[0]), opnorm.normalize(made(tokens)[0])
    parallel = nn.parallel.DistributedDataParallel(model, **options)
    x = made(tokens)[1]
    for one in (dense, parallel):  # one forward a step, as static_graph asks
        optimizer = torch.optim.Adam(one.parameters(), 1e-3, eps=1e-3)
        for _ in range(5):
            optimizer.zero_grad()
            one(part(x) if one is parallel else x).square().mean().backward()
            optimizer.step()
    for expected, found in zip(dense.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    evaluated(dense, parallel, x)


def wide():
    return nn.Sequential(nn.Linear(65, 97), nn.ReLU(), nn.Linear(97, 33)), torch.randn(8, 65)


def parallelised(model, mesh=None):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"0": ColwiseParallel(output_layouts=Replicate()), "2": RowwiseParallel(input_layouts=Replicate())}
    return parallelize_module(model, mesh, plan)


def tensor_parallel(options):
    (dense, x), (parallel, _) = made(wide), made(wide)
    opnorm.normalize(dense, **options)
    opnorm.normalize(parallelised(parallel), **options)
    trained(dense, parallel, x, parts=1)
    evaluated(dense, parallel, x)
    folded = opnorm.fold(parallel)
    with torch.no_grad():
        torch.testing.assert_close(whole(folded(x)), dense(x), rtol=1e-4, atol=1e-5)
    opnorm.remove_spectral_norm(parallel[0])
    assert isinstance(parallel[0].weight, DTensor)


def mesh_of(*names):
    return init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=names)


def parallel_and_sharded(order, layers, options):
    """FSDP2 over the rows of a mesh, of what is tensor parallel over its columns."""
    mesh = mesh_of("dp", "tp")
    (dense, x), (model, _) = made(wide), made(wide)
    opnorm.normalize(dense, **options)
    parallelised(model, mesh["tp"])
    wraps = [lambda: opnorm.normalize(model, **options), lambda: spread(model, layers, mesh=mesh["dp"])]
    for wrap in wraps if order == ORDERS[0] else reversed(wraps):
        wrap()
    for _ in range(2):
        trained(dense, model, x, parts=mesh["dp"].size(), steps=3)
        evaluated(dense, model, x)
    for name, weight in weights(model).items():
        assert 0.9 < np.linalg.norm(whole(weight).detach().double().numpy(), 2) <= 1, name
    expected, found = opnorm.Monitor(dense)(), opnorm.Monitor(model)()
    assert {name: pytest.approx(value, rel=1e-3, abs=1e-3) for name, value in expected.items()} == found
    folded = opnorm.fold(model)
    assert [weight.placements for weight in (folded[0].weight, folded[2].weight)] == [(Shard(0),), (Shard(1),)]
    with torch.no_grad():
        torch.testing.assert_close(whole(folded(x)), dense(x), rtol=1e-4, atol=1e-5)


def hybrid(kind, order):
    """FSDP2 within the rows of a mesh, and copies of the model in its columns."""
    dense, sharded, x = both(kind, order, mesh=mesh_of("replicate", "shard"))
    trained(dense, sharded, x)
    evaluated(dense, sharded, x)
    folded = opnorm.fold(sharded)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), dense(x), rtol=1e-4, atol=1e-5)


def what_travels_in_fsdp(order):
    found = []
    for normalise in (opnorm.normalize, lambda model: model):
        _, model, x = both(tokens, order, normalise=normalise)
        train(model, part(x), 1)
        with Collectives() as seen:
            train(model, part(x), 2)
        found.append(seen.found)
    assert found[0] == found[1]


def what_travels_in_tensor_parallel():
    model, x = made(wide)
    opnorm.normalize(parallelised(model))
    train(model, x, 1)
    with Collectives() as seen:
        train(model, x, 1)
    assert (
        max(entries for _, entries in seen.found) <= 100 * 8
    )  # eight vectors, padded to equal parts; a weight has 6305


def of_old_weights(scenario, *arguments):
    """Vectors move at some values only, from the third on."""
    before, estimate.YOUNG = estimate.YOUNG, 2
    try:
        scenario(*arguments)
    finally:
        estimate.YOUNG = before


ORDERS = "normalise first", "shard first"
KINDS = uneven, images, tokens
SCENARIOS = [
    *((fsdp, (kind, order, kind is not uneven, order == ORDERS[0])) for kind in KINDS for order in ORDERS),
    (fsdp, (uneven, ORDERS[0], True, True)),
    (fsdp, (uneven, ORDERS[1], True, False)),
    *((in_bfloat16, (tokens, order)) for order in ORDERS),
    (with_learned_scale, ()),
    *((normalised_after_a_forward, (kind, example)) for kind in (uneven, images) for example in (False, True)),
    *((projected_after_a_forward, (images, proved)) for proved in (False, True)),
    *((scenario, (order,)) for scenario in (tied, accumulated, what_travels_in_fsdp) for order in ORDERS),
    *((saved_and_loaded, (images, order)) for order in ORDERS),
    *((ddp, ({option: True},)) for option in ("find_unused_parameters", "static_graph", "gradient_as_bucket_view")),
    (tensor_parallel, ({},)),
    (tensor_parallel, ({"learn_scale": True},)),
    (tensor_parallel, ({"mode": "clip", "lipschitz": 0.7},)),
    (what_travels_in_tensor_parallel, ()),
    *((parallel_and_sharded, (order, order == ORDERS[0], {})) for order in ORDERS),
    (parallel_and_sharded, (ORDERS[0], False, {"learn_scale": True})),
    *((hybrid, (kind, order)) for kind, order in zip((uneven, images), ORDERS, strict=True)),
    *((of_old_weights, (hybrid, kind, order)) for kind, order in zip(KINDS[1:], ORDERS, strict=True)),
    (of_old_weights, (tensor_parallel, {})),
]  # fmt: skip


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_shards_of_any_cut(world):
    spawn(world, SCENARIOS)
