"""The parts of an mlx-lm model, and calls of them that somebody else takes over for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from dsteer.activations.sites import ATTENTION, block_of, component_of
from dsteer.errors import ModelError
from dsteer.models.anatomy import PARTS
from dsteer.steering.states import Shape
from dsteer.store import Json

Module = Any
"""An ``mlx.nn.Module``."""

Around = Callable[..., Any]
"""Called in a module's place, with the module's own call in front of the arguments."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of an mlx-lm model. Every number comes from the model itself.

    Attributes:
        model: the whole model; called with ids it returns logits.
        decoder: the module that holds the blocks and is called once a pass, with the cache.
        blocks: its blocks, in order; block k writes resid_post.k.
        final_norm: the norm after the last block, whose output the unembedding reads.
        width: d, the width of the residual stream.
        vocabulary: the token ids that it has.
        max_positions: the longest sequence that the model was made for; None if it does not say.
    """

    model: Module
    decoder: Module
    blocks: tuple[Module, ...]
    final_norm: Module
    width: int
    vocabulary: int
    max_positions: int | None

    @classmethod
    def of(cls, model: Module) -> Anatomy:
        """Find the parts of a model.

        Raises:
            ModelError: it is no mlx-lm language model, or has no one list of blocks or last norm.
        """
        name = type(model).__name__
        blocks = getattr(model, "layers", None)
        if not isinstance(blocks, list) or not blocks:
            raise ModelError(
                f"{name} is no mlx-lm language model (it has no list of layers); expected what "
                "dsteer.mlx.load returns"
            )
        if len(set(map(id, blocks))) < len(blocks):
            raise ModelError(
                f"{name}: some of its {len(blocks)} blocks are one module, which runs several "
                "times a pass; expected a module a block"
            )
        holders = [
            module
            for _, module in model.named_modules()
            if any(
                isinstance(child, list)
                and len(child) == len(blocks)
                and all(one is other for one, other in zip(child, blocks, strict=True))
                for child in module.values()
            )
        ]
        if len(holders) != 1:
            raise ModelError(
                f"{name}: {len(holders)} of its modules hold its blocks; expected exactly one"
            )
        norms = [
            child
            for key, child in holders[0].items()
            if "norm" in type(child).__name__.lower() and "embed" not in key
        ]
        if len(norms) != 1 or "weight" not in norms[0]:
            raise ModelError(
                f"{name}: {len(norms)} norms stand beside its blocks; expected exactly one with "
                "weights, after the last block"
            )
        rows = [
            int(child.weight.shape[0])  # a quantised weight is packed along the other axis
            for child in holders[0].values()
            if "embedding" in type(child).__name__.lower() and "weight" in child
        ]
        if not rows:
            raise ModelError(f"{name}: no embedding stands beside its blocks; expected one")
        limit = getattr(getattr(model, "args", None), "max_position_embeddings", None)
        return cls(
            model,
            holders[0],
            tuple(blocks),
            norms[0],
            int(norms[0].weight.shape[-1]),
            max(rows),  # of two, one is of positions
            limit if isinstance(limit, int) else None,
        )

    @property
    def n_blocks(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def shape(self) -> Shape:
        """What is known of the model that reads."""
        return Shape(self.width, self.n_blocks, self.vocabulary, self.max_positions, False)

    def about(self) -> dict[str, Json]:
        """What a set's metadata says of the model that its vectors were read from.

        Returns:
            ``model_type``, ``model_blocks`` (L), ``model_width`` (d), ``backend`` and
            ``quantisation`` (in words; None of a model that is not quantised).
        """
        args = getattr(self.model, "args", None)
        text = getattr(args, "text_config", None) or {}
        kinds = {
            f"{module.bits} bits, groups of {module.group_size}"
            for _, module in self.model.named_modules()
            if hasattr(module, "bits")
        }
        return {
            "model_type": text.get("model_type", getattr(args, "model_type", None)),
            "model_blocks": self.n_blocks,
            "model_width": self.width,
            "backend": "mlx",
            "quantisation": "; ".join(sorted(kinds)) or None,
        }

    def site(self, site: str) -> Module:
        """The module whose output is a site's state.

        Raises:
            ModelError: a site inside a block that has no such part.
        """
        block, component = block_of(site), component_of(site)
        if block is None:
            return self.final_norm
        if component is None:
            return self.blocks[block]
        part = "attention" if component == ATTENTION else "mlp"
        found = [child for key, child in self.blocks[block].items() if key in PARTS[part]]
        if len(found) != 1:
            raise ModelError(
                f"block {block}: {type(self.blocks[block]).__name__} has {len(found)} parts that "
                f"could be its {part}; expected one; use resid_post.{block}"
            )
        return found[0]


def state_in(output: Any) -> mx.array:
    """The state in what a module returned: the output itself, or the first of several parts.

    Raises:
        ModelError: it is no state of shape (B, T, d).
    """
    state = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(state, mx.array) or state.ndim != 3:
        shape = tuple(state.shape) if isinstance(state, mx.array) else type(state).__name__
        raise ModelError(
            f"a module returned {shape}; expected a state of shape (batch, tokens, width)"
        )
    return state


def with_state(output: Any, state: mx.array) -> Any:
    """What a module returned, with its state replaced."""
    return (state, *output[1:]) if isinstance(output, tuple | list) else state


@contextlib.contextmanager
def around(module: Module, do: Around) -> Iterator[None]:
    """Call ``do(call, *args, **kwargs)`` for a module's own call while the block runs.

    Python looks a call up in the class, so the module gets a subclass of its own for the time: its
    attributes, its parameters' paths and its place in the model stay as they are. What was added
    last is outermost, and what is added goes in any case, in whatever order.
    """
    kind = type(module)
    if not hasattr(kind, "dsteer_around"):
        own = {"__call__": _call, "dsteer_around": [], "dsteer_kind": kind}
        module.__class__ = kind = type(kind.__name__, (kind,), own)
    kind.dsteer_around.append(do)
    try:
        yield
    finally:
        kind.dsteer_around.remove(do)
        if not kind.dsteer_around:
            module.__class__ = kind.dsteer_kind


def _call(module: Module, *args: Any, **kwargs: Any) -> Any:
    kind = type(module)
    call = partial(kind.dsteer_kind.__call__, module)
    for do in tuple(kind.dsteer_around):
        call = partial(do, call)
    return call(*args, **kwargs)
