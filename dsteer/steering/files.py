"""Vectors as ``layer_{k}.json`` and ``layer_{k}.pt``, the folder of rotalabs-steer.

Layer k is the output of block k, ``resid_post.{k}``. The ``.pt`` is the bare tensor (d,), float32;
the ``.json`` says what it is. ``metadata.json`` lists the layers of a folder, and is written last.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import dsteer
from dsteer.errors import MeasurementError, StoreError
from dsteer.store import Json, atomic_folder, atomic_path, read_json, to_json, write_json

if TYPE_CHECKING:
    from dsteer.steering.vector import SteeringVector, SteeringVectorSet

_INDEX = "metadata.json"
_LAYER = re.compile(r"layer_(0|[1-9]\d*)\.(json|pt)")
_UNKNOWN = "unknown"
"""What stands for a behaviour, model or method that is not known: readers expect a name."""


def write_layers(folder: str | Path, vectors: SteeringVectorSet) -> None:
    """Write a set as a folder, in the place of one that was written before; all of it or nothing.

    Raises:
        StoreError: a site that is no block's residual stream, or a folder that holds other files.
    """
    folder = Path(folder)
    strangers = sorted(
        item.name
        for item in (folder.iterdir() if folder.is_dir() else ())
        if item.name != _INDEX and not _LAYER.fullmatch(item.name)
    )
    if strangers:
        raise StoreError(
            f"{folder}: holds {strangers[0]!r} and would be replaced; choose a folder of its own"
        )
    layers = [_layer_of(folder, vector) for vector in vectors.values()]
    with atomic_folder(folder) as temporary:
        for layer, vector in zip(layers, vectors.values(), strict=True):
            _write(temporary / f"layer_{layer}", vector, vectors.metadata)
        index = {
            "behavior": vectors.behavior or vectors[layers[0]].behavior or _UNKNOWN,
            "layers": layers,
            "model_name": vectors.model_name or _UNKNOWN,
            "dsteer_version": dsteer.__version__,
            "metadata": vectors.metadata,
        }
        write_json(temporary / _INDEX, index)


def read_layers(folder: str | Path) -> SteeringVectorSet:
    """Read a folder of layers, of this program or of others; one without ``metadata.json`` too.

    Raises:
        StoreError: no such folder or layer, malformed files, or one that holds code.
    """
    from dsteer.steering.vector import SteeringVectorSet

    folder = Path(folder)
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such folder; expected one that holds layer_K.json")
    index: Any = {}
    if (folder / _INDEX).is_file():
        index = read_json(folder / _INDEX)
        layers = index.get("layers") if isinstance(index, dict) else None
    else:
        found = [_LAYER.fullmatch(item.name) for item in folder.glob("layer_*.json")]
        layers = sorted(int(match[1]) for match in found if match)
    if not isinstance(layers, list) or not layers or any(type(k) is not int for k in layers):
        raise StoreError(f"{folder}: a folder that lists no layers; expected layer_K.json files")
    vectors = [read_layer(folder / f"layer_{layer}") for layer in layers]
    try:
        own = _known({key: index.get(key) for key in ("behavior", "model_name")})
        return SteeringVectorSet(vectors, {**index.get("metadata", {}), **own})
    except (MeasurementError, TypeError) as error:
        raise StoreError(f"{folder}: no set of steering vectors ({error})") from None


def write_layer(path: str | Path, vector: SteeringVector) -> None:
    """Write one vector as ``X.json`` and ``X.pt``; ``path`` is X or one of both.

    Raises:
        StoreError: a site that is no block's residual stream.
    """
    stem = _stem(Path(path))
    _layer_of(stem, vector)
    _write(stem, vector, {})


def read_layer(path: str | Path) -> SteeringVector:
    """Read one vector from ``X.json`` and ``X.pt``; ``path`` is X or one of both.

    Raises:
        StoreError: missing or malformed, or a ``.pt`` that holds more than a tensor.
    """
    from dsteer.steering.vector import SteeringVector

    stem = _stem(Path(path))
    named, stored = _files(stem)
    for file in (named, stored):
        if not file.is_file():
            raise StoreError(f"{file}: no such file; expected a .json and a .pt of one name")
    said: Any = read_json(named)
    try:
        layer = said["layer_index"]
        if type(layer) is not int:
            raise MeasurementError(f"layer_index {layer!r}: expected the number of a block")
        return SteeringVector(
            vector=read_tensor(stored),
            layer_index=layer,
            metadata={
                **said.get("metadata", {}),
                **_known(
                    {key: said.get(key) for key in ("behavior", "model_name", "extraction_method")}
                ),
            },
        )
    except (MeasurementError, TypeError, AttributeError) as error:
        raise StoreError(f"{named}: no steering vector ({error})") from None
    except KeyError as error:
        raise StoreError(f"{named}: has no {error}; expected a steering vector's file") from None


def read_pickle(path: Path) -> Any:
    """Read a ``.pt`` file: tensors and plain containers; code in it never runs.

    Raises:
        StoreError: it is missing or malformed, or holds more than that.
    """
    if path.is_dir():
        raise StoreError(f"{path}: a folder; expected a .pt file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that another program wrote
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise StoreError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise StoreError(
            f"{path}: its pickle holds more than tensors, which may be code, or is none; expected "
            "a .pt file of tensors alone"
        ) from None
    except Exception as error:  # noqa: BLE001 - a broken one fails anywhere in the reader
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StoreError(f"{path}: no .pt file of torch ({reason}); expected one") from None


def read_tensor(path: Path) -> Tensor:
    """Read a ``.pt`` that holds one plain tensor and nothing else.

    Raises:
        StoreError: as :func:`read_pickle`, or it holds anything else.
    """
    value = read_pickle(path)
    if not isinstance(value, Tensor):
        raise StoreError(f"{path}: holds a {type(value).__name__}; expected a bare tensor")
    if not is_plain(value):
        raise StoreError(f"{path}: {odd(value)}; expected a plain tensor of real numbers")
    return value


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor that was read holds its numbers, one by one, and real ones."""
    special = tensor.is_meta or tensor.is_quantized or tensor.is_nested or tensor.is_complex()
    return tensor.layout == torch.strided and not special


