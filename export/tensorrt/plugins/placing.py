"""Compiled kernels in the place of nodes: the last change of an ONNX graph before TensorRT reads it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from normfuse.errors import UsageError
from normfuse.export.onnx.build import const_of
from normfuse.export.ops import DOMAIN
from normfuse.export.tensorrt.plugins.payload import Code, Few, Payload
from normfuse.export.tensorrt.plugins.plans import PLANS, PLUGINS, Planned, Site
from normfuse.export.tensorrt.plugins.plugin import NAMESPACE, VERSION
from normfuse.extras import need
from normfuse.gpu.blocks import FEW_ROWS
from normfuse.gpu.compile import CAPABILITIES, Image, compiled
from normfuse.gpu.launch import Launch

__all__ = ["kernel_capabilities", "payload_of", "place"]


def place(
    model: Any,
    names: Sequence[str],
    *,
    dtype: str = "fp32",
    capabilities: Sequence[int] = CAPABILITIES,
    sizes: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Give every node that `names` stand for its kernel as PTX, in place; bodies of functions that nobody calls any more go.

    A kernel takes the element type of the node's own input. What computes in another type is cast, weights once and for all.

    Args:
        model: an `onnx_ir.Model` with shapes and types.
        names: of `PLUGINS`: "rms_norm", "crms_norm", "l1_norm", "rms_norm_linear", "shiftquant_linear", "two_pass_softmax".
        dtype: "fp32", "fp16" or "bf16", for values whose type the model does not say.
        capabilities: compute capabilities, 80 for 8.0; see `normfuse.gpu.compile.CAPABILITIES`. Every one is some
            tens of kilobytes in each node, twice that where the number of rows varies. Without 80, 86 or 89 the engine runs on
            just those GPUs.
        sizes: typical sizes of named axes, from which the tiles of products are chosen; results do not depend on them.

    Returns:
        Number of plugin nodes by op type.

    Raises:
        UsageError: an unknown name or capability, or none.
        ExportError: no kernel can be made for a node; the message names its module. The model may be changed in part.
        MissingExtra: triton is not installed.
        NormfuseError: a kernel does not compile.
    """
    _check(names, capabilities)
    ops = {op for name in names for op in PLUGINS[name]}
    arrays: dict[Any, dict[str, np.ndarray[Any, Any]]] = {}
    placing = _Placing(model, tuple(sorted(set(capabilities))))
    for node in list(model.graph):
        if node.op_type in ops and (node.domain, node.op_type) in PLANS:
            placing.put(node, Site(node, dtype, sizes or {}, arrays).plan())
    _drop_functions(model)
    if placing.count:
        model.graph.opset_imports.setdefault(DOMAIN, 1)
    return dict(placing.count)


def kernel_capabilities(targets: Sequence[str]) -> tuple[int, ...]:
    """Capabilities of kernels for an engine that is built for these compute capabilities ("8.6"); for no target all of them.

    The oldest kernel is always there: the driver compiles it for whatever has none of its own.

    Raises:
        UsageError: a target is older than every kernel.
    """
    asked = [int(target.replace(".", "")) for target in targets]
    oldest = min(CAPABILITIES)
    if any(a < oldest for a in asked):
        needed = f"{oldest // 10}.{oldest % 10}"
        raise UsageError(f"plugins for compute capability {min(targets, key=float)}: normfuse's kernels need {needed} or newer")
    return tuple(c for c in CAPABILITIES if not asked or c == oldest or c in asked)


def _check(names: Sequence[str], capabilities: Sequence[int]) -> None:
    unknown = [name for name in names if name not in PLUGINS]
    if unknown:
        raise UsageError(f"plugins={unknown}: expected names of {', '.join(PLUGINS)}")
    wrong = [c for c in capabilities if c not in CAPABILITIES]
    if wrong or not capabilities:
        raise UsageError(f"capabilities={list(capabilities)} of kernels: expected some of {', '.join(map(str, CAPABILITIES))}")


