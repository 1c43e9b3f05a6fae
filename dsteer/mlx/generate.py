"""Text of an mlx-lm model: plain, steered or guided; greedy or drawn as :mod:`dsteer` draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import torch

from dsteer.data.tokens import Encoded
from dsteer.data.types import Prompt
from dsteer.errors import ConfigError
from dsteer.mlx.anatomy import Anatomy, Module
from dsteer.mlx.load import Tokenizer, encode_prompts, plain_tokenizer
from dsteer.mlx.steering import Guidance, Steering, interventions_of
from dsteer.steering.answer import BEFORE, Answer, Finish, Unfolding
from dsteer.steering.decode import Decoding
from dsteer.steering.intervene import Strength


def stream(
    model: Module,
    tokenizer: Tokenizer,
    prompt: Prompt | Encoded,
    vector: Any = None,
    strength: Strength = 1.0,
    *,
    guidance: float | None = None,
    template: str = "none",
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    number: int = 0,
    generation: dict[str, Any] | None = None,
    **steering: Any,
) -> Iterator[Any]:
    """Generate a continuation, token by token.

    The model is steered only while a token is made, so that several texts may be written in turns.

    Args:
        model: what :func:`dsteer.mlx.load` returns.
        tokenizer: likewise.
        prompt: a text, as it stands; a message list, through the chat template; or ids.
        vector: what to steer with, as of :func:`dsteer.mlx.steer`; None: the model as it is, unless
            an ``operation`` that needs no vector is given.
        strength: s.
        guidance: w of :func:`dsteer.mlx.guide`; default: plain steering.
        template: ``chat`` puts a text through the chat template too.
        max_new_tokens: at most so many.
        temperature: 0 takes the most likely token; else tokens are drawn, by the same numbers as
            :func:`dsteer.sweep` draws.
        top_p: draw from the smallest set of tokens that holds this probability.
        seed: of the draws.
        number: of the prompt, whose draws are taken: 0 is a sweep's first.
        generation: further settings of ``mlx_lm.stream_generate``, such as ``prompt_cache`` or
            ``prefill_step_size``.
        steering: ``positions``, ``operation``, ``site``, ``schedule``, ``relative`` of steering.

    Yields:
        mlx-lm's responses: ``text``, ``token``, ``finish_reason`` and more.

    Raises:
        ConfigError: guidance or settings of steering without a vector.
        DsteerError: as :func:`dsteer.mlx.steer` and :class:`dsteer.steering.decode.Decoding`.
    """
    decoding = Decoding(max_new_tokens, temperature, top_p, seed)
    encoded = _encode(model, tokenizer, prompt, template)
    acting: Steering | None = None
    if vector is not None or "operation" in steering:
        site, lengths = (steering.pop(name, None) for name in ("site", "prompt_lengths"))
        what = interventions_of(vector, site, strength, **steering)
        acting = (
            Steering(model, what, lengths)
            if guidance is None
            else Guidance(model, what, guidance, lengths)
        )
    elif guidance is not None or steering:
        name = "guidance" if guidance is not None else next(iter(steering))
        raise ConfigError(f"{name} without a vector to steer with; give one")
    responses = mlx_lm.stream_generate(
        model,
        tokenizer,
        list(encoded.ids),
        max_tokens=max_new_tokens,
        sampler=_sampler(decoding, number),
        **(generation or {}),
    )
    while True:
        with contextlib.nullcontext() if acting is None else acting.acting():
            response = next(responses, None)
        if response is None:
            return
        yield response


def answer(
    model: Module,
    tokenizer: Tokenizer,
    prompt: Prompt | Encoded,
    vector: Any = None,
    strength: Strength = 1.0,
    *,
    template: str = "none",
    stop: tuple[str, ...] = (),
    **settings: Any,
) -> Answer:
    """Generate a continuation: its tokens and text, and why it ended.

    Args:
        model, tokenizer, prompt, vector, strength, template: see :func:`stream`.
        stop: the text ends before the first of these strings.
        settings: the other arguments of :func:`stream`, whose errors are these.
    """
    encoded = _encode(model, tokenizer, prompt, template)
    text = Unfolding(plain_tokenizer(tokenizer), encoded.ids[-BEFORE:], stop)
    tokens: list[int] = []
    finish: Finish = "length"
    responses = stream(model, tokenizer, encoded, vector, strength, **settings)
    with contextlib.closing(responses):  # type: ignore[type-var]  # a generator
        for response in responses:
            if response.finish_reason == "stop":
                finish = "stop"
                break
            tokens.append(response.token)
            text.add(response.token)
            if text.stopped:
                finish = "stop"
                break
    text.end()
    return Answer(tuple(tokens), text.text, finish)


def generate(
    model: Module,
    tokenizer: Tokenizer,
    prompt: Prompt | Encoded,
    vector: Any = None,
    strength: Strength = 1.0,
    **settings: Any,
) -> str:
    """Generate a continuation: its text alone, without special tokens, as a sweep gives it.

    Arguments and errors are those of :func:`answer`.
    """
    return answer(model, tokenizer, prompt, vector, strength, **settings).text


def _encode(
    model: Module, tokenizer: Tokenizer, prompt: Prompt | Encoded, template: str
) -> Encoded:
    given: Any = [prompt]
    return encode_prompts(tokenizer, given, Anatomy.of(model), template=template)[0]


def _sampler(decoding: Decoding, number: int) -> Callable[[mx.array], mx.array]:
    """Chooses a token from log-probabilities (1, V) as a sweep does."""
    if decoding.temperature == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    draws = iter(decoding.draws(number))

    def draw(logprobs: mx.array) -> mx.array:
        uniform = torch.tensor([next(draws, 0.0)])  # mlx-lm computes one token too many
        logits = torch.from_numpy(np.array(logprobs.astype(mx.float32)))
        return mx.array(decoding.choose(logits, uniform).numpy().astype(np.int32))

    return draw
