"""Embeddings: the matrix that acts on one-hot vectors."""

from torch import nn

from opnorm.errors import NotLinearError, UnsupportedLayerError
from opnorm.layers.registry import Shape, register_layer
from opnorm.layers.weights import read_weight
from opnorm.operators import Dense


@register_layer(nn.Embedding)
def embedding(module: nn.Embedding, input_shape: Shape | None) -> Dense:
    """Return the matrix of shape (embedding_dim, num_embeddings) that acts on one token's one-hot vector.

    This is one of two readings. The other, how far apart two tokens' vectors are for two *different* tokens, is a
    largest distance between rows and no operator norm. A sequence of tokens is a Kronecker product with an identity,
    so `input_shape` does not matter. `padding_idx` keeps a row from being trained and changes nothing here.

    Raises:
        NotLinearError: if `max_norm` is set, which shortens rows on every call.
    """
    _check_fixed(module)
    return Dense(read_weight(module).mT)


@register_layer(nn.EmbeddingBag)
def embedding_bag(module: nn.EmbeddingBag, input_shape: Shape | None) -> Dense:
    """Return the matrix that acts on the counts of the tokens in one bag, for `mode="sum"`.

    Raises:
        NotLinearError: if `max_norm` is set, or the mode is "max".
        UnsupportedLayerError: for `mode="mean"`, which divides by the size of the bag.
    """
    _check_fixed(module)
    if module.mode == "max":
        raise NotLinearError('EmbeddingBag with mode="max" is not linear')
    if module.mode != "sum":
        raise UnsupportedLayerError(
            'EmbeddingBag with mode="mean" divides by the size of the bag, which its weight does not tell; measure '
            "module.weight.mT as a matrix: it acts on the tokens' relative frequencies"
        )
    weight = read_weight(module)
    if module.padding_idx is not None:  # that token is left out of the sum
        weight = weight.clone()
        weight[module.padding_idx] = 0
    return Dense(weight.mT)


def _check_fixed(module: nn.Embedding | nn.EmbeddingBag) -> None:
    if module.max_norm is not None:
        raise NotLinearError(
            f"{type(module).__name__} with max_norm={module.max_norm} shortens rows on every call; measure "
            "module.weight.mT as a matrix, after a call if the shortened rows are meant"
        )
