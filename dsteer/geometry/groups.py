"""Displacements of several groups of prompts, and the ranks that their preferences imply."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from dsteer.geometry.intervals import Interval, cluster_sums, jackknifed


@dataclass(frozen=True)
class Ranks:
    """Ranks of a matrix with a row a group, each as often as the group has prompts.

    Attributes:
        participation: (Σσ²)² / Σσ⁴ of the rows; None where all are zero.
        centred_participation: likewise, the mean row taken off; 0 where nothing is left.
        rank: how many σ are above rounding.
        centred_rank: likewise, the mean row taken off.
    """

    participation: float | None
    centred_participation: float | None
    rank: int
    centred_rank: int


def ranks(rows: Float[np.ndarray, "k d"], sizes: Sequence[int]) -> Ranks:
    """The ranks of a matrix in which row g occurs ``sizes[g]`` times."""
    weights = np.sqrt(np.asarray(sizes, dtype=np.float64))[:, None]
    mean = (rows * weights**2).sum(axis=0) / (weights**2).sum()
    plain = np.linalg.svd(rows * weights, compute_uv=False)
    centred = np.linalg.svd((rows - mean) * weights, compute_uv=False)
    floor = max(rows.shape) * np.finfo(np.float64).eps * float(plain[0])
    plain, centred = plain[plain > floor], centred[centred > floor]
    whole = _participation(plain)
    return Ranks(
        whole,
        None if whole is None else _participation(centred) or 0.0,
        len(plain),
        len(centred),
    )


def _participation(sigma: np.ndarray) -> float | None:
    if not len(sigma):
        return None
    energy = (sigma / sigma[0]) ** 2
    return float(energy.sum() ** 2 / (energy**2).sum())


def expected_ranks(weights: Sequence[Mapping[str, float]], sizes: Sequence[int]) -> Ranks:
    """The ranks of the displacements if each group moved by Σ weight · b_axis, the b orthonormal.

    k groups that each prefer an axis of their own give k and k − 1; one that prefers all, 1 and 0.

    Args:
        weights: of each group's axes.
        sizes: prompts of each group.
    """
    names = list(dict.fromkeys(name for group in weights for name in group))
    rows = np.array([[group.get(name, 0.0) for name in names] for group in weights])
    return ranks(rows, sizes)


def rank_intervals(
    deltas: Sequence[Float[np.ndarray, "_n d"]],
    clusters: Sequence[Sequence[Hashable]],
    confidence: float = 0.95,
) -> tuple[Interval | None, Interval | None]:
    """Participation of the groups' mean displacements, plain and centred, jackknifed.

    Each conversation of each group is left out in turn; None where undefined, and without ends
    where a group is one conversation, whose spread nothing tells.
    """
    sizes = [len(rows) for rows in deltas]
    means = np.stack([rows.mean(axis=0) for rows in deltas])
    value, n = ranks(means, sizes), sum(sizes)
    left: list[Ranks] = []
    for number, (rows, keys) in enumerate(zip(deltas, clusters, strict=True)):
        counts = cluster_sums(np.ones(len(rows)), keys)
        for total, count in zip(cluster_sums(rows, keys), counts, strict=True):
            rest = int(sizes[number] - count)
            if rest == 0:
                left.append(replace(value, participation=None, centred_participation=None))
                continue
            changed, shrunk = means.copy(), [*sizes]
            changed[number] = (means[number] * sizes[number] - total) / rest
            shrunk[number] = rest
            left.append(ranks(changed, shrunk))
    found = []
    for name in ("participation", "centred_participation"):
        middle = getattr(value, name)
        others = np.array([getattr(item, name) for item in left], dtype=float)
        found.append(
            None if middle is None else jackknifed(middle, others, n, confidence, least=0.0)
        )
    return found[0], found[1]
