"""From layers to the network: naive rules, the covariance calculus, and their proofs."""

from opnorm.certificate.network.region import Ball, Box, NormBall
from opnorm.network.bound import lipschitz
from opnorm.network.penalty import LipschitzPenalty
from opnorm.network.result import NetworkBound, NodeBound
from opnorm.network.rules import Builder, register_rule

__all__ = [
    "Ball",
    "Box",
    "Builder",
    "LipschitzPenalty",
    "NetworkBound",
    "NodeBound",
    "NormBall",
    "lipschitz",
    "register_rule",
]
