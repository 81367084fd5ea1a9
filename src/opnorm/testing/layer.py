"""What the rule of a layer promises: the operator is the map that the module applies."""

import copy
import warnings

import torch
from torch import Tensor, nn

from opnorm.layers import to_operator
from opnorm.operators import LinearOperator
from opnorm.testing.operator import check_operator
from opnorm.testing.twin import ORACLE, dense_twin


def check_layer(module: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Check that a layer's operator is the map that the layer applies, and that it keeps every operator's promises.

    The layer is applied in evaluation mode, in double precision and on copies, so that it stays as it is.

    Args:
        module: a layer with a rule; of floating-point or complex parameters.
        input_shape: the shape of one sample without the batch, small enough for the matrix to be built.

    Raises:
        AssertionError: if the operator is another map, or breaks a promise.

    Example:
        >>> import torch
        >>> from opnorm.testing import check_layer
        >>> check_layer(torch.nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 5, 4))
        >>> check_layer(torch.nn.AvgPool1d(3), (2, 7))
    """
    measured = copy.deepcopy(module).eval()
    before = {name: value.clone() for name, value in measured.state_dict().items()}
    operator = to_operator(measured, input_shape)
    changed = [name for name, value in measured.state_dict().items() if not torch.equal(before[name], value)]
    if changed:
        raise AssertionError(f"{type(module).__name__}: its rule changes the module: {', '.join(changed)}")
    check_operator(operator)
    check_same_map(operator, measured, input_shape)


def check_same_map(operator: LinearOperator, module: nn.Module, input_shape: tuple[int, ...]) -> None:
    """Check that an operator has the matrix of a module, biases removed.

    Leading axes of the input may be missing from the operator, as those of a linear layer are: there the module must
    be the Kronecker product of an identity with the operator.

    Raises:
        AssertionError: if it has another matrix.
    """
    name = type(module).__name__
    is_complex = operator.dtype.is_complex
    theirs = _module_matrix(module, input_shape, is_complex)
    ours = dense_twin(operator.apply, operator.in_shape, is_complex=is_complex)
    majorant = dense_twin(operator.absolute().apply, operator.in_shape)
    copies, left_over = divmod(theirs.shape[1], max(ours.shape[1], 1))
    if left_over or input_shape[len(input_shape) - len(operator.in_shape) :] != operator.in_shape:
        raise AssertionError(f"{name}: the operator takes {operator.in_shape}, the module {input_shape}")
    identity = torch.eye(copies, dtype=torch.float64)
    ours, majorant = torch.kron(identity.to(ours.dtype), ours), torch.kron(identity, majorant)
    if ours.shape != theirs.shape:
        raise AssertionError(
            f"{name}: the operator has the shape {tuple(ours.shape)}, the module {tuple(theirs.shape)}"
        )
    if not ours.numel():
        return
    # Interpolation weights cancel: their rounding errors are relative to the largest weight of a row.
    difference = (ours - theirs).abs() - ORACLE * majorant.amax(1, keepdim=True)
    if float(difference.max()) > 0:
        place = divmod(int(difference.argmax()), ours.shape[1])
        raise AssertionError(
            f"{name}: the operator is another map than the module: {ours[place].item()} against "
            f"{theirs[place].item()} in row {place[0]}, column {place[1]}"
        )


def _module_matrix(module: nn.Module, input_shape: tuple[int, ...], is_complex: bool) -> Tensor:
    twin = copy.deepcopy(module)
    with torch.no_grad(), warnings.catch_warnings():
        # torch warns of new complex modules and of the copies that padding="same" makes.
        warnings.simplefilter("ignore", UserWarning)
        for name, parameter in twin.named_parameters():
            if name.rpartition(".")[2].startswith("bias"):
                parameter.zero_()  # f(x) - f(0) alone would lose small weights beside a bias
        twin = twin.to(torch.complex128 if is_complex else torch.float64)
        return dense_twin(twin, input_shape, is_complex=is_complex)
