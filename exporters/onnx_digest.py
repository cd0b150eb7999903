"""The metadata of an exported graph. Its sha256 digests show whether the graph and the weights beside it are as exported.

The graph's digest is stored in the graph itself, so it is computed with 64 zeros in its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quantdit.system import files
from quantdit.system.files import CheckpointError

if TYPE_CHECKING:
    import onnx

METADATA = "quantdit"
DIGEST = "digest"
DATA = "data"
BLANK = "0" * 64


def describe(path: Path, content: dict) -> None:
    """Write the metadata into a saved graph, whose weights stay as they are, and the digests into both.

    Args:
        path: of the graph; weights in a file of their own lie beside it.
        content: the metadata; `digest` and `data`, the sha256 of each file of weights by name, are put into it.
    """
    import onnx

    stored = onnx.load(path, load_external_data=False)
    if DATA not in content:
        content[DATA] = {name: files.sha256(path.with_name(name)) for name in sorted(external_files(stored))}
    content[DIGEST] = BLANK
    onnx.helper.set_model_props(stored, {METADATA: json.dumps(content, sort_keys=True)})
    whole = stored.SerializeToString()
    content[DIGEST] = hashlib.sha256(whole).hexdigest()
    path.write_bytes(whole.replace(_entry(BLANK), _entry(content[DIGEST])))


def check(path: Path) -> dict:
    """Return the metadata of a graph, {} if quantdit did not export it.

    Raises:
        CheckpointError: the file is no ONNX graph, names weights outside of its folder, or is a graph of ours that was changed
            since its export, in itself or in the weights beside it.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        raw = path.read_bytes()
        stored = onnx.ModelProto.FromString(raw)
        external = external_files(stored)
    except (DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no ONNX graph, or a damaged one ({error}); copy it or export it again") from error
    for name in external:
        # protobuf gives a string that is no UTF-8 as bytes.
        if not isinstance(name, str) or Path(name).name != name or not name:
            raise CheckpointError(f"{path} names weights in {name!r}, outside of its folder; export it again")
    found = {entry.key: entry.value for entry in stored.metadata_props}
    # Either may be what was damaged.
    if METADATA not in found and _entry("") not in raw:
        return {}
    content = _parsed(found.get(METADATA, "null"))
    if METADATA in found and isinstance(content, dict) and _entry("") not in raw:
        raise CheckpointError(f"{path} has no digest, as earlier versions of quantdit exported it; export it again")
    stated = content.get(DIGEST) if isinstance(content, dict) else None
    blank = raw.replace(_entry(stated), _entry(BLANK)) if isinstance(stated, str) and stated.isascii() else raw
    if not isinstance(content, dict) or hashlib.sha256(blank).hexdigest() != stated:
        raise CheckpointError(f"{path} is not what quantdit export wrote: it was damaged or changed; copy it or export it again")
    stated = content.get(DATA)
    if not isinstance(stated, dict) or stated.keys() != external:
        raise CheckpointError(f"{path}: its metadata does not fit its weights; export it again")
    for name, expected in stated.items():
        data = path.with_name(name)
        if not data.is_file():
            raise CheckpointError(f"{data} is missing: it holds the weights of {path.name}; copy both, or export again")
        if files.sha256(data) != expected:
            raise CheckpointError(f"{data} is not what {path.name} was exported with; copy both, or export again")
    return content


def external_files(model: onnx.ModelProto) -> set[str]:
    """Return the names of the files beside a graph that hold its weights, as it states them."""
    return {
        next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        for tensor in _tensors(model.graph)
        if tensor.data_location == tensor.EXTERNAL or tensor.external_data
    }


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _entry(digest: str) -> bytes:
    """Return the bytes by which the metadata states a digest; for an empty one, the bytes that all of them begin with."""
    return f'"{DIGEST}": "{digest}'.encode()


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
