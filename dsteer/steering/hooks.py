"""Classes that users of steering libraries know, on the machinery of :mod:`.intervene`.

"last" and "first" mean real tokens, with padding on either side or none, with a cache or without:

================  ===========================================================================
hook, last        of each pass the state of the last real token of each row
hook, first       the state of each row's token 0; passes that do not hold it change nothing
injector, last    the last prompt token and each token behind it: in generation with a cache that
                  is the last token of each pass, and without a cache it is the same states
injector, first   token 0 alone
injector, all     every real token
================  ===========================================================================

Hooks run in the order in which they were attached: a hook attached inside an injector sees steered
states, and one attached before it the states at its layer as they were.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, SupportsIndex, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsteer.activations.capture import Capture, site_module
from dsteer.activations.sites import FINAL_NORM, resid_post
from dsteer.data.tokens import Tokenizer, encode_conversation
from dsteer.data.types import Prompt
from dsteer.errors import ConfigError, DataError, ModelError, did_you_mean
from dsteer.models.anatomy import Anatomy, evaluating, model_name
from dsteer.models.load import Model
from dsteer.steering.intervene import (
    Intervention,
    Passes,
    Placement,
    Positions,
    Steered,
    Strength,
    uncompiled,
)
from dsteer.steering.provenance import require_fit
from dsteer.steering.vector import SteeringVector, SteeringVectorSet, as_block

Tokens = Literal["all", "last", "first"]
Component = Literal["residual", "mlp", "attn"]
Vectors = SteeringVector | SteeringVectorSet | Iterable[Any] | Mapping[Any, Any]
"""One vector, several, a set, or a mapping from layer (or site) to tensor."""

_SITES = {"residual": "resid_post", "mlp": "mlp_out", "attn": "attn_out"}
_POSITIONS: dict[str, Positions] = {"all": "all", "last": "generated", "first": (0, 1)}

_A = TypeVar("_A", bound="_Attachable")


class _Attachable(ABC):
    """What hooks into a model while a ``with`` block runs, or from ``attach`` to ``detach``."""

    def __init__(self) -> None:
        self._stack: ExitStack | None = None

    @abstractmethod
    def _enter(self, stack: ExitStack) -> None:
        """Register hooks, and on the stack what takes them away."""

    def attach(self: _A) -> _A:
        """Register the hooks; nothing happens where they are."""
        if self._stack is None:
            with ExitStack() as stack:
                self._enter(stack)
                self._stack = stack.pop_all()
        return self

    def detach(self) -> None:
        """Take the hooks away; nothing happens where there are none."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def __enter__(self: _A) -> _A:
        return self.attach()

    def __exit__(self, *_error: object) -> None:
        self.detach()


# ---------------------------------------------------------------------------------- hook


