"""Dotted names that generated code can read from a GraphModule.

    graph.weight -> graph_.weight     heads.class.weight -> heads.class_.weight     a"b.bias -> a_b_.bias

Names of submodules are free in PyTorch; `self.graph` of a GraphModule is its graph, and `self.heads.class` is no Python.
"""

from __future__ import annotations

import copy
import keyword
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import replace

from torch import fx, nn
from torch.export import ExportedProgram

__all__ = ["attribute_names", "readable"]


def attribute_names(paths: Iterable[str]) -> dict[str, str]:
    """A name for every dotted path: itself, or the nearest one that can be read; different paths stay different."""
    paths = list(dict.fromkeys(paths))
    chosen: dict[tuple[str, ...], str] = {}  # of a prefix: its last part
    taken = {tuple(p.split(".")[:i]) for p in paths for i in range(1, p.count(".") + 2)}
    names: dict[str, str] = {}
    for path in paths:
        parts = tuple(path.split("."))
        for i, part in enumerate(parts):
            prefix = parts[: i + 1]
            if prefix in chosen:
                continue
            name = part
            if not _readable(part, root=i == 0):
                name = re.sub(r"\W", "_", unicodedata.normalize("NFKC", part)) + "_"
                while (*parts[:i], name) in taken or not _readable(name, root=i == 0):
                    name += "_"
                taken.add((*parts[:i], name))
            chosen[prefix] = name
        names[path] = ".".join(chosen[parts[: i + 1]] for i in range(len(parts)))
    return names


def readable(program: ExportedProgram) -> ExportedProgram:
    """The program with other names for what generated code could not read, such as `graph.weight`; itself if there is nothing."""
    signature = program.graph_signature
    held = {*program.state_dict, *program.constants, *(s.target for s in signature.input_specs if s.target)}
    names = attribute_names(sorted(held))
    if all(old == new for old, new in names.items()):
        return program
    renamed = copy.copy(program)
    renamed._state_dict = {names[k]: v for k, v in program.state_dict.items()}
    renamed._constants = {names[k]: v for k, v in program.constants.items()}
    renamed._graph_signature = copy.copy(signature)
    renamed._graph_signature.input_specs = [replace(s, target=names.get(s.target or "", s.target)) for s in signature.input_specs]
    renamed._graph_signature.output_specs = [replace(s, target=names.get(s.target or "", s.target)) for s in signature.output_specs]
    return renamed


_GRAPH_MODULE = frozenset((*dir(fx.GraphModule(nn.Module(), fx.Graph())), "_in_spec", "_out_spec", "_guards_fn"))


def _readable(part: str, *, root: bool) -> bool:
    if root and part in _GRAPH_MODULE:
        return False
    if part.isidentifier():
        return not keyword.iskeyword(part) and unicodedata.normalize("NFKC", part) == part
    return re.fullmatch(r"[\w \-+*/:,;=<>()@#&!?|~^%$]+", part) is not None  # read by getattr
