"""Cosines equal their definitions."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from reference import measures

from dsteer.errors import MeasurementError
from dsteer.geometry.alignment import cosine_to, cosine_to_mean, histogram_mode

RNG = np.random.default_rng(21)


@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 5), (30, 7), (7, 30)])
def test_cosines_equal_the_naive_ones(n: int, d: int) -> None:
    rows = RNG.standard_normal((n, d)) + 0.3
    v = RNG.standard_normal(d)
    expected = [measures.cosine(row, v) for row in rows]
    np.testing.assert_allclose(cosine_to(rows, v).numpy(), expected, atol=1e-14)
    np.testing.assert_allclose(
        cosine_to_mean(rows, "in_sample").numpy(), measures.in_sample(rows), atol=1e-13
    )
    np.testing.assert_allclose(
        cosine_to_mean(rows, "leave_one_out").numpy(), measures.leave_one_out(rows), atol=1e-13
    )
    assert torch.equal(cosine_to_mean(rows), cosine_to_mean(rows, "in_sample"))


def test_hand_worked() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    v = np.array([3.0, 3.0])
    half = 1 / math.sqrt(2)
    np.testing.assert_allclose(cosine_to(rows, v).numpy(), [half, half, -half], atol=1e-15)
    # left out: (-3, 2), (-2, 0), (1, 2)
    np.testing.assert_allclose(
        cosine_to_mean(rows, "leave_one_out").numpy(),
        [-3 / math.sqrt(13), 0.0, -1 / math.sqrt(5)],
        atol=1e-15,
    )


def test_a_constant_displacement_has_cosine_one() -> None:
    b = RNG.standard_normal(50)
    rows = np.tile(b, (9, 1))
    for mode in ("in_sample", "leave_one_out"):
        cosines = cosine_to_mean(rows, mode)
        assert float((cosines - 1).abs().max()) < 1e-15
        assert float(cosines.max()) <= 1


def test_undefined_cosines_are_nan() -> None:
    rows = np.array([[1.0, 2.0], [0.0, 0.0], [3.0, 1.0]])
    assert torch.isnan(cosine_to(rows, np.array([1.0, 1.0]))).tolist() == [False, True, False]
    assert torch.isnan(cosine_to(rows, np.zeros(2))).all()
    assert torch.isnan(cosine_to_mean(rows)).tolist() == [False, True, False]
    assert torch.isnan(cosine_to_mean(np.zeros((3, 2)))).all()
    assert torch.isnan(cosine_to_mean(rows[:1], "leave_one_out")).all()
    assert cosine_to_mean(rows[:1]).tolist() == pytest.approx([1.0])


def test_in_sample_cosine_of_noise_is_one_over_root_n() -> None:
    """Each row is a 1/N part of v: cos ≈ (‖Δ‖²/N) / (‖Δ‖ ‖Δ‖/√N) = 1/√N; the other kinds see 0."""
    rng = np.random.default_rng(4)
    n, d = 100, 1000
    rows = rng.standard_normal((n, d))
    # a mean of 100 cosines, each of spread 1/√d ≈ 0.03: ± 4 · 0.003
    assert float(cosine_to_mean(rows).mean()) == pytest.approx(1 / math.sqrt(n), abs=0.013)
    assert abs(float(cosine_to_mean(rows, "leave_one_out").mean())) < 0.013
    held_out = cosine_to(rng.standard_normal((n, d)), rows.mean(axis=0))
    assert abs(float(held_out.mean())) < 0.013


def test_not_finite_is_refused() -> None:
    with pytest.raises(MeasurementError, match="vector: 1 of 2"):
        cosine_to(np.ones((4, 2)), np.array([1.0, math.nan]))
    with pytest.raises(MeasurementError, match="delta: 1 of 4"):
        cosine_to_mean(np.array([[1.0, math.inf], [0.0, 1.0]]))


def test_float32_input() -> None:
    rows = torch.randn(5, 3)
    assert cosine_to(rows, rows[0]).dtype == torch.float64
    assert float(cosine_to(rows, rows[0])[0]) == pytest.approx(1, abs=1e-15)


def test_histogram_mode() -> None:
    assert histogram_mode(np.array([0.51, 0.515, -0.3, math.nan])) == pytest.approx(0.51)
    assert histogram_mode(np.array([0.71, -0.29])) == pytest.approx(-0.29)  # a tie: the lowest
    assert histogram_mode(np.array([math.nan])) is None


def test_an_unknown_mode_is_refused() -> None:
    unchecked = inspect.unwrap(cosine_to_mean)  # as users have it, without the tests' type checks
    with pytest.raises(MeasurementError, match="in-sample"):
        unchecked(torch.eye(3, dtype=torch.float64), "in-sample")


def test_rows_that_cancel_have_no_mean_direction() -> None:
    rows = torch.tensor([[0.1], [0.2], [-0.3]], dtype=torch.float64) * torch.arange(1.0, 5.0)
    assert torch.isnan(cosine_to_mean(rows)).all()
