"""Raw weights that notice every write, also those that torch's version counter does not count.

The counter misses what goes through `.data` and what fused optimizers write. Reading a weight in full before each use
would cost up to half of a small batch's product, so these writes are noticed where they are made.
"""

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

Stamp = tuple[object, int, int, int]
_DATA: Any = torch._C.TensorBase.data


def counted() -> AbstractContextManager[object]:
    """Make tensors that are kept for later: those of inference mode count no writes, and autograd refuses them."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class Step:
    """The token of a weight from an optimizer's step on."""


class Record:
    """What is known about the writes to one weight.

    Attributes:
        token: replaced by a new one where values are replaced, or written without being counted.
        own: shares the weight's version counter.
        lent: shares the version counter of all that `.data` returned; None before that.
        before: the counts at which a copy was made.
    """

    __slots__ = ("__weakref__", "before", "lent", "own", "token")

    def __init__(self, weight: Tensor, lent: Tensor | None = None) -> None:
        """Begin to count."""
        self.token, self.own, self.lent, self.before = object(), weight.detach(), lent, (0, 0)

    def counts(self) -> tuple[int, int]:
        """Return how many writes both counters have seen."""
        return self.before[0] + self.own._version, self.before[1] + (self.lent._version if self.lent is not None else 0)


class Watched(nn.Parameter):
    """A parameter on the CPU whose `stamp` changes with every write that Python can see.

    To torch it is a parameter like any other: it has no `__torch_function__`, and what is computed from it is plain.
    `.data` still has a version counter of its own, as in torch, but one that all who hold it share.
    """

    _record: Record

    def __new__(cls, data: Tensor, requires_grad: bool = True) -> "Watched":
        """Wrap a tensor, as a deep copy does."""
        self: Watched = super().__new__(cls, data, requires_grad)
        _begin(self)
        return self

    @property
    def data(self) -> Tensor:
        """As torch's; writes through what it returns count, however long it is kept."""
        if torch.compiler.is_compiling():
            return self.detach()
        record = self._record
        if record.lent is not None and not _lies_alike(record.lent, self):  # `set_`, `t_` and their like
            record.token, record.lent = object(), None
        if record.lent is None:
            lent: Tensor = _DATA.__get__(self)
            if lent.is_inference():  # it counts nothing
                record.token = object()
                return lent
            record.lent = lent
        return record.lent.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        _DATA.__set__(self, value)
        if _can_watch(value):
            _begin(self, value.detach())
        else:
            unwatch(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Watched":
        """As a parameter's; what was known of the values is known of the copy's."""
        known = id(self) in memo
        with counted():
            copied: Watched = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        if not known:
            record, mine = copied._record, self._record
            record.token = copy.deepcopy(mine.token, memo)
            (writes, lent), (begun, _) = mine.counts(), record.counts()
            record.before = writes - begun, lent
        return copied

    def __repr__(self) -> str:  # type: ignore[override]
        """As a parameter's."""
        return repr(self._ordinary())

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As a parameter's."""
        return self._ordinary().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def _ordinary(self) -> nn.Parameter:
        plain = nn.Parameter(self.detach(), self.requires_grad)
        plain.__dict__.update({name: value for name, value in vars(self).items() if name != "_record"})
        return plain


_by_place: "WeakValueDictionary[int, Record]" = WeakValueDictionary()


def _begin(weight: Watched, lent: Tensor | None = None) -> None:
    if "_record" in vars(weight):
        weight._record.token = None  # who still looks at this one learns that it is over
    weight._record = _by_place[weight.data_ptr()] = Record(weight, lent)


def _lies_alike(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())


def _can_watch(weight: Tensor) -> bool:
    """Not where other processes write; nor on accelerators, whose optimizers are slow for types they do not know."""
    shared: bool = weight.is_shared()  # type: ignore[no-untyped-call]
    return weight.device.type == "cpu" and not shared and not weight.is_inference()


def watch(weight: Tensor) -> None:
    """Begin to notice writes, where that is possible."""
    if type(weight) not in {nn.Parameter, Watched}:
        return
    if not _can_watch(weight):
        unwatch(weight)
    elif type(weight) is nn.Parameter:
        weight.__class__ = Watched
        _begin(cast(Watched, weight))
    elif type(weight) is Watched and not _lies_alike(weight._record.own, weight):
        _begin(weight)


def unwatch(weight: Tensor) -> None:
    """Make a weight an ordinary parameter again."""
    if type(weight) is Watched:
        weight._record.token = None
        del weight._record
        cast(Tensor, weight).__class__ = nn.Parameter


def stamp(weight: Tensor) -> Stamp | None:
    """Return what is equal only as long as nobody wrote to a weight; None where writes may go unnoticed.

    Compiled graphs see a weight as a tensor at the same place.
    """
    place = weight.data_ptr()
    record = weight._record if type(weight) is Watched else _by_place.get(place) if type(weight) is Tensor else None
    if record is None or not _lies_alike(record.own, weight):
        return None
    return record.token, *record.counts(), place


def carried(old: Stamp | int, new: Stamp | int) -> bool:
    """Whether a weight at another place may be the same: a copy, or one that nobody watches."""
    return isinstance(old, int) or isinstance(new, int) or old[:3] == new[:3]


def only_stepped(old: Stamp | int, new: Stamp | int) -> bool:
    """Whether an optimizer has stepped in between, and the weight lies in the same place."""
    if isinstance(old, int) or isinstance(new, int):
        return False
    return isinstance(new[0], Step) and old[0] is not new[0] and old[3] == new[3]


def _stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """What fused steps write is not counted. This must not become part of a compiled step."""
    if torch.compiler.is_compiling():
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # A hook before this one may have set the gradient to None already.
            if type(parameter) is Watched and (parameter.grad is not None or group.get("fused")):
                parameter._record.token = Step()


register_optimizer_step_post_hook(_stepped)
