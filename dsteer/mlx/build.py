"""Vectors from the states of one mlx-lm model; the mathematics are those of dsteer.steering.build.

Two models are read by :func:`dsteer.mlx.extract`, and ``dsteer.mean_difference`` does the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from dsteer.data.contrast import ContrastPair
from dsteer.data.tokens import Encoded, hash_ids
from dsteer.data.types import Prompt
from dsteer.errors import ConfigError, DataError, MeasurementError, did_you_mean
from dsteer.mlx.anatomy import Anatomy, Module
from dsteer.mlx.capture import read
from dsteer.mlx.load import Tokenizer, plain_tokenizer
from dsteer.steering.build import contrast_from_states
from dsteer.steering.states import encode_texts
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json

_POSITIONS = {"last": "prompt_last", "first": "prompt_last", "mean": "prompt_mean"}


def contrast(
    model: Module,
    tokenizer: Tokenizer,
    pairs: Sequence[ContrastPair | tuple[Prompt, Prompt]],
    *,
    method: str = "mean",
    position: str = "last",
    sites: str | Sequence[str] = "all",
    template: str = "none",
    folds: int = 5,
    seed: int = 0,
    batch_tokens: int | None = None,
) -> SteeringVectorSet:
    """Find what tells texts with a property from texts without it, as :func:`dsteer.contrast` does.

    Args:
        model: what :func:`dsteer.mlx.load` returns.
        tokenizer: likewise.
        pairs: (positive, negative): texts as they stand, or message lists through the template.
        method: see :data:`dsteer.steering.directions.Method`.
        position: ``last``, ``first`` or ``mean`` of the tokens of a text.
        sites: ``all``, or names, those inside a block too.
        template: ``chat`` puts texts through the chat template too.
        folds: parts of the pairs, each left out once to measure how a direction separates.
        seed: of the parts.
        batch_tokens: tokens a batch; default: what suits the device.

    Returns:
        One vector a site, from negative to positive, with what is known of it.

    Raises:
        ConfigError: an unknown method, position or site.
        DataError: no pairs, or a text that can't be encoded.
        ModelError, MeasurementError: as :func:`dsteer.mlx.read`.
    """
    if position not in _POSITIONS:
        raise _unknown("position", position, _POSITIONS)
    if not pairs:
        raise DataError("there are no contrast pairs; give at least one")
    positive, negative = zip(*pairs, strict=True)
    texts = {"positive texts": positive, "negative texts": negative}
    encoded = _encode(model, tokenizer, texts, position, template)
    states = read(
        model, encoded, sites=sites, position=_POSITIONS[position], batch_tokens=batch_tokens
    )
    half = len(pairs)
    vectors = [
        contrast_from_states(rows[:half], rows[half:], site, method=method, folds=folds, seed=seed)
        for site, rows in states.items()
    ]
    metadata: dict[str, Json] = {
        "method": f"contrast {method}",
        **Anatomy.of(model).about(),
        "position": position,
        "template": template,
        "pairs": half,
        "truncated": sum(item.truncated for item in encoded),
        "ids_sha256": hash_ids(encoded),
        "folds": folds,
        "seed": seed,
        "units": "states" if method == "mean" else "unit norm",
        "direction": "from negative to positive",
    }
    return SteeringVectorSet(vectors, metadata)


def prefix_contrast(
    model: Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    prefixes: Mapping[str, Sequence[str]] | Sequence[str],
    *,
    position: str = "mean",
    normalise: Literal["unit"] | None = "unit",
    direction: Literal["to_plain", "to_prefixed"] = "to_plain",
    sites: str | Sequence[str] = "all",
    template: str = "none",
    batch_tokens: int | None = None,
) -> SteeringVectorSet:
    """Compare the states of prompts with and without an instruction in front of them.

    With p̄_c the mean state of all prompts with each prefix of category c, and h̄ that of the plain
    prompts, v is the mean over categories of (h̄ − p̄_c)/‖h̄ − p̄_c‖, or of h̄ − p̄_c itself.

    Args:
        model: what :func:`dsteer.mlx.load` returns.
        tokenizer: likewise.
        prompts: texts.
        prefixes: by category, or of one; put in front of a prompt as they stand.
        position: ``mean``, ``last`` or ``first`` of a text's tokens, the prefix's included.
        normalise: ``unit`` takes each category's difference at norm 1; None as it is.
        direction: ``to_plain`` points from the prefixed to the plain state, ``to_prefixed`` back.
        sites: ``all``, or names.
        template: ``chat`` puts texts through the chat template.
        batch_tokens: tokens a batch; default: what suits the device.

    Returns:
        One vector a site; in its metadata, ``norms`` has ‖h̄ − p̄_c‖ by category.

    Raises:
        ConfigError: an unknown position, site, direction or way to normalise.
        DataError: no prompts or prefixes, or a text that can't be encoded.
        ModelError, MeasurementError: as :func:`dsteer.mlx.read`; a category that changes no state.
    """
    if position not in _POSITIONS:
        raise _unknown("position", position, _POSITIONS)
    signs = {"to_plain": 1.0, "to_prefixed": -1.0}
    if direction not in signs:
        raise _unknown("direction", direction, signs)
    if normalise not in ("unit", None):
        raise _unknown("normalise", normalise, ["unit"])
    named = prefixes if isinstance(prefixes, Mapping) else {"prefixes": prefixes}
    if not prompts or isinstance(prompts, str):
        raise DataError("there is no list of prompts; expected texts")
    if not named or not all(named.values()):
        raise DataError("there is a category without prefixes; give at least one prefix to each")
    texts = {"plain": list(prompts)} | {
        f"category {name}": [prefix + prompt for prefix in own for prompt in prompts]
        for name, own in named.items()
    }
    encoded = _encode(model, tokenizer, texts, position, template)
    states = read(
        model, encoded, sites=sites, position=_POSITIONS[position], batch_tokens=batch_tokens
    )
    ends = np.cumsum([len(own) for own in texts.values()])
    vectors = []
    for site, rows in states.items():
        means = [part.mean(axis=0) for part in np.split(rows.double().numpy(), ends[:-1])]
        parts = [signs[direction] * (means[0] - mean) for mean in means[1:]]
        norms = dict(zip(named, (float(np.linalg.norm(part)) for part in parts), strict=True))
        if normalise == "unit":
            for name, norm in norms.items():
                if norm == 0:
                    raise MeasurementError(
                        f"{site}: category {name} changes no state at position {position!r}, so it "
                        "has no direction; give other prefixes, or normalise None"
                    )
            parts = [part / norm for part, norm in zip(parts, norms.values(), strict=True)]
        vectors.append(SteeringVector(np.mean(parts, axis=0), site, n=len(prompts), norms=norms))
    return SteeringVectorSet(
        vectors,
        {
            "method": "prefix contrast",
            **Anatomy.of(model).about(),
            "position": position,
            "template": template,
            "categories": {name: len(own) for name, own in named.items()},
            "normalise": normalise,
            "ids_sha256": hash_ids(encoded),
            "units": "mean of unit vectors" if normalise else "states",
            "direction": "from prefixed to plain"
            if direction == "to_plain"
            else "from plain to prefixed",
        },
    )


def _encode(
    model: Module,
    tokenizer: Tokenizer,
    texts: Mapping[str, Sequence[Prompt]],
    position: str,
    template: str,
) -> list[Encoded]:
    """Ids of whole texts, group after group."""
    shape, plain = Anatomy.of(model).shape, plain_tokenizer(tokenizer)
    encoded = [
        item
        for what, own in texts.items()
        for item in encode_texts(shape, plain, own, template=template, what=what)
    ]
    if position == "first":
        return [Encoded(item.ids[:1], 1, item.truncated) for item in encoded]
    return encoded


def _unknown(what: str, value: object, known: Iterable[str]) -> ConfigError:
    return ConfigError(
        f"{what} {value!r}: no such {what} for MLX models{did_you_mean(str(value), known)}"
    )
