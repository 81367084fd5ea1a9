"""`opnorm demo`: the whole story in under a minute."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from opnorm.cli.progress import progress_bar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from opnorm.recipes.demo import Story

WIDE = 100


@click.command()
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    default=Path("opnorm-demo"),
    show_default=True,
    help="Where the report and the networks go.",
)
def demo(*, output: Path) -> None:
    """Train one small network plain, with torch's spectral_norm and with opnorm's, and measure what is true of each.

    Takes under a minute on a CPU; the data (1,797 images of digits) comes with the package.
    \f

    Raises:
        CheckpointError: if the folder cannot be written to.
    """
    from rich.console import Console

    from opnorm.errors import CheckpointError
    from opnorm.recipes.demo import tell

    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{output}: cannot be written ({error.strerror})") from error
    with progress_bar() as progress:
        story = tell(progress)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    print_story(story, console)
    write_story(story, output)
    console.print(f"Report: {output / 'report.html'}", style="bold", soft_wrap=True)
    trained, normalized = output / "torch.safetensors", output / "normalized.safetensors"
    console.print(f"Next:   opnorm audit {trained}", soft_wrap=True)
    console.print(f"        opnorm normalize {trained} -o {normalized}", soft_wrap=True)


def write_story(story: "Story", output: Path) -> None:
    """Write the report and the weights of every network."""
    from safetensors.torch import save_file

    from opnorm.checkpoint import replacing
    from opnorm.recipes.demo import to_html

    nets = {network.name: network.net for network in story.networks} | {"divided": story.mended.net}
    for name, net in nets.items():
        with replacing(output / f"{name}.safetensors") as path:
            save_file(net.state_dict(), path)
    with replacing(output / "report.html") as path:
        path.write_text(to_html(story), encoding="utf-8")


def print_story(story: "Story", console: "Console") -> None:
    """Print the tables and what they say."""
    from opnorm.render.text import ceiling, floor

    plain, torch, ours = story.networks
    mended, images = story.mended, story.images
    assert torch.claimed is not None

    def say(title: str, text: str) -> None:
        console.print(title, style="bold")
        console.print(text + "\n")

    say(
        "1. Train",
        f"One network of {len(plain.norms)} layers learns 8 x 8 digits three times, from the same start: plain, with "
        "torch's spectral_norm and with opnorm's. The claim of the latter two: every layer has norm 1, so the network "
        "is 1-Lipschitz.",
    )
    console.print("2. Measure each layer", style="bold")
    console.print(_layers(story))
    console.print(
        "All norms are proved. torch divides a convolution by the norm of its reshaped kernel, which is not the norm "
        "of the convolution, and approaches even that from below.\n"
    )
    console.print("3. Bound each network", style="bold")
    console.print(_networks(story))
    console.print(
        "The lower bound is attained by two explicit images; the upper bounds are proved. Of an L-Lipschitz network "
        "one may promise: no change of an image shorter than margin / (sqrt(2) L) flips its decision (the radii are "
        f"medians). With torch's claim, L = 1, that is a radius of {floor(torch.claimed.median_radius, 3)}, and a "
        f"simple attack within these radii flips {torch.claimed.broken} of {images} decisions. Within the radii of the "
        f"proved bounds it flips {plain.kept.broken}, {torch.kept.broken} and {ours.kept.broken}.\n"
    )
    say(
        "4. Divide what is trained already",
        "torch's network again, each weight divided by its proved norm, and each bias by the product of the norms up "
        f"to it: the outputs shrink by {ceiling(mended.shrunk, 4)}, the decisions stay (accuracy {torch.accuracy:.1%} "
        f"before, {mended.accuracy:.1%} after; with the biases as they were, {mended.biases_kept:.1%}), and the "
        "network is 1-Lipschitz by proof.",
    )


def _layers(story: "Story") -> "Table":
    from opnorm.recipes.demo.training import weighted
    from opnorm.render.text import ceiling, floor, shaped

    table = _table("layer", "weight")
    for network in story.networks:
        headings = ["from", "to"] if network.claim is None else ["claimed", "from", "to"]
        for heading, above in zip(headings, [network.name, "", ""], strict=False):
            table.add_column(f"{above}\n{heading}", justify="right", no_wrap=True)
    for name, layer in weighted(story.networks[0].net).items():
        cells = []
        for network in story.networks:
            found = network.norms[name]
            cells += [] if network.claim is None else [f"{network.claim:g}"]
            cells += [floor(found.lower, 6), ceiling(found.upper, 6)]
        table.add_row(name, shaped(tuple(layer.weight.shape)), *cells)
    return table


def _networks(story: "Story") -> "Table":
    from opnorm.render.text import ceiling, floor

    table = _table("network")
    for heading in ("accuracy", "claimed", "lower bound", "best upper bound", "product bound", "radius proved"):
        table.add_column(heading, justify="right", no_wrap=True)
    for network in story.networks:
        bound = network.bound
        table.add_row(
            network.name,
            f"{network.accuracy:.1%}",
            "-" if network.claim is None else f"{network.claim:g}",
            floor(bound.lower, 4),
            ceiling(bound.upper, 4),
            ceiling(bound.product, 4),
            floor(network.kept.median_radius, 3),
        )
    return table


def _table(*left: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in left:
        table.add_column(heading, no_wrap=True, vertical="bottom")
    return table
