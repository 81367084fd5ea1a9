"""The certificate of a network's Lipschitz bound: what the network is, what was chosen, and its proof."""

from opnorm.certificate.network.check import Verified, verify_network
from opnorm.certificate.network.file import NetworkCertificate

__all__ = ["NetworkCertificate", "Verified", "verify_network"]
