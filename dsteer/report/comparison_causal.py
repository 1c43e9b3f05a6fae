"""What a study's variants measured by changing states and by training, read off their results.

Only what a variant has: a stage that it did not run is None, and stops no other.
"""

from __future__ import annotations

from collections.abc import Callable

from dsteer.report.headline import Point
from dsteer.report.reversal_tables import METRICS, WAYS
from dsteer.report.values import (
    DASH,
    Estimate,
    at,
    count,
    estimate,
    interval,
    items,
    mapping,
    number,
    plain,
    point,
    real,
)
from dsteer.store import Json

CLAIMS = (
    "shared_shift", "low_dimensional", "constant_suffices", "preference_specific", "reversible",
)  # fmt: skip
"""The claims, in the order in which they are told."""

VERDICTS = ("supported", "not supported", "not tested")

UNDONE = ("way_back", "accuracy", "kl_to_base", "recovered")
"""What is told of each way to undo the tuning."""

MAPS = ("translation", "ridge")
"""The maps that are compared: the one vector, and the richest."""


def causal_values(read: Callable[[str], dict[str, Json]]) -> dict[str, Json]:
    """A variant's numbers of dpo, profile, rank, maps, groups, the sweep, reversal and claims.

    Args:
        read: a stage's result, empty where the variant has none.
    """
    return {
        "dpo": _dpo(read("dpo")),
        "profile": _profile(read("profile")),
        "rank": _rank(read("rank"), read("profile")),
        "maps": _maps(read("maps"), read("profile")),
        "groups": _groups(read("groups")),
        "collapse": _collapse(read("interpolation")),
        "reversal": _reversal(read("reversal")),
        "claims": {
            str(claim["name"]): claim["verdict"] for claim in items(read("claims").get("claims"))
        }
        or None,
    }


def _dpo(result: dict[str, Json]) -> Json:
    if not result:
        return None
    return {
        **{key: at(result, "test", key) for key in ("reward_accuracy", "reward_margin")},
        "kl_to_base": result.get("kl_to_base"),
    }


def _collapse(sweep: dict[str, Json]) -> Json:
    """Lengths of λ from which texts collapse, up and down; None of a grid that was given."""
    grid = mapping(sweep.get("grid"))
    if not items(grid.get("probes")):
        return None
    ends = {"up": real(grid.get("collapse")), "down": real(grid.get("collapse_negative"))}
    return {way: None if end is None else abs(end) for way, end in ends.items()}


def _reversal(result: dict[str, Json]) -> Json:
    """What each way of undoing reached."""
    ways = mapping(result.get("ways"))
    return {
        way: {metric: at(ways[way], metric) for metric in UNDONE}
        for way in WAYS
        if way in ways and way != "tuned"
    } or None


def _profile(result: dict[str, Json]) -> Json:
    """The profile at the place that it chose on tune."""
    site, tokens = (at(result, "chosen", key) for key in ("site", "tokens"))
    here = at(result, "sites", site or "", tokens or "")
    if here is None:
        return None
    return {
        "site": site,
        "tokens": tokens,
        **{arm: at(here, arm, "kl_recovered_answers") for arm in ("v", "patched")},
        "random": at(here, "random", "kl_recovered_answers", "high"),
        "efficiency": here.get("efficiency"),
        "readout_share": result.get("readout_share"),
    }


def _groups(result: dict[str, Json]) -> Json:
    """The ranks of the groups' vectors, planted and found, and what taking one off takes."""
    site = at(result, "headline", "site")
    here = at(result, "sites", str(site))
    if here is None:
        return None
    return {
        "site": site,
        "groups": len(items(result.get("groups"))),
        "expected": at(result, "expected", "participation"),
        "participation": at(here, "means", "participation"),
        **{whose: at(here, "removal", whose, "margin_taken") for whose in ("own", "others")},
    }


def _place(sites: dict[str, Json], profile: dict[str, Json]) -> str | None:
    """The site that the profile chose if it is among these, else the first one."""
    chosen = at(profile, "chosen", "site")
    return str(chosen) if chosen in sites else next(iter(sites), None)


def _rank(result: dict[str, Json], profile: dict[str, Json]) -> Json:
    sites = mapping(result.get("sites"))
    site = _place(sites, profile)
    if site is None:
        return None
    here = sites[site]
    return {
        "site": site,
        "tokens": here.get("tokens"),
        "width": here.get("width"),
        **{key: mapping(here.get(key)) for key in ("k50", "k90")},
    }


def _maps(result: dict[str, Json], profile: dict[str, Json]) -> Json:
    fitted, changed = (mapping(result.get(key)) for key in ("sites", "kl"))
    site = _place(changed, profile) or _place(fitted, profile)
    if site is None:
        return None
    return {
        "site": site,
        "tokens": at(changed, site, "tokens"),
        "r2": {name: at(fitted, site, "r2", name) for name in MAPS},
        "kl": {name: at(changed, site, "recovered", name) for name in MAPS},
    }


