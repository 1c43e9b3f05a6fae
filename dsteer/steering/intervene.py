"""Change a model's states while it runs: add a steering vector, take a direction out, and controls.

h is the state (d,) of one token at one site, v the vector (d,), v̂ = v/‖v‖, s the strength:

========  =========================  ==========================================================
add       h + s v                    s in units of v; relative: h + s ‖h‖ v̂, s in units of ‖h‖
ablate    h − s (h·v̂) v̂              s = 1 takes the direction out
scale     (1 + s) h                  needs no vector
noise     h + s ‖v‖ ε/‖ε‖            ε standard normal, seeded: a control of the same norm
project   h + s (‖v‖ − h·v̂) v̂        s = 1 moves the component along v̂ to that of v
========  =========================  ==========================================================

s = 0 leaves every state as it is, bit for bit.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.cache_utils import Cache

from dsteer.activations.capture import site_module
from dsteer.activations.sites import ENCODER, resolve_sites, site_order
from dsteer.errors import ConfigError, MeasurementError, ModelError, did_you_mean
from dsteer.geometry.displacement import as_matrix, as_numbers, as_vector
from dsteer.models.anatomy import Anatomy, model_name
from dsteer.models.load import Model, refuse_overflow
from dsteer.steering.conditions import Condition
from dsteer.steering.vector import SteeringVector, SteeringVectorSet

Operation = Literal["add", "ablate", "scale", "noise", "project"]

Positions = Literal["all", "prompt", "prompt_last", "generated"] | tuple[int, int]
"""The tokens that are steered, by their place i among a row's real tokens, of which p are prompt.

``all``; ``prompt``: i < p; ``prompt_last``: i = p − 1; ``generated``: i ≥ p − 1, for the state at
p − 1 produces the first new token; a window (a, b): a ≤ i < b. Padding is never steered.

In the decoder of an encoder-decoder model the start tokens are its prompt: ``prompt_last`` is the
last of them, from which the first answer token is produced. At ``encoder`` all tokens are prompt.
"""

CACHES = ("past_key_values", "cache_params")
"""What models call the argument that holds what they keep of earlier tokens."""

Number = float | int
Strength = Number | np.floating[Any] | np.integer[Any] | Sequence[Number] | Tensor
"""One number, of Python, numpy or torch, or one a row of the batch."""


@dataclass(frozen=True)
class Schedule:
    """How the strength changes with the generated step t = 0, 1, …; its factor is 1 at t = 0.

    Step t is at the state that produces new token t, so t = 0 at the last prompt token. Tokens
    before it have factor 1 too.

    Attributes:
        kind: ``constant``: 1; ``linear``: max(0, 1 − t/steps); ``exponential``: 2^(−t/half_life).
        steps: of ``linear``: the step from which the factor is 0.
        half_life: of ``exponential``: the steps in which the factor halves.

    Raises:
        ConfigError: an unknown kind, or a length that is missing, not its own, or not above 0.
    """

    kind: Literal["constant", "linear", "exponential"] = "constant"
    steps: Number | None = None
    half_life: Number | None = None

    def __post_init__(self) -> None:
        needs = {"constant": None, "linear": "steps", "exponential": "half_life"}
        if self.kind not in needs:
            raise ConfigError(
                f"schedule {self.kind!r}: no such kind{did_you_mean(self.kind, needs)}"
            )
        for name, length in (("steps", self.steps), ("half_life", self.half_life)):
            if name != needs[self.kind]:
                if length is not None:
                    raise ConfigError(f"a {self.kind} schedule has no {name} (got {length})")
            elif length is None or not 0 < length < math.inf:
                raise ConfigError(
                    f"a {self.kind} schedule with {name} {length}: expected a finite number above 0"
                )

    def at(self, steps: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The factors at generated steps, float32."""
        t = steps.clamp(min=0).float()
        if self.steps is not None:
            return (1 - t / self.steps).clamp(min=0)
        if self.half_life is not None:
            return torch.exp2(-t / self.half_life)
        return torch.ones_like(t)


