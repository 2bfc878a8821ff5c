"""Changes to files, chosen by a seeded generator: flipped bits for what has a hash, and for what has none, or whose hash is made right
again, values that are of another type, too large, not finite, no text, or somewhere else."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from reseal import reseal

from runtimes.artifacts.manifest import NOT_HASHED, hash_files
from runtimes.files.records import to_json

Random = random.Random
Mutation = Callable[[Random, Path], str]
"""Changes the file or folder; returns what it did."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, "", " ", "\0", "\x1b[2J", "[/x]", "[red]", "\ud800", "a" * 5000, "../../x", "/etc/passwd", "{{ 9 ** 9 }}"),
    *(0, 1, -1, 2, 2**31, 2**32, 2**53, 2**62, 2**63, 2**64, -(2**63), 10**30, 10**4000, 0.5, -0.0, 1e-320, 1e300, 1e308),
    *([], {}, [[]], [None], {"": ""}, [0] * 1000, {"a": {"b": {"c": {}}}}),
)


def one(chance: Random, options: Any) -> Any:
    return options[chance.randrange(len(options))]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON document, the document's own left out."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in entries:
        yield (*path, key)
        yield from places(each, (*path, key))


def change_json(chance: Random, content: Any) -> str:
    """One to three values replaced, removed, doubled or put elsewhere, in place."""
    said = []
    for _ in range(one(chance, (1, 1, 2, 3))):
        known = list(places(content))
        if not known:
            break
        *way, last = one(chance, known)
        parent = content
        for key in way:
            parent = parent[key]
        how = one(chance, ("value", "value", "value", "remove", "swap", "key", "again"))
        if how == "remove":
            del parent[last]
        elif how == "swap":
            other = content
            for key in one(chance, known):
                if isinstance(other, (dict, list)) and (key in other if isinstance(other, dict) else key < len(other)):
                    other = other[key]
            parent[last] = json.loads(json.dumps(other))
        elif how == "key" and isinstance(parent, dict):
            parent[str(one(chance, VALUES))[:200]] = parent.pop(last)
        elif how == "again" and isinstance(parent, list):
            parent.append(parent[last])
        else:
            parent[last] = copy.deepcopy(one(chance, VALUES))
        said.append(f"{how} {'.'.join(map(str, (*way, last)))[:80]}")
    return "; ".join(said)


def sealed(chance: Random, path: Path) -> str:
    """A JSON file of ours, with a right digest; and of a bundle's or adapter's other files with a right hash."""
    content = json.loads(path.read_text())
    said = change_json(chance, content)
    try:
        if path.name in ("manifest.json", "adapter.json", "engine.json"):
            reseal(path, lambda old: (old.clear(), old.update(content)) if isinstance(content, dict) else None)
        else:
            path.write_text(json.dumps(content))
    except (ValueError, RecursionError):  # what JSON cannot hold is nobody's file
        return ""
    return said


def rehash(bundle: Path) -> None:
    """A manifest that vouches for every file as it is now."""
    reseal(bundle / "manifest.json", files=to_json(hash_files(bundle, NOT_HASHED)))


def bytes_of(chance: Random, path: Path) -> str:
    """Bytes changed, cut off, repeated or put in, in the first 4 kB more often than behind."""
    content = bytearray(path.read_bytes())
    for _ in range(one(chance, (1, 1, 3, 16))):
        if not content:
            break
        at = chance.randrange(min(len(content), one(chance, (64, 512, 4096, len(content)))))
        how = one(chance, ("bit", "byte", "int", "cut", "insert", "remove"))
        if how == "bit":
            content[at] ^= 1 << chance.randrange(8)
        elif how == "byte":
            content[at] = one(chance, (0, 1, 127, 128, 255))
        elif how == "int":
            value = one(chance, (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1))
            content[at : at + 8] = struct.pack("<Q", value)
        elif how == "cut":
            del content[at:]
        elif how == "insert":
            content[at:at] = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 9)))
        else:
            del content[at : at + chance.randrange(1, 9)]
    path.write_bytes(bytes(content))
    return f"bytes of {path.name}"


def flipped_bit(chance: Random, path: Path) -> str:
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content) * 8)
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(bytes(content))
    return f"bit {at} of {path.name}"


