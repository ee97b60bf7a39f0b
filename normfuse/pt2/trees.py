"""How inputs and outputs are nested. PyTorch's reader of these imports modules for enums, default dicts and registered classes."""

import json
from typing import Any

from normfuse.pt2.archive import parsed
from normfuse.pt2.parts import Check, identifier, integer_in, plain
from normfuse.pt2.problems import Broken, Unsafe

__all__ = ["inputs", "outputs"]

_SEQUENCES = ("builtins.tuple", "builtins.list")
_MAPPINGS = ("builtins.dict", "collections.OrderedDict")
_KNOWN = (*_SEQUENCES, *_MAPPINGS, "collections.defaultdict", "collections.deque", "collections.namedtuple", "enum.Enum")
_VERSION = integer_in(1, 1)


def outputs(value: Any, where: str) -> str:
    """Tuples, lists, dicts and OrderedDicts around leaves.

    Classes of outputs with named fields, as those of transformers, become OrderedDicts: the class is not looked up.
    """
    return _rebuilt(value, where, fields=True)[0]


def inputs(value: Any, where: str) -> str:
    """Positional and keyword inputs; the names of these become variables."""
    text, tree = _rebuilt(value, where, fields=False)
    match tree["children_spec"]:
        case [{"type": "builtins.tuple"}, {"type": "builtins.dict", "context": context}]:
            for name in json.loads(context):
                identifier(name, where)
        case _:
            raise Broken(f"{where} is no pair of positional and keyword inputs")
    return text


def _rebuilt(value: Any, where: str, *, fields: bool) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, str):
        raise Broken(f"{where} is no text")
    match parsed(value, where):
        case [version, tree]:
            made = _tree(tree, where, fields)
            return json.dumps([_VERSION(version, where), made]), made
        case _:
            raise Broken(f"{where} is no tree")


def _tree(value: Any, where: str, fields: bool) -> dict[str, Any]:
    match value:
        case {"type": None, "context": None, "children_spec": [], **rest} if not rest:
            return {"type": None, "context": None, "children_spec": []}
        case {"type": str(kind), "context": context, "children_spec": list(children), **rest} if not rest:
            made = [_tree(child, where, fields) for child in children]
            if kind in _SEQUENCES and context == "null":
                return {"type": kind, "context": context, "children_spec": made}
            if kind in _MAPPINGS and isinstance(context, str):
                return {"type": kind, "context": _keys(context, len(made), where), "children_spec": made}
            if fields and kind not in _KNOWN and _names(context, len(made), where):
                return {"type": _MAPPINGS[1], "context": context, "children_spec": made}
            if kind in _MAPPINGS or kind in _SEQUENCES:
                raise Unsafe(f"{where} describes a {kind.rpartition('.')[2]} in an unknown way")
            raise Unsafe(f"{where} holds a {kind[:80]}: expected tuples, lists, dicts and OrderedDicts")
        case _:
            raise Broken(f"{where} is no tree")


def _names(context: Any, count: int, where: str) -> bool:
    """The context is one name for each child."""
    try:
        names = parsed(context, where) if isinstance(context, str) else None
    except Broken:
        return False
    return isinstance(names, list) and len(names) == count > 0 and all(isinstance(n, str) and n.isidentifier() for n in names)


def _keys(context: str, count: int, where: str) -> str:
    keys = parsed(context, where)
    if not isinstance(keys, list) or len(keys) != count:
        raise Unsafe(f"{where} has a dict whose keys do not fit its values")
    return json.dumps([_key(k, where) for k in keys])


def _key(value: Any, where: str) -> Any:
    """Keys are written into the code that checks inputs."""
    check: Check = integer_in(-(2**63), 2**63 - 1) if type(value) is int else plain
    return value if value is None or type(value) in (bool, float) else check(value, where)
