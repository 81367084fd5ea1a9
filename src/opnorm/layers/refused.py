"""Layers without an operator norm, each with the reason and the way out."""

from torch import nn

from opnorm.errors import NotLinearError, SeveralMatricesError, UnsupportedLayerError
from opnorm.layers.matrices import SEVERAL, matrices
from opnorm.layers.registry import Shape, register_layer
from opnorm.operators import LinearOperator

_ACTIVATIONS = (
    *(nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU),
    *(nn.LogSigmoid, nn.LogSoftmax, nn.Mish, nn.PReLU, nn.ReLU, nn.RReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softmax),
    *(nn.Softmax2d, nn.Softmin, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold),
)
_POOLING = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.LPPool1d, nn.LPPool2d, nn.LPPool3d),
    *(nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d),
)


def not_linear(module: nn.Module, input_shape: Shape | None) -> LinearOperator:
    """Refuse a non-linear layer.

    Raises:
        NotLinearError: always.
    """
    raise NotLinearError(
        f"{type(module).__name__} is not linear, so it has no operator norm; it can only have a Lipschitz bound"
    )


def several(module: nn.Module, input_shape: Shape | None) -> LinearOperator:
    """Refuse a module of several matrices, and list them.

    Raises:
        SeveralMatricesError: always.
    """
    found = ", ".join(f"{name} {tuple(weight.shape)}" for name, weight in matrices(module).items())
    raise SeveralMatricesError(
        f"{type(module).__name__} is not linear and holds several matrices: {found}. Take one with "
        f"opnorm.layers.matrices(module)[name], or the stored weight itself, {_attribute(module)}"
    )


def _attribute(module: nn.Module) -> str:
    if isinstance(module, nn.MultiheadAttention):
        fused = "module.in_proj_weight (q, k and v stacked)" if module._qkv_same_embed_dim else "module.q_proj_weight"
        return f"{fused} or module.out_proj.weight"
    return f"such as module.{next(iter(matrices(module)))} (its gates stacked)"


@register_layer(nn.Bilinear)
def bilinear(module: nn.Bilinear, input_shape: Shape | None) -> LinearOperator:
    """Refuse: linear in each of two arguments is not linear.

    Raises:
        NotLinearError: always.
    """
    raise NotLinearError(
        "Bilinear is linear in each of its two arguments and not in both, so it has no operator norm; with one "
        "argument fixed to b it is the matrix torch.einsum('oij,j->oi', module.weight, b)"
    )


@register_layer(nn.Transformer)
@register_layer(nn.TransformerEncoder)
@register_layer(nn.TransformerDecoder)
@register_layer(nn.TransformerEncoderLayer)
@register_layer(nn.TransformerDecoderLayer)
@register_layer(nn.ModuleList)
@register_layer(nn.ModuleDict)
def container(module: nn.Module, input_shape: Shape | None) -> LinearOperator:
    """Refuse a module of several layers.

    Raises:
        UnsupportedLayerError: always.
    """
    names = [
        name for name, part in module.named_modules() if name and next(part.parameters(recurse=False), None) is not None
    ]
    raise UnsupportedLayerError(
        f"{type(module).__name__} is made of several layers; measure them one by one: {', '.join(names) or 'none'}"
    )


_cls: type[nn.Module]
for _cls in (*_ACTIVATIONS, *_POOLING):
    register_layer(_cls)(not_linear)
for _cls in SEVERAL:
    register_layer(_cls)(several)
