"""The report's first page: what was compared, and what came out, in plain words."""

from __future__ import annotations

from collections.abc import Callable

from dsteer.report.claims_tables import claims_sentences
from dsteer.report.control_tables import control_sentences
from dsteer.report.four_way_tables import four_way_sentences
from dsteer.report.groups_tables import groups_sentences
from dsteer.report.learned_tables import learned_sentences
from dsteer.report.maps_tables import maps_sentences, strength_sentences
from dsteer.report.profile_tables import profile_sentences
from dsteer.report.rank_tables import rank_sentences
from dsteer.report.reversal_tables import reversal_sentences
from dsteer.report.sweep_values import (
    SWEEPS,
    baselines,
    best,
    collapse,
    main_metrics,
    nearest,
    stands_out,
)
from dsteer.report.tables import Results, recovered_at
from dsteer.report.transfer_tables import transfer_sentences
from dsteer.report.values import (
    FINAL_NORM,
    at,
    count,
    estimate,
    interval,
    is_undefined,
    items,
    mapping,
    number,
    percent,
    plain,
    plural,
    point,
    ratio,
    site_order,
    split_rows,
)
from dsteer.store import Json

CONSTANT_BIAS = (
    "At final_norm, adding λv adds the same logit bias λ W_U v to every token (before a soft cap "
    "and in units of the logit scale, where the model has these): it can do nothing that depends "
    "on the prompt."
)
"""Stands in every report."""

Point = tuple[str, list[str]]
"""What some sentences are about, and the sentences."""


def headline(manifest: dict[str, Json], results: Results) -> list[Point]:
    """The findings, most important first; each sentence is made from the numbers at hand."""
    sites = _sites(results)
    points: list[Point] = [("Compared", [_compared(manifest, results)])]
    points += [("Claims", said)] if (said := claims_sentences(results.get("claims"))) else []
    points += _training(results.get("dpo"))
    points += _size(results.get("vector"), sites)
    points += _direction(results.get("cosine"), sites)
    points += _dimension(results.get("spectrum"), sites)
    points += _reach(results.get("vector"))
    if said := four_way_sentences(results.get("template"), sites):
        points.append(("Template and training", said))
    if said := reversal_sentences(results.get("reversal")):
        points.append(("Undoing it", said))
    if said := learned_sentences(results.get("learned")):
        points.append(("Learned vectors", said))
    if said := profile_sentences(results.get("profile")):
        points.append(("Where the change lives", said))
    if said := rank_sentences(results.get("rank")):
        points.append(("How many directions", said))
    if said := maps_sentences(results.get("maps")):
        points.append(("Which map", said))
    if said := strength_sentences(results.get("strength")):
        points.append(("Which strength", said))
    for stage in SWEEPS:
        points += _swept(results.get(stage))
    points += [("Transfer", said)] if (said := transfer_sentences(results.get("transfer"))) else []
    points += [("Control", said)] if (said := control_sentences(results.get("control"))) else []
    points += [("Groups", said)] if (said := groups_sentences(results.get("groups"))) else []
    return [*points, ("Keep in mind", [CONSTANT_BIAS])]


def confidence(manifest: dict[str, Json], *stages: str) -> str:
    """``95 %`` where the config of one of the stages tells it, else an empty string."""
    for stage in stages:
        level = point(at(manifest, "config", stage, "confidence"))
        if level is not None:
            return f"{100 * level:g}\u00a0%"
    return ""


def _sites(results: Results) -> list[str]:
    """The sites that the headline speaks of: the one chosen on tune, and the paper's."""
    cosine = results.get("cosine")
    named = [at(cosine, "chosen_site"), at(cosine, "paper_site")]
    sites = [site for site in dict.fromkeys(named) if isinstance(site, str)]
    if sites:
        return sites
    measured = site_order(
        mapping(at(results.get("vector"), "sites")) or mapping(at(results.get("spectrum"), "sites"))
    )
    return [FINAL_NORM] if FINAL_NORM in measured else measured[-1:]


