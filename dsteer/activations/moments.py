"""What is kept of a pair's states when the states are not: moments and sums, site by site."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, UInt8
from safetensors import safe_open
from torch import Tensor

from dsteer.errors import MeasurementError, StoreError
from dsteer.geometry.moments import Moments
from dsteer.geometry.sums import ClusterSums
from dsteer.store import Json, hash_json, read_metadata, write_tensors

MATRICES = ("delta", "base", "tuned")
"""ΔH, H_base and H_tuned."""


class SiteMoments:
    """What is kept of the states of some prompts at one site.

    Args:
        width: d.
        matrices: which of ``delta``, ``base`` and ``tuned`` get a d×d moment.
        signed: whether sums with random signs are kept, for the null of cosines.

    Attributes:
        matrices: their moments, by name.
        sums: sums of displacements by bucket of conversations.
        base_norms: Σ ‖h_base‖.
    """

    def __init__(
        self, width: int, matrices: Collection[str] = MATRICES, *, signed: bool = False
    ) -> None:
        self.matrices = {name: Moments(width) for name in MATRICES if name in matrices}
        self.sums = ClusterSums(width, signed=signed)
        self.base_norms = 0.0

    @property
    def n(self) -> int:
        """Rows seen."""
        return self.sums.n

    def update(
        self,
        base: Float[Tensor, "n d"],
        tuned: Float[Tensor, "n d"],
        buckets: Int[np.ndarray, " r"] | Sequence[int],
        signs: UInt8[np.ndarray, "n bytes"] | None = None,
    ) -> None:
        """Add rows, each with its bucket, and its signs where they are kept; Δ is in float64.

        Raises:
            MeasurementError: rows that are malformed, not finite, or of another width.
        """
        rows = {"base": base.double(), "tuned": tuned.double()}
        rows["delta"] = rows["tuned"] - rows["base"]
        self.sums.update(rows["delta"], buckets, signs)
        for name, moments in self.matrices.items():
            moments.update(rows[name])
        self.base_norms += float(rows["base"].norm(dim=1).sum())

    def merge(self, other: SiteMoments) -> None:
        """Add the rows that another accumulation saw.

        Raises:
            MeasurementError: it is of another width, or of other matrices.
        """
        if self.matrices.keys() != other.matrices.keys():
            raise MeasurementError(
                f"moments of {', '.join(other.matrices) or 'nothing'}, expected moments of "
                f"{', '.join(self.matrices) or 'nothing'}"
            )
        self.sums.merge(other.sums)
        for name, moments in self.matrices.items():
            moments.merge(other.matrices[name])
        self.base_norms += other.base_norms

    def tensors(self) -> dict[str, np.ndarray]:
        """What there is to keep, by name."""
        kept = {f"sums/{name}": value for name, value in self.sums.tensors().items()}
        for matrix, moments in self.matrices.items():
            kept |= {f"{matrix}/{name}": value for name, value in moments.tensors().items()}
        return kept | {"base_norms": np.array([self.base_norms])}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray]) -> SiteMoments:
        """Take up again what :meth:`tensors` gave."""
        site = cls(0, ())
        site.sums = ClusterSums.from_tensors(_below("sums", tensors))
        site.matrices = {
            name: Moments.from_tensors(_below(name, tensors))
            for name in MATRICES
            if f"{name}/n" in tensors
        }
        site.base_norms = float(tensors["base_norms"][0])
        return site


class PairedMoments(Mapping[str, SiteMoments]):
    """Site → what is kept of both models' states there on the same token ids.

    Stored ones are read from disk when asked for, and not kept.

    Attributes:
        position: which tokens the rows are.
        ids_sha256: hash of the ids that both models read.
    """

    def __init__(
        self,
        sites: Sequence[str],
        position: str,
        ids_sha256: str,
        read: Callable[[str], SiteMoments],
    ) -> None:
        self._sites = tuple(sites)
        self.position, self.ids_sha256 = position, ids_sha256
        self._read = read

    @classmethod
    def hold(
        cls, sites: Mapping[str, SiteMoments], position: str, ids_sha256: str
    ) -> PairedMoments:
        """Moments that are in memory."""
        return cls(tuple(sites), position, ids_sha256, sites.__getitem__)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites, in the model's order."""
        return self._sites

    @property
    def n(self) -> int:
        """Rows of every site."""
        return self[self._sites[0]].n

    def merged(self, *others: PairedMoments) -> PairedMoments:
        """These rows and those of other accumulations, in memory: of shards of one reading.

        The order counts for rounding alone. ``ids_sha256`` becomes the hash of all parts' hashes.

        Raises:
            MeasurementError: other sites, another position, width, or other matrices.
        """
        for other in others:
            if (other.sites, other.position) != (self.sites, self.position):
                raise MeasurementError(
                    f"moments of {', '.join(other.sites)} at {other.position}, expected those of "
                    f"{', '.join(self.sites)} at {self.position}"
                )
        found = {}
        for name in self._sites:
            found[name] = SiteMoments.from_tensors(self[name].tensors())  # a copy
            for other in others:
                found[name].merge(other[name])
        parts = [part.ids_sha256 for part in (self, *others)]
        return PairedMoments.hold(found, self.position, hash_json(parts) if others else parts[0])

    def tensors(self) -> dict[str, np.ndarray]:
        """What there is to keep, as ``{site}/…``."""
        return {
            f"{name}/{key}": value
            for name in self._sites
            for key, value in self[name].tensors().items()
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, np.ndarray], position: str, ids_sha256: str
    ) -> PairedMoments:
        """Take up again what :meth:`tensors` gave."""
        names = dict.fromkeys(key.partition("/")[0] for key in tensors)
        found = {name: SiteMoments.from_tensors(_below(name, tensors)) for name in names}
        return cls.hold(found, position, ids_sha256)

    def __getitem__(self, site: str) -> SiteMoments:
        if site not in self._sites:
            raise KeyError(site)
        return self._read(site)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