# ---------------------------------------------------------------------------------- told


Reading = tuple[str, str, Callable[[Json], Json]]
"""Words of a series, what it is, and how it is read off a variant's entry."""

PANELS: dict[str, tuple[str, tuple[Reading, ...]]] = {
    "profile": ("answers' KL", (
        ("v*", "share of the KL over whole answers that v* recovers, at the place chosen on tune",
         lambda v: at(v, "causal", "profile", "v")),
        ("patched", "the same by the tuned states themselves, there",
         lambda v: at(v, "causal", "profile", "patched")))),
    "efficiency": ("share of the change", (
        ("efficiency", "v* over patched", lambda v: at(v, "causal", "profile", "efficiency")),
        ("readout", "what the tuned head does beyond the states",
         lambda v: at(v, "causal", "profile", "readout_share")))),
    "r2": ("R² of maps", (
        ("translation", "share of Δ that one vector explains on test",
         lambda v: at(v, "causal", "maps", "r2", "translation")),
        ("ridge", "share of Δ that a linear map explains on test",
         lambda v: at(v, "causal", "maps", "r2", "ridge")))),
    "maps_kl": ("KL recovered by maps", (
        ("translation", "share of KL that one vector recovers",
         lambda v: at(v, "causal", "maps", "kl", "translation")),
        ("ridge", "share of KL that a linear map recovers",
         lambda v: at(v, "causal", "maps", "kl", "ridge")))),
    "k90": ("k₉₀", (
        ("deployable", "with coefficients predicted from the base, for 90 % of patching",
         lambda v: at(v, "causal", "rank", "k90", "deployable")),
        ("oracle", "with each token's true coefficients, for 90 % of patching",
         lambda v: at(v, "causal", "rank", "k90", "oracle")))),
    "k50": ("k₅₀", (
        ("deployable", "with coefficients predicted from the base, for half of patching",
         lambda v: at(v, "causal", "rank", "k50", "deployable")),
        ("oracle", "with each token's true coefficients, for half of patching",
         lambda v: at(v, "causal", "rank", "k50", "oracle")))),
    "participation": ("participation ratio", (
        ("ΔH", "of its singular values, at the chosen site",
         lambda v: at(v, "at", "chosen", "participation_ratio")),)),
    "centred": ("effective rank, centred", (
        ("centred ΔH", "exp of the spectral entropy with p = 1, at the chosen site",
         lambda v: at(v, "at", "chosen", "effective_rank_centred")),)),
    "groups": ("rank of the groups' v", (
        ("found", "participation of the mean displacements of the groups of prompts",
         lambda v: at(v, "causal", "groups", "participation")),
        ("planted", "participation of the planted preferences",
         lambda v: at(v, "causal", "groups", "expected")))),
    "removal": ("margin taken with one v", (
        ("its own", "share of a group's margin that taking its vector off takes",
         lambda v: at(v, "causal", "groups", "own")),
        ("the others'", "share of the other groups' margins that it takes too",
         lambda v: at(v, "causal", "groups", "others")))),
    "collapse": ("|λ| of collapse", (
        ("upward", "λv* from which half of the sound texts are degenerate, on tune; –: none found",
         lambda v: at(v, "causal", "collapse", "up")),
        ("downward", "the same below λ = 0",
         lambda v: at(v, "causal", "collapse", "down")))),
    "accuracy": ("DPO: accuracy", (
        ("implicit reward", "share of test pairs whose chosen answer has the higher one",
         lambda v: at(v, "causal", "dpo", "reward_accuracy")),)),
    "kl_to_base": ("DPO: KL to base", (
        ("nats a token", "on test pairs", lambda v: at(v, "causal", "dpo", "kl_to_base")),)),
}  # fmt: skip
"""The quantities, by key: what the one or two series of a panel are, and where they stand."""


def panel_values(variants: dict[str, Json], key: str) -> dict[str, list[Estimate]]:
    """The series of one panel, one estimate a variant."""
    return {
        words: [estimate(read(v)) for v in variants.values()] for words, _, read in PANELS[key][1]
    }


def causal_rows(variants: dict[str, Json]) -> list[list[str]]:
    """Rows of the table of the variants; those that no variant has are left out."""
    rows = [
        ["profile: place", *map(_profile_place, variants.values()), "chosen on tune"],
        ["rank: place", *(_rank_place(v) for v in variants.values()), "and the width"],
    ]
    for title, readings in PANELS.values():
        for words, meaning, read in readings:
            cells = [interval(read(v)) for v in variants.values()]
            rows.append([f"{title}: {words}", *cells, meaning])
    for way, words in WAYS.items():
        for metric in UNDONE:
            cells = [interval(at(v, "causal", "reversal", way, metric)) for v in variants.values()]
            rows.append([f"undone by {words}: {METRICS[metric][0]}", *cells, METRICS[metric][1]])
    return [row for row in rows if any(cell != DASH for cell in row[1:-1])]


