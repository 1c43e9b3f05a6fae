"""Moments of streamed rows against numpy on all rows at once, and the spectra read off them."""

from __future__ import annotations

import numpy as np
import pytest

from dsteer.errors import MeasurementError
from dsteer.geometry.moments import Moments
from dsteer.geometry.spectrum import spectra, spectra_from_moments

D = 12


def moments_of(rows: np.ndarray, *cuts: int) -> Moments:
    moments = Moments(rows.shape[1])
    for chunk in np.split(rows, cuts):
        moments.update(chunk)
    return moments


def rows_of(n: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(n)
    rows = rng.normal(size=(n, D))
    if kind == "graded":  # σ from 1 to 1e-9: a Gram matrix would lose the last ones
        return (
            rows @ np.diag(10.0 ** -np.linspace(0, 9, D)) @ np.linalg.qr(rng.normal(size=(D, D)))[0]
        )
    if kind == "shifted":
        return rows + 1e8
    if kind == "low rank":
        return rng.normal(size=(n, 2)) @ rng.normal(size=(2, D))
    return rows


@pytest.mark.parametrize("n", [1, 2, 5, D, D + 1, D + 2, 100])
@pytest.mark.parametrize("kind", ["plain", "graded", "shifted", "low rank"])
def test_spectra_equal_numpy_and_the_stored_rows(n: int, kind: str) -> None:
    rows = rows_of(n, kind)
    found = spectra_from_moments(moments_of(rows, n // 3, n // 2) if n > 2 else moments_of(rows))
    for spectrum, stored, matrix in zip(
        found, spectra(rows), (rows, rows - rows.mean(axis=0)), strict=True
    ):
        sigma = np.linalg.svd(matrix, compute_uv=False)
        # what spectra() promises; a Gram matrix's values near zero are off by 1.5e-8
        bound = 1e-10 * np.linalg.norm(rows, 2)
        np.testing.assert_allclose(spectrum.singular_values, sigma, atol=bound, rtol=0)
        assert spectrum.singular_values.shape == stored.singular_values.shape
        assert (spectrum.n, spectrum.d, spectrum.centred) == (n, D, stored.centred)
        assert (spectrum.first_right is None) == (stored.first_right is None)
        if stored.first_right is not None and kind == "plain" and n > 2:
            np.testing.assert_allclose(spectrum.first_right, stored.first_right, atol=1e-9)


def test_a_large_common_mean_costs_the_rest_no_digits() -> None:
    rng = np.random.default_rng(0)
    rest = np.round(rng.normal(size=(60, D)) * 2**20) / 2**20
    shifted = rest + 2.0**20  # exact in float64, so the rest is known exactly
    _, centred = spectra_from_moments(moments_of(shifted, 7, 30))
    sigma = np.linalg.svd(rest - rest.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(centred.singular_values, sigma, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 40])
def test_equal_rows_leave_exactly_nothing_when_centred(n: int) -> None:
    rows = np.tile(np.random.default_rng(1).normal(size=D), (n, 1))
    uncentred, centred = spectra_from_moments(moments_of(rows))
    assert uncentred.sigma_ratio == pytest.approx(0, abs=1e-15)
    assert centred.sigma_ratio is None


def test_zero_rows_have_no_spectrum() -> None:
    uncentred, centred = spectra_from_moments(moments_of(np.zeros((9, D)), 4))
    assert uncentred.first_right is None
    assert centred.first_right is None
    assert uncentred.entropy() is None


@pytest.mark.parametrize("kind", ["plain", "shifted"])
def test_mean_and_second_moment(kind: str) -> None:
    rows = rows_of(50, kind)
    moments = moments_of(rows, 10, 11)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-13, atol=1e-14)
    expected = rows.T @ rows / 50
    np.testing.assert_allclose(moments.second_moment, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("at", [0, 1, 3, 20, 50])
def test_merged_parts_are_the_whole(at: int) -> None:
    rows = rows_of(50, "plain") + 1000 * np.arange(50)[:, None]  # the parts have other pilots
    parts = Moments(D), Moments(D)
    for part, chunk in zip(parts, (rows[:at], rows[at:]), strict=True):
        if len(chunk):
            part.update(chunk)
    parts[0].merge(parts[1])
    whole = moments_of(rows)
    assert parts[0].n == 50
    np.testing.assert_allclose(parts[0].mean, whole.mean, rtol=1e-13)
    for merged, expected in zip(
        spectra_from_moments(parts[0]), spectra_from_moments(whole), strict=True
    ):
        bound = 1e-10 * float(expected.singular_values[0])  # what spectra() promises
        np.testing.assert_allclose(merged.singular_values, expected.singular_values, atol=bound)


def test_what_is_kept_goes_on_with_the_same_bytes() -> None:
    rows = rows_of(30, "plain")
    kept = Moments.from_tensors(moments_of(rows[:11]).tensors())
    kept.update(rows[11:])
    whole = moments_of(rows, 11).tensors()
    assert all((value == whole[name]).all() for name, value in kept.tensors().items())


def test_what_cannot_be_added_is_refused() -> None:
    moments = Moments(D)
    with pytest.raises(MeasurementError, match="no rows"):
        _ = moments.mean
    with pytest.raises(MeasurementError, match="no rows"):
        spectra_from_moments(moments)
    with pytest.raises(MeasurementError, match="width 3, but the moments are of width 12"):
        moments.update(np.zeros((2, 3)))
    with pytest.raises(MeasurementError, match="width 3, but"):
        moments.merge(Moments(3))
    with pytest.raises(MeasurementError, match="not finite"):
        moments.update(np.full((1, D), np.inf))
    assert moments.n == 0