@dataclass(frozen=True, eq=False)
class Intervention:
    """One change of the states at one site. Formulas: see the module.

    Attributes:
        site: ``resid_post.{k}``, ``final_norm`` or, of an encoder-decoder model, ``encoder``.
        vector: (d,), or (rows, d): one vector a row of the batch; None for ``scale``.
        operation: ``add``, ``ablate``, ``scale``, ``noise`` or ``project``.
        strength: s, one number or one a row of the batch.
        schedule: factors of s over the generated steps.
        relative: of ``add``: s is a fraction of each state's own norm.
        positions: the tokens that are changed, see :data:`Positions`.
        seed: of ``noise``. From one number row r draws its own noise, by r; with one a row a row
            keeps its noise wherever it stands in a batch.
        when: steer only the rows whose prompt meets this condition, read at or before the site as
            the pass reaches it; what acts before it there or earlier is part of what it sees. A row
            is judged by the pass that holds its whole prompt, and stays so in passes that continue
            it.

    Raises:
        ConfigError: an unknown operation or position, or settings that don't go together.
        MeasurementError: a vector or strength that is malformed or not finite, or a zero vector
            where its direction is needed.
    """

    site: str
    vector: SteeringVector | Tensor | None
    operation: Operation = "add"
    strength: Strength = 1.0
    schedule: Schedule | None = None
    relative: bool = False
    positions: Positions = "all"
    seed: int | Sequence[int] = 0
    when: Condition | None = None

    def __post_init__(self) -> None:
        if self.when is not None and site_order(self.when.site) > site_order(self.site):
            raise ConfigError(
                f"a condition at {self.when.site} for steering at {self.site}: it is read when "
                "steering is done; expected a site at or before the steered one"
            )
        if self.operation not in get_args(Operation):
            raise ConfigError(
                f"operation {self.operation!r}: no such operation"
                f"{did_you_mean(str(self.operation), get_args(Operation))}"
            )
        if (self.vector is None) != (self.operation == "scale"):
            raise ConfigError(
                f"operation {self.operation!r} with{'out' if self.vector is None else ''} a vector;"
                " expected one for every operation but 'scale'"
            )
        if self.relative and self.operation != "add":
            raise ConfigError(
                f"operation {self.operation!r} can't be relative; only 'add' measures its strength "
                "by the state's norm"
            )
        _check_positions(self.positions)
        if self.site == ENCODER and (self.positions == "generated" or self.schedule is not None):
            what = "a schedule" if self.schedule is not None else "positions 'generated'"
            raise ConfigError(
                f"{what} at site 'encoder': the encoder reads the prompt once and generates "
                "nothing; expected no schedule, and positions 'all', 'prompt', 'prompt_last' or a "
                "window"
            )
        if not (np.abs(_strengths(self.strength)) <= np.finfo(np.float32).max).all():
            raise MeasurementError(f"strength {self.strength}: expected finite numbers")
        seeds = [self.seed] if isinstance(self.seed, int) else list(self.seed)
        if not all(0 <= seed < 2**63 for seed in seeds):
            raise ConfigError(f"seed {self.seed}: expected whole numbers from 0 to 2^63 − 1")
        if self.vector is not None:
            directed = self.relative or self.operation in ("ablate", "project")
            if directed and not _vectors(self.vector, self.site).any(axis=1).all():
                raise MeasurementError(
                    f"the vector at {self.site} is zero, so it has no direction to "
                    f"{self.operation}; give one that is defined"
                )


def operate(
    state: Float[Tensor, "b t d"],
    operation: Operation,
    vector: Float[Tensor, "#b d"] | None,
    strength: Float[Tensor, "#b #t"],
    selected: Bool[Tensor, "#b #t"],
    *,
    relative: bool = False,
    noise: Float[Tensor, "b t d"] | None = None,
) -> Float[Tensor, "b t d"]:
    """Change the selected states of a batch; the formulas stand at the head of the module.

    The arithmetic is in the state's dtype, of half precision in float32, and the result in the
    state's dtype. States that are not selected, or whose strength is 0, keep every bit.

    Args:
        state: (B, T, d).
        operation: what is done.
        vector: (1, d) or (B, d); None for ``scale``.
        strength: s, broadcast to (B, T).
        selected: which states are changed, broadcast to (B, T).
        relative: of ``add``: s is a fraction of the state's norm.
        noise: ε (B, T, d), of ``noise``.
    """
    h = state.to(_working_dtype(state))
    s = strength.to(h)[..., None]
    if vector is None:
        steered = h * (1 + s)
    else:
        v = vector.to(h)[:, None]
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        if noise is not None:
            epsilon = noise.to(h)
            length = torch.linalg.vector_norm(epsilon, dim=-1, keepdim=True)
            steered = h + s * norm / length * epsilon
        elif operation != "add":
            unit = v / norm
            along = (h * unit).sum(dim=-1, keepdim=True)
            wanted = norm if operation == "project" else 0.0
            steered = h + s * (wanted - along) * unit
        elif relative:
            size = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
            steered = h + s * size * (v / norm)
        else:
            steered = h + s * v
    changed = selected.to(h.device)[..., None] & (s != 0)
    return torch.where(changed, steered.to(state.dtype), state)


def normals(
    seeds: Int[Tensor, " b"], rows: Int[Tensor, " b"], index: Int[Tensor, "b t"], width: int
) -> Float[Tensor, "b t d"]:
    """Standard normal numbers that depend on nothing but (seed, row, token index, coordinate).

    So they are the same under any batch, padding or cache. Each number is drawn by Box-Muller from
    two 24-bit uniforms, which are hashes (SplitMix64) of those four.

    Returns:
        float32 (B, T, d), on the device of ``index``.
    """
    key = _mix(_mix(_mix(seeds) + rows)[:, None] + index)
    counter = torch.arange(2 * width, device=index.device)
    bits = (_mix(key[..., None] + counter) >> 40) & 0xFFFFFF
    uniform = (bits.float() + 0.5) / 2**24
    radius = torch.sqrt(-2 * torch.log(uniform[..., :width]))
    return radius * torch.cos(2 * math.pi * uniform[..., width:])


