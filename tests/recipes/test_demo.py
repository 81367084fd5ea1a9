"""The demo's numbers against independent ones, and its two outputs against its numbers."""

import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
import scipy.linalg
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from opnorm.cli.demo import print_story, write_story
from opnorm.data import digits
from opnorm.recipes.demo import Story, tell, to_html
from opnorm.recipes.demo.promise import promise
from opnorm.render.text import ceiling, floor

SHAPES = {"conv1": (1, 8, 8), "conv2": (8, 8, 8), "conv3": (8, 8, 8), "linear1": (256,), "linear2": (64,)}


@pytest.fixture(scope="module")
def story() -> Story:
    state = torch.get_rng_state()
    told = tell(epochs=2, method="fast")
    assert torch.equal(torch.get_rng_state(), state)
    return told


def _dense_norm(layer: nn.Module, shape: tuple[int, ...]) -> float:
    """The layer applied to every unit vector, and SciPy's largest singular value."""
    size = torch.Size(shape).numel()
    with torch.no_grad():
        twin = torch.nn.utils.skip_init(type(layer), **_arguments(layer)).double()
        twin.weight.copy_(layer.weight)
        twin.bias.zero_()
        columns = twin(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).flatten(1)
    return float(scipy.linalg.svdvals(columns.numpy())[0])


def _arguments(layer: nn.Module) -> dict[str, object]:
    if isinstance(layer, nn.Linear):
        return {"in_features": layer.in_features, "out_features": layer.out_features}
    return {key: getattr(layer, key) for key in ("in_channels", "out_channels", "kernel_size", "stride", "padding")}


def test_every_norm_is_the_true_one(story: Story) -> None:
    for network in story.networks:
        for name, found in network.norms.items():
            assert found.guarantee == "proved"
            true = _dense_norm(network.net.get_submodule(name), SHAPES[name])
            assert found.lower * (1 - 1e-12) <= true <= found.upper
    plain, torch_, ours = story.networks
    assert max(found.upper for found in ours.norms.values()) <= 1.0
    assert min(torch_.norms[name].lower for name in ("conv1", "conv2")) > 1.2
    assert plain.claim is plain.claimed is None


def test_the_bounds_are_in_order_and_the_claims_are_what_they_are(story: Story) -> None:
    for network in story.networks:
        bound = network.bound
        assert bound.guarantee == "proved"
        assert 0 < bound.lower <= bound.upper <= bound.product
        assert network.kept.constant == bound.upper and network.kept.broken == 0
    _, torch_, ours = story.networks
    assert torch_.bound.lower > 1.0 and torch_.claimed is not None and torch_.claimed.constant == 1.0
    assert ours.bound.upper <= 1.0 and ours.claimed is not None and ours.claimed.broken == 0


def test_the_attack_breaks_a_false_promise(story: Story) -> None:
    network = story.networks[1]
    assert promise(network.net, digits(), network.bound.lower / 20).broken > story.images / 2


def test_dividing_afterwards_keeps_the_decisions(story: Story) -> None:
    torch_, mended, images = story.networks[1], story.mended, digits().test_images
    assert (torch_.net(images).argmax(1) == mended.net(images).argmax(1)).float().mean() > 0.99
    torch.testing.assert_close(torch_.net(images), mended.net(images) * mended.shrunk, rtol=2e-3, atol=2e-3)
    assert mended.kept.broken == 0
    for name, shape in SHAPES.items():
        assert _dense_norm(mended.net.get_submodule(name), shape) <= 1.0


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.cells: list[str] = []
        self.loaded: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value for key, value in attrs if key in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        self.cells.append(data.strip())


def test_page_and_terminal_show_the_three_side_by_side(story: Story) -> None:
    page = _Words()
    page.feed(to_html(story))
    assert not page.loaded
    stream = StringIO()
    print_story(story, Console(file=stream, width=100))
    printed = stream.getvalue()
    assert max(map(len, printed.splitlines())) <= 100 and "…" not in printed
    for network in story.networks:
        bound = network.bound
        for shown in (floor(bound.lower, 4), ceiling(bound.upper, 4), ceiling(bound.product, 4)):
            assert shown in page.cells
            assert re.search(rf"^{network.name}.*(?<!\S){re.escape(shown)}(?!\S)", printed, re.MULTILINE)
        for found in network.norms.values():
            for shown in (floor(found.lower, 6), ceiling(found.upper, 6)):
                assert shown in page.cells and shown in printed.split()
    assert page.cells.count("1 ✗") == 1  # torch's claim for the network, and no other, is refuted


def test_the_files_hold_the_networks(story: Story, tmp_path: Path) -> None:
    write_story(story, tmp_path)
    for network in story.networks:
        stored, net = load_file(tmp_path / f"{network.name}.safetensors"), network.net.state_dict()
        assert stored.keys() == net.keys() and all(torch.equal(stored[key], net[key]) for key in net)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html", "plain.safetensors", "torch.safetensors", "opnorm.safetensors", "divided.safetensors",
    }  # fmt: skip