def _compared(manifest: dict[str, Json], results: Results) -> str:
    config = manifest.get("config")
    activations = results.get("activations")
    if "base" in results or mapping(at(config, "base")):
        total = point(at(results.get("base"), "parameters", "total"))
        size = f" of {plural(total, 'parameter')}" if total is not None else ""
        base = f"a base model{size} trained from nothing on the spot"
    else:
        base = f"the base {at(config, 'models', 'base') or 'model'}"
    dpo = mapping(at(config, "dpo"))
    if "dpo" in results or dpo:
        details = [
            words
            for words, known in (
                (f"β = {dpo.get('beta')}", dpo.get("beta") is not None),
                (f"loss {dpo.get('loss_type')}", bool(dpo.get("loss_type"))),
                (f"frozen embeddings: {dpo.get('freeze')}", bool(dpo.get("freeze"))),
                (f"LoRA of rank {at(dpo, 'lora', 'rank')}", bool(dpo.get("lora"))),
            )
            if known
        ]
        tuned = "the same model after DPO" + (f" ({', '.join(details)})" if details else "")
    elif at(config, "models", "tuned") is None and results.keys() <= {"data", "base", "control"}:
        return f"{base[:1].upper()}{base[1:]}, alone: this pipeline has no tuned model."
    else:
        tuned = f"the tuned {at(config, 'models', 'tuned') or 'model'}"
    text = f"{base[:1].upper()}{base[1:]}, with {tuned}"
    four_way = results.get("template")
    if activations is not None:
        n, rows = at(activations, "n"), split_rows(activations)
    elif four_way is not None:
        rows = {split: int(at(four_way, f"n_{split}") or 0) for split in ("fit", "test")}
        n = sum(rows.values())
    else:
        return f"{text}. No activations were read."
    sizes = [f"{split} {size:,}" for split, size in rows.items()]
    text += f", at {plural(len(at(activations or four_way, 'sites') or []), 'site')} on "
    text += f"N = {plural(n, 'prompt')}"
    text += f" ({', '.join(sizes)})" if sizes else ""
    if activations is None:
        return (
            f"{text}, each read raw and through the chat template, at the token from which the "
            "models answer."
        )
    return f"{text}, identical token ids, position {at(activations, 'position')}."


def _training(dpo: Json) -> list[Point]:
    if dpo is None:
        return []
    accuracy = (
        f"held-out reward accuracy {interval(at(dpo, 'test', 'reward_accuracy'))} (chance 0.5), "
        f"margin {interval(at(dpo, 'test', 'reward_margin'))}, KL to the base "
        f"{interval(at(dpo, 'kl_to_base'))} nats a token (noise floor "
        f"{number(point(at(dpo, 'kl_noise_floor')))}), on "
        f"{plural(at(dpo, 'test', 'n'), 'test pair')}."
    )
    learned, high = at(dpo, "learned"), estimate(at(dpo, "test", "reward_accuracy")).high
    if learned is True:
        verdict = "DPO learned the preference: "
    elif learned is None:
        verdict = "Nothing says whether DPO learned the preference: "
    elif high is not None and high < 0.5:
        verdict = "DPO made held-out preferences worse than chance: "
    else:
        verdict = (
            "DPO learned nothing that shows on held-out pairs; what follows measures what training "
            "moved, not a preference: "
        )
    text = verdict + accuracy
    return [("Training", [text[:1].upper() + text[1:]])]


def _size(vector: Json, sites: list[str]) -> list[Point]:
    said = []
    for site in sites:
        row = at(vector, "sites", site)
        if row is None:
            continue
        if is_undefined(row):
            said.append(f"At {site}, Δ = 0: v* is undefined.")
            continue
        norm, floor = point(at(row, "norm")), point(at(row, "noise_mean_norm"))
        text = f"At {site}, ‖v*‖ = {number(norm)}"
        relative = point(at(row, "relative_norm"))
        if relative is not None:
            text += f", {percent(relative)} of the mean length of the base's states"
        times = ratio(norm, floor)
        if times is not None:
            text += f" and {number(times)} times the noise floor ({number(floor)})"
        elif floor == 0:
            text += "; the noise floor is exactly 0"
        if at(row, "within_rounding") is True:
            text += ": not to be told from rounding, so its direction means nothing"
        if at(row, "inert") is True:
            text += "; v* lies along the state itself and is inert after the norm"
        said.append(text + ".")
    return [("Size of v*", said)] if said else []


