"""Decode prompts under many steering strengths at once.

A sweep is prompts × arms, an arm being a direction at a strength. One batch holds several prompts
with all their arms. The prompt but for its last token is read once a prompt, up to the steered
block; behind it once a row, if steering changes the prompt at all. Its keys and values stay where
they are, shared by the arms that have them in common, and each generated token attends to them
and to the row's own tokens, which have buffers of the final size. Rows that have ended go.

That needs a model whose attention can be replaced (transformers' attention interface). A probe
compares the fast path's logits with those of plain passes under the same hooks; a model that
fails it is decoded by ``generate``, prompts of one length at a time, and the result says so.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from dsteer.activations.batching import plan_batches
from dsteer.activations.reading import sample_weights
from dsteer.activations.sites import component_of
from dsteer.data.tokens import Encoded, Tokenizer, hash_ids
from dsteer.data.types import PreferencePair, Prompt
from dsteer.errors import ConfigError, DataError, MeasurementError, ModelError, StoreError
from dsteer.models.anatomy import Anatomy, evaluating, max_positions, text_config
from dsteer.models.load import Model
from dsteer.progress import SILENT, Reporter
from dsteer.steering.arms import FAILURES, Arm, Steering
from dsteer.steering.intervene import (
    Hooks,
    Number,
    Operation,
    Placement,
    Positions,
    Schedule,
    steer,
)
from dsteer.steering.rows import Rows, Stepping
from dsteer.steering.states import as_ids
from dsteer.steering.vector import SteeringVector
from dsteer.store import hash_json

MEMORY = 2**30
"""Bytes that cached keys, values and logits of a batch may take, unless told otherwise."""

_PROBE_TOKENS = 3
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_PROBE_TOLERANCE_HALF = 0.1
_ADAPTING_ROPE = frozenset({"dynamic", "longrope"})
_STEP_COLUMNS = 12_000
"""What a decoding step costs beside the columns that its rows attend to, in such columns."""

_STOP_EVERY = 8
"""Tokens between two searches for stop strings; what was decoded too far is cut."""

_SHRINK = 0.8
"""Finished rows are dropped when at most this share of the batch would stay."""


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: at most so many a row.
        temperature: 0 takes the most likely token; else tokens are drawn.
        top_p: draw from the smallest set of tokens that holds this probability.
        seed: of the draws. A row's draws depend on it and on the prompt's number alone, so all arms
            of a prompt share them, whatever the batches.
        stop: a text ends before the first of these strings.
    """

    max_new_tokens: int = 48
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise MeasurementError(f"max_new_tokens {self.max_new_tokens}: expected at least 1")
        if not 0 <= self.temperature < math.inf:
            raise MeasurementError(f"temperature {self.temperature}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise MeasurementError(f"top_p {self.top_p}: expected a probability above 0")
        if self.seed < 0:
            raise MeasurementError(f"seed {self.seed}: expected 0 or more")
        if "" in self.stop:
            raise MeasurementError(
                "stop holds an empty string, which ends every text; leave it out"
            )

    def draws(self, prompt: int) -> np.ndarray:
        """Uniform numbers (max_new_tokens,) of a prompt's rows."""
        return np.random.default_rng([self.seed, prompt]).random(self.max_new_tokens)

    def choose(
        self, logits: Float[Tensor, "r v"], uniform: Float[Tensor, " r"] | None
    ) -> Int[Tensor, " r"]:
        """The next token of each row: the first of the most likely, or by inverting the CDF."""
        if uniform is None:
            return logits.argmax(-1)
        p = (logits.cpu().double() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, index = p.sort(dim=-1, descending=True, stable=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            p = p.scatter(-1, index, ordered.masked_fill(beyond, 0.0))
        edges = p.cumsum(-1)
        found = torch.searchsorted(edges, uniform.double()[:, None] * edges[:, -1:], right=True)
        last = (p > 0).long().cumsum(-1).argmax(-1)  # the last token of any probability
        return torch.minimum(found[:, 0], last).to(logits.device)


@dataclass(frozen=True)
class Decoded:
    """The texts of a sweep.

    Attributes:
        tokens: ``tokens[arm][prompt]``, the continuation's ids, without EOS and what follows it.
        texts: ``texts[arm][prompt]``, the continuation alone, up to a stop string.
        finished: whether a continuation ended by itself (EOS or a stop string).
        fast: whether the fast path decoded them.
        note: why not, or None.
    """

    tokens: tuple[tuple[tuple[int, ...], ...], ...]
    texts: tuple[tuple[str, ...], ...]
    finished: tuple[tuple[bool, ...], ...]
    fast: bool
    note: str | None


def decode(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Encoded],
    steering: Steering,
    decoding: Decoding | None = None,
    *,
    memory: int = MEMORY,
    fast: bool | None = None,
    path: Path | None = None,
    reporter: Reporter = SILENT,
    label: str = "decoding",
) -> Decoded:
    """Decode every prompt under every arm, in shared batches.

    The ids equal those of ``model.generate`` under the same intervention, one strength at a time,
    but where the two most likely tokens are closer than rounding. Of the model's generation config
    only the ids that end a text are used.

    Args:
        model: a causal language model.
        tokenizer: turns ids into texts.
        prompts: token ids.
        steering: the arms.
        decoding: how tokens are chosen; default: greedy, 48 tokens.
        memory: bytes that cached keys, values and logits may take; more work takes more batches.
        fast: False decodes by ``generate``; True refuses to; None does what the probe says.
        path: a journal. Batches are added as they are done, and a call that was killed goes on
            behind the last one if everything that matters is the same.
        reporter: shows progress.
        label: what progress is called.

    Raises:
        DataError: no prompts, or prompts too long for the model.
        MeasurementError: no arms.
        ModelError: vectors of another width than the model's, or ``fast=True`` and the model can't
            be decoded that way.
        ConfigError: a site that the model lacks, or an operation that is none.
        StoreError: the journal can't be read or written, or ``path`` holds something else.
    """
    if not steering.arms:
        raise MeasurementError("there are no arms to decode; give at least one strength")
    settings = (model, steering, decoding or Decoding(), tokenizer)
    return run(
        Shared(*settings),
        Plain(*settings),
        prompts,
        memory=memory,
        fast=fast,
        path=path,
        reporter=reporter,
        label=label,
    )


def run(
    shared: Shared,
    generating: Plain,
    prompts: Sequence[Encoded],
    *,
    memory: int = MEMORY,
    fast: bool | None = None,
    path: Path | None = None,
    reporter: Reporter = SILENT,
    label: str = "decoding",
) -> Decoded:
    """Decode by one of two engines: the first where its probe agrees with the model, or the other.

    The arguments and what is raised are those of :func:`decode`.
    """
    engine: Shared | Plain = shared
    model, anatomy, steering, decoding = (
        engine.model, engine.anatomy, engine.steering, engine.decoding
    )  # fmt: skip
    if not prompts:
        raise DataError("there are no prompts to decode; give at least one")
    engine.require_room(prompts)
    Hooks(model, steering.interventions())  # raises where the arms don't fit
    plain = "it was asked for"
    with evaluating(model):
        if fast is not False:
            plain = shared.why_not(prompts)
            if plain and fast:
                raise ModelError(f"the fast path can't decode this model: {plain}")
        if plain:
            engine = generating
        batches = engine.plan(prompts, memory)
        identity = {
            "ids": hash_ids(prompts),
            "weights": sample_weights(model),
            "arms": hash_json([[a.vector.tolist(), a.strength] for a in steering.arms]),
            "steering": repr(replace(steering, arms=())),
            "decoding": repr(decoding),
            "ends": sorted(engine.ends),
            **({} if anatomy.start is None else {"decoder_start": list(anatomy.start)}),
            "fast": not plain,
            "batches": [[list(batch.prompts), list(batch.arms)] for batch in batches],
        }
        journal = _Journal(path, hash_json(identity))
        found: dict[tuple[int, int], _Row] = {}
        total = len(prompts) * len(steering.arms)
        with reporter.bar(label, total, unit="texts") as advance:
            for number, batch in enumerate(batches):
                rows = journal.read(number)
                if rows is None:
                    rows = engine.run(prompts, batch)
                    journal.add(number, rows)
                found |= {(row.arm, row.prompt): row for row in rows}
                advance(len(rows))
    table = [
        [found[arm, prompt] for prompt in range(len(prompts))] for arm in range(len(steering.arms))
    ]
    return Decoded(
        tokens=tuple(tuple(row.tokens for row in rows) for rows in table),
        texts=tuple(
            tuple(engine.stops.text(prompts[row.prompt], row.tokens) for row in rows)
            for rows in table
        ),
        finished=tuple(tuple(row.finished for row in rows) for rows in table),
        fast=not plain,
        note=f"Decoded by generate, not by the fast path: {plain}." if plain else None,
    )


@dataclass(frozen=True)
class SweepResult:
    """What :func:`sweep` returns.

    Attributes:
        strengths: the λ.
        prompts: as they were given.
        texts: ``texts[i][j]``: the continuation alone of ``prompts[j]`` at ``strengths[i]``.
        tokens: ``tokens[i][j]``: its ids.
        finished: ``finished[i][j]``: whether it ended by itself.
        fast: whether the fast path decoded them.
        note: why not, or None.
    """

    strengths: tuple[float, ...]
    prompts: tuple[Any, ...]
    texts: tuple[tuple[str, ...], ...]
    tokens: tuple[tuple[tuple[int, ...], ...], ...]
    finished: tuple[tuple[bool, ...], ...]
    fast: bool
    note: str | None


def sweep(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt | PreferencePair] | Sequence[Encoded],
    vector: SteeringVector | None,
    strengths: Sequence[Number],
    max_new_tokens: int = 48,
    *,
    operation: Operation = "add",
    site: str | None = None,
    positions: Positions = "all",
    schedule: Schedule | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    template: str = "none",
    memory: int = MEMORY,
    fast: bool | None = None,
    path: str | Path | None = None,
    reporter: Reporter = SILENT,
) -> SweepResult:
    """Continue every prompt at every strength of a steering vector, batched together.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompts: texts (tokenised as they stand), message lists (through the template), pairs (their
            prompt), or ids.
        vector: the direction and its site; None for ``scale``, which needs none.
        strengths: λ, in units of the vector; 0 is the model itself. Of ``scale`` s of (1 + s) h.
        max_new_tokens: at most so many tokens a text.
        operation: ``add`` (default), ``ablate``, ``scale``, ``noise`` or ``project``. ``scale``
            amplifies a layer and ``noise`` adds seeded noise as long as λv: what a vector does
            beyond them is its direction's.
        site: where; default: the vector's own.
        positions: which tokens are steered.
        schedule: how λ changes over the generated tokens.
        temperature: 0: greedy.
        top_p: of sampling.
        seed: of sampling, all strengths of a prompt sharing its draws, and of ``noise``, which all
            prompts share.
        stop: a text ends before this string, or before the first of several.
        template: ``chat`` puts texts through the chat template.
        memory: bytes that cached keys, values and logits may take.
        fast: see :func:`decode`.
        path: a journal file, so that a call that was killed goes on where it stopped.
        reporter: shows progress.

    Raises:
        ConfigError: no vector for an operation that needs one, or neither vector nor site.
        DataError: no prompts, or some that can't be encoded or don't fit the model.
        MeasurementError: no strengths, or settings of sampling that are none.
        ModelError: a vector of another width than the model's; see also :func:`decode`.
    """
    ready = as_ids(model, tokenizer, prompts, max_new_tokens, template)
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    decoding = Decoding(max_new_tokens, temperature, top_p, seed, stops)
    if vector is None and operation != "scale":
        raise ConfigError(f"operation {operation!r} without a vector; only 'scale' needs none")
    where = site or (None if vector is None else vector.site)
    if where is None:
        raise ConfigError("neither a vector nor a site; expected site='resid_post.K' for 'scale'")
    direction = torch.zeros(Anatomy.of(model).width) if vector is None else vector.tensor
    arms = tuple(Arm(direction, float(strength)) for strength in strengths)
    decoded = decode(
        model,
        tokenizer,
        ready,
        Steering(where, arms, operation, positions, schedule, seed),
        decoding,
        memory=memory,
        fast=fast,
        path=None if path is None else Path(path),
        reporter=reporter,
        label="sweep",
    )
    return SweepResult(
        strengths=tuple(float(strength) for strength in strengths),
        prompts=tuple(prompts),
        texts=decoded.texts,
        tokens=decoded.tokens,
        finished=decoded.finished,
        fast=decoded.fast,
        note=decoded.note,
    )


# ---------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class _Row:
    prompt: int
    arm: int
    tokens: tuple[int, ...]
    finished: bool


@dataclass(frozen=True)
class _Batch:
    """Prompts and arms that are decoded together, prompt by prompt."""

    prompts: tuple[int, ...]
    arms: tuple[int, ...]


def end_ids(model: Model, tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a text: those of the generation config and the tokenizer's EOS."""
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    ids = list(found) if isinstance(found, list | tuple) else [found]
    return frozenset(
        int(i) for i in (*ids, getattr(tokenizer, "eos_token_id", None)) if i is not None
    )


class _StopStrings:
    """Texts of continuations, and where a stop string ends them."""

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], joined: bool = True) -> None:
        self._tokenizer = tokenizer
        self._joined = joined  # a continuation goes on where the prompt ended
        self._stop = stop

    def text(self, prompt: Encoded, tokens: Sequence[int]) -> str:
        """The continuation alone; the prompt's end is decoded with it, for the sake of spaces."""
        before = list(prompt.ids[-4:]) if self._joined else []
        head = self._decode(before)
        whole = self._decode([*before, *tokens])
        text = whole[len(head) :] if whole.startswith(head) else self._decode(list(tokens))
        ends = [text.find(stop) for stop in self._stop if stop in text]
        return text[: min(ends)] if ends else text

    def end(self, tokens: Sequence[int], start: int) -> int | None:
        """How many tokens make up the first stop string's end; None if none is complete.

        Args:
            tokens: the continuation.
            start: tokens before it hold no stop string.
        """
        if not self._stop:
            return None
        reach = max(len(stop.encode()) for stop in self._stop)  # no token is shorter than a byte
        first = max(0, start - reach)
        if not self._found(tokens[first:]):
            return None
        return next(
            end for end in range(start + 1, len(tokens) + 1) if self._found(tokens[first:end])
        )

    def _found(self, tokens: Sequence[int]) -> bool:
        text = self._decode(list(tokens))
        return any(stop in text for stop in self._stop)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