def safetensors(chance: Random, path: Path) -> str:
    """The header's JSON, with its own length right."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    said = change_json(chance, header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return f"header: {said}"


DTYPES = ("<f4", "<f2", "<f8", "<i8", "<i4", "|b1", "<c8", "|O", "<U3", "|S3", "<M8[s]", "|V4")
SHAPES: tuple[Any, ...] = ((), (0,), (1,), (2**40,), (2**62, 2**62), (-1,), (1,) * 33, (3, 0, 5))


def npz(chance: Random, path: Path) -> str:
    """An array of another type or shape, a header that lies, an archive that says other sizes, or one that unpacks to far more."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = one(chance, sorted(members))
    how = one(chance, ("type", "shape", "bomb", "pickle", "other", "name", "values", "bytes"))
    if how == "bytes":
        return bytes_of(chance, path)
    array = np.lib.format.read_array(io.BytesIO(members[name]), allow_pickle=False)
    out = io.BytesIO()
    header = {"descr": one(chance, DTYPES) if how == "type" else array.dtype.str, "fortran_order": False, "shape": array.shape}
    if how == "shape":
        header["shape"] = one(chance, SHAPES)
    if how == "bomb":
        header["shape"] = (2**28 // array.itemsize,)
    if how == "values" and array.size:
        array = array.copy()
        with np.errstate(all="ignore"):
            array.reshape(-1)[chance.randrange(array.size)] = one(chance, (0, -1, 1, 2**31 - 1)) if array.dtype.kind != "f" else np.nan
    if how == "pickle":
        np.lib.format.write_array(out, np.array([{"a": 1}, None], object), allow_pickle=True)
    elif how == "other":
        out.write(one(chance, (b"", b"\x93NUMPY", b"\x93NUMPY\x09\x00", pickle.dumps([1]))))
    else:
        np.lib.format.write_array_header_2_0(out, header)
        out.write(bytes(2**28) if how == "bomb" else array.tobytes())
    members[f"{one(chance, VALUES)!s:.50}.npy" if how == "name" else name] = out.getvalue()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, content in members.items():
            try:
                archive.writestr(each, content)
            except (UnicodeEncodeError, ValueError):
                return ""
    return f"{how} of {name}"


def graph(chance: Random, path: Path) -> str:
    """One field of an ONNX file: of a tensor, a node, an input or a name."""
    model = onnx.load(path, load_external_data=False)
    g = model.graph
    how = one(chance, ("dims", "type", "location", "offset", "input", "output", "op", "attribute", "shape", "name", "opset", "loop"))
    try:
        if how == "dims":
            tensor = one(chance, g.initializer)
            tensor.dims[:] = one(chance, ([2**62], [2**31, 2**31], [-1], [0], [], [2**40, 1], [*tensor.dims, 2]))
        elif how == "type":
            one(chance, g.initializer).data_type = one(chance, (0, 1, 7, 8, 9, 16, 23, 24, 99, 2**31 - 1))
        elif how in ("location", "offset"):
            entries = [e for t in g.initializer for e in t.external_data if e.key in (how, "length")]
            if entries:
                one(chance, entries).value = str(one(chance, VALUES))[:300]
        elif how == "input":
            node = one(chance, g.node)
            node.input[:] = [*node.input[1:], one(chance, [o for n in g.node for o in n.output])]
        elif how == "output":
            node, other = one(chance, g.node), one(chance, g.node)
            node.output[:] = list(other.output)
        elif how == "op":
            one(chance, g.node).op_type = one(chance, ("MatMul", "Add", "Loop", "If", "Nothing", "Cast", "", "Constant"))
        elif how == "attribute":
            attribute = one(chance, [a for n in g.node for a in n.attribute])
            attribute.type = one(chance, (1, 2, 3, 4, 5, 6, 7, 8))
            attribute.i = one(chance, (0, -1, 2**62, 2**31))
        elif how == "shape":
            value = one(chance, [*g.input, *g.output])
            value.type.tensor_type.shape.dim.add().dim_value = one(chance, (-1, 0, 2**62))
        elif how == "name":
            named = one(chance, [*g.node, *g.input, *g.output, *g.initializer])
            named.name = str(one(chance, VALUES))[:99].encode(errors="replace").decode()
        elif how == "opset":
            model.opset_import[0].version = one(chance, (0, -1, 1, 99, 2**62))
        else:
            node = one(chance, g.node)
            node.input[:] = list(node.output)
        path.write_bytes(model.SerializeToString())
    except (IndexError, ValueError, TypeError, UnicodeError):
        return ""
    return how


def odd_file(chance: Random, path: Path) -> str:
    """Something that is no file of bytes."""
    path.unlink()
    how = one(chance, ("folder", "pipe", "link to itself", "link to nothing", "device", "empty"))
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "link to itself":
        path.symlink_to(path.name)
    elif how == "link to nothing":
        path.symlink_to("nothing")
    elif how == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
    return f"{path.name} is now: {how}"