@dataclass(frozen=True)
class Placement:
    """Where the tokens of one pass stand in their sequences.

    Attributes:
        index: (B, T), the place of each column among its row's real tokens, from 0; −1 on padding.
        prompt_lengths: (B,), p: how many real tokens of each row are prompt; None if not known.
        rows: (B,), which of the interventions' rows each row of the pass takes; None: the same.
    """

    index: Int[Tensor, "b t"]
    prompt_lengths: Int[Tensor, " b"] | None = None
    rows: Int[Tensor, " b"] | None = None

    @classmethod
    def of_mask(
        cls,
        mask: Int[Tensor, "b k"] | Bool[Tensor, "b k"] | Float[Tensor, "b k"],
        past: int = 0,
        columns: int | None = None,
    ) -> Placement:
        """The placement of ``columns`` columns after ``past`` ones, from the mask of them all.

        The mask is 0 on padding, which may stand anywhere. By default all columns after ``past``.
        """
        real = mask != 0
        index = torch.where(real, real.cumsum(dim=1) - 1, -1)
        return cls(index[:, past : None if columns is None else past + columns])

    def to(self, device: torch.device) -> Placement:
        """The same on a device."""
        if self.index.device == device:
            return self
        return Placement(
            self.index.to(device),
            None if self.prompt_lengths is None else self.prompt_lengths.to(device),
            None if self.rows is None else self.rows.to(device),
        )

    @property
    def steps(self) -> Int[Tensor, "b t"]:
        """The generated step t = index − (p − 1) of each column; below 0 before it.

        Raises:
            ModelError: the prompts' lengths are not known.
        """
        return self.index - self.lengths[:, None] + 1

    def mask(self, positions: Positions) -> Bool[Tensor, "b t"]:
        """The columns that positions select.

        Raises:
            ModelError: the prompts' lengths are needed and not known.
        """
        real = self.index >= 0
        if positions == "all":
            return real
        if positions == "prompt":
            return real & (self.steps <= 0)
        if positions == "prompt_last":
            return real & (self.steps == 0)
        if positions == "generated":
            return real & (self.steps >= 0)
        start, stop = positions
        return (self.index >= start) & (self.index < stop)

    @property
    def lengths(self) -> Int[Tensor, " b"]:
        """p of each row.

        Raises:
            ModelError: the prompts' lengths are not known.
        """
        if self.prompt_lengths is None:
            raise ModelError(
                "this pass continues a cache whose prompt was not seen, so its length is not "
                "known; give prompt_lengths"
            )
        return self.prompt_lengths


