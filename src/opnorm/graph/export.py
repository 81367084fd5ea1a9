"""`torch.export` with a dynamic batch, read into a `Graph`."""

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind
from torch.utils._pytree import tree_leaves

from opnorm.errors import ArgumentError, UnsupportedLayerError
from opnorm.graph.apart import (
    check_samples_apart,
    computed,
    is_shaped_like,
    largest,
    operation_of,
    stored_names,
    stored_of,
)
from opnorm.graph.batch import MixedSamplesError, batch_place, varies_fastest
from opnorm.graph.decompose import written_out
from opnorm.graph.types import Graph, Node, Ref, Weight

Example = Tensor | tuple[Tensor, ...]

_NEAR = 1e-2
"""How far the graph's results may be from the model's: far above rounding, by other operations or in another order."""
_IN_PLACE = frozenset({
    "add_", "sub_", "mul_", "div_", "neg_", "copy_", "fill_", "masked_fill_", "detach_", "clamp_", "dropout_",
    "relu_", "relu6_", "leaky_relu_", "elu_", "celu_", "selu_", "hardtanh_", "hardswish_", "hardsigmoid_", "silu_",
    "mish_", "sigmoid_", "tanh_", "rrelu_", "threshold_",
})  # fmt: skip
"""Operations in place that are read as they are, where nothing else can see what they write."""
_RANDOM = frozenset({
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "bernoulli_",
    "multinomial", "normal", "normal_", "uniform", "uniform_", "exponential", "exponential_", "normal_functional",
})  # fmt: skip


def export(model: nn.Module, example_input: Example) -> Graph:
    """The graph of a model in evaluation mode, for any batch size.

    Args:
        model: a module whose dropout and normalisation layers are in evaluation mode.
        example_input: one batch, or a tuple of them where the model has several inputs; the first axis is the batch.
            Integer inputs (class labels) are not varied.

    Raises:
        ArgumentError: if the input is no batch of finite floats, the model does not take it, or a layer is in training
            mode.
        UnsupportedLayerError: if the model cannot be exported, or an operation mixes the samples of a batch.
    """
    model = _unwrapped(model)
    _refuse_training(model)
    batches = two_samples(example_input)
    results = _results(model, batches)
    program = _exported(model, batches)
    try:
        graph = _Reader(program, batches, results).graph()
        check_samples_apart(program, graph.nodes, batches)
    except MixedSamplesError as problem:
        raise UnsupportedLayerError(f"{problem}{_batch_elsewhere(model)}") from problem
    return graph


def _batch_elsewhere(model: nn.Module) -> str:
    """The way out where a layer of the model reads its first axis as time."""
    for name, module in model.named_modules():
        if getattr(module, "batch_first", True) is False:
            return (
                f". {name or 'The model'} ({type(module).__name__}) has batch_first=False, so that the first axis of "
                "what it reads is no batch: make it with batch_first=True, or transpose before and after it"
            )
    return ""


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DataParallel's wrappers."""
    inside = getattr(model, "_orig_mod", None)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inside = model.module
    return _unwrapped(inside) if isinstance(inside, nn.Module) else model


def _refuse_training(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
        tracks = getattr(module, "track_running_stats", True)
        if isinstance(module, kinds) and module.training and tracks:
            raise ArgumentError(
                f"{name or 'the model'} ({type(module).__name__}) is in training mode, where its result depends on "
                "chance or on the other samples of the batch; call model.eval() first"
            )


def two_samples(example_input: Example) -> tuple[Tensor, ...]:
    """The first two samples of each input, or the only one twice.

    Raises:
        ArgumentError: if an input is no batch of finite numbers.
    """
    inputs: tuple[Any, ...] = tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)
    batches = []
    for number, batch in enumerate(inputs):
        if not isinstance(batch, Tensor):
            raise ArgumentError(
                f"input {number} is of the type {type(batch).__name__}; example_input is a batch or a tuple of tensors"
            )
        if batch.is_complex():
            raise ArgumentError(f"input {number} is complex, and complex numbers are not followed")
        if batch.dim() < 1 or batch.shape[0] == 0:
            raise ArgumentError(f"input {number} must be a tensor with a batch as its first axis")
        if batch[0].numel() == 0:
            raise ArgumentError(f"input {number} has samples without elements: their shape is {tuple(batch.shape[1:])}")
        if batch.is_floating_point() and not bool(torch.isfinite(batch).all()):
            raise ArgumentError(f"input {number} holds NaN or infinite values")
        rows = batch.detach()[:2]
        batches.append(rows.repeat(2, *([1] * (batch.dim() - 1))).contiguous() if len(rows) == 1 else rows.contiguous())
    return tuple(batches)


