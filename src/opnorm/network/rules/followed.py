"""Which operations of torch are followed by value, not by their differences alone.

After any other the program says that an unknown constant was added, so that nothing is concluded from its values.
"""

from collections.abc import Container
from typing import Any

from opnorm.graph import Node, Ref

_WHOLE = frozenset({
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "addmm",
    "matmul", "mm", "bmm", "batch_norm", "_native_batch_norm_legit_no_training", "layer_norm", "native_layer_norm",
    "rms_norm", "group_norm", "native_group_norm", "instance_norm", "add", "add_", "sub", "sub_", "rsub", "neg", "neg_",
    "mul", "mul_", "div", "div_", "mean", "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "cumsum", "square", "pow", "cat", "stack",
    "concat", "relu", "relu_", "relu6", "relu6_", "sigmoid", "sigmoid_", "tanh", "tanh_", "log_sigmoid", "hardsigmoid",
    "hardsigmoid_", "selu", "selu_", "hardswish", "hardswish_", "silu", "silu_", "mish", "mish_", "abs", "atan", "erf",
    "tanhshrink", "gelu", "leaky_relu", "leaky_relu_", "elu", "elu_", "prelu", "clone", "contiguous", "detach", "alias",
    "to", "_to_copy", "dropout", "feature_dropout", "alpha_dropout", "detach_", "type_as", "lift_fresh_copy",
    "dropout_", "positive", "view", "_unsafe_view", "reshape", "flatten", "unflatten", "permute", "transpose", "t",
    "unsqueeze", "squeeze", "slice", "select", "narrow", "expand", "flip", "roll", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "movedim", "repeat", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "getitem",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
    "replication_pad3d", "pad", "constant_pad_nd", "index_select",
})  # fmt: skip
"""Operations of torch that are followed by value."""


_PADS = frozenset({"aten.pad.default", "aten.constant_pad_nd.default"})
_JOINS = frozenset({"cat", "concat", "stack"})


def whole(node: Node, varied: Container[str]) -> bool:
    """Whether the steps of a node and its shifts say everything that it computes.

    Args:
        node: the operation.
        varied: names of the nodes that are steps of the program.
    """
    name = node.op.split(".")[1] if "." in node.op else node.op
    if node.op in _PADS and filled_with(node) != 0:
        return False
    if name in _JOINS and not all(isinstance(part, Ref) and part.name in varied for part in node.args[0]):
        return False
    return name in _WHOLE and node.op.startswith(("aten.", "getitem"))


def filled_with(node: Node) -> Any:
    """What a padding writes around a tensor; the other modes copy elements."""
    place = 3 if node.op == "aten.pad.default" else 2
    value = node.args[place] if len(node.args) > place else node.kwargs.get("value", 0)
    return 0 if value is None else value
