"""The list of hostile `.pt2` files: how each is made, and a part of the message that refuses it."""

import json
import pickle
from typing import Any

from tests.evil import Evil
from tests.hostile.programs import (
    INPUTS,
    MODEL,
    Maker,
    appended,
    bomb,
    calls,
    commented,
    compressed,
    constant,
    constant_text,
    cut,
    deep,
    encrypted,
    flipped,
    graph,
    guarded,
    in_json,
    ints,
    linked,
    nested,
    node,
    old_format,
    other_header,
    overstated,
    packed,
    parameter,
    prepended,
    renamed,
    replaced,
    sized,
    trailing,
    twice,
    two_roots,
    weight,
    whole_twice,
    with_member,
    without,
)
from tests.hostile.watch import CODE, MODULE

__all__ = ["PROGRAMS"]


def _mode(path: str) -> dict[str, Any]:
    return {"filename": {"as_string": path}, "shared": {"as_bool": True}, "size": {"as_int": 64}}


_INJECTED = f"x); {CODE}; ("
_EXECUTABLE = b"\x7fELF" + bytes(60)
_LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}

#: Name of a hostile file -> how it is made, and a part of the message that refuses it.
PROGRAMS: dict[str, tuple[Maker, str]] = {
    # expressions that are evaluated
    "size with a call": (sized(CODE), "more than arithmetic"),
    "size with an attribute": (sized("Symbol('s0').__class__"), "more than arithmetic"),
    "size that takes for ever": (sized("Pow(Integer(10), Pow(Integer(10), Integer(10)))"), "more than arithmetic"),
    "size with a lambda": (sized("(lambda: 0)()"), "more than arithmetic"),
    "size with a strange symbol": (sized(f'Symbol("{CODE}")'), "more than arithmetic"),
    "size nested deeply": (sized("(" * 5000 + "s0" + ")" * 5000), "no arithmetic"),
    "guard with a call": (guarded(f"{CODE} or True"), "more than arithmetic"),
    "guard with a quote": (guarded("L['x'].size()[0] == '\\\"+" + CODE + "+\\\"'"), "arithmetic"),
    "guard with an attribute": (guarded("L['x'].__class__ == 1"), "more than arithmetic"),
    "guard with a line break": (guarded(f"True\n{CODE}"), "no arithmetic"),
    # names that are written into generated code
    "value with code for a name": (renamed('"linear"', '"x\n  ' + CODE + '"'), "name|arithmetic|letters|JSON"),
    "input with code for a name": (
        in_json(lambda p: p["graph_module"]["module_call_graph"][0]["signature"].update(forward_arg_names=[_INJECTED, "scale"])),
        "a word",
    ),
    "node with code for a name": (in_json(lambda p: node(p).update(name=_INJECTED)), "a word"),
    "node that is called like a keyword": (in_json(lambda p: node(p).update(name="import")), "name of a variable"),
    "weight with a quote in its name": (parameter(f'linear.a" + {CODE} + "'), "names with dots"),
    "weight called like Python's own": (parameter("__class__.forward"), "Python's own"),
    "text among inputs with a quote": (constant_text(f"' + str({CODE}) + '"), "without quotes"),
    "key of an input with code": (
        nested("builtins.dict", json.dumps([f"scale'] or {CODE}#"]), side="in_spec", position="kwargs"),
        "without quotes|a word",
    ),
    "argument that an operator does not have": (
        calls("torch.ops.aten.relu.default", self={"as_tensor": {"name": "x"}}, evil={"as_int": 1}),
        "does not have",
    ),
    # trees that import
    "defaultdict that imports": (
        nested("collections.defaultdict", {"default_factory_module": MODULE, "default_factory_name": "f", "dict_context": ["y"]}),
        "collections.defaultdict",
    ),
    "enum that imports": (
        nested("builtins.dict", json.dumps([{"__enum__": True, "fqn": f"{MODULE}:E", "name": "A"}])),
        "expected text",
    ),
    "enum that imports, as a list": (
        nested("builtins.list", json.dumps({"__enum__": True, "fqn": f"{MODULE}:E", "name": "A"})),
        "in an unknown way",
    ),
    "named tuple": (nested("collections.namedtuple", json.dumps(["y"])), "collections.namedtuple"),
    "deque": (nested("collections.deque", json.dumps(["y"])), "collections.deque"),
    "class among the inputs": (nested(f"{MODULE}.E", json.dumps(["scale"]), side="in_spec", position="kwargs"), "expected tuples"),
    # operators with effects
    "operator that maps a file": (calls("torch.ops.aten.from_file.default", **_mode("pwned")), "from_file"),
    "operator that saves": (
        calls("torch.ops.aten.save.default", item={"as_tensors": []}, filename={"as_string": "pwned"}),
        "aten.save",
    ),
    "operator that prints": (calls("torch.ops.prim.Print.default"), "'prim'"),
    "operator that writes an image": (
        calls("torch.ops.image.write_file.default", filename={"as_string": "pwned"}, data={"as_tensor": {"name": "x"}}),
        "'image'",
    ),
    "function that loads a library": (calls("torch.ops.load_library", path={"as_string": "pwned.so"}), "no operator"),
    "function of PyTorch": (calls("torch.hub.load", repo={"as_string": "a/b"}, model={"as_string": "c"}), "no operator"),
    "function of Python": (calls("_operator.call", a={"as_tensor": {"name": "x"}}), "no operator"),
    "attribute of an operator": (calls("torch.ops.aten.linear.__class__"), "linear.__class__"),
    "extension operator": (calls("#executorch:aten.linear"), "no operator"),
    "operator over other operators": (calls("torch.ops.higher_order.auto_functionalized"), "higher_order"),
    "operator as an argument": (calls("torch.ops.aten.relu.default", self={"as_operator": "torch.hub.load"}), "as_operator"),
    "object as an argument": (
        calls("torch.ops.aten.relu.default", self={"as_custom_obj": {"name": "o", "class_fqn": "x.y"}}),
        "as_custom_obj",
    ),
    "storage that is set": (
        calls("torch.ops.aten.set_.source_Tensor", self={"as_tensor": {"name": "x"}}, source={"as_tensor": {"name": "x"}}),
        "more than values",
    ),
    "device of a plugin": (in_json(lambda p: graph(p)["tensor_values"]["x"]["device"].update(type="privateuseone")), "cpu, cuda"),
    "note that looks up names": (in_json(lambda p: node(p)["metadata"].update(source_fn_stack=f"x,torch.{MODULE}.f")), ""),
    "field that is not known": (in_json(lambda p: p.update(run_first=CODE)), "run_first"),
    "size among many": (
        in_json(lambda p: p["range_constraints"].update(u99999999999={"min_val": 0, "max_val": 1})),
        "name of a size",
    ),
    # objects
    "pickle among the inputs": (replaced(INPUTS, pickle.dumps(Evil())), "more than tensors"),
    "opaque object as a constant": (constant("opaque_obj_0", pickled=False), "opaque_obj_0"),
    "opaque object as a constant, pickled": (constant("opaque_obj_0", pickled=True), "opaque_obj_0"),
    "custom object as a constant": (constant("custom_obj_0", pickled=False), "custom_obj_0"),
    "tensor as a constant, pickled": (constant("tensor_0", pickled=True), "more than tensors"),
    "weight, pickled": (weight(use_pickle=True), "more than tensors"),
    "weights as one pickle": (with_member("archive/data/weights/model.pt", pickle.dumps(Evil())), "more than tensors"),
    "constants as one pickle": (with_member("archive/data/constants/model.pt", pickle.dumps(Evil())), "more than tensors"),
    "compiled library": (with_member("archive/data/aotinductor/model/model.wrapper.so", _EXECUTABLE), "aotinductor"),
    "compiled library in capitals": (with_member("archive/DATA/aotinductor/model/model.so", _EXECUTABLE), "DATA"),
    "second model": (with_member("archive/models/other.json", b"{}"), "other.json"),
    "format before 2.8": (old_format, "made of pickles"),
    # archives that two readers read differently
    "two members of one name, evil first": (twice("evil"), "two members"),
    "two members of one name, honest first": (twice("honest"), "two members"),
    "two members, one in capitals": (
        with_member("archive/data/sample_inputs/MODEL.pt", pickle.dumps(Evil())),
        "two members|does not need",
    ),
    "two roots": (two_roots, "two members|folders"),
    "archive twice": (whole_twice, "two members"),
    "archive in front": (prepended, "no member"),
    "archive behind": (appended, "no member"),
    "script behind": (trailing, "behind the archive"),
    "comment": (commented, "no member"),
    "member outside": (with_member("archive/extra/../../pwned", b"x"), "member"),
    "member with an absolute name": (with_member("/pwned", b"x"), "member"),
    "member with a backslash": (with_member("archive/extra/..\\..\\pwned", b"x"), "member"),
    "compressed": (compressed, "compressed"),
    "encrypted": (encrypted, "encrypted"),
    "link": (linked, "link"),
    "header that says another name": (other_header, "something else|cannot be read"),
    "JSON that says one thing twice": (
        lambda members: packed(
            [(n, d.replace(b'{"graph_module"', b'{"graph_module": 1, "graph_module"', 1) if n == MODEL else d) for n, d in members]
        ),
        "one thing twice",
    ),
    # broken files
    "bomb": (bomb, "compressed"),
    "member of two gigabytes": (overstated, "claims"),
    "truncated": (cut(0.5), "no archive"),
    "empty": (cut(0.0), "no archive"),
    "wrong checksum": (flipped, "CRC|cannot be read"),
    "not UTF-8": (replaced(MODEL, b'{"a": "\xff\xfe"}'), "UTF-8"),
    "not JSON": (replaced(MODEL, b"hello"), "JSON"),
    "JSON of another kind": (replaced(MODEL, b"[1, 2]"), "expected an object"),
    "nested deeply": (deep(200_000), "nested too deeply|JSON"),
    "weight of absurd size": (weight(sizes=ints(2**40, 8), strides=ints(8, 1)), "needs"),
    "weight that repeats itself": (weight(sizes=ints(2**40), strides=ints(0)), "does not fit"),
    "weight that starts before": (weight(storage_offset={"as_int": -8}), "integer"),
    "weight of an unknown dtype": (weight(dtype=63), "dtype"),
    "weight that is missing": (without("archive/data/weights/weight_0"), "has no"),
    "weight from elsewhere": (weight(path_name="../../../etc/passwd"), "weight_N"),
    "no inputs": (without(INPUTS), "has no"),
    "other byte order": (replaced("archive/byteorder", b"big"), "byte order"),
}
