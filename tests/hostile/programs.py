"""Hostile `.pt2` files, made from an honest one: each function takes the members of that and returns the bytes of the file."""

import io
import json
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.evil import Evil
from tests.hostile.watch import CODE

Members = list[tuple[str, bytes]]
Maker = Callable[[Members], bytes]
MODEL, INPUTS = "archive/models/model.json", "archive/data/sample_inputs/model.pt"
WEIGHTS, CONSTANTS = "archive/data/weights/model_weights_config.json", "archive/data/constants/model_constants_config.json"


class Honest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, *, scale: str = "up") -> dict[str, torch.Tensor]:
        return {"y": self.norm(self.linear(x)) * (2 if scale == "up" else 1)}


def honest() -> Members:
    """Members of a program with a free size, a text among its inputs, and a dict as output."""
    buffer = io.BytesIO()
    batch = torch.export.Dim("batch", max=64)
    exported = torch.export.export(
        Honest().eval(), (torch.randn(2, 8),), {"scale": "up"}, dynamic_shapes={"x": {0: batch}, "scale": None}
    )
    torch.export.save(exported, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return [("archive/" + n.partition("/")[2], archive.read(n)) for n in archive.namelist()]


def packed(members: Members, method: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that stand twice
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, data in members:
                archive.writestr(name, data)
            archive.comment = comment
    return buffer.getvalue()


# -- what models/model.json can say ------------------------------------------------------------------------------------


def in_json(change: Callable[[dict[str, Any]], Any], member: str = MODEL) -> Maker:
    """The honest file with one change to a JSON member."""

    def make(members: Members) -> bytes:
        value = json.loads(dict(members)[member])
        before = json.dumps(value)
        change(value)
        assert json.dumps(value) != before, "the attack was not planted"
        return packed([(n, json.dumps(value).encode() if n == member else d) for n, d in members])

    return make


def graph(program: dict[str, Any]) -> dict[str, Any]:
    return program["graph_module"]["graph"]  # type: ignore[no-any-return]


def node(program: dict[str, Any], target: str = "torch.ops.aten.linear.default") -> dict[str, Any]:
    return next(n for n in graph(program)["nodes"] if n["target"] == target)


def calls(target: str, **inputs: dict[str, Any]) -> Maker:
    """The first operator is another one."""
    given = [{"name": k, "arg": v, "kind": 1} for k, v in inputs.items()]
    return in_json(lambda p: node(p).update(target=target, inputs=given))


def sized(text: str) -> Maker:
    """The free size is an expression."""

    def change(program: dict[str, Any]) -> None:
        graph(program)["tensor_values"]["x"]["sizes"][0]["as_expr"]["expr_str"] = text

    return in_json(change)


def guarded(*code: str) -> Maker:
    return in_json(lambda p: p.update(guards_code=[*p["guards_code"], *code]))


def nested(kind: str, context: Any, *, side: str = "out_spec", position: str = "root") -> Maker:
    """The tree of the outputs, or of the inputs, holds something else than a dict."""

    def change(program: dict[str, Any]) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        version, tree = json.loads(signature[side])
        place = tree if position == "root" else tree["children_spec"][1]
        place["type"], place["context"] = kind, context
        signature[side] = json.dumps([version, tree])

    return in_json(change)


def renamed(old: str, new: str) -> Maker:
    """One name stands for another, everywhere in the model."""
    quoted = json.dumps(new)[1:-1].encode()
    return lambda members: packed([(n, d.replace(old.encode(), quoted) if n == MODEL else d) for n, d in members])


def constant_text(text: str) -> Maker:
    """The text among the inputs, which PyTorch writes between quotes into the code that checks inputs."""

    def change(program: dict[str, Any]) -> None:
        for entry in graph(program)["inputs"]:
            if "as_string" in entry:
                entry["as_string"] = text
        for spec in program["graph_module"]["signature"]["input_specs"]:
            if "constant_input" in spec:
                spec["constant_input"]["value"] = {"as_string": text}

    return in_json(change)


def deep(levels: int) -> Maker:
    return lambda members: packed([(n, b"[" * levels if n == MODEL else d) for n, d in members])


# -- what members can hold ---------------------------------------------------------------------------------------------


def with_member(name: str, data: bytes) -> Maker:
    return lambda members: packed([*members, (name, data)])


def replaced(name: str, data: bytes) -> Maker:
    return lambda members: packed([(n, data if n == name else d) for n, d in members])


def without(name: str) -> Maker:
    return lambda members: packed([(n, d) for n, d in members if n != name])


def constant(path_name: str, *, pickled: bool) -> Maker:
    """A constant that is an object."""
    meta = {
        "dtype": 1, "sizes": [{"as_int": 8}], "requires_grad": False, "device": {"type": "cpu", "index": None},
        "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}, "layout": 7,
    }  # fmt: skip
    entry = {"path_name": path_name, "is_param": False, "use_pickle": pickled, "tensor_meta": None if pickled else meta}

    def make(members: Members) -> bytes:
        config = json.dumps({"config": {"extra": entry}}).encode()
        changed = [(n, config if n == CONSTANTS else d) for n, d in members]
        return packed([*changed, (f"archive/data/constants/{path_name}", pickle.dumps(Evil()))])

    return make


def weight(**meta: Any) -> Maker:
    """The first weight has another shape, place or form than its bytes."""

    def change(config: dict[str, Any]) -> None:
        entry = next(iter(config["config"].values()))
        for key, value in meta.items():
            (entry if key in entry else entry["tensor_meta"])[key] = value

    return in_json(change, WEIGHTS)


def parameter(name: str) -> Maker:
    """The first weight is called so."""

    def change(program: dict[str, Any]) -> None:
        program["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = name

    return in_json(change)


def ints(*values: int) -> list[dict[str, int]]:
    return [{"as_int": v} for v in values]


# -- what archives can be ----------------------------------------------------------------------------------------------

_evil_size = sized(CODE)


def _evil_members(members: Members) -> Members:
    with zipfile.ZipFile(io.BytesIO(_evil_size(members))) as archive:
        return [(n, archive.read(n)) for n in archive.namelist()]


def twice(first: str) -> Maker:
    """`models/model.json` stands twice: one reader takes the first, another the last."""

    def make(members: Members) -> bytes:
        evil = _evil_members(members)
        a, b = (evil, members) if first == "evil" else (members, evil)
        return packed([*a, (MODEL, dict(b)[MODEL])])

    return make


def two_roots(members: Members) -> bytes:
    return packed([*_evil_members(members), *((n.replace("archive/", "zzz/", 1), d) for n, d in members)])


def whole_twice(members: Members) -> bytes:
    return packed([*_evil_members(members), *members])


def prepended(members: Members) -> bytes:
    return packed(_evil_members(members)) + packed(members)


def appended(members: Members) -> bytes:
    return packed(members) + packed(_evil_members(members))


def trailing(members: Members) -> bytes:
    return packed(members) + b"#!/bin/sh\nmkdir pwned\n"


def commented(members: Members) -> bytes:
    return packed(members, comment=b"PK\5\6" + bytes(18))


def compressed(members: Members) -> bytes:
    return packed(members, zipfile.ZIP_DEFLATED)


def bomb(members: Members) -> bytes:
    return packed([(n, bytes(2**25) if n.endswith("weight_0") else d) for n, d in members], zipfile.ZIP_DEFLATED)


def encrypted(members: Members) -> bytes:
    return _patched(members, offset=8, value=struct.pack("<H", 1), local_offset=6)


def other_header(members: Members) -> bytes:
    """The header in front of the model says another name than the directory."""
    data = bytearray(packed(members))
    at = data.index(MODEL.encode())
    data[at : at + len(MODEL)] = MODEL.replace("model.json", "modem.json").encode()
    return bytes(data)


def overstated(members: Members) -> bytes:
    """A member claims more bytes than the file has."""
    return _patched(members, offset=20, value=struct.pack("<II", 2**31, 2**31))


def linked(members: Members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            if name.endswith("weight_0"):
                info.external_attr, data = 0o120777 << 16, b"/etc/passwd"
            archive.writestr(info, data)
    return buffer.getvalue()


def _patched(members: Members, *, offset: int, value: bytes, local_offset: int | None = None) -> bytes:
    """The directory entry of the first member with other bytes, and its own header too if that is said."""
    data = bytearray(packed(members))
    at = struct.unpack("<I", data[-6:-2])[0] + offset  # where the directory begins; an archive stands inside this one
    data[at : at + len(value)] = value
    if local_offset is not None:
        data[local_offset : local_offset + len(value)] = value
    return bytes(data)


def cut(part: float) -> Maker:
    return lambda members: packed(members)[: int(len(packed(members)) * part)]


def flipped(members: Members) -> bytes:
    """One bit of a weight is another: its checksum is wrong."""
    data = bytearray(packed(members))
    at = data.index(dict(members)["archive/data/weights/weight_0"])
    data[at] ^= 1
    return bytes(data)


def old_format(members: Members) -> bytes:
    """The format of PyTorch before 2.8, which is made of pickles."""
    evil = pickle.dumps(Evil())
    parts = ["serialized_state_dict.pt", "serialized_constants.pt", "serialized_example_inputs.pt"]
    return packed([("version", b"8.8"), ("serialized_exported_program.json", dict(members)[MODEL]), *((p, evil) for p in parts)])


def write(path: str | os.PathLike[str], data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
