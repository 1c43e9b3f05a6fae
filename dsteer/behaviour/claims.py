"""Five claims about a trained pair, each graded by one rule over what the stages found.

A claim is *supported* or *not supported* by its number, its interval and its null, and *not tested*
where a stage, a control or an interval is missing: what was not measured never supports anything.
The rules stand in order; each one is stated in words that hold the same thresholds as the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dsteer.behaviour.profile import TIE
from dsteer.config import ClaimsConfig
from dsteer.geometry.inference import holm, paired_difference
from dsteer.geometry.intervals import Interval, bootstrap_mean
from dsteer.report.sweep_values import nearest
from dsteer.report.values import (
    at,
    estimate,
    interval,
    items,
    mapping,
    number,
    point,
    real,
    site_order,
)
from dsteer.store import Json

Verdict = Literal["supported", "not supported", "not tested"]

SUPPORTED: Verdict = "supported"
NOT_SUPPORTED: Verdict = "not supported"
NOT_TESTED: Verdict = "not tested"

CONTROL = "coin_flip"
"""The kind of null that `preference_specific` is held against."""


@dataclass(frozen=True)
class Margins:
    """Reward margins of the base with v* added.

    Attributes:
        values: place (site and tokens, in words) → one a test pair, float64.
        place: the place that the pair's profile chose.
        conversations: of each test pair.
        beta: β of the implicit reward.
    """

    values: Mapping[str, np.ndarray]
    place: str
    conversations: tuple[str, ...]
    beta: float

    @property
    def own(self) -> np.ndarray:
        """At the place that was chosen."""
        return self.values[self.place]


@dataclass(frozen=True)
class Evidence:
    """What the stages found of one pair.

    Attributes:
        name: of the pair, or of the null.
        results: stage → its result.
        margins: under v*; None where the profile has none.
        lora: rank of the adapter whose weights made the tuned model; None where all were free.
    """

    name: str
    results: Mapping[str, Json]
    margins: Margins | None = None
    lora: int | None = None


@dataclass(frozen=True)
class Control:
    """The null of `preference_specific`: its evidence, or in words why there is none."""

    evidence: Evidence | None
    missing: str = ""


@dataclass(frozen=True)
class Grade:
    """What a rule says.

    Attributes:
        verdict: supported, not supported or not tested.
        why: what decided, in words.
        number: ``{"words", "value", "low", "high"}``; None where it was not measured.
        null: what the number is held against, likewise.
        beside: what is told but never decides.
    """

    verdict: Verdict
    why: str
    number: Json = None
    null: Json = None
    beside: tuple[str, ...] = ()


def _untested(
    why: str, number: Json = None, null: Json = None, beside: tuple[str, ...] = ()
) -> Grade:
    return Grade(NOT_TESTED, f"{why}.", number, null, beside)


def _graded(
    number: Json, null: Json, checks: Sequence[tuple[bool, str, str]], beside: Sequence[str] = ()
) -> Grade:
    """Supported where every check holds; its words for yes and for no."""
    lost = [no for holds, _, no in checks if not holds]
    why = lost or [yes for _, yes, _ in checks]
    verdict = NOT_SUPPORTED if lost else SUPPORTED
    return Grade(verdict, f"{'; '.join(why)}.", number, null, tuple(beside))


def _number(words: str, found: Json) -> Json:
    value, low, high = estimate(found)
    return {"words": words, "value": value, "low": low, "high": high}


def _bounded(found: Json) -> bool:
    return None not in estimate(found)


# ---------------------------------------------------------------------------------- the rules


@dataclass(frozen=True)
class SharedShift:
    """All prompts are moved along one direction."""

    alpha: float
    name: str = "shared_shift"

    @property
    def rule(self) -> str:
        """In words."""
        return (
            "At the site chosen on tune, the lower end of the mean held-out cosine is above the "
            f"95 % quantile of the sign-flip null, its p after Holm over sites is at most "
            f"{self.alpha:g}, and ‖v*‖ is above the noise floor."
        )

    def grade(self, pair: Evidence, _control: Control) -> Grade:
        """By the results of `cosine` and `vector`."""
        for stage in ("cosine", "vector"):
            if stage not in pair.results:
                return _untested(f"stage {stage} did not run")
        cosine = pair.results["cosine"]
        site = at(cosine, "chosen_site")
        if site is None:
            return _untested("no cosine is defined: no site's displacement differs from zero")
        found = at(cosine, "sites", site)
        held = at(found, "held_out", "mean")
        told = _number(f"mean held-out cosine at {site}", held)
        bound, draws = real(at(found, "null", "q95")), real(at(found, "null", "draws"))
        null = {"words": "its 95 % quantile with a random sign a conversation", "value": bound}
        if not _bounded(held) or bound is None:
            return _untested("the cosine or its null has no interval", told, null)
        sites = site_order(mapping(at(cosine, "sites")))
        p_values = [real(at(cosine, "sites", name, "null", "p")) for name in sites]
        p = holm(p_values)[sites.index(site)]
        if p is None or not draws:
            return _untested("the cosine stage left no p-value", told, null)
        known = sum(each is not None for each in p_values)
        if p > self.alpha and known / (draws + 1) > self.alpha:
            return _untested(
                f"{draws:.0f} draws of the null are too few for {known} sites: raise "
                "cosine.null_draws",
                told,
                null,
            )
        size = at(pair.results["vector"], "sites", site)
        norm, floor = point(at(size, "norm")), point(at(size, "noise_mean_norm"))
        if norm is None or floor is None:
            return _untested("the vector stage has no noise floor at this site", told, null)
        low = estimate(held).low or 0.0
        null["p_after_holm"] = p
        return _graded(
            told,
            null,
            [
                (low > bound, f"the lower end {number(low)} is above the null's {number(bound)}",
                 f"the lower end {number(low)} is not above the null's {number(bound)}"),
                (p <= self.alpha, f"p = {number(p)} after Holm over {known} sites",
                 f"p = {number(p)} after Holm over {known} sites"),
                (norm > floor and at(size, "within_rounding") is not True,
                 f"‖v*‖ = {number(norm)} is above the noise floor {number(floor)}",
                 f"‖v*‖ = {number(norm)} is within the noise floor {number(floor)}"),
            ],
        )  # fmt: skip


@dataclass(frozen=True)
class LowDimensional:
    """A few directions carry what patching the whole displacement does."""

    share: float
    name: str = "low_dimensional"

    @property
    def rule(self) -> str:
        """In words."""
        return (
            "The upper end of k₉₀ (directions in the order of their singular values that recover "
            "90 % of the KL that patching the whole displacement recovers, which is told from "
            f"nothing) is at most max(1, {self.share:g} · width), and random subspaces need more. "
            "σ₂/σ₁ never decides."
        )

    def grade(self, pair: Evidence, _control: Control) -> Grade:
        """By the result of `rank`, at the profile's chosen site where it was measured."""
        if "rank" not in pair.results:
            return _untested("stage rank did not run")
        sites = mapping(at(pair.results["rank"], "sites"))
        chosen = at(pair.results.get("profile"), "chosen", "site")
        site = chosen if chosen in sites else next(iter(sites), None)
        found = at(sites, site) if site is not None else None
        beside = (*_part_words(pair, site, found), *_spectral_words(pair, site))
        width, most = point(at(found, "width")), max(map(float, items(at(found, "k"))), default=0.0)
        oracle, random = at(found, "k90", "oracle"), at(found, "k90", "random")
        if width is None or oracle is None or point(at(found, "patched")) is None:
            why = "the curve of KL recovered over k is undefined"
            return _untested(why, beside=beside)
        allowed = max(1.0, self.share * width)
        told = _number(f"k₉₀ at {site}, {at(found, 'tokens')}, width {width:.0f}", oracle)
        if at(oracle, "resampled") is False:
            return _untested("one conversation gives no interval of k₉₀", told, beside=beside)
        least = estimate(at(found, "patched")).low
        if least is None or least <= TIE:
            why = "what patching recovers is not told from nothing"
            return _untested(why, told, beside=beside)
        never = "" if point(random) is not None else f" (not reached with {most:.0f})"
        null = _number(f"k₉₀ of random subspaces{never}", random)
        value, _, high = estimate(oracle)
        if value is None or high is None:
            if most < allowed:
                return _untested(
                    f"90 % is not reached for sure with {most:.0f} directions, and the limit is "
                    f"{number(allowed)}: raise rank.most", told, null, beside,
                )  # fmt: skip
            reached = (False, "", f"90 % is not reached for sure with {most:.0f} directions")
        else:
            reached = (
                high <= allowed,
                f"the upper end {number(high)} is at most {number(allowed)}",
                f"the upper end {number(high)} is above {number(allowed)}",
            )
        if random is None:
            return _untested("no random subspaces were measured", told, null, beside)
        fewest = estimate(random).low if estimate(random).low is not None else point(random)
        more = fewest is None or (high is not None and fewest > high)
        needs = "never reach 90 %" if fewest is None else f"need {number(fewest)} or more"
        words = "Supported by construction: " if pair.lora is not None else ""
        if pair.lora is not None:
            beside = (
                f"The tuned model is a LoRA of rank {pair.lora}: the rank of each weight's change "
                "is bounded by construction, so this verdict says little about training.",
                *beside,
            )
        grade = _graded(
            told,
            null,
            [reached, (more, f"random subspaces {needs}", f"random subspaces {needs}, no more")],
            beside,
        )
        if words and grade.verdict == SUPPORTED:
            return Grade(SUPPORTED, words + grade.why, told, null, grade.beside)
        return grade


