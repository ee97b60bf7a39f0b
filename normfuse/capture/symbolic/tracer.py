"""The tracer under `symbolic`: through every module and every Python function of torch, down to torch's built-in functions."""

from __future__ import annotations

import enum
import itertools
import linecache
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from normfuse.capture.symbolic.traced_values import TracedConstant, TracedValue

__all__ = ["Tracer"]

_TORCH = str(Path(torch.__file__).parent)
_BATCH_NORM_RANKS = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


class Tracer(fx.Tracer):
    """Traces through everything down to torch's built-in functions."""

    def __init__(self) -> None:
        super().__init__()
        self.constants: dict[str, TracedConstant] = {}
        self.names: dict[int, str] = {}
        self.failed: str | None = None
        self.autocast = _autocast()

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        for name, tensor in (*root.named_buffers(), *root.named_parameters()):
            self.names.setdefault(id(tensor), name)
        self.root_type = _qualified(type(root))
        rank = _rank_check_removed(root)
        graph = super().trace(root, concrete_args)
        if rank:
            next(iter(graph.nodes)).meta["rank"] = rank
        return graph

    # -- modules ------------------------------------------------------------------------------------------------------------

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace through the module; one of torch's own whose code looks at shapes is recorded as a whole."""
        path = (self.submodule_paths or {}).get(m)
        if path is None:
            if next(itertools.chain(m.parameters(), m.buffers()), None) is not None:
                raise fx.proxy.TraceError(f"{type(m).__name__} holds tensors and is not registered as a submodule")
            return forward(*args, **kwargs)
        calls = self.num_calls.get(path, 0)
        key = f"{path}@{calls}" if calls else path
        self.num_calls[path] = calls + 1
        self.module_stack[key] = (path, type(m))
        rank = _rank_check_removed(m)
        try:
            if not _is_stock(m):
                return forward(*args, **kwargs)
            out = self.attempt(lambda: forward(*args, **kwargs))
            if out is _FAILED:
                return self.create_proxy("call_module", path, args, kwargs)
            if rank:
                out.node.meta["rank"] = args[0].node.meta["rank"] = rank
            return out
        except Exception:
            self.failed = path if self.failed is None else self.failed
            raise
        finally:
            self.module_stack.popitem(last=True)

    def attempt(self, call: Callable[[], Any]) -> Any:
        """The result of `call`, or `_FAILED` with the graph as it was before."""
        last = next(iter(reversed(self.graph.nodes)), None)
        constants, calls, depth = dict(self.constants), dict(self.num_calls), len(self.module_stack)
        try:
            return call()
        except Exception:
            while (node := next(iter(reversed(self.graph.nodes)), None)) is not last:
                assert node is not None
                self.graph.erase_node(node)
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            self.constants, self.num_calls, self.failed = constants, calls, None
            return _FAILED

    # -- functions ----------------------------------------------------------------------------------------------------------

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Record a call; one of a Python function of torch by running its body."""
        if kind == "call_function" and (body := _body(target, args, kwargs)) is not None:
            is_torch = body is not target
            out = self.attempt(lambda: _one_value(body(*args, **kwargs)) if not is_torch else body(*args, **kwargs))
            if out is not _FAILED:
                return out
        return super().create_proxy(kind, target, args, kwargs, *rest, **more)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _autocast() != self.autocast:
            raise fx.proxy.TraceError("autocast inside forward is not recorded")
        node = super().create_node(*args, **kwargs)
        stack = {"L__self__": ("", self.root_type)}
        stack |= {f"L__self__{key}": (path, _qualified(kind)) for key, (path, kind) in self.module_stack.items()}
        node.meta["nn_module_stack"] = stack
        if node.op.startswith("call") and (where := _stack_trace()):
            node.meta["stack_trace"] = where
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return TracedValue(node, self)

    # -- values -------------------------------------------------------------------------------------------------------------

    def constant(self, tensor: Tensor) -> TracedConstant | None:
        name = self.names.get(id(tensor))
        if name is None:
            return None
        if name not in self.constants:
            self.constants[name] = TracedConstant(self.create_node("get_attr", name, (), {}), self, tensor)
        return self.constants[name]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters and buffers become constants of the graph when they are read."""
        if not isinstance(attr_val, fx.Proxy) and isinstance(attr_val, Tensor) and (found := self.constant(attr_val)) is not None:
            return found
        return attr_val

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and (found := self.constant(a)) is not None:
            return found.node
        if isinstance(a, dict) and is_dataclass(a):
            # transformers' ModelOutput: a dictionary of the fields that are not None
            given = {f.name: self.create_arg(getattr(a, f.name)) for f in fields(a) if getattr(a, f.name) is not None}
            return self.create_node("call_function", type(a), (), given)
        if isinstance(a, dict) and type(a) is not dict:
            return self.create_node("call_function", type(a), (super().create_arg(dict(a)),), {})
        if isinstance(a, enum.Enum):
            return a
        return super().create_arg(a)

    def explain(self, error: Exception) -> str:
        """What failed, in which module and line, and what to do."""
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if not f.filename.startswith((_TORCH, str(Path(__file__).parent), "<"))
        ]
        where = f" at {frames[-1].filename}:{frames[-1].lineno}: `{frames[-1].line}`" if frames else ""
        module = f"module {self.failed!r}" if self.failed else "the model"
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        reason = reason.replace("'TracedValue' object", "a traced value").replace("Proxy object", "a traced value")
        return f"cannot trace {module}{where} without shapes ({reason}); pass example_inputs"