def _direction(cosine: Json, sites: list[str]) -> list[Point]:
    said = []
    for site in sites:
        row = at(cosine, "sites", site)
        if row is None:
            continue
        if is_undefined(row):
            said.append(f"At {site}: undefined, Δ = 0.")
            continue
        chosen = (
            " (the site chosen on the tune prompts)" if site == at(cosine, "chosen_site") else ""
        )
        held = estimate(at(row, "held_out", "mean"))
        null = point(at(row, "null", "q95"))
        text = (
            f"At {site}{chosen}, the mean held-out cosine with v* is "
            f"{interval(at(row, 'held_out', 'mean'))}; the null's 95\u00a0% quantile is "
            f"{number(null)}"
        )
        bound = held.low if held.low is not None else held.value
        if bound is not None and null is not None and bound <= null:
            text += ", so a shared direction cannot be told from chance"
        said.append(text + ".")
    return [("Shared direction", said)] if said else []


def _dimension(spectrum: Json, sites: list[str]) -> list[Point]:
    said = []
    for site in sites:
        row = at(spectrum, "sites", site)
        if row is None:
            continue
        if is_undefined(row):
            said.append(f"At {site}: undefined, Δ = 0.")
            continue
        said.append(
            f"At {site}, σ₂/σ₁ = {interval(at(row, 'delta', 'uncentred', 'sigma_ratio'))}; "
            f"one constant vector holds m = {interval(at(row, 'shared_share'))} of the squared "
            f"displacement (debiased {number(point(at(row, 'shared_share_debiased')))}). Effective "
            f"rank {interval(at(row, 'delta', 'uncentred', 'effective_rank'))}."
        )
    if not said:
        return []
    said.append(
        f"N = {plural(at(spectrum, 'n'), 'prompt')}, d = {count(at(spectrum, 'd'))}. A "
        "small σ₂/σ₁ alone says little; m and the held-out cosine say more."
    )
    return [("One dimension?", said)]


def _reach(vector: Json) -> list[Point]:
    said = []
    for key, words in (("first_token", "first response token"), ("response", "response tokens")):
        part = at(vector, "kl_recovery", key)
        if not mapping(part):
            continue
        total = number(point(at(part, "kl_tuned_base")))
        chosen, at_chosen = point(at(part, "chosen_strength")), at(part, "recovered_at_chosen")
        at_one = recovered_at(part, 1.0)
        shares = []
        if chosen is not None and point(at_chosen) is not None:
            shares.append(f"{_share(at_chosen)} of it at λ = {number(chosen)}, chosen on tune")
        if point(at_one) is not None:
            shares.append(f"{_share(at_one)} at λ = 1")
        if shares:
            said.append(
                f"On the {words}, KL(tuned‖base) is {total} nats a token; λv* recovers "
                f"{', and '.join(shares)}."
            )
        else:
            reason = at(part, "undefined") or f"KL(tuned‖base) is {total}"
            said.append(f"On the {words}: undefined, {reason}.")
    return [(f"Reach at {FINAL_NORM}", said)] if said else []


def _share(value: Json) -> str:
    middle, low, high = estimate(value)
    if low is None or high is None:
        return percent(middle)
    return f"{percent(middle)} [{percent(low)}, {percent(high)}]"