@dataclass(frozen=True)
class ConstantSuffices:
    """One constant vector does what each prompt's own displacement does."""

    share: float
    name: str = "constant_suffices"

    @property
    def rule(self) -> str:
        """In words."""
        return (
            "At the site and tokens that the profile chose on tune, v* recovers at least "
            f"{self.share:g} of the KL over whole answers (lower end), and more than random "
            "directions of its norm, on all test pairs and on those that these were measured on."
        )

    def grade(self, pair: Evidence, _control: Control) -> Grade:
        """By the result of `profile`."""
        if "profile" not in pair.results:
            return _untested("stage profile did not run")
        place, found = _chosen(pair.results["profile"])
        if found is None:
            return _untested("the profile chose no place: v* is undefined at every site")
        own = at(found, "v", "kl_recovered_answers")
        told = _number(f"KL of whole answers recovered by v* at {place}", own)
        band = at(found, "random", "kl_recovered_answers")
        most, same = real(at(band, "high")), real(at(band, "v"))
        null = {
            "words": "KL recovered by random directions of its norm",
            "value": real(at(band, "median")), "low": real(at(band, "low")), "high": most,
        }  # fmt: skip
        beside = (
            *_efficiency_words(place, found),
            *_map_words(pair, at(pair.results["profile"], "chosen", "site")),
        )
        if not _bounded(own) or most is None or same is None:
            return _untested("v* or its random directions have no interval", told, null, beside)
        low = estimate(own).low or 0.0
        recover = f"random directions recover {number(most)} at most"
        return _graded(
            told,
            null,
            [
                (low >= self.share, f"the lower end {number(low)} is at least {self.share:g}",
                 f"the lower end {number(low)} is below {self.share:g}"),
                (min(low, same) > most, recover, f"{recover}, v* on the same pairs {number(same)}"),
            ],
            beside,
        )  # fmt: skip