_FAILED: Any = object()


def _autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def _qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_stock(module: nn.Module) -> bool:
    """Is the code of the module, and of all modules in it, torch's own?"""
    forward = getattr(type(module).forward, "__module__", "")
    return forward.startswith("torch.") and all(_is_stock(child) for child in module.children())


def _rank_check_removed(module: nn.Module) -> int | None:
    """Keep torch's own batch norm from looking at the rank of its input; the rank that it demands, None when it allows several."""
    check = getattr(type(module), "_check_input_dim", None)
    if not isinstance(module, nn.modules.batchnorm._BatchNorm) or check is None or check.__module__ != "torch.nn.modules.batchnorm":
        return None
    for name in ("_check_input_dim", "_check_non_zero_input_channels"):
        setattr(module, name, lambda input: None)
    return next((rank for kind, rank in _BATCH_NORM_RANKS.items() if check is kind._check_input_dim), None)


def _body(function: Any, args: Any, kwargs: dict[str, Any]) -> Callable[..., Any] | None:
    """The Python body of a function; of one of torch's without the dispatch to `__torch_function__` in front of it."""
    dispatched: Any = torch._jit_internal.boolean_dispatched.get(function) if isinstance(function, types.FunctionType) else None
    if dispatched is not None:
        index, name = dispatched["index"], dispatched["arg_name"]
        flag = kwargs.get(name, args[index] if index < len(args) else dispatched["default"])
        function = dispatched["if_true" if flag else "if_false"]
    if not isinstance(function, types.FunctionType):
        return None
    if (function.__module__ or "").split(".")[0] != "torch":
        # behind fx.wrap: what its author kept from plain fx may well be traceable here
        return None if "isinstance" in function.__code__.co_names else function
    if function.__module__ not in ("torch.nn.functional", "torch.functional"):
        return None
    never = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), lambda *_: False)
    # these verify batch sizes in training; the sizes are not known here
    unchecked = dict.fromkeys(("_verify_batch_size", "_verify_spatial_size"), lambda *_: None)
    scope = function.__globals__ | never | unchecked | {"_list_with_default": _complete_sizes}
    body = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


def _one_value(result: Any) -> fx.Proxy:
    """fx.wrap cannot hand several values back."""
    if not isinstance(result, fx.Proxy):
        raise TypeError("not one traced value")
    return result


def _complete_sizes(sizes: Any, defaults: Any) -> Any:
    """Output sizes of an adaptive pool; one that is to be kept from the input (None) is not known here."""
    if isinstance(sizes, list | tuple) and None in sizes:
        raise TypeError("the sizes of the input are not known")
    return sizes


def _stack_trace() -> str:
    """The frames of the model's code, outermost first, in the format of a traceback."""
    lines: list[str] = []
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "trace":
        name = frame.f_code.co_filename
        if name != __file__ and (not name.startswith(_TORCH) or frame.f_code.co_name == "forward"):
            code = linecache.getline(name, frame.f_lineno).strip()
            lines.append(f'File "{name}", line {frame.f_lineno}, in {frame.f_code.co_name}\n    {code}')
        frame = frame.f_back
    return "\n  ".join(reversed(lines))