class _Journal:
    """Finished batches, one line each, behind a line that says of what."""

    def __init__(self, path: Path | None, identity: str) -> None:
        self._path = path
        self._done: dict[int, list[_Row]] = {}
        if path is None:
            return
        try:
            held = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        except OSError as error:
            raise StoreError(f"{path}: can't read the journal ({error.strerror})") from None
        if held and not held.startswith('"'):
            raise StoreError(f"{path} is no journal of a sweep; remove it, or give another path")
        whole = [line for line in held.splitlines(keepends=True) if line.endswith("\n")]
        if whole and whole[0] == json.dumps(identity) + "\n":
            try:
                for line in whole[1:]:
                    number, rows = json.loads(line)
                    self._done[number] = [_Row(p, a, tuple(t), f) for p, a, t, f in rows]
            except (ValueError, TypeError):
                self._done, whole = {}, whole[:1]  # damaged: decode again
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(whole) if self._done else json.dumps(identity) + "\n"
            path.write_text(text, encoding="utf-8")  # a line that a kill cut off goes
        except OSError as error:
            raise StoreError(f"{path}: can't write the journal ({error.strerror})") from None

    def read(self, batch: int) -> list[_Row] | None:
        return self._done.get(batch)

    def add(self, batch: int, rows: Sequence[_Row]) -> None:
        if self._path is None:
            return
        line = json.dumps([batch, [[r.prompt, r.arm, r.tokens, r.finished] for r in rows]])
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Engine:
    """What both ways of decoding share.

    Attributes:
        streams: how many arms, one after another, write one text together.
    """

    streams = 1

    def __init__(
        self,
        model: Model,
        steering: Steering,
        decoding: Decoding,
        tokenizer: Tokenizer,
    ) -> None:
        self.model, self.anatomy = model, Anatomy.of(model)
        self.steering, self.decoding = steering, decoding
        self.ends = end_ids(model, tokenizer)
        self.stops = _StopStrings(tokenizer, decoding.stop, self.anatomy.encoder is None)

    def require_room(self, prompts: Sequence[Encoded]) -> None:
        """Raise a DataError where a prompt and its continuation don't fit the model."""
        limit, new = max_positions(self.model.config), self.decoding.max_new_tokens
        longest = max(len(item.ids) for item in prompts)
        if limit is not None and longest + new > limit:
            raise DataError(
                f"a prompt of {longest} tokens and {new} new ones exceed the {limit} that the "
                "model was made for; shorten the prompts or lower max_new_tokens"
            )

    def uniform(self, prompts: Sequence[int]) -> Float[Tensor, "r t"] | None:
        """The draws of some rows; None if decoding is greedy."""
        if self.decoding.temperature == 0:
            return None
        return torch.from_numpy(np.stack([self.decoding.draws(prompt) for prompt in prompts]))

    def rows(
        self, owners: Sequence[tuple[int, int]], tokens: Sequence[Sequence[int]]
    ) -> list[_Row]:
        """Rows of (prompt, arm), cut at EOS and at a stop string."""
        made = []
        for (prompt, arm), ids in zip(owners, tokens, strict=True):
            end = next((i for i, token in enumerate(ids) if token in self.ends), None)
            kept = list(ids if end is None else ids[:end])
            stop = self.stops.end(kept, 0)
            if stop is not None:
                kept = kept[:stop]
            made.append(_Row(prompt, arm, tuple(kept), end is not None or stop is not None))
        return made

    def columns(self, prompt: Encoded) -> int:
        """Memory of a row of a prompt, in tokens: keys and values, and its logits in float32."""
        logits = 4 * text_config(self.model.config).vocab_size // self.bytes_a_column()
        return int(len(prompt.ids) + self.decoding.max_new_tokens + logits)

    def bytes_a_column(self) -> int:
        """Memory of one token of one row: keys and values of all blocks.

        A recurrent model, which has none, counts as if it had some as wide as its states.
        """
        text = text_config(self.model.config)
        queries = getattr(text, "num_attention_heads", None) or 1
        heads = getattr(text, "num_key_value_heads", None) or queries
        width = getattr(text, "head_dim", None) or text.hidden_size // queries
        return int(2 * self.anatomy.n_blocks * heads * width * self.anatomy.dtype.itemsize)


