"""What is asked of an export, and what all formats have in common."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsteer.activations.sites import resolve_sites, site_order
from dsteer.data.tokens import Tokenizer
from dsteer.errors import ConfigError, MeasurementError, ModelError, StoreError
from dsteer.models.anatomy import Anatomy
from dsteer.models.load import Model
from dsteer.steering.files import is_plain, odd
from dsteer.steering.intervene import Intervention
from dsteer.steering.provenance import require_fit
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, atomic_folder, atomic_path, hash_file, hash_folder

Steering = SteeringVector | SteeringVectorSet | Intervention | Sequence[Intervention]

_OF_ADDING = frozenset({"site", "vector", "strength", "seed"})
"""What an intervention that adds λv everywhere says; of all else it has the defaults."""

WhyNot = Callable[[str], str | None]
"""Why a format can't express a site; None where it can."""


@dataclass(frozen=True, eq=False)
class Export:
    """Vectors that are to be written, and how.

    Attributes:
        vectors: v at each site that was asked for, in the model's order.
        format: its name.
        strength: λ.
        model: that the vectors are for; None where none was given.
        tokenizer: of the model; None where none was given.
        skip: whether sites that the format can't express are left out.
    """

    vectors: SteeringVectorSet
    format: str
    strength: float
    model: Model | None = None
    tokenizer: Tokenizer | None = None
    skip: bool = False

    @classmethod
    def of(
        cls,
        what: Steering,
        name: str,
        strength: float = 1.0,
        *,
        sites: str | Sequence[str] | None = None,
        model: Model | None = None,
        tokenizer: Tokenizer | None = None,
        skip: bool = False,
    ) -> Export:
        """Check what is asked.

        Raises:
            ConfigError: no such site, or interventions that are no λv at all positions.
            ModelError: vectors that don't suit the model.
            MeasurementError: a strength that is not finite.
        """
        if not math.isfinite(strength):
            raise MeasurementError(f"strength {strength}: expected a finite number")
        vectors = as_set(what, name)
        named = [sites] if isinstance(sites, str) else sites
        for site in named or ():
            if site not in vectors:
                raise ConfigError(
                    f"site {site!r}: the vectors are at {', '.join(vectors)}; name one of these"
                )
        chosen = [vectors[site] for site in sorted(named or vectors, key=site_order)]
        # A safetensors file gives its metadata in any order, and files are to be the same.
        vectors = SteeringVectorSet(chosen, dict(sorted(vectors.metadata.items())))
        if model is not None:
            require_fit(vectors, model)
            anatomy = Anatomy.of(model)
            resolve_sites(list(vectors), anatomy.n_blocks, encoder=anatomy.encoder is not None)
        return cls(vectors, name, strength, model, tokenizer, skip)

    @property
    def n_blocks(self) -> int | None:
        """L, from the model or what the vectors' metadata says of theirs; None if unknown."""
        if self.model is not None:
            return Anatomy.of(self.model).n_blocks
        found = self.vectors.metadata.get("model_blocks")
        return found if isinstance(found, int) else None

    def expressible(self, why_not: WhyNot) -> tuple[list[str], list[str]]:
        """The sites that a format can express, and notes on those that are left out.

        Raises:
            ConfigError: it can't express some, and they are not to be left out; or none at all.
        """
        reasons = {site: why_not(site) for site in self.vectors}
        left = {site: reason for site, reason in reasons.items() if reason is not None}
        can = [site for site in self.vectors if site not in left]
        words = "; ".join(f"{site} ({reason})" for site, reason in left.items())
        if left and not (self.skip and can):
            remedy = "name others (--site)" + (", or leave these out (--skip)" if can else "")
            raise ConfigError(f"{self.format} can't express {words}; {remedy}")
        return can, [f"Left out: {words}."] if left else []

    def scaled(self, site: str) -> np.ndarray:
        """λv (d,) at a site, float32.

        Raises:
            MeasurementError: it is too large for that.
        """
        scaled = (self.strength * self.vectors[site].tensor).float()
        if not scaled.isfinite().all():
            raise MeasurementError(
                f"strength {self.strength:g} makes the vector at {site} too large for float32; "
                "choose a smaller one"
            )
        return scaled.numpy()

    def provenance(self) -> dict[str, Json]:
        """What a file can say of its vectors, where it has room for that."""
        details = {site: dict(vector.metadata) for site, vector in self.vectors.items()}
        return {
            **self.vectors.metadata,
            "strength_baked_in": self.strength,
            "vectors": details,
        }


