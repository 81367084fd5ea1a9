"""Operations that are written out as simpler ones, so that they need no rules of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch._decomp import get_decompositions
from torch.export import ExportedProgram

_LAYERS = [getattr(torch.ops.aten, name).input for name in ("rnn_tanh", "rnn_relu", "lstm", "gru")]
_CELLS = [getattr(torch.ops.aten, name).default for name in ("rnn_tanh_cell", "rnn_relu_cell", "lstm_cell", "gru_cell")]
_RECURRENT = frozenset([*_LAYERS, *_CELLS])

_BY_NAME = (
    "einsum.default", "glu.default", "baddbmm.default", "outer.default", "inner.default", "tensordot.default",
    "linalg_multi_dot.default", "kron.default", "diff.default", "lerp.Scalar", "addcmul.default", "addcdiv.default",
    "max.other", "min.other", "clip.default",
    "masked_fill.Scalar", "masked_fill.Tensor",
    "cosine_similarity.default", "fill.Tensor", "fill.Scalar", "std.default", "std.dim",
    "vdot.default", "dot.default", "mv.default", "addmv.default", "rsub.Tensor",
)  # fmt: skip


def written_out(program: ExportedProgram) -> ExportedProgram:
    """The same program in operations that have rules, as far as torch can say how; nothing else is decomposed."""
    present = {node.target for node in program.graph.nodes if node.op == "call_function"}
    if present & _RECURRENT:
        program = program.run_decompositions(_step_by_step())
    known = torch.export.default_decompositions()
    table = {op: known[op] for op in present if str(op) in _NAMES and op in known}
    return program.run_decompositions(table) if table else program


_NAMES = frozenset(f"aten.{name}" for name in _BY_NAME)


def _step_by_step() -> dict[Any, Callable[..., Any]]:
    """How recurrent layers are unrolled to linear maps, gates and products."""
    known = torch.export.default_decompositions()
    return {**get_decompositions(_LAYERS), **{cell: known[cell] for cell in _CELLS}}
