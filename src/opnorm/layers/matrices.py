"""The weight matrices of modules that hold several, by name."""

from functools import partial

from torch import Tensor, nn

from opnorm.errors import UnsupportedLayerError
from opnorm.layers.weights import read_weight

# In the order in which torch stacks them.
_LSTM, _GRU, _RNN = ("input", "forget", "cell", "output"), ("reset", "update", "new"), ("hidden",)
_GATES = {
    **dict.fromkeys((nn.LSTM, nn.LSTMCell), _LSTM),
    **dict.fromkeys((nn.GRU, nn.GRUCell), _GRU),
    **dict.fromkeys((nn.RNN, nn.RNNCell), _RNN),
}
SEVERAL = (nn.MultiheadAttention, *_GATES)
"""The classes of torch that hold several matrices."""


def matrices(module: nn.Module, *, gates: bool = False) -> dict[str, Tensor]:
    """Return the weight matrices of an attention or recurrent module, by name, for measuring them one by one.

    Args:
        module: a MultiheadAttention, LSTM, GRU or RNN, or a cell of one of them.
        gates: split each recurrent weight into its gates, named such as `weight_ih_l0.forget`. The norm of the whole
            weight is that of the map to all gates at once, and never below a gate's.

    Returns:
        For attention `q`, `k`, `v` (the fused `in_proj_weight` is split) and `out_proj`; for recurrent modules the
        weights by torch's names, `weight_ih_l0` and so on. Each of shape (outputs, inputs), detached.

    Raises:
        UnsupportedLayerError: if the module is none of these.
        WeightError: if a weight holds NaN or infinite values or has a dtype without a norm.

    Example:
        >>> import torch
        >>> from opnorm.layers import matrices
        >>> {name: tuple(w.shape) for name, w in matrices(torch.nn.MultiheadAttention(8, 2)).items()}
        {'q': (8, 8), 'k': (8, 8), 'v': (8, 8), 'out_proj': (8, 8)}
        >>> list(matrices(torch.nn.LSTM(3, 5)))
        ['weight_ih_l0', 'weight_hh_l0']
    """
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module)
    names = next((names for cls, names in _GATES.items() if isinstance(module, cls)), None)
    if names is None:
        known = ", ".join(cls.__name__ for cls in SEVERAL)
        raise UnsupportedLayerError(f"{type(module).__name__} is none of the modules with several matrices: {known}")
    weights = {name: read_weight(module, name) for name in _recurrent_names(module)}
    if not gates:
        return weights
    return {
        name if len(names) == 1 or "_hr" in name else f"{name}.{gate}": block
        for name, weight in weights.items()
        for gate, block in _blocks(name, weight, names)
    }


def _blocks(name: str, weight: Tensor, gates: tuple[str, ...]) -> list[tuple[str, Tensor]]:
    """The gates' rows; the projection `weight_hr` of an LSTM has none."""
    return [("", weight)] if "_hr" in name else list(zip(gates, weight.chunk(len(gates)), strict=True))


def _recurrent_names(module: nn.Module) -> list[str]:
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    flat: list[str] = module._flat_weights_names  # type: ignore[assignment] # a module's attributes are Tensor | Module
    return [name for name in flat if name.startswith("weight_")]


def _attention(module: nn.MultiheadAttention) -> dict[str, Tensor]:
    read = partial(read_weight, module)
    if module._qkv_same_embed_dim:
        parts = zip("qkv", read("in_proj_weight").chunk(3), strict=True)
    else:
        parts = zip("qkv", map(read, ("q_proj_weight", "k_proj_weight", "v_proj_weight")), strict=True)
    return {**dict(parts), "out_proj": read_weight(module.out_proj)}
