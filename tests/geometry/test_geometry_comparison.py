"""Several vectors beside each other: against numpy and scipy, by hand, and on known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from dsteer.errors import MeasurementError
from dsteer.geometry.comparison import (
    Halves,
    all_but_one,
    cosine_matrix,
    direction_set,
    noise_floor,
    principal_angles,
    random_angles,
    random_cosine,
    random_shared,
    shared_subspace,
    top_directions,
)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def tensors(rows: np.ndarray) -> list[torch.Tensor]:
    return [torch.from_numpy(row) for row in rows]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


# ---------------------------------------------------------------------------------- vectors


def test_cosine_matrix_against_numpy() -> None:
    rows = normal(1, 5, 12)
    expected = [[cosine(a, b) for b in rows] for a in rows]
    # a dozen products in float64
    np.testing.assert_allclose(cosine_matrix(tensors(rows)).numpy(), expected, atol=1e-14)


def test_a_zero_vector_has_no_cosine() -> None:
    found = cosine_matrix(tensors(np.array([[3.0, 4.0], [0.0, 0.0], [4.0, -3.0]]))).numpy()
    assert np.isnan(found[1]).all()
    assert np.isnan(found[:, 1]).all()
    assert abs(found[0, 2]) < 1e-15
    assert found[0, 0] == found[2, 2] == 1


def test_direction_set_by_hand() -> None:
    # unit vectors e₁, e₁ and e₂, in other lengths: Gram matrix with eigenvalues 2 and 1
    found = direction_set(tensors(np.array([[5.0, 0, 0], [0.1, 0, 0], [0, -2.0, 0], [0, 0, 0]])))
    assert found is not None
    np.testing.assert_allclose(found.singular_values.numpy()[:2], [math.sqrt(2), 1], atol=1e-15)
    assert found.share == pytest.approx(2 / 3)
    assert found.sigma_ratio == pytest.approx(1 / math.sqrt(2))
    np.testing.assert_allclose(found.direction.numpy(), [1, 0, 0], atol=1e-15)
    rows = normal(2, 4, 9)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    found = direction_set(tensors(rows))
    assert found is not None
    expected = np.linalg.svd(unit, compute_uv=False)
    np.testing.assert_allclose(found.singular_values.numpy(), expected, atol=1e-14)
    assert direction_set(tensors(np.array([[1.0, 2.0], [0.0, 0.0]]))) is None


def test_random_cosine_is_the_quantile_of_random_directions() -> None:
    draws = np.abs([cosine(*pair) for pair in normal(3, 20000, 2, 20)])
    # 20,000 draws know a 95 % quantile of about 0.43 to 0.005
    assert random_cosine(20) == pytest.approx(np.quantile(draws, 0.95), abs=0.01)
    assert random_cosine(2) == pytest.approx(math.cos(math.radians(4.5)))  # 5 % of the angles
    with pytest.raises(MeasurementError, match="width 1"):
        random_cosine(1)


def test_vectors_that_do_not_compare() -> None:
    with pytest.raises(MeasurementError, match="widths 3, 2"):
        cosine_matrix([torch.ones(3), torch.ones(2)])
    with pytest.raises(MeasurementError, match="no vectors"):
        direction_set([])


# ---------------------------------------------------------------------------------- reliability


def naive(a: Halves, b: Halves, sums_a: np.ndarray, sums_b: np.ndarray) -> list[float]:
    """r_a, r_b, cross, disattenuated: draw by draw, from plain sums."""
    own_a, own_b, cross = [], [], []
    for first in a.first:
        a1, a2 = sums_a[first].sum(0), sums_a[~first].sum(0)
        b1, b2 = sums_b[first].sum(0), sums_b[~first].sum(0)
        own_a.append(cosine(a1, a2))
        own_b.append(cosine(b1, b2))
        cross += [cosine(a1, b2), cosine(a2, b1)]
    r_a, r_b, c = np.mean(own_a), np.mean(own_b), np.mean(cross)
    return [r_a, r_b, c, c / math.sqrt(r_a * r_b)]


def test_reliability_and_agreement_against_plain_loops() -> None:
    keys = [i // 2 for i in range(22)]  # conversations of two rows
    shared = normal(5, 7)
    rows_a, rows_b = shared + normal(6, 22, 7), shared + normal(7, 22, 7)
    a, b = (Halves.of(rows, keys, draws=9, seed=3) for rows in (rows_a, rows_b))
    sums_a, sums_b = (rows.reshape(11, 2, 7).sum(1) for rows in (rows_a, rows_b))
    assert (a.first.sum(1) == 5).all()  # halves of 11 conversations: 5 and 6
    r_a, _, cross, corrected = naive(a, b, sums_a, sums_b)
    reliability, agreement = a.reliability(), a.agreement(b)
    assert reliability.half is not None
    assert reliability.full is not None
    assert agreement.cosine is not None
    assert agreement.cross is not None
    assert agreement.disattenuated is not None
    assert agreement.undefined is None
    assert reliability.half.value == pytest.approx(r_a, abs=1e-14)
    assert reliability.full.value == pytest.approx(2 * r_a / (1 + r_a), abs=1e-14)
    assert agreement.cosine.value == pytest.approx(cosine(rows_a.sum(0), rows_b.sum(0)), abs=1e-14)
    assert agreement.cross.value == pytest.approx(cross, abs=1e-14)
    assert agreement.disattenuated.value == pytest.approx(corrected, abs=1e-13)
    assert agreement.disattenuated.n == 22

    # the jackknife: leave each conversation out for real, the others in their halves
    left: dict[str, list[float]] = {"half": [], "full": [], "cosine": [], "disattenuated": []}
    for c in range(11):
        kept = np.arange(11) != c
        first = a.first[:, kept]
        without = [Halves(s[kept], first, 20) for s in (sums_a, sums_b)]
        r, _, _, ratio = naive(*without, sums_a[kept], sums_b[kept])
        left["half"].append(r)
        left["full"].append(2 * r / (1 + r))
        left["cosine"].append(cosine(sums_a[kept].sum(0), sums_b[kept].sum(0)))
        left["disattenuated"].append(ratio)
    for name, interval in (
        ("half", reliability.half),
        ("full", reliability.full),
        ("cosine", agreement.cosine),
        ("disattenuated", agreement.disattenuated),
    ):
        values = np.array(left[name])
        half = 2.228139 * math.sqrt(10 / 11 * ((values - values.mean()) ** 2).sum())  # t, 10 df
        assert interval.low == pytest.approx(interval.value - half, rel=1e-6)


def test_disattenuation_finds_the_true_cosine_that_noise_lowers() -> None:
    """Two directions of cosine 0.8 under noise that halves the raw cosine, 40 times over."""
    n, d, truth = 60, 200, 0.8
    u = np.eye(d)[0]
    w = truth * u + math.sqrt(1 - truth**2) * np.eye(d)[1]
    raw, corrected, covered = [], [], 0
    for seed in range(40):
        rows_a, rows_b = u + 0.6 * normal(2 * seed, n, d), w + 0.6 * normal(2 * seed + 1, n, d)
        a, b = (Halves.of(rows, draws=30, seed=0) for rows in (rows_a, rows_b))
        found = a.agreement(b)
        assert found.cosine is not None
        assert found.disattenuated is not None
        raw.append(found.cosine.value)
        corrected.append(found.disattenuated.value)
        covered += found.disattenuated.low <= truth <= found.disattenuated.high  # type: ignore[operator]
    # ‖v‖² = 1 and σ² = 0.36 · 200/60 = 1.2 give reliabilities of 1/2.2, so a raw cosine of 0.36
    assert np.mean(raw) == pytest.approx(truth / 2.2, abs=0.02)
    # its spread over the draws is about 0.11, so the mean of 40 is known to about 0.02
    assert np.mean(corrected) == pytest.approx(truth, abs=0.06)
    assert max(corrected) > 1 > min(corrected) > 0.4  # told as it is
    assert covered >= 36  # 95 % asked for; the jackknife errs on the wide side (200 of 200 here)


def test_errors_in_common_do_not_pass_for_agreement() -> None:
    """The same noise in both: raw cosine far above the true 0; across halves it is not there."""
    d = 100
    noise = normal(8, 80, d)
    a = Halves.of(np.eye(d)[0] + 0.7 * noise, draws=60)
    b = Halves.of(np.eye(d)[1] + 0.7 * noise, draws=60)
    found = a.agreement(b)
    assert found.cosine is not None
    assert found.disattenuated is not None
    assert found.cosine.value > 0.3
    # one draw's standard error: the noise's own inner products, about 0.6/√100 a half
    assert abs(found.disattenuated.value) < 0.15
    assert found.disattenuated.low < 0 < found.disattenuated.high  # type: ignore[operator]


def test_one_v_with_itself_and_its_negative() -> None:
    rows = normal(9, 5) + normal(10, 40, 5)
    a, b = Halves.of(rows, draws=20), Halves.of(-3 * rows, draws=20)
    same, opposite = a.agreement(a), a.agreement(b)
    assert same.cosine is not None
    assert same.disattenuated is not None
    assert opposite.cosine is not None
    assert opposite.disattenuated is not None
    assert same.cosine.value == pytest.approx(1, abs=1e-12)
    # cross-halves of one v with itself are its own halves
    assert same.disattenuated.value == pytest.approx(1, abs=1e-12)
    assert opposite.cosine.value == pytest.approx(-1, abs=1e-12)
    assert opposite.disattenuated.value == pytest.approx(-1, abs=1e-12)


def test_constant_displacements_are_wholly_reliable() -> None:
    found = Halves.of(np.tile(normal(11, 6), (30, 1)), draws=10).reliability()
    for interval in (found.half, found.full):
        assert interval is not None
        assert interval.value == pytest.approx(1, abs=1e-12)
        assert interval.low == pytest.approx(1, abs=1e-12)
    assert found.spread == pytest.approx((1, 1))


def test_undefined_reliabilities_are_said() -> None:
    rows = normal(12, 30, 4)
    good = Halves.of(rows + 3, draws=10)
    zero = Halves.of(np.zeros((30, 4)), draws=10)
    assert zero.reliability().half is None
    assert zero.reliability().full is None
    found = good.agreement(zero)
    assert (found.cosine, found.disattenuated) == (None, None)
    assert found.undefined == "a vector is zero"
    # rows that cancel: halves always point opposite ways
    opposite = Halves.of(np.concatenate([np.tile(rows[0], (15, 1)), np.tile(-rows[0], (15, 1))]))
    assert opposite.reliability().full is None
    # two conversations that contradict each other: r = −1
    contrary = Halves.of(np.stack([rows[0], -0.5 * rows[0]]), draws=10)
    reliability = contrary.reliability()
    assert reliability.half is not None
    assert reliability.half.value == pytest.approx(-1)
    assert reliability.full is None
    two = Halves.of(rows[:2] + 3, draws=10)
    unreliable = two.agreement(contrary)
    assert unreliable.cosine is not None
    assert unreliable.disattenuated is None
    assert unreliable.undefined is not None
    assert "not positive (-1)" in unreliable.undefined
    alone = Halves.of(rows, ["one"] * 30)
    assert alone.reliability().half is None
    assert alone.agreement(alone).undefined == "one conversation can't be halved"


def test_halves_of_other_conversations_are_refused() -> None:
    rows = normal(13, 12, 4)
    a = Halves.of(rows, seed=0)
    for other in (Halves.of(rows, seed=1), Halves.of(rows[:10]), Halves.of(rows[:, :3])):
        with pytest.raises(MeasurementError, match="expected the same conversations"):
            a.agreement(other)


def test_sums_over_groups_give_the_same_v() -> None:
    rows = normal(14, 40, 6) + 1
    by_row = Halves.of(rows, [i // 4 for i in range(40)], draws=15, seed=2)
    by_sum = Halves.of_sums(rows.reshape(10, 4, 6).sum(1), 40, draws=15, seed=2)
    np.testing.assert_allclose(by_row.sums, by_sum.sums, atol=1e-14)  # another order of sums
    one, other = by_row.reliability().full, by_sum.reliability().full
    assert one is not None
    assert other is not None
    assert one.json() == pytest.approx(other.json())


# ---------------------------------------------------------------------------------- subspaces


@pytest.mark.parametrize(("n", "d"), [(8, 20), (40, 10)])
@pytest.mark.parametrize("centred", [False, True])
def test_top_directions_are_the_right_singular_vectors(n: int, d: int, centred: bool) -> None:
    rows = normal(15, n, d) + 2
    found = top_directions(rows, 3, centred=centred)
    assert found is not None
    expected = np.linalg.svd(rows - centred * rows.mean(0))[2][:3]
    # signs are free: compare the projectors
    np.testing.assert_allclose(found.numpy().T @ found.numpy(), expected.T @ expected, atol=1e-11)


def test_top_directions_end_where_noise_begins() -> None:
    planted = np.outer(np.ones(50), 3 * np.eye(12)[0])
    assert len(top_directions(planted, 5)) == 1  # type: ignore[arg-type]
    assert top_directions(planted, 5, centred=True) is None
    assert top_directions(np.zeros((4, 12)), 2) is None
    noise = normal(16, 400, 12) / math.sqrt(12)  # rows of root mean square norm 1
    largest = np.linalg.svd(noise, compute_uv=False)[0]
    # the law's edge holds to about 1/N^(2/3) here
    assert noise_floor(1.0, 400, 12) == pytest.approx(largest, rel=0.05)
    found = top_directions(np.tile(planted[0], (400, 1)) + 1e-3 * noise, 5,
                           floor=1.2 * noise_floor(1e-3, 400, 12))  # fmt: skip
    assert found is not None
    assert len(found) == 1
    with pytest.raises(MeasurementError, match="0 directions"):
        top_directions(planted, 0)


def test_principal_angles_by_hand_and_against_scipy() -> None:
    e = np.eye(6)
    turned = np.stack(
        [
            math.cos(math.radians(30)) * e[0] + math.sin(math.radians(30)) * e[3],
            math.cos(math.radians(70)) * e[1] + math.sin(math.radians(70)) * e[4],
            e[5],
        ]
    )
    found = principal_angles(torch.from_numpy(e[:3]), torch.from_numpy(turned))
    np.testing.assert_allclose(found.numpy(), [30, 70, 90], atol=1e-12)
    tiny = np.stack([math.cos(1e-9) * e[0] + math.sin(1e-9) * e[1]])
    small = principal_angles(torch.from_numpy(e[:1]), torch.from_numpy(tiny))
    assert small.item() == pytest.approx(math.degrees(1e-9), rel=1e-6)  # arccos alone would lose it
    a, b = np.linalg.qr(normal(17, 9, 4))[0].T, np.linalg.qr(normal(18, 9, 2))[0].T
    found = principal_angles(torch.from_numpy(a), torch.from_numpy(b))
    cosines = np.linalg.svd(a @ b.T, compute_uv=False)
    np.testing.assert_allclose(found.numpy(), np.degrees(np.arccos(cosines)), atol=1e-6)
    np.testing.assert_allclose(
        found.numpy()[::-1], np.degrees(scipy.linalg.subspace_angles(a.T, b.T)), atol=1e-12
    )
    with pytest.raises(MeasurementError, match="in 9 and 6 dimensions"):
        principal_angles(torch.from_numpy(a), torch.from_numpy(e[:2]))


def test_null_of_the_angles_is_that_of_two_random_subspaces() -> None:
    d, r, s, draws = 20, 3, 2, 400
    null = random_angles(d, r, s, draws=draws, seed=1)
    assert null.shape == (draws, s)
    both = np.stack(
        [
            np.degrees(
                np.arccos(
                    np.linalg.svd(
                        np.linalg.qr(normal(i, d, r))[0].T
                        @ np.linalg.qr(normal(draws + i, d, s))[0],
                        compute_uv=False,
                    )
                )
            )
            for i in range(draws)
        ]
    )
    # angles spread by about 8°, so two means of 400 differ by 0.6° (1σ)
    np.testing.assert_allclose(null.numpy().mean(0), both.mean(0), atol=2)
    assert torch.equal(null, random_angles(d, r, s, draws=draws, seed=1))
    # in a plane two planes are the same
    np.testing.assert_allclose(random_angles(2, 2, 2, draws=3).numpy(), 0, atol=1e-5)
    with pytest.raises(MeasurementError, match="subspaces of 3, 1 dimensions in 2"):
        random_angles(2, 3, 1)


def test_shared_subspace_by_hand_and_against_the_projector() -> None:
    e = torch.eye(5, dtype=torch.float64)
    found = shared_subspace([e[[0, 1]], e[[0, 2]], e[[0, 2]]])
    np.testing.assert_allclose(found.eigenvalues.numpy()[:3], [1, 2 / 3, 1 / 3], atol=1e-15)
    np.testing.assert_allclose(found.eigenvalues.numpy()[3:], 0, atol=1e-15)
    assert abs(found.directions[0, 0].item()) == pytest.approx(1)
    assert abs(found.directions[1, 2].item()) == pytest.approx(1)
    bases = [np.linalg.qr(normal(20 + i, 11, 3))[0].T for i in range(3)]
    projector = np.mean([basis.T @ basis for basis in bases], axis=0)
    found = shared_subspace([torch.from_numpy(basis) for basis in bases])
    expected = np.linalg.eigvalsh(projector)[::-1][:9]
    np.testing.assert_allclose(found.eigenvalues.numpy(), expected, atol=1e-14)
    turned = projector @ found.directions.numpy().T
    np.testing.assert_allclose(turned, found.directions.numpy().T * expected, atol=1e-13)
    with pytest.raises(MeasurementError, match="no subspaces"):
        shared_subspace([])
    with pytest.raises(MeasurementError, match="different widths"):
        shared_subspace([e[:1], torch.ones(1, 3, dtype=torch.float64)])


def test_null_of_the_shared_subspace() -> None:
    null = random_shared(30, (2, 3, 3), draws=50, seed=4)
    assert null.shape == (50, 8)
    # a projector's trace is its dimension
    np.testing.assert_allclose(null.sum(1).numpy(), 8 / 3, atol=1e-12)
    assert (null[:, 0] > 1 / 3).all()
    assert (null[:, 0] < 1).all()
    with pytest.raises(MeasurementError, match="no dimensions"):
        random_shared(4, ())


def test_what_all_but_one_share_is_not_shared_by_all() -> None:
    """Twice one subspace of 3 dimensions in 40, and a third at known angles to it."""
    generator = np.random.default_rng(5)
    basis = np.linalg.qr(generator.normal(size=(40, 6)))[0].T
    theta = np.deg2rad([20.0, 75.0, 85.0])
    own, other = basis[:3], basis[3:]
    third = np.cos(theta)[:, None] * own + np.sin(theta)[:, None] * other
    found = shared_subspace([torch.from_numpy(rows) for rows in (own, own, third)]).eigenvalues[:3]
    by_hand = all_but_one(3, torch.tensor([20.0, 75.0, 85.0]))
    assert torch.allclose(found, by_hand, atol=1e-12)
    assert all_but_one(2, torch.tensor([60.0])).item() == pytest.approx(0.75)
    assert all_but_one(4, torch.tensor([90.0])).item() == pytest.approx(3 / 4)
    bound = all_but_one(3, random_angles(40, 3, 3, seed=1)[:, 0]).quantile(0.95)
    assert (found > bound).tolist() == [True, False, False], "one lies nearer than chance"
