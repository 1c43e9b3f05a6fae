"""Answers that are told while they are written: one prompt, a row an answer, in one batch.

Tokens come from ``generate`` under hooks, a row a strength, so every model that transformers runs
will do. Text is told as soon as it is sure: a character never in parts, and nothing that may still
become a stop string.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from dsteer.data.tokens import Encoded, Tokenizer
from dsteer.errors import DataError
from dsteer.models.anatomy import Anatomy, evaluating, max_positions
from dsteer.models.load import Model
from dsteer.progress import SILENT, Reporter
from dsteer.steering.arms import Arm, Steering
from dsteer.steering.decode import Decoding, Draw, decode, end_ids, generating
from dsteer.steering.dials import Dials
from dsteer.steering.guidance import Guidance, guided
from dsteer.steering.intervene import Intervention, Number, steer

Tell = Callable[[int, str], None]
"""Called with the number of a row and the next piece of its text."""

Finish = Literal["stop", "length", "cancelled"]

_INCOMPLETE = "\ufffd"
"""What tokenizers write for bytes that are no character, or not one yet."""

BEFORE = 4
"""Tokens of the prompt with which an answer's first ones are decoded, for the sake of spaces."""


@dataclass(frozen=True)
class Answer:
    """One row.

    Attributes:
        tokens: its ids, without EOS.
        text: the continuation alone, up to a stop string.
        finish: ``stop``: by itself or at a stop string; ``length``: no tokens were left;
            ``cancelled``: it was cut off.
    """

    tokens: tuple[int, ...]
    text: str
    finish: Finish


def answer(
    model: Model,
    tokenizer: Tokenizer,
    prompt: Encoded,
    interventions: Sequence[Intervention],
    decoding: Decoding,
    *,
    draws: Sequence[int] = (0,),
    tell: Tell | None = None,
    cancelled: Callable[[], bool] | None = None,
    guidance: Number | None = None,
) -> list[Answer]:
    """Continue one prompt in some rows, and tell of each what is new as it comes.

    Hooks are on the model only while this call runs, whatever ends it.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        prompt: ids.
        interventions: what is done; values a row for as many rows as there are draws.
        decoding: how tokens are chosen.
        draws: of each row, which stream of draws it takes (see :meth:`Decoding.draws`): rows that
            are compared share one, several answers have one each.
        tell: told the pieces; a row's pieces joined are its text.
        cancelled: asked after each token; True ends all rows.
        guidance: w of z + w (z′ − z), see :mod:`dsteer.steering.guidance`; default: plain steering.

    Raises:
        DataError: the prompt and the new tokens exceed what the model was made for.
        MeasurementError: a guidance that is not finite.
        ModelError: see :func:`dsteer.steering.intervene.steer`.
    """
    require_room(model, prompt, decoding.max_new_tokens)
    anatomy = Anatomy.of(model)
    rows, ends = len(draws), end_ids(model, tokenizer)
    ids = torch.tensor([prompt.ids] * rows, device=anatomy.device)
    begun, decoder = ids, {}
    if anatomy.start is not None:
        begun = torch.tensor([anatomy.start] * rows, device=anatomy.device)
        decoder = {"decoder_input_ids": begun}
    config = GenerationConfig(
        max_new_tokens=decoding.max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        disable_compile=True,
        decoder_start_token_id=None if anatomy.start is None else anatomy.start[0],
    )
    chosen = LogitsProcessorList()
    acting: contextlib.AbstractContextManager[object] = steer(model, interventions)
    if guidance is not None and interventions:
        acting = guided_by = Guidance(model, interventions, weight=guidance)
        chosen.append(guided_by)
    if decoding.temperature > 0:
        uniform = torch.from_numpy(np.stack([decoding.draws(number) for number in draws]))
        chosen.append(Draw(decoding, uniform, begun.shape[1]))
    before = prompt.ids[-BEFORE:] if anatomy.start is None else ()
    texts = [Unfolding(tokenizer, before, decoding.stop) for _ in draws]
    listener = _Listener(texts, ends, tell or (lambda _row, _piece: None), cancelled)
    with evaluating(model), generating(model, config), acting:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=chosen,
            stopping_criteria=StoppingCriteriaList([listener]),
            **decoder,
        )
    listener.end()
    return [
        Answer(tuple(tokens), text.text, finish or "length")
        for tokens, text, finish in zip(listener.tokens, texts, listener.finish, strict=True)
    ]


def answers(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Encoded],
    dials: Dials,
    rows: Sequence[Mapping[str, float]],
    decoding: Decoding,
    *,
    guidance: Number | None = None,
    reporter: Reporter = SILENT,
) -> list[list[Answer]]:
    """Continue every prompt once a row of strengths, all rows of a prompt with the same draws.

    Prompts are batched together where one vector is swept (:func:`dsteer.steering.decode.decode`)
    or answers are guided (:func:`dsteer.steering.guidance.guided`, row by row). Several vectors at
    once take a prompt at a time.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: ids.
        dials: what it is steered by.
        rows: strengths.
        decoding: how tokens are chosen.
        guidance: see :func:`answer`.
        reporter: shows progress.

    Returns:
        ``[prompt][row]``.

    Raises:
        DataError: no prompts, or prompts too long for the model.
        MeasurementError: a guidance that is not finite, or strengths that can't be measured.
        ModelError: see :func:`dsteer.steering.decode.decode`.
    """
    if not prompts:
        raise DataError("there are no prompts to continue; give at least one")
    for prompt in prompts:
        require_room(model, prompt, decoding.max_new_tokens)
    if guidance is not None or len(dials) == 1:
        found = (
            _swept(model, tokenizer, prompts, dials, rows, decoding, reporter)
            if guidance is None
            else [
                _guided(model, tokenizer, prompts, dials, row, decoding, guidance, reporter)
                for row in rows
            ]
        )
        return [list(column) for column in zip(*found, strict=True)]
    made = []
    with reporter.bar("decoding", len(prompts), unit="prompts") as advance:
        for number, prompt in enumerate(prompts):
            acting = dials.interventions(rows)
            draws = [number] * len(rows)
            made.append(answer(model, tokenizer, prompt, acting, decoding, draws=draws))
            advance(1)
    return made