def odd(tensor: Tensor) -> str:
    """What to call a tensor that is not plain."""
    layout = str(tensor.layout).removeprefix("torch.")
    return f"holds a tensor of {tensor.dtype} ({layout}, device {tensor.device.type})"


def write_pickle(path: Path, value: Any) -> None:
    """Write a ``.pt`` file, atomically; the same value gives the same bytes."""
    packed = io.BytesIO()  # in a file, torch.save would write the file's name into it
    torch.save(value, packed)
    with atomic_path(path) as temporary:
        temporary.write_bytes(packed.getvalue())


def _write(stem: Path, vector: SteeringVector, shared: Mapping[str, Json]) -> None:
    """Write both files of a vector; what is not known of it is taken from its set's metadata."""
    known = {**shared, **vector.metadata}
    own = ("behavior", "model_name", "extraction_method")
    said = {
        "behavior": known.get("behavior", _UNKNOWN),
        "layer_index": vector.layer_index,
        "model_name": known.get("model_name", known.get("model", _UNKNOWN)),
        "extraction_method": known.get("extraction_method", known.get("method", _UNKNOWN)),
        "metadata": {key: value for key, value in vector.metadata.items() if key not in own},
        "vector_shape": [vector.width],
    }
    named, stored = _files(stem)
    write_pickle(stored, vector.vector.contiguous())
    with atomic_path(named) as temporary:
        temporary.write_text(to_json(said), encoding="utf-8")


def _layer_of(path: Path, vector: SteeringVector) -> int:
    if vector.layer_index is None:
        raise StoreError(
            f"{path}: a folder of layers holds the residual stream behind blocks, and no vector at "
            f"{vector.site}; save as .safetensors"
        )
    return vector.layer_index


def _known(said: Mapping[str, Json]) -> dict[str, Json]:
    return {key: value for key, value in said.items() if value not in (None, _UNKNOWN)}


def _stem(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".json", ".pt") else path


def _files(stem: Path) -> tuple[Path, Path]:
    return stem.with_name(f"{stem.name}.json"), stem.with_name(f"{stem.name}.pt")
