"""Each sentence stands where the numbers call for it, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from dsteer.behaviour.diagnoses import diagnose

SITE = "resid_post.2"
GRID = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
HEALTHY = (-0.8, 0.0, 0.6, 0.96, 0.4, -3.0)
CLEAN = (0.1, 0.0, 0.0, 0.1, 0.2, 0.4)


def interval(value: float | None, half: float = 0.02) -> Any:
    if value is None:
        return None
    return {"value": value, "low": value - half, "high": value + half, "n": 32}


def metric(
    values: Sequence[float | None],
    target: float | None = None,
    random: tuple[float, float] | None = None,
    worst: Sequence[float | None] | None = None,
    label: str = "it",
) -> Any:
    band = None if random is None else {
        "low": [random[0]] * len(values), "high": [random[1]] * len(values), "draws": 20,
        "v": list(values),
    }  # fmt: skip
    points = [interval(value) for value in values]
    return {
        "label": label,
        "curves": {"v": points},
        "start": points[1],
        "target": interval(target),
        "random": band,
        "worst": None if worst is None else list(worst),
    }


def say(
    start: str = "base",
    recovered: Sequence[float | None] = HEALTHY,
    degenerate: Sequence[float] = CLEAN,
    cosine: float | None = 0.95,
    grid: Sequence[float] = GRID,
    random: tuple[float, float] | None = (-0.1, 0.1),
    **others: Any,
) -> list[str]:
    metrics = {"kl_recovered": metric(recovered, 1.0, random, label="KL recovered"), **others}
    return diagnose(start, "resid_post.2", grid, metrics, degenerate, cosine)


@pytest.mark.parametrize("start", ["base", "tuned"])
def test_a_healthy_sweep_has_none(start: str) -> None:
    overlap = metric([0.2, 0.5, 0.5, 0.5, 0.5, 0.49], worst=[0.2, 0.45, 0.5, 0.5, 0.5, 0.44])
    assert say(start, rouge_l_reference=overlap) == []


@pytest.mark.parametrize(
    ("cosine", "said"), [(0.849, 1), (0.85, 0), (1.0, 0), (None, 0), (-0.2, 1)]
)
def test_heterogeneous_change(cosine: float | None, said: int) -> None:
    found = say(cosine=cosine)
    assert len(found) == said
    if said:
        assert found[0].startswith("Heterogeneous change")
        assert f"{cosine:.3f}" in found[0]
        assert "resid_post.2" in found[0]


@pytest.mark.parametrize(
    ("degenerate", "where"),
    [
        ((0.9, 0.0, 0.0, 0.0, 0.0, 0.49), None),  # below 0 is another side
        ((0.0, 0.0, 0.0, 0.0, 0.5, 0.9), "λ = 2 is the first"),
        ((0.0, 0.0, 0.0, 0.1, 0.4, 0.5), "λ = 4 is the first"),
    ],
)
def test_over_steering(degenerate: Sequence[float], where: str | None) -> None:
    found = say(degenerate=degenerate)
    if where is None:
        assert found == []
        return
    (sentence,) = found
    assert sentence.startswith(f"Over-steering: {where}")
    assert "(50%)" in sentence


def test_overlap_falls() -> None:
    # beside degenerate texts of its own: 0.45 at λ = 0, and the interval reaches 0.02 below
    worst = [0.1, 0.45, 0.44, 0.44, 0.42, 0.1]
    falling = metric([0.5] * 6, worst=worst, label="ROUGE-L, reference")
    (found,) = say(rouge_l_reference=falling)
    assert found.startswith("Overlap falls: ROUGE-L, reference")
    assert "0.420 at λ = 2," in found
    target = metric([0.5] * 6, worst=worst, label="ROUGE-L, target's text")
    (found,) = say(rouge_l_target=target)
    assert "target's text" in found
    assert len(say(rouge_l_reference=falling, rouge_l_target=target)) == 1
    level = metric([0.5] * 6, worst=[0.1, *[0.45] * 4, 0.431])
    assert say(rouge_l_reference=level) == []
    unknown = metric([0.5] * 6, worst=worst)
    unknown["start"]["low"] = None
    assert say(rouge_l_reference=unknown) == []
    assert say(rouge_l_reference=metric([0.5, None, *[0.5] * 4], worst=worst)) == []


def test_inversion_that_does_not_restore_the_base() -> None:
    curve = (-0.8, 0.0, 0.5, 0.7, 0.8, 0.3)
    (found,) = say("tuned", curve)
    assert found.startswith("Inversion at λ = 1 does not restore the base")
    assert "0.700" in found
    assert "λ = 2 (0.800)" in found
    # the lower end decides: 0.91 − 0.02
    assert len(say("tuned", (-0.8, 0.0, 0.5, 0.91, 0.8, 0.3))) == 1
    assert say("tuned", (-0.8, 0.0, 0.5, 0.93, 0.8, 0.3)) == []
    assert not any("Inversion" in sentence for sentence in say("base", curve))


def test_a_start_that_is_degenerate_itself() -> None:
    (found,) = say(degenerate=(0.0, 0.5, 0.7, 0.1, 0.4, 0.9))
    assert found.startswith("The start model writes 50% degenerate texts as it is")


def test_interpolation_that_recovers_little() -> None:
    (found,) = say("base", (-0.8, 0.0, 0.1, 0.12, 0.0, -1.0))
    assert "recovers 0.120 of the KL" in found
    assert say("base", (-0.8, 0.0, 0.4, 0.5, 0.3, -1.0)) == []


def test_another_strength_brings_more() -> None:
    (found,) = say("base", (-0.8, 0.0, 0.5, 0.7, 0.8, 0.3))
    assert found.startswith("λ = 1 is not where adding v* brings most")
    assert "0.700" in found
    assert "0.800 at λ = 2" in found
    (found,) = say("tuned", (-0.8, 0.0, 0.99, 0.95, 0.5, 0.3))
    assert "taking away v*" in found
    assert "0.990 at λ = 0.5" in found
    assert say("base", (-0.8, 0.0, 0.5, 0.79, 0.8, 0.3)) == []  # by next to nothing


def test_without_the_strength_one_nothing_is_said_of_it() -> None:
    grid = (-1.0, 0.0, 0.5, 0.9, 2.0, 4.0)
    assert say("tuned", (-0.8, 0.0, 0.1, 0.1, 0.1, 0.1), grid=grid) == []


def test_models_that_predict_the_same() -> None:
    (found,) = say(recovered=[None] * 6)
    assert "undefined" in found


def test_no_more_than_a_random_direction() -> None:
    reward = metric([-0.5, 0.0, 0.2, 0.3, 0.4, 0.5], 2.0, (-0.31, 0.31), label="reward")
    curve = (0.0, 0.0, 0.05, 0.08, 0.08, 0.0)
    band = "does no more than a random direction"
    found = say(recovered=curve, reward_margin=reward)
    assert [s for s in found if band in s] == [
        "At λ = 1 v* does no more than a random direction of its norm to: KL recovered, reward."
    ]
    worse = say(recovered=(0.0, 0.0, -0.5, -0.9, -2.0, -3.0))
    assert any(band in s and "KL recovered" in s for s in worse)
    outside = metric([-0.5, 0.0, 0.2, 0.32, 0.4, 0.5], 2.0, (-0.31, 0.31), label="reward")
    assert not any(band in s for s in say(reward_margin=outside))
    away = metric([0.5, 0.0, -0.2, -0.32, -0.4, -0.5], 2.0, (-0.31, 0.31), label="reward")
    assert not any(band in s for s in say(reward_margin=away))
    assert not any(band in s for s in say(recovered=curve, random=None))


def test_no_more_than_a_baseline() -> None:
    def with_noise(value: float, noise: float | None, half: float = 0.02) -> list[str]:
        kl = metric((-0.8, 0.0, value / 2, value, 0.4, -3.0), 1.0, label="KL recovered")
        kl["curves"]["noise"] = [interval(noise, half)] * len(GRID)
        metrics = {"kl_recovered": kl}
        said = diagnose("base", SITE, GRID, metrics, CLEAN, 0.95, {"noise": "seeded noise"})
        return [words for words in said if "baseline" in words]

    same = ["At λ = 1 v* does no more than the baseline ‘seeded noise’ to: KL recovered."]
    assert with_noise(0.5, 0.49) == same  # inside of 0.47 to 0.51
    assert with_noise(0.3, 0.49) == same  # worse
    assert with_noise(0.52, 0.49) == []
    assert with_noise(0.52, 0.49, half=0.04) == same
    assert with_noise(0.3, None) == []

    reward = metric([-0.5, 0.0, 0.2, 0.3, 0.4, 0.5], 2.0, label="reward")
    kl = metric(HEALTHY, 1.0, label="KL recovered")
    kl["curves"]["noise"] = [interval(0.0)] * len(GRID)
    bare = {"value": 0.3, "low": None, "high": None, "n": 1}
    for point, wanted in ((bare, 1), (interval(0.31), 1), (interval(0.4), 0), (interval(0.2), 0)):
        reward["curves"]["noise"] = [point] * len(GRID)
        metrics = {"kl_recovered": kl, "reward_margin": reward}
        said = diagnose("base", SITE, GRID, metrics, CLEAN, 0.95, {"noise": "seeded noise"})
        assert sum("baseline ‘seeded noise’ to: reward." in words for words in said) == wanted


def test_one_way_or_not() -> None:
    rising = metric([-0.5, -1e-9, 0.2, 0.3, 0.1, -0.5], 2.0, label="reward")
    (found,) = say(reward_margin=rising)
    assert found == (
        "reward moves the target's way from λ = 0 to 1 and never back: 0.000 to 0.300; the target "
        "has 2.000."
    )
    (found,) = say(reward_margin=metric([0.5, 0.0, -0.2, -0.2, 0, 0], -2.0, label="reward"))
    assert "never back" in found
    for values in ([0, 0.0, 0.2, 0.1, 0, 0], [0, 0.0, -0.2, -0.3, 0, 0], [0, 0.0, 0.0, 0.0, 0, 0]):
        (found,) = say(reward_margin=metric(values, 2.0, label="reward"))
        shown = ", ".join(f"{value:.3f}" for value in values[1:4])
        assert found == f"reward does not go one way from λ = 0 to 1: {shown}."
    assert say(reward_margin=metric([0, 0.0, None, 0.3, 0, 0], 2.0)) == []  # a gap
    assert say(reward_margin=metric([0, 0.0, 0.2, 0.3, 0, 0], 0.0)) == []  # nowhere to go
    assert say(reward_margin=metric([0, 0.0, 0.2, 0.3, 0, 0])) == []


def test_the_oracle_that_tuning_moved_most() -> None:
    few = metric([0, 0.0, 0.1, 0.2, 0, 0], 0.3, label="oracle: brief")
    most = metric([0, 0.0, -0.1, -0.2, 0, 0], -0.5, label="oracle: polite")
    (found,) = say(oracle_brief=few, oracle_polite=most)
    assert found.startswith("oracle: polite moves")