@dataclass(frozen=True)
class PreferenceSpecific:
    """v* raises the preference, and training without a preference gives no vector that does."""

    draws: int
    confidence: float
    seed: int
    name: str = "preference_specific"

    @property
    def rule(self) -> str:
        """In words."""
        return (
            "The mean reward margin of test pairs under base + v*, at the place that the pair's "
            "profile chose, minus that of the coin-flip null under its own v*, on the same pairs, "
            "has a lower end above 0, with the null at its own place and at the pair's; the pair's "
            "own margin is above that of random directions; and the pair's training learned."
        )

    def grade(self, pair: Evidence, control: Control) -> Grade:
        """By the margins under both v*, paired."""
        if pair.margins is None:
            return _untested(
                "stage profile did not run"
                if "profile" not in pair.results
                else "the profile has no margins: v* is undefined at every site"
            )
        place, found = _chosen(pair.results["profile"])
        own = at(found, "v", "reward_margin")
        if control.evidence is None:
            return _untested(control.missing, _number(f"reward margin under v* at {place}", own))
        other = control.evidence.margins
        if other is None:
            return _untested("the coin-flip null has no margins under its own v*")
        difference = self.difference(pair.margins, other)
        if difference is None:
            return _untested(
                "the coin-flip null was measured on other pairs, at other places, or with another β"
            )
        told = _number(
            f"reward margin under v* at {place}, minus coin-flip's there or at {other.place}, "
            "whichever is less",
            difference.json(),
        )
        null = _number("reward margin under the coin-flip null's v*", self.margin(other).json())
        band = at(found, "random", "reward_margin")
        most, same = real(at(band, "high")), real(at(band, "v"))
        if difference.low is None or not _bounded(own) or most is None or same is None:
            return _untested("the difference, the margin or the random band is missing", told, null)
        checks = [
            (difference.low > 0, f"the difference's lower end {number(difference.low)} is above 0",
             f"the difference's lower end {number(difference.low)} is not above 0"),
            (min(estimate(own).low or 0.0, same) > most,
             f"the margin {interval(own)} is above random directions ({number(most)} at most)",
             f"the margin {interval(own)} is not above random directions ({number(most)} at most)"),
        ]  # fmt: skip
        if "dpo" in pair.results:
            learned = at(pair.results["dpo"], "learned") is True
            checks.append((learned, "training learned", "training did not learn"))
        return _graded(told, null, checks)

    def difference(self, own: Margins, other: Margins) -> Interval | None:
        """Mean of own − other, the other at its own place or at this one's, whichever gives the
        lower end that is less; None where pairs or β differ, or the other was not measured there.
        """
        if own.conversations != other.conversations or own.beta != other.beta:
            return None
        if own.place not in other.values:
            return None
        found = [
            paired_difference(
                own.own, other.values[place], own.conversations,
                draws=self.draws, confidence=self.confidence, seed=self.seed,
            )
            for place in dict.fromkeys((other.place, own.place))
        ]  # fmt: skip
        told = [one for one in found if one is not None]
        return min(told, key=lambda one: one.value if one.low is None else one.low, default=None)

    def margin(self, found: Margins) -> Interval:
        """Mean margin under v*."""
        mean = bootstrap_mean(
            found.own, found.conversations,
            draws=self.draws, confidence=self.confidence, seed=self.seed,
        )  # fmt: skip
        assert mean is not None  # margins are finite
        return mean