def _results(model: nn.Module, batches: tuple[Tensor, ...]) -> list[Any]:
    """What the model itself gives; an input that it refuses is refused here: the exporter would blame the model.

    Raises:
        ArgumentError: with the shapes and dtypes, and the model's own words.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the model's own: they are no reason to refuse the input
            # Inputs of its own, as a forward may write into them.
            return tree_leaves(model(*(b.clone() for b in batches)), is_leaf=lambda part: part is None)
    except Exception as problem:  # whatever a forward may raise
        given = ", ".join(f"{str(b.dtype).removeprefix('torch.')} {tuple(b.shape[1:])}" for b in batches)
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise ArgumentError(
            f"{type(model).__name__} does not take the example input: a batch of samples of {given} gives "
            f'"{reason}". The first axis must be the batch, and shape and dtype those that the model is used with'
        ) from problem


def _exported(model: nn.Module, batches: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    # A dynamic axis is traced as one that is not 0 or 1; three samples keep it from meeting another size of two.
    example = tuple(torch.cat([b, b[:1]]) for b in batches)
    dynamic: Any = torch.export.ShapesCollection()  # type: ignore[no-untyped-call] # by tensor, so that `forward(self, *inputs)` is traced as well
    for batch in example:
        dynamic[batch] = {0: torch.export.Dim.DYNAMIC}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own deprecations, raised inside its exporter
            program = torch.export.export(model, example, dynamic_shapes=dynamic)
            if _writes_shared_memory(program):
                program = program.run_decompositions({})
            return written_out(program)
    except Exception as problem:  # torch.export raises many unrelated classes
        first = next((line for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise UnsupportedLayerError(
            f"torch.export cannot trace {type(model).__name__} with a batch of any size: {first} "
            "(a fixed batch size, as in view(8, -1) or expand(len(x), 5), or control flow that depends on values are "
            "the usual causes)"
        ) from problem


def _writes_shared_memory(program: torch.export.ExportedProgram) -> bool:
    """Whether an operation in place could be seen through another name: then the graph must be made functional."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable:
            continue
        source, name = node.args[0] if node.args else None, operation_of(node)
        if name not in _IN_PLACE or not isinstance(source, torch.fx.Node) or len(source.users) > 1:
            return True
        if source.op != "call_function" or _may_alias(source) or _constant(source):
            return True
    return False


def _constant(node: torch.fx.Node) -> bool:
    """Whether a tensor is a stored constant of the graph, which nothing may write to."""
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    return not tensors or is_shaped_like(node)


