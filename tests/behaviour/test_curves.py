"""Curves over the strength: intervals as geometry's, crossings by hand, bands, and the ledger."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from dsteer.behaviour.curves import Curves, Ledger, band, exponential
from dsteer.behaviour.metrics import GENERATED, TEACHER_FORCED
from dsteer.geometry.intervals import bootstrap_mean, bootstrap_ratio

NAN = float("nan")
GRID = (-1.0, 0.0, 0.5, 1.0, 2.0, 4.0)
ROWS = [str(i // 2) for i in range(40)]
"""Conversations of two rows each."""


def curves(clusters: list[str] | None = None, draws: int = 300) -> Curves:
    return Curves(clusters or ROWS, draws, 0.9, 5)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_intervals_are_geometrys() -> None:
    values, below = noise(40), noise(40, seed=1).abs()
    values[3] = NAN
    settings = {"draws": 300, "confidence": 0.9, "seed": 5}
    assert curves().mean(values) == bootstrap_mean(values, ROWS, **settings)
    assert curves().mean(values) != bootstrap_mean(values, None, **settings)
    values[3] = 0
    assert curves().ratio(values, below) == bootstrap_ratio(values, below, ROWS, **settings)
    assert curves().mean(torch.full((40,), NAN)) is None
    assert curves().ratio(values, torch.zeros(40)) is None


def straight(line: list[float], spread: float = 0.0) -> Tensor:
    """Every prompt on the same curve, but for a shift of its own."""
    shift = spread * noise(40)
    return torch.tensor(line, dtype=torch.float64)[:, None] + shift - shift.mean()


@pytest.mark.parametrize(
    ("line", "level", "where"),
    [
        ([9, 0, 1, 2, 3, 4], 1.5, 0.75),  # between grid points, in proportion
        ([9, 0, 1, 2, 3, 4], 3.5, 3.0),
        ([9, 0, -1, -2, -3, -4], -2.25, 1.25),  # falling
        ([9, 0, 1, 2, 3, 4], 2.0, 1.0),  # at a grid point
        ([9, 0, 1, 2, 3, 4], 4.0, 4.0),  # at the last one
        ([9, 0, 1, 2, 3, 4], 0.0, 0.0),  # already at 0
        ([9, 0, 3, 0, 3, 0], 1.5, 0.25),  # the first of several
        ([9, 0, 2, 2, 2, 0], 2.0, 0.5),  # the first of a stretch
        ([9, 1, 1, 1, 2, 3], 1.0, 0.0),
    ],
)
def test_crossings_by_hand(line: list[float], level: float, where: float) -> None:
    found, why = curves().crossing(GRID, straight(line), torch.full((40,), level).double())
    assert why is None
    assert found is not None
    assert found.value == pytest.approx(where, abs=1e-12)
    assert found.n == 40
    # no prompt differs from another: no draw does
    assert found.low == pytest.approx(where)
    assert found.high == pytest.approx(where)


def test_a_curve_that_never_gets_there() -> None:
    # it does below 0, which does not count
    line = [9.0, 0.0, 1.0, 2.0, 2.5, 2.9]
    found, why = curves().crossing(GRID, straight(line), torch.full((40,), 3.0).double())
    assert found is None
    assert why == "the curve does not reach the target's level up to λ = 4"


def test_undefined_curves_say_where() -> None:
    level = torch.full((40,), 2.5).double()
    values = straight([9, 0, 1, 2, 3, 4])
    values[4] = NAN
    found, why = curves().crossing(GRID, values, level)
    assert found is None
    assert why is not None
    assert "undefined at λ = 2" in why
    assert curves().crossing(GRID, values, level - 1)[0] is not None  # before it
    for gone, aim in ((1, level), (5, torch.full((40,), NAN).double())):
        values = straight([9, 0, 1, 2, 3, 4])
        if aim is level:
            values[gone] = NAN
        found, why = curves().crossing(GRID, values, aim)
        assert found is None
        assert why == "the metric is undefined at λ = 0 or for the target"


def test_prompts_without_a_value_are_left_out() -> None:
    values = straight([9, 0, 1, 2, 3, 4])
    values[3, :10], values[2, 5:7] = NAN, NAN
    found, _ = curves().crossing(GRID, values, torch.full((40,), 1.5).double())
    assert found is not None
    assert found.value == pytest.approx(0.75)


def test_a_crossing_that_many_draws_miss_has_no_ends() -> None:
    values = straight([9, 0, 1, 2, 3, 4])
    values[5, :4] = 0.0  # the mean reaches 3.6; without these rows 4
    aim = torch.full((40,), 3.599).double()
    found, _ = curves().crossing(GRID, values, aim)
    assert found is not None
    assert found.value > 3.9
    assert (found.low, found.high) == (None, None)


def test_a_ratio_of_sums_crosses_where_its_curve_does() -> None:
    weights = torch.tensor([1.0, 9.0] * 20).double()
    line = torch.tensor([9.0, 0.0, 1.0, 2.0, 3.0, 4.0]).double()
    slow = torch.tensor([1.0, 0.5] * 20).double()  # what each row makes of the strength
    values = line[:, None] * slow * weights
    aim = torch.full((40,), 1.1).double()
    found, _ = curves().crossing(
        GRID, values, aim * weights, weights.expand(6, 40), weights.expand(40)
    )
    assert found is not None
    assert found.value == pytest.approx(1.0)
    plain, _ = curves().crossing(GRID, values / weights, aim)
    assert plain is not None
    assert plain.value < 0.8


def test_intervals_of_crossings_cover() -> None:
    """Conversations of two prompts, noise in level and slope; the truth is λ = 1.3."""
    rng = np.random.default_rng(0)
    grid = np.array(GRID)
    held, trials, sizes = 0, 200, []
    keys = [str(i // 2) for i in range(60)]
    for trial in range(trials):
        shift = np.repeat(rng.normal(size=30), 2) + 0.5 * rng.normal(size=60)
        slope = 1 + 0.3 * rng.normal(size=60)
        values = torch.from_numpy(grid[:, None] * slope + shift)
        aim = torch.from_numpy(1.3 + shift + 0.5 * np.repeat(rng.normal(size=30), 2))
        found, _ = Curves(keys, 200, 0.9, trial).crossing(GRID, values, aim)
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 1.3 <= found.high
        sizes.append(found.high - found.low)
    assert 0.83 <= held / trials <= 0.95
    assert np.mean(sizes) < 0.6


def test_bands() -> None:
    few = np.array([[1.0, NAN, NAN], [3.0, 2.0, math.inf], [2.0, 6.0, NAN]])
    low, high, mean = band(few)
    assert (low, high, mean) == ([1.0, 2.0, None], [3.0, 6.0, None], [2.0, 4.0, None])
    many = np.random.default_rng(0).normal(size=(20, 2))
    low, high, _ = band(many)
    np.testing.assert_allclose([low, high], np.quantile(many, [0.025, 0.975], axis=0))
    nineteen = band(many[:19])
    assert nineteen[0] == many[:19].min(0).tolist()
    assert nineteen[1] == many[:19].max(0).tolist()


def ledger() -> Ledger:
    return Ledger(GRID, 300, 0.9, 5)


def test_a_ledger_describes_a_mean() -> None:
    book = ledger()
    entry = book.entry("oracle_polite", "generated", ROWS)
    values = straight([9, 0, 1, 2, 3, 4], spread=0.3)
    values[2, 7] = NAN
    weights = torch.where(values.isnan(), 0.0, 1.0)
    entry.values["v"], entry.below["v"] = values, weights.double()
    entry.worst["v"] = values.nan_to_num(-1.0)
    entry.target, entry.target_below = values[3] + 0.5, torch.ones(40).double()
    entry.random = [np.full(6, 0.1), np.full(6, 0.4), np.full(6, NAN)]
    entry.random_n = 11
    (name,), (got,) = book.described().keys(), book.described().values()
    assert name == "oracle_polite"
    assert "polite" in got["label"]
    for row, point in zip(values, got["curves"]["v"], strict=True):
        wanted = curves().mean(row)
        assert wanted is not None
        assert point == pytest.approx(wanted.json())
    assert got["curves"]["v"][2]["n"] == 39
    assert got["n"] == 40
    assert got["start"] == got["curves"]["v"][1]
    assert got["target"]["value"] == pytest.approx(2.5)
    assert got["crossing"]["why"] is None
    assert got["crossing"]["strength"]["value"] == pytest.approx(1.5)
    assert got["worst"] == pytest.approx(values.nan_to_num(-1.0).mean(1).tolist())
    assert got["random"] == {
        "low": [0.1] * 6, "high": [0.4] * 6, "mean": pytest.approx([0.25] * 6),
        "draws": 3, "n": 11, "v": pytest.approx(values[:, :11].nanmean(1).tolist()),
    }  # fmt: skip


def test_a_ledger_says_why_nothing_crosses() -> None:
    book = ledger()
    level = book.entry("kl_recovered", "teacher_forced", ROWS)
    level.values["v"], level.level = straight([9, 0, 1, 2, 3, 4]), 1.0
    held = book.entry("length", "generated", ROWS)
    held.values["v"] = straight([9, 0, 1, 2, 3, 4], spread=1.0)
    held.target = held.values["v"][1] + 0.01
    none = book.entry("bleu_target", "generated", ROWS)
    none.values["v"] = straight([9, 0, 1, 2, 3, 4])
    far = book.entry("repetition", "generated", ROWS)
    far.values["v"], far.target = straight([9, 0, 1, 2, 3, 4]), torch.full((40,), 7.0).double()
    got = book.described()
    assert list(got) == ["kl_recovered", "bleu_target", "repetition", "length"]
    assert all(item["crossing"]["strength"] is None for item in got.values())
    assert got["kl_recovered"]["target"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 0}
    why = {name: item["crossing"]["why"] for name, item in got.items()}
    assert "end of the scale" in why["kl_recovered"]
    assert "interval holds" in why["length"]
    assert why["bleu_target"]
    assert got["bleu_target"]["target"] is None
    assert "up to λ = 4" in why["repetition"]


def test_a_share_that_nothing_or_everything_has_keeps_its_width() -> None:
    """None of 40 refusals in 20 conversations is no proof of a share of 0."""
    book = ledger()
    entry = book.entry("refusal", "generated", ROWS)
    entry.values["v"] = torch.zeros(6, 40, dtype=torch.float64)
    entry.values["v"][5] = 1.0
    entry.target = torch.full((40,), 0.5).double()  # ties
    told = book.described()["refusal"]
    z = NormalDist().inv_cdf(0.95)  # 90 % intervals
    end = z * z / (20 + z * z)  # Wilson's upper end of 0 of 20
    assert told["curves"]["v"][0] == {
        "value": 0.0, "low": 0.0, "high": pytest.approx(end), "n": 40,
    }  # fmt: skip
    assert told["curves"]["v"][5]["low"] == pytest.approx(1 - end)
    assert told["target"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 40}
    counted = {name for name, metric in {**TEACHER_FORCED, **GENERATED}.items() if metric.counted}
    assert counted == {
        "preference_match", "truthfulqa_mc1", "degenerate", "refusal", "refusal_loops",
    }  # fmt: skip


def test_a_ledger_transforms_values_and_bands() -> None:
    book = ledger()
    entry = book.entry("perplexity", "generated", ROWS)
    entry.transform = exponential
    weights = torch.tensor([1.0, 3.0] * 20).double()
    entry.values["v"] = straight([0, 0, 1, 2, 3, 800]) * weights
    entry.below["v"] = weights.expand(6, 40)
    entry.random = [np.array([exponential(x) for x in (0.0, 1.0, NAN, NAN, 2.0, 3.0)])] * 2
    got = book.described()["perplexity"]
    shown = [point["value"] for point in got["curves"]["v"]]
    assert shown[:5] == pytest.approx([1, 1, math.e, math.e**2, math.e**3])
    assert math.isfinite(shown[5])
    assert got["random"]["high"][2] is None
    assert got["random"]["high"][4] == math.exp(2)
