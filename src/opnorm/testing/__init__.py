"""The public contract suite: does an operator, or a layer's rule, agree with its dense twin?

One call checks one case (`check_operator`, `check_layer`); a subclass of `OperatorContract` or `LayerContract` gives
pytest one test for each promise. Nothing here needs pytest to be installed.
"""

from opnorm.testing.contract import LayerContract, OperatorContract
from opnorm.testing.layer import check_layer
from opnorm.testing.operator import check_operator
from opnorm.testing.twin import dense_twin, singular_value

__all__ = ["LayerContract", "OperatorContract", "check_layer", "check_operator", "dense_twin", "singular_value"]
