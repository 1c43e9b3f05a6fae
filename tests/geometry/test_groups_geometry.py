"""Ranks of displacements of several groups."""

from __future__ import annotations

import numpy as np
import pytest

from dsteer.geometry.groups import expected_ranks, rank_intervals, ranks


@pytest.mark.parametrize("k", [2, 4, 8])
def test_orthogonal_groups_have_rank_k_and_one_less_when_centred(k: int) -> None:
    found = expected_ranks([{f"axis {g}": 1.0} for g in range(k)], [10] * k)
    # k equal singular values; centring equal orthogonal rows leaves k - 1 equal ones
    assert found.participation == pytest.approx(k)
    assert found.centred_participation == pytest.approx(k - 1)
    assert (found.rank, found.centred_rank) == (k, k - 1)


def test_one_group_with_all_axes_is_one_direction_and_conflicts_share_one() -> None:
    mixed = expected_ranks([{"a": 1.0, "b": 1.0}], [30])
    assert (mixed.participation, mixed.centred_participation) == (pytest.approx(1), 0.0)
    conflict = expected_ranks([{"a": 1.0}, {"a": -1.0}, {"b": 1.0}, {"b": -1.0}], [5] * 4)
    assert conflict.participation == pytest.approx(2)
    assert conflict.centred_participation == pytest.approx(2)


def test_ranks_are_those_of_the_repeated_rows() -> None:
    rng = np.random.default_rng(0)
    rows, sizes = rng.normal(size=(3, 5)), [2, 7, 4]
    repeated = np.repeat(rows, sizes, axis=0)
    for matrix, name in (
        (repeated, "participation"),
        (repeated - repeated.mean(axis=0), "centred_participation"),
    ):
        energy = np.linalg.svd(matrix, compute_uv=False) ** 2
        expected = energy.sum() ** 2 / (energy**2).sum()
        assert getattr(ranks(rows, sizes), name) == pytest.approx(expected, rel=1e-10)


def test_zero_groups_have_no_participation() -> None:
    assert ranks(np.zeros((2, 3)), [4, 4]).participation is None


def test_the_jackknife_covers_planted_means_and_leaves_out_whole_conversations() -> None:
    rng = np.random.default_rng(1)
    truth = np.eye(3, 12) * 4
    deltas = [row + rng.normal(size=(40, 12)) for row in truth]
    keys = [[f"{g}/{row // 2}" for row in range(40)] for g in range(3)]
    plain, centred = rank_intervals(deltas, keys)
    assert plain is not None
    assert centred is not None
    assert plain.low is not None
    assert plain.high is not None
    assert plain.low < 3
    assert 2.8 < plain.value < 3.1
    assert 1.8 < centred.value < 2.05
    again, _ = rank_intervals(deltas, [[str(n) for n in range(40)]] * 3)
    assert again is not None
    assert again.value == pytest.approx(plain.value)
    assert again.low != plain.low


def test_a_group_of_one_conversation_has_no_ends() -> None:
    rng = np.random.default_rng(2)
    deltas = [np.eye(2, 6)[g] * 3 + rng.normal(size=(8, 6)) for g in range(2)]
    several, lone = [str(n) for n in range(8)], ["only"] * 8
    for found in rank_intervals(deltas, [several, lone]):
        assert found is not None
        assert (found.low, found.high) == (None, None)
