"""Metrics as curves over the strength: intervals, bands of random directions, crossings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.behaviour.metrics import GENERATED, TEACHER_FORCED, Metric, oracle_metric
from dsteer.data.synthetic import AXES
from dsteer.geometry.intervals import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    bootstrap_sums,
    cluster_sums,
    percentiles,
    proportion,
)
from dsteer.store import Json


class Curves:
    """Intervals of one metric over conversations, bootstrap or Wilson's, vectors held fixed.

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

    def share(self, values: Float[Tensor, " n"]) -> Interval | None:
        """Share of the defined values that hold (1; 0; a tie: ½); None without any."""
        return proportion(values, self.clusters, confidence=self.confidence)

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
        below: Float[Tensor, "s n"] | None = None,
        level_below: Float[Tensor, " n"] | None = None,
    ) -> tuple[Interval | None, str | None]:
        """The λ from 0 on at which a mean first crosses the target's mean, between grid points.

        Args:
            strengths: rising, with 0.
            values: the metric of each prompt at each strength; NaN where undefined.
            level: that of the target.
            below: denominators of the values, where the metric is a ratio of sums.
            level_below: those of the target, likewise.

        Returns:
            The crossing with its interval, or None and why. The interval holds the draws that
            cross; with fewer than nine in ten it has no ends.
        """
        start = list(strengths).index(0.0)
        grid = np.array(strengths[start:], dtype=np.float64)
        columns = torch.cat([values[start:], level[None]]).T.double()  # (n, s + 1)
        known = ~columns.isnan()
        weights = known.double()
        if below is not None and level_below is not None:
            weights = (
                torch.cat([below[start:], level_below[None]]).T.double().masked_fill(~known, 0)
            )
        both = torch.cat([columns.nan_to_num(0.0), weights], dim=1).numpy()
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
            if not np.isfinite(gaps[0]).all():
                gone = grid[~np.isfinite(gaps[0])][0]
                return None, (
                    f"the metric is undefined at λ = {gone:g}, and the curve does not reach the "
                    "target's level before"
                )
            return None, f"the curve does not reach the target's level up to λ = {grid[-1]:g}"
        inside = found[1:][np.isfinite(found[1:])]
        if len(sums) < 2 or len(inside) < 0.9 * self.draws:
            return Interval(float(found[0]), None, None, len(columns)), None
        low, high = percentiles(inside, self.confidence, len(sums))
        return Interval(float(found[0]), low, high, len(columns)), None


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


def means(values: Float[Tensor, "s n"], below: Float[Tensor, "s n"] | None) -> Float[Tensor, " s"]:
    """Σ values / Σ below of each row, or the mean; NaN: left out, and where nothing is left."""
    weights = torch.ones_like(values) if below is None else below
    weights = torch.where(values.isnan(), 0.0, weights)
    return values.nan_to_num(0.0).double().sum(1) / weights.double().sum(1)


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


@dataclass
class Entry:
    """The values of one metric.

    Attributes:
        metric: what it is.
        source: ``teacher_forced`` or ``generated``.
        clusters: conversation of each prompt or pair.
        values: (strengths, prompts) of each arm; NaN where left out.
        below: weights, so that a curve is Σ values / Σ below; absent: a mean.
        worst: values with degenerate outputs as the worst there is, where there is a worst.
        random: of each random direction, one number a strength.
        random_n: prompts behind these.
        target: the target's own values, and its weights.
        level: the target's level where it is known without measuring.
        transform: applied to ratios and their intervals.
    """

    metric: Metric
    source: str
    clusters: list[str]
    values: dict[str, Tensor] = field(default_factory=dict)
    below: dict[str, Tensor] = field(default_factory=dict)
    worst: dict[str, Tensor] = field(default_factory=dict)
    random: list[np.ndarray] = field(default_factory=list)
    random_n: int = 0
    target: Tensor | None = None
    target_below: Tensor | None = None
    level: float | None = None
    transform: Callable[[float], float] = float


