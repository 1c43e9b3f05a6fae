"""Guide a model by the difference that steering makes: more of it than steering itself gives.

z (V,) are the model's logits of the next token, z′ those of the same model steered, or of another
model, w the weight, as in classifier-free guidance:

    z + w (z′ − z)

w = 0 is the model itself, bit for bit, w = 1 steering (or the other model), and w > 1 goes on
beyond it. Both streams read the same tokens, those that are chosen, each with its own cache.

- :func:`guided` decodes prompts in batches: the streams are rows of one batch.
- :class:`Guidance` is a processor of logits for ``model.generate``.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation.logits_process import LogitsProcessor

from dsteer.activations.sites import site_order
from dsteer.data.tokens import Encoded, Tokenizer
from dsteer.data.types import PreferencePair, Prompt
from dsteer.errors import ConfigError, MeasurementError, ModelError
from dsteer.models.anatomy import Anatomy, evaluating, model_name, text_config
from dsteer.models.load import Model
from dsteer.models.pair import VOCABULARY_SLACK
from dsteer.progress import SILENT, Reporter
from dsteer.steering.arms import Arm, Steering
from dsteer.steering.conditions import Condition
from dsteer.steering.decode import MEMORY, Decoding, Plain, Shared, run
from dsteer.steering.intervene import (
    CACHES,
    Intervention,
    Number,
    Operation,
    Positions,
    Schedule,
    Steered,
    Strength,
    interventions_of,
    uncompiled,
)
from dsteer.steering.rows import Stepping
from dsteer.steering.states import as_ids
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

Other = (
    Intervention | Sequence[Intervention] | SteeringVector | SteeringVectorSet | Tensor | nn.Module
)
"""What makes the second stream: anything that :func:`dsteer.steer` takes, or another model."""


def mix(
    plain: Float[Tensor, "*rows v"], other: Float[Tensor, "*rows u"], weight: Number
) -> Float[Tensor, "*rows v"]:
    """z + w (z′ − z), in float32 at least; exactly z at w = 0, and z′ at w = 1.

    Tokens that ``other`` lacks, and those that ``plain`` excludes (−∞), are excluded.
    """
    if weight == 0:
        return plain
    small = min(plain.shape[-1], other.shape[-1])
    wide = plain if plain.dtype.itemsize >= 4 else plain.float()
    z = wide[..., :small]
    mixed = torch.lerp(z, other[..., :small].to(z), weight)
    mixed = torch.where(z == -torch.inf, z, mixed)
    return nn.functional.pad(mixed, (0, wide.shape[-1] - small), value=-torch.inf)


@dataclass(frozen=True)
class GuidedResult:
    """What :func:`guided` returns.

    Attributes:
        weight: w.
        prompts: as they were given.
        texts: ``texts[j]``: the continuation alone of ``prompts[j]``.
        tokens: ``tokens[j]``: its ids.
        finished: ``finished[j]``: whether it ended by itself.
        fast: whether the fast path decoded them.
        note: why not, or None.
    """

    weight: float
    prompts: tuple[Any, ...]
    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    finished: tuple[bool, ...]
    fast: bool
    note: str | None


def guided(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt | PreferencePair] | Sequence[Encoded],
    what: Other | None,
    strength: Number = 1.0,
    *,
    weight: Number,
    max_new_tokens: int = 48,
    positions: Positions = "all",
    operation: Operation = "add",
    site: str | None = None,
    schedule: Schedule | None = None,
    relative: bool = False,
    when: Condition | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    template: str = "none",
    other_tokenizer: Tokenizer | None = None,
    memory: int = MEMORY,
    fast: bool | None = None,
    reporter: Reporter = SILENT,
) -> GuidedResult:
    """Continue every prompt under z + w (z′ − z), both streams of all prompts batched together.

    The ids equal those of two passes a token, one plain and one steered, whose logits are mixed,
    but where the two most likely tokens are closer than rounding. A model that the fast path can't
    decode is decoded by ``generate``, with a row a stream.

    Args:
        model: the language model, of which z are the logits.
        tokenizer: its tokenizer.
        prompts: texts (tokenised as they stand), message lists (through the template), pairs (their
            prompt), or ids.
        what: what :func:`dsteer.steer` takes, or another model of the same vocabulary, say the
            tuned one. A text also ends where that model would end it.
        strength: λ of the steering.
        weight: w.
        max_new_tokens: at most so many tokens a text.
        positions: which tokens are steered.
        operation: ``add`` (default), ``ablate``, ``scale``, ``noise`` or ``project``.
        site: where; default: the vector's own.
        schedule: how λ changes over the generated tokens.
        relative: of ``add``: λ is a fraction of each state's own norm.
        when: guide only the prompts that meet this condition; others are continued plainly.
        temperature: 0: greedy.
        top_p: of sampling.
        seed: of sampling, the draws being those of :func:`dsteer.sweep`, and of ``noise``, which
            all prompts share.
        stop: a text ends before this string, or before the first of several.
        template: ``chat`` puts texts through the chat template.
        other_tokenizer: of another model, to be compared with the first.
        memory: bytes that cached keys, values and logits may take.
        fast: False decodes by ``generate``; True refuses to; None does what a probe says.
        reporter: shows progress.

    Raises:
        DataError: no prompts, or some that can't be encoded or don't fit the model.
        ConfigError: settings of steering that don't go together, or beside another model.
        MeasurementError: a weight or strength that is not finite, or values by row.
        ModelError: vectors of another width; another model that is the same, or of another
            vocabulary; ``fast=True`` and a model that can't be decoded that way.
    """
    w = _finite(weight)
    settings = _settings(what, strength, positions, operation, site, schedule, relative, when)
    ready = as_ids(model, tokenizer, prompts, max_new_tokens, template)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    decoding = Decoding(max_new_tokens, temperature, top_p, seed, stops)
    shared: Shared
    plain: Plain
    if isinstance(what, nn.Module):
        _require_one_vocabulary(model, what, tokenizer, other_tokenizer)
        second = Shared(what, Steering.none(1), decoding, tokenizer)
        shared = _SharedModels(model, decoding, tokenizer, second, w)
        plain = _PlainModels(model, decoding, tokenizer, second, w)
        if ready:
            second.require_room(ready)
        memory = memory // 2
    else:
        of_noise = seed if operation == "noise" else 0
        steering = _Streams.of(interventions_of(what, **settings, seed=of_noise))
        shared = _SharedStreams(model, steering, decoding, tokenizer)
        plain = _PlainStreams(model, steering, decoding, tokenizer)
        shared.weight = plain.weight = w
    with evaluating(what) if isinstance(what, nn.Module) else contextlib.nullcontext():
        decoded = run(
            shared, plain, ready, memory=memory, fast=fast, reporter=reporter, label="guided"
        )
    return GuidedResult(
        weight=w,
        prompts=tuple(prompts),
        texts=decoded.texts[0],
        tokens=decoded.tokens[0],
        finished=decoded.finished[0],
        fast=decoded.fast,
        note=decoded.note,
    )


class Guidance(LogitsProcessor):  # type: ignore[misc]
    """Guides ``model.generate`` while the ``with`` block runs: one of its ``logits_processor``.

    ::

        with dsteer.Guidance(model, vector, 1.0, weight=2.0) as guidance:
            model.generate(**inputs, logits_processor=[guidance])

    After each of the model's own passes the second stream repeats it, with the same arguments and
    a cache of its own, steered or through the other model. Processors that ``generate`` makes from
    its settings (a repetition penalty, say) run before, on z; what samples (temperature, top-p)
    after. For many prompts :func:`guided` is faster.

    Args:
        model: the language model, of which z are the logits.
        what: what :func:`dsteer.steer` takes, or another model of the same vocabulary.
        strength: λ, one number or one a row of the batch; for a set also by site.
        weight: w.
        positions: which tokens are steered.
        operation: ``add`` (default), ``ablate``, ``scale``, ``noise`` or ``project``.
        site: where; default: the vector's own.
        schedule: how λ changes over the generated tokens.
        relative: of ``add``: λ is a fraction of each state's own norm.
        seed: of ``noise``.
        when: guide only the rows whose prompt meets this condition.

    Raises:
        ModelError: a model or vectors that don't suit; while it runs, also passes that the second
            stream can't repeat: beams, assistants, caches that were filled before.
        ConfigError: settings that don't go together, or beside another model.
        MeasurementError: a weight or strength that is not finite.
    """

    def __init__(
        self,
        model: Model,
        what: Other | None,
        strength: Strength | dict[str, Strength] = 1.0,
        *,
        weight: Number,
        positions: Positions = "all",
        operation: Operation = "add",
        site: str | None = None,
        schedule: Schedule | None = None,
        relative: bool = False,
        seed: int | Sequence[int] = 0,
        when: Condition | None = None,
    ) -> None:
        self.weight = _finite(weight)
        settings = _settings(what, strength, positions, operation, site, schedule, relative, when)
        self._model = model
        # An adapter's generate calls the model inside it.
        self._module = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._other: Model = self._module
        self._steered: Steered | None = None
        if isinstance(what, nn.Module):
            if Anatomy.of(model).encoder is not None:
                raise ModelError(
                    f"{model_name(model)} has an encoder, whose states the other model would read "
                    "as its own; expected decoder-only models"
                )
            _require_one_vocabulary(model, what)
            self._other = what
        else:
            self._steered = Steered(model, interventions_of(what, **settings, seed=seed))
        self._stack = contextlib.ExitStack()
        self._first: object = None  # the model's cache
        self._own: Any = None  # and the second stream's
        self._read: Tensor | None = None  # what the second stream has read; None: embeddings
        self._logits: Tensor | None = None
        self._running = self._fresh = False

    def __enter__(self) -> Guidance:
        with contextlib.ExitStack() as stack:
            stack.enter_context(uncompiled(self._model))
            for handle in (
                self._module.register_forward_pre_hook(self._before, with_kwargs=True),
                self._module.register_forward_hook(self._after, with_kwargs=True),
            ):
                stack.callback(handle.remove)
            stack.callback(self._forget)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def __call__(
        self, input_ids: Int[Tensor, "b t"], scores: Float[Tensor, "b v"]
    ) -> Float[Tensor, "b v"]:
        """The scores (B, V) of the next tokens, mixed with those of the second stream."""
        if self._logits is None:
            raise ModelError(
                f"{model_name(self._model)} made no pass since its last token, so there is nothing "
                "to guide by; call generate of this model, inside the with block"
            )
        if self._read is not None and not torch.equal(self._read, input_ids):
            raise ModelError(
                "the rows of generate are not those that its passes read (beam search reorders "
                "them, an assistant takes tokens back); expected num_beams=1 and no assistant"
            )
        other, self._logits = self._logits, None
        return mix(scores, other.to(scores), self.weight)

    def _forget(self) -> None:
        """Keep nothing of passes."""
        self._first = self._own = self._read = self._logits = None

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin a cache where the model begins one."""
        if self._running:
            return
        if args:
            raise ModelError(
                f"{model_name(self._model)} was called with positional arguments while it is "
                "guided; expected those of generate, by name"
            )
        cache = _cache_of(kwargs)
        if cache is not None and cache is self._first:
            return
        if cache is not None and not _is_empty(cache):
            raise ModelError(
                f"this pass continues a {type(cache).__name__} that was filled before, which the "
                "second stream has not read; begin with the whole prompt"
            )
        same = self._other is self._module
        self._first, self._read = cache, None
        self._own = copy.deepcopy(cache) if same else None
        self._fresh = True

    def _after(
        self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Repeat a pass in the second stream."""
        if self._running:
            return
        again = {**kwargs, **{name: self._own for name in CACHES if name in kwargs}}
        device = Anatomy.of(self._other).device
        again = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in again.items()
        }
        self._running = True
        try:
            with self._steered or contextlib.nullcontext():
                repeated = self._other(**again)
        finally:
            self._running = False
        self._first, self._own = _cache_of(output), _cache_of(repeated)
        ids = kwargs.get("decoder_input_ids", kwargs.get("input_ids"))
        if self._fresh or self._read is None:
            self._read = ids
        elif ids is not None:
            self._read = torch.cat([self._read, ids], dim=1)
        self._fresh = False
        self._logits = repeated.logits[:, -1].float()


# ---------------------------------------------------------------------------------- steered


@dataclass(frozen=True, eq=False)
class _Streams(Steering):
    """Two arms: the model as it is, and steered by interventions at any sites."""

    what: tuple[Intervention, ...] = ()

    @classmethod
    def of(cls, what: Sequence[Intervention]) -> _Streams:
        """Check that interventions have one value for all rows.

        Raises:
            ConfigError: no interventions.
            MeasurementError: values by row.
        """
        if not what:
            raise ConfigError("no interventions to guide by; expected at least one")
        for one in what:
            by_row = {
                "vector": isinstance(one.vector, Tensor) and one.vector.ndim == 2,
                "strength": torch.as_tensor(one.strength).ndim > 0,
                "seed": not isinstance(one.seed, int),
            }
            named = next((name for name, is_by_row in by_row.items() if is_by_row), None)
            if named is not None:
                raise MeasurementError(
                    f"{one.site}: a {named} by row, and guided makes its own batches; expected one "
                    "for all (of Guidance it may be by row)"
                )
        first = min((one.site for one in what), key=site_order)  # up to there the streams are one
        arms = (Arm(torch.zeros(1), 0.0), Arm(torch.zeros(1), 1.0))
        return cls(first, arms, what=tuple(what))

    def interventions(self, rows: Sequence[int] | None = None) -> list[Intervention]:
        """What is done, one value a stream; or one a row, row i being of stream ``rows[i]``."""
        streams = range(2) if rows is None else rows
        return [
            replace(
                one,
                strength=[float(one.strength) * stream for stream in streams],  # type: ignore[arg-type]
                seed=[one.seed] * len(streams),  # type: ignore[list-item]
            )
            for one in self.what
        ]


class _SharedStreams(Shared):
    """The fast path with two rows a text."""

    streams = 2
    weight = 1.0

    def why_not(self, prompts: Sequence[Encoded]) -> str:
        if any(one.when is not None for one in self.steering.interventions()):
            return "a condition judges a row by all of its prompt, which the fast path parts"
        return super().why_not(prompts)

    def mixed(self, logits: Float[Tensor, "r v"]) -> Float[Tensor, "s v"]:
        return mix(logits[::2], logits[1::2], self.weight)


class _PlainStreams(Plain):
    """``generate`` with two rows a text, which get the same logits and so the same tokens."""

    streams = 2
    weight = 1.0

    def processors(self) -> list[LogitsProcessor]:
        return [_Mix(self.weight)]


@dataclass
class _Mix(LogitsProcessor):  # type: ignore[misc]
    """Mixes the logits of two rows each."""

    weight: float

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        return mix(scores[::2], scores[1::2], self.weight).repeat_interleave(2, 0)


# ---------------------------------------------------------------------------------- two models


class _SharedModels(Shared):
    """The fast path with a row a text in each of two models."""

    def __init__(
        self, model: Model, decoding: Decoding, tokenizer: Tokenizer, second: Shared, weight: float
    ) -> None:
        super().__init__(model, Steering.none(1), decoding, tokenizer)
        self._second, self._weight = second, weight
        self.ends |= second.ends

    def why_not(self, prompts: Sequence[Encoded]) -> str:
        if text_config(self.model.config) is text_config(self._second.model.config):
            return "both models have one config object"
        return super().why_not(prompts) or self._second.why_not(prompts)

    def open(self, texts: Sequence[Sequence[int]], arms: Sequence[int]) -> Stepping:
        return _Both(super().open(texts, arms), self._second.open(texts, arms), self._weight)


class _Both:
    """Rows of two models that read the same tokens."""

    def __init__(self, plain: Stepping, other: Stepping, weight: float) -> None:
        self._plain, self._other, self._weight = plain, other, weight
        self.n_prompts, self.last_ids = plain.n_prompts, plain.last_ids
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Both:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._plain)
            stack.enter_context(self._other)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def step(self, ids: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        logits = self._other.step(ids.to(self._other.last_ids.device))
        return mix(self._plain.step(ids), logits, self._weight)

    def keep(self, prompts: Int[Tensor, " q"], rows: Int[Tensor, " r"]) -> None:
        self._plain.keep(prompts, rows)
        self._other.keep(prompts, rows)
        self.n_prompts = self._plain.n_prompts


class _PlainModels(Plain):
    """``generate`` of one model, guided by another."""

    def __init__(
        self, model: Model, decoding: Decoding, tokenizer: Tokenizer, second: Shared, weight: float
    ) -> None:
        super().__init__(model, Steering.none(1), decoding, tokenizer)
        self._guidance = Guidance(model, second.model, weight=weight)
        self.ends |= second.ends

    def processors(self) -> list[LogitsProcessor]:
        return [self._guidance]

    def changing(self, _arms: Sequence[int]) -> contextlib.AbstractContextManager[object]:
        return self._guidance


def _require_one_vocabulary(
    model: Model,
    other: Model,
    tokenizer: Tokenizer | None = None,
    other_tokenizer: Tokenizer | None = None,
) -> None:
    """Check that two models are two, and that an id is the same token in both.

    Raises:
        ModelError: they are one, or their vocabularies differ.
    """
    names = model_name(model), model_name(other)
    if other is model:
        raise ModelError(
            f"{names[0]} is guided by itself, which does nothing; give another model, or a vector"
        )
    sizes = [int(text_config(each.config).vocab_size) for each in (model, other)]
    if other_tokenizer is not None and tokenizer is not None:
        own, theirs = (
            {number: token for token, number in each.get_vocab().items() if number < min(sizes)}
            for each in (tokenizer, other_tokenizer)
        )
        for number in sorted(own.keys() & theirs.keys()):
            if own[number] != theirs[number]:
                raise ModelError(
                    f"id {number} is {own[number]!r} in the tokenizer of {names[0]} and "
                    f"{theirs[number]!r} in that of {names[1]}; expected one vocabulary"
                )
    elif max(sizes) - min(sizes) > VOCABULARY_SLACK * max(sizes):
        raise ModelError(
            f"{names[0]} has {sizes[0]} tokens, and {names[1]} {sizes[1]}; expected one vocabulary "
            "(of guided, other_tokenizer shows it)"
        )


# ---------------------------------------------------------------------------------- settings


def _settings(
    what: Any,
    strength: Any,
    positions: Positions,
    operation: Operation,
    site: str | None,
    schedule: Schedule | None,
    relative: bool,
    when: Condition | None,
) -> dict[str, Any]:
    """The settings of :func:`dsteer.steer`; none may be given beside another model.

    Raises:
        ConfigError: one is.
    """
    settings = {
        "strength": strength,
        "positions": positions,
        "operation": operation,
        "site": site,
        "schedule": schedule,
        "relative": relative,
        "when": when,
    }
    given = (1.0, "all", "add", None, None, False, None)
    if isinstance(what, nn.Module):
        for (name, value), default in zip(settings.items(), given, strict=True):
            if not (type(value) is type(default) and value == default):
                raise ConfigError(
                    f"{name} {value!r} beside another model, which is not steered; set the weight"
                )
    return settings


def _finite(weight: Number) -> float:
    if not math.isfinite(weight):
        raise MeasurementError(f"weight {weight}: expected a finite number")
    return float(weight)


def _cache_of(holder: Any) -> Any:
    """The cache among the arguments of a call, or in what it returned."""
    return next((holder.get(name) for name in CACHES if holder.get(name) is not None), None)


def _is_empty(cache: Any) -> bool:
    with contextlib.suppress(AttributeError, ValueError):  # a recurrent state has no length
        return int(cache.get_seq_length()) == 0
    return isinstance(cache, Cache) and not cache.has_previous_state()
