"""The rules of the claims: every verdict, and every missing part."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from graded import CHOSEN, CONVERSATIONS, PAIRS, TOKENS, around, margins, results

from dsteer.behaviour.claims import Control, Evidence, Grade, Margins, rules
from dsteer.config import ClaimsConfig

NO_NULL = Control(None, "the pipeline names no null coin_flip")


HERE = f"{CHOSEN}, {TOKENS}"


def margins_at(values: dict[str, np.ndarray], place: str = HERE, beta: float = 0.1) -> Margins:
    return Margins(values, place, tuple(CONVERSATIONS), beta)


def evidence(
    found: dict[str, Any], *, margin: float = 1.0, seed: int = 0, lora: int | None = None
) -> Evidence:
    own = margins_at({HERE: margins(margin, seed)})
    return Evidence("pair", found, own if "profile" in found else None, lora)


def grade(claim: str, pair: Evidence, control: Control = NO_NULL, **config: Any) -> Grade:
    rule = next(r for r in rules(ClaimsConfig(bootstrap=300, **config), 0) if r.name == claim)
    assert rule.rule
    return rule.grade(pair, control)


def without(stage: str, *keys: str, **changes: Any) -> dict[str, Any]:
    """The results of a good pair, changed below some keys of a stage; or without the stage."""
    found = copy.deepcopy(results())
    if not changes:
        del found[stage]
        return found
    node = found[stage]
    for key in keys:
        node = node[key]
    node.update(changes)
    return found


FLIPPED = Control(evidence(results(margin=0.0), margin=0.0, seed=1))


@pytest.mark.parametrize(
    "claim",
    ["shared_shift", "low_dimensional", "constant_suffices", "preference_specific", "reversible"],
)
def test_a_good_pair_supports_each_claim_and_tells_number_and_null(claim: str) -> None:
    found = grade(claim, evidence(results()), FLIPPED)
    assert found.verdict == "supported", found.why
    assert found.number["value"] is not None
    assert found.number["low"] <= found.number["value"] <= found.number["high"]
    assert found.null["words"]


PLACE = ("sites", CHOSEN, TOKENS)
SITE = ("sites", CHOSEN)


@pytest.mark.parametrize(
    ("claim", "found", "why"),
    [
        ("shared_shift", without("cosine", *SITE, held_out={"mean": around(0.11)}), "not above"),
        ("shared_shift", without("cosine", *SITE, null={"q95": 0.1, "p": 0.02, "draws": 999}),
         "p = 0.02"),  # Holm: the largest of four p-values, itself
        ("shared_shift", without("vector", *SITE, noise_mean_norm=3.0), "noise floor"),
        ("low_dimensional", without("rank", *SITE, "k90", oracle={"value": 3, "low": 2, "high": 4}),
         "above 3.2"),
        ("low_dimensional", without("rank", *SITE, "k90", oracle={"value": 2, "low": 1,
                                                                 "high": None}), "not reached"),
        ("low_dimensional", without("rank", *SITE, "k90", random={"value": 3, "low": 2, "high": 4}),
         "no more"),
        ("constant_suffices", without("profile", *PLACE, "v", kl_recovered_answers=around(0.81)),
         "below 0.8"),
        ("constant_suffices", without("profile", *PLACE, "random", kl_recovered_answers={
            "low": -0.1, "median": 0.0, "high": 0.89, "v": 0.95}), "at most"),
        ("constant_suffices", without("profile", *PLACE, "random", kl_recovered_answers={
            "low": -0.1, "median": 0.0, "high": 0.1, "v": 0.09}), "on the same pairs 0.09"),
        ("preference_specific", without("dpo", learned=False), "did not learn"),
        ("preference_specific", without("profile", *PLACE, "v", reward_margin=around(0.1)),
         "not above random"),
        ("preference_specific", without("profile", *PLACE, "random", reward_margin={
            "low": -0.1, "median": 0.0, "high": 0.1, "v": 0.09}), "not above random"),
        ("reversible", without("inversion", "metrics", "kl_recovered",
                               curves={"v": [around(0.81)] * 5}), "below 0.8"),
        ("reversible", without("inversion", "metrics", "kl_recovered",
                               random={"low": [0.0] * 5, "mean": [0.5] * 5, "high": [0.95] * 5,
                                       "v": [1.0] * 5}),
         "random directions recover up to"),
        ("reversible", without("inversion", "metrics", "kl_recovered",
                               random={"low": [0.0] * 5, "mean": [0.1] * 5, "high": [0.2] * 5,
                                       "v": [0.1] * 5}),
         "random directions recover up to"),
    ],
)  # fmt: skip
def test_each_condition_alone_refuses(claim: str, found: dict[str, Any], why: str) -> None:
    alpha = 0.01 if why == "p = 0.02" else 0.05
    graded = grade(claim, evidence(found), FLIPPED, alpha=alpha)
    assert graded.verdict == "not supported"
    assert why in graded.why


@pytest.mark.parametrize(
    ("claim", "found", "why"),
    [
        ("shared_shift", without("cosine"), "cosine did not run"),
        ("shared_shift", without("vector"), "vector did not run"),
        ("shared_shift", without("cosine", chosen_site=None), "no cosine is defined"),
        ("shared_shift", without("cosine", *SITE, held_out={"mean": around(0.9) | {"low": None}}),
         "no interval"),
        ("shared_shift", without("cosine", *SITE, null={"q95": 0.1}), "no p-value"),
        ("shared_shift", without("vector", *SITE, noise_mean_norm=None), "noise floor"),
        ("low_dimensional", without("rank"), "rank did not run"),
        ("low_dimensional", without("rank", *SITE, patched=None), "undefined"),
        ("low_dimensional", without("rank", *SITE, "k90", random=None), "no random"),
        ("constant_suffices", without("profile"), "profile did not run"),
        ("constant_suffices", without("profile", chosen={"site": None, "tokens": None}),
         "chose no place"),
        ("constant_suffices", without("profile", *PLACE, "v", kl_recovered_answers=None),
         "no interval"),
        ("low_dimensional", without("rank", *SITE, patched=around(0.0)), "not told from nothing"),
        ("low_dimensional", without("rank", *SITE, "k90", oracle={
            "value": 1, "low": None, "high": None, "resampled": False}), "one conversation"),
        ("reversible", without("inversion", strengths=[-1.0, 0.0, 0.5, 1.1, 2.0]), "λ = 1 was not"),
        ("preference_specific", without("profile"), "profile did not run"),
        ("reversible", without("inversion"), "inversion did not run"),
        ("reversible", without("inversion", "metrics", "kl_recovered", curves={"v": [None] * 5}),
         "no interval"),
        ("reversible", without("inversion", "metrics", "kl_recovered", random=None), "no random"),
    ],
)  # fmt: skip
def test_what_is_missing_never_supports(claim: str, found: dict[str, Any], why: str) -> None:
    graded = grade(claim, evidence(found), FLIPPED)
    assert graded.verdict == "not tested"
    assert why in graded.why


def test_holm_counts_every_site() -> None:
    # p = 0.02 at the chosen site alone; 4 sites: 4 · 0.02 = 0.08 where it is the smallest
    found = results()
    for site, entry in found["cosine"]["sites"].items():
        entry["null"]["p"] = 0.02 if site == CHOSEN else 0.5
    graded = grade("shared_shift", evidence(found))
    assert graded.verdict == "not supported"
    assert graded.null["p_after_holm"] == pytest.approx(0.08)
    assert grade("shared_shift", evidence(found), alpha=0.1).verdict == "supported"


def test_too_few_draws_test_nothing() -> None:
    # the least p of 20 draws is 1/21, four times that after Holm: no pair could pass
    found = results()
    for entry in found["cosine"]["sites"].values():
        entry["null"] |= {"p": 1 / 21, "draws": 20}
    graded = grade("shared_shift", evidence(found))
    assert graded.verdict == "not tested"
    assert "cosine.null_draws" in graded.why


def test_a_small_k_that_was_not_tried_is_not_tested() -> None:
    found = without(
        "rank", *SITE, k=[1, 2], k90={"oracle": {"value": None, "low": None, "high": None},
                                      "random": {"value": None, "low": None, "high": None}}
    )  # fmt: skip
    graded = grade("low_dimensional", evidence(found))
    assert graded.verdict == "not tested"
    assert "raise rank.most" in graded.why


def test_the_ratio_of_singular_values_never_decides() -> None:
    wide = without("rank", *SITE, "k90", oracle={"value": 8, "low": 8, "high": 8})
    for ratio in (1e-6, 0.99):
        wide["spectrum"]["sites"][CHOSEN]["delta"]["uncentred"]["sigma_ratio"] = ratio
        graded = grade("low_dimensional", evidence(wide))
        assert graded.verdict == "not supported"
        assert any("σ₂/σ₁" in words for words in graded.beside)


def test_lora_is_said_beside_the_rank() -> None:
    graded = grade("low_dimensional", evidence(results(), lora=8))
    assert graded.verdict == "supported"
    assert graded.why.startswith("Supported by construction")
    assert "LoRA of rank 8" in graded.beside[0]
    free = grade("low_dimensional", evidence(results()))
    assert "construction" not in free.why


def test_without_its_control_a_preference_is_not_tested() -> None:
    for missing in ("the pipeline names no null coin_flip", "the null coin_flip failed"):
        graded = grade("preference_specific", evidence(results()), Control(None, missing))
        assert graded.verdict == "not tested"
        assert missing in graded.why
        assert graded.number["value"] == 1.0
    blank = Control(Evidence("coin_flip", results(), None))
    assert grade("preference_specific", evidence(results()), blank).verdict == "not tested"


def test_the_control_must_have_the_same_pairs_and_scale() -> None:
    own = evidence(results())
    assert own.margins is not None
    for other in (
        Margins(own.margins.values, HERE, ("elsewhere",) * PAIRS, 0.1),
        margins_at(dict(own.margins.values), beta=0.5),
        margins_at({"elsewhere": own.margins.own}, "elsewhere"),
    ):
        control = Control(Evidence("coin_flip", results(), other))
        assert grade("preference_specific", own, control).verdict == "not tested"


def test_the_control_against_itself_is_not_supported() -> None:
    control = Evidence("coin_flip", results(), evidence(results()).margins)
    graded = grade("preference_specific", control, Control(control))
    assert graded.verdict == "not supported"
    assert (graded.number["value"], graded.number["low"], graded.number["high"]) == (0, 0, 0)


def test_the_difference_is_paired_over_conversations() -> None:
    own, other = margins(1.0, 3), margins(0.7, 4)
    # 40 pairs of 20 conversations: the spread of the mean is that of 20 means of two, by hand
    pairs = (own - other).reshape(-1, 2).mean(axis=1)
    spread = pairs.std() / np.sqrt(len(pairs))
    control = Control(Evidence("coin_flip", results(), margins_at({HERE: other})))
    pair = Evidence("pair", results(), margins_at({HERE: own}))
    found = grade("preference_specific", pair, control).number
    assert found["value"] == pytest.approx((own - other).mean(), abs=1e-12)
    # 300 draws know the ends of a normal interval to about 15 % of its width
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * spread, rel=0.3)
    assert grade("preference_specific", pair, control).verdict == "supported"


def test_a_base_against_itself_tests_nothing() -> None:
    found = results()
    found["cosine"]["chosen_site"] = None
    found["profile"]["chosen"] = {"site": None, "tokens": None}
    found["rank"]["sites"][CHOSEN]["patched"] = None
    found["inversion"]["metrics"]["kl_recovered"]["curves"]["v"] = [None] * 5
    pair = Evidence("self", found, None)
    for rule in rules(ClaimsConfig(), 0):
        assert rule.grade(pair, FLIPPED).verdict == "not tested", rule.name


def test_the_control_is_held_against_at_its_own_place_and_at_the_pairs() -> None:
    """Two trainings of the same margins everywhere, whose profiles chose different places."""
    both = {HERE: margins(1.0, 3), "final_norm, prompt_last": margins(0.2, 4)}
    pair = Evidence("pair", results(), margins_at(both))
    control = Control(Evidence("coin_flip", results(), margins_at(both, "final_norm, prompt_last")))
    found = grade("preference_specific", pair, control)
    assert found.verdict == "not supported"
    assert found.number["value"] == 0


def test_a_place_that_holds_little_of_the_change_is_said() -> None:
    """v* is all of what the first answer token's change is, and that is little of the answers."""
    found = without("profile", *PLACE, "v", kl_recovered_answers=around(0.044, 0.01))
    found["profile"]["sites"][CHOSEN]["prompt_last"] = found["profile"]["sites"][CHOSEN][TOKENS]
    found["profile"]["sites"][CHOSEN]["prompt_last"]["patched"]["kl_recovered_answers"] = around(
        0.045
    )
    found["profile"]["chosen"]["tokens"] = "prompt_last"
    found["rank"]["sites"][CHOSEN]["tokens"] = "prompt_last"
    graded = grade("constant_suffices", evidence(found))
    assert graded.verdict == "not supported"
    assert "recovers 0.045" in graded.beside[0]
    assert "of the first answer token's KL, v* recovers 0.947" in graded.beside[0]
    assert "0.045" in grade("low_dimensional", evidence(found)).beside[0]