class Hooks:
    """Hooks that change a model's states while the ``with`` block runs; they go in any case.

    The caller sets ``placement`` before each pass. Interventions at one site act in their order.
    Hooks run in the order in which they were registered: what captures a state and was registered
    before sees it as it was, what is registered later sees it changed. :func:`steer` is the same
    with placements worked out by itself.

    Args:
        model: the language model, not compiled.
        interventions: what is done, any number of them.

    Attributes:
        anatomy: the model's parts.

    Raises:
        ModelError: the model is none that hooks can change, or a vector is of another width.
        ConfigError: a site that the model lacks.
    """

    def __init__(self, model: Model, interventions: Sequence[Intervention]) -> None:
        self.anatomy = anatomy = Anatomy.of(model)
        refuse_overflow(model.config, anatomy.dtype, model_name(model))
        self._name = model_name(model)
        self._at = self._made_ready(interventions)
        self._judging = _conditions(interventions)
        self._fired: dict[Condition, Tensor] = {}
        self._modules: dict[str, nn.Module] = {}
        for site in self._at:
            module = site_module(anatomy, site)
            if isinstance(module, torch.jit.ScriptModule):
                raise ModelError(
                    f"{site}: its module is a TorchScript module, which may skip hooks; pass the "
                    "model as transformers loads it"
                )
            self._modules[site] = module
        self._handles: list[RemovableHandle] = []
        self._placement: Placement | None = None
        self._encoder_placement: Placement | None = None
        self._ran: set[str] = set()

    @property
    def sites(self) -> tuple[str, ...]:
        """Where states are changed."""
        return tuple(site for site, applied in self._at.items() if applied)

    def fired(self, condition: Condition) -> Bool[Tensor, " b"] | None:
        """On which rows of the last prompts a condition fired; None while none were read."""
        return self._fired.get(condition)

    def replace(self, interventions: Sequence[Intervention]) -> None:
        """Do something else at the same sites, from the next module that runs.

        The hooks stay as they are, and with them the order among other hooks.

        Raises:
            ConfigError: other sites.
            ModelError: a vector of another width.
        """
        made = self._made_ready(interventions)
        if {*made} != {*self._at}:
            raise ConfigError(
                f"interventions at {', '.join(made)} in the place of those at "
                f"{', '.join(self._at)}; expected the same sites"
            )
        self._at, self._judging = made, _conditions(interventions)

    @property
    def placement(self) -> Placement | None:
        """Where the (decoder's) tokens of the coming pass stand; None while none is expected."""
        return self._placement

    @placement.setter
    def placement(self, placement: Placement | None) -> None:
        self._placement = placement
        self._ran &= {ENCODER}

    @property
    def encoder_placement(self) -> Placement | None:
        """Where the tokens of the encoder's coming pass stand; None while none is expected."""
        return self._encoder_placement

    @encoder_placement.setter
    def encoder_placement(self, placement: Placement | None) -> None:
        self._encoder_placement = placement
        if placement is not None:
            self._ran.discard(ENCODER)

    @property
    def silent(self) -> tuple[str, ...]:
        """The sites whose modules have not run since their placement was set."""
        return tuple(site for site in self._at if site not in self._ran)

    def require_ran(self) -> None:
        """Check after a pass that every site was steered.

        Raises:
            ModelError: a site's module did not run as one: fused code passes hooks by.
        """
        if self.silent:
            raise ModelError(
                f"{self.silent[0]}: its module was not called as one, so it can't be steered; load "
                "the model without fused kernels"
            )

    def __enter__(self) -> Hooks:
        try:
            for site, module in self._modules.items():
                self._handles.append(module.register_forward_hook(self._hook(site)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.placement = self.encoder_placement = None

    def apply(self, site: str, state: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Change a state as the hook at a site does; where nothing acts, return it.

        Raises:
            ModelError: no placement is set, or its shape or rows are not those of the state.
        """
        applied = self._at.get(site, [])
        placement = self._encoder_placement if site == ENCODER else self._placement
        if placement is None:
            if not applied and site not in self._at:
                return state
            raise ModelError(
                f"{site}: its module ran outside a pass through the decoder; call the whole model "
                "while it is steered"
            )
        for condition in self._judging:
            if condition.site == site:
                self._judge(condition, state, placement)
        for one in applied:
            fired = None if one.when is None else self._fired[one.when]
            state = one(state, placement, fired)
        return state

    def _judge(
        self, condition: Condition, state: Float[Tensor, "b t d"], placement: Placement
    ) -> None:
        """Judge the rows by their prompts, if the pass holds them; else they stay as judged."""
        placement = placement.to(state.device)
        lengths = placement.lengths
        prompt = ((placement.index >= 0) & (placement.index < lengths[:, None])).sum(dim=1)
        if bool((prompt == lengths).all()):
            self._fired[condition] = condition.fires(state, placement.index, lengths)
        elif bool(prompt.any()) or len(self._fired.get(condition, ())) != len(lengths):
            raise ModelError(
                f"{condition.site}: the condition judges a row by its prompt, and this pass holds "
                "none or only a part of it; expected the whole prompt in the first pass (of "
                "generate: no prefill_chunk_size, and no cache that was filled before)"
            )

    def _made_ready(self, interventions: Sequence[Intervention]) -> dict[str, list[_Applied]]:
        anatomy, found = self.anatomy, dict[str, list[_Applied]]()
        for intervention in interventions:
            resolve_sites(intervention.site, anatomy.n_blocks, encoder=anatomy.encoder is not None)
            applied = _Applied(intervention)
            if applied.vectors is not None and applied.vectors.shape[1] != anatomy.width:
                raise ModelError(
                    f"{intervention.site}: the vector has width {applied.vectors.shape[1]}, and "
                    f"the states of {self._name} {anatomy.width}; it is of another model"
                )
            found.setdefault(intervention.site, []).append(applied)
        for condition in _conditions(interventions):
            found.setdefault(condition.site, [])
            if condition.vector.width != anatomy.width:
                raise ModelError(
                    f"{condition.site}: the condition's vector has width {condition.vector.width}, "
                    f"and the states of {self._name} {anatomy.width}; it is of another model"
                )
        return found

    def _hook(self, site: str) -> Callable[[nn.Module, object, object], object]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> object:
            state = self.apply(site, Anatomy.read(output))
            if site in self._ran:
                raise ModelError(f"{site}: its module ran twice in one pass; expected once")
            self._ran.add(site)
            return Anatomy.write(output, state)

        return hook


@contextlib.contextmanager
def steer(
    model: Model,
    what: Intervention
    | Sequence[Intervention]
    | SteeringVector
    | SteeringVectorSet
    | Tensor
    | None,
    strength: Strength | Mapping[str, Strength] = 1.0,
    positions: Positions = "all",
    *,
    operation: Operation = "add",
    site: str | None = None,
    schedule: Schedule | None = None,
    relative: bool = False,
    seed: int | Sequence[int] = 0,
    when: Condition | None = None,
    prompt_lengths: Sequence[int] | Int[Tensor, " b"] | None = None,
) -> Iterator[Hooks]:
    """Steer a model while the ``with`` block runs: ``generate``, or any pass through the model.

    Which columns are padding is read from each pass's attention mask (B, T), with padding on either
    side. Prompt lengths are the real tokens of the first pass, the one with an empty cache; passes
    that continue the cache hold generated tokens. Without a cache, a pass that repeats the last
    one's ids with one more column continues it. ``prompt_lengths`` overrides this, and is needed
    where a prompt enters in several passes (chunked prefill, a cache filled beforehand), or where
    a prompt and its answer enter in one; only ``all`` and windows without a schedule need no
    lengths. The decoder of an encoder-decoder model needs none: its prompt is its start tokens; its
    encoder's tokens are those of the encoder's own pass, which ``generate`` makes once.

    Vectors of several sites are added at once, but each displacement already holds what earlier
    sites added: all v* of a set together shift far more than tuning did. Choose one site, or
    :func:`dsteer.increments`, which are estimated with the earlier ones active.

    A static cache makes ``generate`` compile the model on an accelerator, and compiled code may
    skip hooks: ``model.generation_config.disable_compile`` is True while the block runs. Set it
    too in a generation config of your own.

    Args:
        model: the language model; quantised, offloaded and PEFT models too, but no compiled one.
        what: a steering vector, a set of them, or a tensor (d,) or (rows, d) with ``site``; None
            for ``scale``; or interventions, which carry their own settings.
        strength: s, one number or one a row of the batch; for a set also a mapping from site to
            strength, which steers those sites alone.
        positions: the tokens that are steered, see :data:`Positions`.
        operation: ``add``, ``ablate``, ``scale``, ``noise`` or ``project``; see the module.
        site: where; default: the vector's own.
        schedule: factors of s over the generated steps.
        relative: of ``add``: s is a fraction of each state's own norm.
        seed: of ``noise``: one number, or one a row of the batch.
        when: steer only the rows whose prompt meets this condition.
        prompt_lengths: (B,), the real tokens of each row that are prompt.

    Raises:
        ModelError: the model is none that hooks can change, or would ignore them; a vector of
            another width; values a row for another number of rows; lengths that are needed and
            not known.
        ConfigError: an unknown site, operation or position, or settings that don't go together.
        MeasurementError: a vector or strength that is malformed or not finite.
    """
    settings: dict[str, Any] = {
        "strength": strength,
        "positions": positions,
        "operation": operation,
        "site": site,
        "schedule": schedule,
        "relative": relative,
        "seed": seed,
        "when": when,
    }
    with (
        uncompiled(model),
        Steered(model, interventions_of(what, **settings), prompt_lengths) as on,
    ):
        yield on.hooks


class Steered:
    """A model whose passes are steered while the ``with`` block runs, as :func:`steer` says.

    The block may be entered again and again: what was seen of the prompts stays.

    Args:
        model: the language model.
        interventions: what is done.
        prompt_lengths: (B,), the real tokens of each row that are prompt.
        unseen_is_prompt: see :class:`Passes`.

    Attributes:
        hooks: what changes the states.
    """

    def __init__(
        self,
        model: Model,
        interventions: Sequence[Intervention],
        prompt_lengths: Sequence[int] | Int[Tensor, " b"] | None = None,
        *,
        unseen_is_prompt: bool = False,
    ) -> None:
        self.hooks = Hooks(model, interventions)
        self._passes = Passes(
            model, self.hooks.anatomy, prompt_lengths, unseen_is_prompt=unseen_is_prompt
        )
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Steered:
        encoder = self.hooks.anatomy.encoder
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.hooks)
            stack.enter_context(self._passes.followed(self._begin, self._end))
            if encoder is not None:
                handle = encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True)
                stack.callback(handle.remove)
                handle = encoder.register_forward_hook(self._after_encoder)
                stack.callback(handle.remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def _before_encoder(
        self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.hooks.encoder_placement = _whole(encoder, args, kwargs)

    def _after_encoder(self, _encoder: nn.Module, _inputs: object, _output: object) -> None:
        self.hooks.encoder_placement = None

    def _begin(self, placement: Placement) -> None:
        self.hooks.placement = placement
        if ENCODER in self.hooks.silent:
            raise ModelError(
                "the encoder ran before it was steered, and its states are taken as they are; give "
                "the model input_ids, not encoder_outputs"
            )

    def _end(self) -> None:
        try:
            self.hooks.require_ran()
        finally:
            self.hooks.placement = None


class _Applied:
    """An intervention made ready: its numbers as tensors, moved once to where the states are."""

    def __init__(self, intervention: Intervention) -> None:
        self._of = intervention
        self.vectors = (
            None
            if intervention.vector is None
            else torch.from_numpy(_vectors(intervention.vector, intervention.site))
        )
        self._vector_a_row = (
            isinstance(intervention.vector, Tensor) and intervention.vector.ndim == 2
        )
        self._strengths = torch.from_numpy(_strengths(intervention.strength))
        self._strength_a_row = not _is_number(intervention.strength)
        seed = intervention.seed
        self._seed_a_row = not isinstance(seed, int)
        self._seeds = torch.tensor([seed] if isinstance(seed, int) else list(seed))
        self._moved: dict[tuple[torch.device, torch.dtype], tuple[Tensor | None, Tensor]] = {}

    @property
    def when(self) -> Condition | None:
        """What decides which rows are changed."""
        return self._of.when

    def __call__(
        self,
        state: Float[Tensor, "b t d"],
        placement: Placement,
        fired: Bool[Tensor, " b"] | None = None,
    ) -> Float[Tensor, "b t d"]:
        batch, columns, width = state.shape
        if placement.index.shape != (batch, columns):
            raise ModelError(
                f"{self._of.site}: the state has shape {tuple(state.shape)}, and the pass "
                f"{tuple(placement.index.shape)} rows and tokens; expected the same"
            )
        placement = placement.to(state.device)
        vectors, strengths = self._on(state)
        strength = self._rows(strengths, "strength", self._strength_a_row, placement)[:, None]
        if self._of.schedule is not None:
            strength = strength * self._of.schedule.at(placement.steps).to(strength)
        if vectors is not None:
            vectors = self._rows(vectors, "vector", self._vector_a_row, placement)
        selected = placement.mask(self._of.positions)
        if fired is not None:
            selected = selected & fired.to(selected.device)[:, None]
        return operate(
            state,
            self._of.operation,
            vectors,
            strength,
            selected,
            relative=self._of.relative,
            noise=self._noise(placement, width) if self._of.operation == "noise" else None,
        )

    def _noise(self, placement: Placement, width: int) -> Float[Tensor, "b t d"]:
        seeds = self._rows(self._seeds, "seed", self._seed_a_row, placement)
        seeds = seeds.to(placement.index.device)
        batch = len(placement.index)
        if self._seed_a_row:
            rows = torch.zeros_like(seeds)
        elif placement.rows is not None:
            rows = placement.rows
        else:
            rows = torch.arange(batch, device=seeds.device)
        return normals(seeds.expand(batch), rows, placement.index, width)

    def _on(self, state: Tensor) -> tuple[Tensor | None, Tensor]:
        """Vectors and strengths where the state is, in the dtype of its arithmetic."""
        key = (state.device, _working_dtype(state))
        if key not in self._moved:
            vectors = None if self.vectors is None else self.vectors.to(*key)
            self._moved[key] = (vectors, self._strengths.to(*key))
        return self._moved[key]

    def _rows(self, values: Tensor, name: str, a_row: bool, placement: Placement) -> Tensor:
        """Values for the pass's rows; one for all where they are not given by row."""
        if not a_row:
            return values
        if placement.rows is not None:
            return values[placement.rows.to(values.device)]
        if len(values) != len(placement.index):
            raise ModelError(
                f"{self._of.site}: {len(values)} values of {name}, one a row, and a batch of "
                f"{len(placement.index)} rows; give one a row of the batch (num_return_sequences "
                "and num_beams repeat each prompt's row)"
            )
        return values


class Passes:
    """Works out, pass by pass, where the tokens stand that a decoder is called with.

    Args:
        model: the language model.
        anatomy: its parts.
        prompt_lengths: (B,), the real tokens of each row that are prompt.
        unseen_is_prompt: what a cache holds of earlier tokens, and the pass that continues it, is
            taken as prompt where it was not seen; else the prompt's length is then not known.
    """

    def __init__(
        self,
        model: Model,
        anatomy: Anatomy,
        prompt_lengths: Sequence[int] | Tensor | None = None,
        *,
        unseen_is_prompt: bool = False,
    ) -> None:
        self._decoder, self._wrappers = anatomy.decoder, _wrappers(model, anatomy)
        self._start = anatomy.start
        self._unseen_is_prompt = unseen_is_prompt
        self._given = None if prompt_lengths is None else torch.as_tensor(prompt_lengths)
        self._lengths: Tensor | None = None
        self._seen = 0  # columns that the last pass ended with
        self._uncached: Tensor | None = None  # what the last pass was given, if it had no cache
        self._mask: Tensor | None = None  # which of the columns seen are text
        self._cache: object = None
        self._asked: list[Tensor | None] = []  # the mask that a wrapper of the decoder was given

    @contextlib.contextmanager
    def followed(
        self, begin: Callable[[Placement], None], end: Callable[[], None]
    ) -> Iterator[None]:
        """While the block runs, call ``begin`` before and ``end`` after each pass."""

        def before(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            begin(self.place(decoder, args, kwargs))

        def after(_decoder: nn.Module, _inputs: object, _output: object) -> None:
            end()

        with contextlib.ExitStack() as stack:
            for wrapper in self._wrappers:
                handle = wrapper.register_forward_pre_hook(self.ask, with_kwargs=True)
                stack.callback(handle.remove)
            handle = self._decoder.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
            handle = self._decoder.register_forward_hook(after)
            stack.callback(handle.remove)
            yield

    def ask(self, wrapper: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the mask that a module around the decoder is called with.

        Some wrappers turn it into others before they call the decoder.
        """
        names = inspect.signature(wrapper.forward).parameters
        mask = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
            self._asked = [mask]

    def place(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Placement:
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            raise ModelError(
                "the model is compiled or traced while it is steered, and its code may skip hooks; "
                "run it as it is (of generate: disable_compile=True)"
            )
        call, inputs = _called(decoder, args, kwargs)
        cache = next((call[name] for name in CACHES if call.get(name) is not None), None)
        past = self._past(cache)
        batch, columns = inputs.shape[:2]
        mask = self._mask_of(call)
        if mask is None:
            mask = torch.ones(batch, past + columns, dtype=torch.long, device=inputs.device)
            if past and self._mask is not None and self._mask.shape == (batch, past):
                mask[:, :past] = self._mask  # a recurrent model gets no mask once it has a state
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < past + columns:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ModelError(
                f"attention_mask {shape}: expected one of shape (batch, {past + columns}) to tell "
                "padding from text; generate with the default cache, not a static one"
            )
        placement = Placement.of_mask(mask, past, columns)
        use_cache = call.get("use_cache")
        if use_cache is None:
            use_cache = getattr(decoder.config, "use_cache", False)
        uncached = cache is None and not use_cache
        if past:
            if past > self._seen:
                unseen = placement.index.amax(dim=1) + 1 if self._unseen_is_prompt else None
                self._lengths = unseen
        elif not (uncached and self._continues(inputs)):
            self._lengths = placement.index.amax(dim=1) + 1
        self._seen = past + columns
        self._mask, self._cache = mask[:, : past + columns], cache
        self._uncached = inputs if uncached else None
        if self._start is not None:
            self._lengths = torch.full((batch,), len(self._start), device=inputs.device)
        lengths = self._lengths if self._given is None else self._given.to(mask.device)
        if self._given is not None and self._given.shape != (batch,):
            raise ModelError(
                f"prompt_lengths of shape {tuple(self._given.shape)} for a batch of {batch} rows; "
                "give one a row"
            )
        if lengths is not None and len(lengths) != batch:
            lengths = None
        return replace(placement, prompt_lengths=lengths)

    def _mask_of(self, call: dict[str, Any]) -> Any:
        """The mask (B, T) of a call, or that of the wrapper which made another of it."""
        mask, asked = call.get("attention_mask"), self._asked
        self._asked = []
        if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2) or not asked:
            return mask
        return asked[0]

    def _past(self, cache: Any) -> int:
        """How many columns a cache holds."""
        if cache is None:
            return 0
        length: int | None = None
        with contextlib.suppress(AttributeError, ValueError):  # a recurrent state has no length
            length = int(cache.get_seq_length())
        if length is None and isinstance(cache, Cache):
            if not cache.has_previous_state():
                return 0
            if not self._seen:
                raise ModelError(
                    "this pass continues a recurrent state whose prompt was not seen, so the place "
                    "of its tokens is not known; begin with the prompt"
                )
            return self._seen
        if length is None or (length == 0 and cache is self._cache):
            raise ModelError(
                f"the model keeps a cache of its own ({type(cache).__name__}), which tells no "
                "length, so the place of its tokens is not known; pass use_cache=False"
            )
        return length

    def _continues(self, inputs: Tensor) -> bool:
        """Whether these are the last pass's inputs and one more column."""
        last = self._uncached
        return last is not None and torch.equal(inputs[:, :-1], last)


def _called(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Tensor]:
    """The arguments of a call by name, and its ids or embeddings."""
    names = inspect.signature(module.forward).parameters
    call = {**dict(zip(names, args, strict=False)), **kwargs}
    inputs = call.get("input_ids")
    inputs = call.get("inputs_embeds") if inputs is None else inputs
    if inputs is None:
        raise ModelError(f"{type(module).__name__} was called without input_ids and inputs_embeds")
    return call, inputs


def _whole(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Placement:
    """Where the tokens stand that an encoder is called with, all of them prompt."""
    call, inputs = _called(encoder, args, kwargs)
    mask = call.get("attention_mask")
    if mask is None:
        mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    if mask.shape != inputs.shape[:2]:
        raise ModelError(
            f"the encoder's attention_mask {tuple(mask.shape)}: expected one of shape "
            f"{tuple(inputs.shape[:2])} to tell padding from text"
        )
    placement = Placement.of_mask(mask)
    return replace(placement, prompt_lengths=placement.index.amax(dim=1) + 1)


def _wrappers(model: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    """The modules around a decoder, from the outside in; none where their mask is an encoder's."""
    path = next((name for name, module in model.named_modules() if module is anatomy.decoder), "")
    parts = path.split(".") if path and anatomy.encoder is None else []
    return [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]


def interventions_of(what: Any, **given_settings: Any) -> list[Intervention]:
    """What :func:`steer` was given, as interventions."""
    settings = {**_DEFAULTS, **given_settings}
    given = [what] if isinstance(what, Intervention) else what
    if isinstance(given, Sequence) and all(isinstance(item, Intervention) for item in given):
        changed = [
            name
            for name, value in settings.items()
            if not (type(value) is type(_DEFAULTS[name]) and value == _DEFAULTS[name])
        ]
        if changed:
            raise ConfigError(
                f"{changed[0]} beside an Intervention, which carries its own settings; set it there"
            )
        return list(given)
    if isinstance(what, SteeringVectorSet):
        if settings["site"] is not None:
            what = SteeringVectorSet([_pick(what, settings["site"])])
        strength = settings["strength"]
        by_site = strength if isinstance(strength, Mapping) else dict.fromkeys(what, strength)
        return [
            Intervention(**{**settings, "site": name, "vector": _pick(what, name), "strength": s})
            for name, s in by_site.items()
        ]
    if isinstance(settings["strength"], Mapping):
        raise ConfigError("a strength by site needs a SteeringVectorSet; give one number, or a set")
    own = what.site if isinstance(what, SteeringVector) else None
    site = settings["site"] or own
    if site is None:
        raise ConfigError("a tensor does not say where it acts; give site='resid_post.K'")
    return [Intervention(**{**settings, "site": site, "vector": what})]


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(steer).parameters.items()
    if name not in ("model", "what", "prompt_lengths")
}


def _conditions(interventions: Sequence[Intervention]) -> list[Condition]:
    """The conditions of interventions, each once."""
    found = [one.when for one in interventions if one.when is not None]
    return list({id(condition): condition for condition in found}.values())


def _pick(vectors: SteeringVectorSet, site: str) -> SteeringVector:
    if site not in vectors:
        raise ConfigError(
            f"site {site!r}: the set holds no vector there{did_you_mean(site, vectors)}"
        )
    return vectors[site]


_HELD: WeakKeyDictionary[nn.Module, tuple[int, bool | None]] = WeakKeyDictionary()
"""How many blocks keep a model from being compiled, and its setting before the first of them."""


@contextlib.contextmanager
def uncompiled(model: Model) -> Iterator[None]:
    """Keep ``generate`` from compiling the model while the block runs; blocks end in any order."""
    config = getattr(model, "generation_config", None)
    if config is None:
        yield
        return
    count, before = _HELD.get(model, (0, config.disable_compile))
    _HELD[model] = count + 1, before
    config.disable_compile = True
    try:
        yield
    finally:
        count, before = _HELD.pop(model)
        if count > 1:
            _HELD[model] = count - 1, before
        else:
            config.disable_compile = before


def _check_positions(positions: Positions) -> None:
    if isinstance(positions, tuple):
        if len(positions) != 2 or not 0 <= positions[0] < positions[1]:
            raise ConfigError(
                f"positions {positions}: expected a window (start, stop) with 0 ≤ start < stop"
            )
    elif positions not in (known := get_args(get_args(Positions)[0])):
        raise ConfigError(
            f"positions {positions!r}: no such positions{did_you_mean(str(positions), known)}"
        )


def _is_number(strength: Strength) -> bool:
    return strength.ndim == 0 if isinstance(strength, Tensor) else isinstance(strength, Real)


def _strengths(strength: Strength) -> np.ndarray:
    """float64 (1,) or (rows,)."""
    number = _is_number(strength)
    return as_numbers(torch.as_tensor(strength).reshape(1) if number else strength, "strength")


def _vectors(vector: SteeringVector | Tensor, site: str) -> np.ndarray:
    """float64 (1, d) or (rows, d)."""
    if isinstance(vector, SteeringVector):
        return vector.tensor.numpy()[None]
    name = f"vector at {site}"
    return as_matrix(vector, name) if vector.ndim == 2 else as_vector(vector, name)[None]


def _working_dtype(state: Tensor) -> torch.dtype:
    """The dtype of the arithmetic on a state: its own, for half precision float32."""
    return torch.float32 if state.dtype.itemsize < 4 else state.dtype


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """One step of the SplitMix64 generator from each state; int64 that wraps around."""
    x = x - 0x61C8864680B583EB
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
