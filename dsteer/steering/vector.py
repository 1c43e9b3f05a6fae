"""Steering vectors, one or one a site: arithmetic on them, and their files."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

import dsteer
from dsteer.activations.sites import block_of, resid_post
from dsteer.errors import MeasurementError, StoreError
from dsteer.geometry import comparison
from dsteer.geometry.displacement import as_vector
from dsteer.steering import files
from dsteer.store import Json, read_metadata, write_tensors

if TYPE_CHECKING:
    from dsteer.models.load import Model
    from dsteer.steering.calibrate import Calibration, Prompts

FORMAT = "dsteer.steering-vectors/1"
SUFFIX = ".safetensors"
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

    ``v + w``, ``v - w``, ``2 * v``, ``v / 2`` and ``-v`` are vectors at the same site. What a
    vector was made of stands in its metadata: ``sum_of`` holds that of the terms of a sum,
    ``steps`` what was done to one vector, in order.

    Args:
        tensor: a tensor, array or list of numbers; kept as float64 on the CPU, a copy.
        site: ``resid_post.{k}``, ``attn_out.{k}``, ``mlp_out.{k}`` or ``final_norm``.
        vector: another name of ``tensor``, as other libraries have it; (1, d) and (1, 1, d), the
            state of one token in a batch, will do.
        layer_index: k of the site ``resid_post.{k}``, instead of ``site``.
        metadata: what is known of it; JSON values. More of them may be given by name, such as the
            ``behavior``, ``model_name`` and ``extraction_method`` of other libraries.

    Raises:
        MeasurementError: not one-dimensional, not real numbers, not finite; a site that is no name;
            a tensor or a site given twice, or not at all.
    """

    __array_ufunc__ = None  # numpy's numbers leave 2 * v to the vector

    def __init__(
        self,
        tensor: object = None,
        site: str | None = None,
        *,
        vector: object = None,
        layer_index: SupportsIndex | None = None,
        metadata: Mapping[str, Json] | None = None,
        **known: Json,
    ) -> None:
        if layer_index is not None:
            if site is not None:
                raise MeasurementError(
                    f"layer_index {layer_index} beside site {site!r}; give one of both"
                )
            block = as_block(layer_index)
            if block is None or block < 0:
                raise MeasurementError(
                    f"layer_index {layer_index!r}: expected the number of a block, from 0"
                )
            site = resid_post(block)
        if not isinstance(site, str) or not site:
            raise MeasurementError(f"site {site!r} is no name; expected one such as 'resid_post.6'")
        if tensor is not None and vector is not None:
            raise MeasurementError(f"vector at {site}: tensor and vector are one; give one of both")
        given = _without_axes(vector) if tensor is None else tensor
        self._tensor = torch.from_numpy(np.array(as_vector(given, f"vector at {site}")))
        self._site = site
        self._metadata = {**(metadata or {}), **known}

    @property
    def tensor(self) -> Float[Tensor, " d"]:
        """The vector, float64."""
        return self._tensor

    @property
    def vector(self) -> Float[Tensor, " d"]:
        """The vector, float32: added to a state it leaves the state's dtype."""
        return self._tensor.float()

    @property
    def site(self) -> str:
        """Where it acts."""
        return self._site

    @property
    def layer_index(self) -> int | None:
        """k of ``resid_post.{k}``; None at another site."""
        return block_of(self._site) if self._site.startswith("resid_post.") else None

    @property
    def metadata(self) -> Mapping[str, Json]:
        """What is known of it."""
        return self._metadata

    @property
    def behavior(self) -> str | None:
        """What it is for, where its metadata says so."""
        return self._metadata.get("behavior")

    @property
    def model_name(self) -> str | None:
        """The model that it was read from, where its metadata says so."""
        return self._metadata.get("model_name", self._metadata.get("model"))

    @property
    def extraction_method(self) -> str | None:
        """How it was made, where its metadata says so."""
        return self._metadata.get("extraction_method", self._metadata.get("method"))

    @property
    def width(self) -> int:
        """d."""
        return self._tensor.numel()

    dim = width

    @property
    def norm(self) -> float:
        """‖v‖₂."""
        return float(torch.linalg.vector_norm(self._tensor))

    @property
    def undefined(self) -> bool:
        """Whether it is zero, so that it has no direction."""
        return not bool(self._tensor.any())

    def calibrate(
        self, model: Model, prompts: Prompts, *, target_kl: float | int, **settings: Any
    ) -> Calibration:
        """The strength that meets a budget: see :func:`dsteer.steering.calibrate.calibrate`."""
        from dsteer.steering.calibrate import calibrate

        return calibrate(self, model, prompts, target_kl=target_kl, **settings)

    def __repr__(self) -> str:
        return f"SteeringVector(site={self._site!r}, width={self.width}, norm={self.norm:.4g})"

    # ------------------------------------------------------------------ arithmetic

    def __add__(self, other: object) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if other.site != self._site:
            raise MeasurementError(
                f"a vector at {self._site} and one at {other.site}: states of two sites don't add "
                "up; expected vectors at one site"
            )
        self._require_width(other)
        terms = [{**v.metadata, "norm": v.norm} for v in (self, other)]
        return SteeringVector(
            self._tensor + other._tensor,
            self._site,
            metadata=_metadata_of_sum(self._metadata, other._metadata, terms),
        )

    def __radd__(self, other: object) -> SteeringVector:
        return self if _is_zero(other) else NotImplemented  # sum() begins with 0

    def __sub__(self, other: object) -> SteeringVector:
        return self + -other if isinstance(other, SteeringVector) else NotImplemented

    def __mul__(self, factor: object) -> SteeringVector:
        if (number := _number(factor)) is None:
            return NotImplemented
        return self._after(self._tensor * number, scaled_by=number)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> SteeringVector:
        if (number := _number(divisor)) is None:
            return NotImplemented
        return self * _inverse(number)

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def normalised(self, relative_to: float | int = 1.0) -> SteeringVector:
        """r v̂: the same direction with norm r, by default 1.

        Args:
            relative_to: r; with the mean norm of the site's states, a strength of 1 adds as much
                as there is.

        Raises:
            MeasurementError: the vector is zero, or r is not a finite number above 0.
        """
        if not 0 < relative_to < math.inf:
            raise MeasurementError(
                f"relative_to {relative_to} at {self._site}: expected a finite norm above 0"
            )
        self._require_direction("normalise")
        return self._after(
            self._tensor * (relative_to / self.norm),
            normalised_to=relative_to,
            norm_before=self.norm,
        )

    def project_out(self, other: SteeringVector) -> SteeringVector:
        """v − (v·ŵ) ŵ: the vector without its part along w.

        Raises:
            MeasurementError: w is zero, or of another width.
        """
        self._require_width(other)
        other._require_direction("project out")
        unit = other._tensor / other.norm
        rest = self._tensor - (self._tensor @ unit) * unit
        return self._after(rest, projected_out={**other._metadata, "site": other.site})

    def cosine(self, other: SteeringVector) -> float | None:
        """cos(v, w), sites may differ; None where one of them is zero.

        Raises:
            MeasurementError: another width.
        """
        self._require_width(other)
        found = float(comparison.cosine_matrix([self._tensor, other._tensor])[0, 1])
        return None if math.isnan(found) else found

    def _after(self, tensor: Float[Tensor, " d"], **step: Json) -> SteeringVector:
        return SteeringVector(tensor, self._site, metadata=_metadata_after(self._metadata, step))

    def _require_width(self, other: SteeringVector) -> None:
        if other.width != self.width:
            raise MeasurementError(
                f"vectors of width {self.width} (at {self._site}) and {other.width} (at "
                f"{other.site}); expected vectors of one model"
            )

    def _require_direction(self, what: str) -> None:
        if self.undefined:
            raise MeasurementError(
                f"the vector at {self._site} is zero, so it has no direction to {what}; leave it "
                "out"
            )

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write ``X.safetensors``; any other path as ``X.json`` and ``X.pt``, atomically each.

        Raises:
            StoreError: a site that the pair of files can't express.
        """
        path = Path(path)
        if path.suffix == SUFFIX:
            SteeringVectorSet([self]).save(path)
        else:
            files.write_layer(path, self)

    @classmethod
    def load(cls, path: str | Path) -> SteeringVector:
        """Read what :meth:`save` wrote, or the ``.json`` and ``.pt`` of another program.

        Metadata of the file that concerns the vector's model and making comes with it.

        Raises:
            StoreError: missing or malformed, holding code, or several vectors.
        """
        path = Path(path)
        if path.suffix != SUFFIX:
            return files.read_layer(path)
        vectors = SteeringVectorSet.load(path)
        if len(vectors) > 1:
            raise StoreError(
                f"{path}: holds {len(vectors)} vectors; load it as a SteeringVectorSet and choose "
                f"one of {', '.join(vectors)}"
            )
        (only,) = vectors.values()
        return cls(only.tensor, only.site, metadata={**vectors.metadata, **only.metadata})


class SteeringVectorSet(Mapping[str, SteeringVector]):
    """One steering vector a site, all of one width: a mapping from site name to vector.

    ``vset[3]`` is ``vset["resid_post.3"]``. Sums, multiples and the like are taken site by site, of
    two sets with the same sites; metadata: as of :class:`SteeringVector`.

    Args:
        vectors: the vectors, in order.
        metadata: what is known of them all; JSON values.
        behavior: what they are for; of a named behaviour a set may begin empty. Other libraries
            give it first: ``SteeringVectorSet("formality", vectors)``.

    Raises:
        MeasurementError: no vectors, two for one site, different widths or behaviours.
    """

    __array_ufunc__ = None

    def __init__(
        self,
        vectors: Iterable[SteeringVector] | str = (),
        metadata: Mapping[str, Json] | Iterable[SteeringVector] | None = None,
        *,
        behavior: str | None = None,
    ) -> None:
        given: Any = vectors
        known: Any = metadata
        if isinstance(given, str):
            behavior, given, known = given, known or (), None
        self._vectors: dict[str, SteeringVector] = {}
        self.metadata: Mapping[str, Json] = dict(known or {})
        if behavior is not None:
            self.metadata = {**self.metadata, "behavior": behavior}
        for vector in given:
            if not isinstance(vector, SteeringVector):
                raise MeasurementError(
                    f"a {type(vector).__name__} in a set; expected steering vectors (a set's own "
                    "are set.values())"
                )
            if vector.site in self._vectors:
                raise MeasurementError(
                    f"two vectors for site {vector.site}; a set holds one a site"
                )
            self.add(vector)
        if not self._vectors and behavior is None:
            raise MeasurementError("a set of no steering vectors; give at least one")

    def add(self, vector: SteeringVector) -> None:
        """Put a vector into the set, in the place of any at its site.

        Raises:
            MeasurementError: a vector of another width, or for another behaviour.
        """
        if self._vectors and vector.width != self.width:
            raise MeasurementError(
                f"vector at {vector.site} has width {vector.width}, the others {self.width}; "
                "a set is for one model"
            )
        if self.behavior is not None and vector.behavior not in (None, self.behavior):
            raise MeasurementError(
                f"vector at {vector.site} is for {vector.behavior!r}, the set for "
                f"{self.behavior!r}; a set is for one behaviour"
            )
        self._vectors[vector.site] = vector

    @property
    def width(self) -> int:
        """d.

        Raises:
            MeasurementError: the set is empty.
        """
        return self._some().width

    @property
    def behavior(self) -> str | None:
        """What the vectors are for, where the metadata say so."""
        return self.metadata.get("behavior")

    @property
    def model_name(self) -> str | None:
        """The model that they were read from, where metadata say so."""
        own = self.metadata.get("model_name", self.metadata.get("model"))
        return own or (self._some().model_name if self._vectors else None)

    @property
    def layers(self) -> list[int]:
        """The blocks whose residual stream has a vector, ascending."""
        found = (vector.layer_index for vector in self._vectors.values())
        return sorted(layer for layer in found if layer is not None)

    def get_best(self, metric: str = "norm") -> SteeringVector:
        """The vector of largest norm among the blocks' (all, if there are none).

        Norms grow with depth and are no measure of effect:
        :func:`dsteer.recommended_layers` asks a run what each layer recovers.

        Raises:
            MeasurementError: the set is empty, or another metric than ``norm``.
        """
        if metric != "norm":
            raise MeasurementError(f"metric {metric!r}: no such metric; expected 'norm'")
        self._some()
        blocks = [self[layer] for layer in self.layers]
        return max(blocks or self._vectors.values(), key=lambda vector: vector.norm)

    def __getitem__(self, site: str | SupportsIndex) -> SteeringVector:
        block = as_block(site)
        return self._vectors[str(site) if block is None else resid_post(block)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def calibrate(
        self, model: Model, prompts: Prompts, *, target_kl: float | int, **settings: Any
    ) -> dict[str, Calibration]:
        """Of each vector alone the strength that meets a budget, by site.

        See :func:`dsteer.steering.calibrate.calibrate`.
        """
        return {
            site: vector.calibrate(model, prompts, target_kl=target_kl, **settings)
            for site, vector in self.items()
        }

    def __repr__(self) -> str:
        width = self.width if self._vectors else None
        return f"SteeringVectorSet({len(self)} sites, width={width})"

    # ------------------------------------------------------------------ arithmetic

    def __add__(self, other: object) -> SteeringVectorSet:
        if not isinstance(other, SteeringVectorSet):
            return NotImplemented
        self._require_sites(other)
        return SteeringVectorSet(
            (self[site] + other[site] for site in self),
            _metadata_of_sum(self.metadata, other.metadata, [self.metadata, other.metadata]),
        )

    def __radd__(self, other: object) -> SteeringVectorSet:
        return self if _is_zero(other) else NotImplemented  # sum() begins with 0

    def __sub__(self, other: object) -> SteeringVectorSet:
        return self + -other if isinstance(other, SteeringVectorSet) else NotImplemented

    def __mul__(self, factor: object) -> SteeringVectorSet:
        if (number := _number(factor)) is None:
            return NotImplemented
        return self._each(lambda vector: vector * number, scaled_by=number)

    __rmul__ = __mul__

    def __truediv__(self, divisor: object) -> SteeringVectorSet:
        if (number := _number(divisor)) is None:
            return NotImplemented
        return self * _inverse(number)

    def __neg__(self) -> SteeringVectorSet:
        return self * -1.0

    def normalised(
        self, relative_to: Mapping[str, float | int] | float | int = 1.0
    ) -> SteeringVectorSet:
        """Each vector with norm r, by default 1; see :meth:`SteeringVector.normalised`.

        Args:
            relative_to: r, one for all or one a site, such as the mean norms of its states.

        Raises:
            MeasurementError: a vector is zero, or an r is missing or no finite number above 0.
        """
        norms = relative_to
        if not isinstance(norms, Mapping):
            norms = dict.fromkeys(self, norms)
        missing = [site for site in self if site not in norms]
        if missing:
            raise MeasurementError(f"relative_to has no norm for {missing[0]}; give one a site")
        return self._each(
            lambda vector: vector.normalised(norms[vector.site]),
            normalised_to=dict(relative_to) if isinstance(relative_to, Mapping) else relative_to,
        )

    def project_out(self, other: SteeringVectorSet | SteeringVector) -> SteeringVectorSet:
        """Each vector without its part along w of the same site, or along one w at all sites.

        Raises:
            MeasurementError: a w is zero or of another width, or the sets' sites differ.
        """
        if isinstance(other, SteeringVectorSet):
            self._require_sites(other)
        return self._each(
            lambda v: v.project_out(
                other[v.site] if isinstance(other, SteeringVectorSet) else other
            ),
            projected_out=dict(other.metadata),
        )

    def cosine(self, other: SteeringVectorSet) -> dict[str, float | None]:
        """cos(v, w) a site; None where one of them is zero.

        Raises:
            MeasurementError: other sites, or another width.
        """
        self._require_sites(other)
        return {site: self[site].cosine(other[site]) for site in self}

    def _each(
        self, change: Callable[[SteeringVector], SteeringVector], **step: Json
    ) -> SteeringVectorSet:
        self._some()
        return SteeringVectorSet(
            map(change, self._vectors.values()), _metadata_after(self.metadata, step)
        )

    def _some(self) -> SteeringVector:
        if not self._vectors:
            raise MeasurementError("the set holds no vector yet; add one")
        return next(iter(self._vectors.values()))

    def _require_sites(self, other: SteeringVectorSet) -> None:
        alone = sorted({*self} ^ {*other})
        if alone:
            raise MeasurementError(
                f"{alone[0]} is in one of both sets only; expected sets with the same sites"
            )

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically: float32 tensors keyed by site, JSON metadata.

        A path without a suffix, or a folder, gets ``layer_{k}.json`` and ``layer_{k}.pt`` instead,
        which other libraries read.

        Raises:
            StoreError: a folder of other files, or a site that a folder of layers can't express.
            MeasurementError: the set is empty.
        """
        path = Path(path)
        self._some()
        if not path.suffix or path.is_dir():
            files.write_layers(path, self)
            return
        write_tensors(
            path,
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
        """Read a safetensors file of one-dimensional tensors keyed by site, or a folder of layers.

        Sites come in the order in which they were saved. Files of other programs may lack metadata.

        Raises:
            StoreError: missing or malformed, or its tensors are no set of steering vectors.
        """
        path = Path(path)
        if path.is_dir():
            return files.read_layers(path)
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
                [SteeringVector(tensors[site], site, **details.get(site, {})) for site in order],
                metadata,
            )
        except (MeasurementError, TypeError, AttributeError) as error:
            raise StoreError(f"{path}: no set of steering vectors ({error})") from None


