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
    plain,
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
    """Reward margins of the base with v* added at the place that a pair's profile chose.

    Attributes:
        values: one a test pair, float64.
        conversations: of each test pair.
        beta: β of the implicit reward.
        place: site and tokens, in words.
    """

    values: np.ndarray
    conversations: tuple[str, ...]
    beta: float
    place: str


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
            "90 % of the KL that patching the whole displacement recovers) is at most "
            f"max(1, {self.share:g} · width), and random subspaces need more. σ₂/σ₁ never decides."
        )

    def grade(self, pair: Evidence, _control: Control) -> Grade:
        """By the result of `rank`, at the profile's chosen site where it was measured."""
        if "rank" not in pair.results:
            return _untested("stage rank did not run")
        sites = mapping(at(pair.results["rank"], "sites"))
        chosen = at(pair.results.get("profile"), "chosen", "site")
        site = chosen if chosen in sites else next(iter(sites), None)
        found = at(sites, site) if site is not None else None
        beside = _spectral_words(pair, site)
        width, most = point(at(found, "width")), max(map(float, items(at(found, "k"))), default=0.0)
        oracle, random = at(found, "k90", "oracle"), at(found, "k90", "random")
        if width is None or oracle is None or point(at(found, "patched")) is None:
            why = "the curve of KL recovered over k is undefined"
            return _untested(why, beside=beside)
        allowed = max(1.0, self.share * width)
        told = _number(f"k₉₀ at {site}, width {width:.0f}", oracle)
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
        least = estimate(random).low if estimate(random).low is not None else point(random)
        more = least is None or (high is not None and least > high)
        needs = "never reach 90 %" if least is None else f"need {number(least)} or more"
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
            "At the site and tokens that the profile chose on tune, the lower end of the "
            "efficiency (KL that v* recovers over KL that patching the tuned states recovers) is "
            f"at least {self.share:g}, v* recovers more than random directions of its norm, and it "
            "is not inert."
        )

    def grade(self, pair: Evidence, _control: Control) -> Grade:
        """By the result of `profile`."""
        if "profile" not in pair.results:
            return _untested("stage profile did not run")
        place, found = _chosen(pair.results["profile"])
        if found is None:
            return _untested("the profile chose no place: v* is undefined at every site")
        efficiency, own = at(found, "efficiency"), at(found, "v", "kl_recovered")
        told = _number(f"efficiency v*/patched at {place}", efficiency)
        band = at(found, "random", "kl_recovered")
        most = real(at(band, "high"))
        null = {
            "words": "KL recovered by random directions of its norm",
            "value": real(at(band, "median")), "low": real(at(band, "low")), "high": most,
        }  # fmt: skip
        beside = _map_words(pair, at(pair.results["profile"], "chosen", "site"))
        if not _bounded(efficiency):
            why = at(found, "efficiency_why") or "the efficiency has no interval"
            return _untested(str(why).rstrip("."), told, null, beside)
        if not _bounded(own) or most is None:
            return _untested("v* or its random directions have no interval", told, null, beside)
        low, least = estimate(efficiency).low or 0.0, estimate(own).low or 0.0
        recovers = (
            f"v* recovers {interval(own)} of the KL, random directions {number(most)} at most"
        )
        return _graded(
            told,
            null,
            [
                (low >= self.share, f"the lower end {number(low)} is at least {self.share:g}",
                 f"the lower end {number(low)} is below {self.share:g}"),
                (least > most, recovers, recovers),
                (at(found, "inert") is not True, "v* is not inert", "v* is inert"),
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
            "profile chose, minus that of the coin-flip null under its own v* at its own place, on "
            "the same pairs, has a lower end above 0; the pair's own margin is above that of "
            "random directions; and the pair's training learned."
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
            return _untested("the coin-flip null was measured on other pairs, or with another β")
        told = _number(
            f"reward margin under v* at {place}, minus coin-flip's at {other.place}",
            difference.json(),
        )
        null = _number("reward margin under the coin-flip null's v*", self.margin(other).json())
        most = real(at(found, "random", "reward_margin", "high"))
        if difference.low is None or not _bounded(own) or most is None:
            return _untested("the difference, the margin or the random band is missing", told, null)
        checks = [
            (difference.low > 0, f"the difference's lower end {number(difference.low)} is above 0",
             f"the difference's lower end {number(difference.low)} is not above 0"),
            ((estimate(own).low or 0.0) > most,
             f"the margin {interval(own)} is above random directions ({number(most)} at most)",
             f"the margin {interval(own)} is not above random directions ({number(most)} at most)"),
        ]  # fmt: skip
        if "dpo" in pair.results:
            learned = at(pair.results["dpo"], "learned") is True
            checks.append((learned, "training learned", "training did not learn"))
        return _graded(told, null, checks)

    def difference(self, own: Margins, other: Margins) -> Interval | None:
        """Mean of own − other; None where pairs or β differ."""
        if own.conversations != other.conversations or own.beta != other.beta:
            return None
        return paired_difference(
            own.values, other.values, own.conversations,
            draws=self.draws, confidence=self.confidence, seed=self.seed,
        )  # fmt: skip

    def margin(self, found: Margins) -> Interval:
        """Mean margin under v*."""
        mean = bootstrap_mean(
            found.values, found.conversations,
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
            f"KL recovered is at least {self.share:g}, and above that of random directions."
        )

    def grade(self, pair: Evidence, _control: Control) -> Grade:
        """By the result of `inversion`, at the measured strength nearest to 1."""
        if "inversion" not in pair.results:
            return _untested("stage inversion did not run")
        sweep = mapping(pair.results["inversion"])
        metric = at(sweep, "metrics", "kl_recovered")
        i = nearest(sweep, 1.0)
        if i is None or metric is None:
            return _untested("the inversion has no KL recovered")
        strength = real(at(sweep, "strengths", i))
        found = at(metric, "curves", "v", i)
        told = _number(f"KL recovered at λ = {plain(strength)}, {at(sweep, 'site')}", found)
        band = {end: real(at(metric, "random", end, i)) for end in ("low", "high")}
        null = {"words": "random directions", "value": real(at(metric, "random", "mean", i)),
                **band}  # fmt: skip
        beside = _crossing_words(sweep)
        if not _bounded(found):
            return _untested("the KL recovered has no interval", told, null, beside)
        most = band["high"]
        if most is None:
            return _untested("no random directions were measured", told, null, beside)
        low = estimate(found).low or 0.0
        return _graded(
            told,
            null,
            [
                (low >= self.share, f"the lower end {number(low)} is at least {self.share:g}",
                 f"the lower end {number(low)} is below {self.share:g}"),
                (low > most, f"random directions recover {number(most)} at most",
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


def _spectral_words(pair: Evidence, site: Json) -> tuple[str, ...]:
    delta = at(pair.results.get("spectrum"), "sites", str(site), "delta", "uncentred")
    ratio = point(at(delta, "sigma_ratio"))
    if ratio is None:
        return ()
    return (f"σ₂/σ₁ at {site} is {number(ratio)}: it is small for any shared shift.",)


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
