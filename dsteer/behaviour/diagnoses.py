"""The paper's failure signatures, looked for in a sweep's numbers and said in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from dsteer.behaviour.strengths import COLLAPSED
from dsteer.store import Json

HETEROGENEOUS = 0.85
"""A held-out cosine below it says that the change is not one shared direction."""

HALF = 0.5
"""KL recovered below which adding v* leaves most of the change out."""

RESTORED = 0.9
"""KL recovered from which inversion counts as restoring the base."""


def diagnose(
    start: str,
    site: str,
    strengths: Sequence[float],
    metrics: Mapping[str, Json],
    degenerate: Sequence[float],
    held_out_cosine: float | None,
    baselines: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    """Sentences about one sweep, from its result.

    Args:
        start: the model that was steered.
        site: where.
        strengths: rising, with 0.
        metrics: as the result describes them.
        degenerate: share of degenerate texts at each strength.
        held_out_cosine: mean cosine of test displacements with v* at the site.
        baselines: arms without a direction, and what they are called.
    """
    said = []
    if held_out_cosine is not None and held_out_cosine < HETEROGENEOUS:
        said.append(
            f"Heterogeneous change: the mean held-out cosine with v* at {site} is "
            f"{held_out_cosine:z.3f}, below {HETEROGENEOUS}: prompts do not share one direction "
            "there, so no one λ can be right for all."
        )
    said += _too_far(strengths, metrics, degenerate)
    said += _reach(start, strengths, metrics)
    said += _like_random(strengths, metrics)
    said += _like_baselines(strengths, metrics, baselines)
    said += _direction(strengths, metrics)
    return said


def _too_far(
    strengths: Sequence[float], metrics: Mapping[str, Json], degenerate: Sequence[float]
) -> list[str]:
    said = []
    above = [i for i, strength in enumerate(strengths) if strength >= 0]
    first = next((i for i in above if degenerate[i] >= COLLAPSED), None)
    if first is not None and strengths[first] == 0:
        said.append(
            f"The start model writes {degenerate[first]:.0%} degenerate texts as it is, so what "
            "steering adds to that can't be told; sampling instead of greedy decoding may help."
        )
    elif first is not None:
        said.append(
            f"Over-steering: λ = {strengths[first]:g} is the first from 0 on at which at least "
            f"half of the texts are degenerate ({degenerate[first]:.0%})."
        )
    for key in ("rouge_l_reference", "rouge_l_target"):
        points, begin = metrics.get(key, {}).get("worst"), metrics.get(key, {}).get("start")
        if points is None or begin is None or begin["low"] is None:
            continue
        clean = points[list(strengths).index(0.0)]
        least = clean - (begin["value"] - begin["low"])
        falls = next((i for i in above if points[i] is not None and points[i] < least), None)
        if falls is not None:
            said.append(
                f"Overlap falls: {metrics[key]['label']}, with degenerate texts as 0, is "
                f"{points[falls]:z.3f} at λ = {strengths[falls]:g}, the first from 0 on that is "
                f"below the reach of the start's interval ({clean:z.3f} at λ = 0)."
            )
            break
    return said


def _reach(start: str, strengths: Sequence[float], metrics: Mapping[str, Json]) -> list[str]:
    points = metrics["kl_recovered"]["curves"]["v"]
    known = [(p["value"], s) for p, s in zip(points, strengths, strict=True) if p is not None]
    if not known:
        return ["KL recovered is undefined: the two models predict the same."]
    best, where = max(known)
    if 1.0 not in strengths:
        return []
    at_one = points[list(strengths).index(1.0)]
    if start == "tuned":
        low = at_one["value"] if at_one["low"] is None else at_one["low"]
        high = at_one["value"] if at_one["high"] is None else at_one["high"]
        if low < RESTORED:
            verdict = "does not restore" if high < RESTORED else "can't be told to restore"
            return [
                f"Inversion at λ = 1 {verdict} the base: it recovers {at_one['value']:z.3f} "
                f"[{low:z.3f}, {high:z.3f}] of the KL. Of the strengths tried it comes nearest at "
                f"λ = {where:g} ({best:z.3f})."
            ]
    said = []
    if start == "base" and at_one["value"] < HALF:
        said.append(
            f"Adding v* at λ = 1 recovers {at_one['value']:z.3f} of the KL over the answers' "
            "tokens: most of what tuning changed there is not this one vector at these tokens."
        )
    if best > at_one["value"] + 0.02:
        verb = "adding" if start == "base" else "taking away"
        said.append(
            f"λ = 1 is not where {verb} v* brings most: {at_one['value']:z.3f} of the KL there, "
            f"{best:z.3f} at λ = {where:g} (picked on the test pairs, so it flatters)."
        )
    return said


def _like_random(strengths: Sequence[float], metrics: Mapping[str, Json]) -> list[str]:
    if 1.0 not in strengths:
        return []
    at = list(strengths).index(1.0)
    inside = []
    for key in ("kl_recovered", "reward_margin"):
        random = metrics.get(key, {}).get("random")
        if random is None or random["v"][at] is None or random["low"][at] is None:
            continue
        low = -np.inf if key == "kl_recovered" else random["low"][at]
        if low <= random["v"][at] <= random["high"][at]:
            inside.append(metrics[key]["label"])
    if not inside:
        return []
    return [
        f"At λ = 1 v* does no more than a random direction of its norm to: {', '.join(inside)}."
    ]


def _like_baselines(
    strengths: Sequence[float], metrics: Mapping[str, Json], baselines: Mapping[str, str]
) -> list[str]:
    """The rule of random directions, with a baseline's interval for their band."""
    if 1.0 not in strengths:
        return []
    at = list(strengths).index(1.0)
    said = []
    for arm, label in baselines.items():
        inside = []
        for key in ("kl_recovered", "reward_margin"):
            if key not in metrics:
                continue
            mine, its = (metrics[key]["curves"][name][at] for name in ("v", arm))
            if mine is None or its is None:
                continue
            low, high = (its["value"] if its[end] is None else its[end] for end in ("low", "high"))
            low = -np.inf if key == "kl_recovered" else low
            if low <= mine["value"] <= high:
                inside.append(metrics[key]["label"])
        if inside:
            said.append(
                f"At λ = 1 v* does no more than the baseline ‘{label}’ to: {', '.join(inside)}."
            )
    return said