@overload
def cosine_matrix(vectors: Sequence[SteeringVector]) -> Float[Tensor, "m m"]: ...
@overload
def cosine_matrix(vectors: Sequence[SteeringVectorSet]) -> dict[str, Float[Tensor, "m m"]]: ...
def cosine_matrix(
    vectors: Sequence[SteeringVector] | Sequence[SteeringVectorSet],
) -> Float[Tensor, "m m"] | dict[str, Float[Tensor, "m m"]]:
    """cos(v_i, v_j) of each two vectors, whatever their sites; of sets, one matrix a common site.

    Returns:
        float64, NaN in the rows and columns of zero vectors.

    Raises:
        MeasurementError: nothing given, different widths, or sets without a common site.
    """
    if not vectors:
        raise MeasurementError("cosines of no vectors; give at least one")
    given: Sequence[Any] = vectors
    if isinstance(given[0], SteeringVector):
        return comparison.cosine_matrix([vector.tensor for vector in given])
    sets: Sequence[SteeringVectorSet] = given
    common = [site for site in sets[0] if all(site in vset for vset in sets)]
    if not common:
        raise MeasurementError(
            f"the sets have no site in common (the first has {', '.join(sets[0])}); expected sets "
            "for one model"
        )
    return {site: comparison.cosine_matrix([vset[site].tensor for vset in sets]) for site in common}


