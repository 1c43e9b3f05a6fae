"""llama.cpp's control vectors: a GGUF file with one direction a block.

``direction.N`` (d,), float32, is added as it is to the output of block N, counted from 0, at every
token. llama.cpp takes N from 1 on and reads nothing else; repeng and EasySteer read the fields
``general.architecture`` and ``controlvector.model_hint``, dsteer its own ``dsteer.provenance``.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from dsteer.activations.sites import block_of, component_of, resid_post
from dsteer.errors import MissingExtraError, StoreError
from dsteer.exchange.request import Export, imported, new_file, together, vector_of
from dsteer.models.anatomy import text_config
from dsteer.models.load import Model
from dsteer.steering.vector import SteeringVectorSet
from dsteer.store import Json

ARCHITECTURE = "controlvector"
_HINT = f"{ARCHITECTURE}.model_hint"
_PROVENANCE = "dsteer.provenance"
_DIRECTION = re.compile(r"direction\.(0|[1-9]\d{0,5})")
_MALFORMED = (
    ValueError, IndexError, KeyError, TypeError, OverflowError, OSError, MemoryError, struct.error,
)  # fmt: skip
"""The ways in which the reader fails on a file that is cut off or is none."""


def write(wanted: Export, path: Path) -> list[str]:
    """Write a control vector; λ is in it.

    Raises:
        ConfigError: block 0, final_norm or a site inside a block.
        MissingExtraError: the package ``gguf``.
    """
    notes = write_directions(wanted, path, first=1)
    return [
        *notes,
        f"The strength {wanted.strength:g} is in the file: llama.cpp --control-vector adds it as "
        "it is, --control-vector-scaled times its factor.",
    ]


def read(path: Path, _model: Model | None = None) -> SteeringVectorSet:
    """Read a control vector, of llama.cpp, repeng or dsteer.

    Raises:
        StoreError: it is none.
        MissingExtraError: the package ``gguf``.
    """
    return read_directions(path, "gguf")


def write_directions(wanted: Export, path: Path, *, first: int) -> list[str]:
    """Write the directions of blocks from ``first`` on; see :func:`write`."""

    def why_not(site: str) -> str | None:
        block = block_of(site)
        if block is None:
            return "it is behind no block's output"
        if component_of(site) is not None:
            return "directions are added to a block's output alone"
        if block < first:
            return "llama.cpp rejects a file with a direction for block 0"
        return None

    sites, notes = wanted.expressible(why_not)
    gguf = _package(path)
    hint = wanted.vectors.metadata.get("model_type")
    if wanted.model is not None:
        hint = text_config(wanted.model.config).model_type
    if not isinstance(hint, str):
        hint = "unknown"
        notes.append("The file's model_hint is 'unknown', for the vectors don't say their model's.")
    notes += together(sites)
    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), ARCHITECTURE)
        writer.add_string(_HINT, hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(sites))
        writer.add_string(_PROVENANCE, json.dumps(wanted.provenance()))
        for site in sites:
            writer.add_tensor(f"direction.{block_of(site)}", wanted.scaled(site))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return notes


def read_directions(path: Path, source: str) -> SteeringVectorSet:
    """Read the directions of a GGUF file; see :func:`read`."""
    gguf = _package(path)
    try:
        reader = gguf.GGUFReader(str(path))
        tensors = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
            for tensor in reader.tensors
        }
        hint, own = _text(reader, _HINT), _text(reader, _PROVENANCE)
    except _MALFORMED as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise StoreError(
            f"{path}: no complete GGUF file ({why or type(error).__name__}); expected a control "
            "vector"
        ) from None
    known = _provenance(own)
    details = known.pop("vectors", {})
    vectors = []
    for name, tensor in tensors.items():
        match = _DIRECTION.fullmatch(name)
        if match is None:
            raise StoreError(
                f"{path}: its tensor {name!r} is no direction; expected a control vector, whose "
                "tensors are direction.N"
            )
        site = resid_post(int(match[1]))
        vectors.append(vector_of(tensor, site, path, details.get(site)))
    if hint is not None and "model_type" not in known:
        known["model_hint"] = hint
    return imported(vectors, path, source, known)


def _text(reader: Any, key: str) -> str | None:
    field = reader.get_field(key)
    return None if field is None else bytes(field.parts[-1]).decode()


def _provenance(text: str | None) -> dict[str, Json]:
    try:
        found = {} if text is None else json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return {}
    details = found.get("vectors") if isinstance(found, dict) else None
    if not isinstance(details, dict) or not all(isinstance(one, dict) for one in details.values()):
        return {}
    return dict(found)


def _package(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", str(path)) from None
    return gguf