@dataclass(frozen=True)
class Reversible:
    """Taking v* from the tuned model gives the base back."""

    share: float
    name: str = "reversible"

    @property
    def rule(self) -> str:
        """In words."""
        return (
            "Taking v* once (λ = 1) from the tuned model recovers the base: the lower end of the "
            f"KL recovered is at least {self.share:g}, and above that of random directions, on all "
            "test pairs and on those that these were measured on."
        )

    def grade(self, pair: Evidence, _control: Control) -> Grade:
        """By the result of `inversion`."""
        if "inversion" not in pair.results:
            return _untested("stage inversion did not run")
        sweep = mapping(pair.results["inversion"])
        metric = at(sweep, "metrics", "kl_recovered")
        if metric is None:
            return _untested("the inversion has no KL recovered")
        i = nearest(sweep, 1.0)
        if i is None or real(at(sweep, "strengths", i)) != 1.0:
            return _untested("λ = 1 was not among the strengths: name it in inversion.strengths")
        found = at(metric, "curves", "v", i)
        told = _number(f"KL recovered at λ = 1, {at(sweep, 'site')}", found)
        band = {end: real(at(metric, "random", end, i)) for end in ("low", "high")}
        null = {"words": "random directions", "value": real(at(metric, "random", "mean", i)),
                **band}  # fmt: skip
        beside = _crossing_words(sweep)
        if not _bounded(found):
            return _untested("the KL recovered has no interval", told, null, beside)
        most, same = band["high"], real(at(metric, "random", "v", i))
        if most is None or same is None:
            return _untested("no random directions were measured", told, null, beside)
        low = estimate(found).low or 0.0
        return _graded(
            told,
            null,
            [
                (low >= self.share, f"the lower end {number(low)} is at least {self.share:g}",
                 f"the lower end {number(low)} is below {self.share:g}"),
                (min(low, same) > most, f"random directions recover {number(most)} at most",
                 f"random directions recover up to {number(most)}"),
            ],
            beside,
        )  # fmt: skip