def as_set(what: Steering, name: str) -> SteeringVectorSet:
    """The set of vectors that is added, with each intervention's strength multiplied in.

    Raises:
        ConfigError: an intervention that does anything else than adding one vector, by one
            strength, at all positions.
    """
    if isinstance(what, SteeringVectorSet):
        return what
    if isinstance(what, SteeringVector):
        return SteeringVectorSet([what], what.metadata)
    given = [what] if isinstance(what, Intervention) else list(what)
    vectors = []
    for one in given:
        for field in fields(one):
            value = getattr(one, field.name)
            if field.name not in _OF_ADDING and value != field.default:
                plain = isinstance(value, str | bool | tuple)
                raise ConfigError(
                    f"{name} can't express {field.name} {value if plain else type(value).__name__} "
                    f"at {one.site}: it adds one vector to every token's state; expected operation "
                    "add at positions all, in units of v, without schedule or condition"
                )
        numbers = np.asarray(one.strength, dtype=np.float64)
        vector = one.vector
        if vector is not None and not isinstance(vector, SteeringVector) and vector.ndim == 1:
            vector = SteeringVector(vector, one.site)
        if numbers.size != 1 or not isinstance(vector, SteeringVector):
            raise ConfigError(
                f"{name} can't express a vector or strength a row at {one.site}; expected one"
            )
        scaled = numbers.item() * vector.tensor
        vectors.append(SteeringVector(scaled, one.site, metadata=vector.metadata))
    return SteeringVectorSet(vectors)


def together(sites: Sequence[str]) -> list[str]:
    """What to know where a file's vectors are all added at once."""
    if len(sites) < 2:
        return []
    return [
        f"All {len(sites)} vectors are added at once; of a difference of models, each block's "
        "already holds those before it, so that one site alone does its work."
    ]


def imported(
    vectors: Sequence[SteeringVector],
    path: Path,
    source: str,
    known: Mapping[str, Json] | None = None,
) -> SteeringVectorSet:
    """A set that was read from another program's file, with what is known of it.

    Raises:
        StoreError: the vectors are no set.
    """
    digest = hash_folder(path) if path.is_dir() else hash_file(path)
    try:
        ordered = sorted(vectors, key=lambda vector: site_order(vector.site))
        metadata = {"method": f"imported from {source}", **(known or {})}
        metadata |= {"imported_from": source, "imported_sha256": digest}
        return SteeringVectorSet(ordered, metadata)
    except MeasurementError as error:
        raise StoreError(f"{path}: no set of steering vectors ({error})") from None


def vector_of(
    tensor: Any, site: str, path: Path, known: Mapping[str, Json] | None = None
) -> SteeringVector:
    """A vector that was read from another program's file.

    Raises:
        StoreError: it is no vector of finite numbers.
    """
    if isinstance(tensor, torch.Tensor):
        if not is_plain(tensor):
            raise StoreError(f"{path}: {odd(tensor)}; expected plain tensors of real numbers")
        tensor = tensor.detach()
        tensor = tensor.double() if tensor.is_floating_point() else tensor
    try:
        return SteeringVector(tensor, site, metadata=known)
    except MeasurementError as error:
        raise StoreError(f"{path}: {error}") from None


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that takes the place of the file ``path`` when the block succeeds.

    Raises:
        StoreError: ``path`` is a folder.
    """
    if path.is_dir():
        raise StoreError(f"{path}: a folder; the format is one file, so give a file's name")
    with atomic_path(path) as temporary:
        yield temporary


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` when the block succeeds, and goes when it fails.

    Raises:
        StoreError: something is at ``path``.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise StoreError(f"{path}: something is there already; choose another path")
    with atomic_folder(path) as temporary:
        try:
            yield temporary
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def require_model(wanted: Export, why: str) -> Model:
    """The model that an export needs.

    Raises:
        ConfigError: none was given.
    """
    if wanted.model is None:
        raise ConfigError(f"{wanted.format} needs the model, {why}; give it (--model)")
    return wanted.model


def refuse_adapter(model: Model, name: str) -> None:
    """Refuse a PEFT model.

    Raises:
        ModelError: it is one.
    """
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"{name} can't hold an adapter that is not merged; merge it into its base "
            "(merge_and_unload), save that, and give the folder"
        )