def _profile_place(variant: Json) -> str:
    here = at(variant, "causal", "profile")
    return DASH if here is None else f"{plain(here['site'])}, {plain(here['tokens'])}"


def _rank_place(variant: Json) -> str:
    here = at(variant, "causal", "rank")
    if here is None:
        return DASH
    return f"{plain(here['site'])}, {plain(here['tokens'])}, d = {count(here['width'])}"


def causal_findings(variants: dict[str, Json]) -> list[Point]:
    """What the variants' causal numbers say, side by side."""
    points: list[Point] = []
    for title, say in (
        ("What states cause", _profile_words),
        ("Directions and maps", _dimension_words),
        ("Groups of prompts", _group_words),
        ("Collapse", _collapse_words),
        ("Undoing the tuning", _undone_words),
    ):
        said = [f"{name}: {words}" for name, v in variants.items() if (words := say(v))]
        points += [(title, said)] if said else []
    said = _claim_words(variants)
    return [*points, ("Claims", said)] if said else points


def _profile_words(variant: Json) -> str:
    here = at(variant, "causal", "profile")
    if here is None:
        return ""
    text = (
        f"at {here['site']} ({here['tokens']}), adding v* recovers {interval(here['v'])} of KL and "
        f"patching the tuned states {interval(here['patched'])}"
    )
    value = estimate(here["v"])
    bound, null = value.low if value.low is not None else value.value, real(here["random"])
    if bound is not None and null is not None and bound <= null:
        text += f"; v* is not told from random directions (up to {number(null)})"
    if point(here["readout_share"]) is not None:
        text += f"; the tuned head does {interval(here['readout_share'])} beyond the states"
    return text + "."


def _dimension_words(variant: Json) -> str:
    said = []
    rank = at(variant, "causal", "rank")
    if rank is not None:
        k90 = at(rank, "k90", "deployable")
        said.append(
            f"k₉₀ of deployable directions at {rank['site']} is {interval(k90)} of {rank['width']}"
            if point(k90) is not None
            else f"no measured number of deployable directions reaches 90 % at {rank['site']}"
        )
    maps = at(variant, "causal", "maps")
    if maps is not None:
        known = [
            f"{interval(maps['r2'][name])} by {words}"
            for name, words in (("translation", "one vector"), ("ridge", "a linear map"))
            if point(maps["r2"][name]) is not None
        ]
        if known:
            said.append(f"of Δ at {maps['site']} explained {' and '.join(known)}")
    return "; ".join(said) + "." if said else ""


def _group_words(variant: Json) -> str:
    here = at(variant, "causal", "groups")
    if here is None or here["groups"] < 2:
        return ""
    text = (
        f"the vectors of {here['groups']} groups at {here['site']} have rank (participation) "
        f"{interval(here['participation'])}, the planted preferences "
        f"{number(real(here['expected']))}"
    )
    if point(here["own"]) is not None:
        text += (
            f"; taking one off takes {interval(here['own'])} of its group's margin and "
            f"{interval(here['others'])} of the others'"
        )
    return text + "."


def _collapse_words(variant: Json) -> str:
    here = at(variant, "causal", "collapse")
    if here is None:
        return ""
    ends = [
        f"λ = {sign}{number(real(here[way]))} {words}"
        for way, sign, words in (("down", "−", "down"), ("up", "", "up"))
        if real(here[way]) is not None
    ]
    if not ends:
        return "no strength that was tried makes half of the sound texts degenerate."
    return f"half of the sound texts are degenerate from {' and from '.join(ends)}."


def _undone_words(variant: Json) -> str:
    ways = mapping(at(variant, "causal", "reversal"))
    said = [
        f"{WAYS[way]} takes {interval(at(found, 'way_back'))} of the margin and "
        f"{interval(at(found, 'recovered'))} of the KL back"
        for way, found in ways.items()
    ]
    return "; ".join(said) + "." if said else ""


def _claim_words(variants: dict[str, Json]) -> list[str]:
    """Each claim: which variants support it, and which do not."""
    said = []
    for claim in CLAIMS:
        who: dict[str, list[str]] = {}
        for name, v in variants.items():
            verdict = at(v, "causal", "claims", claim)
            if verdict is not None:
                who.setdefault(str(verdict), []).append(name)
        told = [f"{verdict} in {', '.join(who[verdict])}" for verdict in VERDICTS if verdict in who]
        if told:
            said.append(f"{claim.replace('_', ' ')}: {'; '.join(told)}.")
    return said
