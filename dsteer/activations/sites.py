"""Where states are read: sites in the model, positions in the sequence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import get_args

from dsteer.config import Position
from dsteer.data.tokens import Encoded
from dsteer.errors import ConfigError, DataError, did_you_mean

FINAL_NORM = "final_norm"
"""The state after the last norm, which the unembedding reads."""

POSITIONS: tuple[str, ...] = (*get_args(Position), "response_predictors")
"""The positions of a pipeline, and those whose final_norm states predict each answer token."""

MEANS = frozenset({"prompt_mean", "response_mean"})
RESPONSES = frozenset({"response_last", "response_mean", "response_predictors"})

_BLOCK = re.compile(r"resid_post\.(0|[1-9]\d*)")


def resid_post(block: int) -> str:
    """The site that holds the raw output of a block, counted from 0."""
    return f"resid_post.{block}"


def all_sites(n_blocks: int) -> tuple[str, ...]:
    """Every site of a model of L blocks: resid_post.0 … resid_post.{L-1}, final_norm."""
    return (*(resid_post(block) for block in range(n_blocks)), FINAL_NORM)


def block_of(site: str) -> int | None:
    """The block whose output a site is; None for final_norm.

    Raises:
        ConfigError: the name is no site.
    """
    if site == FINAL_NORM:
        return None
    match = _BLOCK.fullmatch(site)
    if match is None:
        raise ConfigError(
            f"site {site!r}: no such site; expected resid_post.K (K from 0) or final_norm"
        )
    return int(match[1])


def resolve_sites(sites: str | Sequence[str], n_blocks: int) -> tuple[str, ...]:
    """Turn ``all``, one name or several into sites of a model, in the model's order, each once.

    Raises:
        ConfigError: a name is no site of a model of ``n_blocks`` blocks, or none is given.
    """
    known = all_sites(n_blocks)
    if sites == "all":
        return known
    wanted = {sites} if isinstance(sites, str) else set(sites)
    if not wanted:
        raise ConfigError("sites is empty; expected 'all' or at least one site")
    for site in sorted(wanted - set(known)):
        block = block_of(site)
        raise ConfigError(
            f"site {site!r}: the model has {n_blocks} blocks, so the last is "
            f"{resid_post(n_blocks - 1)!r} (got block {block})"
        )
    return tuple(site for site in known if site in wanted)


def token_ranges(encoded: Sequence[Encoded], position: str) -> list[range]:
    """The tokens of each prompt whose states a position reads (or averages, for the means).

    With p prompt tokens and n in all: ``prompt_last`` reads token p − 1, ``prompt_mean`` averages
    0 … p − 1 (BOS included), ``response_last`` reads n − 1, ``response_mean`` averages p … n − 1,
    ``all`` reads 0 … n − 1, ``response_predictors`` reads p − 1 … n − 2.

    Raises:
        ConfigError: there is no such position.
        DataError: the position lies in an answer, and a prompt has none.
    """
    if position not in POSITIONS:
        raise ConfigError(
            f"position {position!r}: no such position{did_you_mean(position, POSITIONS)}"
        )
    found = []
    for number, item in enumerate(encoded):
        p, n = item.prompt_length, len(item.ids)
        if position in RESPONSES and n == p:
            raise DataError(
                f"prompt {number} has no answer, and position {position!r} lies in it; give pairs "
                "with answers, or a position in the prompt"
            )
        found.append(
            {
                "prompt_last": range(p - 1, p),
                "prompt_mean": range(p),
                "response_last": range(n - 1, n),
                "response_mean": range(p, n),
                "all": range(n),
                "response_predictors": range(p - 1, n - 1),
            }[position]
        )
    return found
