"""Certificates made to deceive: none is accepted, none takes memory before its sizes are checked."""

import dataclasses
import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import opnorm
from network.networks import Lambda, mlp
from network.refused import assert_refused
from opnorm.certificate.network.file import NetworkCertificate, _fingerprint, digest
from opnorm.certificate.network.maps import Convolution, Gather, Matrix
from opnorm.certificate.network.program import Elementwise, Input, Linear, Opaque, Program, Step, Sum
from opnorm.errors import CertificateError, CertificateFormatError, OpnormError

Edit = Callable[[NetworkCertificate], NetworkCertificate]


def model(act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(6, 8, 8, 3, act=act)


def certified(net: nn.Module, method: str = "fast", shape: tuple[int, ...] = (6,)) -> NetworkCertificate:
    return opnorm.lipschitz(net, torch.randn(4, *shape), method=method).certificate()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    certified(model()).save(tmp_path / "net.cert")
    return tmp_path / "net.cert"


def parts(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(str(path), framework="pt") as opened:
        return dict(opened.metadata()), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


# ------------------------------------------------------------------ what is not what was written


def test_a_flipped_byte_anywhere_is_found(file: Path) -> None:
    whole = file.read_bytes()
    for position in (*range(0, len(whole), 61), len(whole) - 1):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(CertificateError):
            opnorm.verify(file, model().state_dict())


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_no_certificate(file: Path, share: float) -> None:
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(CertificateFormatError):
        opnorm.verify(file, model().state_dict())


HEADERS = {
    "larger than the file": struct.pack("<Q", 2**62) + b"{",
    "half a gigabyte": struct.pack("<Q", 2**29) + b"{}",
    "a tensor that is not there": struct.pack("<Q", 80)
    + b'{"multiplier.0":{"dtype":"F64","shape":[999999999999],"data_offsets":[0,8]}}'.ljust(80)
    + b"\0" * 8,
    "no JSON": struct.pack("<Q", 8) + b"{{{{{{{{",
    "pickle": b"\x80\x04\x95" + b"\0" * 20,
    "empty": b"",
}


@pytest.mark.parametrize("name", HEADERS)
def test_sizes_are_checked_before_memory_is_taken(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(HEADERS[name])
    tracemalloc.start()
    with pytest.raises(CertificateFormatError):
        opnorm.verify(tmp_path / "x", model().state_dict())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def test_other_safetensors_files_are_told_apart(tmp_path: Path) -> None:
    save_file(model().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CertificateFormatError, match="format"):
        opnorm.verify(tmp_path / "w.safetensors", tmp_path / "w.safetensors")


METADATA: dict[str, dict[str, Any]] = {
    "no steps": {"steps": "[]"},
    "steps are no list": {"steps": "{}"},
    "another type of step": {"steps": '[{"type": "Pickle"}]'},
    "a field too many": {"steps": '[{"type": "Input", "sources": [], "shape": [6], "label": "x", "code": "1"}]'},
    "a size that is text": {"steps": '[{"type": "Input", "sources": [], "shape": ["6"], "label": "x"}]'},
    "a size that is true": {"steps": '[{"type": "Input", "sources": [], "shape": [true], "label": "x"}]'},
    "a negative size": {"steps": '[{"type": "Input", "sources": [], "shape": [-6], "label": "x"}]'},
    "a huge size": {"steps": '[{"type": "Input", "sources": [], "shape": [1e99], "label": "x"}]'},
    "the same key twice": {"outputs": '{"a": 1, "a": 2}'},
    "deep": {"outputs": "[" * 100_000},
    "NaN": {"upper": "nan"},
    "infinite": {"upper": "inf"},
    "negative": {"upper": (-1.0).hex()},
    "too large a number": {"upper": "0x1p99999"},
    "another calculus": {"calculus": "magic"},
    "another format": {"format": "opnorm.network/1"},
    "digests of numbers": {"digests": '{"0.weight": 3}'},
    "norms of texts": {"norms": '[["a", "b"]]'},
    "one key more": {"more": "x"},
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_that_says_something_else(name: str, file: Path) -> None:
    metadata, tensors = parts(file)
    metadata = {**metadata, **METADATA[name]}
    del metadata["sha256"]
    save_file(tensors, file, metadata={**metadata, "sha256": _fingerprint(metadata, tensors)})
    with pytest.raises(CertificateFormatError):
        NetworkCertificate.load(file)


@pytest.mark.parametrize("tensor", [torch.ones(8), torch.ones(8, dtype=torch.bfloat16), torch.ones(8).cfloat()])
def test_tensors_of_another_dtype(tensor: Tensor, file: Path) -> None:
    metadata, tensors = parts(file)
    tensors["multiplier.0"] = tensor
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(CertificateFormatError, match="float64"):
        NetworkCertificate.load(file)


# ------------------------------------------------------------------ a false claim with its own hash in order


def multipliers(change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda c: dataclasses.replace(c, multipliers=tuple(change(s.clone()) for s in c.multipliers))


def steps(change: Callable[[tuple[Step, ...]], tuple[Step, ...]]) -> Edit:
    return lambda c: dataclasses.replace(c, program=dataclasses.replace(c.program, steps=change(c.program.steps)))


def at(kind: type[Step], /, **values: Any) -> Edit:
    """The certificate with other fields in its first step of a kind."""

    def change(old: tuple[Step, ...]) -> tuple[Step, ...]:
        first = next(i for i, s in enumerate(old) if isinstance(s, kind))
        return (*old[:first], dataclasses.replace(old[first], **values), *old[first + 1 :])

    return steps(change)


def lower(c: NetworkCertificate) -> NetworkCertificate:
    return dataclasses.replace(c, upper=c.upper * (1 - 1e-6))


def without(c: NetworkCertificate, position: int) -> NetworkCertificate:
    """The certificate without a step, and of the shorter program's digests."""
    old = c.program.steps
    kept = [s for i, s in enumerate(old) if i != position]
    moved = tuple(
        dataclasses.replace(s, sources=tuple(j - (j >= position) for j in s.sources)) if i else s
        for i, s in enumerate(kept)
    )
    return dataclasses.replace(c, program=dataclasses.replace(c.program, steps=moved, outputs=(len(moved) - 1,)))


def own_weight(c: NetworkCertificate) -> NetworkCertificate:
    """A constant under the name of a weight: the real one would never be read."""
    program = dataclasses.replace(c.program, constants={"0.weight": torch.zeros(8, 6, dtype=torch.float64)})
    digests = {name: value for name, value in c.digests.items() if name != "0.weight"}
    return dataclasses.replace(c, program=program, digests=digests, upper=1e-3)


def _set(s: Tensor, value: float) -> Tensor:
    s[0] = value
    return s


FALSE: dict[str, Edit] = {
    "a smaller bound": lower,
    "zero": lambda c: dataclasses.replace(c, upper=0.0),
    "multipliers NaN": multipliers(lambda s: _set(s, float("nan"))),
    "multipliers infinite": multipliers(lambda s: _set(s, float("inf"))),
    "multipliers negative": multipliers(lambda s: -s),
    "multipliers zero": multipliers(lambda s: _set(s, 0.0)),
    "multipliers subnormal": multipliers(lambda s: s * 0 + 5e-324),
    "multipliers tiny": multipliers(lambda s: s * 1e-3),
    "multipliers huge": multipliers(lambda s: s * 0 + 1e308),
    "multipliers of another size": multipliers(lambda s: s[:-1]),
    "a stage too few": lambda c: dataclasses.replace(c, multipliers=c.multipliers[:1]),
    "a stage twice": lambda c: dataclasses.replace(c, multipliers=(*c.multipliers, c.multipliers[0])),
    "no last layer": lambda c: without(c, 5),
    "slopes of one half": at(Elementwise, high=torch.tensor(0.5, dtype=torch.float64)),
    "slopes NaN": at(Elementwise, high=torch.tensor(float("nan"), dtype=torch.float64)),
    "slopes reversed": at(
        Elementwise, low=torch.tensor(1.0, dtype=torch.float64), high=torch.tensor(0.0, dtype=torch.float64)
    ),
    "slopes of another shape": at(
        Elementwise, low=torch.zeros(2, 4, dtype=torch.float64), high=torch.ones(2, 4, dtype=torch.float64)
    ),
    "an unknown activation": at(Elementwise, kind="magic"),
    "an activation without its parameters": at(Elementwise, kind="leaky_relu"),
    "a size of one": at(Elementwise, shape=(1,)),
    "reads itself": at(Elementwise, sources=(2,)),
    "reads from the end": at(Elementwise, sources=(-1,)),
    "reads nothing": at(Elementwise, sources=()),
    "another map": at(Linear, map=Matrix((6,), (8,), "4.weight")),
    "a map with a negative rounding": at(Linear, map=Matrix((6,), (8,), "0.weight", rounded=-99)),
    "an input that reads": at(Input, sources=(0,)),
    "an input that comes late": steps(lambda old: (*old, Input((), (3,), "y"))),
    "no outputs": lambda c: dataclasses.replace(c, program=dataclasses.replace(c.program, outputs=())),
    "an output that is not there": lambda c: dataclasses.replace(
        c, program=dataclasses.replace(c.program, outputs=(99,))
    ),
    "its own weight": own_weight,
    "digests of others": lambda c: dataclasses.replace(c, digests={**c.digests, "1.weight": "0"}),
    "the naive rules without norms": lambda c: dataclasses.replace(c, calculus="naive", multipliers=()),
    "Fourier space for a vector": lambda c: dataclasses.replace(c, calculus="fourier"),
    "norms beside multipliers": lambda c: dataclasses.replace(c, norms={(1,): 0.1}),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_false_certificate_is_not_accepted(name: str, tmp_path: Path) -> None:
    net = model()
    false = FALSE[name](certified(net))
    assert_refused(false, net.state_dict(), tmp_path / "false.cert")


NORMS: dict[str, Callable[[dict[tuple[int, ...], float]], dict[tuple[int, ...], float]]] = {
    "one smaller": lambda n: n | {(1,): n[1,] * (1 - 1e-6)},
    "one missing": lambda n: {k: v for k, v in n.items() if k != (3,)},
    "NaN": lambda n: n | {(1,): float("nan")},
    "negative": lambda n: n | {(1,): -1.0},
    "infinite": lambda n: n | {(1,): float("inf")},
    "of an activation": lambda n: n | {(2,): 0.1},
    "of steps that do not follow": lambda n: n | {(1, 3): 0.1},
    "of no step": lambda n: n | {(77,): 0.1},
    "of three": lambda n: n | {(1, 1, 1): 0.1},
}


@pytest.mark.parametrize("name", NORMS)
def test_false_norms_are_not_accepted(name: str) -> None:
    net = model()
    good = certified(net, "naive")
    assert opnorm.verify(good, net.state_dict()).upper == good.upper
    with pytest.raises(CertificateError):
        opnorm.verify(dataclasses.replace(good, norms=NORMS[name](good.norms)), net.state_dict())


WEIGHTS: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "transposed": lambda s: s | {"2.weight": s["2.weight"].mT.contiguous()},
    "reshaped": lambda s: s | {"0.weight": s["0.weight"].reshape(6, 8)},
    "flattened": lambda s: s | {"0.weight": s["0.weight"].flatten()},
    "swapped": lambda s: s | {"0.weight": s["2.weight"], "2.weight": s["0.weight"]},
    "one bit": lambda s: s | {"0.weight": torch.nextafter(s["0.weight"], torch.tensor(9.0))},
    "one negated": lambda s: s | {"0.weight": -s["0.weight"]},
    "complex": lambda s: s | {"0.weight": torch.complex(s["0.weight"], 5 * s["0.weight"])},
    "sparse": lambda s: s | {"0.weight": s["0.weight"].to_sparse()},
    "meta": lambda s: s | {"0.weight": s["0.weight"].to("meta")},
    "missing": lambda s: {k: v for k, v in s.items() if k != "0.weight"},
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_other_weights_are_not_accepted(name: str) -> None:
    net = model()
    with pytest.raises(CertificateError, match="weight"):
        opnorm.verify(certified(net), WEIGHTS[name](net.state_dict()))


def test_integers_that_float64_cannot_hold_have_no_digest() -> None:
    with pytest.raises(CertificateError, match=r"2\^53"):
        digest("w", torch.tensor([2**53 + 1]))


def test_slopes_per_element_are_compared_with_the_channel_that_they_are_in() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.PReLU(2))
    net[1].weight.data = torch.tensor([0.5, 3.0])
    good = certified(net, shape=(1, 2, 2))
    low = torch.tensor([[0.5, 1.0]] * 2, dtype=torch.float64).expand(2, 2, 2)  # along the wrong axis
    high = torch.tensor([[1.0, 3.0]] * 2, dtype=torch.float64).expand(2, 2, 2)
    with pytest.raises(CertificateError, match="narrower"):
        opnorm.verify(at(Elementwise, low=low, high=high)(good), net.state_dict())


def test_what_ties_the_steps_to_the_model() -> None:
    """The weights alone do not say which activation stands between them: with the model, a lie about it is found."""
    gelu, relu = model(nn.GELU), model(nn.ReLU)
    lie = certified(relu)
    found = opnorm.verify(lie, gelu.state_dict())  # the same weights
    assert "the steps of the certificate are what the network computes" in found.assumptions
    with pytest.raises(CertificateError, match=r"not of this model: step 2 .*relu.*gelu"):
        opnorm.verify(lie, gelu)
    assert opnorm.verify(lie, relu).assumptions == ()


def test_tensors_of_its_own_are_taken_on_trust_and_said() -> None:
    torch.manual_seed(0)
    net = Lambda(lambda x, a: torch.relu(x @ a.weight.T), nn.Linear(5, 5))
    found = opnorm.verify(certified(net, shape=(5,)), net.state_dict())
    assert any("is stated in the certificate" in line for line in found.assumptions)
    wrong = certified(net, shape=(5,))
    constants = {name: t * 0.5 if t.is_floating_point() else t for name, t in wrong.program.constants.items()}
    lie = dataclasses.replace(wrong, program=dataclasses.replace(wrong.program, constants=constants))
    with pytest.raises(CertificateError):
        opnorm.verify(lie, net)


def test_an_input_after_a_stage_is_not_taken_for_its_result() -> None:
    """`y - relu(x)` as if y were relu(x): the base of the calculus has the size that the second input would have."""
    shape = (4,)
    flat = torch.zeros((), dtype=torch.float64)
    program = Program(
        (
            Input((), shape, "x"),
            Elementwise((0,), shape, "relu", flat, flat + 1, "relu"),
            Input((), shape, "y"),
            Sum((1, 2), shape, "difference", (1.0, -1.0)),
            Sum((3, 0), shape, "kept", (1.0, 1e-9)),
        ),
        (4,),
    )
    lie = NetworkCertificate(1e-3, "dense", program, (torch.ones(4, dtype=torch.float64),), {})
    with pytest.raises(CertificateError, match="comes first"):
        opnorm.verify(lie, {})


def test_what_reads_nothing_is_not_taken_for_the_last_channel() -> None:
    """An index of -1 is a zero; on images of one point it once named the last channel."""
    index = torch.tensor([0, -1])
    program = Program(
        (
            Input((), (2, 1, 1), "x"),
            Linear((0,), (2, 1, 1), "take", Gather((2, 1, 1), (2, 1, 1), "index")),
            Sum((0, 1), (2, 1, 1), "difference", (1.0, -1.0)),
        ),
        (2,),
        {"index": index},
    )
    for calculus in ("fourier", "dense"):
        with pytest.raises(CertificateError):
            opnorm.verify(NetworkCertificate(0.5, calculus, program, (), {}), {})


def test_a_circular_kernel_wider_than_its_image_adds_up_taps() -> None:
    conv = Convolution((1, 2), (1, 2), "w", (3,), (1,), ((1, 1),), (1,), circular=True)
    assert conv.units > 0
    assert dataclasses.replace(conv, in_shape=(1, 4), out_shape=(1, 4)).units == 0


def test_a_program_without_the_weights_says_so() -> None:
    net = model()
    empty = Program((Input((), (6,), "x"), Sum((0,), (6,), "same", (1.0,))), (1,))
    found = opnorm.verify(NetworkCertificate(1.1, "dense", empty, (), {}), net.state_dict())
    assert found.read == ()
    assert set(found.unread) == set(net.state_dict())


HUGE: dict[str, tuple[Step, ...]] = {
    "a vector": (Input((), (2**40,), "x"), Opaque((0,), (2,), "f", 1.0, "")),
    "an image": (Input((), (1, 2**15, 2**15), "x"), Opaque((0,), (2,), "f", 1.0, "")),
    "channels": (Input((), (2**20, 4, 4), "x"), Opaque((0,), (2,), "f", 1.0, "")),
    "padding": (
        Input((), (1, 3, 3), "x"),
        Linear(
            (0,),
            (1, 1, 1),
            "conv",
            Convolution((1, 3, 3), (1, 1, 1), "k", (1, 1), (2**21,) * 2, ((2**20, 2**20 - 3),) * 2, (1, 1)),
        ),
    ),
    "dilation": (
        Input((), (1, 3, 3), "x"),
        Linear(
            (0,),
            (1, 4, 4),
            "conv",
            Convolution((1, 3, 3), (1, 4, 4), "w", (2, 2), (1, 1), ((2**20, 2**20),) * 2, (2**21 - 1,) * 2),
        ),
    ),
    "an index": (Input((), (6,), "x"), Linear((0,), (2**30,), "take", Gather((6,), (2**30,), "index"))),
}


@pytest.mark.parametrize(
    ("name", "calculus"),
    [
        *((name, calculus) for name in HUGE for calculus in ("dense", "fourier")),
        *((name, "naive") for name, parts in HUGE.items() if isinstance(parts[1], Linear)),
    ],
)
def test_stated_sizes_take_no_memory(name: str, calculus: Any) -> None:
    weights = {"k": torch.ones(1, 1, 1, 1), "w": torch.ones(1, 1, 2, 2)}
    constants = {"index": torch.zeros(3, dtype=torch.int64)} if name == "an index" else {}
    program = Program(HUGE[name], (len(HUGE[name]) - 1,), constants)
    read = {
        n: digest(n, weights[n]) for s in program.steps if isinstance(s, Linear) for n in s.map.names if n in weights
    }
    norms = {(1,): 5.0} if calculus == "naive" else {}
    hostile = NetworkCertificate(9.0, calculus, program, (torch.ones(1, dtype=torch.float64),), read, norms)
    hostile = dataclasses.replace(hostile, multipliers=()) if calculus == "naive" else hostile
    with pytest.raises(OpnormError):
        opnorm.verify(hostile, weights)


def test_json_of_a_layer_certificate_is_read_as_such(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"format": "opnorm-certificate"}))
    with pytest.raises(CertificateFormatError, match="schema"):
        opnorm.verify(tmp_path / "x.json", {})
