"""The folder of rotalabs-steer: ``layer_{k}.json`` and ``layer_{k}.pt``, k the block."""

from __future__ import annotations

from pathlib import Path

from dsteer.activations.sites import block_of, component_of
from dsteer.exchange.request import Export, imported, new_folder
from dsteer.models.load import Model
from dsteer.steering.files import read_layers, write_layers
from dsteer.steering.vector import SteeringVector, SteeringVectorSet


def write(wanted: Export, path: Path) -> list[str]:
    """Write the folder; λ is in its tensors.

    Raises:
        ConfigError: final_norm or a site inside a block.
        StoreError: something is at ``path``.
    """

    def why_not(site: str) -> str | None:
        if block_of(site) is None or component_of(site) is not None:
            return "a layer is a block's output"
        return None

    sites, notes = wanted.expressible(why_not)
    vectors = [
        SteeringVector(wanted.scaled(site), site, metadata=wanted.vectors[site].metadata)
        for site in sites
    ]
    known = {**wanted.vectors.metadata, "strength_baked_in": wanted.strength}
    with new_folder(path) as folder:
        write_layers(folder, SteeringVectorSet(vectors, known))
    return [*notes, f"The strength {wanted.strength:g} is in the tensors."]


def read(path: Path, _model: Model | None = None) -> SteeringVectorSet:
    """Read such a folder.

    Raises:
        StoreError: it is none.
    """
    vectors = read_layers(path)
    return imported(list(vectors.values()), path, "rotalabs", vectors.metadata)
