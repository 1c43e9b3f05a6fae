"""Change an mlx-lm model's states while it runs, and guide it by the difference that makes.

The operations, positions and schedules are those of :mod:`dsteer.steering.intervene`.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from importlib import import_module
from typing import Any

import mlx.core as mx
import numpy as np
import torch

from dsteer.activations.sites import resolve_sites
from dsteer.errors import ConfigError, MeasurementError, ModelError, did_you_mean
from dsteer.geometry.displacement import as_matrix, as_numbers, as_vector
from dsteer.mlx.anatomy import Anatomy, Module, around, state_in, with_state
from dsteer.steering.intervene import (
    Intervention,
    Operation,
    Placement,
    Positions,
    Schedule,
    Strength,
    normals,
)
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

_GENERATION: Any = import_module("mlx_lm.generate")  # mlx_lm.generate is the function of that name
_GENERATE_STEP = _GENERATION.generate_step
_KNOWN = frozenset(
    {"site", "vector", "operation", "strength", "schedule", "relative", "positions", "seed"}
)
_OPERATIONS = frozenset({"add", "ablate", "scale", "noise", "project"})

# ---------------------------------------------------------------------------------- arithmetic


def operate(
    state: mx.array,
    operation: Operation,
    vector: mx.array | None,
    strength: mx.array,
    selected: mx.array,
    *,
    relative: bool = False,
    noise: mx.array | None = None,
) -> mx.array:
    """Change the selected states of a batch, as :func:`dsteer.steering.intervene.operate` does.

    The arithmetic is in float32, and the result in the state's dtype. States that are not selected,
    or whose strength is 0, keep every bit.

    Args:
        state: (B, T, d).
        operation: what is done.
        vector: (1, d) or (B, d); None for ``scale``.
        strength: s, broadcast to (B, T).
        selected: which states are changed, broadcast to (B, T).
        relative: of ``add``: s is a fraction of the state's norm.
        noise: ε (B, T, d), of ``noise``.
    """
    h = state.astype(mx.float32)
    s = strength[..., None]
    if vector is None:
        steered = h * (1 + s)
    else:
        v = vector[:, None]
        norm = mx.linalg.norm(v, axis=-1, keepdims=True)
        if noise is not None:
            steered = h + s * norm / mx.linalg.norm(noise, axis=-1, keepdims=True) * noise
        elif operation != "add":
            unit = v / norm
            along = (h * unit).sum(axis=-1, keepdims=True)
            wanted = norm if operation == "project" else 0.0
            steered = h + s * (wanted - along) * unit
        elif relative:
            steered = h + s * mx.linalg.norm(h, axis=-1, keepdims=True) * (v / norm)
        else:
            steered = h + s * v
    return mx.where(selected[..., None] & (s != 0), steered.astype(state.dtype), state)


class _Applied:
    """An intervention made ready for states of MLX."""

    def __init__(self, what: Intervention, anatomy: Anatomy) -> None:
        for field in fields(what):
            if field.name not in _KNOWN and getattr(what, field.name) != field.default:
                raise ConfigError(
                    f"{field.name}: MLX models can't be steered with it; leave it out"
                )
        if what.operation not in _OPERATIONS:
            raise ConfigError(
                f"operation {what.operation!r}: none for MLX models"
                f"{did_you_mean(what.operation, _OPERATIONS)}"
            )
        resolve_sites(what.site, anatomy.n_blocks)
        self.what = what
        self._strengths = _strengths(what.strength)
        self._seeds = np.array([what.seed] if isinstance(what.seed, int) else list(what.seed))
        self._vectors = None
        if what.vector is not None:
            vectors = _vectors(what.vector, what.site)
            if vectors.shape[1] != anatomy.width:
                raise ModelError(
                    f"{what.site}: the vector has width {vectors.shape[1]}, and the states of "
                    f"{type(anatomy.model).__name__} {anatomy.width}; it is of another model"
                )
            self._vectors = mx.array(vectors.astype(np.float32))

    def __call__(self, state: mx.array, at: Placement, acting: np.ndarray) -> mx.array:
        """The state with this done to the rows that it acts on.

        Args:
            state: (B, T, d).
            at: where its tokens stand.
            acting: (B,), whether each row is steered at all.
        """
        what = self.what
        mask = at.mask(what.positions).numpy() & acting[:, None]
        if not mask.any():
            return state
        strength = self._strengths[self._index(self._strengths, "strength", at)][:, None]
        if what.schedule is not None:
            strength = strength * what.schedule.at(at.steps).numpy()
        vectors, noise = self._vectors, None
        if vectors is not None and len(vectors) > 1:
            vectors = vectors[mx.array(self._index(vectors, "vector", at))]
        if what.operation == "noise":
            seeds, rows = self._index(self._seeds, "seed", at), _rows(at)
            own = rows if len(self._seeds) == 1 else np.zeros_like(rows)
            drawn = normals(
                torch.from_numpy(self._seeds[seeds]),
                torch.from_numpy(own),
                at.index,
                state.shape[-1],
            )
            noise = mx.array(drawn.numpy())
        return operate(
            state,
            what.operation,
            vectors,
            mx.array(strength.astype(np.float32)),
            mx.array(mask),
            relative=what.relative,
            noise=noise,
        )

    def _index(self, values: Any, name: str, at: Placement) -> np.ndarray:
        """Which of some values, one or one a row of the batch, each row of the pass takes."""
        rows = _rows(at)
        if len(values) == 1:
            return np.zeros_like(rows)
        if len(values) != rows.max() + 1:
            raise ModelError(
                f"{self.what.site}: {len(values)} values of {name}, one a row, and a batch of "
                f"{rows.max() + 1} rows; give one a row of the batch"
            )
        return rows


def _rows(at: Placement) -> np.ndarray:
    return np.arange(len(at.index)) if at.rows is None else at.rows.numpy()


def _strengths(strength: Strength) -> np.ndarray:
    """float64 (1,) or (rows,)."""
    number = isinstance(strength, float | int) or (
        isinstance(strength, torch.Tensor) and strength.ndim == 0
    )
    return as_numbers([float(strength)] if number else strength, "strength")  # type: ignore[arg-type]


def _vectors(vector: SteeringVector | torch.Tensor, site: str) -> np.ndarray:
    """float64 (1, d) or (rows, d)."""
    if isinstance(vector, SteeringVector):
        return vector.tensor.numpy()[None]
    name = f"vector at {site}"
    return as_matrix(vector, name) if vector.ndim == 2 else as_vector(vector, name)[None]


# ---------------------------------------------------------------------------------- a model


class Steering:
    """Interventions on a model, and where the tokens of its passes stand. See :func:`steer`.

    Attributes:
        anatomy: the model's parts.
        prompt_lengths: p, the tokens that are prompt, one number or one a row; None: not known.
    """

    def __init__(
        self,
        model: Module,
        interventions: Sequence[Intervention],
        prompt_lengths: int | Sequence[int] | None,
        every: int = 1,
    ) -> None:
        self.anatomy = Anatomy.of(model)
        self.prompt_lengths = prompt_lengths
        self._every = every  # of so many rows, the last is steered
        self._applied = [_Applied(what, self.anatomy) for what in interventions]
        self._placement: Placement | None = None
        self._seen: tuple[Any, int] = (None, 0)  # a recurrent cache, and the tokens it has read
        self._ran: set[str] = set()

    @property
    def sites(self) -> tuple[str, ...]:
        """Where states are changed."""
        return tuple(dict.fromkeys(applied.what.site for applied in self._applied))

    def set_strength(self, strength: Strength, site: str | None = None) -> None:
        """Give what acts at a site, or all, another strength from the next pass on.

        Raises:
            ConfigError: nothing acts at the site.
            MeasurementError: not finite.
        """
        if site is not None and site not in self.sites:
            raise ConfigError(f"site {site!r}: nothing acts there{did_you_mean(site, self.sites)}")
        self._applied = [
            _Applied(replace(applied.what, strength=strength), self.anatomy)
            if site in (None, applied.what.site)
            else applied
            for applied in self._applied
        ]

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Steer while the block runs."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_listen(self))
            stack.enter_context(around(self.anatomy.decoder, self._pass))
            for site in self.sites:
                stack.enter_context(around(self.anatomy.site(site), self._at(site)))
            yield

    def told(self, new: int, cache: Any) -> None:
        """Note that a generation begins whose prompt is what a cache holds and so many tokens."""
        self.prompt_lengths = int(self._past(cache)[0]) + new

    def _pass(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        """One pass through the decoder."""
        kind = type(self.anatomy.decoder).dsteer_kind
        bound = inspect.signature(kind.__call__).bind(None, *args, **kwargs).arguments
        given = bound.get("input_embeddings")
        inputs = next(value for value in list(bound.values())[1:] if value is not None)
        batch, columns = (inputs if given is None else given).shape[:2]
        self._placement = self._place(batch, columns, bound.get("cache"))
        self._ran = set()
        try:
            output = call(*args, **kwargs)
        finally:
            self._placement = None
        silent = [site for site in self.sites if site not in self._ran]
        if silent:
            raise ModelError(f"{silent[0]}: its module did not run, so it can't be steered")
        return output

    def _at(self, site: str) -> Any:
        def change(call: Any, *args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            at = self._placement
            if at is None:
                raise ModelError(
                    f"{site}: its module ran outside a pass through the model; call the whole "
                    "model while it is steered"
                )
            if site in self._ran:
                raise ModelError(f"{site}: its module ran twice in one pass; expected once")
            self._ran.add(site)
            state = state_in(output)
            acting = np.arange(len(at.index)) % self._every == self._every - 1
            for applied in self._applied:
                if applied.what.site == site:
                    state = applied(state, at, acting)
            return with_state(output, state)

        return change

    def _place(self, batch: int, columns: int, cache: Any) -> Placement:
        past = self._past(cache)
        index = np.broadcast_to(past[:, None] + np.arange(columns), (batch, columns))
        self._seen = (_first(cache), int(past[0]) + columns)
        given, rows = self.prompt_lengths, torch.arange(batch) // self._every
        if given is None and _first(cache) is None:  # all that there is, in one pass
            given = columns
        lengths = None
        if given is not None:
            own = torch.as_tensor(given).reshape(-1)
            if len(own) not in (1, int(rows[-1]) + 1):
                raise ModelError(
                    f"{len(own)} prompt lengths for a batch of {int(rows[-1]) + 1} rows; give one "
                    "a row"
                )
            lengths = own.expand(batch) if len(own) == 1 else own[rows]
        return Placement(torch.from_numpy(np.maximum(index, -1)), lengths, rows)

    def _past(self, cache: Any) -> np.ndarray:
        """How many tokens a cache holds, (1,) or (B,); below 0 where padding comes first."""
        first = _first(cache)
        if first is None:
            return np.zeros(1, dtype=np.int64)
        if hasattr(first, "offset"):
            return np.atleast_1d(np.array(first.offset, dtype=np.int64))
        if first.empty():
            return np.zeros(1, dtype=np.int64)
        if self._seen[0] is not first:
            raise ModelError(
                "this pass continues a recurrent state whose prompt was not seen, so the place of "
                "its tokens is not known; begin with the prompt"
            )
        return np.array([self._seen[1]])


def _first(cache: Any) -> Any:
    """The first part of a cache that tells how many tokens it holds, else its first part."""
    parts = [part for one in cache or () for part in getattr(one, "caches", (one,))]
    parts = [part for part in parts if part is not None]
    return next((part for part in parts if hasattr(part, "offset")), parts[0] if parts else None)


_listening: list[Steering] = []


@contextlib.contextmanager
def _listen(steering: Steering) -> Iterator[None]:
    """Learn how long the prompt is whenever mlx-lm generates with the model.

    mlx-lm reads a prompt in several passes, the last of them one token long as those of generated
    tokens are, so the passes do not tell where it ends.
    """
    if not _listening:
        _GENERATION.generate_step = _telling
    _listening.append(steering)
    try:
        yield
    finally:
        _listening.remove(steering)
        if not _listening:
            _GENERATION.generate_step = _GENERATE_STEP


def _telling(prompt: mx.array, model: Module, *args: Any, **kwargs: Any) -> Any:
    embeddings = kwargs.get("input_embeddings")
    for steering in _listening:
        if steering.anatomy.model is model:
            new = len(prompt if embeddings is None else embeddings)
            steering.told(new, kwargs.get("prompt_cache"))
    return _GENERATE_STEP(prompt, model, *args, **kwargs)


@contextlib.contextmanager
def steer(
    model: Module,
    what: Intervention
    | Sequence[Intervention]
    | SteeringVector
    | SteeringVectorSet
    | torch.Tensor
    | mx.array
    | None,
    strength: Strength | Mapping[str, Strength] = 1.0,
    positions: Positions = "all",
    *,
    operation: Operation = "add",
    site: str | None = None,
    schedule: Schedule | None = None,
    relative: bool = False,
    seed: int | Sequence[int] = 0,
    prompt_lengths: int | Sequence[int] | None = None,
) -> Iterator[Steering]:
    """Steer an mlx-lm model while the ``with`` block runs: ``mlx_lm.generate``, or any pass.

    ``mlx_lm.generate`` and ``mlx_lm.stream_generate`` tell by themselves where a prompt ends,
    however many passes it is read in; what a prompt cache holds counts as prompt. A pass without a
    cache is all prompt. Elsewhere ``prompt_lengths`` tells it, and is needed for every position but
    ``all`` and windows, and for schedules. ``mlx_lm.batch_generate`` reads ``all`` alone.

    Args:
        model: what :func:`dsteer.mlx.load` returns, quantised or not.
        what: a steering vector, a set of them, an array (d,) or (rows, d) with ``site``, None for
            ``scale``, or interventions, which carry their own settings.
        strength: s, one number or one a row of the batch; of a set also a mapping from site to
            strength, which steers those sites alone. ``set_strength`` of what the block is given
            changes it.
        positions: the tokens that are steered, see :data:`dsteer.steering.intervene.Positions`.
        operation: ``add``, ``ablate``, ``scale``, ``noise`` or ``project``.
        site: where; default: the vector's own.
        schedule: factors of s over the generated steps.
        relative: of ``add``: s is a fraction of each state's own norm.
        seed: of ``noise``: one number, or one a row of the batch.
        prompt_lengths: p, one number or one a row.

    Raises:
        ModelError: no mlx-lm model, a vector of another width, values a row for another number of
            rows, or a prompt's length that is needed and not known.
        ConfigError: an unknown site, operation or position, or settings that don't go together.
        MeasurementError: a vector or strength that is malformed or not finite.
    """
    interventions = interventions_of(
        what,
        site,
        strength,
        positions=positions,
        operation=operation,
        schedule=schedule,
        relative=relative,
        seed=seed,
    )
    steering = Steering(model, interventions, prompt_lengths)
    with steering.acting():
        yield steering


def interventions_of(
    what: Any, site: str | None, strength: Any, **settings: Any
) -> list[Intervention]:
    """What :func:`steer` was given, as interventions."""
    given = [what] if isinstance(what, Intervention) else what
    if isinstance(given, list | tuple) and all(isinstance(item, Intervention) for item in given):
        return list(given)
    if isinstance(what, mx.array):
        what = torch.from_numpy(np.array(what.astype(mx.float32)))
    if isinstance(what, SteeringVectorSet):
        by_site = strength if isinstance(strength, Mapping) else None
        sites = by_site if by_site is not None else [site] if site else what
        for name in sites:
            if name not in what:
                raise ConfigError(
                    f"site {name!r}: the set holds no vector there{did_you_mean(name, what)}"
                )
        return [
            Intervention(
                site=name,
                vector=what[name],
                strength=strength if by_site is None else by_site[name],
                **settings,
            )
            for name in sites
        ]
    own = what.site if isinstance(what, SteeringVector) else None
    if site is None and own is None:
        raise ConfigError("an array does not say where it acts; give site='resid_post.K'")
    return [Intervention(site=site or own or "", vector=what, strength=strength, **settings)]


# ---------------------------------------------------------------------------------- guidance


class Guidance(Steering):
    """Steering of one of two rows, whose difference is what a model is guided by.

    Attributes:
        weight: w, which may be changed between passes.

    Raises:
        MeasurementError: a weight that is not finite.
    """

    def __init__(
        self,
        model: Module,
        interventions: Sequence[Intervention],
        weight: float,
        prompt_lengths: int | Sequence[int] | None,
    ) -> None:
        if not math.isfinite(weight):
            raise MeasurementError(f"guidance weight {weight}: expected a finite number")
        super().__init__(model, interventions, prompt_lengths, every=2)
        self.weight = weight

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Guide while the block runs."""
        with super().acting(), around(self.anatomy.model, self._both):
            yield

    def _both(self, call: Any, inputs: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """Logits of a pass whose rows stand twice, plain and steered, combined."""
        rows = len(inputs) * 2
        cache = args[0] if args else kwargs.get("cache")
        keys = getattr(_first(cache), "keys", None)
        keys = keys[0] if isinstance(keys, tuple | list) else keys  # of a quantised cache
        if keys is not None and keys.shape[0] != rows:
            raise ModelError(
                f"the prompt cache holds {keys.shape[0]} rows, and guidance needs {rows}, a plain "
                "and a steered one of each; fill it under guidance, or give none"
            )
        if kwargs.get("input_embeddings") is not None:
            kwargs["input_embeddings"] = mx.repeat(kwargs["input_embeddings"], 2, axis=0)
        logits = call(mx.repeat(inputs, 2, axis=0), *args, **kwargs)
        return mix(logits[0::2], logits[1::2], self.weight)


def mix(plain: mx.array, steered: mx.array, weight: float) -> mx.array:
    """z + w (z′ − z) in float32; z as it is at w = 0, and z′ at w = 1.

    Tokens that the plain model excludes (−∞) stay so.
    """
    if weight in (0, 1):
        return steered if weight else plain
    z = plain.astype(mx.float32)
    mixed: mx.array = z + weight * (steered.astype(mx.float32) - z)
    return mx.where(z == -mx.inf, z, mixed)


@contextlib.contextmanager
def guide(
    model: Module,
    what: Any,
    weight: float,
    strength: Strength | Mapping[str, Strength] = 1.0,
    positions: Positions = "all",
    *,
    prompt_lengths: int | Sequence[int] | None = None,
    **settings: Any,
) -> Iterator[Guidance]:
    """Guide a model by what steering changes: its logits are z_base + w (z_steered − z_base).

    Both are rows of one batch, each with its own part of one cache, so ``mlx_lm.generate`` and any
    sampler work as they are. w = 0 is the model as it is and w = 1 plain steering; above 1 the
    difference is exaggerated. A prompt cache that was filled here goes on only here.

    Args:
        model: what :func:`dsteer.mlx.load` returns.
        what: as of :func:`steer`, which has the other arguments too.
        weight: w; the attribute ``weight`` of what the block is given changes it.
        strength: s of the steered stream.
        positions: the tokens that are steered.
        prompt_lengths: p, where it is needed.
        settings: ``operation``, ``site``, ``schedule``, ``relative`` and ``seed``.

    Raises:
        MeasurementError: a weight that is not finite; else as :func:`steer`.
        ModelError: a prompt cache that was filled without guidance; else as :func:`steer`.
    """
    interventions = interventions_of(
        what, settings.pop("site", None), strength, positions=positions, **settings
    )
    guidance = Guidance(model, interventions, weight, prompt_lengths)
    with guidance.acting():
        yield guidance
