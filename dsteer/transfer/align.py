"""Positions at which two models with different tokenizers have read the same text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dsteer.activations.batching import default_budget, pad_right, plan_batches
from dsteer.activations.capture import Capture, select_tokens
from dsteer.activations.reading import padding_is_unseen
from dsteer.data.tokens import Spelled, Tokenizer, spell
from dsteer.errors import DataError, MeasurementError, ModelError
from dsteer.models.anatomy import Anatomy, evaluating, model_name
from dsteer.models.load import Model, quiet
from dsteer.progress import SILENT, Reporter

PARTS = ("fit", "tune", "test")
SHARES = (0.7, 0.15)
"""Shares of the texts on which maps are fitted and their settings chosen; the rest is for R²."""

MIN_TEXTS = 10

SINK = 10
"""States of a norm above so many times the median are attention sinks."""

_WORD = re.compile(r"\w+")
_CHUNK = 256  # texts that are tokenised at once


@dataclass(frozen=True)
class Text:
    """A text as both models read it, and the positions that they share.

    Attributes:
        sender: ids up to the last shared position.
        receiver: likewise.
        positions: (token of the sender, token of the receiver), one a shared word end, rising.
    """

    sender: tuple[int, ...]
    receiver: tuple[int, ...]
    positions: tuple[tuple[int, int], ...]


def word_ends(text: str) -> list[int]:
    """Numbers of characters up to the end of each word: a run of letters, digits and _."""
    return [match.end() for match in _WORD.finditer(text)]


def align(text: str, sender: Spelled, receiver: Spelled) -> list[tuple[int, int]]:
    """The tokens with which both models have read a word to its end.

    A word counts where in both a token ends at its last character; of several such tokens (parts of
    one character) the last is taken. What follows the word is unseen by then in both. A model's
    first token, on which attention rests that has nowhere to go, is no such token.

    Returns:
        (token of the sender, token of the receiver), in the order of the text.
    """
    last_of_sender = {end: token for token, end in enumerate(sender.ends) if token}
    last_of_receiver = {end: token for token, end in enumerate(receiver.ends) if token}
    return [
        (last_of_sender[end], last_of_receiver[end])
        for end in word_ends(text)
        if end in last_of_sender and end in last_of_receiver
    ]


def read_texts(
    texts: Sequence[str],
    sender: Tokenizer,
    receiver: Tokenizer,
    *,
    sender_tokens: int,
    receiver_tokens: int,
    budget: int,
) -> list[Text]:
    """Tokenise and align texts until the receiver's tokens fill a budget.

    Args:
        texts: neutral texts; those without a shared position are left out.
        sender: its tokenizer.
        receiver: its tokenizer.
        sender_tokens: the sender reads no more of one text.
        receiver_tokens: the receiver reads no more of one text.
        budget: receiver tokens in all; the last text may exceed it.

    Raises:
        ModelError: a slow tokenizer.
        DataError: too few texts have a shared position.
    """
    found: list[Text] = []
    read = 0
    for start in range(0, len(texts), _CHUNK):
        some = texts[start : start + _CHUNK]
        of_sender = spell(sender, some, max_tokens=sender_tokens)
        of_receiver = spell(receiver, some, max_tokens=receiver_tokens)
        for text, a, b in zip(some, of_sender, of_receiver, strict=True):
            positions = align(text, a, b)
            if not positions or read >= budget:
                continue
            i, j = positions[-1]
            found.append(Text(a.ids[: i + 1], b.ids[: j + 1], tuple(positions)))
            read += j + 1
        if read >= budget:
            break
    if len(found) < MIN_TEXTS:
        raise DataError(
            f"the neutral text has {len(found)} texts in which both tokenizers end a token at the "
            f"end of a word; expected at least {MIN_TEXTS}: give more text (transfer.text, "
            "transfer.text_tokens)"
        )
    return found


def parts(texts: Sequence[Text], seed: int) -> dict[str, list[Text]]:
    """Deal texts at random to ``fit``, ``tune`` and ``test``; none is empty."""
    order = np.random.default_rng(seed).permutation(len(texts))
    fit, tune = (round(len(texts) * share) for share in SHARES)
    cuts = {"fit": order[:fit], "tune": order[fit : fit + tune], "test": order[fit + tune :]}
    return {part: [texts[i] for i in numbers] for part, numbers in cuts.items()}


def ordinary(states: Iterable[Float[np.ndarray, "n _d"]]) -> Bool[np.ndarray, " n"]:
    """The positions with no state beyond :data:`SINK` × the median norm at its site.

    In attention sinks (a text's first tokens, some delimiters) most models keep one huge state that
    says nothing of the text. A map that predicts where sinks are explains nearly all variance, and
    knows nothing of any other state.

    Args:
        states: of each model and site, row by row the same positions.
    """
    kept = []
    for rows in states:
        norms = np.linalg.norm(rows, axis=1)
        kept.append(norms <= SINK * np.median(norms))
    return np.asarray(np.all(kept, axis=0))


def read_states(
    model: Model,
    texts: Sequence[tuple[int, ...]],
    tokens: Sequence[Sequence[int]],
    sites: Sequence[str],
    *,
    batch_tokens: int | None = None,
    reporter: Reporter = SILENT,
    label: str = "states of texts",
) -> dict[str, Float[Tensor, "n d"]]:
    """States of some tokens of each text, float32, in order: text by text, token by token.

    Args:
        model: a causal language model.
        texts: ids, read from the left.
        tokens: which tokens of each.
        sites: where.
        batch_tokens: tokens a batch; default: what suits the device.
        reporter: shows progress.
        label: what progress is called.

    Raises:
        ModelError: an id that the model does not have, or states that can't be read.
        MeasurementError: a state is not finite.
    """
    anatomy = Anatomy.of(model)
    vocabulary = len(anatomy.input_embedding.weight)  # type: ignore[arg-type]
    highest = max(max(ids) for ids in texts)
    if highest >= vocabulary:
        raise ModelError(
            f"{model_name(model)} has {vocabulary} tokens, and its tokenizer gives the id "
            f"{highest}; give the tokenizer that belongs to it"
        )
    offsets = [0, *accumulate(map(len, tokens))]
    states = {site: torch.empty(offsets[-1], anatomy.width) for site in sites}
    budget = batch_tokens or default_budget(anatomy.device)
    with (
        evaluating(model),
        quiet(),
        Capture(anatomy, sites) as capture,
        reporter.bar(label, len(texts), unit="texts") as advance,
    ):
        pad = padding_is_unseen(model, anatomy, texts)
        for batch in plan_batches(list(map(len, texts)), budget, pad=pad):
            ids = pad_right([texts[number] for number in batch.prompts], batch.length)
            found = capture.read(ids, select_tokens([tokens[number] for number in batch.prompts]))
            for site, rows in found.items():
                lengths = [len(tokens[number]) for number in batch.prompts]
                for number, part in zip(batch.prompts, torch.split(rows, lengths), strict=True):
                    states[site][offsets[number] : offsets[number + 1]] = part
            advance(len(batch.prompts))
    for site, rows in states.items():
        if not bool(torch.isfinite(rows).all()):
            raise MeasurementError(
                f"{model_name(model)}: states of neutral text at {site} are not finite; load it in "
                "another dtype (models.dtype: bfloat16 or float32)"
            )
    return states