class _Placing:
    """One run over a graph."""

    def __init__(self, model: Any, capabilities: tuple[int, ...]) -> None:
        self.ir = need("onnx_ir", extra="onnx")
        self.graph = model.graph
        self.capabilities = capabilities
        self.count: Counter[str] = Counter()
        self.weights: dict[Any, Any] = {}
        self.payloads: dict[str, Payload] = {}
        self.before: dict[Any, tuple[Any, ...]] = {}
        self.names = {node.name for node in model.graph}
        types = self.ir.DataType
        self.types = {"fp32": types.FLOAT, "fp16": types.FLOAT16, "bf16": types.BFLOAT16, "i8": types.INT8, "u8": types.INT8}

    def put(self, node: Any, planned: Planned) -> None:
        """Turn `node` into the plugin node of `planned`: it keeps its name and its outputs."""
        read = [value for value in node.inputs if value is not None]
        first = self._before(node, planned.before)
        launch = planned.launch
        inputs = [self._operand(node, o.name, planned.operands[o.name], o.dtype, first) for o in launch.inputs]
        node.resize_inputs(len(inputs))
        for i, value in enumerate(inputs):
            node.replace_input_with(i, value)
        self._outputs(node, launch)
        node.op_type, node.domain, node.overload, node.version = planned.op_type, DOMAIN, "", None
        node.attributes.clear()
        for name, value in self._payload(launch, planned.few).items():
            node.attributes[name] = value
        self.count[planned.op_type] += 1
        for value in dict.fromkeys(read):
            self._drop(value)

    def _before(self, node: Any, planned: Planned | None) -> tuple[Any, ...]:
        """Outputs of a node that `planned` puts in front of `node`, or has put there: layers may read the same rows."""
        if planned is None:
            return ()
        key = (planned.operands["x"], repr(planned.launch))
        if key in self.before:
            return self.before[key]
        x = self._operand(node, "x", planned.operands["x"], planned.launch.inputs[0].dtype, ())
        made = self.ir.Node(
            DOMAIN,
            planned.op_type,
            [x],
            self._payload(planned.launch).values(),
            num_outputs=len(planned.launch.outputs),
            name=self._name(node, planned.op_type),
        )
        for out, result in zip(made.outputs, planned.launch.outputs, strict=True):
            out.name, out.dtype = f"{made.name}_{result.name}", self.types[result.dtype]
            if x.shape is not None:
                out.shape = self.ir.Shape([*x.shape.dims[:-1], result.features])
        self.graph.insert_before(node, [made])
        self.count[planned.op_type] += 1
        self.before[key] = tuple(made.outputs)
        return self.before[key]

    def _operand(self, node: Any, name: str, given: Any, dtype: str, first: tuple[Any, ...]) -> Any:
        """The value that a kernel's input `name` reads, in its element type."""
        wanted = self.types[dtype]
        if isinstance(given, int):
            return first[given]
        if isinstance(given, np.ndarray):
            return self._weight(given, id(given), f"{_folder(node)}{name}")
        if given.dtype in (None, wanted):
            return given
        known = const_of(given)
        if known is not None:
            return self._weight(np.asarray(known).astype(wanted.numpy()), (given, wanted), f"{given.name}.{dtype}")
        cast = self.ir.node("Cast", [given], {"to": int(wanted)}, name=self._name(node, f"Cast_{name}"))
        cast.outputs[0].name, cast.outputs[0].dtype, cast.outputs[0].shape = f"{cast.name}_output_0", wanted, given.shape
        self.graph.insert_before(node, [cast])
        return cast.outputs[0]

    def _weight(self, array: np.ndarray[Any, Any], key: Any, name: str) -> Any:
        """An initializer; one for all that share a weight."""
        if key not in self.weights:
            while name in self.graph.initializers:
                name += "_"
            tensor = self.ir.tensor(array, name=name)
            value = self.ir.Value(name=name, const_value=tensor, type=self.ir.TensorType(tensor.dtype), shape=tensor.shape)
            self.graph.register_initializer(value)
            self.weights[key] = value
        return self.weights[key]

    def _outputs(self, node: Any, launch: Launch) -> None:
        """As many outputs as the kernel has, of its types; who reads another type reads a cast."""
        for value in node.outputs[len(launch.outputs) :]:
            self._instead(node, value, "Identity", node.inputs[0])  # the sum of x and nothing
        node.resize_outputs(len(launch.outputs))
        for i, (out, result) in enumerate(zip(node.outputs, launch.outputs, strict=True)):
            wanted, found = self.types[result.dtype], out.dtype
            out.name = out.name or f"{node.name}_output_{i}"
            if found not in (None, wanted):
                self._instead(node, out, "Cast", out, to=int(found))
            out.dtype = wanted
            if out.shape is None and node.inputs[0].shape is not None:
                out.shape = self.ir.Shape([*node.inputs[0].shape.dims[:-1], result.features])

    def _instead(self, node: Any, old: Any, op_type: str, source: Any, **attributes: int) -> None:
        """Who reads `old` reads `op_type(source)` instead, a new node behind `node`, under the same name."""
        made = self.ir.node(op_type, [None], attributes, name=self._name(node, f"{op_type}_{old.index()}"))
        new = made.outputs[0]
        new.dtype, new.shape = old.dtype, old.shape
        self.graph.insert_after(node, [made])
        self.ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        made.replace_input_with(0, source)
        name, old.name = old.name, f"{old.name}.kernel"
        new.name = name

    def _name(self, node: Any, label: str) -> str:
        """A name of its own for a new node beside `node`."""
        name = base = f"{_folder(node)}{label}"
        count = 0
        while name in self.names:
            count += 1
            name = f"{base}_{count}"
        self.names.add(name)
        return name

    def _drop(self, value: Any) -> None:
        """A weight that only stood there for the old node."""
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            return
        if value.is_initializer():
            del self.graph.initializers[value.name]
        elif (producer := value.producer()) is not None and producer.op_type == "Constant":
            self.graph.remove(producer, safe=True)

    def _payload(self, launch: Launch, few: Launch | None = None) -> dict[str, Any]:
        """Attributes of a plugin node."""
        key = repr((launch, few))
        if key not in self.payloads:
            self.payloads[key] = payload_of(launch, self.capabilities, few)
        fields = {**self.payloads[key].fields(), "plugin_namespace": NAMESPACE, "plugin_version": VERSION}
        types = self.ir.AttributeType
        return {k: self.ir.Attr(k, types.STRING if isinstance(v, str) else types.INTS, v) for k, v in fields.items()}


