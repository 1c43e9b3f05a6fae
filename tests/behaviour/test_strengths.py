"""The live range of made-up models that collapse where we say, and grids that span it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsteer.behaviour.strengths import LiveRange, grid, live_range


def collapsing(
    low: float | None, high: float | None, share: float = 0.0
) -> Callable[[Sequence[float]], list[float]]:
    """Degenerate from ``low`` down and from ``high`` up; between them a share of the outputs is."""

    def degenerate(strengths: Sequence[float]) -> list[float]:
        assert strengths, "asked for nothing"
        return [
            1.0 if (low is not None and s <= low) or (high is not None and s >= high) else share
            for s in strengths
        ]

    return degenerate


@pytest.mark.parametrize("low", [None, -0.06, -0.7, -3.0, -20.0, -64.0])
@pytest.mark.parametrize("high", [None, 0.2, 1.0, 5.5, 40.0])
def test_the_collapse_is_found_within_the_bisections(low: float | None, high: float | None) -> None:
    live = live_range(collapsing(low, high), 64.0)
    assert live.threshold == 0.5
    for true, found in ((low, live.low), (high, live.high)):
        if true is None:
            assert found is None
            continue
        # a bracket from x to 2x (from 0 to 0.25) is halved three times
        width = max(0.25, abs(true)) / 8
        assert found is not None
        assert abs(true) <= abs(found) <= abs(true) + width
    strengths = [strength for strength, _ in live.probes]
    assert strengths == sorted(set(strengths))
    assert 0 in strengths
    shares = collapsing(low, high)(strengths)
    assert [share for _, share in live.probes] == shares


def test_beyond_the_limit_nothing_is_tried() -> None:
    for limit in (0.1, 0.25, 3.0, 64.0):
        live = live_range(collapsing(-100, 100), limit)
        assert (live.low, live.high) == (None, None)
        assert max(abs(strength) for strength, _ in live.probes) == limit


def test_outputs_that_are_degenerate_without_steering_do_not_count() -> None:
    live = live_range(collapsing(-2.0, 4.0, share=0.6), 64.0)
    assert live.threshold == pytest.approx(0.8)
    assert live.low == pytest.approx(-2.0)
    assert live.high == pytest.approx(4.0)
    slow = live_range(lambda strengths: [0.4 + 0.1 * abs(s) for s in strengths], 8.0)
    assert slow.threshold == pytest.approx(0.7)
    assert slow.high == pytest.approx(3.0)
    assert slow.low == pytest.approx(-3.0)


def test_where_all_is_degenerate_nothing_is_left_to_collapse() -> None:
    live = live_range(collapsing(None, None, share=1.0), 64.0)
    assert (live.low, live.high) == (None, None)


def test_the_first_collapse_counts() -> None:
    live = live_range(lambda strengths: [float(2 <= abs(s) < 16) for s in strengths], 64.0)
    assert (live.low, live.high) == (-2.0, 2.0)


def made(low: float | None, high: float | None) -> LiveRange:
    return LiveRange(low, high, ((0.0, 0.0),), 0.5)


def check(strengths: Sequence[float], live: LiveRange, points: int, limit: float) -> None:
    assert len(strengths) == points
    assert all(a < b for a, b in pairwise(strengths))
    assert 0.0 in strengths
    for sign, collapse in ((-1, live.low), (1, live.high)):
        side = sorted(sign * s for s in strengths if sign * s > 0)
        assert len(side) >= 3
        end = limit if collapse is None else abs(collapse)
        inside = side if collapse is None else side[:-1]
        # the live range is spanned: from a quarter of it (at most 1) to its end, two digits
        assert inside[0] <= max(1.0 if end > 1 else 0.0, end / 4) * 1.05
        assert inside[-1] == pytest.approx(end, rel=0.05)
        if collapse is not None:  # one step past, and no more than one
            assert 1.1 * end < side[-1]
            assert side[-1] >= 1.0
            assert inside[-1] <= end * 1.05
        if end > 1.05:
            assert 1.0 in side


@given(
    low=st.none() | st.floats(1 / 32, 64).map(lambda x: -x),
    high=st.none() | st.floats(1 / 32, 64),
    points=st.integers(9, 60),
    limit=st.sampled_from([64.0, 100.0, 1000.0]),
)
@settings(max_examples=400, deadline=None)
def test_a_grid_spans_the_live_range(
    low: float | None, high: float | None, points: int, limit: float
) -> None:
    live = made(low, high)
    check(grid(live, points, limit), live, points, limit)


@given(
    limit=st.floats(0.05, 1000),
    points=st.integers(9, 40),
    share=st.sampled_from([0.0, 0.3, 0.9]),
    where=st.tuples(st.floats(0.01, 2000), st.floats(0.01, 2000)),
)
@settings(max_examples=200, deadline=None)
def test_from_a_model_to_a_grid(
    limit: float, points: int, share: float, where: tuple[float, float]
) -> None:
    live = live_range(collapsing(-where[0], where[1], share), limit)
    assert max(abs(strength) for strength, _ in live.probes) <= limit
    check(grid(live, points, limit), live, points, limit)


def test_grids_by_hand() -> None:
    assert grid(made(-4.0, 8.0), 13, 64.0) == (
        -11.0, -4.0, -1.0, -0.5, 0.0, 0.5, 0.79, 1.0, 2.0, 3.2, 5.0, 8.0, 13.0
    )  # fmt: skip
    assert grid(made(None, None), 9, 4.0) == (-4.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.4, 2.4, 4.0)
    # in two digits some would be the same
    close = grid(made(None, 0.04), 60, 64.0)
    assert len(set(close)) == 60
    assert close[-2] == pytest.approx(0.04)