def _direction(strengths: Sequence[float], metrics: Mapping[str, Json]) -> list[str]:
    """Whether the reward, and the oracle that tuning moved most, go one way from λ = 0 to 1."""

    def change(name: str) -> float:
        begin, target = metrics[name]["start"], metrics[name]["target"]
        return 0.0 if begin is None or target is None else target["value"] - begin["value"]

    names = [name for name in ("reward_margin",) if name in metrics]
    oracles = [name for name in metrics if name.startswith("oracle_")]
    if oracles:
        names.append(max(oracles, key=lambda name: abs(change(name))))
    said = []
    for name in names:
        label = metrics[name]["label"]
        points = zip(strengths, metrics[name]["curves"]["v"], strict=True)
        within = [None if point is None else point["value"] for s, point in points if 0 <= s <= 1]
        values = [value for value in within if value is not None]
        if len(values) < max(3, len(within)) or not change(name):
            continue
        steps = np.diff(values) * np.sign(change(name))
        if (steps >= 0).all() and (steps > 0).any():
            said.append(
                f"{label} moves the target's way from λ = 0 to 1 and never back: "
                f"{values[0]:z.3f} to {values[-1]:z.3f}; the target has "
                f"{metrics[name]['target']['value']:z.3f}."
            )
        else:
            shown = ", ".join(f"{value:z.3f}" for value in values)
            said.append(f"{label} does not go one way from λ = 0 to 1: {shown}.")
    return said