Rule = SharedShift | LowDimensional | ConstantSuffices | PreferenceSpecific | Reversible


def rules(config: ClaimsConfig, seed: int) -> tuple[Rule, ...]:
    """The five rules, in order, with the thresholds of a pipeline."""
    return (
        SharedShift(config.alpha),
        LowDimensional(config.low_rank_share),
        ConstantSuffices(config.suffices),
        PreferenceSpecific(config.bootstrap, config.confidence, seed),
        Reversible(config.reversed_share),
    )


# ---------------------------------------------------------------------------------- beside


def _chosen(profile: Json) -> tuple[str, Json]:
    """The place that a profile chose, in words, and what was measured there."""
    site, tokens = at(profile, "chosen", "site"), at(profile, "chosen", "tokens")
    if site is None or tokens is None:
        return "", None
    return f"{site}, {tokens}", at(profile, "sites", str(site), str(tokens))


def _efficiency_words(place: str, found: Json) -> tuple[str, ...]:
    """What of the place's own change the constant is."""
    first = place.endswith("prompt_last")
    of = "the first answer token's" if first else "the answers'"
    whole = interval(at(found, "patched", "kl_recovered_answers"))
    efficiency = at(found, "efficiency")
    said = (
        f"of what patching recovers there of {of} KL, v* recovers {interval(efficiency)} "
        "(the efficiency)"
        if point(efficiency) is not None
        else str(at(found, "efficiency_why") or "the efficiency is undefined").rstrip(".")
    )
    return (f"Patching {place} recovers {whole} of the KL of whole answers; {said}.",)


def _part_words(pair: Evidence, site: Json, ranked: Json) -> tuple[str, ...]:
    """How much of the change the place holds at which directions were counted."""
    profile, tokens = pair.results.get("profile"), at(ranked, "tokens")
    if tokens != "prompt_last" or point(at(ranked, "patched")) is None:
        return ()
    whole = at(profile, "sites", str(site), str(tokens), "patched", "kl_recovered_answers")
    share = f": {interval(whole)} of the answers' KL" if point(whole) is not None else ""
    return (f"Counted in the KL of the first answer token; patching there brings so much{share}.",)


def _spectral_words(pair: Evidence, site: Json) -> tuple[str, ...]:
    delta = at(pair.results.get("spectrum"), "sites", str(site), "delta", "uncentred")
    ratio = at(delta, "sigma_ratio")
    if point(ratio) is None:
        return ()
    return (f"σ₂/σ₁ at {site} is {interval(ratio)}: it is small for any shared shift.",)


def _map_words(pair: Evidence, site: Json) -> tuple[str, ...]:
    r2 = at(pair.results.get("maps"), "sites", str(site), "r2")
    ridge, translation = (point(at(r2, name)) for name in ("ridge", "translation"))
    if ridge is None or translation is None:
        return ()
    return (
        f"Held-out R² of states at {site}: ridge {number(ridge)}, translation "
        f"{number(translation)}, a gap of {number(ridge - translation)}.",
    )


def _crossing_words(sweep: Json) -> tuple[str, ...]:
    said = [
        f"{at(metric, 'label')} {interval(crossing)}"
        for metric in mapping(at(sweep, "metrics")).values()
        if point(crossing := at(metric, "crossing", "strength")) is not None
    ]
    return (f"λ-equivalents: {'; '.join(said)}.",) if said else ()
