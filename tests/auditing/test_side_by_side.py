"""Small tensors are audited in several threads: nothing of the report may show it."""

import threading

import pytest
import torch

import opnorm
from opnorm.auditing.side_by_side import side_by_side
from opnorm.checkpoint import Entry
from opnorm.errors import OpnormError

SHAPES = [(3, 5), (700, 600), (40, 513), (4,), (512, 9), (6, 6), (2, 3, 3, 3)]
"""Small, large, small, no matrix, small, small, a kernel."""


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def entries() -> list[Entry]:
    return [Entry(str(i), (str(i),), s, "float32", torch.Size(s).numel(), load=int) for i, s in enumerate(SHAPES)]


@pytest.mark.usefixtures("two_threads")
def test_results_keep_the_order_and_threads_their_number():
    seen: dict[str, int] = {}
    begun: list[str] = []

    def run(entry: Entry) -> str:
        seen[entry.name] = torch.get_num_threads()
        return entry.name

    assert side_by_side(run, entries(), lambda entry: begun.append(entry.name)) == [str(i) for i in range(len(SHAPES))]
    assert seen == {"0": 1, "1": 2, "2": 1, "3": 2, "4": 1, "5": 1, "6": 2}
    assert begun == ["2", "4", "5", "0", "1", "3", "6"]
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_thread_ends_the_audit():
    started = threading.Event()

    def run(entry: Entry) -> None:
        started.set()
        raise OpnormError(f"tensor {entry.name} cannot be read")

    with pytest.raises(OpnormError, match="tensor 2 cannot be read"):
        side_by_side(run, entries(), lambda _: None)
    assert started.is_set()
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_the_report_is_that_of_one_thread():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.ModuleDict(
        {f"m{i}": torch.nn.Linear(*shape, bias=i % 2 == 0) for i, shape in enumerate([(30, 7), (600, 520), (8, 8)])}
    )
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    beside = opnorm.audit(model)
    torch.set_num_threads(1)
    alone = opnorm.audit(model)
    assert [row.name for row in beside.rows] == [row.name for row in alone.rows]
    assert [item.name for item in beside.skipped] == [item.name for item in alone.skipped]
    for one, other in zip(beside.rows, alone.rows, strict=True):
        assert max(one.enclosure.lower, other.enclosure.lower) <= min(one.enclosure.upper, other.enclosure.upper)
        assert one.gap <= 1e-4
