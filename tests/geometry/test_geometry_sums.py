"""Sums by cluster against the measures of all rows: with one cluster a conversation, the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dsteer.errors import MeasurementError
from dsteer.geometry.alignment import cosine_to
from dsteer.geometry.displacement import shared_share, strengths_along
from dsteer.geometry.intervals import (
    bootstrap_mean,
    held_out_cosine,
    mean_cosine,
    share_intervals,
    sign_flip_null,
)
from dsteer.geometry.sums import (
    BUCKETS,
    NULL_DRAWS,
    ClusterSums,
    bucket_of,
    convergence_from_sums,
    held_out_from_sums,
    in_sample_from_sums,
    null_from_sums,
    shares_from_sums,
    signs_of,
    strength_from_sums,
)

D, N, CLUSTERS = 8, 40, 10
CODES = np.arange(N) // 4


def rows(seed: int) -> np.ndarray:
    made = np.random.default_rng(seed).normal(size=(N, D)) + 0.5
    made[7] = 0  # a row without a direction
    return made


def sums(delta: np.ndarray, codes: np.ndarray = CODES, clusters: int = CLUSTERS) -> ClusterSums:
    made = ClusterSums(D, clusters)
    for part in np.array_split(np.arange(len(delta)), 3):
        made.update(delta[part], codes[part])
    return made


def signed(delta: np.ndarray, keys: list[str], parts: int = 3) -> ClusterSums:
    packed = np.array([list(signs_of(key)) for key in keys], dtype=np.uint8)
    made = ClusterSums(delta.shape[1], signed=True)
    buckets = np.array([bucket_of(key) for key in keys])
    for part in np.array_split(np.arange(len(delta)), parts):
        made.update(delta[part], buckets[part], packed[part])
    return made


FIT, TEST = rows(0), rows(1)
DRAWS = {"draws": 200, "seed": 3}


def test_values_are_those_of_the_rows() -> None:
    fit, test = sums(FIT), sums(TEST)
    v = FIT.mean(axis=0)
    np.testing.assert_allclose(fit.mean, v, rtol=1e-14)
    assert fit.n == N
    assert test.mean_cosine(v) == pytest.approx(float(cosine_to(TEST, v).nanmean()), abs=1e-14)
    assert fit.share.plain == pytest.approx(shared_share(FIT).plain, abs=1e-14)
    assert fit.share.debiased == pytest.approx(shared_share(FIT).debiased, abs=1e-14)


def same(found, expected) -> None:
    assert (found.n, None not in (found.low, found.high)) == (expected.n, True)
    for name in ("value", "low", "high"):
        # the same draws of the same clusters: only the order of the sums differs
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-12), name


def test_intervals_are_those_of_the_conversations() -> None:
    fit, test = sums(FIT), sums(TEST)
    same(
        held_out_from_sums(fit, test, **DRAWS),
        held_out_cosine(FIT, TEST, list(CODES), list(CODES), **DRAWS),
    )
    same(in_sample_from_sums(fit, **DRAWS), mean_cosine(FIT, "in_sample", list(CODES), **DRAWS))
    for kind in ("plain", "debiased"):
        same(getattr(shares_from_sums(fit), kind), getattr(share_intervals(FIT, list(CODES)), kind))
    v = torch.from_numpy(FIT.mean(axis=0))
    same(
        strength_from_sums(test, v, **DRAWS),
        bootstrap_mean(strengths_along(TEST, v), list(CODES), **DRAWS),
    )


def flips(key: str) -> np.ndarray:
    """±1 (2, NULL_DRAWS) of a conversation: where v is fitted, and where cosines are taken."""
    bits = "".join(f"{byte:08b}" for byte in signs_of(key))
    return np.array([1.0 if bit == "1" else -1.0 for bit in bits]).reshape(2, NULL_DRAWS)


def test_the_null_flips_each_conversation() -> None:
    keys = [f"talk {code}" for code in CODES]
    found = null_from_sums(signed(FIT, keys), signed(TEST, keys)).numpy()
    assert len(found) == NULL_DRAWS
    norms = np.linalg.norm(TEST, axis=1)
    unit = TEST[norms > 0] / norms[norms > 0, None]
    signs = np.array([flips(key) for key in keys])
    for draw in range(NULL_DRAWS):
        v = (signs[:, 0, draw, None] * FIT).sum(axis=0)
        cosines = signs[norms > 0, 1, draw] * (unit @ v) / np.linalg.norm(v)
        # float64 sums of 40 rows in another order
        assert found[draw] == pytest.approx(cosines.mean(), abs=1e-13)
    few = null_from_sums(signed(FIT, keys), signed(TEST, keys), draws=7)
    np.testing.assert_array_equal(few, found[:7])


def test_the_null_of_a_shared_direction_narrows_with_conversations() -> None:
    rng = np.random.default_rng(0)
    fit, test = (rng.normal(size=(4000, D)) + np.r_[3.0, np.zeros(D - 1)] for _ in range(2))
    keys = [[f"{split} {at}" for at in range(4000)] for split in ("fit", "test")]
    streamed = [signed(fit, keys[0]), signed(test, keys[1])]
    q95 = float(null_from_sums(*streamed).quantile(0.95))
    expected = sign_flip_null(fit, test, draws=NULL_DRAWS).nanmean(dim=1).quantile(0.95)
    # of 200 normal draws the 95 % quantile has a standard error of 9 %, so their ratio one of 13 %
    assert 0.7 < q95 / float(expected) < 1.4
    buckets = [[bucket_of(key) for key in names] for names in keys]
    flipped = sign_flip_null(fit, test, "held_out", *buckets, draws=NULL_DRAWS).nanmean(dim=1)
    assert float(flipped.quantile(0.95)) > 3 * q95  # the signs are not the buckets'


def test_signs_are_fixed_and_independent() -> None:
    # from `hashlib.blake2b(b"tea", digest_size=50, person=b"sign-flip null")`
    assert signs_of("tea").hex()[:16] == "7a729c48b23bbdca"
    made = np.array([flips(str(key)) for key in range(1000)]).reshape(1000, 2 * NULL_DRAWS)
    # means of 1000 signs have a spread of .032; the largest of 400 is below 5 of these, as is
    # that of the 80,000 products of two draws below 6
    assert abs(made.mean(axis=0)).max() < 5 * 0.032
    products = made.T @ made / 1000 - np.eye(2 * NULL_DRAWS)
    assert abs(products).max() < 6 * 0.032


def test_signed_sums_are_merged_and_kept() -> None:
    keys = [f"talk {code}" for code in CODES]
    whole, merged = signed(FIT, keys, 1), signed(FIT[:13], keys[:13])
    merged.merge(ClusterSums.from_tensors(signed(FIT[13:], keys[13:]).tensors()))
    for name in ("signed_total", "signed_unit"):
        found, expected = merged.tensors()[name], whole.tensors()[name]
        np.testing.assert_allclose(found, expected, atol=1e-13)
    assert merged.filled().tensors().keys() == sums(FIT).tensors().keys()
    with pytest.raises(MeasurementError, match="random signs and sums without"):
        merged.merge(ClusterSums(D))
    with pytest.raises(MeasurementError, match=r"signs of shape None for 40 rows; give 50 bytes"):
        merged.update(FIT, CODES)
    with pytest.raises(MeasurementError, match=r"signs of shape \(40, 3\) for 40 rows"):
        merged.update(FIT, CODES, np.zeros((40, 3), np.uint8))
    with pytest.raises(MeasurementError, match="without random signs have no null"):
        null_from_sums(merged, sums(TEST))


def test_empty_clusters_change_nothing() -> None:
    spread = sums(FIT, CODES * 3, clusters=BUCKETS)
    same(in_sample_from_sums(spread, **DRAWS), in_sample_from_sums(sums(FIT), **DRAWS))


def test_merged_sums_are_those_of_all_rows() -> None:
    merged = sums(FIT[:13], CODES[:13])
    merged.merge(sums(FIT[13:], CODES[13:]))
    whole = sums(FIT)
    for name, value in merged.tensors().items():
        np.testing.assert_allclose(value, whole.tensors()[name], atol=1e-13)
    kept = ClusterSums.from_tensors(merged.tensors())
    kept.update(FIT, CODES)
    assert (kept.n, merged.n) == (2 * N, N)  # a copy


def test_split_halves_grow_to_half_of_the_clusters() -> None:
    points = convergence_from_sums(sums(FIT), draws=10)
    assert [point.n for point in points] == [4, 8, 16, 20]  # 1, 2, 4 and 5 clusters of 4 rows
    constant = convergence_from_sums(sums(np.ones((N, D))), draws=3)
    assert [point.cosine for point in constant] == pytest.approx([1] * 4)
    assert convergence_from_sums(sums(FIT[:4], CODES[:4])) == []


def test_zero_displacements_are_undefined() -> None:
    zero = sums(np.zeros((N, D)))
    assert zero.mean_cosine(np.ones(D)) is None
    assert held_out_from_sums(zero, sums(TEST)) is None
    assert held_out_from_sums(sums(FIT), zero) is None
    assert in_sample_from_sums(zero) is None
    assert strength_from_sums(sums(TEST), zero.mean) is None
    assert (shares_from_sums(zero).plain, zero.share.plain) == (None, None)
    keys = [str(code) for code in CODES]
    nothing, test = signed(np.zeros((N, D)), keys), signed(TEST, keys)
    assert null_from_sums(nothing, test).isnan().all()
    assert null_from_sums(test, nothing).isnan().all()
    assert convergence_from_sums(zero) == []


def test_rows_that_cancel_have_no_in_sample_cosine() -> None:
    half = np.random.default_rng(2).normal(size=(N // 2, D)) * 0.1
    assert in_sample_from_sums(sums(np.concatenate([half, -half]))) is None


def test_one_cluster_has_a_value_and_no_interval() -> None:
    one = sums(FIT, np.zeros(N, dtype=int))
    for found in (
        held_out_from_sums(one, one),
        in_sample_from_sums(one),
        shares_from_sums(one).plain,
        strength_from_sums(one, one.mean),
    ):
        assert found.value is not None
        assert (found.low, found.high) == (None, None)


def test_buckets_are_fixed_and_even() -> None:
    assert bucket_of("tea") == 0xA9F74D1EC36EBDEB % BUCKETS == 43  # from `printf tea | sha256sum`
    counts = np.bincount([bucket_of(str(i)) for i in range(6400)], minlength=BUCKETS)
    assert len(counts) == BUCKETS
    assert counts.min() > 60  # 100 expected, spread 10: four of these


def test_what_cannot_be_added_is_refused() -> None:
    with pytest.raises(MeasurementError, match="2 cluster codes for 3 rows"):
        ClusterSums(D).update(np.ones((3, D)), [0, 1])
    with pytest.raises(MeasurementError, match="the same clusters"):
        ClusterSums(D).merge(ClusterSums(D, 3))
    with pytest.raises(MeasurementError, match="no rows"):
        _ = ClusterSums(D).mean