# ---------------------------------------------------------------------------------- fast


class Shared(Engine):
    """The fast path."""

    def plan(self, prompts: Sequence[Encoded], memory: int) -> list[_Batch]:
        """Prompts of similar length together, as memory allows; arms split where they must."""
        arms = tuple(range(len(self.steering.arms)))
        columns = [self.columns(item) for item in prompts]
        budget = memory // self.bytes_a_column()
        batches: list[_Batch] = []
        for batch in plan_batches(columns, budget // len(arms), fixed=_STEP_COLUMNS / len(arms)):
            rows = len(arms)
            if len(batch.prompts) == 1:
                rows = max(1, budget // batch.length // self.streams) * self.streams
            batches += [
                _Batch(batch.prompts, arms[i : i + rows]) for i in range(0, len(arms), rows)
            ]
        return batches

    def open(self, texts: Sequence[Sequence[int]], arms: Sequence[int]) -> Stepping:
        """The rows of some prompts under some arms, which are read on entry."""
        capacity = self.decoding.max_new_tokens
        return Rows(self.model, self.anatomy, self.steering, capacity, texts, arms)

    def mixed(self, logits: Float[Tensor, "r v"]) -> Float[Tensor, "s v"]:
        """The logits of each text, of those of its streams."""
        return logits

    def why_not(self, prompts: Sequence[Encoded]) -> str:
        """Why this way can't decode the model, or an empty string."""
        return _why_plain(self, prompts)

    def run(self, prompts: Sequence[Encoded], batch: _Batch) -> list[_Row]:
        owners = [(prompt, arm) for prompt in batch.prompts for arm in batch.arms]
        tokens: list[list[int]] = [[] for _ in owners]
        uniform = self.uniform([prompt for prompt, _ in owners])
        live = list(range(len(owners)))  # the row that each row of the batch is
        done = torch.zeros(len(owners), dtype=torch.bool)
        checked = [0] * len(owners)
        capacity = self.decoding.max_new_tokens
        texts = [prompts[number].ids for number in batch.prompts]
        with self.open(texts, batch.arms) as rows:
            ids = rows.last_ids
            for step in range(capacity):
                logits = self.mixed(rows.step(ids))
                drawn = None if uniform is None else uniform[live[:: self.streams], step]
                ids = self.decoding.choose(logits, drawn).repeat_interleave(self.streams)
                for row, token in zip(live, ids.tolist(), strict=True):
                    if not done[row]:
                        tokens[row].append(token)
                        done[row] = token in self.ends
                if self.decoding.stop and step % _STOP_EVERY == _STOP_EVERY - 1:
                    for row in live:
                        if not done[row]:
                            done[row] = self.stops.end(tokens[row], checked[row]) is not None
                            checked[row] = len(tokens[row])
                if bool(done[live].all()):
                    break
                kept = _shrunk(done[live].view(rows.n_prompts, -1))
                if kept is not None:
                    rows.keep(*kept)
                    live = [live[row] for row in kept[1].tolist()]
                    ids = ids[kept[1].to(ids.device)]
        return self.rows(owners, tokens)


def _shrunk(done: Bool[Tensor, "p a"]) -> tuple[Int[Tensor, " q"], Int[Tensor, " r"]] | None:
    """Which prompts and rows to keep when enough have ended; None to go on as it is.

    The rows stay a rectangle, prompts × the largest number of live arms: prompts with fewer keep
    some rows that have ended.
    """
    live = (~done).sum(1)
    prompts = live.nonzero()[:, 0]
    arms = int(live.max())
    if len(prompts) * arms > _SHRINK * done.numel():
        return None
    order = done[prompts].long().argsort(dim=1, stable=True)[:, :arms]
    return prompts, (prompts[:, None] * done.shape[1] + order).reshape(-1)


def _why_plain(engine: Engine, prompts: Sequence[Encoded]) -> str:
    """Why the fast path can't decode a model, or an empty string: it is tried and compared."""
    if engine.anatomy.encoder is not None:
        return "an encoder-decoder model keeps two caches, of prompt and answer"
    if component_of(engine.steering.site) is not None:
        return "the site lies inside a block, where rows can't part"
    if _ADAPTING_ROPE & _rope_types(engine.model):
        return "its position embedding depends on the longest text of a batch"
    by_length = sorted(prompts, key=lambda item: len(item.ids))
    shortest, longest = by_length[0].ids, by_length[-1].ids
    new = engine.decoding.max_new_tokens
    steps = min(_PROBE_TOKENS, new)
    end = len(longest) + new - steps  # a window may hide the first tokens from the last ones only
    # The shortest comes twice, for some models decode a prompt alone, but none beside another.
    chosen = [shortest, (longest * (end // len(longest) + 1))[:end], shortest]
    arms = sorted({0, len(engine.steering.arms) - 1})
    owners = [(ids, arm) for ids in chosen for arm in arms]
    texts = [list(ids) for ids, _ in owners]
    try:
        with Rows(engine.model, engine.anatomy, engine.steering, steps, chosen, arms) as rows:
            found = [rows.step(rows.last_ids).float()]
            for _ in range(1, steps):
                tokens = found[-1].argmax(-1)
                for text, token in zip(texts, tokens.tolist(), strict=True):
                    text.append(token)
                found.append(rows.step(tokens).float())
    except (ModelError, *FAILURES) as error:
        return f"its attention can't be replaced ({str(error).splitlines()[0][:120]})"
    tolerance = _PROBE_TOLERANCE.get(engine.anatomy.dtype, _PROBE_TOLERANCE_HALF)
    for number, (text, (ids, arm)) in enumerate(zip(texts, owners, strict=True)):
        plain = _plain_logits(engine, text, arm, len(ids))
        fast = torch.stack([logits[number] for logits in found])
        gap = float((fast - plain).abs().max() / plain.abs().max())
        if gap <= tolerance:
            continue
        return f"its logits differ by {gap:.1e} of the largest from those of plain passes"
    return ""


def _rope_types(model: Model) -> set[object]:
    rope = getattr(text_config(model.config), "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, Mapping))]
    return {kind.get("rope_type") for kind in kinds}


def _plain_logits(
    engine: Engine, text: Sequence[int], arm: int, prompt_length: int
) -> Float[Tensor, "t v"]:
    """Logits from the prompt's last token on, in one pass without a cache, under the same hooks."""
    device = engine.anatomy.device
    with Hooks(engine.model, engine.steering.interventions()) as hooks:
        hooks.placement = Placement(
            torch.arange(len(text), device=device)[None],
            torch.tensor([prompt_length], device=device),
            torch.tensor([arm], device=device),
        )
        output = engine.model(input_ids=torch.tensor([text], device=device), use_cache=False)
        hooks.require_ran()
    logits: Tensor = output.logits[0, prompt_length - 1 :].float()
    return logits


# ---------------------------------------------------------------------------------- plain


class Plain(Engine):
    """``generate``, prompts of one length at a time, so that nothing is padded."""

    def plan(self, prompts: Sequence[Encoded], memory: int) -> list[_Batch]:
        order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), i))
        arms = tuple(range(len(self.steering.arms)))
        batches = []
        for columns, same in groupby(order, key=lambda i: self.columns(prompts[i])):
            # generate copies keys and values as they grow
            rows = memory // (2 * self.bytes_a_column() * columns)
            rows = max(1, rows // self.streams) * self.streams
            numbers = list(same)
            count = max(1, rows // len(arms))
            for start in range(0, len(numbers), count):
                for first in range(0, len(arms), rows):
                    batches.append(
                        _Batch(tuple(numbers[start : start + count]), arms[first : first + rows])
                    )
        return batches

    def processors(self) -> list[LogitsProcessor]:
        """What changes the logits before a token is chosen."""
        return []

    def changing(self, arms: Sequence[int]) -> contextlib.AbstractContextManager[object]:
        """What changes the model while ``generate`` runs with a row for each of some arms."""
        return steer(self.model, self.steering.interventions(arms))

    def run(self, prompts: Sequence[Encoded], batch: _Batch) -> list[_Row]:
        owners = [(prompt, arm) for prompt in batch.prompts for arm in batch.arms]
        ids = torch.tensor([prompts[p].ids for p, _ in owners], device=self.anatomy.device)
        start, begun = self.anatomy.start, ids
        decoder = {}
        if start is not None:
            begun = torch.tensor([start] * len(owners), device=self.anatomy.device)
            decoder = {"decoder_input_ids": begun}
        config = GenerationConfig(
            max_new_tokens=self.decoding.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=min(self.ends, default=0),
            disable_compile=True,
            decoder_start_token_id=None if start is None else start[0],
        )
        uniform = self.uniform([prompt for prompt, _ in owners])
        drawn = LogitsProcessorList(self.processors())
        if uniform is not None:
            drawn.append(Draw(self.decoding, uniform, begun.shape[1]))
        arms = [arm for _, arm in owners]
        with generating(self.model, config), self.changing(arms):
            made = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                logits_processor=drawn,
                **decoder,
            )
        return self.rows(owners, made[:, begun.shape[1] :].tolist())


@contextlib.contextmanager
def generating(model: Model, config: GenerationConfig) -> Iterator[None]:
    """Make a config a model's own: one that is passed to ``generate`` takes the rest from there."""
    holders = [module for module in model.modules() if "generation_config" in vars(module)]
    before = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.generation_config = own


@dataclass
class Draw(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the token that was drawn."""

    decoding: Decoding
    uniform: Tensor
    start: int

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.decoding.choose(scores, self.uniform[:, input_ids.shape[1] - self.start])
        return torch.full_like(scores, -torch.inf).scatter(1, chosen[:, None], 0.0)
