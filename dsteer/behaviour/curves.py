"""Metrics as curves over the strength: intervals, bands of random directions, crossings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.geometry.intervals import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_sums,
    cluster_sums,
    percentiles,
)


class Curves:
    """Intervals of one metric: bootstrap over conversations, vectors held fixed.

    Args:
        clusters: conversation of each prompt.
        draws: bootstrap draws.
        confidence: coverage asked for.
        seed: of the draws; the same conversations are drawn at each strength.
    """

    def __init__(self, clusters: Sequence[str], draws: int, confidence: float, seed: int) -> None:
        self.clusters, self.draws = list(clusters), draws
        self.confidence, self.seed = confidence, seed

    def mean(self, values: Float[Tensor, " n"]) -> Interval | None:
        """Mean of the defined values (NaN: left out); None without any."""
        return bootstrap_mean(
            values,
            self.clusters,
            draws=self.draws,
            confidence=self.confidence,
            seed=self.seed,
        )

    def ratio(self, above: Float[Tensor, " n"], below: Float[Tensor, " n"]) -> Interval | None:
        """Σ above / Σ below; None where Σ below is 0."""
        return bootstrap_ratio(
            above,
            below,
            self.clusters,
            draws=self.draws,
            confidence=self.confidence,
            seed=self.seed,
        )

    def crossing(
        self,
        strengths: Sequence[float],
        values: Float[Tensor, "s n"],
        level: Float[Tensor, " n"],
    ) -> tuple[Interval | None, str | None]:
        """The λ above 0 at which a mean first crosses the target's mean, between grid points.

        Args:
            strengths: rising, with 0.
            values: the metric of each prompt at each strength; NaN where undefined.
            level: that of the target.

        Returns:
            The crossing with its interval, or None and why. The interval holds the draws that
            cross; with fewer than nine in ten it has no ends.
        """
        start = list(strengths).index(0.0)
        grid = np.array(strengths[start:], dtype=np.float64)
        columns = torch.cat([values[start:], level[None]]).T.double()  # (n, s + 1)
        known = ~columns.isnan()
        both = torch.cat([columns.nan_to_num(0.0), known.double()], dim=1).numpy()
        sums = cluster_sums(both, self.clusters)
        drawn = np.concatenate(
            [sums.sum(axis=0)[None], bootstrap_sums(sums, self.draws, self.seed)]
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            means = drawn[:, : len(grid) + 1] / drawn[:, len(grid) + 1 :]
        gaps = means[:, :-1] - means[:, -1:]
        found = np.array([_first_zero(grid, gap) for gap in gaps])
        if np.isnan(found[0]):
            if not np.isfinite(gaps[0][0]):
                return None, "the metric is undefined at λ = 0 or for the target"
            return None, f"the curve does not reach the target's level up to λ = {grid[-1]:g}"
        inside = found[1:][np.isfinite(found[1:])]
        if len(inside) < 0.9 * self.draws:
            return Interval(float(found[0]), None, None, len(columns)), None
        return Interval(float(found[0]), *percentiles(inside, self.confidence), len(columns)), None


def _first_zero(grid: np.ndarray, gap: np.ndarray) -> float:
    """Where a piecewise linear curve first reaches 0; NaN if it never does."""
    for i in range(len(grid) - 1):
        here, there = gap[i], gap[i + 1]
        if not (np.isfinite(here) and np.isfinite(there)):
            return float("nan")
        if here == 0:
            return float(grid[i])
        if here * there <= 0:
            return float(grid[i] + (grid[i + 1] - grid[i]) * here / (here - there))
    return float("nan")


def band(
    values: Float[np.ndarray, "draws s"],
) -> tuple[list[float | None], list[float | None], list[float | None]]:
    """Low, high and mean over random directions at each strength.

    With 20 draws or more low and high are the 2.5 % and 97.5 % quantiles, else the extremes.
    """
    low: list[float | None] = []
    high: list[float | None] = []
    mean: list[float | None] = []
    for column in np.asarray(values, dtype=np.float64).T:
        known = column[np.isfinite(column)]
        if not len(known):
            for part in (low, high, mean):
                part.append(None)
            continue
        ends = (
            np.quantile(known, [0.025, 0.975]) if len(known) >= 20 else (known.min(), known.max())
        )
        low.append(float(ends[0]))
        high.append(float(ends[1]))
        mean.append(float(known.mean()))
    return low, high, mean
