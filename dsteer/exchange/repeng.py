"""repeng's control vectors: objects that map layers to directions, and their GGUF file.

repeng's layer N is block N, whose output its model steers, at every token that is no padding. (It
reads the direction of layer N from ``hidden_states[N + 1]``, which for the last one is the state
after the final norm.) EasySteer reads the same file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dsteer.activations.sites import block_of, component_of, resid_post
from dsteer.errors import ConfigError, MeasurementError
from dsteer.exchange.llama_cpp import read_directions, write_directions
from dsteer.exchange.request import Export
from dsteer.models.load import Model
from dsteer.steering.vector import SteeringVector, SteeringVectorSet


def write(wanted: Export, path: Path) -> list[str]:
    """Write repeng's GGUF file; λ is in it. Block 0 may be there, which llama.cpp rejects.

    Raises:
        ConfigError: final_norm or a site inside a block.
        MissingExtraError: the package ``gguf``.
    """
    notes = write_directions(wanted, path, first=0)
    if resid_post(0) in wanted.vectors:
        notes.append("llama.cpp rejects the file, for it has a direction for block 0.")
    return [
        *notes,
        f"The strength {wanted.strength:g} is in the file: repeng's coefficient comes on top.",
    ]


def read(path: Path, _model: Model | None = None) -> SteeringVectorSet:
    """Read repeng's GGUF file.

    Raises:
        StoreError: it is none.
        MissingExtraError: the package ``gguf``.
    """
    return read_directions(path, "repeng")


def from_control_vector(control: Any) -> SteeringVectorSet:
    """The vectors of a repeng ``ControlVector``.

    Raises:
        MeasurementError: it is none.
    """
    directions = getattr(control, "directions", None)
    if not isinstance(directions, dict) or not all(isinstance(layer, int) for layer in directions):
        raise MeasurementError(
            f"{type(control).__name__} has no directions a layer; expected a repeng ControlVector"
        )
    vectors = [SteeringVector(directions[layer], resid_post(layer)) for layer in sorted(directions)]
    return SteeringVectorSet(
        vectors, {"method": "imported from repeng", "model_type": str(control.model_type)}
    )


def directions(vectors: SteeringVectorSet, strength: float = 1.0) -> dict[int, np.ndarray]:
    """λv of each block, as ``repeng.ControlVector(model_type, directions)`` takes them.

    Raises:
        ConfigError: final_norm or a site inside a block.
    """
    found = {}
    for site, vector in vectors.items():
        block = block_of(site)
        if block is None or component_of(site) is not None:
            raise ConfigError(f"repeng can't express {site}; expected resid_post.K")
        found[block] = (strength * vector.tensor).numpy().astype(np.float32)
    return found
