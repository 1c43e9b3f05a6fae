"""Load what mlx-lm can load, with its ways of failing turned into one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

from dsteer.data.tokens import Encoded, encode, given_ids
from dsteer.data.types import PreferencePair, Prompt
from dsteer.errors import DataError, ModelError
from dsteer.mlx.anatomy import Anatomy, Module

Tokenizer = Any
"""What mlx-lm wraps around a transformers tokenizer, or the latter."""

_FAILURES = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError)


def load(path: str | Path, revision: str | None = None) -> tuple[Module, Tokenizer]:
    """Load a model and its tokenizer: a hub id, or a folder that mlx-lm or transformers wrote.

    Weights are used in the dtype, and quantised as, they are stored in.

    Args:
        path: the hub id or folder.
        revision: of a hub id.

    Raises:
        ModelError: missing or malformed, of an architecture that mlx-lm lacks, or no language model
            whose states can be read.
    """
    try:
        model, tokenizer = mlx_lm.load(str(path), revision=revision)
    except _FAILURES as error:
        lines = str(error).strip().splitlines()
        why = lines[0].rstrip(".,") if lines else type(error).__name__
        remedy = (
            "expected safetensors of an architecture that mlx-lm knows"
            if Path(path).expanduser().exists()
            else "expected a folder, or a hub id that is spelled right and within reach"
        )
        raise ModelError(f"{path}: mlx-lm can't load the model ({why}); {remedy}") from None
    Anatomy.of(model)  # raises where its states can't be read
    return model, tokenizer


def plain_tokenizer(tokenizer: Tokenizer) -> Any:
    """The transformers tokenizer in mlx-lm's wrapper."""
    return tokenizer._tokenizer if isinstance(tokenizer, TokenizerWrapper) else tokenizer


def encode_prompts(
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt | PreferencePair] | Sequence[Encoded],
    anatomy: Anatomy,
    **settings: Any,
) -> list[Encoded]:
    """Token ids of prompts, no longer than the model was made for; ids are taken as they are.

    Args:
        tokenizer: not needed for ids.
        prompts: texts, message lists, pairs, or ids.
        anatomy: of the model that reads them.
        settings: of :func:`dsteer.data.tokens.encode`.

    Raises:
        DataError: no prompts, one text for a list, ids and texts in one list, a prompt that can't
            be encoded, or texts without a tokenizer.
    """
    if (ready := given_ids(prompts)) is not None:
        return ready
    if tokenizer is None:
        raise DataError("prompts are texts, and no tokenizer is given; expected tokenizer=…")
    limits = [settings.pop("max_tokens", None), anatomy.max_positions]
    return encode(
        plain_tokenizer(tokenizer),
        prompts,  # type: ignore[arg-type]  # no Encoded among them
        max_tokens=min((limit for limit in limits if limit is not None), default=None),
        **settings,
    )
