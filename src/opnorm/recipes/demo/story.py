"""Train the three networks, measure them, and compare what is claimed of each with what is proved."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from opnorm._enclosure import Enclosure
from opnorm.data import digits
from opnorm.network import NetworkBound, lipschitz
from opnorm.recipes.demo.mending import Mended, layer_norms, mend
from opnorm.recipes.demo.promise import Promise, accuracy, promise
from opnorm.recipes.demo.training import train_plain, train_with_opnorm, train_with_torch

EPOCHS = 30
WAYS = {"plain": train_plain, "torch": train_with_torch, "opnorm": train_with_opnorm}
STARTS = 16
SECONDS = 6.0


@dataclass(frozen=True)
class Network:
    """One trained network, as plain layers, and what is known of it.

    Attributes:
        name: "plain", "torch" or "opnorm": how it was normalised in training.
        net: the network that would be deployed.
        accuracy: share of the test images that are classified correctly.
        claim: the norm that each layer is said to have, and so the constant of the network; None without a claim.
        norms: the proved norm of each layer with weights.
        bound: of the Lipschitz constant: product of the steps, best proved upper bound, and a lower bound that two
            explicit images attain.
        kept: what the proved bound promises.
        claimed: what the claim promises.
    """

    name: str
    net: nn.Module
    accuracy: float
    claim: float | None
    norms: dict[str, Enclosure]
    bound: NetworkBound
    kept: Promise
    claimed: Promise | None


@dataclass(frozen=True)
class Story:
    """All that the demo shows.

    Attributes:
        networks: trained plain, with torch's `spectral_norm` and with opnorm's, in this order.
        mended: torch's network, divided after the training.
        images: number of test images.
    """

    networks: tuple[Network, Network, Network]
    mended: Mended
    images: int


def tell(
    progress: Callable[[int, int, str], None] | None = None, *, epochs: int = EPOCHS, seed: int = 0, method: str = "afp"
) -> Story:
    """Train, measure, bound and attack three networks, and mend the second; half a minute.

    Args:
        progress: called with steps done, all steps, and what comes next.
        epochs: of each training.
        seed: of the start and of the order of the images, the same for all three; torch's own generator is left as it
            was.
        method: the last search for the bound of a network, see `opnorm.lipschitz`.

    Returns:
        The numbers and the networks.
    """
    done, total = 0, len(WAYS) * (epochs + 1)

    def said(what: str) -> Callable[[], None]:
        def step() -> None:
            nonlocal done
            if progress is not None:
                progress(done, total, what)
            done += 1

        return step

    def network(name: str) -> Network:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = WAYS[name](data, epochs, said(f"training: {name}"))
            said(f"bounding: {name}")()
            bound = lipschitz(net, data.test_images[:STARTS], method=method, time_budget=SECONDS)
        claim = None if name == "plain" else 1.0
        return Network(
            name,
            net,
            accuracy(net, data),
            claim,
            layer_norms(net, data.test_images[:1]),
            bound,
            promise(net, data, bound.upper),
            None if claim is None else promise(net, data, claim),
        )

    data = digits()
    networks = network("plain"), network("torch"), network("opnorm")
    return Story(networks, mend(networks[1].net, data, networks[1].norms), len(data.test_labels))
