"""The story as one HTML file: the three networks side by side."""

from collections.abc import Sequence

from markupsafe import Markup
from matplotlib.axes import Axes

from opnorm._version import __version__
from opnorm.recipes.demo.story import Network, Story
from opnorm.recipes.demo.training import weighted
from opnorm.render.html import template
from opnorm.render.svg import INK, ROLE, plain_decades, svg

_APART = 0.2


def to_html(story: Story) -> str:
    """Return the page: what is claimed and proved of each network and of each of its layers, and how to read it."""
    names = list(story.networks[0].norms)
    return template("demo.html").render(
        networks=story.networks,
        torch=story.networks[1],
        mended=story.mended,
        images=story.images,
        layers=[
            (name, tuple(weighted(story.networks[0].net)[name].weight.shape), [n.norms[name] for n in story.networks])
            for name in names
        ],
        plots=[Markup(_constants(story.networks)), Markup(_layers(story.networks, names))],
        version=__version__,
    )


def _constants(networks: Sequence[Network]) -> str:
    """Draw between which bounds each network's constant lies, where its product bound is, and what is claimed."""

    def paint(axes: Axes) -> None:
        for place, network in enumerate(networks):
            bound, colour, row = network.bound, ROLE.format(place), -place
            axes.hlines(row, bound.lower, bound.upper, colors=colour, linewidth=9, alpha=0.85)
            axes.hlines(row, bound.upper, bound.product, colors=colour, linewidth=1.2)
            axes.plot(bound.product, row, marker="|", markersize=14, color=colour)
            if network.claim is not None:
                axes.plot(network.claim, row, marker="D", markersize=7, color=INK, markerfacecolor="none")
        axes.set_xscale("log")
        plain_decades(axes.xaxis, networks[0].bound.product)
        axes.set_yticks([-place for place in range(len(networks))], [network.name for network in networks])
        axes.set_ylim(0.6 - len(networks), 0.6)
        axes.set_xlabel("Lipschitz constant of the network")
        axes.grid(axis="x")

    return svg(paint, "What is claimed and what is proved of the constant of each network")


def _layers(networks: Sequence[Network], names: list[str]) -> str:
    """Draw the proved norm of every layer of every network."""
    places = range(len(names))

    def paint(axes: Axes) -> None:
        axes.axhline(1.0, color=INK, linewidth=0.9)
        for i, network in enumerate(networks):
            xs = [place + _APART * (i - (len(networks) - 1) / 2) for place in places]
            uppers = [network.norms[name].upper for name in names]
            axes.vlines(xs, 1.0, uppers, colors=ROLE.format(i), linewidth=3, alpha=0.45)
            axes.scatter(xs, uppers, c=ROLE.format(i), s=42, linewidths=0, zorder=3)
        axes.set_ylim(bottom=0.0)
        axes.set_xticks(places, names)
        axes.set_ylabel("operator norm")
        axes.grid(axis="y")

    return svg(paint, "The proved norm of every layer of each network")