class Ledger:
    """The values of all metrics of a sweep, and their description.

    Args:
        strengths: rising, with 0.
        draws: bootstrap draws.
        confidence: coverage asked for.
        seed: of the draws.
    """

    def __init__(
        self, strengths: Sequence[float], draws: int, confidence: float, seed: int
    ) -> None:
        self.strengths = list(strengths)
        self.entries: dict[str, Entry] = {}
        self._settings = (draws, confidence, seed)

    def entry(self, name: str, source: str, clusters: list[str]) -> Entry:
        """The entry of a metric, made on first use."""
        if name not in self.entries:
            known = {**TEACHER_FORCED, **GENERATED}
            if name in known:
                metric = known[name]
            else:
                axis = next(axis for axis in AXES if f"oracle_{axis.name}" == name)
                metric = oracle_metric(axis.name, axis.poles)
            self.entries[name] = Entry(metric, source, clusters)
        return self.entries[name]

    def described(self) -> dict[str, Json]:
        """Every metric with its intervals, in the order in which reports show them."""
        order = [*TEACHER_FORCED, *GENERATED, *(f"oracle_{axis.name}" for axis in AXES)]
        return {name: self._describe(self.entries[name]) for name in order if name in self.entries}

    def _describe(self, entry: Entry) -> Json:
        curves = Curves(entry.clusters, *self._settings)

        def interval(values: Tensor, below: Tensor | None) -> Json:
            if entry.metric.counted:
                found = curves.share(values)
            elif below is None:
                found = curves.mean(values)
            else:
                found = curves.ratio(values.nan_to_num(0.0), below)
            if found is None:
                return None
            ends = {"value": found.value, "low": found.low, "high": found.high}
            shown = {end: None if x is None else entry.transform(x) for end, x in ends.items()}
            return {**shown, "n": found.n}

        rows = {
            arm: [
                interval(row, entry.below[arm][i] if arm in entry.below else None)
                for i, row in enumerate(values)
            ]
            for arm, values in entry.values.items()
        }
        begin = rows["v"][self.strengths.index(0.0)]
        target: Json = None
        if entry.level is not None:
            target = {"value": entry.level, "low": entry.level, "high": entry.level, "n": 0}
        elif entry.target is not None:
            target = interval(entry.target, entry.target_below)
        random: Json = None
        if entry.random:
            low, high, mean = band(np.stack(entry.random))
            random = {
                "v": self._same(entry),
                "low": low, "high": high, "mean": mean,
                "draws": len(entry.random), "n": entry.random_n,
            }  # fmt: skip
        worst = entry.worst.get("v")
        return {
            "label": entry.metric.label,
            "unit": entry.metric.unit,
            "better": entry.metric.better,
            "definition": entry.metric.definition,
            "source": entry.source,
            "split": "test",
            "n": len(entry.clusters),
            "curves": rows,
            "random": random,
            "start": begin,
            "target": target,
            "crossing": self._crossing(entry, curves, begin, target),
            "worst": None if worst is None else [_mean(row) for row in worst],
        }

    def _same(self, entry: Entry) -> list[float | None]:
        """v*'s own numbers on the prompts of the random directions: the first ``random_n``."""
        below = entry.below["v"][:, : entry.random_n] if "v" in entry.below else None
        found = means(entry.values["v"][:, : entry.random_n], below).tolist()
        return [entry.transform(mean) if math.isfinite(mean) else None for mean in found]

    def _crossing(self, entry: Entry, curves: Curves, begin: Json, target: Json) -> Json:
        """The λ-equivalent, or why there is none."""
        if entry.level is not None:
            return {"strength": None, "why": "the target's level is the end of the scale"}
        if entry.target is None or target is None or begin is None:
            return {"strength": None, "why": "the metric is undefined at λ = 0 or for the target"}
        if _holds(begin, target["value"]):
            return {"strength": None, "why": "the start's interval holds the target's level"}
        found, why = curves.crossing(
            self.strengths,
            entry.values["v"],
            entry.target,
            entry.below.get("v"),
            entry.target_below,
        )
        return {"strength": None if found is None else found.json(), "why": why}


def exponential(value: float) -> float:
    """e^value; the largest float where that is out of range, NaN of NaN."""
    return float(np.finfo(np.float64).max) if value > 709 else math.exp(value)


def _holds(interval: Json, value: float) -> bool:
    if interval["low"] is None:
        return bool(interval["value"] == value)
    return bool(interval["low"] <= value <= interval["high"])


def _mean(row: Tensor) -> float | None:
    known = row[~row.isnan()]
    return float(known.mean()) if len(known) else None