def _metadata_after(before: Mapping[str, Json], step: dict[str, Json]) -> dict[str, Json]:
    """The metadata of what one step made of something."""
    return {**before, "steps": [*before.get("steps", []), step]}


def _metadata_of_sum(
    v: Mapping[str, Json], w: Mapping[str, Json], terms: Sequence[Mapping[str, Json]]
) -> dict[str, Json]:
    """The metadata of v + w: what both share, and in ``sum_of`` that of each term.

    A term that is a sum itself, and nothing else, is replaced by its own terms.
    """
    found: list[Json] = []
    for term in terms:
        inner = term.get("sum_of")
        found += inner if inner is not None and "steps" not in term else [dict(term)]
    shared = {key: value for key, value in v.items() if key in w and w[key] == value}
    return {
        **{key: value for key, value in shared.items() if key not in ("steps", "sum_of")},
        "sum_of": found,
    }


def as_block(value: Any) -> int | None:
    """The number of a block, an integer of Python, numpy or torch, as int; None if it is none."""
    try:
        return operator.index(value)
    except TypeError:
        return None


def _number(value: object) -> float | None:
    """A factor as a finite number; None if it is none."""
    if isinstance(value, Tensor) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real):
        return None
    if not math.isfinite(value):
        raise MeasurementError(f"a steering vector times {value}: expected a finite number")
    return float(value)


def _without_axes(vector: Any) -> Any:
    """(1, …, 1, d) as (d,)."""
    if isinstance(vector, Tensor | np.ndarray):
        while vector.ndim > 1 and len(vector) == 1:
            vector = vector[0]
    return vector


def _inverse(number: float) -> float:
    if number == 0:
        raise MeasurementError("a steering vector divided by 0: expected another number")
    return 1 / number


def _is_zero(value: object) -> bool:
    return isinstance(value, int) and value == 0
