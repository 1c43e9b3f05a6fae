"""Steering vectors from an instruction: the same prompts with and without it in front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from dsteer.data.tokens import Encoded, Tokenizer, hash_ids
from dsteer.data.transcript import HUMAN
from dsteer.data.types import Message, PreferencePair, Prompt
from dsteer.errors import ConfigError, DataError, MeasurementError, did_you_mean
from dsteer.geometry.displacement import as_matrix
from dsteer.models.load import Model
from dsteer.progress import SILENT, Reporter
from dsteer.steering.arms import Steering
from dsteer.steering.decode import Decoding, decode
from dsteer.steering.directions import Groups, folds_of, separation
from dsteer.steering.provenance import of_model
from dsteer.steering.states import Shape, as_json, encode_texts, sites_of, states_of
from dsteer.steering.vector import SteeringVector, SteeringVectorSet
from dsteer.store import Json, hash_json

Toward = Literal["to_plain", "to_prefixed"]

_POSITIONS = ("mean", "last")


def prefix_contrast(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt | PreferencePair] | Mapping[str, Sequence[Prompt | PreferencePair]],
    prefixes: str | Sequence[str] | Mapping[str, str | Sequence[str]],
    *,
    separator: str = " ",
    samples: int = 1,
    new_tokens: int = 0,
    temperature: float = 1.0,
    normalise: Literal["unit"] | None = "unit",
    direction: str = "to_plain",
    position: str = "mean",
    component: str = "residual",
    layers: Sequence[int] | None = None,
    sites: str | Sequence[str] = "all",
    template: str = "none",
    folds: int = 5,
    seed: int = 0,
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    reporter: Reporter = SILENT,
) -> SteeringVectorSet:
    """Find what an instruction in front of a prompt changes, averaged over kinds of instruction.

    With h(x) the state of prompt x, its mean over the tokens of the text, and prefixes s of a
    category c drawn for it::

        d_c = mean_x [ h(x) − mean_s h(s + x) ]      v = mean_c d_c/‖d_c‖   (or mean_c d_c)

    so that v points from the prefixed to the plain state: adding it takes away what the
    instructions do. A state at block k is what a hook on that block adds to.

    Each prompt is read with ``samples`` prefixes of its category: different ones where there are as
    many, else all in rounds, the remainder drawn. The states of a text are a function of its
    tokens, so a prefix that repeats adds nothing new: such a text is read once and counts as often
    as it was drawn. With ``new_tokens`` samples differ all the same: each sample of a prompt, plain
    and prefixed, goes on with an answer that the model draws, and is read with it.

    A prefix stands before the prompt's text; in messages and in transcripts before the first words
    of the user.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: texts, message lists or pairs (their prompt); of all categories, or those of each.
        prefixes: one, several of one kind, or category → one or several.
        separator: what stands between prefix and prompt.
        samples: prefixes drawn for each prompt (and answers, with ``new_tokens``).
        new_tokens: of each answer at most; 0: none.
        temperature: at which answers are drawn; 0 takes the most likely token.
        normalise: ``unit`` makes each category's difference a unit vector a site before the mean,
            so that no category counts more because it shifts more; None keeps their sizes.
        direction: ``to_plain``, or ``to_prefixed``, the opposite.
        position: ``mean`` over the text's tokens, special tokens and prefix included, or ``last``.
        component: ``residual``, ``attn`` or ``mlp``.
        layers: blocks, from 0; default: all, and ``final_norm`` of the residual stream.
        sites: names of sites instead.
        template: ``chat`` puts texts through the chat template too.
        folds: parts of the prompts, each left out once to measure how a direction separates.
        seed: of draws and parts.
        batch_tokens: tokens a batch, padding included; default: what suits the device.
        max_tokens: of a prompt with its prefix, which no cut may take off; at most what the model
            was made for.
        reporter: shows progress.

    Returns:
        One vector a site. In its metadata: ``n`` (prompts), ``norm``, ``mean_state_norm``, ``gap``
        (how far apart the means of plain and prefixed states lie along it), ``category_norms``
        (‖d_c‖, in the states' units) and ``accuracy`` and ``cohens_d``, held out by prompts.

    Raises:
        ConfigError: an unknown setting, or settings that don't go together.
        DataError: no prompts, no prefixes, or some that can't be encoded or don't fit the model.
        ModelError: a model whose states can't be read.
        MeasurementError: states that are not finite.
    """
    _check(samples, new_tokens, normalise, direction, position)
    wanted = sites_of(component, layers, sites)
    kinds = _by_category(prompts, prefixes)
    texts: list[Prompt] = []
    places: dict[str, int] = {}

    def place(text: Prompt) -> int:
        """Where a text is among those that are read; one that answers itself is read anew."""
        key = hash_json(as_json(text))
        if new_tokens or key not in places:
            places[key] = len(texts)
            texts.append(text)
        return places[key]

    samplings: list[_Sampling] = []
    prompt_ids: dict[str, int] = {}
    for number, (asked, own) in enumerate(kinds.values()):
        rng = np.random.default_rng([seed, number])
        for prompt in asked:
            samplings.append(
                _Sampling(
                    number,
                    prompt_ids.setdefault(hash_json(as_json(prompt)), len(prompt_ids)),
                    [place(prompt) for _ in range(samples)],
                    [
                        place(_prefixed(prompt, prefix + separator))
                        for prefix in _draw(own, samples, rng)
                    ],
                )
            )
    encoded = encode_texts(
        model,
        tokenizer,
        texts,
        template=template,
        max_tokens=max_tokens,
        room=new_tokens,
        what="prompts",
    )
    for one in samplings:
        if any(encoded[i].truncated for i in one.prefixed):
            raise DataError(
                f"prompt {one.prompt} with its prefix is longer than the model (or max_tokens) "
                "takes, and a cut on the left takes the prefix off; expected shorter prompts"
            )
    if new_tokens:
        encoded = _answered(model, tokenizer, encoded, new_tokens, temperature, seed, reporter)
    parts = folds_of(len(prompt_ids), folds, seed)
    vectors = []
    with states_of(
        model,
        encoded,
        sites=wanted,
        position=position,
        batch_tokens=batch_tokens,
        reporter=reporter,
    ) as (states, _):
        for site in states:
            rows = as_matrix(states[site], site)
            vectors.append(_vector(rows, samplings, list(kinds), site, normalise, direction, parts))
    if all(vector.undefined for vector in vectors):
        raise MeasurementError(
            f"the states of prompts are the same with and without prefix at position {position!r}; "
            "expected prefixes that change them"
        )
    return SteeringVectorSet(
        vectors,
        {
            "method": "prefix contrast",
            **of_model(model),
            "position": position,
            "component": component,
            "template": template,
            "prompts": len(prompt_ids),
            "categories": {name: len(own) for name, (_, own) in kinds.items()},
            "separator": separator,
            "samples": samples,
            "new_tokens": new_tokens,
            **({"temperature": temperature} if new_tokens else {}),
            "normalise": normalise,
            "truncated": sum(item.truncated for item in encoded),
            "data_sha256": hash_json(
                {
                    name: [[as_json(prompt) for prompt in asked], list(own)]
                    for name, (asked, own) in kinds.items()
                }
            ),
            "ids_sha256": hash_ids(encoded),
            "folds": len(parts),
            "seed": seed,
            "units": "states" if normalise is None else "mean over categories of unit vectors",
            "direction": {
                "to_plain": "from prefixed to plain",
                "to_prefixed": "from plain to prefixed",
            }[direction],
        },
    )


# ---------------------------------------------------------------------------------- samples


@dataclass(frozen=True)
class _Sampling:
    """One prompt in one category: which of the texts that are read it is, plain and prefixed."""

    category: int
    prompt: int
    plain: list[int]
    prefixed: list[int]


def _check(
    samples: int, new_tokens: int, normalise: str | None, direction: str, position: str
) -> None:
    for name, value, least in (("samples", samples, 1), ("new_tokens", new_tokens, 0)):
        if value < least:
            raise ConfigError(f"{name} {value}: expected {least} or more")
    if normalise not in (None, "unit"):
        raise ConfigError(f"normalise {normalise!r}: expected 'unit' or None")
    for name, word, known in (
        ("direction", direction, get_args(Toward)),
        ("position", position, _POSITIONS),
    ):
        if word not in known:
            raise ConfigError(f"{name} {word!r}: no such {name}{did_you_mean(word, known)}")


def _by_category(
    prompts: Sequence[Prompt | PreferencePair] | Mapping[str, Sequence[Prompt | PreferencePair]],
    prefixes: str | Sequence[str] | Mapping[str, str | Sequence[str]],
) -> dict[str, tuple[list[Prompt], list[str]]]:
    """Category → its prompts and its prefixes, each once."""
    named = prefixes if isinstance(prefixes, Mapping) else {"prefix": prefixes}
    asked = prompts if isinstance(prompts, Mapping) else dict.fromkeys(named, prompts)
    if asked.keys() != named.keys():
        raise DataError(
            f"prompts of the categories {sorted(asked)} and prefixes of {sorted(named)}; expected "
            "the same categories"
        )
    if not named:
        raise DataError("there are no prefixes; give at least one")
    found = {}
    for name, given in named.items():
        own = list(dict.fromkeys([given] if isinstance(given, str) else given))
        if not own or not all(own):
            raise DataError(f"category {name!r} has the prefixes {own}; expected texts")
        if isinstance(asked[name], str) or not asked[name]:
            raise DataError(f"category {name!r}: expected a list of prompts, got {asked[name]!r}")
        bare = [one.prompt if isinstance(one, PreferencePair) else one for one in asked[name]]
        found[name] = (list({hash_json(as_json(one)): one for one in bare}.values()), own)
    return found


def _draw(prefixes: Sequence[str], samples: int, rng: np.random.Generator) -> list[str]:
    """So many of the prefixes: all as often as they fit in, the remainder different ones."""
    rounds, rest = divmod(samples, len(prefixes))
    return [*prefixes] * rounds + [prefixes[i] for i in rng.permutation(len(prefixes))[:rest]]


def _prefixed(prompt: Prompt, prefix: str) -> Prompt:
    if isinstance(prompt, str):
        head = f"{HUMAN} " if prompt.startswith(f"{HUMAN} ") else ""
        return head + prefix + prompt.removeprefix(head)
    messages = list(prompt)
    for number, message in enumerate(messages):
        if message["role"] == "user":
            messages[number] = Message(role="user", content=prefix + message["content"])
            return messages
    raise DataError("a prompt without a message of the user; expected one to put the prefix before")


def _answered(
    model: Model,
    tokenizer: Tokenizer,
    encoded: Sequence[Encoded],
    new_tokens: int,
    temperature: float,
    seed: int,
    reporter: Reporter,
) -> list[Encoded]:
    """Each text with an answer that the model draws, as one text."""
    if Shape.of(model).encoder_decoder:
        raise ConfigError(
            f"new_tokens {new_tokens}: an encoder does not read what its decoder writes; expected "
            "0, or a decoder-only model"
        )
    decoding = Decoding(new_tokens, temperature=temperature, seed=seed)
    arms = Steering.none(Shape.of(model).width)
    decoded = decode(model, tokenizer, encoded, arms, decoding, reporter=reporter, label="answers")
    whole = []
    for item, tokens in zip(encoded, decoded.tokens[0], strict=True):
        ids = (*item.ids, *tokens)
        whole.append(replace(item, ids=ids, prompt_length=len(ids)))
    return whole


# ---------------------------------------------------------------------------------- vectors


def _vector(
    rows: Float[np.ndarray, "n d"],
    samplings: Sequence[_Sampling],
    categories: Sequence[str],
    site: str,
    normalise: str | None,
    direction: str,
    parts: Sequence[Int[np.ndarray, " _"]],
) -> SteeringVector:
    plain = np.array([rows[one.plain].mean(axis=0) for one in samplings])
    prefixed = np.array([rows[one.prefixed].mean(axis=0) for one in samplings])
    to, since = (plain, prefixed) if direction == "to_plain" else (prefixed, plain)
    prompt = np.array([one.prompt for one in samplings])
    category = np.array([one.category for one in samplings])

    def differences(prompts: Int[np.ndarray, " _"]) -> dict[int, np.ndarray]:
        inside = np.isin(prompt, prompts)
        return {
            int(number): (to - since)[inside & (category == number)].mean(axis=0)
            for number in np.unique(category[inside])
        }

    def combined(prompts: Int[np.ndarray, " _"]) -> Float[np.ndarray, " _"]:
        found = list(differences(prompts).values())
        if normalise is not None:
            found = [d / np.linalg.norm(d) if d.any() else d for d in found]
        return np.asarray(np.mean(found, axis=0))

    everyone = np.unique(prompt)
    v = combined(everyone)
    groups = Groups(to, since, prompt, prompt, True)
    measured = separation(groups, combined, parts)
    norm = float(np.linalg.norm(v))
    metadata: dict[str, Json] = {
        "n": len(everyone),
        "norm": norm,
        "mean_state_norm": float(np.linalg.norm(np.concatenate([to, since]), axis=1).mean()),
        "gap": float(groups.gap @ v) / norm if norm > 0 else None,
        "category_norms": {
            categories[number]: float(np.linalg.norm(d))
            for number, d in differences(everyone).items()
        },
        "accuracy": measured.accuracy,
        "cohens_d": measured.cohens_d,
    }
    return SteeringVector(v, site, **metadata)
