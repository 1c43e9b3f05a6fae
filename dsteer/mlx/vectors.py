"""Steering vectors as arrays of MLX, and in its two kinds of files.

What :meth:`dsteer.SteeringVectorSet.save` wrote is a file of MLX as it stands: ``mx.load`` reads
it, keyed by site.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from dsteer.errors import ConfigError, MeasurementError, StoreError
from dsteer.mlx.capture import to_torch
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, atomic_path


def to_arrays(vectors: SteeringVectorSet) -> dict[str, mx.array]:
    """Site → float32 array (d,)."""
    return {site: mx.array(one.tensor.float().numpy()) for site, one in vectors.items()}


def from_arrays(
    arrays: Mapping[str, mx.array], metadata: Mapping[str, Json] | None = None
) -> SteeringVectorSet:
    """A set of vectors from arrays (d,) keyed by site, of any real dtype.

    Raises:
        MeasurementError: no arrays, or ones that are no vectors of one width.
    """
    return SteeringVectorSet(
        (SteeringVector(to_torch(array), site) for site, array in arrays.items()), metadata
    )


def save_arrays(vectors: SteeringVectorSet, path: str | Path) -> None:
    """Write a file for ``mx.load``: ``.safetensors``, with what is known of them, or ``.npz``.

    Raises:
        ConfigError: another ending.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        vectors.save(path)
    elif path.suffix == ".npz":
        arrays: dict[str, Any] = {s: one.tensor.float().numpy() for s, one in vectors.items()}
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    else:
        raise ConfigError(f"{path}: expected a name that ends in .safetensors or .npz")


def load_vectors(path: str | Path) -> SteeringVectorSet:
    """Read a file of vectors keyed by site, by dsteer, ``mx.save_safetensors`` or ``mx.savez``.

    Raises:
        StoreError: missing or malformed, or its arrays are no set of steering vectors.
    """
    path = Path(path)
    if path.suffix != ".npz":
        return SteeringVectorSet.load(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return SteeringVectorSet(SteeringVector(arrays[site], site) for site in arrays.files)
    except FileNotFoundError:
        raise StoreError(f"{path}: no such file; save a set of steering vectors there") from None
    except (OSError, ValueError, zipfile.BadZipFile, MeasurementError) as error:
        raise StoreError(f"{path}: no set of steering vectors ({error})") from None
