"""Numbers as people read them: every expected string is written by hand."""

from __future__ import annotations

import pytest

from dsteer.report.values import (
    at,
    count,
    duration,
    interval,
    memory,
    number,
    percent,
    plain,
    plural,
    ratio,
    short_hash,
    site_order,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.71249, "0.712"),
        (0.9999, "1.00"),
        (12.345, "12.3"),
        (123.45, "123"),
        (-0.0521, "−0.0521"),
        (2312, "2,312"),
        (48213.0, "48,213"),
        (3.1e-7, "3.10\u00a0×\u00a010⁻⁷"),
        (-6.02e23, "−6.02\u00a0×\u00a010²³"),
        (None, "–"),
        (float("nan"), "–"),
        (float("inf"), "–"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert number(value) == text


def test_number_rounds_up_into_the_next_decade() -> None:
    assert number(9.999) == "10.0"
    assert number(99999.7) == "1.00\u00a0×\u00a010⁵"


def test_interval() -> None:
    assert interval({"value": 0.5, "low": 0.25, "high": 0.75}) == "0.500 [0.250, 0.750]"
    assert interval({"value": 0.5, "low": None, "high": None}) == "0.500"
    assert interval(0.5) == "0.500"
    assert interval({"value": None, "low": None, "high": None}) == "–"
    assert interval(None) == "–"
    assert interval(True) == "–"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.706, "70.6 %"), (1.0, "100 %"), (-0.021, "−2.1 %"), (0.00001, "< 0.01 %"), (None, "–")],
)
def test_percent(value: float | None, text: str) -> None:
    assert percent(value) == text.replace(" ", "\u00a0")


def test_words() -> None:
    assert plural(1, "prompt") == "1 prompt"
    assert plural(2312, "prompt") == "2,312 prompts"
    assert count(None) == "–"
    assert plain([]) == "none"
    assert plain(True) == "yes"
    assert plain(["a", 1e-6]) == "a, 1e−06"
    assert duration(7.04) == "7.0 s"
    assert duration(125) == "2 min 05 s"
    assert duration(3720) == "1 h 02 min"
    assert memory(2**30 * 1.5) == "1.50 GiB"
    assert memory(300 * 2**20) == "300 MiB"
    assert short_hash("sha256:" + "ab" * 32) == "sha256:abababababab…"
    assert short_hash("hub:owner/name@main") == "hub:owner/name@main"


def test_ratio_of_nothing_is_undefined() -> None:
    assert ratio(1.0, 0.0) is None
    assert ratio(None, 2.0) is None
    assert ratio(1.0, 4.0) == 0.25


def test_sites_in_order_of_depth() -> None:
    sites = ["final_norm", "resid_post.10", "resid_post.9", "embedding", "resid_post.0"]
    assert site_order(sites) == [
        "resid_post.0",
        "resid_post.9",
        "resid_post.10",
        "embedding",
        "final_norm",
    ]


def test_at_is_tolerant() -> None:
    value = {"a": [{"b": 1}]}
    assert at(value, "a", 0, "b") == 1
    assert at(value, "a", 1, "b") is None
    assert at(value, "a", "b") is None
    assert at(None, "a") is None
