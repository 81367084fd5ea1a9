"""The forward of a normalised layer in training: the function of the weight that is read, whoever looks or steps in."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import opnorm

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 6)),
    "one sample": (lambda: nn.Linear(6, 5), (6,)),
    "sequence": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 40, 3, padding=(1, 0)), (2, 3, 8, 8)),
    "small image": (lambda: nn.Conv2d(3, 40, 3, padding=1), (1, 3, 2, 2)),
    "one image": (lambda: nn.Conv2d(3, 4, 3), (3, 8, 8)),
    "padding by name": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 8, 8)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 8, 8)),
    "strided groups": (lambda: nn.Conv2d(4, 4, 3, stride=2, dilation=2, groups=2), (2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 2, 3, bias=False), (1, 2, 4, 4, 4)),
}


def normalised(name):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    return opnorm.spectral_norm(build()).train(), torch.randn(shape, requires_grad=True)


def with_what_is_read(name, layer, x):
    """The output of torch's own layer with the weight and the bias that are read."""
    tensors = {"weight": layer.weight.clone()} | ({} if layer.bias is None else {"bias": layer.bias})
    return torch.func.functional_call(LAYERS[name][0](), tensors, (x,))


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradients_are_those_of_the_weight_that_is_read(name):
    layer, x = normalised(name)
    target = torch.randn_like(layer(x))
    wanted = [x, *layer.parameters()]
    found, read = (
        (out, *torch.autograd.grad((out * target).sum(), wanted))
        for out in (layer(x), with_what_is_read(name, layer, x))
    )
    torch.testing.assert_close(found, read)


def parametrized(layer):
    parametrize.register_parametrization(layer, "bias", nn.Tanh())


def computed(layer):
    bias = layer.bias.detach()
    del layer.bias
    layer.register_buffer("bias", 2 * bias)


def in_front(layer):
    layer.__dict__["bias"] = layer.bias.detach() + 1


def weight_parametrized_once_more(layer):
    parametrize.register_parametrization(layer, "weight", nn.Tanh())


def in_evaluation(layer):
    layer.parametrizations.weight[0].training = False


@pytest.mark.parametrize("change", [parametrized, computed, in_front, weight_parametrized_once_more, in_evaluation])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_what_is_read_is_what_is_used(name, change):
    layer, x = normalised(name)
    change(layer)
    torch.testing.assert_close(layer(x), with_what_is_read(name, layer, x))


@pytest.mark.parametrize(
    ("name", "cls", "method"),
    [("linear", nn.Linear, "forward"), ("conv2d", nn.Conv2d, "forward"), ("conv2d", nn.Conv2d, "_conv_forward")],
)
def test_a_forward_that_is_replaced_is_called(name, cls, method, monkeypatch):
    layer, x = normalised(name)
    known = getattr(cls, method)
    before = layer(x)
    monkeypatch.setattr(cls, method, lambda *args: 2 * known(*args))
    torch.testing.assert_close(layer(x), 2 * before)


class Seen(TorchFunctionMode):
    """Notes what is called."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.called = [*getattr(self, "called", []), func]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "operation"), [("linear", F.linear), ("conv2d", F.conv2d)])
def test_who_watches_calls_sees_the_layers(name, operation):
    layer, x = normalised(name)
    with Seen() as seen:
        layer(x)
    assert operation in seen.called


class Counting(torch.Tensor):
    """A tensor whose class has its own idea of what is called with it."""

    called = ()

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.called = (*cls.called, func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(("name", "operation"), [("linear", F.linear), ("conv2d", F.conv2d)])
def test_the_inputs_class_sees_the_operation(name, operation, monkeypatch):
    monkeypatch.setattr(Counting, "called", ())
    layer, x = normalised(name)
    layer(x.detach().as_subclass(Counting))
    assert operation in Counting.called