class ActivationHook(_Attachable):
    """Copies states out of the passes that a model makes: of each layer those of the last pass.

    Args:
        model: the language model, not compiled.
        layer_indices: blocks, from 0; negative ones count from the last.
        component: ``residual`` is the output of a block, ``mlp`` and ``attn`` what these return.
        token_position: ``all`` columns (padding too), or ``last`` or ``first`` (see the module).

    Attributes:
        cache: the states (B, T, d), or (B, 1, d), in the model's dtype, by ``layer_{k}``.

    Raises:
        ConfigError: an unknown component or position, or a layer that the model lacks.
        ModelError: the model is none that hooks can read.
    """

    def __init__(
        self,
        model: Model,
        layer_indices: Sequence[int],
        component: Component | str = "residual",
        token_position: Tokens | str = "all",
    ) -> None:
        super().__init__()
        _require("component", component, _SITES)
        _require("token_position", token_position, get_args(Tokens))
        self._model = model
        self._anatomy = anatomy = Anatomy.of(model)
        self._position = token_position
        self._placement: Placement | None = None
        self._modules: dict[int, nn.Module] = {}
        self.layer_indices = list(layer_indices)
        self.cache: dict[str, Tensor] = {}
        for layer in self.layer_indices:
            block = layer + anatomy.n_blocks if layer < 0 else layer
            if not 0 <= block < anatomy.n_blocks:
                raise ConfigError(
                    f"layer {layer}: {model_name(model)} has {anatomy.n_blocks} blocks, 0 to "
                    f"{anatomy.n_blocks - 1}"
                )
            self._modules[layer] = site_module(anatomy, f"{_SITES[component]}.{block}")

    def get_activations(self) -> dict[int, Tensor]:
        """The states of each layer that ran: (B, T, d), or (B, 1, d) for one token a row."""
        named = {layer: f"layer_{layer}" for layer in self.layer_indices}
        return {layer: self.cache[key] for layer, key in named.items() if key in self.cache}

    def _enter(self, stack: ExitStack) -> None:
        for layer, module in self._modules.items():
            handle = module.register_forward_hook(self._catch(layer))
            stack.callback(handle.remove)
        if self._position != "all":
            passes = Passes(self._model, self._anatomy)
            stack.enter_context(uncompiled(self._model))
            stack.enter_context(passes.followed(self._place, self._place))

    def _place(self, placement: Placement | None = None) -> None:
        self._placement = placement

    def _catch(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            state, key = Anatomy.read(output).detach(), f"layer_{layer}"
            if self._position == "all":
                self.cache[key] = state.clone()
            else:
                self._keep(key, state)

        return hook

    def _keep(self, key: str, state: Float[Tensor, "b t d"]) -> None:
        """Keep one token a row; of rows whose token is not in this pass what was kept before."""
        placement = self._placement
        if placement is None or placement.index.shape != state.shape[:2]:
            raise ModelError(
                f"{key}: its module ran outside a pass through the decoder; call the whole model "
                "while it is hooked"
            )
        index = placement.index.to(state.device)
        wanted = index == (index.amax(dim=1, keepdim=True) if self._position == "last" else 0)
        wanted &= index >= 0
        found = wanted.any(dim=1)
        if not found.any():
            return
        rows = torch.arange(len(state), device=state.device)
        picked = state[rows, wanted.int().argmax(dim=1)][:, None]
        before = self.cache.get(key)
        if before is not None and before.shape == picked.shape:
            picked = torch.where(found[:, None, None], picked, before)
        self.cache[key] = picked


# ---------------------------------------------------------------------------------- injectors


class _Injector(_Attachable):
    """Interventions that add vectors, whose strengths may change while they are attached."""

    def __init__(self, model: Model, injection_mode: Tokens | str) -> None:
        super().__init__()
        _require("injection_mode", injection_mode, _POSITIONS)
        self._model = model
        self._positions = _POSITIONS[injection_mode]
        self.injection_mode = injection_mode
        self._steered: Steered | None = None

    @abstractmethod
    def _interventions(self) -> list[Intervention]:
        """What is done now."""

    def _update(self) -> None:
        """Do what is to be done now."""
        if self._steered is None:
            self._steered = self._prepared()
        else:
            self._steered.hooks.replace(self._interventions())

    def _prepared(self) -> Steered:
        return Steered(self._model, self._interventions(), unseen_is_prompt=True)

    def _enter(self, stack: ExitStack) -> None:
        self._steered = self._prepared()  # which has seen no prompt yet
        stack.enter_context(uncompiled(self._model))
        stack.enter_context(self._steered)

    def _add(self, vector: SteeringVector, strength: Strength) -> Intervention:
        return Intervention(vector.site, vector, strength=strength, positions=self._positions)


class ActivationInjector(_Injector):
    """Adds strength × vector to a model's states, at the sites of all vectors.

    Several v* of one set shift far more than tuning did, for each holds what the earlier layers
    added: choose one layer.

    Args:
        model: the language model, not compiled.
        vectors: one steering vector, several, a set, or a mapping from layer (or site) to tensor.
        strength: in units of the vectors, one number or one a row; :attr:`strength` may be set at
            any time.
        injection_mode: which tokens are steered: ``all``, ``last`` or ``first`` (see the module).

    Raises:
        ConfigError: an unknown mode, or a site that the model lacks.
        MeasurementError: vectors that make no set, or a strength that is not finite.
        ModelError: vectors of a model unlike this one, or a model that hooks can't change.
    """

    def __init__(
        self,
        model: Model,
        vectors: Vectors,
        strength: Strength = 1.0,
        injection_mode: Tokens | str = "all",
    ) -> None:
        super().__init__(model, injection_mode)
        self._vectors = _as_set(vectors, model)
        self._strength = strength
        self._update()

    @property
    def strength(self) -> Strength:
        """What the vectors are multiplied by."""
        return self._strength

    @strength.setter
    def strength(self, strength: Strength) -> None:
        before, self._strength = self._strength, strength
        try:
            self._update()
        except Exception:
            self._strength = before
            raise

    def _interventions(self) -> list[Intervention]:
        return [self._add(vector, self._strength) for vector in self._vectors.values()]


class MultiVectorInjector(_Injector):
    """Adds one vector of each of several sets, each with a strength of its own.

    Args:
        model: the language model, not compiled.
        vector_sets: name → set (or anything that :class:`ActivationInjector` takes).
        strengths: name → strength; default: 1 each; names that are left out: 0.
        injection_mode: which tokens are steered, see the module.
        default_layer: the layer whose vector is taken of each set; default: each set's
            :meth:`~dsteer.SteeringVectorSet.get_best`.

    Raises:
        ConfigError: no sets, an unknown mode or name, or a set without the layer.
        MeasurementError: vectors that make no set, or a strength that is not finite.
        ModelError: vectors of a model unlike this one, or a model that hooks can't change.
    """

    def __init__(
        self,
        model: Model,
        vector_sets: Mapping[str, Vectors],
        strengths: Mapping[str, Strength] | None = None,
        injection_mode: Tokens | str = "all",
        default_layer: SupportsIndex | None = None,
    ) -> None:
        super().__init__(model, injection_mode)
        if not vector_sets:
            raise ConfigError("vector_sets is empty; expected at least one name and its set")
        self._vectors: dict[str, SteeringVector] = {}
        for name, vectors in vector_sets.items():
            vset = _as_set(vectors, model)
            if default_layer is not None and default_layer not in vset.layers:
                raise ConfigError(
                    f"set {name!r} has no vector at layer {default_layer}; it has {vset.layers}"
                )
            self._vectors[name] = vset.get_best() if default_layer is None else vset[default_layer]
        default = 1.0 if strengths is None else 0.0
        self._strengths: dict[str, Strength] = dict.fromkeys(self._vectors, default)
        for name, strength in (strengths or {}).items():
            self._require_name(name)
            self._strengths[name] = strength
        self._update()

    def set_strength(self, name: str, strength: Strength) -> None:
        """Change a strength, from the next block that runs.

        Raises:
            ConfigError: there is no set of this name.
            MeasurementError: the strength is not finite.
        """
        self._require_name(name)
        before, self._strengths[name] = self._strengths[name], strength
        try:
            self._update()
        except Exception:
            self._strengths[name] = before
            raise

    def get_strength(self, name: str) -> Strength:
        """The strength of a set now.

        Raises:
            ConfigError: there is no set of this name.
        """
        self._require_name(name)
        return self._strengths[name]

    def _interventions(self) -> list[Intervention]:
        return [self._add(self._vectors[name], s) for name, s in self._strengths.items()]

    def _require_name(self, name: str) -> None:
        if name not in self._vectors:
            raise ConfigError(f"no vectors named {name!r}{did_you_mean(name, self._vectors)}")


# ---------------------------------------------------------------------------------- states


def get_all_hidden_states(
    model: Model, tokenizer: Tokenizer, conversation: Prompt
) -> Float[Tensor, "states tokens d"]:
    """The states of every token of a conversation, indexed as transformers does.

    State 0 enters block 0 and state k + 1 leaves block k (``resid_post.k``), but for the last,
    which is ``final_norm``. They are read by hooks, so a model that is steered shows it.

    Args:
        model: a decoder-only language model, not compiled.
        tokenizer: its tokenizer. The difference of two models' states needs one for both.
        conversation: a text as it stands, or messages with role and content, which go through the
            chat template; nothing is put behind the last of them.

    Returns:
        (L + 1, T, d), float32, on the CPU.

    Raises:
        ModelError: the model has an encoder, or is none that is read.
        DataError: a conversation without tokens, or with more than the model was made for.
    """
    anatomy = Anatomy.of(model)
    if anatomy.encoder is not None:
        raise ModelError(
            f"{model_name(model)}: its encoder and its decoder read other tokens; read them by "
            "dsteer.extract"
        )
    ids = encode_conversation(tokenizer, conversation)
    if anatomy.max_positions is not None and len(ids) > anatomy.max_positions:
        raise DataError(
            f"a conversation of {len(ids)} tokens; {model_name(model)} was made for "
            f"{anatomy.max_positions}; cut it"
        )
    entered: list[Tensor] = []

    def enter(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        entered.append(state[0].to("cpu", torch.float32, copy=True))

    sites = [*map(resid_post, range(anatomy.n_blocks - 1)), FINAL_NORM]
    handle = anatomy.blocks[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with evaluating(model), Capture(anatomy, sites) as capture:
            states = capture.read(torch.tensor([ids]), lambda state: state[0].clone())
    finally:
        handle.remove()
    return torch.stack([*entered, *(states[site] for site in sites)])


def _as_set(vectors: Any, model: Model) -> SteeringVectorSet:
    """Vectors in any form as a set that suits a model."""
    if isinstance(vectors, Tensor):
        raise ConfigError("a tensor does not say where it acts; give {layer: tensor}")
    if isinstance(vectors, SteeringVector):
        vset = SteeringVectorSet([vectors], vectors.metadata)
    elif isinstance(vectors, SteeringVectorSet):
        vset = vectors
    elif isinstance(vectors, Mapping):
        vset = SteeringVectorSet(
            SteeringVector(vector=getattr(given, "tensor", given), site=_site(at))
            for at, given in vectors.items()
        )
    else:
        vset = SteeringVectorSet(vectors)
    if not vset:
        raise ConfigError("a set that holds no vector yet; add one")
    require_fit(vset, model)
    return vset


def _site(at: Any) -> Any:
    block = as_block(at)
    return at if block is None else resid_post(block)


def _require(what: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ConfigError(f"{what} {value!r}: no such {what}{did_you_mean(str(value), known)}")