def _swept(result: Json) -> list[Point]:
    """What a sweep of λ found: KL recovered, told metrics at λ = 1, λ-equivalents, collapse."""
    sweep = mapping(result)
    metrics = mapping(sweep.get("metrics"))
    one = nearest(sweep, 1.0)
    if one is None or not metrics:
        return []
    inverse = sweep.get("direction") == "inversion"
    start, target, site = (str(sweep.get(key)) for key in ("start", "target", "site"))
    at_one = f"λ = {plain(at(sweep, 'strengths', one))}"
    doing = f"Taking λv* from the {start}" if inverse else f"Adding λv* to the {start}"
    said = [*_sham(sweep)]
    kl = metrics.get("kl_recovered")
    if point(at(kl, "curves", "v", one)) is not None:
        text = (
            f"{doing} model at {site} recovers {_share(at(kl, 'curves', 'v', one))} of the KL to "
            f"the {target} model at {at_one}{_beside_random(kl, one, percent)}"
        )
        top = best(sweep)
        if top is not None and top != one:
            text += (
                f"; it comes nearest at λ = {plain(at(sweep, 'strengths', top))}, with "
                f"{_share(at(kl, 'curves', 'v', top))} (that λ was picked on these prompts)"
            )
        said.append(text + ".")
        beside = [
            f"{at(sweep, 'arms', arm, 'label')} {_share(at(kl, 'curves', arm, one))}"
            for arm in baselines(sweep)
            if point(at(kl, "curves", arm, one)) is not None
        ]
        if beside:
            said.append(f"Of baselines whose shift is as long, {at_one}: {', '.join(beside)}.")
    told = [
        name
        for name in main_metrics(sweep)
        if name in ("preference_match", "reward_margin", "refusal") or name.startswith("oracle_")
    ]
    moved = [
        f"{at(metrics, name, 'label') or name} {interval(at(metrics, name, 'curves', 'v', one))} "
        f"({start} {number(point(at(metrics, name, 'start')))}, "
        f"{target} {number(point(at(metrics, name, 'target')))}"
        f"{_beside_random(metrics[name], one)})"
        for name in told
        if point(at(metrics, name, "curves", "v", one)) is not None
    ]
    if moved:
        said.append(f"At {at_one}: {'; '.join(moved)}.")
    if inverse:
        said += _equivalents({name: metrics[name] for name in main_metrics(sweep)}, target)
    below, above = collapse(sweep)
    edges = [
        f"λ {sign} {plain(edge)}" for sign, edge in (("≤", below), ("≥", above)) if edge is not None
    ]
    if edges:
        said.append(f"At least half of the outputs are degenerate from {' and from '.join(edges)}.")
    elif items(at(sweep, "texts", "degenerate")):
        said.append("At no strength of the sweep were half of the outputs degenerate.")
    return [("Inversion" if inverse else "Interpolation", said)]


def _sham(sweep: dict[str, Json]) -> list[str]:
    """A warning where hooks with λ = 0 changed something."""
    changed = [
        what for what in ("texts", "logits") if at(sweep, "sham", f"{what}_identical") is False
    ]
    if not changed:
        return []
    return [
        f"The sham arm failed: hooks with λ = 0 changed {' and '.join(changed)}, so the numbers of "
        "this sweep are not to be trusted."
    ]


def _beside_random(metric: Json, i: int, written: Callable[[float | None], str] = number) -> str:
    """``, random directions 0.1 to 0.2``, and whether v* can be told from them."""
    low, high = (point(at(metric, "random", bound, i)) for bound in ("low", "high"))
    if low is None or high is None:
        return ""
    text = f", random directions {written(low)} to {written(high)}"
    return text + (": not told apart" if stands_out(metric, i) is False else "")


def _equivalents(metrics: dict[str, Json], target: str) -> list[str]:
    """The λ at which each of the metrics that tell most meets the target's level."""
    crossings = {
        str(at(metric, "label") or name): at(metric, "crossing", "strength")
        for name, metric in metrics.items()
        if at(metric, "crossing") is not None
    }
    met = [f"{label} {interval(λ)}" for label, λ in crossings.items() if point(λ) is not None]
    never = [label for label, λ in crossings.items() if point(λ) is None]
    said = []
    if met:
        said.append(f"λ at which a metric meets the {target} model's level: {'; '.join(met)}.")
    if never:
        said.append(f"At no λ of the sweep: {'; '.join(never)}.")
    return said