def _swept(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Encoded],
    dials: Dials,
    rows: Sequence[Mapping[str, float]],
    decoding: Decoding,
    reporter: Reporter,
) -> list[list[Answer]]:
    """``[row][prompt]`` of one dial."""
    (name, dial), *_ = dials.items()
    arms = tuple(Arm(dial.vector.tensor, dials.lambdas(row)[name]) for row in rows)
    steering = Steering(dial.site, arms, positions=dials.positions, schedule=dials.schedule)
    found = decode(model, tokenizer, prompts, steering, decoding, reporter=reporter)
    return [_answers(*row) for row in zip(found.tokens, found.texts, found.finished, strict=True)]


def _guided(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Encoded],
    dials: Dials,
    row: Mapping[str, float],
    decoding: Decoding,
    weight: Number,
    reporter: Reporter,
) -> list[Answer]:
    """The answers of one row."""
    acting = dials.interventions([row])
    if not acting:  # nothing to guide by: the model as it is
        bare = Steering.none(Anatomy.of(model).width)
        plain = decode(model, tokenizer, prompts, bare, decoding, reporter=reporter)
        return _answers(plain.tokens[0], plain.texts[0], plain.finished[0])
    found = guided(
        model,
        tokenizer,
        prompts,
        [replace(one, strength=float(torch.as_tensor(one.strength))) for one in acting],
        weight=weight,
        max_new_tokens=decoding.max_new_tokens,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        seed=decoding.seed,
        stop=decoding.stop,
        reporter=reporter,
    )
    return _answers(found.tokens, found.texts, found.finished)


def _answers(
    tokens: Sequence[tuple[int, ...]], texts: Sequence[str], finished: Sequence[bool]
) -> list[Answer]:
    return [
        Answer(ids, text, "stop" if done else "length")
        for ids, text, done in zip(tokens, texts, finished, strict=True)
    ]


def require_room(model: Model, prompt: Encoded, new_tokens: int) -> None:
    """Check that a prompt and its answer fit a model.

    Raises:
        DataError: they don't.
    """
    limit = max_positions(model.config)
    if limit is not None and len(prompt.ids) + new_tokens > limit:
        raise DataError(
            f"a prompt of {len(prompt.ids)} tokens and {new_tokens} new ones exceed the {limit} "
            "that the model was made for; shorten the prompt or ask for fewer new tokens"
        )


class Unfolding:
    """A text that grows token by token.

    Args:
        tokenizer: turns ids into text.
        before: ids that stand before the text.
        stop: the text ends before the first of these strings.

    Attributes:
        text: what is known of it.
        stopped: whether a stop string ended it.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before)
        self._from, self._read = 0, len(self._ids)  # ids that give context, and those that are told
        self._stop = tuple(stop)
        self._told = 0
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token; return what may be told now."""
        self._ids.append(token)
        piece = self._new()
        if piece.endswith(_INCOMPLETE):
            return ""
        return self._take(piece, last=False)

    def end(self) -> str:
        """There are no more tokens: return the rest."""
        return self._take("" if self.stopped else self._new(), last=True)

    def _new(self) -> str:
        head = self._decode(self._ids[self._from : self._read])
        whole = self._decode(self._ids[self._from :])
        known = whole.startswith(head)
        return whole[len(head) :] if known else self._decode(self._ids[self._read :])

    def _take(self, piece: str, *, last: bool) -> str:
        if piece:
            self._from, self._read = self._read, len(self._ids)
            start = max(0, len(self.text) - max(map(len, self._stop), default=0))
            self.text += piece
            found = [at for stop in self._stop if (at := self.text.find(stop, start)) >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        sure = len(self.text)
        if not (last or self.stopped):
            sure -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
        told, self._told = self._told, max(self._told, sure)
        return self.text[told : self._told]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text with which a stop string begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class _Listener(StoppingCriteria):  # type: ignore[misc]
    """Hears each token, tells its text, and ends rows."""

    def __init__(
        self,
        texts: Sequence[Unfolding],
        ends: frozenset[int],
        tell: Tell,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self._texts, self._ends = texts, ends
        self._tell, self._cancelled = tell, cancelled
        self.tokens: list[list[int]] = [[] for _ in texts]
        self.finish: list[Finish | None] = [None] * len(texts)

    def __call__(
        self, input_ids: Int[Tensor, "r t"], _scores: object, **_kwargs: Any
    ) -> Bool[Tensor, " r"]:
        if self._cancelled is not None and self._cancelled():
            self.finish = [finish or "cancelled" for finish in self.finish]
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.finish[row] is not None:
                continue
            if token in self._ends:
                self.finish[row] = "stop"
                continue
            self.tokens[row].append(token)
            self._say(row, self._texts[row].add(token))
            if self._texts[row].stopped:
                self.finish[row] = "stop"
        done = [finish is not None for finish in self.finish]
        return torch.tensor(done, device=input_ids.device)

    def end(self) -> None:
        """Tell what was held back."""
        for row, text in enumerate(self._texts):
            self._say(row, text.end())

    def _say(self, row: int, piece: str) -> None:
        if piece:
            self._tell(row, piece)
