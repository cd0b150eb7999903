"""Damage to files: each mutation is a function of a seed and a number, so that one can be replayed.

A mutation changes one file of a folder: its bytes, its JSON, the header of its safetensors, or what lies at its name.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

ODD_VALUES = (
    None,
    True,
    False,
    -1,
    0,
    1,
    10**9,
    2**63,
    1e308,
    0.5,
    float("nan"),
    float("inf"),
    float("-inf"),
    "",
    "x",
    "x" * 5000,
    "../x",
    "/etc/hostname",
    "a\0b",
    "\ud800",
    [],
    [0],
    [[]],
    {},
    {"x": 1},
)
DEEP = "[" * 100_000 + "]" * 100_000
DEPTH = "\x01deep"  # stands for DEEP until the text is written: no encoder nests so far
TWICE = "\x01twice "  # before a key that is to be written a second time
ODD_TEXT = ("true", "-1", "0", "1e9", "nan", "inf", '""', '"x"', "[]", "{}", "[1]", "'''", "1979-05-27", '"' + "x" * 5000 + '"')


def of_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return the bytes with a few of them flipped, overwritten, cut off, doubled, moved or added, and what was done."""
    kind = rng.choice(("flip", "flip", "flips", "run", "truncate", "double", "swap", "extend", "empty"))
    changed = bytearray(data)
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    if kind in ("flip", "flips") and data:
        places = [rng.randrange(8 * len(data)) for _ in range(1 if kind == "flip" else rng.randint(2, 64))]
        for place in places:
            changed[place // 8] ^= 1 << place % 8
        return bytes(changed), f"{kind} bits {places[:4]}"
    if kind == "run":
        b = min(b, a + rng.choice((1, 8, 256)))
        changed[a:b] = rng.choice((b"\0", b"\xff", b" ", rng.randbytes(1))) * (b - a)
    elif kind == "truncate":
        del changed[a:]
    elif kind == "double":
        changed[b:b] = data[a:b]
    elif kind == "swap":
        width = min(rng.choice((1, 16, 512)), b - a, len(data) - b)
        changed[a : a + width], changed[b : b + width] = data[b : b + width], data[a : a + width]
    elif kind == "extend":
        changed += rng.choice((b"\0", b"\n", b"}", rng.randbytes(64)))
    elif kind == "empty":
        changed.clear()
    return bytes(changed), f"{kind} bytes {a}:{b}"


def of_json(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return JSON with one node replaced, removed, renamed, doubled, nudged or swapped with another, and what was done."""
    content = {"": json.loads(data)}  # so that the whole is a node, too
    nodes = list(_nodes(content))
    parent, key, path = rng.choice(nodes)
    kinds = ["odd", "odd", "odd", "deep", "remove", "nudge", "nudge", "swap", "swap"]
    kinds += ["rename", "twice", "add"] if isinstance(parent, dict) else ["repeat"]
    kind = rng.choice(kinds)
    what = ""
    if kind == "odd":
        parent[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        what = repr(parent[key])[:40]
    elif kind == "deep":
        parent[key] = DEPTH
    elif kind == "remove":
        del parent[key]
    elif kind == "nudge":
        parent[key] = _nudged(parent[key], rng)
        what = repr(parent[key])[:40]
    elif kind == "swap":
        other, other_key, what = rng.choice(nodes)
        if not (what.startswith(path) or path.startswith(what)):  # one inside the other would hold itself
            parent[key], other[other_key] = other[other_key], parent[key]
    elif kind == "rename":
        parent[_nudged(key, rng)] = parent.pop(key)
    elif kind == "twice":
        parent[TWICE + key] = rng.choice(ODD_VALUES)
    elif kind == "add":
        parent[rng.choice(("x", "", "_class_name", "__proto__", "quant_method"))] = rng.choice(ODD_VALUES)
    else:
        parent.insert(key, copy.deepcopy(parent[key]))
    text = json.dumps(content.get(""), indent=None if rng.random() < 0.5 else 2)
    text = text.replace(json.dumps(TWICE)[1:-1], "").replace(json.dumps(DEPTH), DEEP)
    return text.encode(errors="surrogatepass"), f"{kind} {path} {what}".rstrip()


def of_text(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return a text with a line moved, doubled or left out, a value replaced, or its bytes damaged, and what was done."""
    kind = rng.choice(("bytes", "value", "value", "remove", "double", "swap", "long", "control"))
    lines = data.decode().splitlines(keepends=True)
    if kind == "bytes" or not lines:
        return of_bytes(data, rng)
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    if kind == "value":
        lines[i] = re.sub(r"= .*", lambda _: f"= {rng.choice(ODD_TEXT)}", lines[i])
    elif kind == "remove":
        del lines[i]
    elif kind == "double":
        lines.insert(j, lines[i])
    elif kind == "swap":
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == "long":
        lines.insert(i, "x" * 200_000 + "\n")
    else:
        lines[i] = lines[i].rstrip("\n") + rng.choice(("\r\n", "\0\n", "\u2028", "\ufeff\n", "\x85"))
    return "".join(lines).encode(), f"{kind} line {i}"


def of_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Return a safetensors file with a damaged header, length of the header, or payload, and what was done."""
    kind = rng.choice(("header", "header", "length", "payload", "payload", "bytes"))
    length = struct.unpack("<Q", data[:8])[0]
    header, payload = data[8 : 8 + length], data[8 + length :]
    if kind == "header":
        changed, what = of_json(header, rng)
        changed += b" " * (-len(changed) % 8)
        return struct.pack("<Q", len(changed)) + changed + payload, f"header: {what}"
    if kind == "length":
        wrong = rng.choice((0, 1, length - 8, length + 8, len(data), 2**32, 2**63, 2**64 - 1))
        return struct.pack("<Q", max(0, wrong)) + data[8:], f"header length {wrong}"
    if kind == "payload" and payload:
        changed, what = of_bytes(payload, rng)
        return data[: 8 + length] + changed, f"payload: {what}"
    return of_bytes(data, rng)


BY_SUFFIX: dict[str, Callable[[bytes, random.Random], tuple[bytes, str]]] = {
    ".json": of_json,
    ".safetensors": of_safetensors,
    ".toml": of_text,
    ".txt": of_text,
}


def mutate(folder: Path, name: str, rng: random.Random, names: bool = True) -> str:
    """Damage one file of a folder, or with `names` what lies at its name; returns what was done."""
    path = folder / name
    draw = rng.random()
    if draw < 0.05 and names:
        return f"{name}: {of_name(path, rng)}"
    data = path.read_bytes()
    structured = BY_SUFFIX.get(path.suffix, of_bytes)
    try:
        changed, what = (of_bytes if draw < 0.2 else structured)(data, rng)
    except (ValueError, struct.error):  # not what its suffix says, such as an empty file
        changed, what = of_bytes(data, rng)
    path.unlink()  # a hard link to the undamaged one
    path.write_bytes(changed)
    return f"{name}: {what}"


def of_name(path: Path, rng: random.Random) -> str:
    """Put something else in the place of a file; returns what."""
    kind = rng.choice(("nothing", "folder", "fifo", "loop", "dangling", "outside", "moved", "unreadable", "device"))
    kept = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "outside":
        path.symlink_to("/etc/hostname")
    elif kind == "moved":
        path.with_name("x" * 200).write_bytes(kept)
        path.symlink_to("x" * 200)
    elif kind == "unreadable":
        path.write_bytes(kept)
        path.chmod(0)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    return f"name is {kind}"


def _nodes(parent: dict | list, key: object = "", path: str = "$"):
    """Yield `(parent, key, path)` of the node `parent[key]` and of every one in it."""
    yield parent, key, path
    node = parent[key]
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for inner, _ in list(pairs):
        yield from _nodes(node, inner, f"{path}.{inner}")


def _nudged(value: object, rng: random.Random) -> object:
    """Return a value that is a little different."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice((-1, 1, 8, value))
    if isinstance(value, float):
        return value * rng.choice((0.999, 1.5, -1.0, 1e4, 1e-4))
    if isinstance(value, str) and value:
        place = rng.randrange(len(value))
        return value[:place] + rng.choice(("", "x", "0", "é", "/", ".")) + value[place + rng.randint(0, 1) :]
    if isinstance(value, list):
        return value[::-1] if len(value) > 1 else [*value, 0]
    if isinstance(value, dict):
        return dict(list(value.items())[1:])
    return 0
