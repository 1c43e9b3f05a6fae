"""Shares of the native vector's effect, and how far they lie above the nulls."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsteer.geometry.intervals import Interval, bootstrap_ratio
from dsteer.store import Json
from dsteer.transfer.answers import Effects

NULLS: Mapping[str, str] = {
    "shuffled": "v_A through a map learned on shuffled positions",
    "mapped_random": "random direction of A through the same map",
    "mean_carried": "mean state of A through the map's linear part",
    "mean_state": "mean state of B",
    "random": "random direction of B",
}
"""Each null, all scaled to the norm of the native vector where they act."""


@dataclass(frozen=True)
class Draws:
    """How intervals are made: bootstrap over conversations, vectors and maps held fixed."""

    clusters: Sequence[Hashable]
    draws: int
    confidence: float
    seed: int

    def ratio(self, above: Float[Tensor, " n"], below: Float[Tensor, " n"]) -> Interval | None:
        """Σ above / Σ below with its interval; None where Σ below is 0."""
        return bootstrap_ratio(
            above,
            below,
            self.clusters,
            draws=self.draws,
            confidence=self.confidence,
            seed=self.seed,
        )


def share(
    carried: Float[Tensor, " n"], native: Float[Tensor, " n"], effect: Interval | None, draws: Draws
) -> tuple[Interval | None, str | None]:
    """Σ carried / Σ native, or None and why it is undefined.

    A share of an effect that may be none, or that goes the other way, says nothing: it is undefined
    unless the interval of the native vector's own effect lies above 0.

    Args:
        carried: what the carried vector gains on each pair.
        native: what the native one gains on them.
        effect: the native vector's effect with its interval.
        draws: how the interval is made; both vectors on the same drawn conversations.
    """
    if effect is None:
        return None, "the native vector's effect is undefined"
    if effect.low is None:
        return None, "one conversation leaves the native vector's effect without an interval"
    if effect.low <= 0:
        where = "includes 0" if effect.high is not None and effect.high >= 0 else "lies below 0"
        return None, f"the interval of the native vector's effect {where}"
    return draws.ratio(carried, native), None


def described(effects: Effects, rows: Mapping[str, Sequence[int]], draws: Draws) -> Json:
    """One metric: effects, the shares with their intervals, and the nulls' effects and shares.

    Args:
        effects: of all arms.
        rows: which of them are ``native_best`` (the receiver's own vector where it does best),
            ``native`` (the same where the carried one acts) and ``carried``; the rest are draws of
            nulls.
        draws: how intervals are made.

    Returns:
        ``share`` is of the native vector's best, ``share_here`` of its effect where the carried one
        acts. ``above_nulls``: whether the interval of the carried vector's effect lies above 0 and
        above the band of every null (of fewer than 20 draws: above the largest); ``harms``: whether
        it lies below 0. Both are None without an interval.
    """
    gained, below = effects.gained, effects.below
    (best,), (native,), (carried,) = (rows[name] for name in ("native_best", "native", "carried"))
    ceiling, own, other = (draws.ratio(gained[row], below) for row in (best, native, carried))
    found, why = share(gained[carried], gained[best], ceiling, draws)
    here, why_here = share(gained[carried], gained[native], own, draws)
    total = float(gained[best].sum())
    bands: dict[str, Json] = {}
    for name in rows:
        if name not in NULLS:
            continue
        values = (gained[torch.tensor(list(rows[name]))].sum(dim=1) / below.sum()).numpy()
        bands[name] = {
            "effect": band(values),
            "share": None if found is None else band(values * (float(below.sum()) / total)),
        }
    highest = max(0.0, *(shown["effect"]["high"] for shown in bands.values()))
    low, high = (other.low, other.high) if other else (None, None)
    return {
        "native_best": ceiling.json() if ceiling else None,
        "native": own.json() if own else None,
        "carried": other.json() if other else None,
        "share": found.json() if found else None,
        "why": why,
        "share_here": here.json() if here else None,
        "why_here": why_here,
        "nulls": bands,
        "above_nulls": None if low is None else low > highest,
        "harms": None if high is None else high < 0,
    }


def band(values: Float[np.ndarray, " n"]) -> dict[str, Json]:
    """Mean and range of a null: with 20 draws or more, the middle 95 %, else the extremes."""
    ends = np.quantile(values, [0.025, 0.975]) if len(values) >= 20 else (min(values), max(values))
    return {
        "mean": float(np.mean(values)),
        "low": float(ends[0]),
        "high": float(ends[1]),
        "draws": len(values),
    }