def _folder(node: Any) -> str:
    return f"{node.name.rpartition('/')[0]}/" if "/" in (node.name or "") else f"{node.name or 'plugin'}/"


def payload_of(launch: Launch, capabilities: Sequence[int], few: Launch | None = None) -> Payload:
    """What a node carries for a launch: an image for each capability, but for those that the driver makes of an older one.

    Args:
        few: the same kernel for up to `FEW_ROWS` rows.

    Raises:
        MissingExtra: triton is not installed.
        NormfuseError: the kernel does not compile.
    """
    entry, codes = _codes(launch, capabilities)
    other = None
    if few is not None:
        also, few_codes = _codes(few, capabilities)
        if also != entry or (few.inputs, few.outputs) != (launch.inputs, launch.outputs):
            raise UsageError(f"{launch.kernel} and {few.kernel} are not the same kernel")
        other = Few(FEW_ROWS, few_codes, few.rows_each, few.columns)
    carried = {"u8": "i8"}
    return Payload(
        entry=entry,
        codes=codes,
        rows_each=launch.rows_each,
        columns=launch.columns,
        inputs=tuple(carried.get(o.dtype, o.dtype) for o in launch.inputs),
        outputs=tuple(o.dtype for o in launch.outputs),
        features=tuple(o.features for o in launch.outputs),
        few=other,
    )


def _codes(launch: Launch, capabilities: Sequence[int]) -> tuple[str, tuple[Code, ...]]:
    """The function's name and its images."""
    made = [compiled(launch, c) for c in capabilities]
    codes: list[Code] = []
    for image in made:
        code = _code(image)
        same = (c for c in codes if not c.exact and not code.exact and _text(c.ptx) == _text(code.ptx))
        # what differs in nothing but its target is what the driver would make of the older one
        if not any((c.threads, c.shared, c.parameters) == (code.threads, code.shared, code.parameters) for c in same):
            codes.append(code)
    entries = {image.entry for image in made}
    if len(entries) != 1:
        raise UsageError(f"{launch.kernel} has entries {sorted(entries)}; expected one name for all architectures")
    return entries.pop(), tuple(codes)


def _code(image: Image) -> Code:
    exact = not image.arch[-1].isdigit()  # sm_90a
    return Code(image.capability, exact, image.threads, image.shared, image.parameters, image.ptx.encode())


def _text(ptx: bytes) -> bytes:
    return re.sub(rb"^\.target.*$", b"", ptx, flags=re.MULTILINE)


def _drop_functions(model: Any) -> None:
    """Bodies of normfuse's ops that no node calls."""
    while True:
        called = {node.op_identifier() for graph in model.graphs() for node in graph}
        called |= {node.op_identifier() for function in model.functions.values() for node in function.all_nodes()}
        dead = [key for key in model.functions if key[0] == DOMAIN and key not in called]
        if not dead:
            return
        for key in dead:
            del model.functions[key]
