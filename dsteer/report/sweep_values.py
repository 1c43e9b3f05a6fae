"""What the figures, tables and sentences of the λ sweeps read from their results alike."""

from __future__ import annotations

from dsteer.report.values import at, items, mapping, number, point, real
from dsteer.store import Json

SWEEPS = ("interpolation", "inversion")
"""The stages that sweep the strength λ."""

MAIN = 9
"""Panels of the main figure; a sweep of more metrics has a second figure with all of them."""

_COLLAPSED = 0.5

_TELLING = (
    ("kl_recovered",),
    ("preference_match", "reward_margin"),
    ("oracle",),
    ("bleu_target",),
    ("rouge_l_reference",),
    ("perplexity",),
    ("repetition", "distinct_2"),
    ("refusal",),
    ("degenerate",),
)
"""The panels of the main figure; of several names, the first that was measured."""


def main_metrics(result: dict[str, Json]) -> list[str]:
    """The at most nine metrics that tell most, in the order of the result.

    One of each kind in a fixed list, where it was measured and moves (of the oracles, the one whose
    level differs most between start and target), then others in their order until nine are found.
    """
    measured = list(mapping(result.get("metrics")))
    oracles = sorted(
        (name for name in measured if name.startswith("oracle_")),
        key=lambda name: -_change(at(result, "metrics", name)),
    )
    picked: list[str] = []
    for names in _TELLING:
        named = oracles if names == ("oracle",) else [name for name in names if name in measured]
        picked += [name for name in named if _moves(at(result, "metrics", name))][:1]
    picked += [name for name in measured if name not in picked]
    return [name for name in measured if name in picked[:MAIN]]


def _moves(metric: Json) -> bool:
    """Whether any arm's curve has two values that differ."""
    curves = mapping(at(metric, "curves")).values()
    return any(len({v for v in map(point, items(curve)) if v is not None}) > 1 for curve in curves)


def _change(metric: Json) -> float:
    """|target − start| of a metric; the range of v*'s curve where a level is undefined."""
    start, target = point(at(metric, "start")), point(at(metric, "target"))
    if start is not None and target is not None:
        return abs(target - start)
    values = [v for v in map(point, items(at(metric, "curves", "v"))) if v is not None]
    return max(values) - min(values) if values else 0.0


def collapse(result: dict[str, Json]) -> tuple[float | None, float | None]:
    """The strengths, below and above 0, from which at least half of the outputs are degenerate.

    As measured on the sweep's own texts; where it has none, as found when the grid was made.
    """
    shares = items(at(result, "texts", "degenerate"))
    strengths = items(result.get("strengths"))
    if not shares:
        grid = mapping(result.get("grid"))
        return real(grid.get("collapse_negative")), real(grid.get("collapse"))
    fallen = [
        strength
        for strength, share in zip(strengths, shares, strict=True)
        if share is not None and share >= _COLLAPSED
    ]
    return (
        max((strength for strength in fallen if strength < 0), default=None),
        min((strength for strength in fallen if strength >= 0), default=None),
    )


def baselines(result: dict[str, Json]) -> dict[str, str]:
    """The arms that do something else than add a vector, and how each acts, in words."""
    sign = "−" if result.get("sign") == -1 else "+"
    said = {}
    for key, arm in mapping(result.get("arms")).items():
        label, unit = at(arm, "label") or key, number(point(at(arm, "unit")))
        if at(arm, "operation") == "scale":
            said[key] = (
                f"{label}, the state times 1 {sign} {unit} λ, where {unit} is ‖v*‖ over the mean "
                "norm of the base's states on fit prompts"
            )
        elif at(arm, "operation") == "noise":
            said[key] = f"{label}, {sign} λ‖v*‖ along a direction drawn anew for each token"
    return said


def nearest(result: dict[str, Json], strength: float) -> int | None:
    """Place of the measured strength nearest to the given one; None without strengths."""
    strengths = [(i, value) for i, v in enumerate(items(result.get("strengths")))
                 if (value := real(v)) is not None]  # fmt: skip
    return min(strengths, key=lambda pair: abs(pair[1] - strength))[0] if strengths else None


def best(result: dict[str, Json]) -> int | None:
    """Place of the strength at which v* comes nearest to the target in KL; None if not measured."""
    curve = items(at(result, "metrics", "kl_recovered", "curves", "v"))
    known = [(value, i) for i, v in enumerate(curve) if (value := point(v)) is not None]
    return max(known)[1] if known else None


def stands_out(metric: Json, i: int) -> bool | None:
    """Whether v*'s interval at a strength lies outside the band of random directions.

    None where the value, its interval or the band is undefined.
    """
    low, high = (real(at(metric, "curves", "v", i, bound)) for bound in ("low", "high"))
    least, most = (real(at(metric, "random", bound, i)) for bound in ("low", "high"))
    if low is None or high is None or least is None or most is None:
        return None
    return low > most or high < least
