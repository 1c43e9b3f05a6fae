"""Steering vectors, one or one a site, and their safetensors file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

import dsteer
from dsteer.errors import MeasurementError, StoreError
from dsteer.geometry.displacement import as_vector
from dsteer.store import Json, read_metadata, write_tensors

FORMAT = "dsteer.steering-vectors/1"
_WRITTEN_BY_SAVE = (
    "format",
    "dsteer_version",
    "width",
    "hook_points",
    "layer_indexing",
    "operation",
    "scale",
    "vectors",
)


class SteeringVector:
    """A direction (d,) in the residual stream at one site, in the units of its states.

    Args:
        tensor: a tensor, array or list of numbers; kept as float64 on the CPU, a copy.
        site: ``resid_post.{k}`` or ``final_norm``.
        metadata: what is known of it; JSON values.

    Raises:
        MeasurementError: not one-dimensional, not real numbers, not finite; a site that is no name.
    """

    def __init__(self, tensor: object, site: str, **metadata: Json) -> None:
        if not isinstance(site, str) or not site:
            raise MeasurementError(f"site {site!r} is no name; expected one such as 'resid_post.6'")
        self._tensor = torch.from_numpy(np.array(as_vector(tensor, f"vector at {site}")))
        self._site = site
        self._metadata = dict(metadata)

    @property
    def tensor(self) -> Float[Tensor, " d"]:
        """The vector, float64."""
        return self._tensor

    @property
    def site(self) -> str:
        """Where it acts."""
        return self._site

    @property
    def metadata(self) -> Mapping[str, Json]:
        """What is known of it."""
        return self._metadata

    @property
    def width(self) -> int:
        """d."""
        return self._tensor.numel()

    @property
    def norm(self) -> float:
        """‖v‖₂."""
        return float(torch.linalg.vector_norm(self._tensor))

    @property
    def undefined(self) -> bool:
        """Whether it is zero, so that it has no direction."""
        return not bool(self._tensor.any())

    def __repr__(self) -> str:
        return f"SteeringVector(site={self._site!r}, width={self.width}, norm={self.norm:.4g})"


class SteeringVectorSet(Mapping[str, SteeringVector]):
    """One steering vector a site, all of one width: a mapping from site name to vector.

    Args:
        vectors: the vectors, in order.
        metadata: what is known of them all; JSON values.

    Raises:
        MeasurementError: no vectors, two for one site, or different widths.
    """

    def __init__(
        self, vectors: Iterable[SteeringVector], metadata: Mapping[str, Json] | None = None
    ) -> None:
        self._vectors: dict[str, SteeringVector] = {}
        for vector in vectors:
            if vector.site in self._vectors:
                raise MeasurementError(
                    f"two vectors for site {vector.site}; a set holds one a site"
                )
            self._vectors[vector.site] = vector
        if not self._vectors:
            raise MeasurementError("a set of no steering vectors; give at least one")
        self.width = next(iter(self._vectors.values())).width
        for vector in self._vectors.values():
            if vector.width != self.width:
                raise MeasurementError(
                    f"vector at {vector.site} has width {vector.width}, the others {self.width}; "
                    "a set is for one model"
                )
        self.metadata: Mapping[str, Json] = dict(metadata or {})

    def __getitem__(self, site: str) -> SteeringVector:
        return self._vectors[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def __repr__(self) -> str:
        return f"SteeringVectorSet({len(self)} sites, width={self.width})"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically: float32 tensors keyed by site, JSON metadata."""
        write_tensors(
            Path(path),
            {site: vector.tensor.numpy().astype(np.float32) for site, vector in self.items()},
            {
                **self.metadata,
                "format": FORMAT,
                "dsteer_version": dsteer.__version__,
                "width": self.width,
                "hook_points": list(self),
                "layer_indexing": "0-based; resid_post.k is the output of block k",
                "operation": "add",
                "scale": 1.0,
                "vectors": {site: dict(vector.metadata) for site, vector in self.items()},
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> SteeringVectorSet:
        """Read a safetensors file of one-dimensional tensors keyed by site.

        Sites come in the order in which they were saved. Files of other programs may lack metadata.

        Raises:
            StoreError: missing or malformed, or its tensors are no set of steering vectors.
        """
        path = Path(path)
        if path.is_dir():
            raise StoreError(f"{path}: a folder; give the path of a safetensors file")
        metadata = read_metadata(path)
        tensors = load_file(path)
        own = {key: metadata.pop(key, None) for key in _WRITTEN_BY_SAVE}
        if own["format"] not in (FORMAT, None):
            raise StoreError(f"{path}: format {own['format']!r}, expected {FORMAT!r}")
        order, details = own["hook_points"] or sorted(tensors), own["vectors"] or {}
        try:
            if sorted(order) != sorted(tensors):
                raise MeasurementError(f"its hook points {order} are not its tensors")
            return cls(
                (SteeringVector(tensors[site], site, **details.get(site, {})) for site in order),
                metadata,
            )
        except (MeasurementError, TypeError, AttributeError) as error:
            raise StoreError(f"{path}: no set of steering vectors ({error})") from None