def _may_alias(node: torch.fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    name = str(node.target).split(".")
    in_place = len(name) > 1 and name[1].endswith("_")
    composite = len(name) > 1 and name[1] in ("reshape", "flatten", "contiguous", "to", "dropout", "chunk", "type_as")
    return composite or schema is None or (not in_place and any(r.alias_info is not None for r in schema.returns))


class _Reader:
    """Walks an exported program once with two samples, and writes down what it meets."""

    def __init__(self, program: torch.export.ExportedProgram, batches: tuple[Tensor, ...], expected: list[Any]) -> None:
        self.program = program
        self.expected = expected
        self.env: dict[str, Any] = {}
        self.weights: dict[str, Tensor] = {}
        self.derived: set[str] = set()
        self.weight_of: dict[str, str] = {}
        self.nodes: list[Node] = []
        self.varied: set[str] = set()
        self.labels: list[str] = []
        self.batches = batches
        self.batch_sizes: set[Any] = set()

    def graph(self) -> Graph:
        inputs: list[str] = []
        outputs: tuple[str, ...] = ()
        names, stored = stored_names(self.program), stored_of(self.program)
        queue = list(self.batches)
        with torch.no_grad():
            for node in self.program.graph.nodes:
                if node.op == "placeholder" and node.name in stored:
                    self._remember(node.name, names[node.name], stored[node.name].detach())
                elif node.op == "placeholder":
                    batch = queue.pop(0)
                    self.env[node.name] = batch
                    self.batch_sizes |= self._batch_size(node)
                    self.varied.add(node.name)
                    if batch.is_floating_point():
                        inputs.append(node.name)
                    else:
                        self.labels.append(node.name)
                    self.nodes.append(self._node(node, "input", _nothing))
                elif node.op == "call_function":
                    self._call(node)
                elif node.op == "output":
                    outputs = self._outputs(node)
                else:
                    raise UnsupportedLayerError(
                        f"the exported graph holds {node.op} {node.name}: a part of the forward runs in a context of "
                        "its own, such as torch.autocast or torch.cond; take it out of the forward"
                    )
        return Graph(
            tuple(self.nodes), tuple(inputs), outputs, self.weights, frozenset(self.derived), tuple(self.labels)
        )

    def _batch_size(self, node: torch.fx.Node) -> set[Any]:
        """The symbol that stands for the size of the batch."""
        size = node.meta["val"].shape[0]
        symbols: set[Any] = size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()
        if not symbols:
            raise UnsupportedLayerError(
                f"torch.export fixes the size of the batch in the input {node.name!r}; a write into one of several "
                "views (unbind, chunk) is a usual cause: write into a slice instead"
            )
        return symbols

    def _remember(self, name: str, weight: str, value: Tensor) -> None:
        self.env[name] = value
        self.weights[weight] = value
        self.weight_of[name] = weight

    def _call(self, node: torch.fx.Node) -> None:
        if operation_of(node) in _RANDOM:
            path, module = _home(node)
            raise UnsupportedLayerError(
                f"{node.target} in {path or 'the model'} ({module}) is random, so the model is no function of its "
                "inputs; pass the noise as an input"
            )
        result = computed(node, self.env)
        self.env[node.name] = result
        reads = any(source.name in self.varied for source in node.all_input_nodes)
        if is_shaped_like(node) or not reads:
            if isinstance(result, Tensor):
                self._remember(node.name, f"{node.name} (computed)", result)
                self.derived.add(f"{node.name} (computed)")
            return
        if isinstance(result, Tensor | tuple | list):
            self.varied.add(node.name)
            function = _copied if node.target is torch.ops.aten.copy.default else node.target
            self.nodes.append(self._node(node, _text(node.target), function))  # type: ignore[arg-type]

    def _node(self, node: torch.fx.Node, op: str, function: Callable[..., Any]) -> Node:
        result = self.env[node.name]
        path, module = _home(node)
        place: tuple[int | None, int] = (None, 1)
        inner = False
        if isinstance(result, Tensor):
            where = f"{op} in {path or 'the model'} ({module})"
            place = batch_place(node, where, self.batch_sizes)
            inner = place[1] > 1 and self._inner(node, place[0], where)
        return Node(
            node.name,
            op,
            function,
            tuple(self._argument(a) for a in node.args),
            {k: self._argument(a) for k, a in node.kwargs.items()},
            tuple(result.shape) if isinstance(result, Tensor) else (),
            result.dtype if isinstance(result, Tensor) else None,
            *place,
            inner,
            path,
            module,
        )

    def _inner(self, node: torch.fx.Node, axis: int, where: str) -> bool:
        """Whether the batch varies fastest: from the operation that merges it, or inherited."""
        known = {n.name: n for n in self.nodes}
        before = [known[n.name] for n in node.all_input_nodes if n.name in known]
        before = [source for source in before if source.batch_axis is not None]
        inherited = {source.inner for source in before if source.merged > 1}
        if len(inherited) > 1 or len({source.merged for source in before if source.merged > 1}) > 1:
            raise UnsupportedLayerError(f"{where} mixes the samples of a batch: it reads them in different orders")
        ids = {}
        for source in before:
            value = self.env[source.name]
            number = torch.arange(2, dtype=value.dtype).reshape(-1, *([1] * len(source.sample_shape)))
            order = source.batched(number.expand(2, *source.sample_shape))
            ids[source.name] = torch.empty_like(value).copy_(order)  # with the strides that a view relies on
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: ids.get(n.name, self.env[n.name]))
        inner = varies_fastest(node.target(*args, **kwargs), axis)  # type: ignore[operator]
        if inner is None and not inherited:
            raise UnsupportedLayerError(f"{where} interleaves the samples of a batch with another axis")
        return inherited.pop() if inner is None else inner  # not all operations leave the numbers as they are

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, torch.fx.Node):
            if argument.name in self.varied:
                return Ref(argument.name)
            return Weight(self.weight_of[argument.name]) if argument.name in self.weight_of else self.env[argument.name]
        if isinstance(argument, list | tuple):
            return type(argument)(self._argument(a) for a in argument)
        return argument

    def _outputs(self, node: torch.fx.Node) -> tuple[str, ...]:
        names: list[str] = []
        given: list[Any] = []
        specs = self.program.graph_signature.output_specs
        results: Any = torch.fx.node.map_arg(node.args[0], lambda n: n)
        for result, spec in zip(results, specs, strict=True):
            if spec.kind != OutputKind.USER_OUTPUT:
                continue  # what the forward wrote into an input or a buffer
            traced = isinstance(result, torch.fx.Node)
            given.append(self.env[result.name] if traced else result)
            if traced and result.name in self.varied and not _empty(given[-1]):
                names.append(result.name)  # what is constant, empty or None never differs
        self._require_same(given)
        if not names:
            raise UnsupportedLayerError("no output of the model depends on its inputs")
        return tuple(names)

    def _require_same(self, given: list[Any]) -> None:
        """Refuse a graph that computes something else than the model itself."""
        for ours, theirs in zip(given, self.expected, strict=False):
            if not isinstance(theirs, Tensor) or not theirs.is_floating_point():
                continue
            near = _NEAR * largest(theirs)
            same = isinstance(ours, Tensor) and ours.shape == theirs.shape
            if not same or not torch.allclose(ours, theirs.to(ours.dtype), rtol=_NEAR, atol=near, equal_nan=True):
                raise UnsupportedLayerError(
                    "the exported graph computes something else than the model: its result changes from call to call "
                    "(a counter, a cache), or a forward writes to a tensor in a way that torch.export does not follow "
                    "(.data, torch._foreach_mul_)"
                )


def _empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 0


def _nothing() -> None:
    """What an input computes."""


def _copied(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What torch's functional copy computes; it has no derivative."""
    return source.to(into.dtype).expand_as(into)


def _text(target: object) -> str:
    return "getitem" if target is operator.getitem else str(target)


def _home(node: torch.fx.Node) -> tuple[str, str]:
    stack = node.meta.get("nn_module_stack") or {}
    entries = [e for e in stack.values() if not e[0].startswith("_empty")]
    if not entries:
        return "", ""
    path, module = entries[-1]
    name = module if isinstance(module, str) else f"{module.__module__}.{module.__qualname__}"
    return path, name.rsplit(".", 1)[-1]
