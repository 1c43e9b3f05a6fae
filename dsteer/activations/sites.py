"""Where states are read: sites in the model, positions in the sequence."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Literal, get_args

from dsteer.config import Position
from dsteer.data.tokens import Encoded
from dsteer.errors import ConfigError, DataError, did_you_mean

FINAL_NORM = "final_norm"
"""The state after the last norm, which the unembedding reads."""

ENCODER = "encoder"
"""The last state of an encoder-decoder model's encoder, which cross-attention reads."""

Stack = Literal["encoder", "decoder"]
"""The part of an encoder-decoder model whose tokens the position ``all`` means."""

POSITIONS: tuple[str, ...] = (*get_args(Position), "response_predictors", "context_last")
"""The positions of a pipeline, those whose final_norm states predict each answer token, and the
last token, of prompt or answer."""

MEANS = frozenset({"prompt_mean", "response_mean"})
RESPONSES = frozenset({"response_last", "response_mean", "response_predictors"})

ATTENTION, MLP = "attn_out", "mlp_out"
COMPONENTS = (ATTENTION, MLP)
"""What the attention and the MLP of a block return, before a norm that may follow them there and
before they are added to the residual stream."""

_BLOCK = re.compile(r"(resid_post|attn_out|mlp_out)\.(0|[1-9]\d*)")


def resid_post(block: int) -> str:
    """The site that holds the raw output of a block, counted from 0."""
    return f"resid_post.{block}"


def all_sites(n_blocks: int, *, encoder: bool = False) -> tuple[str, ...]:
    """The sites of the residual stream of L blocks: resid_post.0 … resid_post.{L-1}, final_norm.

    Where the model has an encoder, it comes first.
    """
    blocks = (resid_post(block) for block in range(n_blocks))
    return (*((ENCODER,) if encoder else ()), *blocks, FINAL_NORM)


def block_of(site: str) -> int | None:
    """The block whose output a site is, or in which it lies; None for final_norm and encoder.

    Raises:
        ConfigError: the name is no site.
    """
    if site in {FINAL_NORM, ENCODER}:
        return None
    match = _BLOCK.fullmatch(site)
    if match is None:
        raise ConfigError(
            f"site {site!r}: no such site; expected resid_post.K, attn_out.K, mlp_out.K (K from "
            "0), final_norm or, of an encoder-decoder model, encoder"
        )
    return int(match[2])


def component_of(site: str) -> str | None:
    """``attn_out`` or ``mlp_out`` of a site inside a block; None of the residual stream's."""
    kind = site.partition(".")[0]
    return kind if kind in COMPONENTS else None


def site_order(site: str) -> tuple[bool, int, int]:
    """The key that sorts sites as a pass reaches them."""
    if site == ENCODER:
        return (False, -1, 0)
    block, kinds = block_of(site), (*COMPONENTS, "resid_post")
    return (True, 0, 0) if block is None else (False, block, kinds.index(site.partition(".")[0]))


def resolve_sites(
    sites: str | Sequence[str], n_blocks: int, *, encoder: bool = False
) -> tuple[str, ...]:
    """Turn ``all``, one name or several into sites of a model, in the model's order, each once.

    ``all`` is the residual stream. ``resid_post``, ``attn_out`` and ``mlp_out`` are those sites of
    every block.

    Raises:
        ConfigError: a name is no site of a model of ``n_blocks`` blocks, with an encoder or
            without, or none is given.
    """
    if sites == "all":
        return all_sites(n_blocks, encoder=encoder)
    kinds = {kind: [f"{kind}.{k}" for k in range(n_blocks)] for kind in ("resid_post", *COMPONENTS)}
    named = [sites] if isinstance(sites, str) else list(sites)
    wanted = {site for name in named for site in kinds.get(name, [name])}
    if not wanted:
        raise ConfigError("sites is empty; expected 'all' or at least one site")
    known = {*all_sites(n_blocks, encoder=encoder), *itertools.chain(*kinds.values())}
    for site in sorted(wanted - known):
        block = block_of(site)
        if site == ENCODER:
            raise ConfigError(
                f"site {site!r}: the model is decoder-only and has no encoder; expected "
                "resid_post.K or final_norm"
            )
        raise ConfigError(
            f"site {site!r}: the model has {n_blocks} blocks, so the last is "
            f"{resid_post(n_blocks - 1)!r} (got block {block})"
        )
    return tuple(sorted(wanted, key=site_order))


def sites_of_stacks(
    sites: tuple[str, ...], position: str, *, named: bool
) -> tuple[tuple[str, ...], Stack | None]:
    """The sites of an encoder-decoder model that have a position, and whose tokens ``all`` means.

    The encoder has the prompt's tokens alone, the decoder its start and the answer's.
    ``prompt_last`` is the last token of the one and the first position of the other.

    Args:
        sites: of the model.
        position: what is read.
        named: whether the sites were named one by one; else the encoder goes where it has no such
            tokens.

    Raises:
        ConfigError: a named site, or any site of the decoder, does not have the position.
    """
    decoder = tuple(site for site in sites if site != ENCODER)
    if position == "prompt_last":
        return sites, None
    if position == "prompt_mean":
        if decoder:
            raise ConfigError(
                f"position 'prompt_mean' at site {decoder[0]!r}: the decoder of an encoder-decoder "
                "model reads no prompt; set sites to encoder alone, or the position to prompt_last"
            )
        return sites, None
    if position == "all" and not decoder:
        return sites, "encoder"
    if ENCODER in sites and named:
        raise ConfigError(
            f"position {position!r} at site 'encoder': the encoder reads the prompt alone, and the "
            "decoder's rows are other tokens; name the decoder's sites, or set the position to "
            "prompt_last"
        )
    return decoder, "decoder" if position == "all" else None


def token_ranges(
    encoded: Sequence[Encoded], position: str, stack: Stack | None = None
) -> list[range]:
    """The tokens of each prompt whose states a position reads (or averages, for the means).

    With p prompt tokens and n in all: ``prompt_last`` reads token p − 1, ``prompt_mean`` averages
    0 … p − 1 (BOS included), ``response_last`` reads n − 1, ``response_mean`` averages p … n − 1,
    ``all`` reads 0 … n − 1, ``response_predictors`` reads p − 1 … n − 2, ``context_last`` n − 1.

    Of an encoder-decoder model token p − 1 stands in the decoder for the last start token, and
    ``all`` reads 0 … p − 1 in the encoder, p − 1 … n − 1 in the decoder.

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
                "all": {None: range(n), "encoder": range(p), "decoder": range(p - 1, n)}[stack],
                "context_last": range(n - 1, n),
                "response_predictors": range(p - 1, n - 1),
            }[position]
        )
    return found
