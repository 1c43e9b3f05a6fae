"""Names of sites and positions."""

from __future__ import annotations

import pytest

from dsteer.activations.sites import all_sites, block_of, resolve_sites, token_ranges
from dsteer.data.tokens import Encoded
from dsteer.errors import ConfigError, DataError


def test_sites_of_a_model() -> None:
    assert all_sites(2) == ("resid_post.0", "resid_post.1", "final_norm")
    assert [block_of(site) for site in all_sites(2)] == [0, 1, None]
    assert resolve_sites("all", 2) == all_sites(2)
    assert resolve_sites(["final_norm", "resid_post.1", "final_norm"], 2) == (
        "resid_post.1",
        "final_norm",
    )
    assert resolve_sites("resid_post.0", 2) == ("resid_post.0",)
    assert resolve_sites("all", 1, encoder=True) == ("encoder", "resid_post.0", "final_norm")
    assert block_of("encoder") is None


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (["resid_post.2"], "'resid_post.2': the model has 2 blocks.*'resid_post.1'"),
        (["layer.1"], "'layer.1': no such site; expected resid_post.K"),
        (["resid_post.-1"], "no such site"),
        (["resid_post.01"], "no such site"),
        ([], "sites is empty"),
        (["encoder"], "'encoder': the model is decoder-only and has no encoder"),
    ],
)
def test_unknown_sites_are_refused(sites, message) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_sites(sites, 2)


@pytest.mark.parametrize(
    ("position", "tokens"),
    [  # 3 prompt tokens 0 1 2, then 2 answer tokens 3 4
        ("prompt_last", [2]),
        ("prompt_mean", [0, 1, 2]),
        ("response_last", [4]),
        ("response_mean", [3, 4]),
        ("all", [0, 1, 2, 3, 4]),
        ("response_predictors", [2, 3]),  # token 2 predicts token 3, and 3 predicts 4
        ("context_last", [4]),
    ],
)
def test_positions(position, tokens) -> None:
    assert [list(r) for r in token_ranges([Encoded((9, 8, 7, 6, 5), 3)], position)] == [tokens]


def test_all_tokens_of_each_stack() -> None:
    row = [Encoded((9, 8, 7, 6, 5), 3)]
    assert [list(r) for r in token_ranges(row, "all", "encoder")] == [[0, 1, 2]]
    # token 2 stands for the decoder's start
    assert [list(r) for r in token_ranges(row, "all", "decoder")] == [[2, 3, 4]]


def test_bad_positions_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"'prompt_lst': no such position; did you mean 'prompt_last'"
    ):
        token_ranges([Encoded((1,), 1)], "prompt_lst")
    with pytest.raises(DataError, match="prompt 1 has no answer"):
        token_ranges([Encoded((1, 2), 1), Encoded((1,), 1)], "response_last")
