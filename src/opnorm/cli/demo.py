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
    help="Where the report and the two networks go.",
)
def demo(*, output: Path) -> None:
    """Train a small network with torch's spectral_norm, measure what it really did, and divide by the true norms.

    Takes under a minute on a CPU; the data (1,797 images of digits) comes with the package.
    \f

    Raises:
        CheckpointError: if the folder cannot be written to.
    """
    from rich.console import Console

    from opnorm import render
    from opnorm.auditing import audit
    from opnorm.checkpoint import replacing
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
    _print(story, console)
    from safetensors.torch import save_file

    for name, net in (("trained", story.trained), ("divided", story.divided)):
        with replacing(output / f"{name}.safetensors") as path:
            save_file(net.state_dict(), path)
    with replacing(output / "report.html") as path:
        path.write_text(render.to_html(audit(story.trained)), encoding="utf-8")
    console.print(f"Report: {output / 'report.html'}", style="bold", soft_wrap=True)
    console.print(f"Next:   opnorm audit {output / 'trained.safetensors'}", soft_wrap=True)
    console.print(
        f"        opnorm normalize {output / 'trained.safetensors'} -o {output / 'normalized.safetensors'}",
        soft_wrap=True,
    )


def _print(story: "Story", console: "Console") -> None:
    from opnorm.render.text import ceiling

    product = ceiling(story.product, 4)
    claimed, kept, images = story.claimed, story.kept, story.images

    def say(title: str, text: str) -> None:
        console.print(title, style="bold")
        console.print(text + "\n")

    say(
        "1. Train",
        f"A network of {len(story.layers)} layers learns 8 x 8 digits, each layer under torch's spectral_norm. The "
        "claim: every layer has norm 1, so the network is 1-Lipschitz. It gets "
        f"{claimed.accuracy:.1%} of {images} test images right.",
    )
    console.print("2. Measure", style="bold")
    console.print(_table(story))
    console.print(
        "torch divides a convolution by the norm of its reshaped kernel, which is not the norm of the convolution, and "
        "approaches even that from below. The true norms are proved.\n"
    )
    say(
        "3. What the claim was worth",
        "Of a 1-Lipschitz network one may promise: no change of an image that is shorter than its margin / sqrt(2) "
        f"changes the decision. Here that is a radius of {claimed.median_radius:.3g} (median). A simple attack within "
        f"these radii changes the decision for {claimed.broken} of {images} images.",
    )
    say(
        "4. Divide",
        "Each weight is divided by its proved norm, and each bias by the product of the norms up to it. ReLU passes "
        f"positive factors through, so only the scale of the outputs changes, by {product}: accuracy "
        f"{claimed.accuracy:.1%} before, {kept.accuracy:.1%} after. (With the biases left as they were: "
        f"{story.biases_kept:.1%}.) Now the network is 1-Lipschitz, by proof. What it promises is less and true: a "
        f"radius of {kept.median_radius:.3g} (median); the same attack changes {kept.broken} of {images} decisions.",
    )


def _table(story: "Story") -> "Table":
    from rich.table import Table

    from opnorm.render.text import ceiling, floor, shaped

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("weight", no_wrap=True)
    for heading in ("claimed", "true norm from", "to", "divided"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in story.layers:
        true = layer.true
        after = f"<= {ceiling(layer.divided.upper)}"
        table.add_row(layer.name, shaped(layer.shape), "1", floor(true.lower, 6), ceiling(true.upper, 6), after)
    table.add_section()
    table.add_row("network", "product", "1", "", f"<= {ceiling(story.product, 4)}", "<= 1", style="bold")
    return table
