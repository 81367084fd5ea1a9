"""What `opnorm.lipschitz` returns: the bounds of a network and of each of its steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from opnorm._enclosure import Guarantee
from opnorm.certificate.network.file import NetworkCertificate
from opnorm.network.lower import Pair
from opnorm.network.table import table_of


@dataclass(frozen=True)
class NodeBound:
    """One step of the network.

    Attributes:
        place: where it comes from: qualified module name and operation.
        kind: `input`, `linear`, `activation`, `join` (sums and concatenations), or `opaque` where only its constant is
            known.
        shape: of its result, for one sample.
        sources: positions among the nodes of what it reads.
        constant: how much the step can stretch what it reads.
        contribution: by how much it changes the running bound: `bound` over the largest bound of its sources. Smaller
            than `constant` where a BatchNorm is better taken together with the convolution before it.
        bound: of the step as a function of the network's inputs, by the naive rules.
        note: why the constant is what it is, where that is not obvious.
    """

    place: str
    kind: str
    shape: tuple[int, ...]
    sources: tuple[int, ...]
    constant: float
    contribution: float
    bound: float
    note: str = ""


@dataclass(frozen=True, eq=False)
class NetworkBound:
    """An enclosure of a network's Lipschitz constant in the Euclidean norms of all its inputs and outputs.

    Attributes:
        upper: the best upper bound.
        lower: attained by `pair`; 0 where none was found. `pair.guarantee` says whether the rounding of its evaluation
            was bounded (`proved`), or the quotient is that of a float64 evaluation, less 1e-7 of it (`estimate`).
        product: the composition of the naive rules.
        pairwise: upper bounds for the difference of each pair of outputs, shape (n, n); None where the calculus did
            not reach the outputs one by one.
        nodes: one for each step, in the order of computation.
        guarantee: of `upper`, `product` and `pairwise`.
        method: what gave `upper`.
        pair: two inputs that attain `lower`, or None.
        remarks: what a reader should know, such as why a tighter method was not used.
    """

    upper: float
    lower: float
    product: float
    pairwise: Tensor | None
    nodes: tuple[NodeBound, ...]
    guarantee: Guarantee
    method: str
    pair: Pair | None
    remarks: tuple[str, ...]
    _certify: Callable[[], NetworkCertificate]

    def certificate(self) -> NetworkCertificate:
        """The certificate of the bound, to be saved and verified by others.

        Its claim is `upper`, or a little more: the verifier proves norms, and derives slopes on a region, in its own
        way. On a region the multipliers are searched for once more, within half of the bound's time.

        Raises:
            CertificateError: if the bound is an estimate, infinite, or rests on a constant that the verifier cannot
                derive on the region; the message names the operation.
        """
        return self._certify()

    @property
    def gap(self) -> float:
        """Upper over lower, minus 1; infinite where no lower bound was found."""
        return 0.0 if self.upper == 0.0 else self.upper / self.lower - 1 if self.lower > 0 else math.inf

    def __float__(self) -> float:
        """The upper bound."""
        return self.upper

    def __str__(self) -> str:
        """A table that follows the model's structure."""
        return table_of(self)