def _below(prefix: str, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    start = f"{prefix}/"
    return {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}


# ---------------------------------------------------------------------------------- files


def write_moments(
    path: Path, splits: Mapping[str, Mapping[str, SiteMoments]], metadata: Mapping[str, Json]
) -> None:
    """Write the moments of some splits as ``{split}/{site}/…``, atomically.

    Args:
        path: the file.
        splits: split → site → moments.
        metadata: ``position``, ``ids_sha256``, and ``parts``: how many parts of the reading are
            in, and of how many; :func:`open_moments` refuses a file that lacks some.
    """
    tensors = {
        f"{split}/{site}/{key}": value
        for split, sites in splits.items()
        for site, moments in sites.items()
        for key, value in moments.tensors().items()
    }
    sites = list(next(iter(splits.values())))
    write_tensors(path, tensors, {**metadata, "splits": list(splits), "sites": sites})


def open_moments(path: Path, *, unfinished: bool = False) -> dict[str, PairedMoments]:
    """Open what :func:`write_moments` wrote: split → moments.

    Args:
        path: the file.
        unfinished: whether a file that lacks parts will do.

    Raises:
        StoreError: the file is missing, malformed, or of a reading that did not end.
    """
    known = read_metadata(path)
    try:
        splits, sites = list(known["splits"]), list(known["sites"])
        position, ids, (done, parts) = known["position"], known["ids_sha256"], known["parts"]
    except (KeyError, TypeError, ValueError):
        raise StoreError(f"{path}: holds no moments; run the stage that writes them") from None
    if done < parts and not unfinished:
        raise StoreError(
            f"{path}: holds {done} of {parts} parts of a reading; run it again to the end"
        )

    def reader(split: str) -> Callable[[str], SiteMoments]:
        return lambda site: SiteMoments.from_tensors(_read_below(path, f"{split}/{site}/"))

    return {split: PairedMoments(sites, position, ids, reader(split)) for split in splits}


def open_streamed(folder: Path) -> dict[str, PairedMoments] | None:
    """The moments in a folder of the stage ``activations``; None where it stored all states.

    Raises:
        StoreError: as :func:`open_moments`.
    """
    path = folder / "moments.safetensors"
    return open_moments(path) if path.is_file() else None


def _read_below(path: Path, start: str) -> dict[str, np.ndarray]:
    with safe_open(path, framework="np") as file:
        names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
        return {name[len(start) :]: file.get_tensor(name) for name in names}
