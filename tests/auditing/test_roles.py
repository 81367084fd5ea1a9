"""How tensors of a state dict are read: a table of names and shapes that real checkpoints use."""

import pytest

from opnorm.auditing.roles import Reading, Unread, parse_roles, read
from opnorm.errors import ArgumentError

READ = [
    ("fc.weight", (3, 4), "linear", 0),
    ("lm_head.weight", (50, 4), "linear", 0),
    ("lora_A", (3, 4), "matrix", 0),
    ("block.mlp.c_fc.kernel", (3, 4), "linear", 0),
    ("weight", (1, 4), "linear", 0),
    ("conv.weight", (8, 3, 3, 3), "conv2d", 0),
    ("features.0.weight", (8, 3, 3, 3), "conv2d", 0),
    ("encoder.conv1.weight", (8, 3, 5), "conv1d", 0),
    ("mixer.conv1d.weight", (8, 1, 4), "conv1d", 0),
    ("final_conv.weight", (1, 128, 1), "conv1d", 0),
    ("net.3.weight", (8, 3, 3, 3, 3), "conv3d", 0),
    ("embeddings.word_embeddings.weight", (100, 8), "embedding", 0),
    ("model.embed_tokens.weight", (100, 8), "embedding", 0),
    ("transformer.wte.weight", (100, 8), "embedding", 0),
    ("pos_embed", (1, 197, 8), "embedding", 0),
    ("attn.in_proj_weight", (24, 8), "attention", 3),
    ("attn.q_proj_weight", (8, 6), "attention", 0),
    ("attn.out_proj.weight", (8, 8), "linear", 0),
    ("rnn.weight_hh_l0", (32, 8), "lstm", 0),
    ("rnn.weight_ih_l0", (32, 5), "lstm", 0),
    ("gru.weight_hh_l0_reverse", (24, 8), "gru", 0),
    ("gru.weight_ih_l0_reverse", (24, 5), "gru", 0),
    ("old.weight_ih_l0", (8, 5), "rnn", 0),
    ("experts.gate_up_proj", (4, 8, 6), "experts", 4),
]
SHAPES = {name: shape for name, shape, *_ in READ} | {"old.weight_hh_l0": (8, 8)}


@pytest.mark.parametrize(("name", "shape", "role", "parts"), READ, ids=[case[0] for case in READ])
def test_tensors_that_are_one_linear_map_or_several(name: str, shape: tuple[int, ...], role: str, parts: int) -> None:
    reading = read(name, shape, SHAPES)
    assert isinstance(reading, Reading)
    assert (reading.role, len(reading.parts), reading.kernel) == (role, parts, role.startswith("conv"))


UNREAD = [
    ("fc.bias", (4,), "vector"),
    ("bn.running_mean", (4,), "vector"),
    ("scale", (), "vector"),
    ("cls_token", (1, 1, 8), "vector"),
    ("fc.weight", (0, 4), "empty"),
    ("attn.mask", (4, 4), "mask"),
    ("attn.attention_mask", (1, 1, 4, 4), "mask"),
    ("ups.0.weight", (8, 4, 16), "ambiguous"),
    ("input_linear.weight", (4, 8, 6), "ambiguous"),
    ("rel_pos_table", (2, 3, 4, 5), "ambiguous"),
    ("fc.weight_scale", (4, 1), "part"),
    ("fc.absmax", (4, 2), "part"),
    ("fc.SCB", (4, 2), "part"),
]


@pytest.mark.parametrize(("name", "shape", "kind"), UNREAD, ids=[case[0] for case in UNREAD])
def test_tensors_that_are_no_matrix_say_why(name: str, shape: tuple[int, ...], kind: str) -> None:
    reading = read(name, shape, {})
    assert isinstance(reading, Unread)
    assert (reading.kind, bool(reading.reason)) == (kind, True)


GIVEN = [
    ("ups.0.weight", (8, 4, 16), "ups.*=conv", "conv1d", 0),
    ("input_linear.weight", (4, 8, 6), "*linear*=slices", "slices", 4),
    ("token", (1, 8, 6), "token=linear", "linear", 0),
]


@pytest.mark.parametrize(("name", "shape", "given", "role", "parts"), GIVEN)
def test_roles_by_hand(name: str, shape: tuple[int, ...], given: str, role: str, parts: int) -> None:
    reading = read(name, shape, {}, parse_roles([given]))
    assert isinstance(reading, Reading)
    assert (reading.role, len(reading.parts)) == (role, parts)


def test_skipping_by_hand() -> None:
    reading = read("fc.weight", (3, 4), {}, parse_roles(["fc.*=skip"]))
    assert isinstance(reading, Unread)


@pytest.mark.parametrize("text", ["conv", "=conv", "a=banana", "a=", ""])
def test_roles_that_cannot_be_read(text: str) -> None:
    with pytest.raises(ArgumentError, match="is not PATTERN=ROLE"):
        parse_roles([text])


@pytest.mark.parametrize(("shape", "role"), [((3, 4), "conv"), ((2, 3, 4), "linear"), ((3, 4), "slices")])
def test_roles_that_do_not_fit_the_shape(shape: tuple[int, ...], role: str) -> None:
    with pytest.raises(ArgumentError, match="cannot be read as"):
        read("x", shape, {}, [("*", role)])
